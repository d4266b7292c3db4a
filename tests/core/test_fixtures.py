"""Seeded checkpoints and the inputs they are compared on."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import fixtures as module
from modernbert_align.core.fixtures import (
    InputSpec,
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
TINY_SHA256 = "ba328eda08081746fc248f12f04096c4214f95a70f987b3597bde5d18740e8bd"


def config_of(name):
    fixture, _ = load_fixture(name)
    return fixture, parse_config(
        {"model_type": "modernbert", "pad_token_id": fixture.tokenizer.pad_token_id} | fixture.config
    )


def spec(*lengths, seed=0):
    return InputSpec(seed=seed, lengths=lengths)


# --- the declared fixtures --------------------------------------------------------------------------------------------


def test_the_fixtures_are_those_declared():
    assert fixture_names() == ["base", "large", "tiny", "tiny-sensitive"]


@pytest.mark.parametrize("name", ["base", "large", "tiny", "tiny-sensitive"])
def test_every_fixture_exercises_padding_and_the_window(name):
    fixture, config = config_of(name)
    assert fixture.name == name
    inputs = make_inputs(fixture.inputs, config)
    assert inputs.padded
    assert inputs.window_bites
    assert {FULL, SLIDING} == set(config.layer_types)
    assert fixture.tokenizer.vocab_size <= config.vocab_size
    assert max(fixture.tokenizer.pad_token_id, fixture.tokenizer.cls_token_id) < config.vocab_size


def test_base_and_large_have_the_published_shapes():
    _, base = config_of("base")
    assert base == ModelConfig(layer_types=base.layer_types)
    _, large = config_of("large")
    assert (large.hidden_size, large.intermediate_size, large.num_hidden_layers) == (1024, 2624, 28)


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
    assert refused.value.hint.startswith("fixtures: base, large, tiny, tiny-sensitive")


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


def test_inputs_depend_on_the_seed_alone():
    fixture, config = config_of("tiny")
    one, two = make_inputs(fixture.inputs, config), make_inputs(fixture.inputs, config)
    assert one.sha256 == two.sha256
    assert np.array_equal(one.input_ids, two.input_ids)
    other = make_inputs(fixture.inputs.model_copy(update={"seed": 1}), config)
    assert other.sha256 != one.sha256
    assert not np.array_equal(other.input_ids, one.input_ids)


def test_the_inputs_of_tiny_are_the_same_on_every_machine():
    fixture, config = config_of("tiny")
    inputs = make_inputs(fixture.inputs, config)
    assert inputs.input_ids[0, :6].tolist() == TINY_IDS
    assert inputs.sha256 == TINY_SHA256


def test_the_digest_covers_ids_and_mask():
    inputs = make_inputs(spec(6, 4), ModelConfig(vocab_size=50, pad_token_id=3, local_attention=4))
    raw = inputs.input_ids.astype("<i8").tobytes() + inputs.attention_mask.astype("<i8").tobytes()
    assert inputs.sha256 == hashlib.sha256(raw).hexdigest()
    longer = make_inputs(spec(6, 5), ModelConfig(vocab_size=50, pad_token_id=3, local_attention=4))
    assert longer.sha256 != inputs.sha256


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    vocab=st.integers(5, 40),
    pad=st.one_of(st.none(), st.integers(0, 4)),
    seed=st.integers(0, 100),
)
def test_padding_is_on_the_right_and_no_real_token_is_the_padding_id(lengths, vocab, pad, seed):
    config = ModelConfig(vocab_size=vocab, pad_token_id=pad)
    inputs = make_inputs(spec(*lengths, seed=seed), config)
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
    assert set(make_inputs(spec(400, 400), config).input_ids.ravel().tolist()) == {0, 1, 2, 4, 5, 6}


@pytest.mark.parametrize(
    ("lengths", "bites"),
    [((10, 10), True), ((10, 6), True), ((10, 5), False), ((10, 2), False), ((5, 5), False), ((6, 6), True)],
)
def test_the_window_bites_when_the_shortest_row_has_a_hidden_pair(lengths, bites):
    config = ModelConfig(layer_types=(FULL, SLIDING), local_attention=8)  # |i - j| <= 4
    inputs = make_inputs(spec(*lengths), config)
    assert inputs.window_bites is bites
    far = max(abs(i - j) for i in range(min(lengths)) for j in range(min(lengths)))
    assert bites is (far > config.half_window)


def test_a_model_without_sliding_layers_needs_no_window():
    config = ModelConfig(layer_types=(FULL, FULL), local_attention=8)
    assert make_inputs(spec(3, 2), config).window_bites


def test_inputs_longer_than_the_model_takes_are_refused():
    config = ModelConfig(max_position_embeddings=16, local_attention=4)
    assert make_inputs(spec(16, 12), config).padded
    with pytest.raises(UsageError, match=r"needs 17 tokens, the model takes 16 \(`max_position_embeddings`\)"):
        make_inputs(spec(17, 12), config)


def test_inputs_without_padding_say_so():
    assert not make_inputs(spec(8, 8), ModelConfig(local_attention=4)).padded


@pytest.mark.parametrize("window", [2, 16, 128, 256, 1024])
def test_default_inputs_exercise_padding_and_the_window(window):
    config = ModelConfig(local_attention=window, layer_types=(FULL, SLIDING))
    inputs = make_inputs(default_inputs(config), config)
    assert inputs.padded
    assert inputs.window_bites


@pytest.mark.parametrize("positions", [8, 64, 128])
def test_default_inputs_fit_a_short_model_and_say_when_its_window_cannot_bite(positions):
    config = ModelConfig(max_position_embeddings=positions, local_attention=256, layer_types=(FULL, SLIDING))
    inputs = make_inputs(default_inputs(config), config)
    assert inputs.input_ids.shape[1] == positions
    assert inputs.padded
    assert not inputs.window_bites
