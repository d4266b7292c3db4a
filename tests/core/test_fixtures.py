"""Seeded checkpoints and the inputs they are compared on."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import fixtures as module
from modernbert_align.core.fixtures import (
    InputSpec,
    contract_fixture,
    corpus_path,
    default_inputs,
    fixture_names,
    load_fixture,
    make_inputs,
)
from modernbert_align.core.model_config import FULL, SLIDING, ModelConfig, parse_config
from modernbert_align.errors import TableError, UsageError

# Reports are compared between machines and over time: the inputs must not drift with a numpy release.
TINY_IDS = [435, 326, 262, 138, 158, 21]
TINY_SHA256 = {
    "base": "4491d4fd1394d4cec74f78c84bc98c730519c4c1225f8f7b8a08cddea5fe1c2c",
    "masked_lm": "8c8ac40233aba534d2455fbc87d916aedea323bdb8e0e6d7dddbbb6ac66dc18d",
    "multiple_choice": "cf88c9d90809c2cb73bce95acb77038fab429442e0311eb5732ab22032d181f5",
    "question_answering": "60ff86900acb3f09c3d488ce3ac0d8e91f7fbac37dcfa02eceba1dc17486a424",
    "sequence_classification": "3180491a63ab18d06104020c403b3053aa33755c3feb098513c0b1a183feb924",
    "token_classification": "1bf4d138681c7104f28047b5984b722829fdf11c97a795078eef4ae3f3ab2d45",
}
HEADS = sorted(TINY_SHA256)


def config_of(name):
    fixture, _ = load_fixture(name)
    return fixture, parse_config(
        {"model_type": "modernbert", "pad_token_id": fixture.tokenizer.pad_token_id} | fixture.config
    )


def spec(*lengths, seed=0):
    return InputSpec(seed=seed, lengths=lengths)


def drawn(head, *lengths, seed=0, **config):
    return make_inputs(spec(*lengths, seed=seed), ModelConfig(**{"vocab_size": 50, "pad_token_id": 3} | config), head)


# --- the declared fixtures --------------------------------------------------------------------------------------------


def test_the_fixtures_are_those_declared():
    assert fixture_names() == ["base", "base-stress", "large", "large-stress", "tiny", "tiny-sensitive", "tiny-stress"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["base", "large", "tiny", "tiny-sensitive"])
def test_every_fixture_exercises_padding_and_the_window(name, head):
    fixture, config = config_of(name)
    assert fixture.name == name
    inputs = make_inputs(fixture.inputs, config, head)
    assert inputs.padded
    assert inputs.window_bites
    assert {FULL, SLIDING} == set(config.layer_types)
    assert fixture.tokenizer.vocab_size <= config.vocab_size
    assert max(fixture.tokenizer.pad_token_id, fixture.tokenizer.cls_token_id) < config.vocab_size


def test_base_and_large_have_the_published_shapes():
    _, base = config_of("base")
    assert base == ModelConfig(layer_types=base.layer_types, classifier_pooling="mean")
    _, large = config_of("large")
    assert (large.hidden_size, large.intermediate_size, large.num_hidden_layers) == (1024, 2624, 28)


def test_both_poolings_are_exercised():
    poolings = {name: config_of(name)[1].classifier_pooling for name in ("base", "large", "tiny", "tiny-sensitive")}
    assert poolings == {"base": "mean", "large": "mean", "tiny": "cls", "tiny-sensitive": "mean"}


def test_tiny_has_a_different_size_on_every_axis():
    _, tiny = config_of("tiny")
    sizes = [tiny.hidden_size, 2 * tiny.intermediate_size, 3 * tiny.hidden_size, tiny.intermediate_size]
    assert len({*sizes, tiny.vocab_size, tiny.num_hidden_layers}) == 5  # 3H == 2I, as in the published base
    assert tiny.layer_types == (FULL, SLIDING, SLIDING, FULL)


def test_the_sensitive_fixture_switches_every_bias_on():
    fixture, config = config_of("tiny-sensitive")
    assert fixture.weights == "sensitive"
    assert config.norm_bias
    assert config.attention_bias
    assert config.mlp_bias
    assert config.classifier_bias
    assert config.decoder_bias


@pytest.mark.parametrize("name", ["tiny", "base", "large"])
def test_a_stress_fixture_differs_in_its_weights_only_and_is_not_under_contract(name):
    (plain, digest), (stress, other) = load_fixture(name), load_fixture(f"{name}-stress")
    assert stress.model_dump(exclude={"name", "weights"}) == plain.model_dump(exclude={"name", "weights"})
    assert (plain.weights, stress.weights) == ("hf-init", "stress")
    assert digest != other
    assert contract_fixture(name) == name
    assert contract_fixture(f"{name}-stress") is None
    assert contract_fixture(None) is None


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("tinny", "did you mean `tiny`?"),
        ("tiny-sensitiv", "did you mean `tiny-sensitive`?"),
        ("bases", "did you mean `base`?"),
        ("Large", "did you mean `large`?"),
    ],
)
def test_a_mistyped_fixture_gets_a_suggestion(typed, hint):
    with pytest.raises(UsageError, match=f"`{typed}` is neither a directory nor a fixture nor a hub id") as refused:
        load_fixture(typed)
    assert refused.value.hint == hint


@pytest.mark.parametrize("typed", ["gpt2", "../tables/modernbert", ""])
def test_an_unknown_name_lists_the_fixtures(typed):
    with pytest.raises(UsageError) as refused:
        load_fixture(typed)
    assert refused.value.hint.startswith("fixtures: base, base-stress, large, large-stress, tiny, ")


# --- its digest and its file ------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the fixture files, to be changed."""
    (tmp_path / "fixtures").mkdir()
    for path in corpus_path().parent.iterdir():
        (tmp_path / "fixtures" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "configs_dir", lambda: tmp_path)
    return tmp_path / "fixtures"


