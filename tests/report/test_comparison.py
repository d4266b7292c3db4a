"""What changed between two reports: every kind of change is seen, and nothing is said where nothing changed."""

import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from modernbert_align.core.rows import Record, WeightDifference
from modernbert_align.core.tolerance import AppliedOverride
from modernbert_align.core.trace import Machine
from modernbert_align.errors import UsageError
from modernbert_align.report.comparison import NOISE, Comparison, compare_reports
from modernbert_align.report.comparison_terminal import movement, print_comparison
from modernbert_align.report.schema import TraceInfo

ATTN = ("layers.1.attn", "bf16", "isolated")
OUTPUT = ("output", "bf16", "accumulated")
NULL = 3.90625e-3 + 2**-24 * 8  # of bf16 rows in these reports: one rounding and the widest sum
LIMIT = 2 * NULL
ROUNDING = 3.90625e-3


def names(rows):
    return [(row.probe, row.dtype, row.mode) for row in rows]


def test_report_compared_with_itself_has_nothing_to_say(make_report, broken_attention):
    for report in (make_report(), make_report(changes=broken_attention)):
        comparison = compare_reports(report, report)
        assert comparison.exit_code == 0
        assert comparison.rows_equal == comparison.rows_compared == len(report.rows)
        for said in ("regressions", "improvements", "added", "removed", "lost", "tolerances", "environment"):
            assert getattr(comparison, said) == ()
        assert comparison.largest_growth == 0
        assert movement(comparison) == "both files are the same report"


def test_worse_status_is_a_regression(make_report, broken_attention):
    comparison = compare_reports(make_report(), make_report(changes=broken_attention))
    assert comparison.exit_code == 1
    assert set(names(comparison.regressions)) == set(broken_attention)
    worst = comparison.regressions[0]
    assert (worst.old_status, worst.new_status) == ("pass", "fail")
    assert "status" in worst.reasons
    assert (comparison.old.verdict, comparison.new.verdict) == ("PASS", "FAIL")
    assert comparison.new.first_failing.startswith("layers.1.attn (fp32)")


@pytest.mark.parametrize(("fixture", "code"), [("tiny", 1), (None, 0)])
def test_overrun_that_rounding_explains_is_a_regression_where_the_contract_decides(make_report, fixture, code):
    place = ("layers.2", "bf16", "accumulated")

    def with_error(mean_abs):
        report = make_report(changes={place: {"mean_abs": mean_abs}}, fixture=fixture)
        return report.model_copy(update={"model": report.model.model_copy(update={"fixture": fixture})})

    comparison = compare_reports(with_error(9.9e-4), with_error(1.01e-3))
    assert (comparison.old.verdict, comparison.new.verdict) == ("PASS", "EXPLAINED")
    assert names(comparison.regressions) == ([place] if code else [])
    assert [row.reasons for row in comparison.regressions] == ([("status",)] if code else [])
    assert comparison.exit_code == code


@pytest.mark.parametrize(("share", "code"), [(0.9 * NOISE, 0), (1.1 * NOISE, 1)])
def test_error_that_passes_may_grow_by_the_noise_and_no_more(make_report, share, code):
    old = make_report(changes={ATTN: {"rel_l2": 0.1 * LIMIT}})
    new = make_report(changes={ATTN: {"rel_l2": (0.1 + share) * LIMIT}})
    comparison = compare_reports(old, new)
    assert new.verdict == "PASS"
    assert comparison.exit_code == code
    assert comparison.largest_growth == pytest.approx(share)
    assert [row.reasons for row in comparison.regressions] == ([("direct",)] if code else [])
    assert comparison.rows_equal == comparison.rows_compared - 1


