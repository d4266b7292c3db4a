"""Reads Paddle's `.pdparams` checkpoints without ever running what is in them.

A `.pdparams` file is a pickle, and unpickling is executing a program: even a restricted `pickle.Unpickler` takes 4 GB
for an 8-byte file with a high memo index. The pickles Paddle writes need few instructions and eight globals, so this
module interprets just those, as data: a global is a label, a call of one describes an array, and the bytes of an
array stay in the file until its place, size and dtype are known to fit. Whatever else a file holds is refused by name.

Source: paddle 3.3.1 `framework/io.py` (`save`, `_build_saved_state_dict`, `_pickle_save`) and
`framework/io_utils.py` (`_unpack_saved_dict`) for what is written; numpy 1.26 `ndarray.__reduce__`, `__reduce_ex__`
and `dtype.__reduce__` for how arrays are described; CPython 3.11 `pickletools` for the instructions.
"""

import codecs
import math
import os
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from io import BufferedReader
from pathlib import Path

import numpy as np

from modernbert_align.core.ops import Bits
from modernbert_align.errors import CheckpointError

_NAME_TABLE = "StructuredToParameterName@@"
_SLICED = "UnpackBigParamInfor@@"
_MAX_INSTRUCTIONS = 500_000  # some 30 a tensor; bounds time, and memory to tens of megabytes
_MAX_INLINE = 1024  # longer text and bytes stay in the file
_MAX_INLINE_TOTAL = 8 << 20
_MAX_DIMENSIONS = 32
_CHUNK_BYTES = 1 << 18
_DAMAGED = "the file is damaged or only partly downloaded; fetch it again"
_RESAVE = "only plain state dicts are read; if you trust the file, load it with Paddle and save `model.state_dict()`"

# numpy's type codes. Paddle hands bfloat16 to numpy as uint16.
_DTYPES: Mapping[str, str] = {
    "f4": "F32", "f8": "F64", "f2": "F16", "u2": "BF16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8",
    "u1": "U8", "b1": "BOOL",
}  # fmt: skip


class _Global(Enum):
    """What a pickle may refer to; nothing here is ever called."""

    RECONSTRUCT = auto()
    FROM_BUFFER = auto()
    NDARRAY = auto()
    DTYPE = auto()
    ENCODE = auto()
    BYTES = auto()
    TUPLE = auto()
    ORDERED_DICT = auto()


