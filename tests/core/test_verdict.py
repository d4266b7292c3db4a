"""The verdict: every criterion holds for every row of every run, or the comparison does not pass."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_align.core.probes import load_probes
from modernbert_align.core.rows import MODES, Record, WeightCheck, WeightDifference
from modernbert_align.core.tolerance import Override, load_tolerances
from modernbert_align.core.verdict import (
    POLICIES,
    RUNS,
    Expectation,
    default_policy,
    exit_code,
    explain,
    judge,
    only_by_own_limits,
)
from modernbert_align.errors import ReportError, UsageError

TOLERANCES = load_tolerances(("fp32", "bf16"))
WEIGHTS = 7
SMALL = 100  # elements up to which criterion 4 allows more
NOISE_SMALL = 4095  # and criterion 3
NAN, INF = float("nan"), float("inf")
ISOLATED, ACCUMULATED = MODES


def limit(dtype):
    return TOLERANCES[dtype].contract.mean_abs


def with_limit(criterion, numbers):
    """The installed tolerances of fp32 with another criterion 3 or 4."""
    forward = TOLERANCES["fp32"].forward.model_copy(update={criterion: numbers})
    return TOLERANCES["fp32"].model_copy(update={"forward": forward})


class Comparison:
    """A comparison in which everything is right, and copies of it with something wrong."""

    def __init__(self, probes, dtypes=("fp32",), fixture="tiny"):
        self.probes = {probe.name: probe for probe in probes}
        self.dtypes = dtypes
        self.expectation = Expectation(
            probes=probes, dtypes=dtypes, weights=WEIGHTS, fixture=fixture, needs={"padding": True, "window": True}
        )
        self.records = {
            (probe.name, dtype, mode): self._good(n, probe, dtype, mode)
            for dtype in dtypes
            for mode in MODES
            for n, probe in enumerate(probes)
        }
        self.weights = {dtype: self.checked(dtype) for dtype in dtypes}
        self.more = []

    def _good(self, n, probe, dtype, mode):
        """Every number differs from every other record's."""
        share = (0.2 + 0.01 * n) * (1 if mode == ISOLATED else 2)
        rounding = TOLERANCES[dtype].unit_roundoff * (1.0 + n)  # of the row's rms
        return Record(
            probe=probe.name,
            dtype=dtype,
            mode=mode,
            observation="compared",
            shape=(2, 25, 8),
            elements=NOISE_SMALL + 100 - n,
            mean_abs=share * limit(dtype),
            max_abs=share * limit(dtype) * 5,
            rel_l2=share * self.floor(probe.name, dtype),
            reference_rms=1.0 + n,
            equal_share=0.5,
            worst_index=(1, 2, 3),
            worst_candidate=1.5,
            worst_reference=1.25,
            candidate_error=(1 + share / 2) * 0.5 * rounding,
            reference_error=0.5 * rounding,
        )

    @staticmethod
    def checked(dtype, *differences, **changes):
        return WeightCheck(
            **({"dtype": dtype, "expected": WEIGHTS, "compared": WEIGHTS, "differences": differences} | changes)
        )

    def floor(self, probe, dtype):
        return TOLERANCES[dtype].floor(self.probes[probe])

    def wrong(self, probe, mode, dtype="fp32", **changes):
        self.records[probe, dtype, mode] = self.records[probe, dtype, mode].model_copy(update=changes)
        return self

    def over_contract(self, probe, mode, dtype="fp32"):
        """Over the contract and inside what rounding explains."""
        return self.wrong(probe, mode, dtype, mean_abs=3 * limit(dtype))

    def over_null(self, probe, mode, dtype="fp32"):
        """More than rounding explains, whatever the contract says."""
        return self.wrong(probe, mode, dtype, rel_l2=2.5 * self.floor(probe, dtype))

    def errors(self, probe, mode, dtype="fp32", *, candidate, reference, **changes):
        """Distances from the oracle in roundings of a row whose values have an rms of 1."""
        unit = TOLERANCES[dtype].unit_roundoff
        found = {"candidate_error": candidate * unit, "reference_error": reference * unit}
        return self.wrong(probe, mode, dtype, **({"reference_rms": 1.0} | found | changes))

    def over_noise(self, probe, mode, dtype="fp32"):
        """Much further from the oracle than the reference, whatever the other criteria say."""
        return self.errors(probe, mode, dtype, candidate=10.0, reference=1.0)

    def needing(self, **needs):
        self.expectation = replace(self.expectation, needs=needs)
        return self

    def judge(self, policy="contract", tolerances=TOLERANCES):
        records = [*self.records.values(), *self.more]
        return judge(records, list(self.weights.values()), self.expectation, tolerances, policy)

    def outcome(self):
        """The verdict, and the exit codes under both policies."""
        found = [self.judge(policy) for policy in ("contract", "noise-aware")]
        assert found[0].verdict == found[1].verdict
        return found[0].verdict, *(judgement.exit_code for judgement in found)

    def row(self, probe, mode, dtype="fp32"):
        return next(r for r in self.judge().rows if (r.probe, r.mode, r.dtype) == (probe, mode, dtype))


PASS, FAIL, NOT_COMPARED = ("PASS", 0, 0), ("FAIL", 1, 1), ("NOT_COMPARED", 5, 5)
EXPLAINED = ("EXPLAINED", 1, 0)


@pytest.fixture(scope="module")
def probes(tiny_config):
    return load_probes(tiny_config(), "masked_lm", "model.")


@pytest.fixture
def comparison(probes):
    return Comparison(probes)


@pytest.fixture
def both(probes):
    """A bf16 comparison: it runs fp32 as well."""
    return Comparison(probes, RUNS["bf16"])


def difference(probe="layers.1.attn", dtype="fp32", **changes):
    values = {
        "paddle": "model.layers.1.attn.Wo.weight",
        "hf": "model.layers.1.attn.Wo.weight",
        "probe": probe,
        "dtype": dtype,
        "problem": "values",
        "differing": 3,
        "elements": 64,
        "looks": "it is the reference's weight without the transpose",
    }
    return WeightDifference(**(values | changes))


def first(comparison):
    found = comparison.judge().first_failing
    return found.probe, found.mode, found.dtype


