"""Reads and writes safetensors checkpoints by header, a piece of a tensor at a time.

Nothing here needs a framework, and no file is ever loaded whole. Tensors are handled as unsigned integers of the
same width, so bfloat16 needs no special type and NaN payloads survive.

Source: the safetensors format (8-byte little-endian header length, JSON header, one contiguous buffer).
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from modernbert_align.core.ops import Bits
from modernbert_align.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 8 << 20
_MAX_HEADER = 100_000_000

# Width in bytes, in the order in which safetensors sorts tensors (widest alignment first when reversed).
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_RANK = {name: rank for rank, name in enumerate(DTYPE_BYTES)}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor's bytes are.

    Attributes:
        dtype: The safetensors name, for example `F32`.
        offset: Byte position of the first element in `path`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.elements * DTYPE_BYTES[self.dtype]


def unsigned(dtype: str) -> np.dtype[Any]:
    """The unsigned numpy type as wide as a safetensors dtype."""
    return np.dtype(f"u{DTYPE_BYTES[dtype]}")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        Tensors by name, and the file's `__metadata__`.

    Raises:
        CheckpointError: Not a safetensors file, cut short, or with offsets that do not fit its tensors.
    """
    hint = "the file is damaged or only partly downloaded; fetch it again"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"`{path}` is not a whole safetensors file ({size} bytes)", hint=hint)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the header of `{path}` cannot be read: {error}", hint=hint) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of `{path}` is not an object", hint=hint)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"the header of `{path}` is malformed", hint=hint)
    tensors: dict[str, TensorInfo] = {}
    position = 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            start, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPE_BYTES:
                raise CheckpointError(f"`{name}` in `{path}` has the unsupported dtype `{entry['dtype']}`")
            info = TensorInfo(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                path=path,
                offset=8 + length + start,
            )
            if any(type(n) is not int or n < 0 for n in info.shape):
                raise ValueError(name)
            if start != position or end - start != info.size_bytes:
                raise CheckpointError(f"`{name}` in `{path}` does not fill its place in the file", hint=hint)
            position = end
            tensors[name] = info
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"the header of `{path}` is malformed", hint=hint) from None
    if 8 + length + position != size:
        raise CheckpointError(
            f"`{path}` is truncated or has trailing bytes: {size} bytes, its header describes {8 + length + position}",
            hint=hint,
        )
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"duplicate entry `{next(n for n in names if names.count(n) > 1)}`")
    return dict(pairs)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint folder, one file or several. Use `open_checkpoint`."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    def read(self, name: str) -> Bits:
        """One whole tensor as unsigned integers, in its stored shape."""
        info = self.tensors[name]
        bits = np.fromfile(info.path, dtype=unsigned(info.dtype), count=info.elements, offset=info.offset)
        if bits.size != info.elements:
            raise CheckpointError(f"`{info.path}` ended while `{name}` was read")
        return bits.reshape(info.shape)

    def chunks(self, name: str) -> Iterator[Bits]:
        """A tensor's elements in order, flat, about 8 MiB at a time."""
        info = self.tensors[name]
        step = CHUNK_BYTES // DTYPE_BYTES[info.dtype]
        with info.path.open("rb") as file:
            file.seek(info.offset)
            for start in range(0, info.elements, step):
                count = min(step, info.elements - start)
                bits = np.fromfile(file, dtype=unsigned(info.dtype), count=count)
                if bits.size != count:
                    raise CheckpointError(f"`{info.path}` ended while `{name}` was read")
                yield bits


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open `model.safetensors` or the shards that `model.safetensors.index.json` lists.

    Raises:
        CheckpointError: No weights, a missing shard, an index that disagrees with its shards or leaves the folder.
    """
    if not folder.exists():
        raise CheckpointError(f"no such directory: `{folder}`", hint="give a checkpoint folder, a hub id or a fixture")
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is not a directory", hint="give the folder that holds config.json")
    if (folder / WEIGHTS).is_file():
        tensors, _ = read_header(folder / WEIGHTS)
        return Checkpoint(folder=folder, tensors=tensors, files=(folder / WEIGHTS,))
    if (folder / INDEX).is_file():
        return _open_sharded(folder)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pdparams", ".safetensors"})
    raise CheckpointError(
        f"no `{WEIGHTS}` and no `{INDEX}` in `{folder}`",
        hint=f"found {', '.join(others)}; save the model as safetensors first"
        if others
        else "the folder has no weights",
    )


def _open_sharded(folder: Path) -> Checkpoint:
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{path}` is not a valid safetensors index: {error}") from None
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"`{path}` names the shard `{shard}`, which is outside its folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"the shard `{shard}` listed in `{path}` is missing", hint="download it again")
        here, _ = read_header(folder / shard)
        for name, info in here.items():
            if name in tensors:
                raise CheckpointError(f"`{name}` is in two shards: `{tensors[name].path.name}` and `{shard}`")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"`{path}` places `{name}` in `{shard}`, which does not hold it")
    unlisted = sorted(set(tensors) - set(weight_map))
    if unlisted:
        raise CheckpointError(f"`{unlisted[0]}` is in a shard but not in `{path}`")
    return Checkpoint(folder=folder, tensors=tensors, files=tuple(folder / shard for shard in shards))


def canonical_order(specs: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Sort (name, dtype, shape) the way safetensors does: widest dtype first, then by name."""
    return sorted(specs, key=lambda spec: (-_RANK[spec[1]], spec[0]))


class SafetensorsWriter:
    """Writes one safetensors file front to back, its header known in advance.

    The header is canonical (order, compact JSON, padding to eight bytes), so equal content gives equal bytes: a
    checkpoint converted there and back has the digest of the original file.
    """

    def __init__(self, path: Path, specs: Sequence[tuple[str, str, tuple[int, ...]]], file_format: str) -> None:
        self.order = [name for name, _, _ in canonical_order(specs)]
        self._sizes: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": file_format}}
        position = 0
        for name, dtype, shape in canonical_order(specs):
            self._sizes[name] = math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [position, position + self._sizes[name]],
            }
            position += self._sizes[name]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._next = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")
        self._put(struct.pack("<Q", len(text)) + text)

    @property
    def sha256(self) -> str:
        """Digest of everything handed to the file so far."""
        return self._digest.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)

    def write(self, name: str, pieces: Iterator[Bits]) -> None:
        """Write the next tensor; tensors come in `order`."""
        if name != self.order[self._next]:
            raise AssertionError(f"{name} written out of order")
        written = 0
        for piece in pieces:
            flat = np.ascontiguousarray(piece).reshape(-1)
            self._put(flat.view(np.uint8).data)
            written += flat.nbytes
        if written != self._sizes[name]:
            raise AssertionError(f"{name}: {written} bytes written, {self._sizes[name]} declared")
        self._next += 1

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._next != len(self.order):
                    raise AssertionError(f"{self.order[self._next]} was never written")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read 8 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