@pytest.mark.parametrize(("share", "code"), [(0.9 * NOISE, 0), (1.1 * NOISE, 1)])
def test_distance_from_the_oracle_may_grow_by_the_noise_and_no_more(make_report, share, code):
    own = 0.3 * ROUNDING * 0.98  # the reference's
    old = make_report(changes={ATTN: {"candidate_error": 0.5 * own}})
    new = make_report(changes={ATTN: {"candidate_error": own * (0.5 + 1.5 * share)}})
    comparison = compare_reports(old, new)
    assert new.verdict == "PASS"
    assert comparison.exit_code == code
    assert [row.reasons for row in comparison.regressions] == ([("oracle",)] if code else [])


def test_null_that_grew_does_not_hide_an_error_that_grew(make_report):
    old = make_report(changes={ATTN: {"rel_l2": 0.1 * LIMIT}})
    new = make_report(changes={ATTN: {"rel_l2": 0.9 * LIMIT, "null_rel_l2": 9 * NULL}})
    assert names(compare_reports(old, new).regressions) == [ATTN]


def test_reference_that_got_worse_too_does_not_hide_a_larger_distance_from_the_oracle(make_report):
    own = 0.3 * ROUNDING * 0.98
    old = make_report(changes={ATTN: {"candidate_error": own, "reference_error": own}})
    new = make_report(changes={ATTN: {"candidate_error": 2 * own, "reference_error": 2 * own}})
    assert [row.reasons for row in compare_reports(old, new).regressions] == [("oracle",)]


def test_projects_own_limit_does_not_hide_an_error_that_grew(make_report):
    own = AppliedOverride(
        probe=ATTN[0], dtype="bf16", criterion="direct", limit=50.0, reason="known", rows=1, mode="isolated"
    )

    def with_override(rel_l2):
        report = make_report(changes={ATTN: {"rel_l2": rel_l2}})
        rows = tuple(
            row.model_copy(update={"direct_limit": 50 * NULL}) if (row.probe, row.dtype, row.mode) == ATTN else row
            for row in report.rows
        )
        return report.model_copy(update={"rows": rows, "overrides": (own,)})

    comparison = compare_reports(with_override(0.1 * LIMIT), with_override(0.9 * LIMIT))
    assert names(comparison.regressions) == [ATTN]


def test_smaller_error_is_an_improvement(make_report, broken_attention):
    comparison = compare_reports(make_report(changes=broken_attention), make_report())
    assert comparison.exit_code == 0
    assert comparison.regressions == ()
    assert set(names(comparison.improvements)) == set(broken_attention)


def test_row_that_is_gone_exits_5(make_report):
    comparison = compare_reports(make_report(), make_report(changes={OUTPUT: None}))
    assert names(comparison.removed) == [OUTPUT]
    assert comparison.exit_code == 5


def test_row_that_is_gone_does_not_outweigh_one_that_got_worse(make_report, broken_attention):
    comparison = compare_reports(make_report(), make_report(changes={**broken_attention, OUTPUT: None}))
    assert names(comparison.removed) == [OUTPUT]
    assert comparison.exit_code == 1


def test_row_that_is_new_is_told(make_report):
    comparison = compare_reports(make_report(changes={OUTPUT: None}), make_report())
    assert names(comparison.added) == [OUTPUT]
    assert comparison.exit_code == 0


def test_row_that_is_new_and_fails_exits_1(make_report):
    wrong = {"rel_l2": 2 * LIMIT}
    comparison = compare_reports(make_report(changes={OUTPUT: None}), make_report(changes={OUTPUT: wrong}))
    assert names(comparison.added_failing) == [OUTPUT]
    assert comparison.exit_code == 1


def test_row_that_nobody_expected_exits_1(make_report):
    stray = Record(probe="stray", dtype="fp32", mode="isolated", observation="extra", reason="not known")
    comparison = compare_reports(make_report(), make_report(extra=[stray]))
    assert names(comparison.added_failing) == [("stray", "fp32", "isolated")]
    assert comparison.exit_code == 1


def test_dtype_that_is_gone_counts_as_removed_rows(make_report):
    whole = make_report()
    fp32 = whole.model_copy(update={"dtype": "fp32", "rows": tuple(row for row in whole.rows if row.dtype == "fp32")})
    gone = compare_reports(whole, fp32)
    assert {row.dtype for row in gone.removed} == {"bf16"}
    assert gone.exit_code == 5
    assert compare_reports(fp32, whole).exit_code == 0


