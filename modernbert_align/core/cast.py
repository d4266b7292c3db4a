"""Casts between floating-point formats, refusing what would silently lose a value's magnitude."""

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


def cast_bits(bits: Bits, source: str, target: str, *, name: str) -> Bits:
    """Cast a tensor, rounding to nearest even.

    Args:
        bits: Unsigned view of `source`, any shape.
        source, target: safetensors dtype names.
        name: Named in the error message.

    Raises:
        CheckpointError: A finite value does not fit the target format.
    """
    if source == target:
        return bits
    values = bits.view(FLOATS[source])
    if (source, target) == ("F64", "BF16"):
        values = _narrowed_to_odd(values)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(FLOATS[target])
    lost = np.isfinite(values.astype(np.float64)) & ~np.isfinite(cast.astype(np.float64))
    if lost.any():
        raise CheckpointError(
            f"{int(lost.sum())} values of `{name}` do not fit {CONFIG_NAMES[target]}",
            hint="keep the dtype" if target == "BF16" else "keep the dtype or choose bf16, which has the range of fp32",
        )
    return cast.view(bits.dtype if cast.itemsize == bits.itemsize else f"u{cast.itemsize}")


def _narrowed_to_odd(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """float32 of the two around a value whose last bit is odd, so that rounding it again rounds only once."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        other = np.nextafter(near, np.where(values > near, np.inf, -np.inf).astype(np.float32))
    even = (near.view(np.uint32) & 1) == 0
    return np.where(np.isfinite(values) & (near != values) & even, other, near)