# --- the four verdicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fixture", ["tiny", "tiny-sensitive", "base", "large", None])
def test_a_comparison_within_every_limit_passes(probes, dtype, fixture):
    comparison = Comparison(probes, RUNS[dtype], fixture)
    assert comparison.outcome() == PASS
    judgement = comparison.judge()
    rows = len(probes) * len(RUNS[dtype]) * 2
    assert len(judgement.rows) == judgement.coverage.expected == judgement.coverage.compared == rows
    assert judgement.coverage.weights_expected == judgement.coverage.weights_compared == WEIGHTS * len(RUNS[dtype])
    assert judgement.coverage.missing == ()
    assert judgement.first_failing is None
    assert {row.status for row in judgement.rows} == {"pass"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probe", ["embeddings", "layers.0.attn", "layers.2", "final_norm", "logits", "output", "loss"])
def test_an_overrun_that_rounding_explains_is_explained_and_fails_under_the_contract(comparison, probe, mode):
    comparison.over_contract(probe, mode)
    assert comparison.outcome() == EXPLAINED
    row = comparison.row(probe, mode)
    assert (row.status, row.failed) == ("explained", ("contract",))
    assert sum(r.status == "explained" for r in comparison.judge().rows) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probe", ["embeddings", "layers.0.attn", "layers.2", "final_norm", "logits", "output", "loss"])
def test_an_overrun_that_rounding_does_not_explain_fails(comparison, probe, mode):
    comparison.over_contract(probe, mode).over_null(probe, mode)
    assert comparison.outcome() == FAIL
    row = comparison.row(probe, mode)
    assert (row.status, row.failed) == ("fail", ("contract", "direct"))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_inside_the_contract_still_fails_beyond_what_rounding_explains(comparison, mode):
    comparison.over_null("layers.1.mlp", mode).wrong("layers.1.mlp", mode, mean_abs=1e-12)
    assert comparison.outcome() == FAIL
    assert comparison.row("layers.1.mlp", mode).failed == ("direct",)


def test_a_comparison_of_nothing_is_not_compared(probes):
    comparison = Comparison(probes)
    comparison.records = {}
    assert comparison.outcome() == NOT_COMPARED
    judgement = comparison.judge()
    assert judgement.coverage.compared == 0
    assert {row.status for row in judgement.rows} == {"missing"}


def test_a_model_without_probes_is_not_compared():
    assert Comparison(()).outcome() == NOT_COMPARED


@pytest.mark.parametrize(
    ("verdict", "codes"),
    [("PASS", (0, 0)), ("EXPLAINED", (1, 0)), ("FAIL", (1, 1)), ("NOT_COMPARED", (5, 5))],
)
def test_exit_codes_follow_the_verdict_and_the_policy(verdict, codes):
    assert tuple(exit_code(verdict, policy) for policy in ("contract", "noise-aware")) == codes


def test_fixtures_are_held_to_the_contract_and_other_weights_to_rounding():
    assert default_policy("tiny") == "contract"
    assert default_policy("base") == "contract"
    assert default_policy(None) == "noise-aware"


def test_a_bf16_comparison_runs_fp32_first():
    assert RUNS["bf16"] == ("fp32", "bf16")
    assert RUNS["fp32"] == ("fp32",)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_contract_holds_up_to_its_limit_and_not_beyond(both, dtype):
    both.wrong("final_norm", ACCUMULATED, dtype, mean_abs=limit(dtype))
    assert both.outcome() == PASS
    both.wrong("final_norm", ACCUMULATED, dtype, mean_abs=math.nextafter(limit(dtype), 1))
    assert both.outcome() == EXPLAINED


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_direct_criterion_holds_up_to_its_limit_and_not_beyond(both, dtype):
    edge = 2 * both.floor("logits", dtype)
    both.wrong("logits", ISOLATED, dtype, rel_l2=edge)
    assert both.outcome() == PASS
    assert both.row("logits", ISOLATED, dtype).null_ratio == 2
    both.wrong("logits", ISOLATED, dtype, rel_l2=edge * (1 + 1e-12))
    assert both.outcome() == FAIL


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_the_noise_criterion_holds_up_to_its_limit_and_not_beyond(both, dtype, mode):
    both.errors("logits", mode, dtype, candidate=1.5, reference=1.0)
    assert both.outcome() == PASS
    row = both.row("logits", mode, dtype)
    assert (row.noise_ratio, row.noise_limit) == (1.5, 1.5)
    both.errors("logits", mode, dtype, candidate=1.5 * (1 + 1e-12), reference=1.0)
    assert both.outcome() == FAIL
    row = both.row("logits", mode, dtype)
    assert (row.status, row.failed, row.noise_ratio) == ("fail", ("noise",), 1.5 * (1 + 1e-12))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("elements", "factor"), [(1, 0), (101, 0), (4094, 0), (4095, 0), (4096, 1.5), (9000, 1.5)])
def test_a_row_of_few_elements_may_be_noisier_and_one_more_element_may_not(both, dtype, elements, factor):
    assert TOLERANCES[dtype].forward.noise.small_elements == NOISE_SMALL
    factor = factor or {"fp32": 8.0, "bf16": 3.0}[dtype]
    both.errors("logits", ISOLATED, dtype, candidate=factor, reference=1.0, elements=elements)
    assert both.outcome() == PASS
    row = both.row("logits", ISOLATED, dtype)
    assert (row.noise_ratio, row.noise_limit) == (factor, factor)
    both.errors("logits", ISOLATED, dtype, candidate=factor * (1 + 1e-12), reference=1.0)
    assert both.outcome() == FAIL
    assert both.row("logits", ISOLATED, dtype).failed == ("noise",)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("reference", [0.0, 1e-3, 1e-300])
def test_an_error_below_rounding_has_no_ratio_and_no_reference_counts_as_better_than_that(both, dtype, reference):
    floor = TOLERANCES[dtype].forward.noise.floor
    assert floor == 0.25
    both.errors("logits", ISOLATED, dtype, candidate=floor, reference=reference)
    assert both.outcome() == PASS
    assert both.row("logits", ISOLATED, dtype).noise_ratio is None
    both.errors("logits", ISOLATED, dtype, candidate=1.5 * floor, reference=reference)
    assert both.outcome() == PASS
    assert both.row("logits", ISOLATED, dtype).noise_ratio == 1.5
    both.errors("logits", ISOLATED, dtype, candidate=1.5 * floor * (1 + 1e-12), reference=reference)
    assert both.outcome() == FAIL
    assert both.row("logits", ISOLATED, dtype).failed == ("noise",)


@pytest.mark.parametrize("rms", [1.0, 64.0, 2.0**-9, 0.0])
def test_the_floor_of_an_error_is_relative_to_the_rows_values(comparison, rms):
    edge = 1.5 * 0.25 * rms
    comparison.errors("logits", ACCUMULATED, candidate=edge, reference=0.0, reference_rms=rms)
    assert comparison.outcome() == PASS
    beyond = edge * (1 + 1e-12) if edge else 1e-200
    comparison.errors("logits", ACCUMULATED, candidate=beyond, reference=0.0, reference_rms=rms)
    assert comparison.outcome() == FAIL


def test_the_floor_of_a_losss_error_is_absolute_below_the_scale(comparison):
    assert comparison.probes["loss"].scale == 1.0
    for rms, edge in ((2.0**-9, 8 * 1.0), (4.0, 8 * 4.0)):
        comparison.errors("loss", ISOLATED, candidate=edge, reference=0.0, reference_rms=rms, elements=1)
        assert comparison.outcome() == PASS
        comparison.errors("loss", ISOLATED, candidate=edge * 1.01, reference=0.0, reference_rms=rms, elements=1)
        assert comparison.outcome() == FAIL


