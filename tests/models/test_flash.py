"""Flash attention as far as it can be seen without a GPU: what the kernel is told, with a plain one in its place.

The plain kernel is written from the documentation of `paddle.nn.functional.flashmask_attention` (paddlepaddle 3.3.1).
"""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.model_config import FULL, SLIDING
from modernbert_align.errors import ConfigError
from modernbert_align.models.modernbert import flash, modeling
from modernbert_align.models.modernbert.attention import apply_rotary_pos_emb
from modernbert_align.models.modernbert.blockwise import Packing, rotation
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.heads import ModernBertForSequenceClassification
from modernbert_align.models.modernbert.modeling import ModernBertForMaskedLM, ModernBertModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 4,  # full, sliding, sliding, full
    "local_attention": 8,
    "pad_token_id": 5,
    "initializer_range": 0.2,
}
LENGTHS = (1, 3, 40, 9, 9, 1, 33, 2)
KERNEL = "paddle.nn.functional.flashmask_attention"
OTHERS = ("eager_attention", "blockwise_attention")


def build(cls=ModernBertModel, **changes):
    paddle.seed(0)
    model = cls(ModernBertConfig(**{**SMALL, **changes}))
    model.eval()
    return model


def forward(model, attention, *args, **arguments):
    model.config.attn_implementation = attention
    return model(*args, **arguments, return_dict=True)


def tokens(*shape):
    return paddle.to_tensor(np.random.default_rng(shape).integers(6, 97, shape))


def hidden_by(rows):
    """[1 1 total 2] -> [total total], true where the documentation's dense mask holds minus infinity."""
    queries = np.arange(rows.shape[2])[:, None]
    return (queries >= rows[0, 0, :, 0]) | (queries < rows[0, 0, :, 1])


def plain_kernel(query, key, value, startend_row_indices=None, *, dropout=0.0, causal=False, training=True):
    """softmax(q k^T / sqrt(d) + M) v in float32, rounded once."""
    assert startend_row_indices.dtype == paddle.int32
    assert startend_row_indices.shape == [key.shape[0], 1, key.shape[1], 2]
    assert not causal
    q, k, v = (x.astype("float32").transpose([0, 2, 1, 3]) for x in (query, key, value))
    scores = paddle.matmul(q, k, transpose_y=True) / query.shape[-1] ** 0.5  # [1 heads total total]
    hidden = paddle.to_tensor(hidden_by(startend_row_indices.numpy()))
    scores = paddle.where(hidden, paddle.full([], -np.inf), scores)
    probabilities = F.dropout(F.softmax(scores, axis=-1), p=dropout, training=training)
    return paddle.matmul(probabilities, v).transpose([0, 2, 1, 3]).astype(query.dtype)


@pytest.fixture
def calls(monkeypatch):
    """A plain kernel, and a device that is said to have it; the arguments of every call."""
    found = []

    def kernel(*args, **named):
        found.append((*args, named))
        return plain_kernel(*args, **named)

    monkeypatch.setattr(KERNEL, kernel)
    monkeypatch.setattr(flash, "require_kernel", lambda x: None)
    return found


def assert_close(found, expected, tolerance=2e-6):
    found, expected = (x.astype("float32").numpy() if isinstance(x, paddle.Tensor) else x for x in (found, expected))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


