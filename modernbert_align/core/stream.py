"""Turns the tensors of a source into those of a target, a piece at a time and in reused memory."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from modernbert_align.core.cast import CastLoss, cast_bits
from modernbert_align.core.checkpoint import Checkpoint, unsigned
from modernbert_align.core.ops import TILE, Bits, transpose_into
from modernbert_align.core.plan import PlanItem
from modernbert_align.core.shares import share_of

PIECE_BYTES = 1 << 19  # what a core's own cache holds
RING = 4


class Scratch:
    """Memory for one conversion: one matrix to transpose, and a ring of pieces on their way out.

    Fresh memory costs a page fault per 4 KiB, more than the copy itself.
    """

    def __init__(self) -> None:
        self._matrix = np.empty(0, dtype=np.uint8)
        self._ring = [np.empty(PIECE_BYTES, dtype=np.uint8) for _ in range(RING)]
        self._turn = itertools.cycle(range(RING))

    def matrix(self, elements: int, dtype: str) -> Bits:
        """Flat memory for a whole tensor."""
        wanted = elements * unsigned(dtype).itemsize
        if self._matrix.size < wanted:
            self._matrix = np.empty(wanted, dtype=np.uint8)
        return self._matrix[:wanted].view(unsigned(dtype))

    def piece(self, elements: int, dtype: str) -> Bits:
        """Flat memory for a piece; it is used again after `RING - 1` more."""
        turn = next(self._turn)
        wanted = elements * unsigned(dtype).itemsize
        if self._ring[turn].size < wanted:
            self._ring[turn] = np.empty(wanted, dtype=np.uint8)
        return self._ring[turn][:wanted].view(unsigned(dtype))


def pieces(checkpoint: Checkpoint, item: PlanItem, scratch: Scratch, loss: CastLoss) -> Iterator[Bits]:
    """The elements of a target tensor in order, flat.

    Args:
        loss: What the cast loses is added to it.

    Yields:
        Pieces of `item.target_dtype`'s width. A piece keeps its content until `RING - 1` more were asked for.
    """
    moved = _transposed if item.op.name == "T" else _copied
    if item.share is not None:
        checkpoint = share_of(checkpoint, item.sources, item.share.of_source(item.op))
    for piece in moved(checkpoint, item, scratch):
        yield cast_bits(piece, item.source_dtype, item.target_dtype, loss)


def _copied(checkpoint: Checkpoint, item: PlanItem, scratch: Scratch) -> Iterator[Bits]:
    step = PIECE_BYTES // unsigned(item.source_dtype).itemsize
    inner = math.prod(item.source_shape[1:])
    for source in item.sources:
        size = checkpoint.tensors[source].elements
        first, last = (row * inner for row in item.rows) if item.rows else (0, size)
        for start in range(first, last, step):
            piece = scratch.piece(min(step, last - start), item.source_dtype)
            checkpoint.fill(source, start, piece)
            yield piece


def _transposed(checkpoint: Checkpoint, item: PlanItem, scratch: Scratch) -> Iterator[Bits]:
    rows, cols = item.source_shape
    flat = scratch.matrix(rows * cols, item.source_dtype)
    start = 0
    for source in item.sources:
        size = checkpoint.tensors[source].elements
        checkpoint.fill(source, 0, flat[start : start + size])
        start += size
    matrix = flat.reshape(rows, cols)
    # The rows of a stack in Hugging Face's layout are columns of Paddle's matrix.
    first, last = item.rows or (0, cols)
    width = max(TILE, PIECE_BYTES // max(1, rows * matrix.itemsize) // TILE * TILE)
    for left in range(first, last, width):
        wide = min(width, last - left)
        piece = scratch.piece(wide * rows, item.source_dtype)
        transpose_into(piece.reshape(wide, rows), matrix[:, left : left + wide])
        yield piece