@pytest.mark.parametrize(("elements", "edge"), [(1, 8 * 1.0), (10_000, 1.5 * 0.25)])
@pytest.mark.parametrize("mode", MODES)
def test_a_reference_without_any_error_allows_little_beyond_rounding(comparison, mode, elements, edge):
    comparison.errors("final_norm", mode, candidate=1.04 * edge, reference=0.0, elements=elements)
    assert comparison.outcome() == FAIL
    row = comparison.row("final_norm", mode)
    assert (row.status, row.failed, row.noise_ratio) == ("fail", ("noise",), pytest.approx(1.04 * row.noise_limit))
    comparison.errors("final_norm", mode, candidate=0.26, reference=0.0, reference_rms=0.0, elements=elements)
    row = comparison.row("final_norm", mode)
    assert (row.failed, row.noise_ratio) == (("noise",), None)
    assert "is the reference's without end, more than " in explain(row)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_in_a_row_of_few_numbers_the_references_error_is_no_less_than_its_null(both, dtype):
    unit, limit = TOLERANCES[dtype].unit_roundoff, TOLERANCES[dtype].forward.noise.small_factor
    for elements, outcome, ratio in ((4095, PASS, limit), (4096, FAIL, 10 * limit)):
        both.errors("logits", ACCUMULATED, dtype, candidate=10 * limit, reference=1.0, elements=elements)
        both.wrong("logits", ACCUMULATED, dtype, null_rel_l2=10 * unit)
        assert both.outcome() == outcome
        assert both.row("logits", ACCUMULATED, dtype).noise_ratio == pytest.approx(ratio)
    both.wrong("logits", ACCUMULATED, dtype, elements=4095, null_rel_l2=9 * unit)
    assert both.outcome() == FAIL


def test_a_candidate_nearer_to_the_oracle_than_the_reference_passes(comparison):
    comparison.errors("final_norm", ISOLATED, candidate=1.0, reference=500.0)
    assert comparison.outcome() == PASS
    assert comparison.row("final_norm", ISOLATED).noise_ratio == 1 / 500


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probe", ["embeddings", "layers.1.attn", "output", "loss"])
def test_noise_beyond_the_references_is_never_explained(comparison, probe, mode):
    comparison.over_noise(probe, mode)
    assert comparison.outcome() == FAIL
    comparison.over_contract(probe, mode)
    assert comparison.outcome() == FAIL
    row = comparison.row(probe, mode)
    assert (row.status, row.failed) == ("fail", ("contract", "noise"))


def test_little_noise_rescues_neither_of_the_other_criteria(comparison):
    comparison.errors("layers.1", ACCUMULATED, candidate=0.0, reference=9.0).over_contract("layers.1", ACCUMULATED)
    assert comparison.outcome() == EXPLAINED
    comparison.over_null("layers.1", ACCUMULATED)
    assert comparison.row("layers.1", ACCUMULATED).failed == ("contract", "direct")
    assert comparison.outcome() == FAIL


def test_a_wide_null_does_not_cover_noise(comparison):
    comparison.over_noise("layers.1", ACCUMULATED).wrong("layers.1", ACCUMULATED, null_rel_l2=0.5, rel_l2=0.0)
    assert comparison.outcome() == FAIL


def test_the_noise_limit_is_that_of_the_tolerances_handed_in(comparison):
    comparison.errors("logits", ISOLATED, candidate=1.4, reference=1.0)
    noise = TOLERANCES["fp32"].forward.noise
    for changes, verdict in (
        ({}, "PASS"),
        ({"factor": 1.3}, "FAIL"),
        ({"factor": 1.3, "floor": 1.4}, "PASS"),
        ({"factor": 1.3, "small_elements": 100_000}, "PASS"),
    ):
        handed = with_limit("noise", noise.model_copy(update=changes))
        assert comparison.judge(tolerances={"fp32": handed}).verdict == verdict


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("elements", "factor"), [(1, 8), (2, 8), (99, 8), (100, 8), (101, 2), (1000, 2)])
def test_a_row_of_few_elements_may_be_further_off_and_one_more_element_may_not(both, dtype, mode, elements, factor):
    assert TOLERANCES[dtype].forward.direct.small_elements == SMALL
    edge = factor * both.floor("logits", dtype)
    both.wrong("logits", mode, dtype, elements=elements, rel_l2=edge)
    assert both.outcome() == PASS
    row = both.row("logits", mode, dtype)
    assert (row.direct_limit, row.null_ratio) == (edge, factor)
    both.wrong("logits", mode, dtype, rel_l2=edge * (1 + 1e-12))
    assert both.outcome() == FAIL
    assert both.row("logits", mode, dtype).failed == ("direct",)


@pytest.mark.parametrize(("elements", "status"), [(SMALL, "pass"), (SMALL + 1, "fail")])
def test_the_same_error_passes_in_few_elements_and_fails_in_more(comparison, elements, status):
    comparison.over_null("logits", ISOLATED).wrong("logits", ISOLATED, elements=elements)
    assert comparison.row("logits", ISOLATED).status == status


def test_the_larger_ratio_is_one_of_the_measured_null_too(comparison):
    floor = comparison.floor("logits", "fp32")
    comparison.wrong("logits", ACCUMULATED, elements=SMALL, rel_l2=79 * floor, null_rel_l2=10 * floor)
    assert comparison.outcome() == PASS
    assert comparison.row("logits", ACCUMULATED).direct_limit == pytest.approx(80 * floor)
    comparison.wrong("logits", ACCUMULATED, rel_l2=81 * floor)
    assert comparison.outcome() == FAIL


def test_few_elements_widen_no_other_limit_and_no_other_row(comparison):
    comparison.wrong("logits", ISOLATED, elements=1).over_contract("logits", ISOLATED)
    assert comparison.outcome() == EXPLAINED
    comparison.over_null("head", ISOLATED)
    assert comparison.row("head", ISOLATED).status == "fail"
    for changes in ({"rel_l2": None}, {"rel_l2": NAN}, {"mean_abs": None}, {"candidate_error": None}):
        again = Comparison(tuple(comparison.probes.values())).wrong("logits", ISOLATED, elements=1, **changes)
        assert again.outcome() in (FAIL, NOT_COMPARED)


def test_the_larger_ratio_is_that_of_the_tolerances_handed_in(comparison):
    comparison.over_null("logits", ISOLATED).wrong("logits", ISOLATED, elements=SMALL)
    direct = TOLERANCES["fp32"].forward.direct
    for changes, verdict in (({}, "PASS"), ({"small_elements": SMALL - 1}, "FAIL"), ({"small_factor": 2.4}, "FAIL")):
        handed = with_limit("direct", direct.model_copy(update=changes))
        assert comparison.judge(tolerances={"fp32": handed}).verdict == verdict


