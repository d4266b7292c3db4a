"""Packed input gives the numbers of one sequence at a time, in both attentions and every head; what is refused."""

import multiprocessing

import numpy as np
import paddle
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.table import load_table
from modernbert_align.errors import UsageError
from modernbert_align.models import modernbert
from modernbert_align.models.modernbert import ModernBertConfig, Packer, blockwise

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
LENGTHS = (1, 3, 40, 9, 9, 1, 33, 2)  # local_attention 8: two of them are longer than the window is wide
HEADS = {
    "Model": {},
    "ForMaskedLM": {},
    "ForMaskedLM sparse": {"sparse_prediction": True},
    "ForTokenClassification": {"num_labels": 3},
    "ForQuestionAnswering": {"num_labels": 2},
    "ForSequenceClassification cls": {"num_labels": 3, "classifier_pooling": "cls"},
    "ForSequenceClassification mean": {"num_labels": 3, "classifier_pooling": "mean"},
    "ForMultipleChoice cls": {"classifier_pooling": "cls"},
    "ForMultipleChoice mean": {"classifier_pooling": "mean"},
}
every_head = pytest.mark.parametrize("head", HEADS)
both_attentions = pytest.mark.parametrize("attention", ["eager", "blockwise"])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of queries in full layers too, at lengths that tests can afford."""
    monkeypatch.setattr(blockwise, "SCORES", 1)


def build(head="Model", **changes):
    paddle.seed(0)
    cls = getattr(modernbert, f"ModernBert{head.split()[0]}")
    model = cls(ModernBertConfig(**{**SMALL, **HEADS[head], **changes}))
    model.eval()
    return model


def ids_of(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(6, 97, length) for length in lengths]


def packed(sequences):
    return {
        "input_ids": paddle.to_tensor(np.concatenate(sequences)[None]),
        "cu_seqlens": paddle.to_tensor(np.cumsum([0, *map(len, sequences)]), dtype="int32"),
    }


def padded(sequences):
    longest = max(map(len, sequences))
    rows = [np.pad(ids, (0, longest - len(ids)), constant_values=5) for ids in sequences]
    mask = [np.arange(longest) < len(ids) for ids in sequences]
    return {
        "input_ids": paddle.to_tensor(np.stack(rows)),
        "attention_mask": paddle.to_tensor(np.stack(mask).astype(np.int64)),
    }


def with_choices(head, batch):
    """For multiple choice: two choices a question, as an argument or as an axis."""
    if "MultipleChoice" not in head:
        return batch
    if "cu_seqlens" in batch:
        return {**batch, "num_choices": 2}
    rows, longest = batch["input_ids"].shape
    return {name: values.reshape([-1, 2 if rows > 1 else 1, longest]) for name, values in batch.items()}


def numbers(outputs):
    """What a head predicts, in float32, one row per token or per sequence."""
    for name in ("last_hidden_state", "logits"):
        if name in outputs:
            values = outputs[name].astype("float32")
            return values.flatten(0, 1) if len(values.shape) == 3 else values
    both = [outputs[name].astype("float32") for name in ("start_logits", "end_logits")]
    return paddle.stack(both, axis=-1).flatten(0, 1)


def alone(model, head, sequences):
    """The same, one sequence at a time."""
    batches = ({"input_ids": paddle.to_tensor(ids[None])} for ids in sequences)
    found = [numbers(model(**with_choices(head, batch), return_dict=True)) for batch in batches]
    joined = paddle.concat(found)
    return joined.reshape([-1, 2]) if "MultipleChoice" in head else joined


def gradients(model, loss):
    model.clear_gradients()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.astype("float32").numpy().copy() for name, gradient in found.items()}


def assert_same_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # a gradient that cancels to nearly nothing, or to zero, is measured against the others
        size = max(np.linalg.norm(values), 1e-2 * max(map(np.linalg.norm, expected.values())))
        assert np.linalg.norm(found[name] - values) <= tolerance * size, name


def assert_close(found, expected, tolerance):
    found, expected = (x.astype("float32").numpy() if isinstance(x, paddle.Tensor) else x for x in (found, expected))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@both_attentions
@every_head
def test_packed_sequences_give_the_numbers_and_gradients_of_each_alone(head, attention):
    model, sequences = build(head, attn_implementation=attention), ids_of()
    found = numbers(model(**with_choices(head, packed(sequences)), return_dict=True))
    expected = alone(model, head, sequences)
    assert_close(found, expected, 2e-6)
    weights = paddle.randn(expected.shape)
    assert_same_gradients(gradients(model, (found * weights).sum()), gradients(model, (expected * weights).sum()), 1e-5)


@both_attentions
@every_head
def test_bf16_rounds_packed_sequences_as_it_rounds_each_alone(head, attention):
    sizes = {"initializer_range": 0.02, "hidden_size": 64, "num_attention_heads": 4, "local_attention": 32}
    model, sequences = build(head, attn_implementation=attention, **sizes), ids_of((1, 5, 80, 17, 60, 2))
    model.to(dtype="bfloat16")
    found = numbers(model(**with_choices(head, packed(sequences)), return_dict=True))
    expected = alone(model, head, sequences)
    weights = paddle.randn(expected.shape)
    of_found, of_expected = (gradients(model, (values * weights).sum()) for values in (found, expected))
    a, b = (values.numpy() for values in (found, expected))
    assert np.abs(a - b).mean() <= 1e-4
    assert (a == b).mean() > 0.95
    assert_same_gradients(of_found, of_expected, 1e-2)  # sums over sequences are rounded at other places


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    transformers.ModernBertModel(transformers.ModernBertConfig(**SMALL)).save_pretrained(folder / "hf")
    request = Request(folder=folder / "hf", model="pair", revision=None, src="hf", dst="paddle")
    converted = convert(request, load_table(), folder / "paddle", force=False).out
    return hf.load(folder / "hf", "ModernBertModel", "fp32"), paddle_backend.load(converted, "ModernBertModel", "fp32")


@both_attentions
def test_packed_sequences_give_the_references_values_of_each_alone(pair, attention):
    reference, candidate = pair
    candidate.config.attn_implementation = attention
    sequences = ids_of((*LENGTHS, 200))
    with torch.no_grad():
        expected = [reference(torch.from_numpy(ids[None])).last_hidden_state[0].numpy() for ids in sequences]
    found = candidate(**packed(sequences), return_dict=True).last_hidden_state
    assert_close(found[0], np.concatenate(expected), 5e-6)


@st.composite
def rows(draw):
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 7, 8, 9, 17, 30]), min_size=1, max_size=6))
    changes = {
        "attn_implementation": draw(st.sampled_from(["eager", "blockwise"])),
        "local_attention": draw(st.sampled_from([2, 8, 100])),
        "global_attn_every_n_layers": draw(st.integers(1, 3)),
    }
    head = draw(st.sampled_from([name for name in HEADS if "Choice" not in name]))
    return head, changes, lengths, draw(st.integers(0, 1000))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows())
def test_random_rows_give_the_numbers_of_each_sequence_alone(drawn):
    head, changes, lengths, seed = drawn
    model, sequences = build(head, num_hidden_layers=3, **changes), ids_of(lengths, seed)
    with paddle.no_grad():
        found = numbers(model(**packed(sequences), return_dict=True))
        assert_close(found, alone(model, head, sequences), 2e-6)


@both_attentions
@every_head
def test_changing_every_token_of_one_sequence_changes_no_bit_of_another(head, attention):
    model, sequences = build(head, attn_implementation=attention), ids_of()
    changed = list(sequences)
    changed[2] = (sequences[2] - 6 + 40) % 91 + 6
    assert (changed[2] != sequences[2]).all()
    before, after = (
        numbers(model(**with_choices(head, packed(row)), return_dict=True)).numpy() for row in (sequences, changed)
    )
    of_sequence = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    if "Sequence" in head:
        of_sequence = np.arange(len(LENGTHS))
    if "Choice" in head:  # a row of numbers per question, a number per choice
        before, after, of_sequence = before.reshape(-1, 1), after.reshape(-1, 1), np.arange(len(LENGTHS))
    np.testing.assert_array_equal(before[of_sequence != 2], after[of_sequence != 2])
    assert (before[of_sequence == 2] != after[of_sequence == 2]).any(axis=-1).all()


@both_attentions
def test_no_gradient_flows_from_one_sequence_to_another(attention):
    model, sequences = build(attn_implementation=attention), ids_of()
    embeds = paddle.randn([1, sum(LENGTHS), 24])
    embeds.stop_gradient = False
    start, stop = LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3])
    states = model(inputs_embeds=embeds, cu_seqlens=packed(sequences)["cu_seqlens"], return_dict=True).last_hidden_state
    (states[:, start:stop] ** 3).sum().backward()
    reached = (embeds.grad[0].numpy() != 0).any(axis=-1)  # Paddle's own != takes 1e-9 for 0
    assert reached[start:stop].all()
    assert reached.sum() == LENGTHS[2]


def test_attentions_are_zero_across_sequences_and_sum_to_one_within():
    model, sequences = build(), ids_of()
    of_sequence = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    same = of_sequence[:, None] == of_sequence
    attentions = model(**packed(sequences), output_attentions=True, return_dict=True).attentions
    assert len(attentions) == 4
    for layer in attentions:
        assert layer.shape == [1, 3, len(of_sequence), len(of_sequence)]
        assert not layer.numpy()[0][:, ~same].any()
        np.testing.assert_allclose(layer.numpy()[0].sum(-1), 1, atol=1e-5)


@both_attentions
@every_head
def test_position_ids_that_restart_mean_the_same_as_cu_seqlens(head, attention):
    model, row = build(head, attn_implementation=attention), packed(ids_of())
    positions = paddle.to_tensor(np.concatenate([np.arange(length) for length in LENGTHS])[None])
    told = {"input_ids": row["input_ids"], "position_ids": positions}
    if "Choice" in head:
        row, told = {**row, "num_choices": 2}, {**told, "num_choices": 2}
    ones = {"attention_mask": paddle.ones_like(positions)}
    expected = numbers(model(**row, return_dict=True)).numpy()
    for arguments in (told, {**told, **ones}, {**row, **ones}, {**row, "position_ids": positions}):
        np.testing.assert_array_equal(numbers(model(**arguments, return_dict=True)).numpy(), expected)


@both_attentions
def test_one_sequence_may_come_packed(attention):
    model, sequences = build(attn_implementation=attention), ids_of((30,))
    expected = model(packed(sequences)["input_ids"])[0].numpy()
    np.testing.assert_array_equal(model(**packed(sequences))[0].numpy(), expected)


def test_cu_seqlens_may_be_a_tensor_or_an_array_of_any_integers():
    model, row = build(), packed(ids_of())
    expected = model(**row)[0].numpy()
    boundaries = row["cu_seqlens"].numpy()
    for given_as in (boundaries, boundaries.astype(np.int64), paddle.to_tensor(boundaries.astype(np.int64))):
        np.testing.assert_array_equal(model(row["input_ids"], cu_seqlens=given_as)[0].numpy(), expected)


TOKEN_LABELS = {"ForMaskedLM": 97, "ForMaskedLM sparse": 97, "ForTokenClassification": 3}


@both_attentions
@pytest.mark.parametrize("head", TOKEN_LABELS)
def test_losses_over_tokens_equal_those_of_the_padded_batch(head, attention):
    model, sequences = build(head, attn_implementation=attention), ids_of()
    rng = np.random.default_rng(1)
    labels = [np.where(rng.random(n) < 0.5, rng.integers(0, TOKEN_LABELS[head], n), -100) for n in LENGTHS]
    rows = [np.pad(row, (0, max(LENGTHS) - len(row)), constant_values=-100) for row in labels]
    assert_same_losses(
        model,
        {**packed(sequences), "labels": paddle.to_tensor(np.concatenate(labels)[None])},
        {**padded(sequences), "labels": paddle.to_tensor(np.stack(rows))},
    )


@both_attentions
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_losses_over_sequences_equal_those_of_the_padded_batch(problem, pooling, attention):
    head = f"ForSequenceClassification {pooling}"
    model, sequences = build(head, attn_implementation=attention, problem_type=problem), ids_of()
    single = problem == "single_label_classification"
    labels = paddle.randint(0, 3, [len(LENGTHS)]) if single else paddle.rand([len(LENGTHS), 3])
    assert_same_losses(model, {**packed(sequences), "labels": labels}, {**padded(sequences), "labels": labels})


@both_attentions
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_losses_over_choices_equal_those_of_the_padded_batch(pooling, attention):
    head, labels = f"ForMultipleChoice {pooling}", paddle.to_tensor([1, 0, 0, 1])
    model, sequences = build(head, attn_implementation=attention), ids_of()
    row, batch = (with_choices(head, given) for given in (packed(sequences), padded(sequences)))
    assert_same_losses(model, {**row, "labels": labels}, {**batch, "labels": labels})


def assert_same_losses(model, row, batch):
    found, expected = (model(**given, return_dict=True).loss for given in (row, batch))
    assert float(found) == pytest.approx(float(expected), rel=2e-6)
    assert_same_gradients(gradients(model, found), gradients(model, expected), 1e-5)


@both_attentions
def test_span_losses_equal_those_of_a_batch_without_padding(attention):
    model, sequences = build("ForQuestionAnswering", attn_implementation=attention), ids_of((12,) * 4)
    spans = {"start_positions": paddle.to_tensor([0, 4, 11, 30]), "end_positions": paddle.to_tensor([12, 7, 11, 2])}
    assert_same_losses(model, {**packed(sequences), **spans}, {"input_ids": paddle.to_tensor(sequences), **spans})


@both_attentions
def test_span_losses_are_those_of_each_sequence_alone(attention):
    model, sequences = build("ForQuestionAnswering", attn_implementation=attention), ids_of((5, 40, 1, 9))
    starts, ends = [4, 17, 0, 9], [5, 39, 0, 3]  # the last start and the first end are beyond their sequences
    spans = {"start_positions": paddle.to_tensor(starts), "end_positions": paddle.to_tensor(ends)}
    found = model(**packed(sequences), **spans, return_dict=True).loss
    losses = {"start": [], "end": []}
    for ids, *span in zip(sequences, starts, ends, strict=True):
        outputs = model(paddle.to_tensor(ids[None]), return_dict=True)
        for (name, kept), place in zip(losses.items(), span, strict=True):
            if place < len(ids):
                kept.append(-paddle.nn.functional.log_softmax(outputs[f"{name}_logits"][0], axis=-1)[place])
    expected = sum(sum(kept) / len(kept) for kept in losses.values()) / 2
    assert float(found) == pytest.approx(float(expected), rel=2e-6)
    assert_same_gradients(gradients(model, found), gradients(model, expected), 1e-5)


def test_span_loss_of_packed_input_goes_block_by_block_with_a_mask_that_hides_nothing(monkeypatch):
    model, row = build("ForQuestionAnswering"), packed(ids_of((5, 9)))
    used = attentions_used(model, monkeypatch)
    spans = {"start_positions": paddle.to_tensor([0, 4]), "end_positions": paddle.to_tensor([1, 7])}
    positions = paddle.to_tensor([[*range(5), *range(9)]])
    for told in ({"cu_seqlens": row["cu_seqlens"]}, {"position_ids": positions}):
        model(row["input_ids"], attention_mask=paddle.ones_like(positions), **told, **spans)
    assert used == ["blockwise_attention"] * 8


def test_bf16_span_loss_is_rounded_as_that_of_a_batch_without_padding():
    model, sequences = build("ForQuestionAnswering"), ids_of((12,) * 4)
    model.to(dtype="bfloat16")
    spans = {"start_positions": paddle.to_tensor([0, 4, 11, 30]), "end_positions": paddle.to_tensor([12, 7, 11, 2])}
    found, expected = (
        model(**given, **spans, return_dict=True).loss
        for given in (packed(sequences), {"input_ids": paddle.to_tensor(sequences)})
    )
    assert found.dtype == paddle.bfloat16
    assert float(found) == float(expected)


def test_rows_of_the_packer_give_the_losses_of_their_sequences():
    model = build("ForMaskedLM")
    sequences = [{"input_ids": ids, "labels": np.where(ids % 3, -100, ids)} for ids in ids_of((30, 25, 9, 9, 40, 3))]
    losses = counts = 0.0
    for row in Packer(sequences, 50):
        count = int((row["labels"] != -100).sum())
        losses += count * float(model(**{name: paddle.to_tensor(x) for name, x in row.items()}, return_dict=True).loss)
        counts += count
    given = [x["input_ids"] for x in sequences]
    labels = [np.pad(x["labels"], (0, 40 - len(x["labels"])), constant_values=-100) for x in sequences]
    expected = float(model(**padded(given), labels=paddle.to_tensor(np.stack(labels)), return_dict=True).loss)
    assert losses / counts == pytest.approx(expected, rel=1e-5)


def attentions_used(model, monkeypatch):
    used = []
    for name in ("blockwise_attention", "eager_attention"):
        original = getattr(modernbert.attention, name)
        monkeypatch.setattr(
            modernbert.attention, name, lambda *args, name=name, original=original: used.append(name) or original(*args)
        )
    return used


def test_training_on_packed_input_goes_block_by_block_unless_told_otherwise(monkeypatch):
    model, row = build(), packed(ids_of())
    used = attentions_used(model, monkeypatch)
    model.train()
    for attention, expected in ((None, "blockwise_attention"), ("eager", "eager_attention")):
        model.config.attn_implementation = attention
        model(**row)
        assert used == [expected] * 4
        used.clear()
    model.config.attn_implementation = None
    model(row["input_ids"])
    assert used == ["eager_attention"] * 4
    used.clear()
    model(**row, output_attentions=True)
    assert used == ["eager_attention"] * 4


@both_attentions
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recompute_changes_no_bit_of_packed_training(attention, dropout):
    rates = dict.fromkeys(("attention_dropout", "mlp_dropout", "embedding_dropout"), dropout)
    model, sequences = build("ForMaskedLM", attn_implementation=attention, **rates), ids_of()
    model.train()
    row = packed(sequences)
    found = []
    for recompute in (False, True):
        paddle.seed(1)
        if recompute:
            model.recompute_enable()
        loss = model(**row, labels=row["input_ids"], return_dict=True).loss
        found.append((float(loss), gradients(model, loss)))
    assert found[0][0] == found[1][0]
    for name, expected in found[0][1].items():
        np.testing.assert_array_equal(found[1][1][name], expected)


def test_a_few_steps_on_packed_rows_lower_the_loss():
    model = build("ForMaskedLM", initializer_range=0.02)
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    row = packed(ids_of())
    losses = []
    for _ in range(12):
        loss = model(**row, labels=row["input_ids"], return_dict=True).loss
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def _peak_of_training_step(queue):
    """Bytes above the model for a row of 8192 tokens, in a process of its own: a peak never goes down again."""
    import resource

    model = build("ForMaskedLM", hidden_size=64, num_attention_heads=4, local_attention=32)
    model.train()
    peaks = []
    for row in (packed(ids_of((64,))), packed(ids_of((512,) * 16))):
        model(**row, labels=row["input_ids"], return_dict=True).loss.backward()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    finite = all(bool(paddle.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    queue.put((peaks[1] - peaks[0], finite))


def test_training_on_a_row_of_8192_tokens_needs_no_memory_for_all_pairs():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_of_training_step, args=(queue,))
    process.start()
    peak, finite = queue.get(timeout=180)
    process.join()
    assert finite
    assert peak < 4 * 8192 * 8192 * 4  # of one layer and one of its steps: heads, queries, keys, bytes


IDS = np.arange(6, 15)[None]


def tensors(**arrays):
    return {name: paddle.to_tensor(np.asarray(values)) for name, values in arrays.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cu_seqlens": [1, 4, 9]}, "starts at 1"),
        ({"cu_seqlens": [0, 4, 8]}, "ends at 8"),
        ({"cu_seqlens": [0, 4, 10]}, "row's 9 tokens, but it ends at 10"),
        ({"cu_seqlens": [0, 6, 4, 9]}, "4 follows 6"),
        ({"cu_seqlens": [0, 4, 4, 9]}, "4 follows 4"),
        ({"cu_seqlens": [0]}, r"shape \[1\]"),
        ({"cu_seqlens": [[0, 4, 9]]}, r"shape \[1, 3\]"),
        ({"cu_seqlens": [0.0, 9.0]}, "dtype float"),
        ({"cu_seqlens": [0, 4, 9], "attention_mask": [[1] * 7 + [0] * 2]}, "hides 2 of 9 tokens"),
        ({"cu_seqlens": [0, 4, 9], "position_ids": [[*range(9)]]}, "0 at tokens 0, but cu_seqlens starts .* 0, 4"),
        ({"cu_seqlens": [0, 4, 9], "position_ids": [[*range(5), *range(4)]]}, "0 at tokens 0, 5"),
        ({"cu_seqlens": [0, 9], "position_ids": [[*range(1, 10)]]}, "0 at tokens , but"),
        ({"position_ids": [[*range(4), *range(5)]], "attention_mask": [[1] * 8 + [0]]}, "has no padding"),
        ({"position_ids": [[*range(2, 6), *range(2, 7)]]}, "from 5 to 2 at token 4 of row 0"),
        ({"position_ids": [[0, 1, 2]]}, r"\[1, 3\], the input has \[1, 9\]"),
    ],
)
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification mean", "ForMultipleChoice cls"])
def test_malformed_or_contradicting_input_is_refused(head, arguments, words):
    with pytest.raises(UsageError, match=words) as refused:
        build(head)(paddle.to_tensor(IDS), **tensors(**arguments))
    assert refused.value.hint or "shape" in refused.value.message


@pytest.mark.parametrize("head", ["Model", "ForQuestionAnswering", "ForSequenceClassification cls"])
def test_packed_input_of_several_rows_is_refused(head):
    ids = paddle.to_tensor(np.concatenate([IDS, IDS]))
    for arguments in ({"cu_seqlens": [0, 9]}, {"position_ids": [[*range(4), *range(5)], [*range(9)]]}):
        with pytest.raises(UsageError, match=r"one row.* but there are 2 rows") as refused:
            build(head)(ids, **tensors(**arguments))
        assert "one row" in refused.value.hint


def test_positions_that_count_from_the_first_real_token_are_not_packed_input():
    ids, mask = paddle.to_tensor(IDS), [[0, 0, 0, 1, 1, 1, 1, 1, 1]]
    positions = [[0, 0, 0, *range(6)]]
    found = build()(ids, **tensors(attention_mask=mask, position_ids=positions))[0]
    assert_close(found[:, 3:], build()(ids[:, 3:])[0], 2e-6)


@pytest.mark.parametrize(
    ("head", "targets"),
    [
        ("ForSequenceClassification cls", {"labels": [1]}),
        ("ForSequenceClassification mean", {"labels": [0, 1, 0]}),
        ("ForQuestionAnswering", {"start_positions": [1], "end_positions": [1, 2]}),
        ("ForQuestionAnswering", {"start_positions": [1, 2], "end_positions": [1, 2, 3]}),
    ],
)
def test_labels_of_another_number_of_sequences_are_refused(head, targets):
    with pytest.raises(UsageError, match="the packed row has 2 sequences"):
        build(head)(paddle.to_tensor(IDS), **tensors(cu_seqlens=[0, 4, 9], **targets))


@pytest.mark.parametrize(
    ("shape", "arguments", "words"),
    [
        ((1, 9), {"cu_seqlens": [0, 4, 9]}, "num_choices is None, but the packed row has 2"),
        ((1, 9), {"cu_seqlens": [0, 4, 9], "num_choices": 0}, "num_choices is 0"),
        ((1, 9), {"cu_seqlens": [0, 4, 6, 9], "num_choices": 2}, "num_choices is 2, but the packed row has 3"),
        ((1, 9), {}, "padded choices cannot have the shape"),
        ((1, 1, 9), {"cu_seqlens": [0, 4, 9], "num_choices": 2}, "packed choices cannot have the shape"),
        ((1, 3, 3), {"num_choices": 2}, "num_choices is 2, but the input has 3 choices"),
    ],
)
def test_choices_of_another_shape_are_refused(shape, arguments, words):
    given = {name: np.asarray(x) if name == "cu_seqlens" else x for name, x in arguments.items()}
    with pytest.raises(UsageError, match=words):
        build("ForMultipleChoice cls")(paddle.to_tensor(IDS.reshape(shape)), **given)


def test_static_graph_refuses_packed_input():
    spec = [paddle.static.InputSpec([1, None], "int64", "input_ids")]

    class Packed(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.model = build()

        def forward(self, input_ids):
            return self.model(input_ids, cu_seqlens=np.array([0, 4, 9]))

    with pytest.raises(UsageError, match="static graph"):
        paddle.jit.to_static(Packed(), input_spec=spec, full_graph=True)(paddle.to_tensor(IDS))
