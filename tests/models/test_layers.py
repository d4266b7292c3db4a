"""GeGLU, LayerNorm, the decoder and the rounding points, against formulas written out here."""

import math

import ml_dtypes
import numpy as np
import paddle
import pytest

from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.layers import (
    LayerNorm,
    Linear,
    ModernBertDecoder,
    ModernBertMLP,
    TokenEmbedding,
)
from modernbert_align.models.modernbert.precision import rounded

CONFIG = {"hidden_size": 6, "num_attention_heads": 1, "intermediate_size": 5, "vocab_size": 11, "pad_token_id": 3}


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_geglu_activates_the_first_half_with_the_exact_gelu():
    mlp = ModernBertMLP(ModernBertConfig(**CONFIG))
    x = paddle.randn([2, 3, 6]) * 3
    inner = x.numpy().astype(np.float64) @ mlp.Wi.weight.numpy().astype(np.float64)
    value, gate = inner[..., :5], inner[..., 5:]
    expected = (gelu(value) * gate) @ mlp.Wo.weight.numpy().astype(np.float64)
    np.testing.assert_allclose(mlp(x).numpy(), expected, atol=1e-5)
    swapped = (gelu(gate) * value) @ mlp.Wo.weight.numpy().astype(np.float64)
    assert np.abs(swapped - expected).max() > 1e-3  # the test would see swapped halves


def test_silu_is_taken_when_the_config_says_so():
    mlp = ModernBertMLP(ModernBertConfig(**CONFIG, hidden_activation="silu"))
    x = paddle.randn([1, 2, 6])
    inner = x.numpy() @ mlp.Wi.weight.numpy()
    value, gate = inner[..., :5], inner[..., 5:]
    expected = (value / (1 + np.exp(-value)) * gate) @ mlp.Wo.weight.numpy()
    np.testing.assert_allclose(mlp(x).numpy(), expected, atol=1e-5)


def test_layer_norm_uses_the_configured_epsilon():
    x = paddle.randn([4, 6]) * 1e-3
    for epsilon in (1e-5, 1e-12):
        found = LayerNorm(ModernBertConfig(**CONFIG, norm_eps=epsilon))(x).numpy()
        values = x.numpy().astype(np.float64)
        centred = values - values.mean(-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("switch", ["norm_bias", "mlp_bias", "decoder_bias"])
def test_bias_switches_create_and_drop_the_bias(switch):
    owner = {
        "norm_bias": LayerNorm,
        "mlp_bias": lambda c: ModernBertMLP(c).Wi,
        "decoder_bias": lambda c: ModernBertDecoder(c, None),
    }[switch]
    assert owner(ModernBertConfig(**{**CONFIG, switch: True})).bias is not None
    assert owner(ModernBertConfig(**{**CONFIG, switch: False})).bias is None


def test_tied_decoder_shares_the_embedding():
    embedding = TokenEmbedding(ModernBertConfig(**CONFIG))
    decoder = ModernBertDecoder(ModernBertConfig(**CONFIG), embedding)
    assert decoder.weight is embedding.weight
    x = paddle.randn([2, 6])
    np.testing.assert_allclose(
        decoder(x).numpy(), x.numpy() @ embedding.weight.numpy().T + decoder.bias.numpy(), atol=1e-5
    )


def test_padding_ids_are_looked_up_but_get_no_gradient():
    embedding = TokenEmbedding(ModernBertConfig(**CONFIG))
    ids = paddle.to_tensor([[1, 3, 3]])
    out = embedding(ids)
    np.testing.assert_array_equal(out[0, 1].numpy(), embedding.weight[3].numpy())
    assert np.abs(out[0, 1].numpy()).max() > 0
    out.sum().backward()
    gradient = embedding.weight.grad.numpy()
    assert (gradient[3] == 0).all()
    assert (gradient[1] == 1).all()


def test_bf16_operations_compute_wide_and_round_once():
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((64, 6), (6, 7), (7,)))
    linear = Linear(6, 7, bias=True)
    linear.weight.set_value(paddle.to_tensor(w.astype(np.float32)))
    linear.bias.set_value(paddle.to_tensor(b.astype(np.float32)))
    linear.to(dtype="bfloat16")
    found = linear(paddle.to_tensor(x.astype(np.float32)).astype("bfloat16"))
    assert found.dtype == paddle.bfloat16
    once = (x.astype(np.float64) @ w.astype(np.float64) + b.astype(np.float64)).astype(ml_dtypes.bfloat16)
    twice = (x.astype(np.float64) @ w.astype(np.float64)).astype(ml_dtypes.bfloat16) + b
    np.testing.assert_array_equal(found.astype("float32").numpy(), once.astype(np.float32))
    assert (twice != once).any()  # the test would see a second rounding


def test_fp32_operations_run_as_they_are():
    x = paddle.randn([3, 3])
    np.testing.assert_array_equal(rounded(paddle.add, x, x).numpy(), (x + x).numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype_and_its_gradient(dtype):
    x = paddle.randn([4, 6]).astype(dtype)
    x.stop_gradient = False
    out = rounded(paddle.nn.functional.gelu, x)
    assert out.dtype == x.dtype
    out.astype("float32").sum().backward()
    assert np.isfinite(x.grad.astype("float32").numpy()).all()
