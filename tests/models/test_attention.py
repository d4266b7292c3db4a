"""Rotary positions, the window's edges and the mask, against formulas written out here."""

import math

import numpy as np
import paddle
import pytest

from modernbert_align.core.model_config import FULL, SLIDING
from modernbert_align.models.modernbert.attention import (
    ModernBertRotaryEmbedding,
    apply_rotary_pos_emb,
    attention_bias,
    eager_attention,
    inverse_frequencies,
    sliding_window_keep,
)
from modernbert_align.models.modernbert.configuration import ModernBertConfig


def test_inverse_frequencies_follow_the_formula():
    found = inverse_frequencies(8, 10000.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [10000.0 ** (-2 * k / 8) for k in range(4)], rtol=1e-6)


def test_rotation_turns_each_pair_by_position_times_frequency():
    head_dim, seq, theta = 8, 5, 100.0
    config = ModernBertConfig(
        hidden_size=16,
        num_attention_heads=2,
        rope_parameters={k: {"rope_type": "default", "rope_theta": theta} for k in (FULL, SLIDING)},
    )
    q = paddle.randn([1, 2, seq, head_dim])
    cos, sin = ModernBertRotaryEmbedding(config, FULL)(paddle.arange(seq).unsqueeze(0), paddle.float32)
    rotated, _ = apply_rotary_pos_emb(q, q, cos, sin)
    for position in range(seq):
        for k in range(head_dim // 2):
            angle = position * theta ** (-2 * k / head_dim)
            a, b = (q[0, :, position, i].numpy().astype(np.float64) for i in (k, k + head_dim // 2))
            expected = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
            for i, value in zip((k, k + head_dim // 2), expected, strict=True):
                np.testing.assert_allclose(rotated[0, :, position, i].numpy(), value, atol=1e-6)


def test_rotated_products_depend_on_the_distance_only():
    config = ModernBertConfig(hidden_size=16, num_attention_heads=2)
    rotary = ModernBertRotaryEmbedding(config, SLIDING)
    q, k = paddle.randn([1, 1, 1, 8]), paddle.randn([1, 1, 1, 8])

    def product(i, j):
        at_i = rotary(paddle.to_tensor([[i]]), paddle.float32)
        at_j = rotary(paddle.to_tensor([[j]]), paddle.float32)
        rotated_q = apply_rotary_pos_emb(q, q, *at_i)[0]
        rotated_k = apply_rotary_pos_emb(k, k, *at_j)[0]
        return float((rotated_q * rotated_k).sum())

    assert product(3, 10) == pytest.approx(product(40, 47), abs=1e-4)
    assert product(3, 10) != pytest.approx(product(3, 11), abs=1e-4)


def test_each_layer_kind_has_its_own_base():
    config = ModernBertConfig(hidden_size=16, num_attention_heads=2, global_rope_theta=5000.0, local_rope_theta=70.0)
    assert ModernBertRotaryEmbedding(config, FULL).inv_freq[1] == pytest.approx(5000.0 ** (-1 / 4))
    assert ModernBertRotaryEmbedding(config, SLIDING).inv_freq[1] == pytest.approx(70.0 ** (-1 / 4))


@pytest.mark.parametrize("half_window", [0, 1, 3, 64])
def test_window_includes_both_edges_and_nothing_beyond(half_window):
    keep = sliding_window_keep(150, half_window).numpy()
    for i in (0, 1, 70, 148, 149):
        for j in range(150):
            assert keep[i, j] == (abs(i - j) <= half_window), (i, j)


def test_mask_hides_padding_and_what_is_outside_the_window():
    mask = paddle.to_tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    bias = attention_bias(mask, 6, 2, paddle.float32).numpy()
    assert bias.shape == (2, 1, 6, 6)
    for row, length in enumerate((5, 3)):
        for i in range(6):
            for j in range(6):
                hidden = abs(i - j) > 2 or j >= length
                assert (bias[row, 0, i, j] < -1e38) == hidden
                assert hidden or bias[row, 0, i, j] == 0.0


def test_no_padding_and_full_attention_need_no_mask():
    assert attention_bias(None, 6, None, paddle.float32) is None


def test_bf16_mask_is_finite_in_bf16():
    bias = attention_bias(paddle.to_tensor([[1, 0]]), 2, None, paddle.bfloat16)
    assert bias.dtype == paddle.bfloat16
    assert np.isfinite(bias.astype("float32").numpy()).all()


def test_eager_attention_is_softmax_of_scaled_scores():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 5, 4)) for _ in range(3))
    scores = q @ k.transpose(0, 1, 3, 2) / 2.0
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    out, probabilities = eager_attention(
        *(paddle.to_tensor(x.astype(np.float32)) for x in (q, k, v)), None, dropout=0.0, training=False
    )
    np.testing.assert_allclose(probabilities.numpy(), weights, atol=1e-6)
    np.testing.assert_allclose(out.numpy(), (weights @ v).transpose(0, 2, 1, 3), atol=1e-6)
