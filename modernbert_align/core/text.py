"""Text that may come from a hostile file, made safe to show."""

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
