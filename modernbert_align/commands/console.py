"""Where things are said: data on stdout, everything else on stderr."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST = 1000


def stdout() -> "Console":
    """Console for results. Off a terminal it does not wrap at 80 columns."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has the letters of every name
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def stderr() -> "Console":
    """Console for progress and messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


def one_line(text: str) -> str:
    """Text that may come from a hostile file, safe to print: escapes for control characters, its middle left out."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 3 // 4]} [...] {text[-_LONGEST // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def line(text: str) -> None:
    """One line of a result."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has the letters of every name
    sys.stdout.write(one_line(text) + "\n")


def notify(message: str) -> None:
    """One line of progress."""
    if sys.stderr.isatty():
        stderr().print(one_line(message), style="dim", soft_wrap=True, markup=False)
    else:
        sys.stderr.write(one_line(message) + "\n")


def print_json(document: Any) -> None:
    """Machine output, alone on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


@contextmanager
def progress(label: str) -> Iterator[Any]:
    """A progress bar over bytes on a terminal; nothing elsewhere.

    Yields:
        A function of (bytes done, bytes in all).
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
