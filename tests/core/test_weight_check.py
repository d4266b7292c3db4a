"""Weights in memory are compared bit for bit, and what is wrong with one is named."""

import ml_dtypes
import numpy as np
import pytest

from modernbert_align.core.weight_check import check_weights, weight_digests

WO, WI, QKV = "layers.1.attn.Wo.weight", "layers.1.mlp.Wi.weight", "layers.1.attn.Wqkv.weight"
EMBEDDING, NORM = "embeddings.tok_embeddings.weight", "final_norm.weight"
FORMATS = {"float32": (np.float32, np.uint32), "bfloat16": (ml_dtypes.bfloat16, np.uint16)}


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def entries(table, tiny_config):
    return table.expand(tiny_config(), "base")


@pytest.fixture
def states(entries, dtype):
    """Equal models: (candidate, reference), each name -> [bits, dtype name], no two elements equal."""
    float_type, bits_type = FORMATS[dtype]
    candidate, reference = {}, {}
    start = 0x3C00
    for entry in entries:
        size = int(np.prod(entry.hf_shape))
        bits = np.arange(start, start + size).astype(np.uint64)
        start += size
        values = (bits << (32 - 16 if bits_type is np.uint32 else 0)).astype(bits_type).reshape(entry.hf_shape)
        reference[entry.hf] = (values, dtype)
        candidate[entry.paddle] = (values.T.copy() if entry.op.name == "T" else values.copy(), dtype)
    assert np.isfinite(values.view(float_type).astype(np.float64)).all()
    return candidate, reference


@pytest.fixture
def check(entries, states, dtype):
    run = "fp32" if dtype == "float32" else "bf16"
    return lambda: check_weights(entries, *states, run)


def single(check):
    found = check()
    assert len(found.differences) == 1
    return found.differences[0]


def test_equal_weights_have_no_difference(check, entries):
    found = check()
    assert found.differences == ()
    assert found.expected == found.compared == len(entries)


def test_one_element_is_enough(check, states, dtype, entries):
    candidate, _ = states
    bits, _ = candidate[QKV]
    assert bits.shape == (8, 24)
    float_type = FORMATS[dtype][0]
    before = float(bits.view(float_type)[3, 17])
    bits[3, 17] += 1
    after = float(bits.view(float_type)[3, 17])
    difference = single(check)
    assert (difference.paddle, difference.hf, difference.problem) == (QKV, QKV, "values")
    assert difference.probe == "layers.1.attn"
    assert (difference.differing, difference.elements) == (1, 192)
    assert difference.max_abs == abs(after - before) > 0
    assert difference.looks == ""
    assert check().compared == len(entries)


def test_a_square_weight_without_its_transpose_is_named(check, states):
    candidate, reference = states
    candidate[WO] = (reference[WO][0].copy(), candidate[WO][1])
    difference = single(check)
    assert difference.paddle == WO
    assert difference.looks == "it is the reference's weight without the transpose"
    assert (difference.differing, difference.elements) == (56, 64)  # the diagonal is the same


def test_a_transposed_weight_that_needs_no_transpose_is_not_called_one_without(table, tiny_config):
    entries = table.expand(tiny_config(vocab_size=8), "base")  # the embedding is square as well
    bits = {
        e.hf: np.arange(1000 * n, 1000 * n + np.prod(e.hf_shape), dtype=np.uint32).reshape(e.hf_shape)
        for n, e in enumerate(entries)
    }
    reference = {name: (values, "float32") for name, values in bits.items()}
    candidate = {e.paddle: (e.op.apply(bits[e.hf]).copy(), "float32") for e in entries}
    candidate[EMBEDDING] = (bits[EMBEDDING].T.copy(), "float32")
    (found,) = check_weights(entries, candidate, reference, "fp32").differences
    assert (found.paddle, found.problem, found.looks) == (EMBEDDING, "values", "")


def test_a_weight_that_is_no_square_fails_by_shape_without_its_transpose(check, states):
    candidate, reference = states
    candidate[WI] = (reference[WI][0].copy(), candidate[WI][1])
    difference = single(check)
    assert (difference.paddle, difference.problem) == (WI, "shape")
    assert difference.looks == "[12, 8], the reference's is [8, 12]"


def test_swapped_halves_of_the_gated_weight_are_named(check, states):
    candidate, _ = states
    bits, name = candidate[WI]
    candidate[WI] = (np.concatenate([bits[:, 6:], bits[:, :6]], axis=1), name)
    difference = single(check)
    assert (difference.paddle, difference.probe) == (WI, "layers.1.mlp")
    assert difference.looks == "its two halves are swapped"
    assert difference.differing == difference.elements == 96


def test_another_permutation_is_not_called_swapped_halves(check, states):
    candidate, _ = states
    bits, name = candidate[WI]
    candidate[WI] = (bits[:, ::-1].copy(), name)
    assert single(check).looks == ""


def test_parts_of_the_stacked_weight_in_another_order_are_named(check, states):
    candidate, _ = states
    bits, name = candidate[QKV]
    q, k, v = np.split(bits, 3, axis=1)
    candidate[QKV] = (np.concatenate([k, v, q], axis=1), name)
    assert single(check).looks == "its three parts are in the order 2, 3, 1"


