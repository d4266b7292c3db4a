"""Text that may come from a hostile file or a strange file name, made safe to show and to store."""

import os
import shlex
import sys

_LONGEST = 1000


def one_line(text: str, longest: int = _LONGEST) -> str:
    """The text on one line: escapes for whatever is not printable, its middle left out if it is too long.

    Args:
        text: Anything, lone surrogates included.
        longest: Characters that are kept.
    """
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} [...] {text[-longest // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_text(name: str) -> str:
    """A name of the file system as text: bytes that are not UTF-8 as escapes, which JSON could not hold."""
    return os.fsencode(name).decode(errors="backslashreplace")


def command_line() -> str:
    """What was typed to start this program, as a shell takes it."""
    return name_text(shlex.join(["modernbert-align", *sys.argv[1:]]))
