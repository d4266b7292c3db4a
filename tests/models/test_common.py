"""What PaddleNLP expects of every model, for every head: signature, outputs, saving, vocabulary, recompute, export.

Source: which properties PaddleNLP checks is after its tests/transformers/test_modeling_common.py.
"""

import inspect

import numpy as np
import paddle
import pytest
import transformers
from paddle.static import InputSpec

from modernbert_align.backends.paddle import quiet
from modernbert_align.models import modernbert
from modernbert_align.models.modernbert.configuration import ModernBertConfig

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
HEADS = ("Model", *(n.removeprefix("ModernBert") for n in modernbert.__all__ if n.startswith("ModernBertFor")))
LABELS = {
    "ForMaskedLM": {"labels": (0, 97, (2, 13))},
    "ForMultipleChoice": {"labels": (0, 3, (2,))},
    "ForQuestionAnswering": {"start_positions": (0, 9, (2,)), "end_positions": (0, 9, (2,))},
    "ForSequenceClassification": {"labels": (0, 2, (2,))},
    "ForTokenClassification": {"labels": (0, 2, (2, 13))},
}
every_head = pytest.mark.parametrize("head", HEADS)


def build(head, **changes):
    paddle.seed(0)
    model = getattr(modernbert, f"ModernBert{head}")(ModernBertConfig(**{**SMALL, "num_labels": 2, **changes}))
    model.eval()
    return model


def arrays(head, rows=2, length=13):
    """Ids and mask of a batch with padding in its last row, for a head."""
    shape = (rows, 3, length) if head == "ForMultipleChoice" else (rows, length)
    ids = np.random.default_rng(0).integers(6, 97, shape)
    mask = np.ones_like(ids)
    mask[-1, ..., length - 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def batch(head, **sizes):
    return {name: paddle.to_tensor(values) for name, values in arrays(head, **sizes).items()}


def labels(head):
    drawn = np.random.default_rng(1)
    return {name: paddle.to_tensor(drawn.integers(*bounds)) for name, bounds in LABELS[head].items()}


def values(output):
    """All tensors of an output, as arrays."""
    return [tensor.astype("float32").numpy() for tensor in (output if isinstance(output, (tuple, list)) else [output])]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@every_head
def test_first_arguments_are_the_tokenizers_outputs(head):
    names = list(inspect.signature(getattr(modernbert, f"ModernBert{head}").forward).parameters)
    assert names[:3] == ["self", "input_ids", "attention_mask"]


@every_head
def test_same_inputs_give_the_same_outputs_in_evaluation_mode(head):
    model = build(head, embedding_dropout=0.5, mlp_dropout=0.5, attention_dropout=0.5, classifier_dropout=0.5)
    assert_equal(values(model(**batch(head))), values(model(**batch(head))))


@every_head
@pytest.mark.parametrize("safe", [True, False])
def test_saved_model_gives_the_same_outputs(head, safe, tmp_path):
    model = build(head)
    with quiet():
        model.save_pretrained(str(tmp_path), safe_serialization=safe)
        loaded = type(model).from_pretrained(str(tmp_path))
    loaded.eval()
    assert_equal(values(model(**batch(head))), values(loaded(**batch(head))))


@every_head
def test_hidden_states_and_attentions_are_as_many_and_as_large_as_the_references(head):
    import torch

    config = transformers.ModernBertConfig(**SMALL, num_labels=2)
    reference = getattr(transformers, f"ModernBert{head}")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = reference(
            **{name: torch.from_numpy(array) for name, array in arrays(head).items()},
            output_hidden_states=True,
            output_attentions=True,
        )
    ours = build(head)(**batch(head), output_hidden_states=True, output_attentions=True, return_dict=True)
    for name in ("hidden_states", "attentions"):
        assert [list(x.shape) for x in ours[name]] == [list(x.shape) for x in theirs[name]], name
    assert list(ours.keys()) == list(theirs.keys())


@every_head
def test_embeddings_can_take_the_place_of_ids(head):
    model = build(head)
    given = batch(head)
    ids = given.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    assert_equal(values(model(ids, **given)), values(model(inputs_embeds=embeds, **given)))


@every_head
@pytest.mark.parametrize("size", [107, 82])
def test_vocabulary_can_grow_and_shrink(head, size, tmp_path):
    model = build(head)
    before = model.get_input_embeddings().weight.numpy()
    kept = min(size, 97)
    given = batch(head)
    given["input_ids"] = given["input_ids"].clip(max=kept - 1)
    outputs = values(model(**given))
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert model.get_input_embeddings().weight.shape == [size, 24]
    np.testing.assert_array_equal(model.get_input_embeddings().weight.numpy()[:kept], before[:kept])
    for a, b in zip(outputs, values(model(**given)), strict=True):
        np.testing.assert_allclose(a[..., :kept], b[..., :kept], atol=1e-6)
    with quiet():
        model.save_pretrained(str(tmp_path), safe_serialization=True)
        loaded = type(model).from_pretrained(str(tmp_path))
    loaded.eval()
    assert_equal(values(model(**given)), values(loaded(**given)))


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_is_the_embedding_after_loading_and_resizing_if_tied(tied, tmp_path):
    model = build("ForMaskedLM", tie_word_embeddings=tied)
    with quiet():
        model.save_pretrained(str(tmp_path), safe_serialization=True)
        loaded = type(model).from_pretrained(str(tmp_path))
    for step in (lambda: None, lambda: loaded.resize_token_embeddings(120), lambda: loaded.resize_token_embeddings(90)):
        step()
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
        assert loaded(**{"input_ids": paddle.to_tensor([[7, 8]])})[0].shape[-1] == loaded.config.vocab_size


@every_head
@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_gives_the_same_loss_and_gradients_with_dropout(head, reentrant):
    rates = dict.fromkeys(("embedding_dropout", "mlp_dropout", "attention_dropout"), 0.3)
    model = build(head, **rates, recompute_use_reentrant=reentrant)
    model.train()
    encoder = model if head == "Model" else model.model
    calls = []
    encoder.layers[0].mlp.register_forward_post_hook(lambda *_: calls.append(1))
    found = []
    for enable in (lambda: None, model.recompute_enable):
        enable()
        calls.clear()
        model.clear_gradients()
        paddle.seed(1)
        output = model(**batch(head), **(labels(head) if head in LABELS else {}))
        loss = (output[0] if isinstance(output, tuple) else output).pow(2).sum()
        loss.backward()
        found.append((len(calls), float(loss), {name: p.grad.numpy() for name, p in model.named_parameters()}))
    (once, plain, gradients), (twice, again, recomputed) = found
    assert (once, twice) == (1, 2)
    assert plain == again
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, recomputed[name], err_msg=name)


