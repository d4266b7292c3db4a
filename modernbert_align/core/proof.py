"""Proofs about a conversion that do not trust the code that made it to be right.

`dye` sends a number of its own for every element through the real reading and moving, and looks where each arrives in
the files that are laid out; `roundtrip` converts the written files back and compares the SHA-256 of the result with the
source files'. What `dye` does not go through (the system calls, casts, the code that writes) is what `roundtrip` sees.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from modernbert_align.core.cast import CastLoss
from modernbert_align.core.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, open_checkpoint, unsigned
from modernbert_align.core.digest import Background, new_hasher
from modernbert_align.core.manifest import Proof
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.ops import Bits
from modernbert_align.core.output import ShardSize, lay_out
from modernbert_align.core.plan import Plan, PlanItem, divide_item, make_plan
from modernbert_align.core.rank_files import check_replicated, join_ranks
from modernbert_align.core.shares import Joined
from modernbert_align.core.stream import Scratch, pieces
from modernbert_align.core.table import Entry, Sizes
from modernbert_align.core.tensor_parallel import Division, divisions
from modernbert_align.errors import CheckpointError, ProofError

_BLOCK = 1 << 18  # numbers at a time
_BUG = "the conversion code or the table is wrong; please report it"


# --- dye --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """A number for every element of a checkpoint; for one that is stored divided, of the whole weights' elements.

    Attributes:
        first: Tensor name -> number of its first element.
        divided: How the tensors of a rank's file are divided.
    """

    first: Mapping[str, int]
    divided: Mapping[str, Division]
    rank: int

    def of(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:  # type: ignore[type-arg]
        """The numbers of consecutive elements of a stored tensor."""
        flat = np.arange(start, stop, dtype=np.uint64)
        how = self.divided.get(info.name)
        if how is not None:
            cols = math.prod(info.shape[1:])
            i, j = flat // np.uint64(cols), flat % np.uint64(cols)
            if how.axis == 0:
                i = _whole_index(i, info.shape[0], how, self.rank)
            else:
                j, cols = _whole_index(j, cols, how, self.rank), cols * how.degree
            flat = i * np.uint64(cols) + j
        return flat + np.uint64(self.first[info.name])


def _whole_index(index: np.ndarray, length: int, how: Division, rank: int) -> np.ndarray:  # type: ignore[type-arg]
    """Where an index along the axis that is divided lies in the whole weight.

    Args:
        length: Of the share along that axis.
    """
    block = np.uint64(length // how.parts)
    part = index // block
    return part * block * np.uint64(how.degree) + np.uint64(rank) * block + index % block


@dataclass(frozen=True, kw_only=True)
class _Dyed(Checkpoint):
    """A checkpoint whose files hold, at every element, that element's number instead of its value.

    Attributes:
        numbers: Of the elements of every tensor.
        shift: How many bits to drop: numbers wider than an element are looked at a part at a time.
    """

    numbers: "_Numbers"
    shift: int

    def _read_at(self, path: Path, offset: int, out: memoryview) -> None:
        """What the dyed file holds there, decided by the position alone."""
        end = offset + len(out)
        for info in self.tensors.values():
            if info.path != path or info.offset >= end or info.offset + info.size_bytes <= offset:
                continue
            width = DTYPE_BYTES[info.dtype]
            start, stop = max(offset, info.offset), min(end, info.offset + info.size_bytes)
            first, last = (start - info.offset) // width, -((info.offset - stop) // width)
            dyed = _part(self.numbers.of(info, first, last), self.shift, width)
            skip = start - info.offset - first * width
            out[start - offset : stop - offset] = dyed.view(np.uint8)[skip : skip + stop - start].data


class _DyedArrays(Mapping[str, Bits]):
    """The arrays of a pickle, dyed in the same way; only the one asked for last is in memory."""

    def __init__(self, tensors: Mapping[str, TensorInfo], numbers: "_Numbers", shift: int) -> None:
        self._tensors, self._numbers, self._shift = tensors, numbers, shift
        self._name, self._array = "", np.empty(0, dtype=np.uint8)

    def __getitem__(self, name: str) -> Bits:
        if name != self._name:
            info = self._tensors[name]
            flat = np.empty(info.elements, dtype=unsigned(info.dtype))
            for start in range(0, flat.size, _BLOCK):
                block = flat[start : start + _BLOCK]
                block[:] = _part(self._numbers.of(info, start, start + block.size), self._shift, flat.itemsize)
            self._name, self._array = name, flat.reshape(info.shape)
        return self._array

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _part(numbers: np.ndarray, shift: int, width: int) -> Bits:  # type: ignore[type-arg]
    return (numbers >> np.uint64(shift)).astype(f"u{width}")


def prove_dye(plan: Plan, config: Sizes, shard_size: ShardSize) -> Proof:
    """Show that every element of the source arrives exactly where the table puts it.

    The numbers go through the real header, reading, moving and layout code; only the two system calls for bytes on
    the disk are replaced. Where they must arrive is computed from the table by arithmetic. Casts are left out.

    Raises:
        ProofError: An element is lost, doubled or in another place.
    """
    tensors = plan.checkpoint.tensors
    first, total = _numbers(tensors)
    kept = tuple(replace(item, target_dtype=item.source_dtype) for item in plan.items)
    divided = divisions(plan.table.expand(config, plan.head), plan.ranks)
    narrowest = min(DTYPE_BYTES[item.source_dtype] for item in kept)
    origin = _origins(plan, config)
    passes = math.ceil(max(total, 2).bit_length() / (8 * narrowest))
    checked = 0
    for number in range(passes):
        shift = 8 * narrowest * number
        whole = replace(plan, checkpoint=_dye(plan.checkpoint, first, shift), items=kept)
        seen: dict[str, list[tuple[int, int]]] = {}
        shares: dict[str, list[int]] = {}
        scratch = Scratch()
        checked = 0
        for output in lay_out(replace(whole, checkpoint=plan.checkpoint), shard_size):
            header = json.loads(output.header[8:])
            position = 0
            for item in output.items:
                expected = header.get(item.target)
                if expected is None or expected["data_offsets"][0] != position:
                    raise ProofError(f"`{item.target}` is not where the header of `{output.name}` says", hint=_BUG)
                position = expected["data_offsets"][1]
                shape = tuple(expected["shape"])
                entries = origin.get(item.target, [])
                how = divided.get(item.target)
                if {how.shape(e.shape(plan.dst)) if how else e.shape(plan.dst) for e in entries} != {shape}:
                    raise ProofError(f"`{item.target}` is not written in the shape the table gives it", hint=_BUG)
                rank = item.share.rank if item.share is not None else 0
                checked += _check_dye(whole, item, entries, shape, first, shift, scratch, how, rank)
                shares.setdefault(item.target, []).append(rank)
                for entry in entries if rank == 0 else ():
                    seen.setdefault(_stored(plan, entry), []).append(_taken(plan, entry))
        _check_cover(plan, tensors, origin, seen)
        if any(sorted(ranks) != list(range(plan.ranks)) for ranks in shares.values()):
            raise ProofError("a rank has not its share of every weight exactly once", hint=_BUG)
    written = "the output" if plan.ranks == 1 else f"the files of {plan.ranks} ranks"
    return Proof(
        level="dye",
        statement=f"each of {checked} elements was followed from its place in the source to its place in {written}, "
        f"and none is missing or doubled",
    )


def _dye(checkpoint: Checkpoint, first: Mapping[str, int], shift: int) -> Checkpoint:
    """The same checkpoint with dyed files."""
    if isinstance(checkpoint, Joined):
        ranks = [_dye_file(one, first, shift, checkpoint.divided, rank) for rank, one in enumerate(checkpoint.ranks)]
        return replace(checkpoint, ranks=tuple(ranks))
    return _dye_file(checkpoint, first, shift, {}, 0)


def _dye_file(
    checkpoint: Checkpoint, first: Mapping[str, int], shift: int, divided: Mapping[str, Division], rank: int
) -> Checkpoint:
    numbers = _Numbers(first=first, divided=divided, rank=rank)
    return _Dyed(
        folder=checkpoint.folder,
        tensors=checkpoint.tensors,
        files=checkpoint.files,
        arrays=_DyedArrays(checkpoint.tensors, numbers, shift) if checkpoint.pickled else {},
        numbers=numbers,
        shift=shift,
    )


def _numbers(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, int], int]:
    """The number of every tensor's first element, and how many there are."""
    first: dict[str, int] = {}
    total = 0
    for name, info in tensors.items():
        first[name] = total
        total += info.elements
    return first, total


