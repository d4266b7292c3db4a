"""selftest: every fault dies, harmless changes live, and a comparison that cannot fail is found out."""

import json

import numpy as np
import pytest

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.commands import selftest as command
from modernbert_align.core.table import load_table
from modernbert_align.engines import selftest
from modernbert_align.engines.faults import catalogue

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
        assert outcome.verdict == fault.verdict
        assert outcome.first_probe == outcome.expected_probe
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
    large = subject.try_fault(catalogue()["gate and value swapped"])
    assert large.effect > 100
    assert large.must_die
    assert large.killed


def test_redrawn_models_differ_and_still_agree(subjects):
    subject = subjects()
    before = weights(subject)
    try:
        alarms = list(selftest.unbroken(subject, 1))
        assert alarms == [None, None]
        assert not equal(weights(subject), before)
    finally:
        paddle_backend.set_state_bits(subject.candidate, before)
        from modernbert_align.backends import hf

        subject.reference.load_state_dict(hf.load(*subject_source(subject)).state_dict())


def subject_source(subject):
    from modernbert_align.backends.sources import resolve_model

    folder = resolve_model("tiny-sensitive", load_table(), lambda _message: None).folder
    return folder, subject.architecture, subject.dtype


@pytest.mark.usefixtures("few_faults")
def test_json_has_the_matrix_and_the_exit_code_is_green(cli):
    code, out, _ = cli("selftest", "--seeds", 1, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["survivors"] == []
    assert document["false_alarms"] == 0
    assert document["runs"] == 2
    by_name = {fault["name"]: fault for fault in document["faults"]}
    assert set(by_name) == set(SOME)
    assert by_name[SOME[0]]["killed_by"] == ["noise", "direct"]
    assert by_name[SOME[1]]["killed_by"] == ["contract", "noise", "direct", "weights"]
    harmless = by_name[SOME[2]]
    assert (harmless["killed"], harmless["equivalent"], harmless["killed_by"]) == (False, True, [])
    for fault in document["faults"]:
        assert {"name", "killed", "killed_by", "first_probe", "expected_probe", "dtype", "equivalent"} <= set(fault)


@pytest.mark.usefixtures("few_faults")
def test_table_fits_100_columns_and_counts_no_harmless_change(cli):
    code, out, _ = cli("selftest", "--seeds", 0)
    assert code == 0
    assert "2 of 2 faults found; 0 alarms in 1 harmless changes, 0 in 1 comparisons without a fault" in out
    matrix = out.splitlines()[: 1 + len(SOME)]
    assert max(map(len, matrix)) <= 100


@pytest.mark.usefixtures("few_faults")
def test_comparison_that_always_passes_is_found_out(cli, monkeypatch):
    from modernbert_align.core.verdict import judge

    def blind(*arguments):
        judged = judge(*arguments)
        rows = tuple(row.model_copy(update={"status": "pass", "failed": ()}) for row in judged.rows)
        return type(judged)(rows=rows, verdict="PASS", exit_code=0, coverage=judged.coverage, first_failing=None)

    monkeypatch.setattr(selftest, "judge", blind)
    code, out, _ = cli("selftest", "--seeds", 0, "--json")
    assert code == 1
    assert json.loads(out)["survivors"] == list(SOME[:2])
    assert "SURVIVED" in cli("selftest", "--seeds", 0)[1]


@pytest.mark.usefixtures("few_faults")
def test_comparison_that_always_fails_is_found_out(cli, monkeypatch):
    from modernbert_align.core.verdict import judge

    def jumpy(*arguments):
        judged = judge(*arguments)
        return type(judged)(**vars(judged) | {"verdict": "FAIL", "exit_code": 1})

    monkeypatch.setattr(selftest, "judge", jumpy)
    code, out, _ = cli("selftest", "--seeds", 0, "--json")
    document = json.loads(out)
    assert code == 1
    assert document["survivors"] == []
    assert document["false_alarms"] == 2  # the harmless change and the fixture itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tinny"), "`tinny` is not a fixture"),
        (("--dtype", "fp64"), "unknown dtype"),
        (("--seeds", -1), "--seeds is -1"),
        (("--head", "tail"), "unknown head"),
    ],
)
def test_what_it_cannot_do_is_refused(cli, arguments, message):
    code, _, err = cli("selftest", *arguments)
    assert code == 2
    assert message in err
