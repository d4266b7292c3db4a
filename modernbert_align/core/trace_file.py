"""Writes and reads trace files: safetensors that grow while a model runs, their header filled in at the end."""

import hashlib
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import ValidationError

from modernbert_align.core.cast import CONFIG_NAMES, FLOATS
from modernbert_align.core.checkpoint import Checkpoint, TensorInfo, read_header
from modernbert_align.core.compare import Output
from modernbert_align.core.json_input import parse_json
from modernbert_align.core.metrics import Floats
from modernbert_align.core.ops import Bits
from modernbert_align.core.rows import MODES
from modernbert_align.core.trace import FORMAT, TRACE_VERSION, Trace, TracedOutput
from modernbert_align.core.verdict import RUNS
from modernbert_align.errors import AlignError, CheckpointError, TraceError, UsageError

FORMATS = {name: short for short, name in CONFIG_NAMES.items()}  # bfloat16 -> BF16; what a trace can hold
_HINT = "record it again"
_COPY_BYTES = 1 << 20


class TraceWriter:
    """A trace on its way to the disk: `<file>.partial` until `finish` has given it its name.

    Args:
        path: Where the trace shall be.
        room: Bytes kept free for the header. A header that turns out larger costs a copy of the file.

    Raises:
        UsageError: The folder cannot be written.
    """

    def __init__(self, path: Path, room: int) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")
        self._tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}  # name -> dtype, shape, start, end
        self._held: dict[tuple[str, str, tuple[int, ...]], str] = {}
        self._position, self._room = 0, room
        self.digests: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._partial.open("w+b")
            self._file.seek(8 + room)
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> AlignError:
        return UsageError(
            f"cannot write `{self._path}`: {error.strerror}", hint="check the path, free space and permissions"
        )

    def add(self, name: str, bits: Bits, dtype: str) -> str:
        """Append a tensor.

        Args:
            bits: Any shape.
            dtype: For example `bfloat16`; one of `FORMATS`.

        Returns:
            The name under which the file holds these values: that of an earlier tensor if it is the same.
        """
        data = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(data).hexdigest()
        held = self._held.setdefault((digest, dtype, bits.shape), name)
        if held != name:
            return held
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from None
        self._tensors[name] = (FORMATS[dtype], bits.shape, self._position, self._position + len(data))
        self._position += len(data)
        self.digests[name] = digest
        return name

    def finish(self, document: Trace) -> None:
        """Write the header, wait for the disk and give the file its name.

        Args:
            document: Sealed, with this writer's `digests`.
        """
        header: dict[str, object] = {
            "__metadata__": {"format": FORMAT, "trace": json.dumps(document.model_dump(mode="json"), allow_nan=False)}
        }
        for name, (dtype, shape, start, end) in self._tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        try:
            if len(text) > self._room:
                self._move(len(text) + -len(text) % 8)
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))
            self._file.truncate(8 + self._room + self._position)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)
        except OSError as error:
            raise self._failed(error) from None

    def _move(self, room: int) -> None:
        """Move the tensors back to make room for the header, last bytes first."""
        left = self._position
        while left:
            count = min(left, _COPY_BYTES)
            left -= count
            self._file.seek(8 + self._room + left)
            piece = self._file.read(count)
            self._file.seek(8 + room + left)
            self._file.write(piece)
        self._room = room

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)  # by another name by now if all went well


