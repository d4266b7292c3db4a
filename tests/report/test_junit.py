"""JUnit XML, read by those who read it: an XML Schema, junitparser, xmllint where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hostile import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml
from lxml import etree

from modernbert_align.core.rows import Record, WeightCheck, WeightDifference
from modernbert_align.core.text import one_line
from modernbert_align.core.tolerance import Override
from modernbert_align.report.junit import render_junit

XSD = Path(__file__).resolve().parents[2] / "docs" / "junit.xsd"
SCHEMA = etree.XMLSchema(etree.parse(XSD))
WRONG = {"mean_abs": 4e-3, "max_abs": 0.3, "rel_l2": 0.08, "candidate_error": 0.0784}
OVER = {"mean_abs": 2e-5}  # over the contract, within what rounding explains
UNSEEN = {"observation": "missing", "reason": "the candidate has no such module"}


def read(report):
    """The report as junitparser reads it; it must be valid and its counts must be those of its cases."""
    text = render_junit(report)
    SCHEMA.assertValid(etree.fromstring(text.encode()))
    counted = JUnitXml.fromstring(text.encode())
    for suite in counted:
        suite.update_statistics()
    counted.update_statistics()
    read = JUnitXml.fromstring(text.encode())
    for said, counts in zip((read, *read), (counted, *counted), strict=True):
        for name in ("tests", "failures", "errors", "skipped"):
            assert getattr(said, name) == getattr(counts, name), (said.name, name)
    return read


def cases(read):
    return {(case.classname, case.name): case for suite in read for case in suite}


def difference(**changes):
    made = {"paddle": "decoder.weight", "hf": "decoder.w", "probe": "logits", "dtype": "fp32", "problem": "values"}
    return WeightDifference(
        **(made | {"differing": 7, "elements": 64, "max_abs": 0.5, "looks": "transposed"} | changes)
    )


def test_every_probe_is_a_case_of_its_dtype_and_mode(make_report):
    report = make_report()
    found = cases(read(report))
    for row in report.rows:
        assert found.pop((f"tiny.masked_lm.forward.{row.dtype}.{row.mode}", row.probe)).is_passed
    assert set(found) == {
        ("tiny.masked_lm.forward.verdict", "verdict"),
        ("tiny.masked_lm.forward.weights", "fp32"),
        ("tiny.masked_lm.forward.weights", "bf16"),
    }


def test_losses_are_suites_of_their_own(make_report):
    report = make_report()
    rows = [
        row.model_copy(update={"phase": "backward", "loss": loss}) for row in report.rows for loss in ("head", None)
    ]
    names = [suite.name for suite in read(report.model_copy(update={"rows": tuple(rows), "phase": "backward"}))]
    assert "tiny.masked_lm.backward.bf16.head_loss.isolated" in names
    assert "tiny.masked_lm.backward.bf16.isolated" in names


def test_a_wrong_value_is_a_failure_that_says_why_and_what_was_measured(make_report, broken_attention):
    report = make_report(changes=broken_attention, hints=("look at the mask",))
    read_back = read(report)
    case = cases(read_back)["tiny.masked_lm.forward.fp32.isolated", "layers.1.attn"]
    (failure,) = case.result
    assert isinstance(failure, Failure)
    assert failure.type == "contract,noise,direct"
    assert failure.message.startswith("mean_abs 4.0000e-03 exceeds the contract's 1e-05")
    assert "mean_abs 4.0000e-03, at most 1.0000e-05" in case.system_out.splitlines()
    (verdict,) = cases(read_back)["tiny.masked_lm.forward.verdict", "verdict"].result
    assert isinstance(verdict, Failure)
    assert "first failing: layers.1.attn (fp32): mean_abs" in verdict.text
    assert "hint: look at the mask" in verdict.text


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (None, "missing"),
        (UNSEEN, "missing"),
        ({"observation": "shape_mismatch", "reason": "shapes differ"}, "shape_mismatch"),
        ({"observation": "dtype_mismatch", "reason": "dtypes differ"}, "dtype_mismatch"),
        ({"observation": "nonfinite", "reason": "a NaN"}, "nonfinite"),
    ],
)
def test_what_could_not_be_compared_is_an_error_and_never_skipped(make_report, change, kind):
    read_back = read(make_report(changes={("logits", "bf16", "isolated"): change}))
    (error,) = cases(read_back)["tiny.masked_lm.forward.bf16.isolated", "logits"].result
    assert isinstance(error, Error)
    assert error.type == kind
    assert error.message
    assert read_back.skipped == 0


def test_a_row_that_nobody_expected_is_an_error(make_report):
    record = Record(probe="layers.9", dtype="fp32", mode="isolated", observation="extra")
    (error,) = cases(read(make_report(extra=[record])))["tiny.masked_lm.forward.fp32.isolated", "layers.9"].result
    assert isinstance(error, Error)
    assert error.type == "extra"


@pytest.mark.parametrize(("fixture", "passed"), [(None, True), ("tiny", False)])
def test_explained_rows_pass_only_where_the_whole_report_does(make_report, fixture, passed):
    report = make_report(changes={("logits", "fp32", "accumulated"): OVER}, fixture=fixture)
    assert report.verdict == "EXPLAINED"
    case = cases(read(report))["tiny.masked_lm.forward.fp32.accumulated", "logits"]
    assert case.is_passed is passed
    assert "within what rounding explains" in (case.system_out if passed else case.result[0].message)


def test_differing_weights_are_listed(make_report):
    read_back = read(make_report(differences=[difference(), difference(paddle="x", problem="shape", max_abs=None)]))
    fp32, bf16 = (cases(read_back)["tiny.masked_lm.forward.weights", dtype] for dtype in ("fp32", "bf16"))
    assert bf16.is_passed
    (failure,) = fp32.result
    assert isinstance(failure, Failure)
    assert failure.type == "shape,values"
    assert (
        "decoder.weight (reference decoder.w): values, 7 of 64 elements, by 5.00e-01 at most, transposed"
        in failure.text
    )


def test_weights_that_were_not_compared_are_an_error(make_report):
    report = make_report()
    few = WeightCheck(dtype="fp32", expected=6, compared=5, differences=())
    found = cases(read(report.model_copy(update={"weights": (few,)})))
    for dtype, message in (("fp32", "5 of 6 weights were compared"), ("bf16", "no weights were compared")):
        (error,) = found["tiny.masked_lm.forward.weights", dtype].result
        assert isinstance(error, Error)
        assert message in error.message


def test_a_gap_that_has_no_row_is_a_case_of_its_own(make_report):
    report = make_report(changes={("logits", "fp32", "isolated"): UNSEEN}, needs={"padding": False})
    read_back = read(report)
    gaps = [case for suite in read_back if suite.name.endswith(".coverage") for case in suite]
    assert [case.name for case in gaps] == ["the inputs do not exercise: padding"], "the missing row has its own case"
    assert isinstance(gaps[0].result[0], Error)
    (verdict,) = cases(read_back)["tiny.masked_lm.forward.verdict", "verdict"].result
    assert isinstance(verdict, Error)
    assert verdict.type == "NOT_COMPARED"


def test_properties_say_what_was_judged_and_where(make_report):
    own = Override(probe="layers.*.mlp", dtype="bf16", criterion="direct", limit=4.0, reason="other kernels")
    verdict, *_ = read(make_report(overrides=[own]))
    found = {p.name: p.value for p in verdict.properties()}
    assert found["verdict"] == "PASS"
    assert found["exit_code"] == "0"
    assert found["policy"] == "contract"
    assert found["candidate_sha256"] == "b" * 64
    assert found["cpu"] == "a CPU"
    assert found["version.torch"] == "2.13.0"
    assert found["execution.fp32"] == "reference native, candidate native"
    assert found["execution.bf16"] == "reference native, candidate emulated"
    assert found["override.0"] == "own limit: layers.*.mlp (bf16, both modes): direct at most 4, 6 rows: other kernels"


def test_a_pass_has_the_time_it_took(make_report):
    times = {suite.name: suite.time for suite in read(make_report(timings_s={"fp32_isolated": 1.25, "bf16_load": 2.0}))}
    assert times["tiny.masked_lm.forward.fp32.isolated"] == 1.25
    assert times["tiny.masked_lm.forward.bf16.isolated"] == 0
    broken = read(make_report(timings_s={"fp32_isolated": float("nan"), "bf16_load": -1.0}))
    assert broken.time == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_breaks_the_file(make_report, text):
    record = Record(probe=text, dtype="fp32", mode="isolated", observation="extra", reason=text)
    report = make_report(extra=[record], differences=[difference(paddle=text, hf=text, looks=text)], hints=(text,))
    model = report.model.model_copy(update={"name": text, "head": text})
    environment = report.environment.model_copy(update={"cpu": text, "versions": {text: text}})
    gaps = report.coverage.model_copy(update={"missing": (text,)})
    hostile = report.model_copy(
        update={"model": model, "environment": environment, "coverage": gaps, "command": text, "created": text}
    )
    read_back = read(hostile)
    (case,) = [c for suite in read_back for c in suite if c.name == one_line(text) and "isolated" in c.classname]
    assert isinstance(case.result[0], Error)
    assert case.classname == one_line(f"{text}.{text}.forward.fp32.isolated")
    properties = {p.name: p.value for suite in read_back for p in suite.properties()}
    assert properties["cpu"] == one_line(text)
    assert properties[one_line(f"version.{text}")] == one_line(text)


def test_names_that_look_the_same_stay_two_cases(make_report):
    twins = [Record(probe=name, dtype="fp32", mode="isolated", observation="extra") for name in ("a\n", "a\\n")]
    found = cases(read(make_report(extra=twins)))
    names = [name for class_name, name in found if class_name.endswith("fp32.isolated")]
    assert names[-2:] == ["a\\n", "a\\n (2)"]


CHANGES = st.sampled_from([None, WRONG, OVER, UNSEEN, {"observation": "nonfinite", "reason": "a NaN"}, {}, {}, {}])
KEYS = st.tuples(
    st.sampled_from(["embeddings", "layers.0.attn", "layers.0", "logits"]),
    st.sampled_from(["fp32", "bf16"]),
    st.sampled_from(["isolated", "accumulated"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(KEYS, CHANGES, max_size=3),
    fixture=st.sampled_from([None, "tiny"]),
    needs=st.sampled_from([None, {"padding": True}, {"padding": False}]),
    differs=st.sampled_from([False, False, True]),
    extra=st.sampled_from([False, False, True]),
)
def test_there_are_failures_or_errors_exactly_where_the_exit_code_is_not_zero(
    make_report, changes, fixture, needs, differs, extra
):
    report = make_report(
        layers=1,
        changes=changes,
        fixture=fixture,
        needs=needs,
        differences=[difference()] if differs else [],
        extra=[Record(probe="more", dtype="fp32", mode="isolated", observation="extra")] if extra else [],
    )
    read_back = read(report)
    assert (read_back.failures + read_back.errors > 0) == (report.exit_code != 0)


def test_a_report_that_stops_a_gate_is_never_all_green(make_report):
    """Even if nothing in it says why, as in a report of a later version."""
    report = make_report().model_copy(update={"verdict": "NOT_COMPARED", "exit_code": 5})
    assert read(report).errors == 1


def test_the_schema_refuses_what_is_never_written(make_report):
    good = render_junit(make_report())
    for old, new in (
        ('skipped="0"', 'skipped="1"'),
        ("<system-out>", "<skipped /><system-out>"),
        ('time="1.250"', 'time="-1"'),
        ('name="layers.0"', 'name="layers.1"'),
    ):
        assert old in good
        assert not SCHEMA.validate(etree.fromstring(good.replace(old, new).encode())), new


@pytest.mark.skipif(shutil.which("xmllint") is None, reason="xmllint is not installed")
def test_xmllint_finds_nothing_wrong(make_report, broken_attention, tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(render_junit(make_report(changes=broken_attention, hints=HOSTILE)), encoding="utf-8")
    subprocess.run(["xmllint", "--noout", "--schema", XSD, path], check=True, capture_output=True)
