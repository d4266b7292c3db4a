"""Attention of ModernBERT: rotary positions, the two masks, and the eager implementation.

Axes, as used in the shape comments here and in modeling.py:
    batch, seq          sequences, and tokens per sequence (padded)
    hidden              config.hidden_size
    heads, head_dim     heads * head_dim == hidden
    inter               config.intermediate_size
With tensor parallelism a rank has its share of heads, and of hidden where that is heads * head_dim, and of inter.

Source: transformers 5.23.0, models/modernbert/modeling_modernbert.py and masking_utils.py.
"""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from modernbert_align.core.model_config import SLIDING, RopeScaling
from modernbert_align.models.modernbert.blockwise import Indices, Span, blockwise_attention
from modernbert_align.models.modernbert.boundaries import sequence_of_token
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.flash import flash_attention
from modernbert_align.models.modernbert.layers import column_linear, row_linear
from modernbert_align.models.modernbert.parallel import degree_of, drawing_apart
from modernbert_align.models.modernbert.precision import rounded


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """RoPE's inverse frequencies, 1 / theta ** (2k / head_dim) unless scaled, in float32 arithmetic.

    Paddle's float32 power gives the reference's bits for the published sizes; numpy's differs in one of five.

    Returns:
        [head_dim/2], float32.

    Source: transformers 5.23.0, ModernBertRotaryEmbedding.compute_default_rope_parameters; modeling_rope_utils.py.
    """
    exponents = paddle.arange(0, head_dim, 2, dtype="float32") / head_dim
    periods = theta**exponents  # [head_dim/2]
    if scaling is None:
        return (1.0 / periods).numpy()
    if scaling.rope_type == "linear":
        return (1.0 / periods / scaling.factor).numpy()
    stretched = paddle.to_tensor(_stretched_share(head_dim, theta, scaling))
    return (1.0 / (scaling.factor * periods) * stretched + 1.0 / periods * (1 - stretched)).numpy()


