"""What is measured at one probe, the same whichever engine recorded it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import torch

from modernbert_align.core.compare import Beside, Context, rel_l2
from modernbert_align.core.metrics import ULP_BINS
from modernbert_align.core.probes import Probe
from modernbert_align.engines import padiff_engine, reference_side, stream_engine
from modernbert_align.engines.pair import compare
from modernbert_align.engines.truth import Truth

PROBE = Probe(name="p", pattern="p", hf="p", paddle="p", fan_in=8)


@pytest.fixture(params=["padiff", "stream"])
def observed(request):
    """Gives the record of one module that returned `ours` in Paddle and `theirs` in PyTorch."""

    def record(ours, theirs, mask=None, *, dtype="bf16", oracle=None, null_parts=None, **changes):
        probe = replace(PROBE, **({"tokens": mask is not None} | changes))
        context = Context(mask=mask, dtype=dtype, mode="isolated")
        nulls = {} if null_parts is None else null_parts
        if request.param == "stream":
            beside = Beside(oracle=oracle, null_parts=nulls)
            outputs = stream_engine.paddle_outputs(ours), reference_side.torch_outputs(theirs)
            return compare(probe, context, *outputs, beside)
        truth = SimpleNamespace(record=lambda *_: None, value=lambda *_: oracle)
        items = [[SimpleNamespace(type="forward", net_id=1, output=out, net=None)] for out in (ours, theirs)]
        reports = [SimpleNamespace(items=found) for found in items]
        layer_map = SimpleNamespace(absent={}, net_ids={"p": 1}, reports=reports)
        return padiff_engine._record(probe, layer_map, context, "", truth, {("p", "isolated"): nulls})

    return record


def both(*shape, value=1.0):
    return paddle.full(shape, value), torch.full(shape, value)


@pytest.mark.parametrize("mode", ["alone", "in a tuple"])
def test_the_first_output_is_compared(observed, mode):
    (ours, theirs), (other, another) = both(2, 3), both(4, value=7.0)
    row = observed(ours, theirs) if mode == "alone" else observed((ours, other), (theirs, another))
    assert (row.observation, row.elements, row.mean_abs, row.shape) == ("compared", 6, 0, (2, 3))


def test_the_reference_may_omit_as_many_outputs_as_the_probe_allows(observed):
    (ours, theirs), (more, _) = both(2, 3), both(4)
    for theirs_alone in (theirs, (theirs,), (theirs, None)):
        assert observed((ours, more), theirs_alone, may_omit=1).observation == "compared"
        row = observed((ours, more), theirs_alone)
        assert (row.observation, row.reason) == ("extra", "the candidate returns 0, 1, the reference 0")
    assert observed((ours, more, more), theirs, may_omit=1).observation == "extra"
    assert observed((ours, more, more), theirs, may_omit=2).observation == "compared"


def test_the_candidate_may_omit_nothing(observed):
    (ours, theirs), (_, more) = both(2, 3), both(4)
    row = observed(ours, (theirs, more), may_omit=1)
    assert (row.observation, row.reason) == ("extra", "the candidate returns 0, the reference 0, 1")


def test_every_output_has_its_shape_and_dtype_checked_also_beyond_the_first(observed):
    ours, theirs = both(2, 3)
    row = observed((ours, paddle.ones([4])), (theirs, torch.ones(5)))
    assert (row.observation, row.reason) == ("shape_mismatch", "output 1 is [4], the reference's is [5]")
    row = observed((ours, paddle.ones([4])), (theirs, torch.ones(4, dtype=torch.float64)))
    assert (row.observation, row.reason) == ("dtype_mismatch", "output 1 is float32, the reference's is float64")


def test_the_whole_model_is_compared_by_key_and_not_by_position(observed):
    (loss, their_loss), (logits, their_logits) = both(value=3.0), both(2, 3)
    ours, theirs = {"logits": logits, "loss": loss}, {"loss": their_loss, "logits": their_logits}
    whole = {"hf": "", "paddle": ""}
    assert observed(ours, theirs, key="logits", **whole).elements == 6
    row = observed(ours, theirs, key="loss", tokens=False, scale=1.0, **whole)
    assert (row.elements, row.shape, row.worst_reference) == (1, (), 3.0)
    row = observed(ours, theirs, key="end_logits", **whole)
    assert (row.observation, row.reason) == ("missing", "the models return loss, logits, not end_logits")


@pytest.mark.parametrize("missing", ["ours", "theirs"])
def test_a_loss_that_only_one_model_returns_is_no_success(observed, missing):
    (loss, their_loss), (logits, their_logits) = both(value=3.0), both(2, 3)
    ours, theirs = {"loss": loss, "logits": logits}, {"loss": their_loss, "logits": their_logits}
    del (ours if missing == "ours" else theirs)["loss"]
    for key in ("loss", "logits"):
        assert observed(ours, theirs, key=key, hf="", paddle="").observation != "compared"


def test_the_error_of_a_loss_is_absolute_below_the_scale(observed):
    ours, theirs = paddle.to_tensor(0.5), torch.tensor(0.25)
    assert observed(ours, theirs, scale=1.0).rel_l2 == 0.25
    assert observed(ours, theirs).rel_l2 == 1.0


@pytest.mark.parametrize("shape", [(2, 5), (6,), ()])
def test_an_output_that_does_not_fit_the_mask_is_not_compared(observed, shape):
    ours, theirs = both(*shape)
    row = observed(ours, theirs, np.ones((2, 3), bool))
    assert (row.observation, row.mean_abs) == ("empty", None)
    assert "[batch seq ...]" in row.reason
    assert observed(ours, theirs, None).observation == "compared"


@pytest.mark.parametrize("side", ["candidate", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_by_side_unless_it_is_padding(observed, side, bad):
    values = {"candidate": np.ones((2, 3), np.float32), "reference": np.ones((2, 3), np.float32)}
    values[side][0, 2] = bad
    ours, theirs = paddle.to_tensor(values["candidate"]), torch.from_numpy(values["reference"])
    row = observed(ours, theirs, np.array([[1, 1, 1], [1, 0, 0]], bool))
    assert (row.observation, row.reason) == ("nonfinite", f"the {side}'s output has values that are not finite")
    assert observed(ours, theirs, np.array([[1, 1, 0], [1, 0, 0]], bool)).observation == "compared"


def test_both_errors_are_taken_against_the_oracle_without_padding(observed):
    ours, theirs = both(2, 3)
    oracle = np.array([[1.5, 0.5, 99.0], [1.5, 99.0, 99.0]])
    row = observed(ours + 1, theirs, np.array([[1, 1, 0], [1, 0, 0]], bool), oracle=oracle)
    assert row.candidate_error == pytest.approx(np.sqrt((0.25 + 2.25 + 0.25) / 3))
    assert row.reference_error == 0.5


def test_without_an_oracle_there_are_no_errors_but_the_rest_is_measured(observed):
    row = observed(*both(2, 3))
    assert (row.observation, row.mean_abs) == ("compared", 0)
    assert row.candidate_error is row.reference_error is None


def test_an_oracle_of_another_shape_measures_nothing(observed):
    row = observed(*both(2, 3), oracle=np.ones((3, 2)))
    assert (row.observation, row.reason) == ("empty", "shapes differ: (2, 3) and (3, 2)")


def test_an_oracle_that_is_not_finite_is_a_failure_unless_it_is_so_at_padding(observed):
    oracle = np.array([[1.0, np.nan, np.nan], [1.0, np.nan, np.nan]])
    row = observed(*both(2, 3), np.array([[1, 1, 0], [1, 0, 0]], bool), oracle=oracle)
    assert (row.observation, row.reason) == ("nonfinite", "the oracle's value is not finite")
    row = observed(*both(2, 3), np.array([[1, 0, 0], [1, 0, 0]], bool), oracle=oracle)
    assert (row.observation, row.reference_error) == ("compared", 0)


def test_steps_are_counted_in_bf16_only(observed):
    ours, theirs = both(2, 3)
    assert observed(ours, theirs, dtype="bf16").ulps == (6, *[0] * (len(ULP_BINS) - 1))
    assert observed(ours * 2, theirs, dtype="bf16").ulps[ULP_BINS.index("65-")] == 6
    assert observed(ours, theirs, dtype="bf16", float32=True).ulps is None


def test_the_null_is_the_largest_of_its_parts(observed):
    row = observed(*both(2, 3), null_parts={"sdpa": 0.25, "permuted": 0.5})
    assert (row.null_rel_l2, row.null_parts) == (0.5, {"sdpa": 0.25, "permuted": 0.5})
    row = observed(*both(2, 3))
    assert (row.null_rel_l2, row.null_parts) == (None, {})


def test_the_null_leaves_padding_out_where_there_are_tokens_and_follows_the_scale():
    mask = np.arange(192) < np.array([[192], [150]])
    ones = np.ones((2, 192, 3), np.float32)
    off = ones.copy()
    off[1, 150:] = 2.0  # padding
    assert rel_l2(PROBE, mask, off, ones) == 0
    assert rel_l2(PROBE, None, off, ones) == pytest.approx(np.sqrt(42 / 384))
    off[1, 150:] = np.nan
    assert rel_l2(PROBE, mask, off, ones) == 0
    assert rel_l2(PROBE, None, off, ones) is None
    assert rel_l2(PROBE, None, ones, off) is None
    loss = replace(PROBE, tokens=False, scale=1.0)
    assert rel_l2(loss, None, np.float32(0.5), np.float32(0.25)) == 0.25
    assert rel_l2(PROBE, None, np.float32(0.5), np.float32(0.25)) == 1.0


# --- the oracle's values in execution order ---------------------------------------------------------------------------


def probe_at(name, key=""):
    pattern = "layers.{i}" if name.count(".") == 1 else name
    return replace(PROBE, name=name, pattern=pattern, key=key)


class Answering:
    """An oracle that says what it was given."""

    def accumulated(self, _inputs):
        for n, name in enumerate(("embeddings", "layers.0.attn", "layers.0", "layers.1.attn", "layers.1", "output")):
            yield name, torch.tensor(float(n), dtype=torch.float64)

    def isolated(self, probe, _inputs, recorded):
        self.had = sorted(recorded)
        return recorded[probe].double()


@pytest.fixture
def truth():
    oracle = Answering()
    found = Truth(oracle, None)
    found.oracle = oracle
    return found


def test_end_to_end_values_are_those_of_the_probe_and_skipped_ones_are_passed_over(truth):
    assert truth.value(probe_at("embeddings"), "accumulated") == 0
    assert truth.value(probe_at("layers.0"), "accumulated") == 2
    assert truth.value(probe_at("layers.0"), "accumulated") == 2
    assert truth.value(probe_at("output", key="logits"), "accumulated") == 5
    assert truth.value(probe_at("loss", key="loss"), "accumulated") is None


def test_an_isolated_value_starts_from_what_the_reference_returned_first(truth):
    truth.record(probe_at("embeddings"), {"0": torch.tensor(7.0), "1": torch.tensor(8.0)})
    value = truth.value(probe_at("embeddings"), "isolated")
    assert (value, value.dtype) == (7.0, np.float64)
    assert truth.value(probe_at("layers.0"), "isolated") is None


def test_what_no_later_probe_starts_from_is_forgotten(truth):
    names = ["embeddings", "layers.0.attn", "layers.0", "layers.1.attn", "layers.1", "final_norm", "head"]
    had = {}
    for name in names:
        truth.record(probe_at(name), {"0": torch.tensor(1.0)})
        truth.value(probe_at(name), "isolated")
        had[name] = truth.oracle.had
    truth.record(probe_at("output", key="logits"), {"logits": torch.tensor(1.0)})
    truth.value(probe_at("head"), "isolated")
    assert had == {
        "embeddings": ["embeddings"],
        "layers.0.attn": ["embeddings", "layers.0.attn"],
        "layers.0": ["embeddings", "layers.0", "layers.0.attn"],
        "layers.1.attn": ["layers.0", "layers.1.attn"],
        "layers.1": ["layers.0", "layers.1", "layers.1.attn"],
        "final_norm": ["final_norm", "layers.1"],
        "head": ["final_norm", "head", "layers.1"],
    }
    assert truth.oracle.had == had["head"]  # what the whole model returned is not among them
