"""Writes the files of a conversion front to back, records every finished tensor, and reads them back."""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from modernbert_align.core.cast import CastLoss, check_loss
from modernbert_align.core.checkpoint import unsigned
from modernbert_align.core.digest import Algorithm, Background, new_hasher
from modernbert_align.core.ops import Bits
from modernbert_align.core.output import OutputFile
from modernbert_align.core.partial import Partial
from modernbert_align.core.plan import Plan, PlanItem
from modernbert_align.core.stream import PIECE_BYTES, RING, Scratch, pieces
from modernbert_align.errors import CheckpointError, ProofError

Progress = Callable[[int, int], None]
_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_SYNC_BYTES = 256 << 20  # what may have to be written again after a crash


class CastRecord(BaseModel):
    """What casting a tensor lost; see `CastLoss` for the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    elements: int
    max_abs: float
    max_rel: float
    overflow: int
    overflow_max: float
    underflow: int
    subnormal: int
    nan: int
    inf: int


class TensorRecord(BaseModel):
    """One written tensor.

    Attributes:
        file: The file it is in.
        digest: `algorithm:hex` of its bytes as written, or None if digests were not asked for.
        cast: What was lost if it was cast.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    digest: str | None
    cast: CastRecord | None


def write_outputs(
    plan: Plan,
    outputs: Sequence[OutputFile],
    partial: Partial,
    algorithm: Algorithm,
    *,
    allow_overflow: bool,
    progress: Progress | None,
) -> dict[str, TensorRecord]:
    """Write every file of a plan into the partial folder, what the journal says is done excepted.

    Returns:
        Item's key -> record, in model order.

    Raises:
        CheckpointError: A value does not fit the target format, or the source cannot be read.
        OSError: The disk cannot be written.
    """
    records: dict[str, TensorRecord] = {}
    scratch = Scratch()
    done, total = 0, plan.size_bytes
    with Background() as background:
        for output in outputs:
            recorded = _recorded(output, partial.done.get(output.name, []))
            with _OpenFile(partial.path / output.name, output, len(recorded)) as file:
                for item, record in zip(output.items, recorded[: file.complete], strict=False):
                    records[item.key] = record
                    done += item.size_bytes
                pending: list[dict[str, Any]] = []
                unsynced = 0
                for item in output.items[file.complete :]:
                    record = _write_item(plan, item, output.name, file, scratch, background, algorithm, allow_overflow)
                    records[item.key] = record
                    document = record.model_dump(mode="json")
                    pending.append({"file": output.name, "tensor": item.target, "record": document})
                    done += item.size_bytes
                    unsynced += item.size_bytes
                    if unsynced >= _SYNC_BYTES:
                        file.sync()
                        partial.record(pending)
                        pending, unsynced = [], 0
                    if progress is not None:
                        progress(done, total)
                file.sync()
                partial.record(pending)
    return {item.key: records[item.key] for item in plan.items}


def _recorded(output: OutputFile, entries: Sequence[Mapping[str, Any]]) -> list[TensorRecord]:
    """The records of a file's leading tensors in the journal, as far as its lines are what they should be."""
    records = []
    for item, entry in zip(output.items, entries, strict=False):
        try:
            record = TensorRecord.model_validate(entry.get("record"))
        except ValidationError:
            break
        if entry.get("tensor") != item.target or record.file != output.name:
            break
        records.append(record)
    return records


def _write_item(
    plan: Plan,
    item: PlanItem,
    name: str,
    file: "_OpenFile",
    scratch: Scratch,
    background: Background,
    algorithm: Algorithm,
    allow_overflow: bool,
) -> TensorRecord:
    casting = item.source_dtype != item.target_dtype
    as_it_is = item.op.name == "id" and not casting and item.share is None and plan.checkpoint.contiguous
    if algorithm == "none" and as_it_is:
        file.copy(plan, item)
        return TensorRecord(file=name, digest=None, cast=None)
    loss = CastLoss()
    hasher = None if algorithm == "none" else new_hasher(algorithm)
    for piece in pieces(plan.checkpoint, item, scratch, loss):
        file.write(piece)
        if hasher is not None:
            background.add(hasher, piece)
    background.wait()
    if casting:
        check_loss(loss, " and ".join(item.sources), item.target_dtype, allow_overflow=allow_overflow)
    return TensorRecord(
        file=name,
        digest=None if hasher is None else f"{algorithm}:{hasher.hexdigest()}",
        cast=CastRecord(**asdict(loss)) if casting else None,
    )


