"""Where things are said: data on stdout, everything else on stderr."""

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modernbert_align.core.text import one_line

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class _Loudness:
    """What --quiet and --verbose ask for; `start` is when that was."""

    quiet: bool = False
    verbose: bool = False
    start: float = 0.0


_loudness = _Loudness()


def set_quiet(value: bool) -> bool:
    """Show no progress from now on, and of a comparison the verdict alone."""
    _loudness.quiet = value
    return value


def set_verbose(value: bool) -> bool:
    """Say from now on how long things take."""
    _loudness.verbose, _loudness.start = value, time.perf_counter()
    return value


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _loudness.quiet


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return _loudness.verbose


def stdout() -> "Console":
    """Console for results. Off a terminal it does not wrap at 80 columns."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has the letters of every name
    return _raising(Console(highlight=False, width=None if sys.stdout.isatty() else 120))


def stderr() -> "Console":
    """Console for progress and messages."""
    from rich.console import Console

    return _raising(Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120))


def _raising(console: "Console") -> "Console":
    """Let a closed pipe reach `main`; rich would exit with 1, which means misaligned here."""

    def closed() -> None:
        raise BrokenPipeError

    console.on_broken_pipe = closed  # type: ignore[method-assign]
    return console


def line(text: str) -> None:
    """One line of a result."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has the letters of every name
    sys.stdout.write(one_line(text) + "\n")


def verbatim(text: str, *, on_stderr: bool = False) -> None:
    """Whole lines that were made safe by whoever made them, such as the commands that a CI reads from its log."""
    if not on_stderr and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has the letters of every name
    stream = sys.stderr if on_stderr else sys.stdout
    stream.write(text)
    stream.flush()


def notify(message: str) -> None:
    """One line of progress; with the seconds since the start where --verbose asks for them."""
    if _loudness.quiet:
        return
    if _loudness.verbose:
        message = f"[{time.perf_counter() - _loudness.start:7.1f} s] {message}"
    if sys.stderr.isatty():
        stderr().print(one_line(message), style="dim", soft_wrap=True, markup=False)
    else:
        sys.stderr.write(one_line(message) + "\n")


def print_json(document: Any) -> None:
    """Machine output, alone on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


@contextmanager
def progress(label: str) -> Iterator[Any]:
    """A progress bar over bytes on a terminal; nothing elsewhere, or where --quiet was given.

    Yields:
        A function of (bytes done, bytes in all).
    """
    if _loudness.quiet or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