MASKS = {
    "none": np.ones((3, 40)),
    "right": np.arange(40) < np.array([[40], [17], [1]]),
    "left": np.arange(40) >= np.array([[0], [31], [39]]),
    "holes": np.random.default_rng(0).random((3, 40)) < 0.5,
    "only padding in a row": np.arange(40) < np.array([[40], [0], [12]]),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def rule(sequences, half_window):
    """[total total], true where a query may not see a key: by definition, pair by pair."""
    places = [(number, slot) for number, slots in enumerate(sequences) for slot in slots]
    return np.array(
        [[a != b or (half_window is not None and abs(i - j) > half_window) for b, j in places] for a, i in places]
    )


def assert_rows_are_the_rule(sequences, half_window):
    rows = flash.mask_rows(Packing([np.asarray(slots) for slots in sequences]).spans, half_window)
    keys = np.arange(sum(map(len, sequences)))
    assert (rows.dtype, rows.shape) == (np.int32, (1, 1, len(keys), 2))
    np.testing.assert_array_equal(hidden_by(rows), rule(sequences, half_window))
    # The kernel knows the first number as a row of the lower left triangle, the second as one of the upper right.
    assert (rows[0, 0, :, 1] <= keys).all()
    assert (rows[0, 0, :, 0] > keys).all()


@every_mask
@pytest.mark.parametrize("half_window", [None, 0, 1, 4, 39, 1000])
def test_rows_hide_what_the_rule_hides(mask, half_window):
    mask = mask.astype(bool).copy()
    mask[~mask.any(axis=1), 0] = True
    assert_rows_are_the_rule([np.flatnonzero(row) for row in mask], half_window)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.sets(st.integers(0, 30), min_size=1, max_size=12).map(sorted), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from([None, 0, 1, 2, 5, 30]),
)
def test_rows_of_random_masks_hide_what_the_rule_hides(sequences, repeats, half_window):
    assert_rows_are_the_rule([slots for slots in sequences for _ in range(repeats)], half_window)


def test_rows_are_those_of_the_documented_sliding_window():
    """As flashmask_attention itself builds them from `window_size`, for one sequence."""
    rows = flash.mask_rows(Packing([np.arange(10)]).spans, 2)[0, 0]
    np.testing.assert_array_equal(rows[:, 0], np.clip(np.arange(3, 13), 0, 10))
    np.testing.assert_array_equal(rows[:, 1], np.clip(np.arange(-2, 8), 0, 10))


def states(mask, **changes):
    """Of eager and flash attention, after every layer."""
    model = build(**changes)
    arguments = {"attention_mask": paddle.to_tensor(mask.astype(np.int64)), "output_hidden_states": True}
    both = [forward(model, name, tokens(*mask.shape), **arguments).hidden_states for name in ("eager", "flash")]
    return [[state.numpy() for state in one] for one in both]


@every_mask
def test_padded_batches_give_eagers_values_after_every_layer(calls, mask):
    keep = mask.astype(bool)
    expected, found = states(mask)
    assert len(found) == 5
    for a, b in zip(found, expected, strict=True):
        assert_close(a[keep], b[keep], 5e-6)
        padding = ~keep[keep.any(axis=1)]
        assert (a[keep.any(axis=1)][padding] == 0).all()
    assert len(calls) == 4


@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_each_kind_of_layer_alone_gives_eagers_values(calls, kind):
    keep = MASKS["holes"]
    expected, found = states(keep, layer_types=[kind] * 4)
    assert_close(found[-1][keep], expected[-1][keep], 5e-6)


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("name", ["none", "left", "holes"])
def test_a_window_that_is_off_by_one_is_noticed(calls, monkeypatch, off, name):
    original = flash.mask_rows
    monkeypatch.setattr(
        modeling, "mask_rows", lambda spans, half: original(spans, None if half is None else half + off)
    )
    keep = MASKS[name].astype(bool)
    expected, found = states(keep)
    assert_close(found[1][keep], expected[1][keep], 5e-6)  # behind the first layer, which is full
    assert np.abs(found[2] - expected[2])[keep].max() > 1e-2


def packed_row():
    return tokens(1, sum(LENGTHS)), paddle.to_tensor(np.cumsum([0, *LENGTHS]), dtype="int32")


def test_packed_input_gives_eagers_values_after_every_layer(calls):
    model, (ids, boundaries) = build(), packed_row()
    arguments = {"cu_seqlens": boundaries, "output_hidden_states": True}
    expected, found = (forward(model, name, ids, **arguments).hidden_states for name in ("eager", "flash"))
    assert len(found) == 5
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 5e-6)