def test_reports_without_a_common_row_exit_5(make_report):
    every = [(row.probe, row.dtype, row.mode) for row in make_report().rows]
    empty = make_report(changes=dict.fromkeys(every))
    comparison = compare_reports(empty, make_report())
    assert comparison.rows_compared == 0
    assert comparison.exit_code == 5


def test_weight_that_differs_now_exits_1(make_report):
    wrong = WeightDifference(paddle="p.weight", hf="h.weight", probe="head", dtype="fp32", problem="values")
    broken, whole = make_report(differences=[wrong]), make_report()
    comparison = compare_reports(whole, broken)
    assert comparison.weights_worse == ("p.weight (fp32): values",)
    assert comparison.exit_code == 1
    back = compare_reports(broken, whole)
    assert (back.weights_better, back.exit_code) == (("p.weight (fp32): values",), 0)


def test_weights_that_are_no_longer_compared_exit_5(make_report):
    whole = make_report()
    fewer = tuple(check.model_copy(update={"compared": check.compared - 1}) for check in whole.weights)
    comparison = compare_reports(whole, whole.model_copy(update={"weights": fewer}))
    assert comparison.lost == ("weights (fp32): 5 compared, 6 before", "weights (bf16): 5 compared, 6 before")
    assert comparison.exit_code == 5


def test_inputs_that_no_longer_exercise_something_exit_5(make_report):
    comparison = compare_reports(make_report(needs={"padding": True}), make_report(needs={"padding": False}))
    assert comparison.lost == ("the inputs do not exercise: padding",)
    assert comparison.exit_code == 5


def test_environment_is_told_and_decides_nothing(make_report):
    old = make_report()
    machine = {"cpu": "another CPU", "torch_threads": 1, "versions": {"torch": "2.14.0", "numpy": "2.0"}}
    new = make_report(
        environment=old.environment.model_copy(update=machine),
        model=old.model.model_copy(update={"table_sha256": "f" * 64, "candidate_sha256": "e" * 64}),
    )
    comparison = compare_reports(old, new)
    assert {s.name: (s.old, s.new) for s in comparison.environment} == {
        "model.candidate_sha256": ("b" * 64, "e" * 64),
        "model.table_sha256": ("c" * 64, "f" * 64),
        "environment.versions.torch": ("2.13.0", "2.14.0"),
        "environment.versions.paddlepaddle": ("3.3.1", None),
        "environment.versions.numpy": (None, "2.0"),
        "environment.cpu": ("a CPU", "another CPU"),
        "environment.torch_threads": (2, 1),
    }
    assert comparison.exit_code == 0


def test_machine_of_a_trace_is_told_by_its_side(make_report):
    def traced(cpu):
        machine = Machine(
            versions={"torch": "2.13.0"}, platform="Linux", cpu=cpu, cpu_flags=(), pins={}, torch_cpu_capability="AVX2",
            torch_threads=1, paddle_device="",
        )  # fmt: skip
        trace = TraceInfo(
            side="reference", file="a.trace", content_sha256=cpu, created=cpu, tool_version="0.1.0", machine=machine
        )
        report = make_report()
        return report.model_copy(update={"engine": report.engine.model_copy(update={"traces": (trace,)})})

    comparison = compare_reports(traced("one"), traced("two"))
    assert [(s.name, s.old, s.new) for s in comparison.environment] == [
        ("engine.traces.reference.machine.cpu", "one", "two")
    ]