def _origins(plan: Plan, config: Sizes) -> dict[str, list[Entry]]:
    """Target name -> the table's entries for it, with the names the source uses."""
    origins: dict[str, list[Entry]] = {}
    there = plan.table.expand(config, plan.head, prefix=plan.prefix)
    here = plan.table.expand(config, plan.head)
    for source, target in zip(there, here, strict=True):
        if source.op.stored:
            origins.setdefault(target.name(plan.dst), []).append(source)
    if plan.src == plan.dst:  # parts of one stacked weight are one and the same on both sides
        return {name: entries[:1] for name, entries in origins.items()}
    return origins


def _stored(plan: Plan, entry: Entry) -> str:
    return plan.stored[entry.name(plan.src)]


def _taken(plan: Plan, entry: Entry) -> tuple[int, int]:
    """The rows, in Hugging Face's layout, that an entry takes of its source tensor."""
    if plan.src == plan.dst:
        return (0, (entry.stacked or entry.hf_shape or (1,))[0])
    return entry.rows if entry.rows and plan.src == "paddle" else (0, (entry.hf_shape or (1,))[0])


def _check_dye(
    plan: Plan,
    item: PlanItem,
    entries: Sequence[Entry],
    shape: tuple[int, ...],
    first: Mapping[str, int],
    shift: int,
    scratch: Scratch,
    how: Division | None,
    rank: int,
) -> int:
    """Compare a dyed target with the numbers the table puts there; returns how many."""
    width = DTYPE_BYTES[item.source_dtype]
    expected = _expected(plan, entries, shape, first, how, rank)
    ahead: Bits = np.empty(0, dtype=f"u{width}")
    count = 0
    for piece in pieces(plan.checkpoint, item, scratch, CastLoss()):
        while ahead.size < piece.size:
            block = next(expected, None)
            if block is None:
                raise ProofError(f"`{item.target}` has more elements than the table gives it", hint=_BUG)
            ahead = np.concatenate([ahead, _part(block, shift, width)])
        if not np.array_equal(piece, ahead[: piece.size]):
            wrong = count + int(np.flatnonzero(piece != ahead[: piece.size])[0])
            raise ProofError(f"element {wrong} of `{item.target}` does not come from where the table says", hint=_BUG)
        ahead = ahead[piece.size :]
        count += piece.size
    if ahead.size or next(expected, None) is not None or count != math.prod(shape):
        raise ProofError(f"`{item.target}` has {count} elements and should have more", hint=_BUG)
    return count


