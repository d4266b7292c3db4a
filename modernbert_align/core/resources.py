"""Finds the declarative files of `configs/`, in a checkout and in an installed wheel."""

import hashlib
import sys
from pathlib import Path
from typing import Any

from modernbert_align.errors import TableError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PACKAGE = Path(__file__).resolve().parent.parent


def configs_dir() -> Path:
    """Folder of the declarative files: `_configs` inside an installed wheel, `configs` in a checkout."""
    for folder in (_PACKAGE / "_configs", _PACKAGE.parent / "configs"):
        if (folder / "tables").is_dir():
            return folder
    raise TableError(
        "the `configs` folder of modernbert-align was not found", hint="reinstall the package; its wheel carries it"
    )


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Parse a TOML file.

    Returns:
        The parsed document and the SHA-256 of the file's bytes.

    Raises:
        TableError: The file is not valid TOML.
    """
    raw = path.read_bytes()
    try:
        document = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"`{path}` is not valid TOML: {error}") from None
    return document, hashlib.sha256(raw).hexdigest()