def _stretched_share(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN: how much of each frequency is stretched, from 0 for the fastest to 1 for the slowest.

    A frequency that turns more than `beta_fast` times over the original length stays, one that turns less than
    `beta_slow` times is stretched, and in between the share grows linearly.

    Returns:
        [head_dim/2], float32.
    """
    original = scaling.original_max_position_embeddings
    assert original is not None  # set when the configuration is read

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast or 32)), 0)
    high: float = min(math.ceil(dimension(scaling.beta_slow or 1)), head_dim - 1)
    if low == high:
        high += 0.001  # the reference's way around a division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, 0, 1)


def attention_scaling(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by; other than 1 only with YaRN.

    Source: transformers 5.23.0, modeling_rope_utils.py, _compute_yarn_parameters.
    """
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


class ModernBertRotaryEmbedding(nn.Layer):
    """cos and sin tables for one layer kind, computed in float32 and rounded to the activations' dtype.

    Args:
        config: The model's configuration.
        layer_type: `full_attention` or `sliding_attention`; each has its own base.
    """

    def __init__(self, config: ModernBertConfig, layer_type: str) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        model = config.resolved()
        scaling = model.rope_scaling(layer_type)
        # Not a buffer: a cast of the model to bfloat16 must leave the frequencies in float32.
        self.inv_freq = inverse_frequencies(head_dim, model.rope_theta(layer_type), scaling)
        self.attention_scaling = attention_scaling(scaling)

    def forward(self, position_ids: paddle.Tensor, dtype: paddle.dtype) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Tables for the given positions.

        Args:
            position_ids: [batch_or_1 seq], integers.
            dtype: dtype of the activations.

        Returns:
            cos and sin, each [batch_or_1 seq head_dim] in `dtype`.
        """
        freqs = position_ids.astype("float32").unsqueeze(-1) * paddle.to_tensor(self.inv_freq)  # [b seq head_dim/2]
        angles = paddle.concat([freqs, freqs], axis=-1)  # [b seq head_dim]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.astype(dtype), sin.astype(dtype)


def rotate_half(x: paddle.Tensor) -> paddle.Tensor:
    """(x1, x2) -> (-x2, x1) on the two halves of the last axis."""
    first, second = x.chunk(2, axis=-1)
    return paddle.concat([-second, first], axis=-1)


def apply_rotary_pos_emb(
    q: paddle.Tensor, k: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Rotate queries and keys by position (RoPE, half-split layout).

    Args:
        q: [batch heads seq head_dim], any float dtype.
        k: Like q.
        cos: [batch_or_1 seq head_dim], already rounded to the activations' dtype.
        sin: Like cos.

    Returns:
        q and k, same shapes and dtypes. The rotation is computed in float32, as the reference does since 5.2.

    Source: transformers 5.23.0, modeling_modernbert.py, apply_rotary_pos_emb.
    """
    dtype = q.dtype
    cos = cos.astype("float32").unsqueeze(1)  # [batch_or_1 1 seq head_dim]
    sin = sin.astype("float32").unsqueeze(1)  # [batch_or_1 1 seq head_dim]
    q, k = q.astype("float32"), k.astype("float32")
    return (
        (q * cos + rotate_half(q) * sin).astype(dtype),
        (k * cos + rotate_half(k) * sin).astype(dtype),
    )


def sliding_window_keep(query_positions: int, half_window: int) -> paddle.Tensor:
    """Which keys a sliding layer may see: |i - j| <= half_window, both edges included.

    Returns:
        [seq seq], bool.
    """
    positions = paddle.arange(query_positions)
    return (positions.unsqueeze(0) - positions.unsqueeze(1)).abs() <= half_window  # [seq seq]


def attention_bias(
    attention_mask: paddle.Tensor | None, seq: int, half_window: int | None, dtype: paddle.dtype
) -> paddle.Tensor | None:
    """What is added to the attention scores: 0 where a key may be seen, the dtype's lowest value elsewhere.

    Args:
        attention_mask: [batch seq], true (1) at real tokens; None if there is no padding.
        half_window: None for full attention.
        dtype: dtype of the scores.

    Returns:
        [batch_or_1 1 seq_or_1 seq], or None if nothing is hidden.
    """
    keep = None
    if attention_mask is not None:
        keep = attention_mask.astype("bool").unsqueeze(1).unsqueeze(1)  # [batch 1 1 seq]
    if half_window is not None:
        window = sliding_window_keep(seq, half_window).unsqueeze(0).unsqueeze(0)  # [1 1 seq seq]
        keep = window if keep is None else paddle.logical_and(keep, window)  # [batch 1 seq seq]
    if keep is None:
        return None
    lowest = paddle.to_tensor(paddle.finfo(dtype).min, dtype="float32")
    return paddle.where(keep, paddle.zeros([], dtype="float32"), lowest).astype(dtype)


def same_sequence(boundaries: Indices) -> paddle.Tensor:
    """Which keys of a packed row a query may see: those of its own sequence.

    Args:
        boundaries: [sequences+1], see `boundaries.sequence_boundaries`.

    Returns:
        [1 1 total total], bool: blocks along the diagonal.
    """
    sequence = paddle.to_tensor(sequence_of_token(boundaries))  # [total]
    return (sequence.unsqueeze(0) == sequence.unsqueeze(1)).unsqueeze(0).unsqueeze(0)  # [1 1 total total]


def eager_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    bias: paddle.Tensor | None,
    dropout: float,
    training: bool,
    same: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Attention spelled out: the implementation that carries the alignment contract.

    Args:
        q, k, v: [batch heads seq head_dim].
        bias: See `attention_bias`.
        same: Of packed input, see `same_sequence`. Where it is false neither values nor gradients pass.

    Returns:
        The weighted values [batch seq heads head_dim] and the probabilities [batch heads seq seq].

    Source: transformers 5.23.0, modeling_modernbert.py, eager_attention_forward.
    """
    scores = rounded(paddle.matmul, q, k, transpose_y=True)  # [batch heads seq seq]
    scores = rounded(paddle.scale, scores, scale=q.shape[-1] ** -0.5)
    if bias is not None:
        scores = rounded(paddle.add, scores, bias)
    scores = scores.astype("float32")
    if same is None:
        probabilities = F.softmax(scores, axis=-1)
    else:
        # Paddle's softmax leaves 1e-28 where a score is hidden, and a gradient with it: hide before and after.
        hidden = paddle.full([], paddle.finfo(paddle.float32).min)
        probabilities = F.softmax(paddle.where(same, scores, hidden), axis=-1)
        probabilities = paddle.where(same, probabilities, paddle.zeros([]))
    probabilities = probabilities.astype(q.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=training)
    out = rounded(paddle.matmul, probabilities, v)  # [batch heads seq head_dim]
    return out.transpose([0, 2, 1, 3]), probabilities  # [batch seq heads head_dim]


class ModernBertAttention(nn.Layer):
    """Multi-head self-attention with rotary positions.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer; decides between full and sliding attention.
    """

    def __init__(self, config: ModernBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.divided = degree_of(config) > 1
        self.num_heads = config.num_attention_heads // degree_of(config)  # of this rank
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.is_sliding = config.layer_types[layer_idx] == SLIDING
        self.half_window = config.local_attention // 2 if self.is_sliding else None
        self.Wqkv = column_linear(config, config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = row_linear(config, config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.out_drop = nn.Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_states: paddle.Tensor,
        position_embeddings: tuple[paddle.Tensor, paddle.Tensor],
        attention_bias: paddle.Tensor | None = None,
        spans: tuple[Span, ...] | None = None,
        same: paddle.Tensor | None = None,
        rows: paddle.Tensor | None = None,
    ) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [batch seq hidden], or [1 total hidden] with `spans` or `rows`.
            position_embeddings: cos and sin, each [batch_or_1 seq head_dim]; with `spans` or `rows` as
                `blockwise.rotation` makes them.
            attention_bias: [batch_or_1 1 seq_or_1 seq], or None.
            spans: The sequences of a packed batch: attend block by block.
            same: Of packed input that is attended to eagerly: see `same_sequence`.
            rows: Who sees whom in a packed batch, see `flash.mask_rows`: attend through the kernel. With neither this
                nor `spans`: eagerly.

        Returns:
            The output, shaped like `hidden_states`, and the probabilities [batch heads seq seq] of this rank's heads,
            or None with `spans` or `rows`.

        Raises:
            ConfigError: There is no kernel for `rows` here, see `flash.require_kernel`.
        """
        qkv = self.Wqkv(hidden_states)  # [batch seq 3*hidden]
        apart = self.divided and self.training and self.attention_dropout > 0
        out, probabilities = drawing_apart(
            apart, self._attend, qkv, position_embeddings, attention_bias, spans, same, rows
        )
        return self.out_drop(self.Wo(out)), probabilities

    def _attend(
        self,
        qkv: paddle.Tensor,
        position_embeddings: tuple[paddle.Tensor, paddle.Tensor],
        attention_bias: paddle.Tensor | None,
        spans: tuple[Span, ...] | None,
        same: paddle.Tensor | None,
        rows: paddle.Tensor | None,
    ) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """[batch seq 3*hidden] -> [batch seq hidden] and the probabilities, in the implementation asked for."""
        dropout = self.attention_dropout
        if rows is not None:
            return flash_attention(qkv, position_embeddings, rows, self.num_heads, dropout, self.training), None
        if spans is not None:
            out = blockwise_attention(
                qkv, position_embeddings, spans, self.num_heads, self.half_window, dropout, self.training
            )
            return out, None
        batch, seq = qkv.shape[:2]
        qkv = qkv.reshape([batch, seq, 3, self.num_heads, self.head_dim])
        q, k, v = qkv.transpose([2, 0, 3, 1, 4]).unbind(0)  # each [batch heads seq head_dim]
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, probabilities = eager_attention(q, k, v, attention_bias, dropout, self.training, same)
        return out.reshape([batch, seq, self.num_heads * self.head_dim]), probabilities  # [batch seq hidden]