def test_a_measured_null_above_the_floor_widens_the_direct_limit(comparison):
    floor = comparison.floor("layers.1", "fp32")
    comparison.wrong("layers.1", ACCUMULATED, rel_l2=15 * floor)
    assert comparison.outcome() == FAIL
    comparison.wrong("layers.1", ACCUMULATED, null_rel_l2=10 * floor)
    assert comparison.outcome() == PASS
    row = comparison.row("layers.1", ACCUMULATED)
    assert row.direct_limit == pytest.approx(20 * floor)
    assert row.null_ratio == pytest.approx(1.5)


@pytest.mark.parametrize("null", [0.0, None, 1e-30])
def test_a_measured_null_below_the_floor_does_not_narrow_the_direct_limit(comparison, null):
    floor = comparison.floor("layers.1", "fp32")
    comparison.wrong("layers.1", ACCUMULATED, rel_l2=1.9 * floor, null_rel_l2=null)
    assert comparison.outcome() == PASS
    assert comparison.row("layers.1", ACCUMULATED).direct_limit == pytest.approx(2 * floor)


def test_a_wide_null_never_covers_an_overrun_of_the_contract(comparison):
    comparison.over_contract("layers.1", ACCUMULATED).wrong("layers.1", ACCUMULATED, null_rel_l2=0.5)
    assert comparison.outcome() == EXPLAINED


def test_the_floor_is_that_of_the_probes_own_sums(comparison):
    narrow, wide = comparison.floor("layers.1.mlp", "fp32"), comparison.floor("layers.1.attn", "fp32")
    assert narrow < wide  # intermediate_size 6, hidden_size 8
    between = narrow + wide
    comparison.wrong("layers.1.attn", ISOLATED, rel_l2=between)
    assert comparison.outcome() == PASS
    comparison.wrong("layers.1.mlp", ISOLATED, rel_l2=between)
    assert comparison.outcome() == FAIL


def test_the_limits_are_those_of_the_tolerances_handed_in(comparison):
    strict = TOLERANCES["fp32"].model_copy(
        update={"contract": TOLERANCES["fp32"].contract.model_copy(update={"mean_abs": 1e-9})}
    )
    assert comparison.judge().verdict == "PASS"
    assert comparison.judge(tolerances={"fp32": strict}).verdict == "EXPLAINED"


@pytest.mark.parametrize("field", ["max_abs", "equal_share", "worst_candidate", "padiff_equal", "ulps", "null_parts"])
def test_what_does_not_gate_does_not_gate(comparison, field):
    value = {"padiff_equal": False, "ulps": (0,) * 7 + (9, 9), "null_parts": {"sdpa": 0.5}}.get(field, 0.125)
    assert comparison.wrong("logits", ACCUMULATED, **{field: value}).outcome() == PASS


def test_padiffs_own_success_rescues_nothing(comparison):
    comparison.over_null("logits", ACCUMULATED).wrong("logits", ACCUMULATED, padiff_equal=True)
    assert comparison.outcome() == FAIL


# --- where the contract applies ---------------------------------------------------------------------------------------

LAYER_OUTPUTS = {"embeddings", "layers.0", "layers.1", "layers.2", "final_norm"}


@pytest.mark.parametrize(
    ("fixture", "accumulated"),
    [
        ("tiny", LAYER_OUTPUTS),
        ("base", LAYER_OUTPUTS),
        ("tiny-sensitive", set()),
        ("large", set()),
        ("somewhere-else", set()),
        (None, LAYER_OUTPUTS),
    ],
)
def test_the_bf16_contract_on_accumulated_rows_depends_on_the_fixture(probes, fixture, accumulated):
    rows = Comparison(probes, RUNS["bf16"], fixture).judge().rows
    under = {row.probe for row in rows if row.dtype == "bf16" and row.mode == ACCUMULATED and row.contract}
    assert under == accumulated
    assert all((row.contract_limit is not None) == row.contract for row in rows)


@pytest.mark.parametrize("fixture", ["tiny", "tiny-sensitive", "base", "large", None])
def test_isolated_bf16_and_all_fp32_rows_are_under_the_contract(probes, fixture):
    rows = Comparison(probes, RUNS["bf16"], fixture).judge().rows
    outside = {(row.probe, row.dtype, row.mode) for row in rows if not row.contract and row.mode == ISOLATED}
    assert outside == {("loss", "bf16", ISOLATED)}
    assert all(row.contract for row in rows if row.dtype == "fp32")
    assert {row.contract_limit for row in rows if row.dtype == "fp32"} == {1e-5}
    isolated = [row for row in rows if row.dtype == "bf16" and row.mode == ISOLATED]
    assert {row.contract_limit for row in isolated if row.probe != "loss"} == {1e-3}
    assert [row.contract_limit for row in isolated if row.probe == "loss"] == [None]


@pytest.mark.parametrize("fixture", ["tiny", "tiny-sensitive", "base", "large", None])
def test_the_bf16_loss_is_judged_by_rounding_alone(probes, fixture):
    comparison = Comparison(probes, RUNS["bf16"], fixture)
    for mode in MODES:
        comparison.over_contract("loss", mode, "bf16").wrong("loss", mode, "bf16", elements=1)
    assert comparison.outcome() == PASS
    floor = comparison.floor("loss", "bf16")
    for mode in MODES:
        comparison.wrong("loss", mode, "bf16", rel_l2=8.5 * floor)
        assert comparison.outcome() == FAIL
        assert comparison.row("loss", mode, "bf16").failed == ("direct",)
        comparison.wrong("loss", mode, "bf16", rel_l2=floor)
    assert comparison.outcome() == PASS
    comparison.over_contract("loss", ISOLATED, "fp32")
    assert comparison.outcome() == EXPLAINED


@pytest.mark.parametrize(
    ("fixture", "probe", "expected"),
    [
        ("base", "final_norm", EXPLAINED),
        ("base", "layers.1", EXPLAINED),
        ("base", "layers.1.attn", PASS),
        ("base", "logits", PASS),
        ("base", "head", PASS),
        ("large", "final_norm", PASS),
        ("tiny-sensitive", "layers.1", PASS),
        (None, "final_norm", EXPLAINED),
        (None, "logits", PASS),
    ],
)
def test_an_accumulated_bf16_row_outside_the_contract_is_judged_by_rounding_alone(probes, fixture, probe, expected):
    comparison = Comparison(probes, RUNS["bf16"], fixture).over_contract(probe, ACCUMULATED, "bf16")
    assert comparison.outcome() == expected
    comparison.over_null(probe, ACCUMULATED, "bf16")
    assert comparison.outcome() == FAIL


@pytest.mark.parametrize("fixture", ["large", "base", "tiny-sensitive", None])
def test_an_isolated_bf16_overrun_is_never_out_of_scope(probes, fixture):
    comparison = Comparison(probes, RUNS["bf16"], fixture).over_contract("head", ISOLATED, "bf16")
    assert comparison.outcome() == EXPLAINED


def test_weights_that_are_no_fixture_exit_with_0_on_what_rounding_explains(probes):
    comparison = Comparison(probes, fixture=None).over_contract("layers.2", ACCUMULATED)
    assert comparison.judge(default_policy(None)).exit_code == 0
    comparison = Comparison(probes, fixture="base").over_contract("layers.2", ACCUMULATED)
    assert comparison.judge(default_policy("base")).exit_code == 1


