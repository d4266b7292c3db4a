"""Reads checkpoints: safetensors by header and a piece of a tensor at a time, pickled ones whole.

Nothing here needs a framework. Tensors are handled as unsigned integers of the same width, so bfloat16 needs no
special type and NaN payloads survive.

Source: the safetensors format (8-byte little-endian header length, JSON header, one contiguous buffer).
"""

import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_align.core.hub_cache import inside_source
from modernbert_align.core.json_input import MAX_JSON_BYTES, parse_json, read_json
from modernbert_align.core.ops import Bits
from modernbert_align.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, PADDLE_WEIGHTS = "pytorch_model.bin", "model_state.pdparams"
_RANK_FILES = (re.compile(r"model\.tp([0-9]{2})\.safetensors"), re.compile(r"model_state\.tp([0-9]{2})\.pdparams"))
_MAX_DIMENSIONS = 64
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

# Width in bytes, in the order in which safetensors sorts tensors (last goes first).
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
DTYPE_RANK = {name: rank for rank, name in enumerate(DTYPE_BYTES)}


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
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"`{path}` is not a whole safetensors file ({size} bytes)", hint=hint)
        if length > MAX_JSON_BYTES:
            raise CheckpointError(f"the header of `{path}` has {length:,} bytes, more than any model needs", hint=hint)
        raw = file.read(length)
    try:
        header = parse_json(raw, strict=True)
    except ValueError as error:
        raise CheckpointError(f"the header of `{path}` cannot be read: {error}", hint=hint) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of `{path}` is not an object", hint=hint)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the metadata in the header of `{path}` is not text by name", hint=hint)
    for name, entry in header.items():
        if not _well_formed(entry):
            raise CheckpointError(f"the header of `{path}` describes `{name}` as no tensor can be", hint=hint)
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
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
        if start != position or end - start != info.size_bytes:
            raise CheckpointError(f"`{name}` in `{path}` does not fill its place in the file", hint=hint)
        position = end
        tensors[name] = info
    if 8 + length + position != size:
        raise CheckpointError(
            f"`{path}` is truncated or has trailing bytes: {size} bytes, its header describes {8 + length + position}",
            hint=hint,
        )
    return tensors, metadata


