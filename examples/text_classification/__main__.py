"""Which package of the standard library is a function from? Trained in Paddle and in PyTorch, and compared."""

import ast
import io
import sys
import textwrap
import warnings
from pathlib import Path

from examples.common.corpus import Document, source_files
from examples.downstream.command import main
from examples.downstream.recipe import Data, Example, Recipe
from modernbert_align.errors import UsageError

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")
LONGEST = 400  # characters; the model sees 64 tokens
FORTUNES = Path("/usr/share/games/fortunes")
FORTUNE_FILES = 5


def functions() -> Data:
    """Every function of some packages, as text, labelled with its package."""
    texts: dict[str, int] = {}
    for file in source_files(include=[f"{package}/**/*.py" for package in PACKAGES]):
        lines = io.StringIO(file.text).readlines()  # as Python counts them; splitlines() also cuts at form feeds
        label = PACKAGES.index(file.path.partition("/")[0])
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                texts.setdefault(source[:LONGEST], label)
    return split("functions of the standard library, labelled with their package", PACKAGES, texts)


def parsed(file: Document) -> ast.Module:
    """The syntax tree of a source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in files that are not ours
        return ast.parse(file.text)


def fortunes() -> Data:
    """The sayings of Debian's `fortunes`, labelled with their collection; the largest ones that are there."""
    files = [path for path in sorted(FORTUNES.glob("*")) if path.is_file() and not path.suffix]
    if not files:
        raise UsageError(f"there are no fortunes in `{FORTUNES}`", hint="install them, or leave --data out")
    sayings = {path.name: path.read_text(encoding="utf-8", errors="replace").split("\n%\n") for path in files}
    largest = sorted(sorted(sayings, key=lambda name: -len(sayings[name]))[:FORTUNE_FILES])
    texts: dict[str, int] = {}
    for label, name in enumerate(largest):
        for saying in sayings[name]:
            texts.setdefault(saying.strip(), label)
    return split(f"fortunes in {FORTUNES}, labelled with their collection", tuple(largest), texts)


def split(source: str, labels: tuple[str, ...], texts: dict[str, int]) -> Data:
    """Every fifth text is for evaluation."""
    examples = [Example(text=text, label=label) for text, label in texts.items() if text]
    return Data(
        source=source,
        labels=labels,
        train=tuple(example for index, example in enumerate(examples) if index % 5),
        evaluation=tuple(examples[::5]),
    )


if __name__ == "__main__":
    recipe = Recipe(head="sequence_classification")
    sys.exit(main("text_classification", recipe, {"stdlib": functions, "fortunes": fortunes}))