# --- nothing unseen passes --------------------------------------------------------------------------------------------


@given(data=st.data())
def test_no_row_may_be_missing(probes, data):
    comparison = Comparison(probes, RUNS["bf16"])
    keys = data.draw(st.lists(st.sampled_from(list(comparison.records)), min_size=1, max_size=6, unique=True))
    for key in keys:
        del comparison.records[key]
    assert comparison.outcome() == NOT_COMPARED
    judgement = comparison.judge()
    for probe, dtype, mode in keys:
        assert f"{probe} ({dtype}, {mode}): there is no record of this probe" in judgement.coverage.missing
        assert comparison.row(probe, mode, dtype).status == "missing"
    assert judgement.coverage.expected - judgement.coverage.compared == len(keys)
    assert judgement.first_failing.status == "missing"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_pass_that_did_not_run_is_not_compared(both, dtype, mode):
    both.records = {key: record for key, record in both.records.items() if key[1:] != (dtype, mode)}
    assert both.outcome() == NOT_COMPARED


def test_a_good_bf16_run_never_covers_an_fp32_failure(both):
    assert both.over_null("layers.0.attn", ISOLATED, "fp32").outcome() == FAIL


def test_a_good_fp32_run_never_covers_a_bf16_failure(both):
    assert both.over_null("layers.0.attn", ISOLATED, "bf16").outcome() == FAIL


@pytest.mark.parametrize("observation", ["missing", "empty"])
def test_a_probe_that_was_not_observed_is_missing(comparison, observation):
    comparison.wrong("layers.1", ACCUMULATED, observation=observation, reason="the hook never ran")
    assert comparison.outcome() == NOT_COMPARED
    assert comparison.row("layers.1", ACCUMULATED).status == "missing"
    assert comparison.judge().coverage.missing == ("layers.1 (fp32, accumulated): the hook never ran",)


@pytest.mark.parametrize("changes", [{"mean_abs": None}, {"elements": 0}, {"elements": None}])
def test_a_row_without_measurements_is_missing(comparison, changes):
    comparison.wrong("final_norm", ISOLATED, **changes)
    assert comparison.outcome() == NOT_COMPARED
    assert "nothing was measured" in comparison.judge().coverage.missing[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", ["candidate_error", "reference_error"])
def test_a_row_without_the_oracles_value_is_missing(both, field, mode):
    for dtype in ("fp32", "bf16"):
        both.wrong("layers.1.mlp", mode, dtype, **{field: None})
        assert both.outcome() == NOT_COMPARED
        row = both.row("layers.1.mlp", mode, dtype)
        assert (row.status, row.observation, row.failed) == ("missing", "missing", ("hygiene",))
        assert explain(row) == "there is no oracle value"
        place = f"layers.1.mlp ({dtype}, {mode}): there is no oracle value"
        assert place in both.judge().coverage.missing


def test_an_error_that_is_large_all_the_same_is_not_hidden_by_a_missing_oracle(comparison):
    comparison.over_null("layers.1.mlp", ISOLATED).wrong("layers.1.mlp", ISOLATED, candidate_error=None)
    assert comparison.outcome() == NOT_COMPARED
    comparison.over_null("head", ISOLATED)
    assert comparison.outcome() == FAIL


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probe", ["embeddings", "layers.1.attn", "logits"])
def test_a_relative_error_that_cannot_be_computed_fails(comparison, probe, mode):
    comparison.wrong(probe, mode, rel_l2=None)
    assert comparison.outcome() == FAIL
    assert "rel_l2 cannot be computed" in explain(comparison.row(probe, mode))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "field", ["mean_abs", "max_abs", "rel_l2", "candidate_error", "reference_error", "reference_rms"]
)
@pytest.mark.parametrize(
    ("probe", "mode", "dtype"),
    [
        ("embeddings", ISOLATED, "fp32"),
        ("final_norm", ACCUMULATED, "bf16"),
        ("layers.1.attn", ACCUMULATED, "bf16"),  # not under the contract
        ("logits", ACCUMULATED, "bf16"),
    ],
)
def test_nan_and_infinity_never_pass(both, probe, mode, dtype, field, value):
    assert both.outcome() == PASS
    both.wrong(probe, mode, dtype, **{field: value})
    assert both.outcome() in (FAIL, NOT_COMPARED)


@pytest.mark.parametrize("null", [NAN, INF])
def test_a_null_that_is_not_finite_never_widens_a_limit(both, null):
    both.wrong("logits", ACCUMULATED, "bf16", rel_l2=0.9)
    assert both.outcome() == FAIL
    both.wrong("logits", ACCUMULATED, "bf16", null_rel_l2=null)
    assert both.outcome() in (FAIL, NOT_COMPARED)


@pytest.mark.parametrize("rms", [NAN, INF])
def test_an_rms_that_is_not_finite_never_raises_the_floor_of_an_error(comparison, rms):
    comparison.over_noise("logits", ISOLATED).wrong("logits", ISOLATED, reference_rms=rms)
    assert comparison.outcome() == FAIL


@pytest.mark.parametrize("observation", ["shape_mismatch", "dtype_mismatch", "nonfinite", "extra"])
@pytest.mark.parametrize("mode", MODES)
def test_a_probe_that_was_seen_but_wrong_fails(comparison, observation, mode):
    comparison.wrong("layers.2.mlp", mode, observation=observation, reason="[2, 5, 8] and [2, 8, 5]")
    assert comparison.outcome() == FAIL
    row = comparison.row("layers.2.mlp", mode)
    assert (row.status, row.failed) == (observation, ("hygiene",))
    assert explain(row) == "[2, 5, 8] and [2, 8, 5]"
    assert comparison.judge().first_failing.probe == "layers.2.mlp"


def test_a_failure_weighs_more_than_a_missing_row(comparison):
    comparison.over_null("layers.1.attn", ISOLATED)
    del comparison.records["embeddings", "fp32", ISOLATED]
    assert comparison.outcome() == FAIL


def test_a_missing_row_weighs_more_than_an_explained_one(comparison):
    comparison.over_contract("layers.1", ACCUMULATED)
    del comparison.records["layers.1.attn", "fp32", ACCUMULATED]
    assert comparison.outcome() == NOT_COMPARED


@pytest.mark.parametrize(
    ("probe", "dtype"), [("layers.7.attn", "fp32"), ("pooler", "fp32"), ("layers.0.rotary", "fp32"), ("logits", "bf16")]
)
def test_a_record_of_something_that_was_not_expected_fails_and_is_named(comparison, probe, dtype):
    comparison.more.append(
        comparison.records["logits", "fp32", ACCUMULATED].model_copy(update={"probe": probe, "dtype": dtype})
    )
    assert comparison.outcome() == FAIL
    judgement = comparison.judge()
    assert [(row.probe, row.dtype, row.failed) for row in judgement.rows if row.status == "extra"] == [
        (probe, dtype, ("hygiene",))
    ]
    assert judgement.coverage.compared == judgement.coverage.expected
    assert judgement.first_failing is not None
    assert (judgement.first_failing.probe, judgement.first_failing.dtype) == (probe, dtype)
    assert judgement.first_failing.detail


