"""Reads PyTorch's pickled checkpoints (`pytorch_model.bin`, `.pt`, `.pth`) through torch's restricted loader.

`torch.load(weights_only=True)` keeps a file from running code. It does not keep a file from lying: a storage may claim
more bytes than its record has, or belong to no record at all and so show this process's memory. Every storage is
therefore held against the file: in a zip archive it must be exactly the bytes of one record, in the older format all
of them together must be exactly the rest of the file.

Source: torch 2.13 `serialization.py` (`load`, `_load`, `_legacy_load`) and `_weights_only_unpickler.py`; the zip
format's local file header.
"""

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from modernbert_align.core.checkpoint import unsigned
from modernbert_align.core.ops import Bits
from modernbert_align.core.paddle_pickle import printable
from modernbert_align.errors import CheckpointError, MissingPackageError

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("state_dict", "model")
_MAX_INSTRUCTIONS = 500_000  # some 30 a tensor; torch interprets them in Python, an object each
_LEGACY_PICKLES = 5  # magic number, protocol, machine, content, storage keys
_DAMAGED = "the file is damaged or only partly downloaded; fetch it again"
_RESAVE = "only plain state dicts are read; if you trust the file, load it with torch and save `model.state_dict()`"
_DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def read_torch_file(path: Path) -> dict[str, tuple[Bits, str]]:
    """Read every tensor of a file that `torch.save` wrote, without running code from it.

    A zip archive is mapped: its tensors are views of the file, and memory is taken only for those that are not
    contiguous. Files in the format before torch 1.6 are read into memory, once.

    A dict that keeps its tensors one level down, under `state_dict` or `model` and nowhere else, is read as if it
    were that inner dict; what else it holds is ignored.

    Args:
        path: The file.

    Returns:
        By name, in the order of the file: the tensor as unsigned integers in its shape (C-contiguous), and its
        safetensors dtype. Tensors that share memory in the file share it here.

    Raises:
        CheckpointError: Not such a file, damaged, asks for anything but tensors, or holds a value that is not a dense
            tensor of a dtype that safetensors has.
        MissingPackageError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(f"`{path}` needs torch: {error}", hint="pip install torch") from None
    try:
        if not path.is_file():  # opening a pipe would wait
            raise CheckpointError(f"`{path}` is not a file" if path.exists() else f"no such file: `{path}`")
        storages = _Storages(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and torch's own deprecations
            content = torch.load(path, map_location=storages.keep, weights_only=True, mmap=storages.mapped)
        storages.check()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror or _line(error)}") from None
    except pickle.UnpicklingError as error:
        raise _refused(path, _reason(error), _RESAVE) from None
    except Exception as error:  # noqa: BLE001 - a damaged file makes torch raise almost anything
        raise _refused(path, _line(error), _DAMAGED) from None
    return _Tensors(path, storages).read(content)


class _Storages:
    """What memory the tensors of a file may have, and what torch gave them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file_bytes = path.stat().st_size
        self._seen: list[tuple[int, int]] = []  # address and bytes
        self._starts: set[int] = set()
        self._claimed = 0
        self._filled = 0  # bytes of the older format: each storage is preceded by its length
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(0)
            self.mapped = head == b"PK\x03\x04"
            if not head:
                raise _refused(path, "it is empty", _DAMAGED)
            if not self.mapped and head[:1] != b"\x80":
                raise _refused(path, "it is neither a zip archive nor a pickle", _DAMAGED)
            if self.mapped:
                self._records = sorted(self._archive(file))
            else:
                _count(path, file, _LEGACY_PICKLES)
                self._rest = self.file_bytes - file.tell()

    def _archive(self, file: BinaryIO) -> Iterator[tuple[int, int]]:
        """Position and size of every storage's record."""
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            prefix = records[0].filename.partition("/")[0] if records else ""  # torch, too, takes the first record's
            names = set(archive.namelist())
            if f"{prefix}/constants.pkl" in names:
                raise _refused(self._path, "it is a TorchScript program", _RESAVE)
            if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
                raise _refused(self._path, "it has compressed records, which torch.save never writes")
            if sum(r.file_size for r in records) > self.file_bytes:
                raise _refused(self._path, "its records overlap")
            if f"{prefix}/data.pkl" not in names:
                raise _refused(self._path, f"it is a zip archive without `{printable(prefix)}/data.pkl`")
            with archive.open(f"{prefix}/data.pkl") as pickled:
                _count(self._path, pickled, 1)
            for record in records:
                if record.filename.startswith(f"{prefix}/data/") and record.file_size:
                    file.seek(record.header_offset + 26)
                    name, extra = struct.unpack("<HH", file.read(4))
                    yield record.header_offset + 30 + name + extra, record.file_size

    def keep(self, storage: "torch.UntypedStorage", _location: str) -> "torch.UntypedStorage":
        """Note a storage that torch made for the file, before it is filled; it stays on the CPU."""
        size = storage.nbytes()
        self._filled += size + 8
        if not size:
            return storage
        self._claimed += size
        if self._claimed > self.file_bytes:
            raise _refused(self._path, "its tensors claim more bytes than it has", _DAMAGED)
        if not self.mapped:
            storage.fill_(0)  # fresh from the allocator, and a hostile file may never fill it
        self._seen.append((storage.data_ptr(), size))
        self._starts.add(storage.data_ptr())
        return storage

    def check(self) -> None:
        """Hold the storages against the file.

        Raises:
            CheckpointError: They are not the file's records, or not all of them.
        """
        if not self.mapped:
            if self._filled != self._rest:
                raise _refused(self._path, "its tensors are not all of its data", _DAMAGED)
            return
        # The address of the mapping is not known, the distances within it are.
        self._seen.sort()
        at = [(start - self._seen[0][0], size) for start, size in self._seen]
        if at != [(start - self._records[0][0], size) for start, size in self._records]:
            raise _refused(self._path, "its tensors are not the records it has", _DAMAGED)

    def hold(self, storage: "torch.UntypedStorage") -> bool:
        """Whether a storage is one of the file's."""
        return not storage.nbytes() or storage.data_ptr() in self._starts