def test_the_digest_is_stable(copied):
    assert load_fixture("tiny")[1] == load_fixture("tiny")[1]
    assert load_fixture("tiny")[1] != load_fixture("base")[1]
    assert len(load_fixture("tiny")[1]) == 64


@pytest.mark.parametrize("file", ["tiny.toml", "corpus.txt"])
def test_the_digest_follows_whatever_decides_the_bytes(copied, file):
    before = load_fixture("tiny")[1]
    (copied / file).write_bytes((copied / file).read_bytes() + b"\n")
    assert load_fixture("tiny")[1] != before


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers"])
def test_the_digest_follows_the_packages_that_write_a_fixture(monkeypatch, package):
    before = load_fixture("tiny")[1]
    real = module.version
    monkeypatch.setattr(module, "version", lambda name: "99.0" if name == package else real(name))
    assert load_fixture("tiny")[1] != before


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("seed = 0\n\n[config]", 'seed = "x"\n\n[config]', "seed"),
        ('weights = "hf-init"', 'weights = "random"', "weights"),
        ("lengths = [192, 150]", "lengths = [192]", "inputs.lengths"),
        ("pad_token_id = 3", "pad = 3", "tokenizer.pad"),
    ],
)
def test_a_malformed_fixture_is_refused_with_its_place(copied, old, new, place):
    text = (copied / "tiny.toml").read_text()
    assert old in text
    (copied / "tiny.toml").write_text(text.replace(old, new))
    with pytest.raises(TableError, match=rf"`tiny\.toml`: {place}"):
        load_fixture("tiny")


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_inputs_depend_on_the_seed_alone(head):
    fixture, config = config_of("tiny")
    one, two = make_inputs(fixture.inputs, config, head), make_inputs(fixture.inputs, config, head)
    assert one.sha256 == two.sha256
    assert one.arguments.keys() == two.arguments.keys()
    assert all(np.array_equal(one.arguments[name], two.arguments[name]) for name in one.arguments)
    other = make_inputs(fixture.inputs.model_copy(update={"seed": 1}), config, head)
    assert other.sha256 != one.sha256
    assert not np.array_equal(other.input_ids, one.input_ids)


@pytest.mark.parametrize("head", HEADS)
def test_the_inputs_of_tiny_are_the_same_on_every_machine(head):
    fixture, config = config_of("tiny")
    inputs = make_inputs(fixture.inputs, config, head)
    assert inputs.input_ids[0, :6].tolist() == TINY_IDS
    assert inputs.sha256 == TINY_SHA256[head]