def _expected(
    plan: Plan,
    entries: Sequence[Entry],
    shape: tuple[int, ...],
    first: Mapping[str, int],
    how: Division | None,
    rank: int,
) -> Iterator[np.ndarray]:  # type: ignore[type-arg]
    """The numbers of a target's elements in order, a block of its rows at a time.

    Args:
        shape: Of what is written: of a rank's share, if the weight is divided as `how` says.
    """
    rows, cols = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if cols == 0:
        return
    whole_cols = cols * how.degree if how is not None and how.axis == 1 else cols
    step = max(1, _BLOCK // cols)
    for top in range(0, rows, step):
        i = np.arange(top, min(top + step, rows), dtype=np.uint64)[:, None]  # [rows 1]
        j = np.arange(cols, dtype=np.uint64)[None, :]  # [1 cols]
        if how is not None and how.axis == 0:
            i = _whole_index(i, rows, how, rank)
        elif how is not None:
            j = _whole_index(j, cols, how, rank)
        block = np.zeros((i.size, cols), dtype=np.uint64)  # [rows cols]
        for entry in entries:
            base = np.uint64(first[_stored(plan, entry)])
            start, _ = entry.rows or (0, 0)
            out_rows, *rest = entry.hf_shape or (1,)
            inner = math.prod(rest)
            if plan.src == plan.dst:
                block[:] = base + i * np.uint64(whole_cols) + j
            elif entry.op.name == "T" and plan.src == "hf":  # target[i, start + r] = part[r, i]
                columns = slice(start, start + out_rows)
                block[:, columns] = base + (j[:, columns] - np.uint64(start)) * np.uint64(inner) + i
            elif entry.op.name == "T":  # target[r, j] = whole[j, start + r]
                whole = (entry.stacked or entry.hf_shape)[0]
                block[:] = base + j * np.uint64(whole) + np.uint64(start) + i
            elif plan.src == "hf":  # target[start + r, j] = part[r, j]
                inside = (i >= start) & (i < start + out_rows)
                numbers = base + (i - np.uint64(start)) * np.uint64(whole_cols) + j
                block = np.where(inside, numbers, block)
            else:  # target[r, j] = whole[start + r, j]
                block[:] = base + (np.uint64(start) + i) * np.uint64(cols) + j
        yield block.reshape(-1)


def _check_cover(
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    origin: Mapping[str, Sequence[Entry]],
    seen: Mapping[str, list[tuple[int, int]]],
) -> None:
    """Every source tensor is used exactly once, whole, unless plan and table both leave it out."""
    wanted = {_stored(plan, entry) for entries in origin.values() for entry in entries}
    left_out = ({name for name, _ in plan.tied} | set(plan.dropped)) - wanted
    for name, info in tensors.items():
        taken = sorted(seen.get(name, []))
        if name in left_out and not taken:
            continue
        starts = [0, *(stop for _, stop in taken)]
        size = max((stop for _, stop in taken), default=0)
        inner = info.elements // size if size else 0
        if [start for start, _ in taken] != starts[:-1] or size * inner != info.elements or not taken:
            raise ProofError(f"`{name}` of the source is not used exactly once", hint=_BUG)


# --- there and back ---------------------------------------------------------------------------------------------------


def _open_written(plan: Plan, config: Sizes, folder: Path) -> Checkpoint:
    """What was written, as any later reader would open it."""
    if plan.ranks == 1:
        return open_checkpoint(folder)
    joined = join_ranks(folder, read_config_file(folder), plan.table, config, plan.head)
    check_replicated(joined)
    return joined


def prove_roundtrip(plan: Plan, config: Sizes, folder: Path, source_sha256: Mapping[str, str]) -> Proof:
    """Convert what was written back, into a hash, and compare it with the source files.

    Args:
        folder: What was written.
        source_sha256: File name -> SHA-256 of every weight file of the source, in hexadecimal.

    Raises:
        ProofError: A file that comes back is not the source's.
    """
    try:
        back = make_plan(_open_written(plan, config, folder), plan.table, config, plan.head, plan.dst, plan.src, None)
    except CheckpointError as error:
        raise ProofError(f"what was written cannot be converted back: {error.message}", hint=_BUG) from None
    names = zip(
        plan.table.expand(config, plan.head), plan.table.expand(config, plan.head, prefix=plan.prefix), strict=True
    )
    stored = {plain.name(plan.src): plan.stored.get(found.name(plan.src)) for plain, found in names}
    items = {stored[item.target]: item for item in back.items}
    again = dict(plan.tied)
    scratch = Scratch()
    joined = plan.checkpoint if isinstance(plan.checkpoint, Joined) else None
    stored_infos = [info for one in (joined.ranks if joined else (plan.checkpoint,)) for info in one.tensors.values()]
    for number, path in enumerate(plan.checkpoint.files):
        here = [info for info in stored_infos if info.path == path]
        here.sort(key=lambda info: (info.offset, info.size_bytes))
        hasher = new_hasher("sha256")
        with path.open("rb") as file:
            hasher.update(file.read(min(info.offset for info in here)))
        with Background() as background:
            for info in here:
                item = items[again.get(info.name, info.name)]
                if joined is not None:
                    item = divide_item(item, joined.divided.get(info.name), number)
                if item.target_shape != info.shape:
                    raise ProofError(f"`{info.name}` does not come back in its shape", hint=_BUG)
                item = replace(item, target_dtype="BF16" if info.dtype == "U16" else info.dtype)
                for piece in pieces(back.checkpoint, item, scratch, CastLoss()):
                    background.add(hasher, piece)
            background.wait()
        if hasher.hexdigest() != source_sha256[path.name]:
            raise ProofError(
                f"`{path.name}` does not come back: SHA-256 {hasher.hexdigest()[:12]}..., the source's is "
                f"{source_sha256[path.name][:12]}...",
                hint=_BUG,
            )
    files = ", ".join(f"{path.name} {source_sha256[path.name]}" for path in plan.checkpoint.files)
    return Proof(level="roundtrip", statement=f"converting back reproduces the source's SHA-256: {files}")