def gradients(model, attention, *args, **arguments):
    model.clear_gradients()
    forward(model, attention, *args, **arguments).loss.backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_training_are_eagers(calls, packed, recompute):
    model = build(ModernBertForMaskedLM)
    model.train()
    if packed:
        ids, boundaries = packed_row()
        arguments = {"labels": ids, "cu_seqlens": boundaries}
    else:
        ids, mask = tokens(3, 40), MASKS["holes"].astype(np.int64)
        arguments = {"labels": paddle.to_tensor(np.where(mask, ids.numpy(), -100))}
        arguments["attention_mask"] = paddle.to_tensor(mask)
    expected = gradients(model, "eager", ids, **arguments)
    if recompute:
        model.recompute_enable()
    found = gradients(model, "flash", ids, **arguments)
    assert len(calls) == (8 if recompute else 4)
    for name, values in expected.items():
        assert np.linalg.norm(found[name] - values) <= 2e-5 * np.linalg.norm(values), name


def test_pooled_logits_are_eagers(calls):
    model = build(ModernBertForSequenceClassification, num_labels=3, classifier_pooling="mean")
    mask = paddle.to_tensor(MASKS["right"].astype(np.int64))
    expected, found = (forward(model, name, tokens(3, 40), attention_mask=mask).logits for name in ("eager", "flash"))
    assert_close(found, expected, 1e-5)


def test_rotation_is_computed_in_float32_and_rounded_as_in_eager_attention(calls):
    qkv = paddle.randn([1, 11, 3 * 24]).astype("bfloat16")
    angles = paddle.randn([1, 11, 4])
    cos, sin = (
        table.astype("bfloat16") for table in (paddle.concat([x, x], axis=-1) for x in (angles.cos(), angles.sin()))
    )
    rows = paddle.to_tensor(flash.mask_rows(Packing([np.arange(11)]).spans, None))
    out = flash.flash_attention(qkv, rotation(cos, sin), rows, 3, 0.0, False)
    ((query, key, value, *_),) = calls
    q, k, v = qkv.reshape([1, 11, 3, 3, 8]).transpose([2, 0, 3, 1, 4]).unbind(0)  # each [1 heads total head_dim]
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    for found, expected in ((query, q), (key, k), (value, v)):
        assert found.dtype == paddle.bfloat16
        assert_close(found, expected.transpose([0, 2, 1, 3]), 0)
    assert (out.dtype, out.shape) == (paddle.bfloat16, [1, 11, 24])


def test_bf16_stays_within_rounding_of_eager(calls):
    model = build(initializer_range=0.02, hidden_size=64, num_attention_heads=4, local_attention=32)
    model.to(dtype="bfloat16")
    keep = MASKS["right"]
    mask = paddle.to_tensor(keep.astype(np.int64))
    expected, found = (
        forward(model, name, tokens(3, 40), attention_mask=mask).last_hidden_state for name in ("eager", "flash")
    )
    assert found.dtype == paddle.bfloat16
    found, expected = (x.astype("float32").numpy()[keep] for x in (found, expected))
    assert np.abs(found - expected).mean() <= 2e-4


def test_rows_are_built_once_for_each_kind_of_layer(calls, monkeypatch):
    built, original = [], flash.mask_rows
    monkeypatch.setattr(modeling, "mask_rows", lambda *args: built.append(args[1]) or original(*args))
    forward(build(), "flash", tokens(2, 9))
    assert sorted(built, key=str) == [4, None]
    assert len({id(arguments[3]) for arguments in calls}) == 2


def test_dropout_reaches_the_kernel_in_training_only(calls):
    model = build(attention_dropout=0.5, attn_implementation="flash")
    model(tokens(1, 9))
    model.train()
    model(tokens(1, 9))
    assert [named["dropout"] for *_, named in calls] == [0.0] * 4 + [0.5] * 4