def test_recompute_is_left_out_in_evaluation_mode_and_passes_attentions_on():
    model = build("ForMaskedLM")
    model.recompute_enable()
    model.config.attn_implementation = "eager"  # which training takes too
    plain = model(**batch("ForMaskedLM"))
    model.train()
    output = model(**batch("ForMaskedLM"), output_attentions=True, output_hidden_states=True, return_dict=True)
    np.testing.assert_array_equal((plain[0] if isinstance(plain, tuple) else plain).numpy(), output.logits.numpy())
    assert len(output.attentions) == 4
    assert len(output.hidden_states) == 5


def test_nothing_is_there_to_fuse_or_split():
    """Wqkv and Wi are fused in the checkpoint already; PaddleNLP asks, and must not look for q, k and v."""
    config = ModernBertConfig(**SMALL)
    for fuse in (True, False):
        assert modernbert.ModernBertForMaskedLM._get_fuse_or_split_param_mappings(config, fuse) == {}


def test_paddlenlps_trainer_trains_saves_and_turns_recompute_on(fixture_folder, tmp_path):
    from paddlenlp.data import DataCollatorForLanguageModeling
    from paddlenlp.trainer import Trainer, TrainingArguments

    tokenizer = modernbert.ModernBertTokenizer.from_pretrained(str(fixture_folder("tiny")))
    texts = ["a cat sat on the mat", "the dog ran far away"] * 4
    model = build("ForMaskedLM", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    before = model.head.dense.weight.numpy()
    with quiet():
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                device="cpu",
                max_steps=2,
                save_steps=2,
                per_device_train_batch_size=4,
                recompute=True,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in texts],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5),
            tokenizer=tokenizer,
        ).train()
        loaded = modernbert.ModernBertForMaskedLM.from_pretrained(str(tmp_path / "checkpoint-2"))
    assert model.model.enable_recompute
    assert np.abs(model.head.dense.weight.numpy() - before).max() > 0
    np.testing.assert_array_equal(loaded.head.dense.weight.numpy(), model.head.dense.weight.numpy())
    reader = modernbert.ModernBertTokenizer.from_pretrained(str(tmp_path / "checkpoint-2"))
    assert reader(texts)["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize(
    ("head", "dtype"),
    [
        ("Model", "float32"),
        ("ForMaskedLM", "float32"),
        ("ForSequenceClassification", "float32"),
        ("ForMaskedLM", "bfloat16"),
    ],
)
def test_exported_model_gives_the_same_numbers_for_every_shape(head, dtype, tmp_path):
    model = build(head)
    model.to(dtype=dtype)
    model.config.attn_implementation = "eager"  # which an exported model takes too
    sizes = [{"rows": 2, "length": 13}, {"rows": 1, "length": 30}]
    eager = [values(model(**batch(head, **size))) for size in sizes]
    spec = [InputSpec([None, None], "int64", name) for name in ("input_ids", "attention_mask")]
    static = paddle.jit.to_static(model, input_spec=spec, full_graph=True)
    assert_equal(eager[0], values(static(*batch(head, **sizes[0]).values())))
    paddle.jit.save(static, str(tmp_path / "model"))
    loaded = paddle.jit.load(str(tmp_path / "model"))
    for size, expected in zip(sizes, eager, strict=True):
        assert_equal(expected, values(loaded(*batch(head, **size).values())))