class _OpenFile:
    """One output file, open behind its last complete tensor.

    Attributes:
        complete: Number of tensors an earlier attempt left whole.
    """

    def __init__(self, path: Path, output: OutputFile, recorded: int) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        found = recorded
        size = os.fstat(self._handle).st_size
        while found and output.offset(found) > size:
            found -= 1
        if os.pread(self._handle, len(output.header), 0) != output.header:
            found = 0
        self.complete = found
        if found:
            os.ftruncate(self._handle, output.offset(found))
            os.lseek(self._handle, 0, os.SEEK_END)
        else:
            os.ftruncate(self._handle, 0)
            self._put(memoryview(output.header))

    def write(self, piece: Bits) -> None:
        """Append a piece."""
        self._put(piece.view(np.uint8).data)

    def _put(self, data: memoryview) -> None:
        while len(data):
            data = data[os.write(self._handle, data) :]

    def copy(self, plan: Plan, item: PlanItem) -> None:
        """Append bytes that do not change, without reading them into this process where the system can do that."""
        inner = int(np.prod(item.source_shape[1:])) * unsigned(item.source_dtype).itemsize
        for source in item.sources:
            info = plan.checkpoint.tensors[source]
            first, last = (row * inner for row in item.rows) if item.rows else (0, info.size_bytes)
            with info.path.open("rb", buffering=0) as file:
                position, end = info.offset + first, info.offset + last
                while position < end:
                    count = _copy_range(file.fileno(), self._handle, end - position, position)
                    if count == 0:
                        raise CheckpointError(f"`{info.path}` ended while `{source}` was read")
                    position += count

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        os.fsync(self._handle)

    def __enter__(self) -> "_OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _copy_range(source: int, target: int, count: int, position: int) -> int:
    """Append up to `count` bytes of a file to another; returns how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, position)
        except OSError as error:
            # Two file systems, or one that does not offer it: copy through this process.
            if error.errno not in _NO_COPY_RANGE:
                raise
    data = memoryview(os.pread(source, min(count, PIECE_BYTES), position))
    copied = len(data)
    while data:
        data = data[os.write(target, data) :]
    return copied


def read_back(folder: Path, outputs: Sequence[OutputFile], records: Mapping[str, TensorRecord]) -> dict[str, str]:
    """Read every file again, from the disk where the system allows, and compare every tensor with its digest.

    Returns:
        File name -> digest of the whole file, in the algorithm of the records.

    Raises:
        ProofError: A header or a tensor is not what was written.
    """
    with Background() as background:
        return {output.name: _read_file_back(folder, output, records, background) for output in outputs}


def _read_file_back(
    folder: Path, output: OutputFile, records: Mapping[str, TensorRecord], background: Background
) -> str:
    path = folder / output.name
    hint = "check the disk and try again"
    algorithm: Algorithm = str(records[output.items[0].key].digest).partition(":")[0]  # type: ignore[assignment]
    whole = new_hasher(algorithm)
    ring = [np.empty(PIECE_BYTES, dtype=np.uint8) for _ in range(RING)]
    turn = 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # what was written is clean by now and leaves memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        header = file.read(len(output.header))
        if header != output.header:
            raise ProofError(f"the header of `{path}` does not read back as it was written", hint=hint)
        background.add(whole, np.frombuffer(header, dtype=np.uint8))
        for item in output.items:
            part = new_hasher(algorithm)
            left = item.size_bytes
            while left and (count := file.readinto(ring[turn][: min(left, PIECE_BYTES)].data)):
                piece = ring[turn][:count]
                background.add(whole, piece)
                part.update(piece.data)
                turn = (turn + 1) % RING
                left -= count
            if left or records[item.key].digest != f"{algorithm}:{part.hexdigest()}":
                raise ProofError(f"`{item.target}` in `{path}` does not read back as it was written", hint=hint)
        if file.read(1):
            raise ProofError(f"`{path}` is longer than what was written", hint=hint)
    background.wait()
    return f"{algorithm}:{whole.hexdigest()}"