@pytest.mark.parametrize("changes", [{}, {"mean_abs": 0.0}, {"observation": "nonfinite"}])
def test_two_records_of_one_probe_are_refused(comparison, changes):
    twin = comparison.records["layers.1", "fp32", ISOLATED]
    comparison.more.append(twin.model_copy(update=changes))
    with pytest.raises(ReportError, match=r"two rows claim to be layers\.1 \(fp32, isolated\)"):
        comparison.judge()
    comparison.more = []
    assert comparison.outcome() == PASS


# --- inputs and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["padding", "window"])
def test_inputs_that_do_not_exercise_a_feature_are_not_enough(comparison, feature):
    assert comparison.needing(padding=True, window=True).outcome() == PASS
    comparison.needing(**({"padding": True, "window": True} | {feature: False}))
    assert comparison.outcome() == NOT_COMPARED
    judgement = comparison.judge()
    assert judgement.coverage.missing == (f"the inputs do not exercise: {feature}",)
    assert judgement.first_failing.detail == f"the inputs do not exercise: {feature}"
    assert judgement.first_failing.probe == ""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_that_were_not_checked_are_not_compared(both, dtype):
    del both.weights[dtype]
    assert both.outcome() == NOT_COMPARED
    coverage = both.judge().coverage
    assert coverage.missing == (f"weights ({dtype}): 0 of {WEIGHTS} compared",)
    assert (coverage.weights_expected, coverage.weights_compared) == (2 * WEIGHTS, WEIGHTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"compared": WEIGHTS - 1},
        {"compared": 0},
        {"expected": WEIGHTS - 1, "compared": WEIGHTS - 1},
        {"expected": WEIGHTS + 1},
    ],
)
def test_a_weight_check_of_too_few_weights_is_not_compared(comparison, changes):
    comparison.weights["fp32"] = comparison.checked("fp32", **changes)
    assert comparison.outcome() == NOT_COMPARED
    assert comparison.judge().coverage.missing[0].startswith("weights (fp32): ")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("problem", ["values", "shape", "dtype", "missing", "unmapped"])
def test_a_weight_that_differs_fails_although_every_row_passes(both, dtype, problem):
    both.weights[dtype] = both.checked(dtype, difference(dtype=dtype, problem=problem))
    assert both.outcome() == FAIL
    judgement = both.judge()
    assert {row.status for row in judgement.rows} == {"pass"}
    first = judgement.first_failing
    assert (first.probe, first.dtype, first.status, first.mode) == ("layers.1.attn", dtype, "weights", None)
    assert "`model.layers.1.attn.Wo.weight`" in first.detail
    assert "without the transpose" in first.detail


def test_two_weight_checks_of_one_dtype_are_refused(comparison):
    comparison.weights["again"] = comparison.checked("fp32")
    with pytest.raises(ReportError, match="two weight checks claim the same dtype"):
        comparison.judge()


# --- isolated rows decide what rounding may explain -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rel_l2": 1.0},
        {"rel_l2": None},
        {"candidate_error": 1.0},
        {"candidate_error": None},
        {"observation": "nonfinite"},
        {"observation": "shape_mismatch"},
    ],
)
def test_a_part_that_is_wrong_by_itself_turns_explained_rows_into_failures(comparison, changes):
    comparison.over_contract("layers.2", ACCUMULATED).over_contract("final_norm", ACCUMULATED)
    assert comparison.row("layers.2", ACCUMULATED).status == "explained"
    comparison.wrong("layers.1.attn", ISOLATED, **changes)
    assert comparison.row("layers.2", ACCUMULATED).status == "fail"
    assert comparison.row("final_norm", ACCUMULATED).status == "fail"
    assert comparison.row("layers.0", ACCUMULATED).status == "pass"
    assert comparison.outcome() == FAIL  # also where the part itself is only missing


def test_a_wrong_part_leaves_the_overruns_of_other_parts_explained(comparison):
    # A part's own inputs are the reference's: what is wrong elsewhere cannot have reached it.
    comparison.over_contract("layers.0.attn", ISOLATED).over_null("layers.1.attn", ISOLATED)
    assert comparison.outcome() == FAIL
    assert comparison.row("layers.0.attn", ISOLATED).status == "explained"
    assert first(comparison) == ("layers.1.attn", ISOLATED, "fp32")


def test_an_overrun_is_not_explained_while_a_part_was_not_looked_at(comparison):
    comparison.over_contract("layers.2", ACCUMULATED)
    del comparison.records["layers.1.attn", "fp32", ISOLATED]
    assert comparison.row("layers.2", ACCUMULATED).status == "fail"
    assert comparison.outcome()[0] not in ("PASS", "EXPLAINED")


def test_a_wrong_part_in_one_dtype_leaves_the_rows_of_the_other_explained(both):
    both.over_contract("layers.2", ACCUMULATED, "bf16").over_contract("layers.2", ACCUMULATED, "fp32")
    both.over_null("layers.1.attn", ISOLATED, "bf16")
    assert both.row("layers.2", ACCUMULATED, "bf16").status == "fail"
    assert both.row("layers.2", ACCUMULATED, "fp32").status == "explained"


def test_an_explained_part_leaves_other_rows_explained(comparison):
    comparison.over_contract("layers.1.attn", ISOLATED).over_contract("layers.2", ACCUMULATED)
    assert comparison.row("layers.2", ACCUMULATED).status == "explained"
    assert comparison.outcome() == EXPLAINED


def test_an_accumulated_failure_alone_leaves_other_rows_explained(comparison):
    comparison.over_null("layers.1", ACCUMULATED).over_contract("layers.2", ACCUMULATED)
    assert comparison.row("layers.2", ACCUMULATED).status == "explained"
    assert comparison.outcome() == FAIL


# --- the first place to look at ---------------------------------------------------------------------------------------


def test_the_first_failing_probe_is_the_earliest_that_is_wrong_by_itself(comparison):
    # The error enters in layer 1 and is seen, end to end, from there on; later modules are wrong by themselves too.
    for probe in ("final_norm", "head", "layers.2.mlp", "layers.1.mlp", "layers.1.attn"):
        comparison.over_null(probe, ISOLATED)
    for probe in ("embeddings", "layers.0.attn", "layers.2"):
        comparison.over_null(probe, ACCUMULATED)
    assert first(comparison) == ("layers.1.attn", ISOLATED, "fp32")


def test_execution_order_decides_and_not_the_alphabet(comparison):
    comparison.over_null("final_norm", ISOLATED).over_null("layers.2", ISOLATED)
    assert first(comparison) == ("layers.2", ISOLATED, "fp32")


