"""Every task head against transformers, by value: logits, losses and gradients, poolings, problem types, padding."""

import numpy as np
import paddle
import pytest
import torch
import transformers

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.table import load_table

VERSION = int(transformers.__version__.split(".")[0])
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "pad_token_id": 5,
    "initializer_range": 0.2,
}
HEADS = {
    "sequence_classification": "ModernBertForSequenceClassification",
    "token_classification": "ModernBertForTokenClassification",
    "question_answering": "ModernBertForQuestionAnswering",
    "multiple_choice": "ModernBertForMultipleChoice",
}


@pytest.fixture
def pair(tmp_path):
    """Builds a seeded reference and the Paddle model made from its converted checkpoint."""

    def build(head, **changes):
        torch.manual_seed(0)
        model = getattr(transformers, HEADS[head])(transformers.ModernBertConfig(**{**SIZES, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path / "hf")
        request = Request(folder=tmp_path / "hf", model="pair", revision=None, src="hf", dst="paddle")
        folder = convert(request, load_table(), tmp_path / "paddle", force=False).out
        return hf.load(tmp_path / "hf", HEADS[head], "fp32"), paddle_backend.load(folder, HEADS[head], "fp32")

    return build


def rows(length, paddings, side="right"):
    ids = np.random.default_rng(length).integers(6, 97, (len(paddings), length))
    mask = np.ones_like(ids)
    for row, padded in enumerate(paddings):
        if padded:
            mask[row, :padded] = 0 if side == "left" else 1
            mask[row, length - padded :] = 1 if side == "left" else 0
    return {"input_ids": ids, "attention_mask": mask}


def keep_gradient(output, found):
    if output.requires_grad:
        output.register_hook(lambda gradient: found.append(gradient.numpy()))


def check(reference, candidate, arguments, *, keep=None):
    """Same outputs, and with labels the same loss and gradients."""
    terms = []  # gradients that the classifier's bias gets the sum of
    with reference.classifier.register_forward_hook(lambda *call: keep_gradient(call[-1], terms)):
        theirs = reference(**{k: torch.from_numpy(v) for k, v in arguments.items()})
    ours = candidate(**{k: paddle.to_tensor(v) for k, v in arguments.items()}, return_dict=True)
    assert {k for k, v in ours.items() if v is not None} == set(theirs.keys())
    for name in theirs:
        a, b = ours[name].numpy(), theirs[name].detach().numpy()
        assert a.shape == b.shape, name
        if keep is not None and a.shape[:2] == keep.shape:
            a, b = a[keep], b[keep]
        assert np.linalg.norm(a - b) <= 1e-5 * max(1.0, np.linalg.norm(b)), name
    if "loss" not in theirs:
        return
    theirs.loss.backward()
    ours.loss.backward()
    gradients = {name: p.grad for name, p in candidate.named_parameters()}
    for name, parameter in reference.named_parameters():
        expected = parameter.grad.numpy()
        found = gradients[name].numpy()
        expected = expected.T if found.shape != expected.shape or ".Wo." in name or "head.dense.w" in name else expected
        # Whatever shifts every choice alike moves no softmax: what a question's classifier gets for its bias are terms
        # that cancel but for their rounding, so they are what its error is relative to, as in backward_engine._scales.
        # Measured for questions and choices: at most 1.1e-7 where the limit is 5e-7 to 6e-7.
        least = 1e-2 * np.linalg.norm(terms[0]) if name == "classifier.bias" else 1e-3
        assert np.linalg.norm(found - expected) <= 1e-4 * max(np.linalg.norm(expected), least), name
    reference.zero_grad()
    candidate.clear_gradients()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 129, 401])
@pytest.mark.parametrize("head", ["sequence_classification", "token_classification", "question_answering"])
def test_length_gives_the_references_values(pair, head, length):
    reference, candidate = pair(head, local_attention=128)
    arguments = rows(length, (0, 0))
    check(reference, candidate, arguments)
    check(reference, candidate, {"input_ids": arguments["input_ids"]})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("head", HEADS)