@pytest.fixture
def never_attends(monkeypatch):
    """Whatever attention is computed instead is an error of its own kind."""

    def attend(*args, **named):
        raise AssertionError("attention was computed")

    monkeypatch.setattr(KERNEL, attend)
    for name in OTHERS:
        monkeypatch.setattr(f"modernbert_align.models.modernbert.attention.{name}", attend)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("training", [False, True])
def test_cpu_is_refused_in_one_sentence_and_nothing_takes_its_place(never_attends, dtype, training):
    model = build(attn_implementation="flash")
    model.to(dtype=dtype)
    model.train() if training else model.eval()
    for arguments in (
        {},
        {"attention_mask": paddle.ones([1, 9], "int64")},
        {"cu_seqlens": paddle.to_tensor([0, 4, 9])},
    ):
        with pytest.raises(ConfigError, match=f"`flash` needs .* CUDA device, not {dtype} .*cpu") as error:
            model(tokens(1, 9), **arguments)
        assert "\n" not in str(error.value)
        assert "`blockwise`" in error.value.hint


def test_a_paddle_built_for_cuda_is_not_enough(monkeypatch):
    monkeypatch.setattr("paddle.is_compiled_with_cuda", lambda: True)
    with pytest.raises(ConfigError, match="CUDA device"):
        flash.require_kernel(paddle.zeros([2], dtype="bfloat16"))


def test_a_gpu_that_is_not_cuda_is_not_enough(monkeypatch):
    class Elsewhere:
        place = type("Place", (), {"is_gpu_place": lambda self: True, "__str__": lambda self: "Place(gpu:0)"})()
        dtype = paddle.bfloat16

    with pytest.raises(ConfigError, match=r"CUDA device, not bfloat16 at Place\(gpu:0\)"):
        flash.require_kernel(Elsewhere())
    monkeypatch.setattr("paddle.is_compiled_with_cuda", lambda: True)
    flash.require_kernel(Elsewhere())


@pytest.mark.parametrize(("dtype", "refused"), [("float32", True), ("float64", True), ("float16", False)])
def test_only_half_precision_is_accepted_on_a_device(monkeypatch, dtype, refused):
    monkeypatch.setattr(flash, "on_cuda", lambda x: True)
    x = paddle.zeros([2], dtype=dtype)
    if not refused:
        flash.require_kernel(x)
        return
    with pytest.raises(ConfigError, match=f"float16 or bfloat16 .* not {dtype}"):
        flash.require_kernel(x)


def test_attentions_are_refused(never_attends):
    model = build(attn_implementation="flash")
    with pytest.raises(ConfigError, match="`flash` cannot return attentions"):
        model(tokens(1, 9), output_attentions=True)


def test_static_graph_is_refused(never_attends):
    spec = [paddle.static.InputSpec([None, None], "int64", "input_ids")]
    traced = paddle.jit.to_static(build(attn_implementation="flash"), input_spec=spec, full_graph=True)
    with pytest.raises(ConfigError, match=r"`flash` goes by the lengths .* static graph"):
        traced(tokens(2, 3))


def test_no_choice_is_never_flash(calls):
    model = build()
    for training in (False, True):
        model.train() if training else model.eval()
        model(tokens(1, 9))
        model(tokens(1, 9), cu_seqlens=paddle.to_tensor([0, 4, 9]))
    assert not calls


def test_name_is_accepted_when_loading_and_not_saved(tmp_path):
    with paddle_backend.quiet():
        build(attn_implementation="flash").save_pretrained(str(tmp_path), safe_serialization=True)
        loaded = ModernBertModel.from_pretrained(str(tmp_path), attn_implementation="flash")
        plain = ModernBertModel.from_pretrained(str(tmp_path))
    assert loaded.config.attn_implementation == "flash"
    assert plain.config.attn_implementation is None
    assert "flash" not in (tmp_path / "config.json").read_text(encoding="utf-8")