def test_changed_limits_are_told(make_report):
    old = make_report()
    own = AppliedOverride(probe="logits", dtype="bf16", criterion="direct", limit=3.0, reason="known", rows=2)
    lax = tuple(threshold.model_copy(update={"value": 1e-4}) for threshold in old.thresholds)
    comparison = compare_reports(old, old.model_copy(update={"thresholds": lax, "overrides": (own,)}))
    assert {s.name: (s.old, s.new) for s in comparison.tolerances} == {
        "fp32 contract mean_abs": (1e-5, 1e-4),
        "override logits (bf16, both modes) direct": (None, "3: known"),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phase": "backward"}, "phase forward and backward"),
        ({"phase": "step", "steps": 3}, "phase forward and step, steps None and 3"),
    ],
)
def test_reports_of_different_comparisons_are_refused(make_report, change, said):
    with pytest.raises(UsageError, match=said):
        compare_reports(make_report(), make_report().model_copy(update=change))


def test_reports_of_different_models_and_heads_are_refused(make_report):
    old = make_report()
    new = old.model_copy(update={"model": old.model.model_copy(update={"name": "base", "head": "base"})})
    with pytest.raises(UsageError, match="model tiny and base, head masked_lm and base"):
        compare_reports(old, new)


CHANGES = st.dictionaries(
    st.sampled_from([ATTN, OUTPUT, ("layers.0", "fp32", "accumulated"), ("head", "fp32", "isolated")]),
    st.fixed_dictionaries(
        {},
        optional={
            "rel_l2": st.floats(0, 1),
            "mean_abs": st.floats(0, 1),
            "candidate_error": st.floats(0, 1),
            "reference_error": st.floats(0, 1),
            "null_rel_l2": st.floats(0, 1),
            "observation": st.sampled_from(["compared", "nonfinite", "shape_mismatch", "missing"]),
            "elements": st.sampled_from([1, 50, 4095, 21888]),
        },
    ),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=CHANGES, b=CHANGES)
def test_what_is_worse_one_way_is_better_the_other(make_report, a, b):
    old, new = make_report(layers=2, changes=a), make_report(layers=2, changes=b)
    there, back = compare_reports(old, new), compare_reports(new, old)
    worse = {(*place, row.reasons) for place, row in zip(names(there.regressions), there.regressions, strict=True)}
    better = {(*place, row.reasons) for place, row in zip(names(back.improvements), back.improvements, strict=True)}
    assert worse == better
    assert names(there.removed) == names([row for row in back.added if row.status != "extra"])
    assert there.rows_compared == back.rows_compared
    assert compare_reports(new, new).exit_code in ((0,) if there.rows_compared else (0, 5))
    assert Comparison.model_validate_json(there.model_dump_json()) == there


def test_number_that_is_not_finite_can_still_be_written(make_report):
    new = make_report(changes={ATTN: {"rel_l2": float("inf"), "candidate_error": float("nan")}})
    comparison = compare_reports(make_report(), new)
    assert names(comparison.regressions) == [ATTN]
    assert comparison.regressions[0].new_rel_l2 is None


def test_terminal_shows_the_ten_worst_rows_in_80_columns(make_report):
    probes = {row.probe for row in make_report().rows if row.dtype == "bf16"}
    wrong = {(probe, "bf16", "isolated"): {"rel_l2": LIMIT * (2 + n)} for n, probe in enumerate(sorted(probes))}
    comparison = compare_reports(make_report(), make_report(changes=wrong))
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    rows = [line for line in lines if "pass -> fail" in line]
    assert len(rows) == 10
    assert max(map(len, rows)) <= 80
    assert f"and {len(wrong) - 10} more rows worse" in lines
    assert lines[-1] == f"{len(wrong)} worse  tiny masked_lm bf16 forward, exit 1"


def test_words_from_a_report_cannot_move_the_cursor(make_report):
    old = make_report()
    hostile = old.environment.model_copy(update={"cpu": "\x1b[2Jnothing\nworse"})
    stray = Record(probe="\x1b[1A", dtype="fp32", mode="isolated", observation="extra", reason="a\nb")
    out = io.StringIO()
    print_comparison(compare_reports(old, make_report(environment=hostile, extra=[stray])), Console(file=out, width=80))
    assert "\x1b" not in out.getvalue()
    assert "changed: environment.cpu: a CPU -> \\x1b[2Jnothing\\nworse" in out.getvalue().splitlines()
