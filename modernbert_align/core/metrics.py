"""Error measures between a candidate's and a reference's tensor, in float64, a slice at a time."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
_SLICE = 1 << 18  # elements; the temporaries of a slice stay in the cache
# Distance in bfloat16 steps, upper ends of the bins; then everything further; then pairs too near zero to count steps.
ULP_EDGES = (0, 1, 2, 4, 8, 16, 64)
ULP_BINS = ("0", "1", "2", "3-4", "5-8", "9-16", "17-64", "65-", "near zero")
_NEAR_ZERO = 2.0**-8  # of the reference's rms: below, steps are smaller than any error of the sums behind the values


@dataclass(frozen=True)
class ByRow:
    """An array whose rows are computed when they are asked for, and not kept.

    Attributes:
        shape: [rows ...].
        row: Computes one, [...].
    """

    shape: tuple[int, ...]
    row: Callable[[int], Floats]

    def whole(self) -> Floats:
        """All rows at once."""
        return np.stack([self.row(index) for index in range(self.shape[0])])


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What was measured over the compared elements.

    Attributes:
        elements: How many were compared.
        mean_abs: mean(|c - r|).
        max_abs: max(|c - r|).
        rel_l2: ||c - r|| / ||r||, or over the scale where that is larger; None if both are zero and c is not.
        reference_rms: sqrt(mean(r**2)).
        equal_share: Share of elements that are equal.
        worst_index: Where max_abs occurs, in the uncompressed tensor.
        worst_candidate, worst_reference: The two values there.
        candidate_error, reference_error: rms(c - o) and rms(r - o) for the oracle's values o; None without them.
        ulps: Number of elements per bin of `ULP_BINS`; None if not asked for.
    """

    elements: int
    mean_abs: float
    max_abs: float
    rel_l2: float | None
    reference_rms: float
    equal_share: float
    worst_index: tuple[int, ...]
    worst_candidate: float
    worst_reference: float
    candidate_error: float | None = None
    reference_error: float | None = None
    ulps: tuple[int, ...] | None = None


def finite(values: Floats, mask: npt.NDArray[np.bool_] | None) -> bool:
    """Whether every compared element is a finite number."""
    return all(bool(np.isfinite(part).all()) for part, _ in _slices(values, mask))


def measure(
    candidate: Floats,
    reference: Floats,
    mask: npt.NDArray[np.bool_] | None,
    *,
    scale: float = 0.0,
    oracle: Floats | ByRow | None = None,
    ulps: bool = False,
) -> Metrics:
    """Compare two tensors of one shape.

    Args:
        candidate, reference: [batch seq ...] or any shape; finite.
        mask: [batch seq], true where positions are compared; None compares everything.
        scale: Smallest magnitude errors are relative to; 1 for log-probabilities, whose errors are absolute.
        oracle: What both would be without rounding, float64.
        ulps: Count distances in bfloat16 steps; both hold bfloat16 values.

    Raises:
        ValueError: The shapes differ or nothing is left to compare.
    """
    for other in (reference, oracle):
        if other is not None and candidate.shape != other.shape:
            raise ValueError(f"shapes differ: {candidate.shape} and {other.shape}")
    candidate_squares, true_squares = 0.0, 0.0
    count, total, squares, reference_squares, equal = 0, 0.0, 0.0, 0.0, 0
    worst, worst_at = -1.0, 0
    truth = _slices(oracle, mask) if oracle is not None else itertools.repeat((None, None))
    for (c, index), (r, _), (o, _) in zip(_slices(candidate, mask), _slices(reference, mask), truth, strict=False):
        c64, r64 = c.astype(np.float64), r.astype(np.float64)
        if o is not None:
            candidate_squares += float(np.square(c64 - o).sum())
            true_squares += float(np.square(r64 - o).sum())
        error = np.abs(c64 - r64)
        count += error.size
        total += float(error.sum())
        squares += float(np.square(error).sum())
        reference_squares += float(np.square(r64).sum())
        equal += int((c == r).sum())
        if error.size and float(error.max()) > worst:
            here = int(error.argmax())
            worst, worst_at = float(error.flat[here]), index(here)
    if not count:
        raise ValueError("nothing to compare")
    size = max(reference_squares, count * scale**2)
    if size > 0:
        rel_l2: float | None = float(np.sqrt(squares / size))
    else:
        rel_l2 = 0.0 if squares == 0 else None
    place = tuple(int(i) for i in np.unravel_index(worst_at, candidate.shape))
    return Metrics(
        elements=count,
        mean_abs=total / count,
        max_abs=worst,
        rel_l2=rel_l2,
        reference_rms=float(np.sqrt(reference_squares / count)),
        equal_share=equal / count,
        worst_index=place,
        worst_candidate=float(candidate[place]),
        worst_reference=float(reference[place]),
        candidate_error=float(np.sqrt(candidate_squares / count)) if oracle is not None else None,
        reference_error=float(np.sqrt(true_squares / count)) if oracle is not None else None,
        ulps=_ulps(candidate, reference, mask, _NEAR_ZERO * float(np.sqrt(size / count))) if ulps else None,
    )


