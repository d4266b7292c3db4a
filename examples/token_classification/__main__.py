"""What is every token of a Python source? Trained in Paddle and in PyTorch, and compared."""

import bisect
import io
import keyword
import sys
import tokenize
from collections.abc import Iterator

from examples.common.corpus import source_files
from examples.downstream.command import main
from examples.downstream.recipe import Data, Example, Recipe

PACKAGES = ("asyncio", "email", "json", "logging")
CLASSES = ("name", "keyword", "number", "string", "operator", "comment")
LINES = 6  # of source per example


def classified() -> Data:
    """Sources of some packages, some lines at a time, with the class of every token as `tokenize` sees it."""
    examples: dict[str, Example] = {}
    for file in source_files(include=[f"{package}/**/*.py" for package in PACKAGES]):
        lines = io.StringIO(file.text).readlines()  # as Python counts them; splitlines() also cuts at form feeds
        spans = list(spans_of(lines))
        starts, ends = ([span[side] for span in spans] for side in (0, 1))
        end = 0
        for first in range(0, len(lines), LINES):
            piece = "".join(lines[first : first + LINES])
            start, end = end, end + len(piece)
            inside = spans[bisect.bisect_right(ends, start) : bisect.bisect_left(starts, end)]
            within = [(max(a, start) - start, min(b, end) - start, label) for a, b, label in inside]
            if len(within) > 1:
                examples.setdefault(piece, Example(text=piece, spans=tuple(within)))
    found = list(examples.values())
    return Data(
        source=f"sources of {', '.join(PACKAGES)} in the standard library, classified by tokenize",
        labels=CLASSES,
        train=tuple(example for index, example in enumerate(found) if index % 5),
        evaluation=tuple(found[::5]),
    )


def spans_of(lines: list[str]) -> Iterator[tuple[int, int, int]]:
    """(start, end, class) of every token of a source, in characters."""
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(iter(lines).__next__):
        label = class_of(token)
        if label is not None:
            yield starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1], label


def class_of(token: tokenize.TokenInfo) -> int | None:
    """Index of a token's class; None for line ends and indentation."""
    kind = tokenize.tok_name[token.type]
    if kind == "NAME":
        kind = "KEYWORD" if keyword.iskeyword(token.string) else "NAME"
    kind = {"OP": "OPERATOR"}.get(kind, "STRING" if kind.startswith("FSTRING") else kind)
    return CLASSES.index(kind.lower()) if kind.lower() in CLASSES else None


if __name__ == "__main__":
    sys.exit(main("token_classification", Recipe(head="token_classification"), {"stdlib": classified}))
