"""`conversion_manifest.json`: what a converted folder was made from, with what, and what was proved about it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modernbert_align import __version__
from modernbert_align.core.digest import Algorithm, file_digest
from modernbert_align.core.partial import MANIFEST
from modernbert_align.core.writer import TensorRecord
from modernbert_align.errors import CheckpointError


class FileDigest(BaseModel):
    """A file by name, size in bytes and digest.

    Attributes:
        digest: `algorithm:hex`, or None if digests were not asked for.
        published: Whether the digest is the one the hub publishes for the file, not computed from its bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    size_bytes: int
    digest: str | None
    published: bool = False


class Source(BaseModel):
    """Where the tensors came from.

    Attributes:
        location: The folder at the time.
        revision: Hub commit, if it came from the hub.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    location: str
    revision: str | None
    files: tuple[FileDigest, ...]


class Proof(BaseModel):
    """One proof that ran and held.

    Attributes:
        level: `tensors`, `dye` or `roundtrip`.
        statement: What it showed, in one sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    level: Literal["tensors", "dye", "roundtrip"]
    statement: str


class Manifest(BaseModel):
    """The record of one conversion.

    Attributes:
        dtype: `keep` or the float format all tensors were cast to.
        shard_size: `keep`, `none` or a number of bytes.
        tensor_parallel: Among how many ranks the output is divided; 1 if it is whole.
        lossless: Whether every bit of every tensor can be recovered.
        tensors: Written name -> record; of a rank's share, the name followed by `@tp` and the rank.
        proofs: What was proved before the folder got its name; empty if nothing was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[2] = 2
    tool: str = f"modernbert-align {__version__}"
    src: Literal["hf", "paddle"]
    dst: Literal["hf", "paddle"]
    head: str
    dtype: str
    shard_size: int | Literal["keep", "none"]
    tensor_parallel: int = 1
    lossless: bool
    table: str
    table_sha256: str
    source: Source
    files: tuple[FileDigest, ...]
    tensors: dict[str, TensorRecord]
    tied: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    proofs: tuple[Proof, ...]
    versions: dict[str, str]
    command: str

    def same_request(self, other: "Manifest") -> bool:
        """Whether `other` would be made from the same bytes in the same way; never if the bytes have no digest."""
        keys = ("tool", "src", "dst", "head", "dtype", "shard_size", "tensor_parallel", "table_sha256")
        mine, theirs = ([(f.name, f.size_bytes, f.digest) for f in m.source.files] for m in (self, other))
        return (
            all(getattr(self, key) == getattr(other, key) for key in keys)
            and mine == theirs
            and all(digest is not None for _, _, digest in mine)
        )


def digest_file(path: Path, algorithm: Algorithm = "sha256") -> FileDigest:
    """Name, size and digest of a file; no digest for `none`."""
    digest = None if algorithm == "none" else file_digest(path, algorithm)
    return FileDigest(name=path.name, size_bytes=path.stat().st_size, digest=digest)


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