def test_without_a_wrong_part_the_earliest_accumulated_failure_is_named(comparison):
    comparison.over_null("logits", ACCUMULATED).over_null("layers.2.attn", ACCUMULATED)
    comparison.over_contract("embeddings", ACCUMULATED).over_contract("layers.0.attn", ISOLATED)
    del comparison.records["layers.1", "fp32", ACCUMULATED]
    assert first(comparison) == ("layers.2.attn", ACCUMULATED, "fp32")


def test_without_a_failure_the_earliest_missing_row_is_named(comparison):
    comparison.over_contract("embeddings", ACCUMULATED)
    del comparison.records["head", "fp32", ACCUMULATED]
    del comparison.records["layers.2.mlp", "fp32", ACCUMULATED]
    assert first(comparison) == ("layers.2.mlp", ACCUMULATED, "fp32")


def test_with_explained_rows_only_the_earliest_of_them_is_named(comparison):
    comparison.over_contract("layers.2", ACCUMULATED).over_contract("layers.1.mlp", ACCUMULATED)
    assert first(comparison) == ("layers.1.mlp", ACCUMULATED, "fp32")


def test_fp32_is_looked_at_before_bf16(both):
    both.over_null("embeddings", ISOLATED, "bf16").over_null("logits", ACCUMULATED, "fp32")
    assert first(both) == ("logits", ACCUMULATED, "fp32")


def test_what_is_only_explained_or_missing_in_fp32_never_hides_a_bf16_failure(both):
    both.over_null("layers.1.attn", ISOLATED, "bf16")
    assert first(both) == ("layers.1.attn", ISOLATED, "bf16")
    both.over_contract("logits", ACCUMULATED, "fp32")
    assert first(both) == ("layers.1.attn", ISOLATED, "bf16")
    del both.records["embeddings", "fp32", ACCUMULATED]
    assert first(both) == ("layers.1.attn", ISOLATED, "bf16")


def test_a_differing_weight_is_a_place_where_the_error_enters(comparison):
    comparison.over_null("layers.1.mlp", ISOLATED)
    comparison.weights["fp32"] = comparison.checked("fp32", difference("head"), difference("layers.1.attn"))
    assert first(comparison) == ("layers.1.attn", None, "fp32")
    comparison.over_null("layers.0.attn", ISOLATED)
    assert first(comparison) == ("layers.0.attn", ISOLATED, "fp32")


def test_reasons_are_given_in_figures(comparison):
    comparison.over_contract("layers.1", ACCUMULATED).over_null("layers.2", ACCUMULATED)
    assert explain(comparison.row("layers.0", ACCUMULATED)) == "within every criterion"
    text = explain(comparison.row("layers.1", ACCUMULATED))
    assert re.fullmatch(r"mean_abs 3\.0+e-05 exceeds the contract's 1e-05, but is within what rounding explains", text)
    comparison.errors("layers.1.attn", ISOLATED, candidate=3.25, reference=1.0)
    text = explain(comparison.row("layers.1.attn", ISOLATED))
    assert text == "its error against the float64 oracle is the reference's 3.25 times, more than 1.5"
    comparison.over_null("layers.1.attn", ISOLATED).over_contract("layers.1.attn", ISOLATED)
    kinds = [part.split()[0] for part in explain(comparison.row("layers.1.attn", ISOLATED)).split(", ")]
    assert kinds[0] == "mean_abs"
    assert [kind for kind in kinds if kind in ("mean_abs", "its", "rel_l2")] == ["mean_abs", "its", "rel_l2"]
    row = comparison.row("layers.2", ACCUMULATED)
    found = re.fullmatch(r"rel_l2 (\S+) exceeds (\S+), the most rounding explains", explain(row))
    assert [float(figure) for figure in found.groups()] == pytest.approx([row.rel_l2, row.direct_limit], rel=1e-2)


# --- judging again ----------------------------------------------------------------------------------------------------


def test_judging_judged_rows_again_gives_the_same_judgement(both):
    both.over_contract("layers.2", ACCUMULATED).over_null("layers.1", ACCUMULATED, "bf16")
    once = both.judge()
    assert judge(once.rows, list(both.weights.values()), both.expectation, TOLERANCES, "contract") == once


def test_what_a_report_says_about_its_own_rows_is_ignored(comparison):
    comparison.over_null("layers.1.attn", ISOLATED).over_noise("layers.2.attn", ISOLATED)
    honest = comparison.judge()
    assert comparison.row("layers.2.attn", ISOLATED).failed == ("noise",)
    forged = [
        row.model_copy(
            update={
                "status": "pass",
                "failed": (),
                "contract": False,
                "contract_limit": 1.0,
                "direct_limit": 9.0,
                "null_ratio": 0.0,
                "noise_ratio": 0.0,
                "noise_limit": 99.0,
            }
        )
        for row in honest.rows
    ]
    again = judge(forged, list(comparison.weights.values()), comparison.expectation, TOLERANCES, "contract")
    assert again == honest
    assert again.verdict == "FAIL"


def test_the_order_of_the_records_changes_nothing(both):
    both.over_null("layers.2.mlp", ISOLATED, "bf16").over_contract("layers.1", ACCUMULATED)
    ordered = both.judge()
    both.records = dict(reversed(both.records.items()))
    both.weights = dict(reversed(both.weights.items()))
    assert both.judge() == ordered


# --- whatever is mixed ------------------------------------------------------------------------------------------------

WRONGS = {
    "over_contract": lambda c, key: c.over_contract(key[0], key[2], key[1]),
    "over_null": lambda c, key: c.over_null(key[0], key[2], key[1]),
    "over_noise": lambda c, key: c.over_noise(key[0], key[2], key[1]),
    "no_oracle": lambda c, key: c.wrong(key[0], key[2], key[1], reference_error=None),
    "no_rel_l2": lambda c, key: c.wrong(key[0], key[2], key[1], rel_l2=None),
    "nonfinite": lambda c, key: c.wrong(key[0], key[2], key[1], observation="nonfinite", reason="nan"),
    "shape": lambda c, key: c.wrong(key[0], key[2], key[1], observation="shape_mismatch", reason="shapes"),
    "dropped": lambda c, key: c.records.pop(key),
    "empty": lambda c, key: c.wrong(key[0], key[2], key[1], observation="empty", reason="no tensor"),
}