class TraceFile:
    """A trace on the disk. Use `open_trace`.

    Attributes:
        document: What it says.
    """

    def __init__(self, path: Path, document: Trace, tensors: dict[str, TensorInfo]) -> None:
        self.path, self.document = path, document
        self._checkpoint = Checkpoint(folder=path.parent, tensors=tensors, files=(path,))

    def read(self, name: str) -> Floats:
        """One tensor as float32 (exact for half precision), or float64.

        Raises:
            TraceError: Its bytes are not those that were recorded.
        """
        bits = self._checkpoint.read(name)
        if hashlib.sha256(bits.reshape(-1).view(np.uint8).data).hexdigest() != self.document.tensors[name]:
            raise TraceError(f"`{name}` in `{self.path}` is not what was recorded: the file was changed", hint=_HINT)
        values = bits.view(FLOATS[self._checkpoint.tensors[name].dtype])
        return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)

    def output(self, output: TracedOutput) -> Output:
        """One recorded output, its values read when they are asked for."""
        return Output(shape=output.shape, dtype=output.dtype, values=lambda: self.read(output.tensor))


def open_trace(path: Path) -> TraceFile:
    """Read the header of a trace and check that it is whole; values are checked when they are read.

    Raises:
        TraceError: No such file, no trace, cut short, of another version, or changed after it was written.
    """
    try:
        tensors, metadata = read_header(path)
    except OSError as error:
        raise TraceError(f"cannot read the trace `{path}`: {error.strerror}", hint="`trace` makes one") from None
    except CheckpointError as error:
        raise TraceError(error.message, hint=_HINT) from None
    if metadata.get("format") != FORMAT or "trace" not in metadata:
        raise TraceError(f"`{path}` is a safetensors file and not a trace", hint="`trace` makes one")
    try:
        raw = parse_json(metadata["trace"].encode(), strict=True)
    except (ValueError, UnicodeEncodeError) as error:
        raise TraceError(f"what `{path}` says about itself cannot be read: {error}", hint=_HINT) from None
    version = raw.get("trace_version") if isinstance(raw, dict) else None
    if version != TRACE_VERSION:
        raise TraceError(
            f"`{path}` has the trace version `{version}`, this version reads {TRACE_VERSION}",
            hint="record it again with the installed version",
        )
    try:
        document = Trace.model_validate_json(metadata["trace"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TraceError(f"`{path}` is not a valid trace: {place}: {first['msg']}", hint=_HINT) from None
    if document.content_sha256 != document.digest():
        raise TraceError(f"`{path}` was changed after it was written", hint=_HINT)
    _check_tensors(path, document, tensors)
    return TraceFile(path, document, tensors)


def _check_tensors(path: Path, document: Trace, tensors: dict[str, TensorInfo]) -> None:
    """Hold the document's passes and tensors against what the file has."""
    dtypes = RUNS[document.dtypes[-1]]
    runs = [(one.dtype, one.mode) for one in document.passes]
    if (
        document.dtypes != dtypes
        or sorted(runs) != sorted((dtype, mode) for dtype in dtypes for mode in MODES)
        or [set(document.execution), {one.dtype for one in document.weights}] != [set(dtypes)] * 2
    ):
        raise TraceError(f"`{path}` does not have every pass of {', '.join(dtypes)} once", hint=_HINT)
    if set(tensors) != set(document.tensors):
        name = min(set(tensors) ^ set(document.tensors))
        raise TraceError(f"`{path}` does not hold the tensors it lists: `{name}`", hint=_HINT)
    for probe in (probe for one in document.passes for probe in one.probes.values()):
        held = {output.tensor: (output.shape, FORMATS.get(output.dtype)) for output in probe.outputs if output.tensor}
        if probe.oracle:
            if len(held) != 1:
                raise TraceError(f"`{path}` holds an oracle's value of nothing: `{probe.oracle}`", hint=_HINT)
            held[probe.oracle] = (next(iter(held.values()))[0], "F32")
        for name, expected in held.items():
            info = tensors.get(name)
            if info is None or (info.shape, info.dtype) != expected:
                raise TraceError(f"`{name}` in `{path}` is not the tensor that was recorded", hint=_HINT)


def header_room(probes: int, dtypes: int) -> int:
    """Bytes that the header of a trace of so many probes takes, with some to spare; a multiple of 8."""
    return (1 << 15) + 2048 * probes * dtypes