def _ulps(
    candidate: Floats, reference: Floats, mask: npt.NDArray[np.bool_] | None, near_zero: float
) -> tuple[int, ...]:
    """Elements per bin of `ULP_BINS`: how many bfloat16 values apart the two are."""
    counts = np.zeros(len(ULP_BINS), dtype=np.int64)
    for (c, _), (r, _) in zip(_slices(candidate, mask), _slices(reference, mask), strict=True):
        small = (np.abs(c) < near_zero) & (np.abs(r) < near_zero)
        steps = np.abs(_ordinal(c) - _ordinal(r))[~small]
        bins = np.searchsorted(ULP_EDGES, steps, side="left")
        counts[: len(ULP_EDGES) + 1] += np.bincount(bins, minlength=len(ULP_EDGES) + 1)
        counts[-1] += int(small.sum())
    return tuple(int(n) for n in counts)


def _ordinal(values: Floats) -> npt.NDArray[np.int32]:
    """Consecutive integers for consecutive bfloat16 values, the same for both zeros."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.int32) >> 16
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


class _Index:
    """Maps a position within a slice to the flat position in the whole tensor."""

    def __init__(self, row: int, start: int, positions: npt.NDArray[np.intp] | None, row_size: int, width: int) -> None:
        self._base, self._start, self._positions, self._width = row * row_size, start, positions, width

    def __call__(self, within: int) -> int:
        flat = self._start * self._width + within
        if self._positions is None:
            return self._base + flat
        token, rest = divmod(flat, self._width)
        return self._base + int(self._positions[token]) * self._width + rest


def _slices(values: Floats | ByRow, mask: npt.NDArray[np.bool_] | None) -> Iterator[tuple[Floats, _Index]]:
    """The compared elements, at most about _SLICE at a time, each with a way back to the whole tensor."""
    if mask is not None and values.shape[:2] != mask.shape:
        raise ValueError(f"{list(values.shape)} is not [batch seq ...] for the mask {list(mask.shape)}")
    if mask is None:
        values = values.whole() if isinstance(values, ByRow) else values
        flat = values.reshape(-1)
        for start in range(0, flat.size, _SLICE):
            yield flat[start : start + _SLICE], _Index(0, start, None, 0, 1)
        return
    width = int(np.prod(values.shape[2:], dtype=np.int64))
    step = max(1, _SLICE // max(width, 1))
    for row in range(values.shape[0]):
        positions = np.flatnonzero(mask[row])
        one = values.row(row) if isinstance(values, ByRow) else values[row]
        tokens = one.reshape(values.shape[1], width)  # [seq width]
        for start in range(0, len(positions), step):
            part = tokens[positions[start : start + step]]  # [tokens width]
            yield part, _Index(row, start, positions, values.shape[1] * width, width)