@settings(max_examples=150)
@given(data=st.data(), dtype=st.sampled_from(["fp32", "bf16"]), fixture=st.sampled_from(["tiny", "large", None]))
def test_whatever_goes_wrong_the_verdict_follows_from_the_worst(probes, data, dtype, fixture):
    comparison = Comparison(probes, RUNS[dtype], fixture)
    keys = st.sampled_from(sorted(comparison.records))
    wrongs = data.draw(st.dictionaries(keys, st.sampled_from(sorted(WRONGS)), max_size=5))
    weights = data.draw(st.sampled_from(["equal", "equal", "equal", "differ", "unchecked"]))
    window = data.draw(st.sampled_from([True, True, True, False]))
    in_contract = {(r.probe, r.dtype, r.mode) for r in comparison.judge().rows if r.contract}
    for key, wrong in wrongs.items():
        WRONGS[wrong](comparison, key)
    comparison.needing(window=window)
    if weights == "differ":
        comparison.weights[dtype] = comparison.checked(dtype, difference(dtype=dtype))
    elif weights == "unchecked":
        del comparison.weights[dtype]

    overruns = {key for key, wrong in wrongs.items() if wrong == "over_contract" and key in in_contract}
    unseen = {key for key, wrong in wrongs.items() if wrong in ("dropped", "empty", "no_oracle")}
    broken = {key for key, wrong in wrongs.items() if wrong != "over_contract"} - unseen
    unclean = {dtype for _, dtype, mode in broken | unseen if mode == ISOLATED}
    failing = broken | {key for key in overruns if key[2] == ACCUMULATED and key[1] in unclean}
    if failing or weights == "differ":
        expected = FAIL
    elif unseen or weights == "unchecked" or not window:
        expected = NOT_COMPARED
    else:
        expected = EXPLAINED if overruns else PASS

    assert comparison.outcome() == expected
    judgement = comparison.judge()
    assert len(judgement.rows) == judgement.coverage.expected
    assert {(r.probe, r.dtype, r.mode) for r in judgement.rows if r.status == "missing"} == unseen
    place = judgement.first_failing
    assert (place is None) == (expected == PASS)
    assert place is None or place.detail
    if expected == FAIL:
        assert place.status not in ("explained", "missing")
    if failing and weights != "differ":
        run = next(d for d in RUNS[dtype] if any(key[1] == d for key in failing))
        isolated = [probe for probe, d, mode in failing if d == run and mode == ISOLATED]
        everywhere = [probe for probe, d, _ in failing if d == run]
        assert place.dtype == run
        assert place.probe == min(isolated or everywhere, key=list(comparison.probes).index)


SIZES = st.one_of(st.floats(0, 1), st.floats(0, 1e-6))  # around the limits and far beyond


@settings(max_examples=300)
@given(value=SIZES, null=st.one_of(st.none(), SIZES), mean=SIZES, ours=SIZES, theirs=SIZES, rms=SIZES)
def test_a_row_passes_exactly_when_all_criteria_hold(probes, value, null, mean, ours, theirs, rms):
    comparison = Comparison(probes).wrong(
        "logits",
        ACCUMULATED,
        rel_l2=value,
        mean_abs=mean,
        null_rel_l2=null,
        candidate_error=ours,
        reference_error=theirs,
        reference_rms=rms,
    )
    floor = 2.0**-24 * (1 + np.sqrt(8))
    direct = value / max(null or 0, floor) <= 2
    noise = ours <= 0.25 * 2.0**-24 * rms or (theirs > 0 and ours / theirs <= 1.5)
    expected = FAIL if not (direct and noise) else PASS if mean <= 1e-5 else EXPLAINED
    assert comparison.outcome() == expected


def test_every_policy_is_known():
    assert POLICIES == ("contract", "noise-aware")


# --- limits of the project's own ---


def own(**fields):
    return Override(
        **({"probe": "layers.*.attn", "dtype": "fp32", "criterion": "direct", "limit": 4.0, "reason": "why"} | fields)
    )


def judged_with(comparison, *overrides):
    return judge(
        [*comparison.records.values()],
        [*comparison.weights.values()],
        comparison.expectation,
        TOLERANCES,
        "contract",
        overrides,
    )


def test_an_own_limit_decides_for_the_rows_it_names_and_no_other(comparison):
    comparison.over_null("layers.1.attn", ISOLATED).over_null("layers.1.mlp", ISOLATED)
    judged = judged_with(comparison, own(mode="isolated"))
    status = {(row.probe, row.mode): (row.status, row.overridden) for row in judged.rows}
    assert status["layers.1.attn", ISOLATED] == ("pass", ("direct",))
    assert [row.probe for row in judged.rows if row.waived] == ["layers.1.attn"]
    assert only_by_own_limits(judged.rows).startswith("1 of ")
    assert status["layers.1.attn", ACCUMULATED] == ("pass", ())
    assert status["layers.1.mlp", ISOLATED] == ("fail", ())
    assert "beyond the installed limit of direct" in explain(next(row for row in judged.rows if row.waived))


def test_an_own_limit_that_changes_nothing_waives_nothing(comparison):
    judged = judged_with(comparison, own(), own(criterion="noise", limit=9), own(criterion="contract", limit=1))
    assert not any(row.waived for row in judged.rows)
    assert only_by_own_limits(judged.rows) == ""
    assert "this project's own limit of" in explain(next(row for row in judged.rows if row.overridden))


def test_an_own_limit_may_be_tighter(comparison):
    assert judged_with(comparison).verdict == "PASS"
    assert judged_with(comparison, own(limit=1e-6)).verdict == "FAIL"
    assert judged_with(comparison, own(criterion="noise", limit=1e-6)).verdict == "FAIL"
    assert judged_with(comparison, own(criterion="contract", limit=1e-12)).verdict == "EXPLAINED"


def test_an_own_contract_puts_a_row_under_contract(probes):
    comparison = Comparison(probes, ("fp32", "bf16"))
    logits = own(probe="logits", dtype="bf16", criterion="contract", limit=0.5)
    row = next(
        row
        for row in judged_with(comparison, logits).rows
        if (row.probe, row.dtype, row.mode) == ("logits", "bf16", ACCUMULATED)
    )
    assert (row.contract, row.contract_limit) == (True, 0.5)


def test_no_own_limit_touches_hygiene_coverage_or_weights(comparison):
    comparison.wrong("layers.1.attn", ISOLATED, observation="nonfinite", reason="NaN")
    every = [own(criterion=criterion, limit=1e9) for criterion in ("contract", "noise", "direct")]
    assert judged_with(comparison, *every).verdict == "FAIL"
    del comparison.records["layers.1.attn", "fp32", ISOLATED]
    assert judged_with(comparison, *every).verdict == "NOT_COMPARED"


def test_two_own_limits_of_one_row_are_refused(comparison):
    with pytest.raises(UsageError, match="two tolerance overrides"):
        judged_with(comparison, own(), own(probe="layers.1.attn"))


def test_own_limits_are_listed_with_the_rows_they_decided(comparison):
    applied = judged_with(comparison, own(), own(probe="layer.*.attn"), own(probe="layers.*")).overrides
    layers = sum(name.count(".") == 1 for name in comparison.probes)
    assert [override.rows for override in applied] == [2 * layers, 0, 2 * layers]


def test_a_star_does_not_reach_over_a_dot():
    assert own(probe="layers.*").covers("layers.3", "fp32", ISOLATED, "forward")
    assert not own(probe="layers.*").covers("layers.3.attn", "fp32", ISOLATED, "forward")
    assert not own().covers("layers.3.attn", "bf16", ISOLATED, "forward")
    assert not own().covers("layers.3.attn", "fp32", ISOLATED, "backward")
