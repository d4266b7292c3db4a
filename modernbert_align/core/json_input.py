"""Parses the JSON of a checkpoint, which is read before anything is known about it and may be anything.

Python's parser takes some 25 times a text's bytes in the worst case, converts numbers of thousands of digits in
quadratic time, and reads lists in lists that nothing can write again.
"""

import codecs
import gc
import json
from pathlib import Path
from typing import Any, NoReturn

MAX_JSON_BYTES = 10_000_000  # a safetensors header of 60,000 tensors
_MAX_DEPTH = 64
_MAX_DIGITS = 40


def read_json(path: Path, *, strict: bool) -> Any:
    """Parse a file; see `parse_json`.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large or not JSON.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
    return parse_json(raw, strict=strict)


def parse_json(raw: bytes, *, strict: bool) -> Any:
    """Parse JSON in UTF-8, without a byte order mark.

    Args:
        strict: Refuse duplicate keys and the constants that are not JSON: NaN and the infinities.

    Raises:
        ValueError: It is not such JSON, nested too deeply or holds a number of too many digits; says what and where.
    """
    if raw.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark")
    collecting = gc.isenabled()
    gc.disable()  # it would look at millions of hostile lists again and again, and there are no cycles to find
    try:
        return _parsed(raw, strict)
    finally:
        if collecting:
            gc.enable()


def _parsed(raw: bytes, strict: bool) -> Any:
    try:
        document = json.loads(
            raw.decode(),
            parse_int=_integer,
            parse_constant=_no_constant if strict else None,
            object_pairs_hook=_no_duplicates if strict else None,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [document]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return document
    raise ValueError("it is nested too deeply")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text):,} digits")
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"duplicate entry `{name}`")
            seen.add(name)
    return found
