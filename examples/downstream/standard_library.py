"""Real text that every Python carries: the sources of its own standard library."""

import ast
import io
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path


def sources(packages: Sequence[str]) -> Iterator[tuple[str, str, ast.Module]]:
    """Package, text and syntax tree of every module of some packages, in the order of their paths.

    Modules that cannot be read or parsed are left out; some contain wrong code on purpose.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for package in packages:
        for path in sorted((library / package).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # old escapes in strings
                    yield package, text, ast.parse(text)
            except (OSError, SyntaxError, UnicodeError):
                continue


def lines_of(text: str) -> list[str]:
    """The lines of a source with their ends, as Python counts them; `splitlines` also cuts at form feeds."""
    return io.StringIO(text).readlines()