def test_the_digest_covers_ids_and_mask():
    inputs = drawn("base", 6, 4, local_attention=4)
    raw = b"attention_mask(2, 6)" + inputs.attention_mask.astype("<i8").tobytes()
    raw += b"input_ids(2, 6)" + inputs.input_ids.astype("<i8").tobytes()
    assert inputs.sha256 == hashlib.sha256(raw).hexdigest()
    assert drawn("base", 6, 5, local_attention=4).sha256 != inputs.sha256


def test_the_digest_covers_the_labels():
    inputs = drawn("sequence_classification", 6, 4, num_labels=1)
    raw = b"attention_mask(2, 6)" + inputs.attention_mask.astype("<i8").tobytes()
    raw += b"input_ids(2, 6)" + inputs.input_ids.astype("<i8").tobytes()
    raw += b"labels(2,)" + inputs.labels["labels"].astype("<f4").tobytes()
    assert inputs.sha256 == hashlib.sha256(raw).hexdigest()
    other = replace(inputs, labels={"labels": inputs.labels["labels"] + np.float32(1)})
    renamed = replace(inputs, labels={"targets": inputs.labels["labels"]})
    bare = replace(inputs, labels={})
    assert len({i.sha256 for i in (inputs, other, renamed, bare)}) == 4


def test_the_digest_covers_each_single_argument():
    inputs = drawn("question_answering", 6, 4)
    digests = {inputs.sha256}
    for name in ("input_ids", "attention_mask"):
        changed = getattr(inputs, name).copy()
        changed[1, 5] += 1
        digests.add(replace(inputs, **{name: changed}).sha256)
    for name in inputs.labels:
        digests.add(replace(inputs, labels={**inputs.labels, name: inputs.labels[name] + 1}).sha256)
    assert len(digests) == 5


def test_the_digest_covers_how_the_rows_are_handed_over():
    rows = drawn("base", 6, 4)
    assert replace(rows, choices=True).sha256 != rows.sha256


@pytest.mark.parametrize("head", HEADS)
def test_ids_and_mask_are_the_same_for_every_head(head):
    inputs, base = drawn(head, 30, 20), drawn("base", 30, 20)
    assert np.array_equal(inputs.input_ids, base.input_ids)
    assert np.array_equal(inputs.attention_mask, base.attention_mask)
    assert (inputs.padded, inputs.window_bites) == (base.padded, base.window_bites)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    vocab=st.integers(5, 40),
    pad=st.one_of(st.none(), st.integers(0, 4)),
    seed=st.integers(0, 100),
    head=st.sampled_from(HEADS),
)
def test_padding_is_on_the_right_and_no_real_token_is_the_padding_id(lengths, vocab, pad, seed, head):
    config = ModelConfig(vocab_size=vocab, pad_token_id=pad)
    inputs = make_inputs(spec(*lengths, seed=seed), config, head)
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (len(lengths), max(lengths))
    assert inputs.input_ids.dtype == inputs.attention_mask.dtype == np.int64
    for ids, mask, length in zip(inputs.input_ids, inputs.attention_mask, lengths, strict=True):
        assert mask.tolist() == [1] * length + [0] * (max(lengths) - length)
        assert set(ids[length:].tolist()) <= {0 if pad is None else pad}
        assert pad not in ids[:length].tolist()
        assert ids.min() >= 0
        assert ids.max() < vocab
    assert inputs.padded == (len(set(lengths)) > 1)


def test_every_token_but_padding_can_be_drawn():
    config = ModelConfig(vocab_size=7, pad_token_id=3)
    assert set(make_inputs(spec(400, 400), config, "base").input_ids.ravel().tolist()) == {0, 1, 2, 4, 5, 6}


@pytest.mark.parametrize(
    ("lengths", "bites"),
    [((10, 10), True), ((10, 6), True), ((10, 5), False), ((10, 2), False), ((5, 5), False), ((6, 6), True)],
)
def test_the_window_bites_when_the_shortest_row_has_a_hidden_pair(lengths, bites):
    config = ModelConfig(layer_types=(FULL, SLIDING), local_attention=8)  # |i - j| <= 4
    inputs = make_inputs(spec(*lengths), config, "masked_lm")
    assert inputs.window_bites is bites
    far = max(abs(i - j) for i in range(min(lengths)) for j in range(min(lengths)))
    assert bites is (far > config.half_window)


