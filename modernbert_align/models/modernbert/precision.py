"""Runs an operation in the precision the reference runs it in.

Paddle 3.3 has no CPU kernel in bfloat16 for matmul, addition, GELU, LayerNorm or softmax. There the operation runs in
float32 and its result is rounded to bfloat16 once, to nearest even. Calling this once per operation of the reference
puts every rounding where PyTorch's eager kernels, which also compute in float32 and round once, have theirs. Where
kernels exist (GPU), and in float32, the operation runs as it is.
"""

from collections.abc import Callable
from typing import Any

import paddle

HALF = (paddle.bfloat16, paddle.float16)


def emulated(x: paddle.Tensor) -> bool:
    """Whether operations on `x` run in float32 with rounding, for lack of a kernel."""
    if x.dtype not in HALF:
        return False
    if paddle.in_dynamic_mode():
        return x.place.is_cpu_place()
    return paddle.get_device() == "cpu"  # a graph that is being compiled has no places yet


def rounded(op: Callable[..., paddle.Tensor], *operands: Any, **kwargs: Any) -> paddle.Tensor:
    """Apply `op` and round its result once to the dtype of the first operand.

    Args:
        op: A Paddle operation.
        *operands: Its positional arguments; tensors in half precision are widened, which is exact.
        **kwargs: Passed on unchanged.
    """
    if not emulated(operands[0]):
        return op(*operands, **kwargs)
    wide = (x.astype(paddle.float32) if getattr(x, "dtype", None) in HALF else x for x in operands)
    return op(*wide, **kwargs).astype(operands[0].dtype)