def test_the_weight_of_another_layer_is_named(check, states):
    candidate, _ = states
    other = WI.replace("layers.1", "layers.0")
    candidate[WI] = (candidate[other][0].copy(), candidate[other][1])
    assert single(check).looks == f"it is the reference's `{other}`"


def test_another_dtype_is_named_even_if_the_bits_are_equal(check, states):
    candidate, _ = states
    candidate[NORM] = (candidate[NORM][0], "float16")
    difference = single(check)
    assert (difference.paddle, difference.problem) == (NORM, "dtype")
    assert difference.looks.startswith("float16, the reference's is ")


@pytest.mark.parametrize(
    ("side", "says"), [(0, "the candidate does not have it"), (1, "the reference does not have it")]
)
def test_a_missing_weight_is_named_and_not_counted_as_compared(check, states, entries, side, says):
    del states[side][NORM]
    difference = single(check)
    assert (difference.paddle, difference.hf, difference.problem) == (NORM, NORM, "missing")
    assert (difference.probe, difference.looks) == ("final_norm", says)
    assert check().compared == len(entries) - 1
    assert check().expected == len(entries)


@pytest.mark.parametrize("side", [0, 1])
def test_a_weight_that_no_row_maps_is_named(check, states, entries, side):
    states[side]["layers.1.attn.gate.weight"] = (np.zeros(2, np.uint32), "float32")
    difference = single(check)
    assert difference.problem == "unmapped"
    assert (difference.paddle, difference.hf)[side] == "layers.1.attn.gate.weight"
    assert (difference.paddle, difference.hf)[1 - side] == ""
    assert ("candidate", "reference")[side] in difference.looks
    assert check().compared == len(entries)


def test_values_that_are_equal_but_not_their_bits_differ(entries, states, check, dtype):
    candidate, reference = states
    for state, pattern in ((candidate, 0), (reference, 1 << (8 * FORMATS[dtype][1]().itemsize - 1))):
        state[NORM][0][4] = pattern  # 0.0 and -0.0
    difference = single(check)
    assert (difference.paddle, difference.differing, difference.max_abs) == (NORM, 1, 0)


def test_equal_not_a_number_is_equal_and_another_one_differs(states, check, dtype):
    candidate, reference = states
    quiet = 0x7FC0 << (16 if dtype == "float32" else 0)
    candidate[NORM][0][2] = reference[NORM][0][2] = quiet
    assert check().differences == ()
    candidate[NORM][0][2] = quiet + 1
    difference = single(check)
    assert (difference.differing, difference.max_abs) == (1, None)


def test_every_difference_is_listed_in_model_order(states, check):
    candidate, _ = states
    for name in (NORM, WO, EMBEDDING):
        candidate[name][0].flat[0] += 1
    assert [difference.paddle for difference in check().differences] == [EMBEDDING, WO, NORM]
    assert {difference.dtype for difference in check().differences} <= {"fp32", "bf16"}


def test_a_tied_decoder_is_compared_like_any_weight(table, tiny_config):
    tied = table.expand(tiny_config(), "masked_lm")
    reference = {e.hf: (np.arange(np.prod(e.hf_shape), dtype=np.uint32).reshape(e.hf_shape), "float32") for e in tied}
    candidate = {e.paddle: (e.op.apply(reference[e.hf][0]).copy(), "float32") for e in tied}
    assert check_weights(tied, candidate, reference, "fp32").differences == ()
    candidate["decoder.weight"][0][5, 1] += 1
    found = check_weights(tied, candidate, reference, "fp32")
    assert [(d.paddle, d.probe) for d in found.differences] == [("decoder.weight", "logits")]
    assert found.compared == found.expected == len(tied)


def test_both_sides_of_a_weight_have_one_digest(entries, states):
    candidate, reference = states
    ours, theirs = weight_digests(entries, candidate, "paddle"), weight_digests(entries, reference, "hf")
    assert ours == theirs
    digests, unmapped = ours
    assert list(digests) == [entry.hf for entry in entries]
    assert len(set(digests.values())) == len(entries)
    assert unmapped == ()


def test_a_digest_changes_with_a_bit_a_forgotten_transpose_the_shape_and_the_dtype(entries, states, dtype):
    candidate, _ = states
    before, _ = weight_digests(entries, candidate, "paddle")

    def differing():
        after, _ = weight_digests(entries, candidate, "paddle")
        return [name for name in before if after.get(name) != before[name]]

    values, _ = candidate[WO]
    for other in (values ^ np.eye(*values.shape, dtype=values.dtype), values.T, values.reshape(-1), values[:1]):
        candidate[WO] = (other, dtype)
        assert differing() == [WO]
    candidate[WO] = (values, "float16")
    assert differing() == [WO]
    del candidate[WO]
    assert differing() == [WO]
    candidate["more.weight"] = (values, dtype)
    assert weight_digests(entries, candidate, "paddle")[1] == ("more.weight",)
