"""Attention of packed tokens through Paddle's FlashMask kernel, which runs on CUDA devices in half precision only.

The packed row is attended to in one call per layer. Which keys a query may see, its own sequence's and in sliding
layers those within half a window, is told to the kernel as two numbers per key.

Axes in the shape comments are those of attention.py, and:
    total               real tokens of the batch

Source: paddlepaddle 3.3.1, paddle.nn.functional.flashmask_attention, of which the dense mask of
`startend_row_indices` and the dtypes are documented.
"""

import numpy as np
import numpy.typing as npt
import paddle
import paddle.nn.functional as F

from modernbert_align.errors import ConfigError
from modernbert_align.models.modernbert.blockwise import Span, rotate
from modernbert_align.models.modernbert.precision import HALF


def mask_rows(spans: tuple[Span, ...], half_window: int | None) -> npt.NDArray[np.int32]:
    """For each key the queries that may see it, as FlashMask takes them with `causal=False`.

    Queries that may see a key stand side by side, also where the padded row has holes: places rise with tokens.

    Args:
        spans: The sequences of the packed row.
        half_window: None for full attention. Measured in the places of the padded row, both edges included.

    Returns:
        [1 1 total 2]: where the queries that see the key end, and where they start. Those from the first number on
        and those before the second do not see it.
    """
    found = []
    for span in spans:
        reach = span.slots[-1] if half_window is None else half_window
        below = np.searchsorted(span.slots, span.slots + reach, side="right")  # [length]
        above = np.searchsorted(span.slots, span.slots - reach)  # [length]
        starts = span.start + span.length * np.arange(span.count)
        found.append((starts[:, None, None] + np.stack([below, above], axis=-1)).reshape(-1, 2))  # [count*length 2]
    return np.concatenate(found).astype(np.int32)[None, None]


def on_cuda(x: paddle.Tensor) -> bool:
    """Whether `x` is where the kernel runs."""
    return bool(paddle.is_compiled_with_cuda() and x.place.is_gpu_place())


def require_kernel(x: paddle.Tensor) -> None:
    """Refuse what the kernel cannot compute: nothing takes its place unasked.

    Half precision on a CPU, where other operations are emulated, is refused with the device.

    Raises:
        ConfigError: `x` is not on a CUDA device, or not in half precision.
    """
    if on_cuda(x) and x.dtype in HALF:
        return
    dtype = str(x.dtype).removeprefix("paddle.")
    raise ConfigError(
        f"attention implementation `flash` needs float16 or bfloat16 on a CUDA device, not {dtype} at {x.place}",
        hint="use a half-precision model on a GPU, with a Paddle built for CUDA; or set `attn_implementation` to "
        "`blockwise`, which runs everywhere",
    )


def flash_attention(
    qkv: paddle.Tensor,
    tables: tuple[paddle.Tensor, paddle.Tensor],
    rows: paddle.Tensor,
    num_heads: int,
    dropout: float,
    training: bool,
) -> paddle.Tensor:
    """Attention of packed sequences in one call of the kernel; it scales by 1 / sqrt(head_dim).

    Args:
        qkv: [1 total 3*hidden], queries, keys and values before rotation.
        tables: See `blockwise.rotation`.
        rows: [1 1 total 2], int32, see `mask_rows`.

    Returns:
        [1 total hidden].

    Raises:
        ConfigError: See `require_kernel`.
    """
    require_kernel(qkv)
    total, hidden = qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape([1, total, 3, num_heads, hidden // num_heads]).unbind(2)  # each [1 total heads head_dim]
    cos, signed_sin = (table.unsqueeze(1) for table in tables)  # [total 1 head_dim]
    q, k = (rotate(x.astype("float32"), cos, signed_sin).astype(qkv.dtype) for x in (q, k))
    # Not `training`: version 3 of the kernel refuses evaluation mode, which without dropout is the same.
    out = F.flashmask_attention(q, k, v, rows, dropout=dropout if training else 0.0)  # [1 total heads head_dim]
    return out.reshape([1, total, hidden])
