"""How weights are divided among ranks: cutting and joining, which weights, and which degrees."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.core.table import parse_table
from modernbert_align.core.tensor_parallel import Division, check_degree, division, divisions
from modernbert_align.errors import UsageError


def numbered(shape):
    return np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)


@st.composite
def divided(draw):
    """A division and a whole weight that it fits."""
    axis, parts, degree = draw(st.integers(0, 1)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    shape = [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
    shape[axis] *= parts * degree
    return Division(axis=axis, parts=parts, degree=degree), numbered(shape)


@given(divided())
def test_joining_undoes_cutting(pair):
    how, whole = pair
    shards = [how.cut(whole, rank) for rank in range(how.degree)]
    assert {shard.shape for shard in shards} == {how.shape(whole.shape)}
    assert how.whole_shape(shards[0].shape) == whole.shape
    np.testing.assert_array_equal(how.join(shards), whole)


@given(divided())
def test_every_element_is_on_one_rank_and_in_its_order(pair):
    how, whole = pair
    shards = [how.cut(whole, rank) for rank in range(how.degree)]
    assert sorted(np.concatenate([shard.ravel() for shard in shards])) == list(range(whole.size))
    for shard in shards:
        assert np.array_equal(np.sort(shard, axis=how.axis), shard)


def test_a_rank_has_its_share_of_every_block():
    whole = np.array([f"{block}{head}" for block in "qkv" for head in range(4)])
    how = Division(axis=0, parts=3, degree=2)
    assert how.cut(whole, 0).tolist() == ["q0", "q1", "k0", "k1", "v0", "v1"]
    assert how.cut(whole, 1).tolist() == ["q2", "q3", "k2", "k3", "v2", "v3"]


@pytest.mark.parametrize("parts", [2, 3])
def test_a_fused_weight_cut_as_one_block_is_something_else(parts):
    whole = numbered((4, parts * 8))
    how, naive = (Division(axis=1, parts=n, degree=2) for n in (parts, 1))
    for rank in range(2):
        assert how.cut(whole, rank).shape == naive.cut(whole, rank).shape
        assert not np.array_equal(how.cut(whole, rank), naive.cut(whole, rank))
    assert not np.array_equal(how.join([naive.cut(whole, rank) for rank in range(2)]), whole)


def test_a_shard_has_memory_of_its_own():
    whole = numbered((4, 4))
    shard = Division(axis=0, parts=1, degree=2).cut(whole, 0)
    shard[:] = 0
    np.testing.assert_array_equal(whole, numbered((4, 4)))


def expanded(table, config, head="masked_lm"):
    return table.expand(config, head)


def test_which_weights_are_divided_and_along_which_axis_of_paddles_layout(table, tiny_config):
    config = tiny_config(vocab_size=24, attention_bias=True, mlp_bias=True, norm_bias=True, tie_word_embeddings=False)
    found = {
        name.replace("model.layers.1.", ""): (how.axis, how.parts)
        for name, how in divisions(expanded(table, config), 2).items()
        if "layers.0" not in name and "layers.2" not in name
    }
    assert found == {
        "model.embeddings.tok_embeddings.weight": (0, 1),
        "attn.Wqkv.weight": (1, 3),
        "attn.Wqkv.bias": (0, 3),
        "attn.Wo.weight": (0, 1),
        "mlp.Wi.weight": (1, 2),
        "mlp.Wi.bias": (0, 2),
        "mlp.Wo.weight": (0, 1),
        "decoder.weight": (0, 1),
        "decoder.bias": (0, 1),
    }


def test_one_rank_has_everything_whole(table, tiny_config):
    assert divisions(expanded(table, tiny_config()), 1) == {}


@pytest.mark.parametrize(("vocabulary", "whole"), [(23, True), (24, False)])
def test_a_vocabulary_the_degree_does_not_divide_stays_whole(table, tiny_config, vocabulary, whole):
    entries = expanded(table, tiny_config(vocab_size=vocabulary))
    words = [entry for entry in entries if entry.row.tp == "vocab"]
    assert len(words) == 3
    assert all((division(entry, 2) is None) is whole for entry in words)


def test_degrees_that_fit_are_taken(table, tiny_config):
    config = tiny_config(num_attention_heads=2, intermediate_size=6)
    for degree in (1, 2):
        check_degree(config, expanded(table, config), degree)


@pytest.mark.parametrize(
    ("changes", "degree", "message", "hint"),
    [
        ({}, 0, "a tensor parallel degree of 0", "give 1 to 64"),
        ({}, -2, "a tensor parallel degree of -2", "give 1 to 64"),
        ({}, 65, "a tensor parallel degree of 65", "give 1 to 64"),
        ({}, 3, "2 attention heads cannot be divided among 3 ranks", "degrees that divide `num_attention_heads`: 2"),
        (
            {"num_attention_heads": 4, "hidden_size": 16},
            4,
            "6 feed-forward units cannot be divided among 4 ranks",
            "degrees that divide `intermediate_size`: 2, 3, 6",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_those_that_do(table, tiny_config, changes, degree, message, hint):
    config = tiny_config(**changes)
    with pytest.raises(UsageError) as caught:
        check_degree(config, expanded(table, config), degree)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_table_that_does_not_say_how_is_refused(decoder_table):
    sizes = decoder_table.sizes({}, where="defaults")
    entries = expanded(decoder_table, sizes, "causal_lm")
    check_degree(sizes, entries, 1)
    with pytest.raises(UsageError, match="the table of this model does not say how its weights are divided"):
        check_degree(sizes, entries, 2)


def test_another_weight_that_cannot_be_divided_is_named(tiny_config):
    raw, _ = read_toml(configs_dir() / "tables" / "modernbert.toml")
    raw = copy.deepcopy(raw)
    next(row for row in raw["rows"]["classifier"] if row["hf"] == "classifier.weight")["tp"] = "col"
    table = parse_table(raw, "digest", where="test.toml")
    config = tiny_config(num_labels=3)
    with pytest.raises(UsageError, match=r"`classifier.weight` \[8, 3\] cannot be divided among 2 ranks"):
        check_degree(config, expanded(table, config, "sequence_classification"), 2)