def test_a_model_without_sliding_layers_needs_no_window():
    config = ModelConfig(layer_types=(FULL, FULL), local_attention=8)
    assert make_inputs(spec(3, 2), config, "masked_lm").window_bites


def test_inputs_longer_than_the_model_takes_are_refused():
    config = ModelConfig(max_position_embeddings=16, local_attention=4)
    assert make_inputs(spec(16, 12), config, "masked_lm").padded
    with pytest.raises(UsageError, match=r"needs 17 tokens, the model takes 16 \(`max_position_embeddings`\)"):
        make_inputs(spec(17, 12), config, "masked_lm")


def test_inputs_without_padding_say_so():
    assert not make_inputs(spec(8, 8), ModelConfig(local_attention=4), "masked_lm").padded


@pytest.mark.parametrize("window", [2, 16, 128, 256, 1024])
def test_default_inputs_exercise_padding_and_the_window(window):
    config = ModelConfig(local_attention=window, layer_types=(FULL, SLIDING))
    inputs = make_inputs(default_inputs(config), config, "masked_lm")
    assert inputs.padded
    assert inputs.window_bites


@pytest.mark.parametrize("positions", [8, 64, 128])
def test_default_inputs_fit_a_short_model_and_say_when_its_window_cannot_bite(positions):
    config = ModelConfig(max_position_embeddings=positions, local_attention=256, layer_types=(FULL, SLIDING))
    inputs = make_inputs(default_inputs(config), config, "masked_lm")
    assert inputs.input_ids.shape[1] == positions
    assert inputs.padded
    assert not inputs.window_bites


# --- labels -----------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 40), min_size=2, max_size=5)
SEEDS = st.integers(0, 100)


@pytest.mark.parametrize("head", [*HEADS, "something_new"])
def test_each_head_gets_the_labels_its_loss_takes(head):
    names = {
        "base": [],
        "something_new": [],
        "question_answering": ["end_positions", "start_positions"],
    }.get(head, ["labels"])
    inputs = drawn(head, 30, 20)
    assert sorted(inputs.labels) == names
    assert sorted(inputs.arguments) == sorted(["attention_mask", "input_ids", *names])
    assert all(np.array_equal(inputs.arguments[name], inputs.labels[name]) for name in names)


@given(lengths=LENGTHS, seed=SEEDS, vocab=st.integers(5, 40))
def test_masked_lm_labels_are_some_of_the_real_positions(lengths, seed, vocab):
    inputs = drawn("masked_lm", *lengths, seed=seed, vocab_size=vocab)
    labels = inputs.labels["labels"]
    assert labels.shape == inputs.input_ids.shape
    assert labels.dtype == np.int64
    assert (labels[inputs.attention_mask == 0] == -100).all()
    labelled = labels[labels != -100]
    assert ((labelled >= 0) & (labelled < vocab)).all()


def test_masked_lm_labels_leave_most_real_positions_out():
    inputs = drawn("masked_lm", 600, 500, vocab_size=7)
    labels = inputs.labels["labels"][inputs.attention_mask == 1]
    assert 0.25 < (labels != -100).mean() < 0.35
    assert set(labels.tolist()) == {-100, *range(7)}
    assert not np.array_equal(labels[labels != -100], inputs.input_ids[inputs.attention_mask == 1][labels != -100])


@pytest.mark.parametrize("name", ["base", "large", "tiny", "tiny-sensitive"])
def test_every_fixture_has_labelled_positions_in_every_row(name):
    fixture, config = config_of(name)
    labels = make_inputs(fixture.inputs, config, "masked_lm").labels["labels"]
    assert (labels != -100).any(axis=1).all()


@pytest.mark.parametrize("head", HEADS)
def test_sparse_prediction_has_no_masked_lm_labels_and_changes_no_other_head(head):
    sparse, dense = drawn(head, 30, 20, sparse_prediction=True), drawn(head, 30, 20)
    if head == "masked_lm":
        assert sparse.labels == {}
        assert sorted(sparse.arguments) == ["attention_mask", "input_ids"]
    else:
        assert sparse.sha256 == dense.sha256


