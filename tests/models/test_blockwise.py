"""Blockwise attention against eager attention and against transformers, by value; packing; what is refused."""

import multiprocessing

import numpy as np
import paddle
import pytest
import torch
import transformers

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.model_config import SLIDING
from modernbert_align.core.table import load_table
from modernbert_align.errors import ConfigError
from modernbert_align.models.modernbert import blockwise
from modernbert_align.models.modernbert.attention import apply_rotary_pos_emb
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.heads import (
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)
from modernbert_align.models.modernbert.modeling import ModernBertForMaskedLM, ModernBertModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "pad_token_id": 5,
    "initializer_range": 0.2,
}


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


def mask_of(side, seq, *padded):
    mask = np.ones((len(padded), seq), dtype=np.int64)
    for row, count in enumerate(padded):
        mask[row, slice(0, count) if side == "left" else slice(seq - count, seq)] = 0
    return mask


def assert_close(found, expected, tolerance=2e-6):
    found, expected = (x.astype("float32").numpy() if isinstance(x, paddle.Tensor) else x for x in (found, expected))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of queries in full layers too, at lengths that tests can afford."""
    monkeypatch.setattr(blockwise, "SCORES", 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    transformers.ModernBertModel(transformers.ModernBertConfig(**SMALL)).save_pretrained(folder / "hf")
    request = Request(folder=folder / "hf", model="pair", revision=None, src="hf", dst="paddle")
    converted = convert(request, load_table(), folder / "paddle", force=False).out
    reference = hf.load(folder / "hf", "ModernBertModel", "fp32")
    return reference, paddle_backend.load(converted, "ModernBertModel", "fp32", "blockwise")


LENGTHS = [1, 2, 3, 31, 33, 127, 128, 129, 255, 257]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [1, 2, 8, 130, 1000])
def test_every_length_and_window_gives_eagers_values(length, window):
    model = build(local_attention=window)
    ids = tokens(2, length)
    expected = forward(model, "eager", ids, output_hidden_states=True).hidden_states
    found = forward(model, "blockwise", ids, output_hidden_states=True).hidden_states
    assert len(found) == 5
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_gives_the_references_values(pair, length):
    reference, candidate = pair
    ids = tokens(2, length)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids.numpy())).last_hidden_state.numpy()
    assert_close(forward(candidate, "blockwise", ids).last_hidden_state, expected, 5e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_references_values(pair, side):
    reference, candidate = pair
    ids, mask = tokens(4, 140), mask_of(side, 140, 0, 7, 139, 90)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids.numpy()), torch.from_numpy(mask)).last_hidden_state.numpy()
    found = forward(candidate, "blockwise", ids, attention_mask=paddle.to_tensor(mask)).last_hidden_state.numpy()
    keep = mask.astype(bool)
    assert_close(found[keep], expected[keep], 5e-6)


def test_mask_with_holes_gives_the_references_values(pair):
    reference, candidate = pair
    ids = tokens(2, 140)
    mask = (np.random.default_rng(0).random((2, 140)) < 0.6).astype(np.int64)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids.numpy()), torch.from_numpy(mask)).last_hidden_state.numpy()
    found = forward(candidate, "blockwise", ids, attention_mask=paddle.to_tensor(mask)).last_hidden_state.numpy()
    keep = mask.astype(bool)
    assert_close(found[keep], expected[keep], 5e-6)


def test_padded_positions_are_zero_in_every_output():
    model, mask = build(), paddle.to_tensor(mask_of("right", 20, 0, 6))
    states = forward(model, "blockwise", tokens(2, 20), attention_mask=mask, output_hidden_states=True).hidden_states
    for state in states:
        assert (state[1, 14:] == 0).all()
        assert (state[1, :14].abs().sum(-1) > 0).all()


def test_rows_of_padding_only_give_finite_values_and_leave_others_alone():
    model, ids = build(), tokens(3, 20)
    mask = paddle.to_tensor(mask_of("right", 20, 4, 20, 0))
    found = forward(model, "blockwise", ids, attention_mask=mask).last_hidden_state
    assert np.isfinite(found.numpy()).all()
    expected = forward(model, "blockwise", ids[::2], attention_mask=mask[::2]).last_hidden_state
    assert_close(found[::2], expected, 1e-6)


def test_a_sequence_gives_the_same_values_in_a_padded_batch_as_alone():
    model, lengths = build(), (40, 1, 23, 40)
    ids, mask = tokens(4, 40), mask_of("right", 40, *(40 - n for n in lengths))
    found = forward(model, "blockwise", ids, attention_mask=paddle.to_tensor(mask)).last_hidden_state
    for row, length in enumerate(lengths):
        alone = forward(model, "blockwise", ids[row : row + 1, :length]).last_hidden_state
        assert_close(found[row, :length], alone[0], 1e-6)


def test_changing_one_sequence_changes_no_other():
    model, ids = build(), tokens(3, 30)
    mask = paddle.to_tensor(mask_of("right", 30, 0, 10, 0))
    changed = ids.clone()
    changed[1] = tokens(1, 30)[0] + 0 * ids[1]
    changed[1, 3] = (int(ids[1, 3]) - 5) % 90 + 6
    before = forward(model, "blockwise", ids, attention_mask=mask).last_hidden_state.numpy()
    after = forward(model, "blockwise", changed, attention_mask=mask).last_hidden_state.numpy()
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.abs(before[1] - after[1]).max() > 1e-4


@pytest.mark.parametrize("rows", [1, 2])
def test_position_ids_are_used(rows):
    model, mask = build(), paddle.to_tensor(mask_of("left", 30, 0, 11))
    positions = paddle.to_tensor(np.stack([np.arange(30) * 3, np.arange(30) + 7])[:rows])
    arguments = {"attention_mask": mask, "position_ids": positions}
    expected = forward(model, "eager", tokens(2, 30), **arguments).last_hidden_state.numpy()
    found = forward(model, "blockwise", tokens(2, 30), **arguments).last_hidden_state.numpy()
    keep = mask.numpy().astype(bool)
    assert_close(found[keep], expected[keep])


def test_inputs_embeds_replace_the_lookup():
    model, mask = build(), paddle.to_tensor(mask_of("right", 30, 0, 11))
    embeds = model.get_input_embeddings()(tokens(2, 30))
    a = forward(model, "blockwise", tokens(2, 30), attention_mask=mask).last_hidden_state
    b = forward(model, "blockwise", inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("padded", [0, 9])
def test_gradients_are_eagers(padded):
    model = build(ModernBertForMaskedLM)
    ids, mask = tokens(2, 45), mask_of("right", 45, 0, padded)
    labels = paddle.to_tensor(np.where(mask == 1, ids.numpy(), -100))
    gradients = {}
    for attention in ("eager", "blockwise"):
        model.clear_gradients()
        forward(model, attention, ids, attention_mask=paddle.to_tensor(mask), labels=labels).loss.backward()
        gradients[attention] = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    for name, expected in gradients["eager"].items():
        difference = np.linalg.norm(gradients["blockwise"][name] - expected)
        assert difference <= 1e-5 * np.linalg.norm(expected), name


HEADS = {
    ModernBertForSequenceClassification: {"num_labels": 3, "classifier_pooling": "mean"},
    ModernBertForTokenClassification: {"num_labels": 3},
    ModernBertForQuestionAnswering: {"num_labels": 2},
    ModernBertForMaskedLM: {},
}


@pytest.mark.parametrize("cls", HEADS)
def test_every_head_gives_eagers_logits(cls):
    model = build(cls, **HEADS[cls])
    ids, mask = tokens(2, 30), mask_of("right", 30, 0, 11)
    expected, found = (
        forward(model, attention, ids, attention_mask=paddle.to_tensor(mask)) for attention in ("eager", "blockwise")
    )
    name = "start_logits" if cls is ModernBertForQuestionAnswering else "logits"
    keep = mask.astype(bool) if cls is not ModernBertForSequenceClassification else slice(None)
    assert_close(found[name].numpy()[keep], expected[name].numpy()[keep], 1e-5)


def test_loss_that_counts_padding_is_eagers_unless_blockwise_is_asked_for():
    model = build(ModernBertForQuestionAnswering, num_labels=2)
    ids, mask = tokens(2, 30), paddle.to_tensor(mask_of("right", 30, 0, 11))
    labels = {"start_positions": paddle.to_tensor([3, 4]), "end_positions": paddle.to_tensor([5, 18])}
    losses = {
        attention: float(forward(model, attention, ids, attention_mask=mask, **labels).loss)
        for attention in (None, "eager", "blockwise")
    }
    assert losses[None] == losses["eager"]
    assert abs(losses["blockwise"] - losses["eager"]) > 1e-4
    assert float(forward(model, None, ids, attention_mask=mask).start_logits[1, -1]) == float(
        forward(model, "blockwise", ids, attention_mask=mask).start_logits[1, -1]
    )


def test_multiple_choice_gives_eagers_logits():
    model = build(ModernBertForMultipleChoice)
    ids = tokens(2, 3, 12)
    mask = mask_of("left", 12, 0, 3, 5, 0, 0, 8).reshape(2, 3, 12)
    expected, found = (
        forward(model, attention, ids, attention_mask=paddle.to_tensor(mask)).logits
        for attention in ("eager", "blockwise")
    )
    assert_close(found, expected, 1e-5)


def test_rotation_gives_the_eager_rotations_bits():
    x = paddle.randn([3, 11, 8])
    angles = paddle.randn([1, 11, 4])
    angles = paddle.concat([angles, angles], axis=-1)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x.unsqueeze(0), x.unsqueeze(0), cos, sin)
    np.testing.assert_array_equal(blockwise.rotate(x, *blockwise.rotation(cos, sin)).numpy(), expected[0].numpy())


@pytest.mark.parametrize("padded", [0, 50])
def test_bf16_rounds_where_eager_rounds(padded):
    model = build(initializer_range=0.02, hidden_size=64, num_attention_heads=4, local_attention=32)
    model.to(dtype="bfloat16")
    ids, mask = tokens(2, 200), mask_of("right", 200, 0, padded)
    expected, found = (
        forward(model, attention, ids, attention_mask=paddle.to_tensor(mask)).last_hidden_state
        for attention in ("eager", "blockwise")
    )
    assert found.dtype == paddle.bfloat16
    keep = mask.astype(bool)
    found, expected = (x.astype("float32").numpy()[keep] for x in (found, expected))
    assert np.abs(found - expected).mean() <= 1e-4
    assert (found == expected).mean() > 0.95


def test_default_is_blockwise_in_evaluation_and_eager_in_training_or_for_attentions(monkeypatch):
    model = build(attention_dropout=0.0)
    used = []
    original = blockwise.blockwise_attention
    monkeypatch.setattr(
        "modernbert_align.models.modernbert.attention.blockwise_attention",
        lambda *args: used.append(1) or original(*args),
    )
    assert model.config.attn_implementation is None
    model(tokens(1, 9))
    assert len(used) == 4
    attentions = model(tokens(1, 9), output_attentions=True, return_dict=True).attentions
    model.train()
    model(tokens(1, 9))
    assert len(used) == 4
    assert attentions[0].shape == [1, 3, 9, 9]
    model.config.attn_implementation = "blockwise"
    model(tokens(1, 9))
    assert len(used) == 8


def test_dropout_acts_in_blockwise_training():
    model = build(attention_dropout=0.5, attn_implementation="blockwise")
    model.train()
    assert np.abs(model(tokens(1, 9))[0].numpy() - model(tokens(1, 9))[0].numpy()).max() > 0


def test_attentions_of_blockwise_are_refused():
    model = build(attn_implementation="blockwise")
    with pytest.raises(ConfigError, match="cannot return attentions"):
        model(tokens(1, 9), output_attentions=True)


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "", "Eager"])
def test_unknown_implementation_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"`{name}`"):
        ModernBertConfig(**SMALL, attn_implementation=name)
    with pytest.raises(ConfigError, match=f"`{name}`"):
        ModernBertConfig(**SMALL).attn_implementation = name


def test_implementation_is_chosen_when_loading_and_not_saved(tmp_path):
    with paddle_backend.quiet():
        build(attn_implementation="blockwise").save_pretrained(str(tmp_path), safe_serialization=True)
        loaded = ModernBertModel.from_pretrained(str(tmp_path), attn_implementation="eager")
        plain = ModernBertModel.from_pretrained(str(tmp_path))
        with pytest.raises(ConfigError, match="`nonsense`"):
            ModernBertModel.from_pretrained(str(tmp_path), attn_implementation="nonsense")
    assert loaded.config.attn_implementation == "eager"
    assert plain.config.attn_implementation is None
    assert "blockwise" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def _peak_of_long_forward(queue):
    """Bytes above the model at 8192 tokens, in a process of its own: a peak never goes down again."""
    import resource

    model = build(hidden_size=64, num_attention_heads=4, local_attention=32, intermediate_size=96)
    with paddle.no_grad():
        forward(model, "blockwise", tokens(1, 64))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = forward(model, "blockwise", tokens(1, 8192)).last_hidden_state
    queue.put(
        ((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, bool(paddle.isfinite(found).all()))
    )


def test_8192_tokens_need_no_memory_for_all_pairs():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_of_long_forward, args=(queue,))
    process.start()
    peak, finite = queue.get(timeout=120)
    process.join()
    assert finite
    all_pairs = 4 * 8192 * 8192 * 4  # of one layer: heads, queries, keys, bytes
    assert peak < all_pairs / 8


def test_8192_tokens_give_eagers_values_in_sliding_layers():
    model = build(layer_types=[SLIDING] * 2, num_hidden_layers=2, num_attention_heads=1, hidden_size=8)
    ids = tokens(1, 8192)
    with paddle.no_grad():
        found = forward(model, "blockwise", ids).last_hidden_state
        for start in (0, 4000, 8192 - 300):  # what is far from the ends of a piece does not know that it is one
            piece = slice(start, start + 300)
            positions = paddle.arange(start, start + 300).unsqueeze(0)
            expected = forward(model, "eager", ids[:, piece], position_ids=positions).last_hidden_state
            inner = slice(0 if start == 0 else 8, 300 if start == 8192 - 300 else 292)
            assert_close(found[:, piece][:, inner], expected[:, inner])


def test_static_graph_is_eager_and_refuses_blockwise():
    spec = [paddle.static.InputSpec([None, None], "int64", "input_ids")]
    traced = paddle.jit.to_static(build(), input_spec=spec, full_graph=True)
    for length in (3, 140):
        expected = forward(build(), "eager", tokens(2, length)).last_hidden_state
        np.testing.assert_array_equal(traced(tokens(2, length))[0].numpy(), expected.numpy())
    refused = paddle.jit.to_static(build(attn_implementation="blockwise"), input_spec=spec, full_graph=True)
    with pytest.raises(ConfigError, match="static graph"):
        refused(tokens(2, 3))
