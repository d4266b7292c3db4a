"""`conversion_manifest.json`: what a converted folder was made from, and with what."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modernbert_align import __version__
from modernbert_align.core.checkpoint import file_sha256
from modernbert_align.errors import CheckpointError

MANIFEST = "conversion_manifest.json"


class FileDigest(BaseModel):
    """A file by name, size in bytes and SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    size_bytes: int
    sha256: str


class Source(BaseModel):
    """Where the tensors came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    revision: str | None
    files: tuple[FileDigest, ...]


class Manifest(BaseModel):
    """The record of one conversion.

    Attributes:
        dtype: `keep` or the float format all tensors were cast to.
        lossless: Whether every bit of every tensor can be recovered.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    tool: str = f"modernbert-align {__version__}"
    src: Literal["hf", "paddle"]
    dst: Literal["hf", "paddle"]
    head: str
    dtype: str
    lossless: bool
    table: str
    table_sha256: str
    source: Source
    files: tuple[FileDigest, ...]
    tensors: int
    tied: tuple[tuple[str, str], ...]
    versions: dict[str, str]
    command: str

    def same_request(self, other: "Manifest") -> bool:
        """Whether `other` would be made from the same bytes in the same way."""
        keys = ("tool", "src", "dst", "head", "dtype", "table_sha256")
        return all(getattr(self, key) == getattr(other, key) for key in keys) and (
            self.source.files == other.source.files
        )


def digest_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file."""
    return FileDigest(name=path.name, size_bytes=path.stat().st_size, sha256=file_sha256(path))


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, without importing the packages; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a converted folder, or None if it has none.

    Raises:
        CheckpointError: The manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            f"`{path}` is not a conversion manifest this version can read: {error.errors()[0]['msg']}",
            hint="use --force to convert again",
        ) from None