def _well_formed(entry: Any) -> bool:
    """Whether an entry of a header has the keys and kinds of a tensor's.

    A key that this version does not know could change what the bytes mean.
    """
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS or not isinstance(entry["dtype"], str):
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        return False
    return all(type(n) is int for n in (*shape, *offsets)) and all(n >= 0 for n in shape)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint folder, one file or several. Use `open_checkpoint`.

    Attributes:
        files: The weight files, in the order of their names.
        index: The index of a sharded checkpoint.
        arrays: The tensors of pickled files, which cannot be read a piece at a time.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    index: Path | None = None
    arrays: Mapping[str, Bits] = field(default_factory=dict)

    @property
    def pickled(self) -> bool:
        """Whether the files are pickles, not safetensors."""
        return bool(self.arrays)

    @property
    def contiguous(self) -> bool:
        """Whether the bytes of every tensor are in one place of a file, as they are."""
        return not self.arrays

    def fill(self, name: str, start: int, out: Bits) -> None:
        """Read consecutive elements of a tensor.

        Args:
            start: Index of the first element.
            out: Flat and contiguous; filled whole.

        Raises:
            CheckpointError: The file ended, or cannot be read any more.
        """
        info = self.tensors[name]
        if name in self.arrays:
            out[:] = self.arrays[name].reshape(-1)[start : start + out.size]
            return
        try:
            self._read_at(info.path, info.offset + start * out.itemsize, out.view(np.uint8).data)
        except OSError as error:
            raise CheckpointError(f"`{info.path}` cannot be read: {error.strerror}") from None
        except EOFError:
            raise CheckpointError(f"`{info.path}` ended while `{name}` was read") from None

    def _read_at(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a file from `offset` on."""
        handle = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(out):
                count = os.preadv(handle, [out[done:]], offset + done)
                if count == 0:
                    raise EOFError
                done += count
        finally:
            os.close(handle)

    def read(self, name: str) -> Bits:
        """One whole tensor as unsigned integers, in its stored shape."""
        info = self.tensors[name]
        bits = np.empty(info.elements, dtype=unsigned(info.dtype))
        self.fill(name, 0, bits)
        return bits.reshape(info.shape)


TorchReader = Callable[[Path], Mapping[str, tuple[Bits, str]]]


def open_checkpoint(folder: Path, *, read_torch: TorchReader | None = None) -> Checkpoint:
    """Open the weights of a folder: one file, or the shards an index lists.

    safetensors go before PyTorch's and Paddle's pickles, and one file goes before an index.

    Args:
        read_torch: Reads a `pytorch_model.bin`; it needs torch, which this module does not.

    Raises:
        CheckpointError: No weights, a missing shard, an index that disagrees with its shards or leaves the folder, a
            damaged or unreadable file, or a pickle that holds anything but tensors.
    """
    try:
        return _open(folder, read_torch)
    except OSError as error:
        raise CheckpointError(f"`{error.filename or folder}` cannot be read: {error.strerror}") from None


def _open(folder: Path, read_torch: TorchReader | None) -> Checkpoint:
    if not folder.exists():
        raise CheckpointError(f"no such directory: `{folder}`", hint="give a checkpoint folder, a hub id or a fixture")
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is not a directory", hint="give the folder that holds config.json")
    for weights, read in ((WEIGHTS, None), (TORCH_WEIGHTS, read_torch), (PADDLE_WEIGHTS, _read_paddle)):
        if read is None and weights != WEIGHTS:
            continue
        if (folder / weights).is_file():
            check_inside(folder / weights, folder)
            tensors, arrays = _read_file(folder / weights, read)
            return Checkpoint(folder=folder, tensors=tensors, files=(folder / weights,), arrays=arrays)
        if (folder / f"{weights}.index.json").is_file():
            return _open_sharded(folder, folder / f"{weights}.index.json", read)
    ranks = rank_files(folder)
    if ranks:
        raise CheckpointError(
            f"`{folder}` is divided among tensor-parallel ranks ({ranks[min(ranks)].name}, ...)",
            hint=f"make it whole: modernbert-align convert --src paddle --merge --model {folder}",
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pdparams", ".safetensors"})
    raise CheckpointError(
        f"no `{WEIGHTS}` and no `{INDEX}` in `{folder}`",
        hint=f"found {', '.join(others)}; save the model as safetensors first"
        if others
        else "the folder has no weights",
    )


def rank_file(rank: int) -> str:
    """The name of a rank's file.

    Source: paddlenlp 2.8.1, transformers/utils.py, weight_name_suffix; transformers/model_utils.py, _add_variant.
    """
    return f"model.tp{rank:02d}.safetensors"


def rank_files(folder: Path) -> dict[int, Path]:
    """Rank -> its file, of a checkpoint that PaddleNLP stores divided; empty if the folder has none.

    safetensors go before Paddle's pickles.
    """
    for pattern in _RANK_FILES:
        found = {int(match[1]): p for p in folder.iterdir() if (match := pattern.fullmatch(p.name))}
        if found:
            return dict(sorted(found.items()))
    return {}


def has_whole_weights(folder: Path) -> bool:
    """Whether a folder has weights that PaddleNLP would load on every rank."""
    return any((folder / f"{name}{end}").is_file() for name in (WEIGHTS, PADDLE_WEIGHTS) for end in ("", ".index.json"))


def open_rank_file(path: Path) -> Checkpoint:
    """Open one rank's file.

    Raises:
        CheckpointError: It is damaged, unreadable or a link that leads out of its folder.
    """
    try:
        check_inside(path, path.parent)
        tensors, arrays = _read_file(path, _read_paddle if path.suffix == ".pdparams" else None)
    except OSError as error:
        raise CheckpointError(f"`{error.filename or path}` cannot be read: {error.strerror}") from None
    return Checkpoint(folder=path.parent, tensors=tensors, files=(path,), arrays=arrays)


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of a checkpoint folder: converting it would publish a file of this machine.

    Raises:
        CheckpointError: `path`, links resolved, lies outside `folder` and its hub cache repository.
    """
    if not inside_source(path, folder):
        raise CheckpointError(
            f"`{path}` is a link that leads out of `{folder}`", hint="replace the link by the file it points to"
        )


def _read_paddle(path: Path) -> Mapping[str, tuple[Bits, str]]:
    from modernbert_align.core.paddle_pickle import read_pdparams  # most conversions never need it

    return read_pdparams(path)


def _read_file(path: Path, read: TorchReader | None) -> tuple[dict[str, TensorInfo], dict[str, Bits]]:
    if read is None:
        return read_header(path)[0], {}
    found = read(path)
    tensors = {
        name: TensorInfo(name=name, dtype=dtype, shape=tuple(bits.shape), path=path, offset=0)
        for name, (bits, dtype) in found.items()
    }
    return tensors, {name: bits for name, (bits, _) in found.items()}


def _open_sharded(folder: Path, path: Path, read: TorchReader | None) -> Checkpoint:
    check_inside(path, folder)
    try:
        document = read_json(path, strict=True)
    except ValueError as error:
        raise CheckpointError(f"`{path}` is not a valid index of shards: {error}") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"`{path}` is not a valid index of shards: its `weight_map` does not place every tensor")
    shards = sorted(set(weight_map.values()))
    tensors: dict[str, TensorInfo] = {}
    arrays: dict[str, Bits] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"`{path}` names the shard `{shard}`, which is outside its folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"the shard `{shard}` listed in `{path}` is missing", hint="download it again")
        check_inside(folder / shard, folder)
        here, values = _read_file(folder / shard, read)
        for name, info in here.items():
            if name in tensors:
                raise CheckpointError(f"`{name}` is in two shards: `{tensors[name].path.name}` and `{shard}`")
            tensors[name] = info
        arrays |= values
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"`{path}` places `{name}` in `{shard}`, which does not hold it")
    unlisted = sorted(set(tensors) - set(weight_map))
    if unlisted:
        raise CheckpointError(f"`{unlisted[0]}` is in a shard but not in `{path}`")
    files = tuple(folder / shard for shard in shards)
    return Checkpoint(folder=folder, tensors=tensors, files=files, index=path, arrays=arrays)