_GLOBALS: Mapping[tuple[str, str], _Global] = {
    ("numpy.core.multiarray", "_reconstruct"): _Global.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Global.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Global.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Global.FROM_BUFFER,
    ("numpy", "ndarray"): _Global.NDARRAY,
    ("numpy", "dtype"): _Global.DTYPE,
    ("_codecs", "encode"): _Global.ENCODE,  # protocol 2 has no bytes: text, encoded as Latin-1
    ("__builtin__", "bytes"): _Global.BYTES,
    ("__builtin__", "tuple"): _Global.TUPLE,  # a Tensor beside other things is saved as (name, array)
    ("builtins", "tuple"): _Global.TUPLE,
    ("collections", "OrderedDict"): _Global.ORDERED_DICT,
}
# Instructions with an argument: bytes of the length, index or number that follows.
_TEXT = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}
_BYTES = {pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4, pickle.BINBYTES8: 8, pickle.BYTEARRAY8: 8}
_PUT = {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
_GET = {pickle.BINGET: 1, pickle.LONG_BINGET: 4}
_UNSIGNED = {pickle.BININT1: 1, pickle.BININT2: 2}
_SHORT_TUPLES = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_INSTRUCTIONS = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Bytes of the file that have not been read.

    Attributes:
        kind: `bytes`; `text`, which is no array's data yet; `latin1`, text whose characters are the bytes.
    """

    start: int
    length: int
    kind: str


@dataclass(frozen=True)
class _Dtype:
    """A dtype.

    Attributes:
        code: numpy's, without the byte order; a key of `_DTYPES`.
    """

    code: str

    @property
    def width(self) -> int:
        return int(self.code[1:])


@dataclass(eq=False)
class _Array:
    """What the pickle says about an array.

    Attributes:
        data: None until the pickle has given it.
        slices: The arrays a sliced parameter is put together from, in order.
    """

    dtype: _Dtype = _Dtype("u1")
    shape: tuple[int, ...] = ()
    column_major: bool = False
    data: bytes | _Span | None = None
    slices: tuple["_Array", ...] = ()

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.width


def printable(text: str, length: int = 100) -> str:
    """Text from a file that is safe in a message: one line, no control characters, not endless."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length])


def read_pdparams(path: Path) -> dict[str, tuple[Bits, str]]:
    """Read every array of a `.pdparams` file; nothing in the file is executed.

    Reads state dicts as `paddle.save` writes them with protocol 2, 3 and 4, the parameters of more than 1 GiB that
    protocols 2 and 3 write in slices, `(name, array)` pairs, and dicts of arrays pickled with protocol 5. The table
    of parameter names that Paddle adds is ignored.

    Args:
        path: The file.

    Returns:
        By name, in the order of the file: the array as unsigned integers in its stored shape (C-contiguous), and its
        safetensors dtype, where uint16 is BF16. Names that share an array in the file share it here.

    Raises:
        CheckpointError: Not a pickle, damaged, or holds something that is not an array of a known dtype.
    """
    try:
        if not path.is_file():  # opening a pipe would wait
            raise CheckpointError(f"`{path}` is not a file" if path.exists() else f"no such file: `{path}`")
        with path.open("rb") as file:
            return _Reader(path, file).arrays()
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}") from None