@given(lengths=LENGTHS, seed=SEEDS, classes=st.integers(1, 9))
def test_token_labels_are_at_every_real_position_and_nowhere_else(lengths, seed, classes):
    inputs = drawn("token_classification", *lengths, seed=seed, num_labels=classes)
    labels = inputs.labels["labels"]
    assert labels.shape == inputs.input_ids.shape
    assert labels.dtype == np.int64
    assert (labels[inputs.attention_mask == 0] == -100).all()
    real = labels[inputs.attention_mask == 1]
    assert ((real >= 0) & (real < classes)).all()


def test_every_token_label_can_be_drawn():
    inputs = drawn("token_classification", 200, 150, num_labels=5)
    assert set(inputs.labels["labels"].ravel().tolist()) == {-100, 0, 1, 2, 3, 4}


@given(lengths=LENGTHS, seed=SEEDS)
def test_answers_lie_within_the_real_tokens(lengths, seed):
    inputs = drawn("question_answering", *lengths, seed=seed)
    for positions in inputs.labels.values():
        assert positions.shape == (len(lengths),)
        assert positions.dtype == np.int64
        assert ((positions >= 0) & (positions < np.array(lengths))).all()


def test_answers_start_and_end_at_their_own_positions():
    inputs = drawn("question_answering", 40, 38, 36, 34)
    assert not np.array_equal(inputs.labels["start_positions"], inputs.labels["end_positions"])
    assert len(set(inputs.labels["start_positions"].tolist())) > 1


@given(lengths=LENGTHS, seed=SEEDS)
def test_the_rows_of_multiple_choice_are_the_choices_of_one_question(lengths, seed):
    inputs = drawn("multiple_choice", *lengths, seed=seed)
    assert inputs.choices
    shape = (len(lengths), max(lengths))
    assert inputs.input_ids.shape == inputs.attention_mask.shape == shape
    for name in ("input_ids", "attention_mask"):
        assert inputs.arguments[name].shape == (1, *shape)
        assert np.array_equal(inputs.arguments[name][0], getattr(inputs, name))
    labels = inputs.arguments["labels"]
    assert labels.shape == (1,)
    assert labels.dtype == np.int64
    assert 0 <= labels[0] < len(lengths)


def test_every_choice_can_be_the_right_one():
    right = {int(drawn("multiple_choice", 5, 4, 3, seed=seed).labels["labels"][0]) for seed in range(40)}
    assert right == {0, 1, 2}


@pytest.mark.parametrize("head", sorted({*HEADS} - {"multiple_choice"}))
def test_rows_of_other_heads_are_handed_over_as_they_are(head):
    inputs = drawn(head, 30, 20)
    assert not inputs.choices
    assert inputs.arguments["input_ids"].shape == inputs.arguments["attention_mask"].shape == (2, 30)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "shape", "dtype"),
    [
        (None, 1, (3,), np.float32),  # one label without a type is a regression, as in the reference
        (None, 2, (3,), np.int64),
        (None, 5, (3,), np.int64),
        ("regression", 1, (3,), np.float32),
        ("regression", 4, (3, 4), np.float32),
        ("single_label_classification", 1, (3,), np.int64),
        ("single_label_classification", 4, (3,), np.int64),
        ("multi_label_classification", 1, (3, 1), np.float32),  # the reference's loss takes the logits' shape only
        ("multi_label_classification", 4, (3, 4), np.float32),
    ],
)
def test_sequence_labels_follow_the_problem_type_and_the_number_of_labels(problem_type, num_labels, shape, dtype):
    inputs = drawn("sequence_classification", 30, 20, 10, problem_type=problem_type, num_labels=num_labels)
    labels = inputs.labels["labels"]
    assert labels.shape == shape
    assert labels.dtype == dtype


def test_sequence_labels_of_one_class_are_class_indices():
    found = {
        label
        for seed in range(30)
        for label in drawn("sequence_classification", 5, 4, seed=seed, num_labels=3).labels["labels"].tolist()
    }
    assert found == {0, 1, 2}


def test_sequence_labels_of_a_regression_are_numbers_and_of_several_classes_switches():
    kinds = {
        kind: drawn("sequence_classification", 5, 4, problem_type=kind, num_labels=30).labels["labels"]
        for kind in ("regression", "multi_label_classification")
    }
    assert set(kinds["multi_label_classification"].ravel().tolist()) == {0.0, 1.0}
    assert len(set(kinds["regression"].ravel().tolist())) == 60
    assert (kinds["regression"] >= 0).all()
    assert (kinds["regression"] < 1).all()
