"""Which package of the standard library is a function from? Trained in Paddle and in PyTorch, and compared."""

import ast
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from downstream.command import main
from downstream.recipe import Data, Example, Recipe
from downstream.standard_library import lines_of, sources

from modernbert_align.errors import UsageError

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")
LONGEST = 400  # characters; the model sees 64 tokens
FORTUNES = Path("/usr/share/games/fortunes")
FORTUNE_FILES = 5


def functions() -> Data:
    """Every function of some packages, as text, labelled with its package."""
    texts: dict[str, int] = {}
    for package, text, tree in sources(PACKAGES):
        lines = lines_of(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                texts.setdefault(source[:LONGEST], PACKAGES.index(package))
    return split("functions of the standard library, labelled with their package", PACKAGES, texts)


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