class _Reader:
    """Interprets one pickle. Every length is held against the file before anything of that size is made."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # the stacks under the open marks
        self._memo: dict[int, object] = {}
        self._inline = 0
        self._used: set[int] = set()  # where spans start that have become an array

    def arrays(self) -> dict[str, tuple[Bits, str]]:
        """The file's content."""
        described = self._described()
        read: dict[int, tuple[Bits, str]] = {}
        for array in described.values():
            if id(array) not in read:
                read[id(array)] = (self._bits(array), _DTYPES[array.dtype.code])
        return {name: read[id(array)] for name, array in described.items()}

    def _described(self) -> dict[str, _Array]:
        content = self._interpret()
        if not isinstance(content, dict):
            raise self._refused(f"it holds {_kind(content)}, not a dict of arrays", _RESAVE)
        if isinstance(content.get(_NAME_TABLE), dict):
            del content[_NAME_TABLE]
        found: dict[str, _Array] = {}
        sliced = content.pop(_SLICED, {})
        for name, value in content.items():
            match value:
                case (_Array(data=data) as array) | (str(), _Array(data=data) as array) if data is not None:
                    found[name] = array
                case _:
                    raise self._refused(f"`{printable(name)}` is {_kind(value)}, not an array", _RESAVE)
        return self._joined(found, sliced)

    def _joined(self, found: dict[str, _Array], sliced: object) -> dict[str, _Array]:
        """Put parameters that were saved in slices in the place of their slices."""
        if not isinstance(sliced, dict):
            raise self._refused(f"`{_SLICED}` is {_kind(sliced)}, not a dict")
        for name, entry in sliced.items():
            match entry:
                case {"OriginShape": tuple() as shape, "slices": [str(), *_] as parts, **rest} if not rest:
                    pass
                case _:
                    raise self._refused(f"the slices of `{printable(name)}` are not described as Paddle does")
            arrays = [found.pop(part, None) if isinstance(part, str) else None for part in parts]
            slices = tuple(array for array in arrays if array is not None)
            if len(slices) != len(parts) or len({array.dtype for array in slices}) != 1 or name in found:
                raise self._refused(f"the slices of `{printable(name)}` are missing or do not belong together")
            if any(len(array.shape) != 1 for array in slices):
                raise self._refused(f"the slices of `{printable(name)}` are not flat")
            found[name] = _Array(dtype=slices[0].dtype, shape=self._shape(shape), slices=slices)
        return found

    # Arrays

    def _bits(self, array: _Array) -> Bits:
        parts = array.slices or (array,)
        if sum(part.size_bytes for part in parts) != array.size_bytes:
            raise self._refused(f"an array of shape {printable(str(array.shape))} has slices of another size")
        for part in parts:
            self._check(part)
        content = np.empty(array.size_bytes, np.uint8)
        position = 0
        for part in parts:
            self._fill(content[position : position + part.size_bytes], part.data)
            position += part.size_bytes
        bits = content.view(f"u{array.dtype.width}")
        try:
            if array.column_major and len(array.shape) > 1:
                return np.ascontiguousarray(bits.reshape(array.shape[::-1]).T)
            return bits.reshape(array.shape)
        except ValueError:  # no elements and absurd sizes
            raise self._refused(f"no array can have the shape {printable(str(array.shape))}") from None

    def _check(self, array: _Array) -> None:
        data, claimed = array.data, array.size_bytes
        if isinstance(data, _Span):
            if data.start in self._used:  # numpy never does; each array would be a copy
                raise self._refused("two arrays claim the same bytes of the file")
            self._used.add(data.start)
            # A character below 256 takes one or two bytes of UTF-8.
            fits = claimed <= data.length <= 2 * claimed if data.kind == "latin1" else claimed == data.length
            held = data.length
        else:
            held = len(data or b"")
            fits = claimed == held
        if not fits:
            shape, code = printable(str(array.shape)), array.dtype.code
            raise self._refused(f"an array of shape {shape} and dtype `{code}` has {held} bytes", _DAMAGED)

    def _fill(self, out: Bits, data: bytes | _Span | None) -> None:
        if not isinstance(data, _Span):
            out[:] = np.frombuffer(data or b"", np.uint8)
            return
        self._file.seek(data.start)
        if data.kind == "bytes":
            if self._file.readinto(out.data) != out.size:
                raise self._truncated()
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        position, left = 0, data.length
        try:
            while left:
                raw = self._take(min(left, _CHUNK_BYTES))
                left -= len(raw)
                piece = decoder.decode(raw, final=not left).encode("latin-1")
                out[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
                position += len(piece)
        except ValueError:  # not UTF-8, not Latin-1, or more characters than the array has bytes
            position = -1
        if position != out.size:
            raise self._refused("an array's bytes are not Latin-1 text of its size", _DAMAGED)

    # The pickle

    def _interpret(self) -> object:
        head = self._file.read(4)
        if not head:
            raise self._refused("it is empty", _DAMAGED)
        if head == b"PK\x03\x04":
            raise self._refused("it is a zip archive, as torch.save writes", "Paddle's own files end in .pdparams")
        if len(head) < 2 or head[:1] != pickle.PROTO or not 2 <= head[1] <= 5:
            raise self._refused("it does not begin like a pickle of protocol 2 to 5", _DAMAGED)
        self._file.seek(2)
        for _ in range(_MAX_INSTRUCTIONS):
            code = self._take(1)
            if code == pickle.STOP:
                result = self._pop()
                if self._file.tell() != self._size:
                    raise self._refused(f"{self._size - self._file.tell()} bytes follow its end", _DAMAGED)
                return result
            self._step(code)
        raise self._refused(f"it has more than {_MAX_INSTRUCTIONS} pickle instructions", _RESAVE)

    def _step(self, code: bytes) -> None:
        if code in _CONSTANTS:
            self._stack.append(_CONSTANTS[code])
        elif code in _TEXT:
            self._stack.append(self._text(self._number(_TEXT[code])))
        elif code in _BYTES:
            self._stack.append(self._bytes(self._number(_BYTES[code])))
        elif code in _UNSIGNED:
            self._stack.append(self._number(_UNSIGNED[code]))
        elif code == pickle.BININT:
            self._stack.append(self._number(4, signed=True))
        elif code == pickle.LONG1:
            width = self._number(1)
            if width > 8:
                raise self._refused(f"it holds a number of {width} bytes")
            self._stack.append(self._number(width, signed=True))
        elif code == pickle.BINFLOAT:
            self._take(8)
            self._stack.append(0.0)  # no array's description has one; its type is all that is told
        elif code in _PUT:
            self._memo[self._number(_PUT[code])] = self._top()
        elif code == pickle.MEMOIZE:
            self._memo[len(self._memo)] = self._top()
        elif code in _GET:
            index = self._number(_GET[code])
            if index not in self._memo:
                raise self._malformed()
            self._stack.append(self._memo[index])
        elif code in _SHORT_TUPLES:
            items = [self._pop() for _ in range(_SHORT_TUPLES[code])]
            self._stack.append(tuple(reversed(items)))
        elif code == pickle.MARK:
            self._below.append(self._stack)
            self._stack = []
        elif code == pickle.TUPLE:
            items = self._since_mark()  # first: it changes the stack
            self._stack.append(tuple(items))
        elif code == pickle.EMPTY_LIST:
            self._stack.append([])
        elif code == pickle.EMPTY_DICT:
            self._stack.append({})
        elif code in (pickle.APPEND, pickle.APPENDS):
            self._append([self._pop()] if code == pickle.APPEND else self._since_mark())
        elif code in (pickle.SETITEM, pickle.SETITEMS):
            self._set_items([self._pop(), self._pop()][::-1] if code == pickle.SETITEM else self._since_mark())
        elif code == pickle.GLOBAL:
            self._stack.append(self._global(self._line(), self._line()))
        elif code == pickle.STACK_GLOBAL:
            name, module = self._pop(), self._pop()
            self._stack.append(self._global(module, name))
        elif code == pickle.REDUCE:
            arguments, function = self._pop(), self._pop()
            self._stack.append(self._reduced(function, arguments))
        elif code == pickle.BUILD:
            state = self._pop()
            self._build(self._top(), state)
        elif code == pickle.FRAME:
            if self._number(8) > self._size - self._file.tell():
                raise self._truncated()
        else:
            if code == pickle.INST:  # names a global itself
                self._global(self._line(), self._line())
            known = _INSTRUCTIONS.get(code.decode("latin-1"))
            what = f"instruction `{known}`" if known else f"instruction 0x{code.hex()}, which does not exist,"
            raise self._refused(f"the pickle {what} is not one Paddle uses; nothing was executed", _RESAVE)

    def _reduced(self, function: object, arguments: object) -> object:
        """What a call stands for."""
        match function, arguments:
            case _Global.RECONSTRUCT, (_Global.NDARRAY, (0,), b"b"):
                return _Array()
            case _Global.FROM_BUFFER, (bytes() | _Span() as data, _Dtype() as dtype, shape, "C" | "F" as order):
                array = _Array()
                self._complete(array, dtype, shape, order == "F", data)
                return array
            case _Global.DTYPE, (str(code), _, _):
                if code not in _DTYPES:
                    what = "Python objects" if code.startswith("O") else f"dtype `{printable(code)}`"
                    raise self._refused(f"it holds an array of {what}, which has no safetensors dtype", _RESAVE)
                return _Dtype(code)
            case _Global.ENCODE, (str(text), "latin1" | "latin-1"):
                try:
                    return text.encode("latin-1")
                except UnicodeEncodeError:
                    raise self._malformed() from None
            case _Global.ENCODE, (_Span(kind="text") as span, "latin1" | "latin-1"):
                return replace(span, kind="latin1")
            case _Global.BYTES, ():
                return b""
            case _Global.TUPLE, (tuple(items),):
                return items
            case _Global.ORDERED_DICT, ():
                return {}
        raise self._malformed()

    def _build(self, target: object, state: object) -> None:
        match target, state:
            case _Array(data=None), (1, shape, _Dtype() as dtype, bool(column_major), bytes() | _Span() as data):
                self._complete(target, dtype, shape, column_major, data)
            case _Dtype(), (_, ">", *_):
                raise self._refused("it holds big-endian arrays", _RESAVE)
            case _Dtype(), (3, "<" | "|" | "=", None, None, None, -1, -1, 0):
                pass
            case _:
                raise self._malformed()

    def _complete(self, array: _Array, dtype: _Dtype, shape: object, column_major: bool, data: bytes | _Span) -> None:
        if isinstance(data, _Span) and data.kind == "text":
            raise self._malformed()
        array.dtype, array.shape, array.column_major, array.data = dtype, self._shape(shape), column_major, data

    def _shape(self, shape: object) -> tuple[int, ...]:
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
            raise self._malformed()
        if any(type(n) is not int or n < 0 for n in shape):
            raise self._malformed()
        return shape

    def _global(self, module: object, name: object) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._malformed()
        if (module, name) not in _GLOBALS:
            what = f"it refers to `{printable(f'{module}.{name}')}`, which is not part of one; nothing was executed"
            raise self._refused(what, _RESAVE)
        return _GLOBALS[module, name]

    def _append(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise self._malformed()
        target += items

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise self._malformed()
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self._refused(f"a name in it is {_kind(key)}, not text", _RESAVE)
            if key in target:
                raise self._refused(f"the name `{printable(key)}` is in it twice")
            target[key] = value

    # Stack and bytes

    def _top(self) -> object:
        if not self._stack:
            raise self._malformed()
        return self._stack[-1]

    def _pop(self) -> object:
        value = self._top()
        self._stack.pop()
        return value

    def _since_mark(self) -> list[object]:
        if not self._below:
            raise self._malformed()
        items, self._stack = self._stack, self._below.pop()
        return items

    def _take(self, count: int) -> bytes:
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._truncated()
        return raw

    def _number(self, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(width), "little", signed=signed)

    def _line(self) -> str:
        raw = self._file.readline(_MAX_INLINE)
        if not raw.endswith(b"\n"):
            raise self._truncated()
        return self._decoded(raw[:-1])

    def _text(self, length: int) -> str | _Span:
        value = self._bytes(length)
        return replace(value, kind="text") if isinstance(value, _Span) else self._decoded(value)

    def _bytes(self, length: int) -> bytes | _Span:
        start = self._file.tell()
        if length > self._size - start:
            raise self._truncated()
        if length > _MAX_INLINE:
            self._file.seek(length, os.SEEK_CUR)
            return _Span(start=start, length=length, kind="bytes")
        self._inline += length
        if self._inline > _MAX_INLINE_TOTAL:
            raise self._refused(f"it has more than {_MAX_INLINE_TOTAL} bytes of names and small arrays", _RESAVE)
        return self._take(length)

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._malformed() from None

    # Errors

    def _refused(self, what: str, hint: str = "") -> CheckpointError:
        return CheckpointError(f"`{self._path}` is not a Paddle checkpoint that can be read: {what}", hint=hint)

    def _truncated(self) -> CheckpointError:
        return self._refused(f"it ends early, at {self._size} bytes", _DAMAGED)

    def _malformed(self) -> CheckpointError:
        return self._refused(f"the pickle makes no sense before byte {self._file.tell()}", _DAMAGED)


def _kind(value: object) -> str:
    """What something is, never its content, which may be huge or refer to itself."""
    match value:
        case _Array():
            return "an array without data"
        case bytes() | _Span(kind="bytes" | "latin1"):
            return "bytes"
        case str() | _Span():
            return "text"
        case None:
            return "None"
        case _Global() | _Dtype():
            return "a class or function"
        case _:
            return f"of type {type(value).__name__}"
