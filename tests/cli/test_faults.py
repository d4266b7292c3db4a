"""The gate can fail: every injected bug turns `diff` red and is found where it is."""

import json
from contextlib import ExitStack

import pytest
from faults import FAULTS

from modernbert_align.backends import paddle as paddle_backend


def diff(cli, tmp_path, *arguments):
    code, out, _ = cli("diff", "--model", "tiny-sensitive", "--report-dir", tmp_path, "--json", *arguments)
    return code, json.loads(out)


@pytest.fixture
def broken_candidate(monkeypatch):
    """Gives a function that puts a fault into every candidate loaded from then on; gone after the test."""
    with ExitStack() as stack:

        def put(name, dtypes=("fp32", "bf16")):
            load = paddle_backend.load

            def broken(folder, architecture, dtype, *attention):
                model = load(folder, architecture, dtype, *attention)
                stack.close()  # the fault of the model before
                if dtype in dtypes:
                    stack.enter_context(FAULTS[name].inject(model))
                return model

            monkeypatch.setattr(paddle_backend, "load", broken)

        yield put


def test_without_a_fault_the_gate_is_green(cli, tmp_path):
    code, report = diff(cli, tmp_path)
    assert code == 0
    assert report["verdict"] == "PASS"
    assert report["first_failing"] is None


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught_and_localised(cli, tmp_path, broken_candidate, name):
    fault = FAULTS[name]
    broken_candidate(name)
    code, report = diff(cli, tmp_path)
    assert report["verdict"] == fault.verdict, report["first_failing"]["detail"]
    assert report["exit_code"] == code == (5 if fault.verdict == "NOT_COMPARED" else 1)
    first = report["first_failing"]
    assert first["probe"] == fault.first
    if fault.status:
        assert first["status"] == fault.status
    cause = report["cause"]
    if fault.cause:
        assert (cause["probe"], cause["level"], cause["names"]) == (fault.first, "explained", [fault.cause])
    else:
        assert report["hints"]
    path = next(tmp_path.glob("*.json"))
    assert cli("gate", path)[0] == code  # judged again from the file alone


def test_one_wrong_element_dies_by_the_weight_check(cli, tmp_path, broken_candidate):
    broken_candidate("one weight element off by 1e-3")
    _, report = diff(cli, tmp_path)
    (difference,) = report["weights"][0]["differences"]
    assert difference["paddle"] == "model.layers.3.mlp.Wi.weight"
    assert difference["differing"] == 1
    assert difference["max_abs"] == pytest.approx(1e-3, rel=1e-3)
    assert len(report["rows"]) == 52  # the comparison ran all the same


@pytest.mark.parametrize("name", ["attn.Wo untransposed", "head.dense untransposed"])
def test_untransposed_square_weight_is_called_that(cli, tmp_path, broken_candidate, name):
    broken_candidate(name)
    _, report = diff(cli, tmp_path)
    assert "without the transpose" in report["hints"][0]
    isolated = {r["probe"]: r["status"] for r in report["rows"] if r["mode"] == "isolated"}
    assert isolated[FAULTS[name].first] == "fail"  # the values show it as well


def test_bf16_pass_does_not_cover_an_fp32_failure(cli, tmp_path, broken_candidate):
    broken_candidate("scale 1 % off", dtypes=("fp32",))
    code, report = diff(cli, tmp_path, "--dtype", "bf16")
    assert code == 1
    assert {r["status"] for r in report["rows"] if r["dtype"] == "bf16"} == {"pass"}
    assert report["first_failing"]["dtype"] == "fp32"
