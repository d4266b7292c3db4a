"""The values that stand for every module's output in the isolated passes of traces, the same on every machine.

Each is a sum of twelve uniform numbers of 16 bits, so its mean is 0 and its variance 1: only integers are added and one
exact scaling follows. numpy's own normal numbers go through the system's logarithm, and their stream may change between
versions; PCG64's raw stream may not.
"""

import hashlib
import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from modernbert_align.core.rows import Dtype

_TERMS = 12
_MEAN = _TERMS * (2**16 - 1) / 2
_BLOCK = 1 << 16  # numbers at a time; each takes 24 bytes of the stream
_TYPES: dict[Dtype, npt.DTypeLike] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}


def draw(inputs_sha256: str, probe: str, shape: tuple[int, ...], dtype: Dtype) -> npt.NDArray[Any]:
    """The values for one probe, rounded to the run's dtype.

    Args:
        inputs_sha256: Of the batch; together with the probe's name it is the seed.
        shape: Of what the module returned; the values are dealt out in row-major order.
    """
    seed = hashlib.sha256(f"{inputs_sha256} {probe}".encode()).digest()
    stream = np.random.PCG64(int.from_bytes(seed[:16], "little"))
    out = np.empty(math.prod(shape), dtype=_TYPES[dtype])
    for start in range(0, out.size, _BLOCK):
        count = min(_BLOCK, out.size - start)
        words = stream.random_raw(count * _TERMS // 4).astype("<u8").view("<u2")
        sums = words.reshape(count, _TERMS).sum(axis=1, dtype=np.int32)
        out[start : start + count] = ((sums - _MEAN) / 2**16).astype(np.float32)
    return out.reshape(shape)


def drawn_digest(inputs_sha256: str) -> str:
    """SHA-256 of a few thousand drawn numbers: two machines that agree on it draw alike."""
    return hashlib.sha256(draw(inputs_sha256, "", (4096,), "fp32").astype("<f4").tobytes()).hexdigest()
