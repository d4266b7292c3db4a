"""Checkpoints seen otherwise than they are stored: a rank's share of every weight, or whole weights of rank files.

Both are read like any checkpoint, a piece at a time; nothing is ever held but a few rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modernbert_align.core.checkpoint import Checkpoint
from modernbert_align.core.ops import Bits
from modernbert_align.core.tensor_parallel import Division, Share

_BAND_BYTES = 1 << 19


@dataclass(frozen=True, kw_only=True)
class ShareOf(Checkpoint):
    """What one rank has of the weights of a checkpoint. Use `share_of`."""

    whole: Checkpoint
    division: Division
    rank: int

    def fill(self, name: str, start: int, out: Bits) -> None:
        """Read consecutive elements of the share; see `Checkpoint.fill`."""
        shape, how = self.whole.tensors[name].shape, self.division
        if how.axis == 0:
            block = self.tensors[name].elements // how.parts
            for here, at, count in _runs(start, out.size, block):
                place = (here * how.degree + self.rank) * block + at
                self.whole.fill(name, place, out[:count])
                out = out[count:]
            return

        def band(top: int, rows: int) -> Bits:
            return how.cut(_rows(self.whole, name, top, rows, shape[1], out.dtype), self.rank)

        _fill_in_bands(start, out, shape[1] // how.degree, shape[1], band)


def share_of(whole: Checkpoint, names: Sequence[str], share: Share) -> Checkpoint:
    """Some tensors of a checkpoint, seen by one rank."""
    how = share.division
    if how is None:
        return whole
    infos = {name: whole.tensors[name] for name in names}
    return ShareOf(
        folder=whole.folder,
        tensors={name: replace(info, shape=how.shape(info.shape)) for name, info in infos.items()},
        files=whole.files,
        whole=whole,
        division=how,
        rank=share.rank,
    )


@dataclass(frozen=True, kw_only=True)
class Joined(Checkpoint):
    """The whole weights of a checkpoint that is stored divided among ranks.

    Attributes:
        ranks: Every rank's file.
        divided: How; a weight that is not in it is the same in every file.
    """

    ranks: tuple[Checkpoint, ...]
    divided: Mapping[str, Division]

    @property
    def pickled(self) -> bool:
        """Whether the files are pickles, not safetensors."""
        return any(rank.pickled for rank in self.ranks)

    @property
    def contiguous(self) -> bool:
        """Whether the bytes of every tensor are in one place."""
        return False

    def fill(self, name: str, start: int, out: Bits) -> None:
        """Read consecutive elements of the whole weight; see `Checkpoint.fill`."""
        how = self.divided.get(name)
        if how is None:
            self.ranks[0].fill(name, start, out)
            return
        info = self.tensors[name]
        if how.axis == 0:
            block = info.elements // (how.parts * how.degree)
            for here, at, count in _runs(start, out.size, block):
                part, rank = divmod(here, how.degree)
                self.ranks[rank].fill(name, part * block + at, out[:count])
                out = out[count:]
            return
        width = info.shape[1]

        def band(top: int, rows: int) -> Bits:
            return how.join([_rows(rank, name, top, rows, width // how.degree, out.dtype) for rank in self.ranks])

        _fill_in_bands(start, out, width, width, band)


def _runs(start: int, count: int, block: int) -> list[tuple[int, int, int]]:
    """Consecutive elements as (block, first element in it, how many)."""
    found = []
    while count:
        here, at = divmod(start, block)
        run = min(count, block - at)
        found.append((here, at, run))
        start, count = start + run, count - run
    return found


def _rows(checkpoint: Checkpoint, name: str, top: int, rows: int, width: int, dtype: np.dtype) -> Bits:  # type: ignore[type-arg]
    """Some rows of a stored matrix, [rows width]."""
    bits = np.empty(rows * width, dtype=dtype)
    checkpoint.fill(name, top * width, bits)
    return bits.reshape(rows, width)


def _fill_in_bands(start: int, out: Bits, width: int, read_width: int, band: Callable[[int, int], Bits]) -> None:
    """Fill `out` with the elements from `start` on of a matrix that is made some rows at a time.

    Args:
        width: Of the matrix.
        read_width: Elements that are read for a row of it, which bounds the rows of a band.
        band: Makes the rows from a first one on, that many.
    """
    step = max(1, _BAND_BYTES // (read_width * out.itemsize))
    end = start + out.size
    top, done = start // width, 0
    while done < out.size:
        rows = min(step, -(-end // width) - top)
        flat = band(top, rows).reshape(-1)[start + done - top * width :]
        count = min(flat.size, out.size - done)
        out[done : done + count] = flat[:count]
        top, done = top + rows, done + count