class _Tensors:
    """Turns what torch loaded into arrays.

    torch lets a file set any attribute of a tensor or dict, which hides the method of that name. So tensors are
    detached and dicts read through their classes.
    """

    def __init__(self, path: Path, storages: _Storages) -> None:
        self._path = path
        self._storages = storages
        self._copied = 0

    def read(self, content: object) -> dict[str, tuple[Bits, str]]:
        """All of them, by name."""
        tensors: dict[str, tuple[Bits, str]] = {}
        known: dict[int, tuple[Bits, str]] = {}
        for name, value in dict.items(self._state(content)):
            if not isinstance(name, str):
                raise self._refused(f"a name in it is of type {type(name).__name__}, not text", _RESAVE)
            if id(value) not in known:
                known[id(value)] = self._bits(name, value)
            tensors[name] = known[id(value)]
        return tensors

    def _state(self, content: object) -> dict[Any, Any]:
        if not isinstance(content, dict):
            raise self._refused(f"it holds a {type(content).__name__}, not a dict of tensors", _RESAVE)
        holders = [key for key, value in dict.items(content) if _holds_tensors(value)]
        if len(holders) == 1 and holders[0] in _WRAPPERS:
            inner = dict.__getitem__(content, holders[0])
            if isinstance(inner, dict):
                return inner
        return content

    def _bits(self, name: str, value: object) -> tuple[Bits, str]:
        import torch

        shown = printable(name)
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise self._refused(f"`{shown}` is of type {type(value).__name__}, not a tensor", _RESAVE)
        try:
            tensor = torch.Tensor.detach(value)
            if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
                kind = f"{'nested' if tensor.is_nested else tensor.layout} on {tensor.device.type}"
                raise self._refused(f"`{shown}` is not a dense tensor in memory but {kind}", _RESAVE)
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise self._refused(f"`{shown}` has the dtype {dtype}, which safetensors does not have", _RESAVE)
            if not self._storages.hold(tensor.untyped_storage()):
                raise self._refused(f"`{shown}` does not lie in the file")
            size = tensor.numel() * tensor.element_size()
            if not tensor.is_contiguous() or tensor.is_neg():
                self._copied += size
                if size > tensor.untyped_storage().nbytes():
                    raise self._refused(f"`{shown}` repeats its elements", _RESAVE)
                if self._copied > self._storages.file_bytes:
                    raise self._refused("its tensors are views that would take more memory than the file", _RESAVE)
            width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            bits = tensor.resolve_neg().contiguous().view(width).numpy()
        except RuntimeError as error:
            raise self._refused(f"`{shown}` cannot be used: {_line(error)}") from None
        return bits.view(unsigned(_DTYPES[dtype])), _DTYPES[dtype]

    def _refused(self, what: str, hint: str = "") -> CheckpointError:
        return _refused(self._path, what, hint)


def _holds_tensors(value: object) -> bool:
    """Whether there is a tensor in it, at any depth; each thing is looked at once, for it may contain itself."""
    import torch

    seen: set[int] = set()
    todo = [value]
    while todo:
        here = todo.pop()
        if isinstance(here, torch.Tensor):
            return True
        if isinstance(here, dict | list | tuple | set) and id(here) not in seen:
            seen.add(id(here))
            todo += dict.values(here) if isinstance(here, dict) else here
    return False


def _count(path: Path, file: Any, pickles: int) -> None:
    """Read over some pickles and refuse them if they are too long to be interpreted in Python.

    Source: pickletools.genops, which executes nothing.
    """
    left = _MAX_INSTRUCTIONS
    for _ in range(pickles):
        for _ in pickletools.genops(file):
            left -= 1
            if not left:
                raise _refused(path, f"it has more than {_MAX_INSTRUCTIONS} pickle instructions", _RESAVE)


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch does not unpickle."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it refers to `{printable(named[1])}`, which is not part of a state dict and was not executed"
    if told := re.search(r"(?:WeightsUnpickler error: |\n\n)\s*(.*)", text):  # behind advice to load it unsafely
        return printable(told[1], 200).rstrip(".")
    return _line(error)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0], 200).rstrip('.')}" if lines else type(error).__name__


def _refused(path: Path, what: str, hint: str = "") -> CheckpointError:
    return CheckpointError(f"`{path}` is not a PyTorch checkpoint that can be read: {what}", hint=hint)