def test_pooling_and_padding_give_the_references_values(pair, head, pooling, side):
    reference, candidate = pair(head, classifier_pooling=pooling)
    arguments = rows(30, (0, 7), side)
    keep = arguments["attention_mask"].astype(bool)
    first_token = head == "sequence_classification" or (head == "multiple_choice" and VERSION < 5)
    if pooling == "cls" and side == "left" and first_token:
        arguments = {k: v[:1] for k, v in arguments.items()}  # position 0 is padding there, in the reference too
        keep = keep[:1]
    if head == "multiple_choice":
        arguments = {k: v[None] for k, v in arguments.items()}
    check(reference, candidate, arguments, keep=keep)


@pytest.mark.parametrize("head", ["token_classification", "question_answering"])
def test_fully_padded_row_leaves_the_others_alone(pair, head):
    reference, candidate = pair(head)
    arguments = rows(20, (0, 20))
    check(reference, candidate, arguments, keep=arguments["attention_mask"].astype(bool))


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, np.array([0.3, -1.2], dtype=np.float32)),
        (3, "regression", np.array([[0.3, -1.2, 2.0], [0.0, 1.0, -0.5]], dtype=np.float32)),
        (3, None, np.array([2, 0])),
        (3, "single_label_classification", np.array([1, 1])),
        (3, None, np.array([[1, 0, 1], [0, 0, 1]], dtype=np.float32)),
        (3, "multi_label_classification", np.array([[1, 1, 1], [0, 0, 0]], dtype=np.float32)),
    ],
)
def test_sequence_classification_losses(pair, num_labels, problem_type, labels):
    reference, candidate = pair("sequence_classification", num_labels=num_labels, problem_type=problem_type)
    check(reference, candidate, rows(20, (0, 5)) | {"labels": labels})


def test_token_classification_loss_ignores_padding(pair):
    reference, candidate = pair("token_classification", num_labels=4)
    arguments = rows(20, (0, 5))
    labels = np.random.default_rng(0).integers(0, 4, (2, 20))
    keep = arguments["attention_mask"].astype(bool)
    check(reference, candidate, arguments | {"labels": np.where(keep, labels, -100)}, keep=keep)


@pytest.mark.parametrize("end", [[9, 12], [19, 25], [-3, 20]])
def test_question_answering_loss_ignores_positions_beyond_the_sequence(pair, end):
    reference, candidate = pair("question_answering")
    arguments = rows(20, (0, 0)) | {"start_positions": np.array([1, 4]), "end_positions": np.array(end)}
    check(reference, candidate, arguments)


def test_multiple_choice_loss(pair):
    reference, candidate = pair("multiple_choice")
    three = {k: v.reshape(2, 3, 12) for k, v in rows(12, (0, 3, 5, 0, 1, 2)).items()}
    check(reference, candidate, three | {"labels": np.array([2, 0])})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [107, 82])
def test_resized_vocabulary_keeps_the_old_tokens(tmp_path, tied, size):
    from modernbert_align.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

    model = ModernBertForMaskedLM(ModernBertConfig(**SIZES, tie_word_embeddings=tied))
    model.eval()
    ids = paddle.to_tensor([[7, 8, 81]])
    before = model(ids)[0].numpy()
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    after = model(ids)[0].numpy()
    assert after.shape == (1, 3, size)
    kept = min(97, size)
    np.testing.assert_allclose(after[..., :kept], before[..., :kept], atol=1e-6)
    assert model.config.vocab_size == size
    assert (model.decoder.weight is model.get_input_embeddings().weight) == tied
    assert model.decoder.bias.shape == [size]
    with paddle_backend.quiet():
        model.save_pretrained(str(tmp_path), safe_serialization=True)
        loaded = ModernBertForMaskedLM.from_pretrained(str(tmp_path))
    loaded.eval()
    np.testing.assert_array_equal(loaded(ids)[0].numpy(), after)
