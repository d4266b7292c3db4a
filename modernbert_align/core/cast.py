"""Casts between floating-point formats, and an account of what each of them loses."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from modernbert_align.core.ops import Bits
from modernbert_align.errors import CheckpointError

FLOATS: dict[str, np.dtype] = {  # type: ignore[type-arg]
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SHORT_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CONFIG_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WIDENING = frozenset({("F16", "F32"), ("BF16", "F32"), ("F32", "F64"), ("F16", "F64"), ("BF16", "F64")})
_BLOCK = 1 << 16  # elements at a time, so that the temporaries stay below 4 MiB and mostly in the cache


@dataclass
class CastLoss:
    """What a cast lost, added up over the pieces of a tensor.

    Attributes:
        elements: Values cast.
        max_abs: Largest |source - cast| where both are finite, in float64 arithmetic.
        max_rel: Largest |source - cast| / |source| where both are finite and the source is not zero.
        overflow: Finite values that became infinite.
        overflow_max: Largest magnitude among those.
        underflow: Values other than zero that became zero.
        subnormal: Normal values that became subnormal, where the target format has fewer digits.
        nan, inf: Values that were NaN or infinite already, and still are.
    """

    elements: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    overflow: int = 0
    overflow_max: float = 0.0
    underflow: int = 0
    subnormal: int = 0
    nan: int = 0
    inf: int = 0

    @property
    def lossless(self) -> bool:
        """Whether every value is what it was (a NaN may have another payload)."""
        return self.max_abs == 0 and self.overflow == 0 and self.underflow == 0

    def __iadd__(self, other: "CastLoss") -> "CastLoss":
        self.elements += other.elements
        self.max_abs = max(self.max_abs, other.max_abs)
        self.max_rel = max(self.max_rel, other.max_rel)
        self.overflow += other.overflow
        self.overflow_max = max(self.overflow_max, other.overflow_max)
        self.underflow += other.underflow
        self.subnormal += other.subnormal
        self.nan += other.nan
        self.inf += other.inf
        return self


def cast_bits(bits: Bits, source: str, target: str, loss: CastLoss) -> Bits:
    """Cast a piece of a tensor, rounding to nearest even, and add what that lost to `loss`.

    A value beyond the target's range becomes infinite; `check_loss` is there to refuse that. Between equal dtypes
    nothing is cast, and nothing but the elements is counted.

    Args:
        bits: Unsigned view of `source`, any shape.
        source, target: safetensors dtype names.
        loss: Changed in place.

    Returns:
        Unsigned view of `target`, the same shape; `bits` itself between equal dtypes.
    """
    loss.elements += bits.size
    if source == target:
        return bits
    out = np.empty(bits.shape, dtype=f"u{FLOATS[target].itemsize}")
    flat_in, flat_out = bits.reshape(-1), out.reshape(-1)
    with np.errstate(all="ignore"):
        for start in range(0, bits.size, _BLOCK):
            values = flat_in[start : start + _BLOCK].view(FLOATS[source])
            single = _narrowed_to_odd(values) if (source, target) == ("F64", "BF16") else values
            cast = single.astype(FLOATS[target])
            flat_out[start : start + _BLOCK] = cast.view(out.dtype)
            if (source, target) not in WIDENING:
                _measure(values, cast, loss)
            elif not np.isfinite(cast).all():
                _count_not_finite(cast, loss)
    return out


def check_loss(loss: CastLoss, name: str, target: str, *, allow_overflow: bool) -> None:
    """Refuse a cast that made infinities of finite values.

    Args:
        loss: Of the whole tensor.
        name: The tensor, for the message.
        target: safetensors dtype name it was cast to.
        allow_overflow: Let it pass.

    Raises:
        CheckpointError: A value overflowed and `allow_overflow` is False.
    """
    if loss.overflow == 0 or allow_overflow:
        return
    choose = "choose bf16, which has the range of fp32, " if loss.overflow_max <= _limit("BF16") else ""
    one = loss.overflow == 1
    raise CheckpointError(
        f"{loss.overflow} {'value' if one else 'values'} of `{name}` {'does' if one else 'do'} not fit "
        f"{CONFIG_NAMES[target]} (largest {loss.overflow_max:.6g}, limit {_limit(target):.6g})",
        hint=f"keep the dtype, {choose}or accept infinities with --allow-overflow",
    )


def _limit(dtype: str) -> float:
    return float(ml_dtypes.finfo(FLOATS[dtype]).max)


def _measure(values: npt.NDArray[Any], cast: npt.NDArray[Any], loss: CastLoss) -> None:
    """Add one block of at least one value to `loss`, all but its elements."""
    source, target = ml_dtypes.finfo(values.dtype), ml_dtypes.finfo(cast.dtype)
    exact, rounded = _float64(values), _float64(cast)
    error = exact - rounded  # float64 holds this difference exactly for every pair of formats
    np.abs(error, out=error)
    if not np.isfinite(error.max()):
        kept = np.isfinite(rounded)
        overflown = np.abs(exact[np.isfinite(exact) & ~kept])
        loss.overflow += overflown.size
        loss.overflow_max = max(loss.overflow_max, float(overflown.max(initial=0.0)))
        _count_not_finite(exact, loss)
        exact, rounded, error = exact[kept], rounded[kept], error[kept]
    zeros, zeros_now = int(np.count_nonzero(exact == 0)), int(np.count_nonzero(rounded == 0))
    loss.underflow += zeros_now - zeros  # a zero stays zero
    smallest_normal = float(target.smallest_normal)
    if smallest_normal > float(source.smallest_normal):  # then no subnormal source becomes one; else no normal one
        small = np.abs(rounded, out=rounded) < smallest_normal
        loss.subnormal += int(np.count_nonzero(small)) - zeros_now
    loss.max_abs = max(loss.max_abs, float(error.max(initial=0.0)))
    size = np.abs(exact, out=exact)
    if zeros:
        size[size == 0] = 1.0  # their error is zero
    error /= size
    loss.max_rel = max(loss.max_rel, float(error.max(initial=0.0)))


def _count_not_finite(values: npt.NDArray[Any], loss: CastLoss) -> None:
    loss.nan += int(np.count_nonzero(np.isnan(values)))
    loss.inf += int(np.count_nonzero(np.isinf(values)))


def _float64(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Fresh float64 of any format; numpy takes twice as long for float16 as looking it up does."""
    if values.dtype == np.float16:
        return _every_float16().take(values.view(np.uint16), mode="clip").astype(np.float64)  # nothing to clip: fast
    return values.astype(np.float64)


@cache
def _every_float16() -> npt.NDArray[np.float32]:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _narrowed_to_odd(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """float32 of the two around a value whose last bit is odd, so that rounding it again rounds only once."""
    near = values.astype(np.float32)
    patterns = near.view(np.uint32)
    even = (patterns & 1) == 0
    exact, rounded = np.abs(values), np.abs(near)
    farther, nearer = even & (exact > rounded), even & (exact < rounded)  # from zero, in steps of the pattern
    patterns += farther
    patterns -= nearer
    return near
