"""selftest: every fault dies, harmless changes live, and a comparison that cannot fail is found out."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from markupsafe import escape

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.commands import selftest as command
from modernbert_align.core.outcomes import Alarm, Outcome
from modernbert_align.core.rows import PHASES
from modernbert_align.core.table import load_table
from modernbert_align.engines import selftest
from modernbert_align.engines.faults import catalogue
from modernbert_align.report.selftest_report import SelftestReport, render_selftest

SOME = ("epsilon 1e-6 in one norm", "attn.Wo untransposed", "mask filled with fp16's lowest")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Gives the loaded pair of `tiny-sensitive` for a head and a precision."""
    done = {}

    def subject(head="masked_lm", dtype="fp32"):
        if (head, dtype) not in done:
            out = tmp_path_factory.mktemp("selftest") / head
            done[head, dtype] = command._subject("tiny-sensitive", head, dtype, load_table(), out)
        return done[head, dtype]

    return subject


@pytest.fixture
def few_faults(monkeypatch):
    from modernbert_align.engines import faults

    chosen = {name: catalogue()[name] for name in SOME}
    monkeypatch.setattr(faults, "catalogue", lambda: chosen)


@pytest.fixture
def selftest_cli(cli, tmp_path):
    """`selftest` whose reports go to a folder of the test."""
    return lambda *arguments: cli("selftest", "--report-dir", tmp_path, *arguments)


def outputs(subject):
    """Every tensor the candidate returns."""
    found = subject.candidate(**paddle_backend.inputs(subject.batch))
    return {name: paddle_backend.to_numpy(value) for name, value in found.items()}


def weights(subject):
    return {name: bits.copy() for name, (bits, _) in paddle_backend.state_bits(subject.candidate).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_the_catalogue_is_large_enough_and_says_where_every_bug_enters():
    bugs = [fault for fault in catalogue().values() if not fault.equivalent]
    assert len([fault for fault in bugs if "fp32" in fault.dtypes]) >= 45
    assert all(fault.first for fault in bugs)


@pytest.mark.parametrize("name", catalogue())
def test_fault_changes_the_model_dies_and_leaves_it_as_it_was(subjects, name):
    fault = catalogue()[name]
    subject = subjects(fault.heads[0])
    before, expected = weights(subject), outputs(subject)
    outcome = subject.try_fault(fault)
    assert equal(weights(subject), before)
    assert equal(outputs(subject), expected)
    must_die = not fault.equivalent and "fp32" in fault.dtypes
    assert outcome.must_die == must_die
    assert outcome.killed == must_die
    assert outcome.equivalent == bool(fault.equivalent)
    if must_die:
        named = (fault.cause,) if fault.cause else ()
        assert (outcome.expected_cause, outcome.cause_names) == (fault.cause, named)
        assert (outcome.cause_level == "explained") == bool(fault.cause)
    if must_die:
        assert outcome.verdict == fault.verdict
        assert outcome.first_probe == outcome.expected_probe
        if fault.phase == "forward":
            assert ("hygiene" in outcome.killed_by) == bool(fault.status)  # it did not merely crash


def test_weights_in_bf16_come_back_bit_for_bit(subjects):
    subject = subjects(dtype="bf16")
    before = weights(subject)
    with catalogue()["stale weight in one layer"].inject(subject.candidate):
        assert not equal(weights(subject), before)
    assert equal(weights(subject), before)


def test_model_comes_back_when_the_comparison_breaks_off(subjects):
    subject = subjects()
    before, expected = weights(subject), outputs(subject)
    for fault in catalogue().values():
        if fault.applies(subject.config, "masked_lm"):
            with pytest.raises(ZeroDivisionError), fault.inject(subject.candidate):
                raise ZeroDivisionError
    assert equal(weights(subject), before)
    assert equal(outputs(subject), expected)


def test_bf16_asks_only_for_faults_beyond_rounding(subjects):
    subject = subjects(dtype="bf16")
    small = subject.try_fault(catalogue()["epsilon 1e-6 in one norm"])
    assert small.effect < 1
    assert not small.must_die
    one_number = subject.try_fault(catalogue()["loss over every position"])
    assert 3 < one_number.effect < 8
    assert one_number.killed_by == ("noise",)
    large = subject.try_fault(catalogue()["gate and value swapped"])
    assert large.effect > 100
    assert large.must_die
    assert large.killed


def test_redrawn_models_differ_and_still_agree(subjects):
    subject = subjects()
    before = weights(subject)
    try:
        alarms = list(selftest.unbroken(subject, 1, PHASES))
        assert alarms == [None] * 6
        assert not equal(weights(subject), before)
    finally:
        paddle_backend.set_state_bits(subject.candidate, before)
        from modernbert_align.backends import hf

        subject.reference.load_state_dict(hf.load(*subject_source(subject)).state_dict())


def subject_source(subject):
    from modernbert_align.backends.sources import resolve_model

    folder = resolve_model("tiny-sensitive", load_table(), lambda _message: None).folder
    return folder, subject.architecture, subject.dtype


def test_with_weights_like_trained_ones_every_fault_dies_too(selftest_cli):
    code, out, err = selftest_cli("--model", "tiny-stress", "--seeds", 1, "--json")
    document = json.loads(out)
    assert (document["survivors"], document["alarms"]) == ([], []), err
    assert code == 0
    assert len([fault for fault in document["faults"] if fault["must_die"]]) >= 40


@pytest.mark.usefixtures("few_faults")
def test_json_has_the_matrix_and_the_exit_code_is_green(selftest_cli):
    code, out, _ = selftest_cli("--seeds", 1, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["survivors"] == []
    assert document["false_alarms"] == 0
    assert document["runs"] == 6  # two models in three phases
    by_name = {fault["name"]: fault for fault in document["faults"]}
    assert set(by_name) == set(SOME)
    assert by_name[SOME[0]]["killed_by"] == ["noise", "direct"]
    assert by_name[SOME[1]]["killed_by"] == ["contract", "noise", "direct", "weights"]
    harmless = by_name[SOME[2]]
    assert [by_name[name]["cause_names"] for name in SOME] == [["norm epsilon"], ["weights"], []]
    assert (by_name[SOME[0]]["cause_level"], harmless["cause_level"]) == ("explained", None)
    assert (harmless["killed"], harmless["equivalent"], harmless["killed_by"]) == (False, True, [])
    for fault in document["faults"]:
        assert {"name", "killed", "killed_by", "first_probe", "expected_probe", "dtype", "equivalent"} <= set(fault)


@pytest.mark.usefixtures("few_faults")
def test_table_fits_100_columns_and_counts_no_harmless_change(selftest_cli):
    code, out, _ = selftest_cli("--phase", "forward", "--seeds", 0)
    assert code == 0
    summary = "2 of 2 faults found; 0 alarms in 1 harmless changes, 0 in 1 comparisons without a fault"
    assert f"{summary}; 2 of 2 causes named, 0 wrong" in out
    matrix = out.splitlines()[: 1 + len(SOME)]
    assert max(map(len, matrix)) <= 100


@pytest.mark.usefixtures("few_faults")
def test_wrong_name_is_said_to_be_wrong(selftest_cli, monkeypatch):
    honest = selftest.examine_phase

    def mistaken(*arguments):
        found = honest(*arguments)
        return found and found.model_copy(update={"names": ("RoPE theta",)})

    monkeypatch.setattr(selftest, "examine_phase", mistaken)
    code, out, _ = selftest_cli("--phase", "forward", "--seeds", 0)
    assert code == 0
    assert "0 of 2 causes named, 2 wrong" in out
    assert f"wrong cause: {SOME[1]}, masked_lm, fp32: RoPE theta; expected: weights" in out


@pytest.mark.usefixtures("few_faults")
def test_comparison_that_always_passes_is_found_out(selftest_cli, monkeypatch):
    from modernbert_align.core.verdict import judge

    def blind(*arguments):
        judged = judge(*arguments)
        rows = tuple(row.model_copy(update={"status": "pass", "failed": ()}) for row in judged.rows)
        return type(judged)(rows=rows, verdict="PASS", exit_code=0, coverage=judged.coverage, first_failing=None)

    monkeypatch.setattr(selftest, "judge", blind)
    code, out, _ = selftest_cli("--phase", "forward", "--seeds", 0, "--json")
    assert code == 1
    assert json.loads(out)["survivors"] == list(SOME[:2])
    assert "SURVIVED" in selftest_cli("--phase", "forward", "--seeds", 0)[1]


@pytest.mark.usefixtures("few_faults")
def test_comparison_that_always_fails_is_found_out(selftest_cli, monkeypatch):
    from modernbert_align.core.verdict import judge

    def jumpy(*arguments):
        judged = judge(*arguments)
        return type(judged)(**vars(judged) | {"verdict": "FAIL", "exit_code": 1})

    monkeypatch.setattr(selftest, "judge", jumpy)
    code, out, _ = selftest_cli("--phase", "forward", "--seeds", 0, "--json")
    document = json.loads(out)
    assert code == 1
    assert document["survivors"] == []
    assert document["false_alarms"] == 2  # the harmless change and the fixture itself


@pytest.mark.usefixtures("few_faults")
def test_bf16_runs_fp32_too_and_the_reports_hold_the_matrix_of_both(selftest_cli, tmp_path):
    code, out, _ = selftest_cli("--seeds", 0, "--dtype", "bf16", "--json")
    written = (tmp_path / "selftest-tiny-sensitive-bf16.json").read_text()
    assert code == 0
    assert json.loads(written) == json.loads(out)
    report = SelftestReport.model_validate_json(written)
    assert report.content_sha256 == report.digest()
    assert [(fault.name, fault.dtype) for fault in report.faults] == [(n, d) for d in ("fp32", "bf16") for n in SOME]
    by_key = {(fault.name, fault.dtype): fault for fault in report.faults}
    assert by_key[SOME[0], "fp32"].killed
    assert by_key[SOME[0], "bf16"].said == "within rounding"
    assert by_key[SOME[1], "bf16"].places("direct") == "own + end"
    page = (tmp_path / "selftest-tiny-sensitive-bf16.html").read_text()
    assert page == render_selftest(report)
    assert all(page.count(escape(name)) == 1 for name in SOME)  # one line, both precisions
    assert report.summary in page
    assert page.count("http") == 1  # http-equiv
    for forbidden in ("<script", "src=", "@import", "url(", "style="):
        assert forbidden not in page


def test_the_page_escapes_what_the_report_says():
    environment = {
        "versions": {}, "platform": "", "cpu": "", "cpu_flags": (), "pins": {}, "torch_cpu_capability": "",
        "torch_threads": 1, "paddle_device": "cpu",
    }  # fmt: skip
    bad = "<script>alert(1)</script>"
    fault = Outcome(
        name=bad, head=bad, dtype="fp32", phase="forward", must_die=True, equivalent=False, killed=False,
        killed_by=(), seen={}, verdict=bad, first_probe=bad, expected_probe=bad, effect=None,
        cause_level="explained", cause_names=(bad,), expected_cause="",
    )  # fmt: skip
    alarm = Alarm(head=bad, dtype="fp32", phase="forward", seed=3, verdict=bad, detail=bad)
    report = SelftestReport(
        tool_version=bad, created=bad, exit_code=1, model=bad, dtype="fp32", heads=(bad,), phases=("forward",), seeds=1,
        table=bad, table_sha256=bad, faults=(fault,), alarms=(alarm,),
        false_alarms=1, runs=2, survivors=(bad,), environment=environment, command=bad,
    )  # fmt: skip
    page = render_selftest(report)
    assert "<script" not in page
    assert "SURVIVED" in page
    assert "seed 3" in page
    assert "WRONG: &lt;script&gt;" in page


def test_all_heads_means_every_fault_on_every_head_that_can_have_it():
    faults = catalogue()
    default, every, one = (command._by_head(faults.values(), head) for head in (None, "all", "base"))
    assert sorted(fault.name for tried in default.values() for fault in tried) == sorted(faults)
    assert list(default) == ["masked_lm", "sequence_classification"]
    assert set(every) == {head for fault in faults.values() for head in fault.heads}
    assert all(tried == [f for f in faults.values() if head in f.heads] for head, tried in every.items())
    assert one == {"base": every["base"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tinny"), "`tinny` is not a fixture"),
        (("--dtype", "fp64"), "unknown dtype"),
        (("--seeds", -1), "--seeds is -1"),
        (("--phase", "sideways"), "unknown phase `sideways`"),
        (("--head", "tail"), "unknown head"),
    ],
)
def test_what_it_cannot_do_is_refused(cli, arguments, message):
    code, _, err = cli("selftest", *arguments)
    assert code == 2
    assert message in err


def test_a_crash_of_an_injection_kills_no_fault(subjects):
    @contextlib.contextmanager
    def typo(model):
        original = model.head.forward
        model.head.forward = lambda _: 1 / 0
        yield
        model.head.forward = original

    outcome = subjects().try_fault(dataclasses.replace(catalogue()["tanh GELU"], inject=typo))
    assert (outcome.verdict, outcome.must_die, outcome.killed) == ("NOT_COMPARED", True, False)
    assert outcome.survived
