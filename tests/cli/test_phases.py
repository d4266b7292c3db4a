"""`diff --phase backward|step`: reports of their own, judged again by the gate, and never taken for another phase's."""

import json

import pytest

from modernbert_align.engines.faults import catalogue
from modernbert_align.report.json_report import read_report


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Gives the path of a report of `tiny`, made once per phase."""
    from modernbert_align.cli import main

    folder = tmp_path_factory.mktemp("phases")
    names = {"forward": "", "backward": "-backward", "step": "-step"}

    def report(phase):
        path = folder / f"diff-tiny-masked_lm-fp32{names[phase]}.json"
        if not path.exists():
            engine = ["--engine", "stream"] if phase == "forward" else []
            assert main(["diff", "--model", "tiny", "--phase", phase, "--report-dir", str(folder), *engine]) == 0
        return path

    return report


def edited(path, tmp_path, change):
    """The report with its document changed and sealed again."""
    report = read_report(path)
    document = report.model_dump(mode="json")
    change(document)
    forged = type(report).model_validate(document).sealed()
    out = tmp_path / "forged.json"
    out.write_text(forged.model_dump_json())
    return out


@pytest.mark.parametrize("phase", ["backward", "step"])
def test_a_right_model_passes_and_the_gate_agrees(cli, reports, phase):
    path = reports(phase)
    document = json.loads(path.read_text())
    assert (document["verdict"], document["phase"]) == ("PASS", phase)
    assert document["engine"]["name"] == "autograd"
    assert document["steps"] == (3 if phase == "step" else None)
    assert {row["phase"] for row in document["rows"]} == {phase}
    assert not any(row["contract"] for row in document["rows"])
    page = path.with_suffix(".html").read_text()
    assert "gradients" in page if phase == "backward" else "3 steps" in page
    code, out, _ = cli("gate", path, "--require", f"model=tiny,dtype=fp32,phase={phase}")
    assert code == 0, out


def test_a_phase_does_not_stand_for_another(cli, reports):
    for given in ("forward", "backward", "step"):
        for required in ("forward", "backward", "step"):
            code, _, _ = cli("gate", reports(given), "--require", f"model=tiny,dtype=fp32,phase={required}")
            assert code == (0 if given == required else 5), (given, required)
    assert cli("gate", reports("backward"), "--require", "model=tiny,dtype=fp32")[0] == 5


@pytest.mark.parametrize("phase", ["backward", "step"])
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(rows=[row for row in d["rows"] if row["loss"] != d["rows"][-1]["loss"]] or d["rows"][:1]),
        lambda d: d.update(rows=[row for row in d["rows"] if row["mode"] == "isolated"]),
        lambda d: d.update(rows=[row for row in d["rows"] if not row["probe"].startswith("model.")]),
        lambda d: d.update(rows=d["rows"][1:]),
    ],
)
def test_a_report_with_fewer_rows_is_not_a_pass(cli, reports, tmp_path, phase, change):
    assert cli("gate", edited(reports(phase), tmp_path, change))[0] == 5


def test_a_report_of_another_phase_than_its_rows_is_not_a_pass(cli, reports, tmp_path):
    forged = edited(reports("backward"), tmp_path, lambda d: d.update(phase="forward"))
    assert cli("gate", forged)[0] == 1  # rows that nothing expects, and none of those that were


@pytest.mark.parametrize(
    ("phase", "steps"),
    [("step", None), ("step", 0), ("step", 1), ("step", 11), ("backward", 2), ("backward", 0), ("forward", 3)],
)
def test_a_report_with_impossible_steps_is_refused(cli, reports, tmp_path, phase, steps):
    forged = edited(reports(phase), tmp_path, lambda d: d.update(steps=steps))
    code, _, err = cli("gate", forged)
    assert code == 2
    assert f"says phase {phase} and {steps} steps" in err


def test_more_steps_than_were_taken_is_not_a_pass(cli, reports, tmp_path):
    assert cli("gate", edited(reports("step"), tmp_path, lambda d: d.update(steps=4)))[0] == 5


@pytest.mark.parametrize("name", ["gradient of one weight zeroed", "decoder untied", "weight decay on norms"])
def test_a_fault_that_the_forward_phase_cannot_see_fails_its_own(cli, tmp_path, monkeypatch, name):
    from modernbert_align.backends import paddle as paddle_backend

    fault, load = catalogue()[name], paddle_backend.load
    injected = []

    def broken(*arguments):
        model = load(*arguments)
        context = fault.inject(model)
        context.__enter__()
        injected.append(context)
        return model

    monkeypatch.setattr(paddle_backend, "load", broken)
    try:
        forward = cli("diff", "--model", "tiny", "--engine", "stream", "--report-dir", tmp_path)[0]
        code, out, _ = cli("diff", "--model", "tiny", "--phase", fault.phase, "--report-dir", tmp_path, "--json")
    finally:
        for context in reversed(injected):
            context.__exit__(None, None, None)
    assert forward == 0
    document = json.loads(out)
    assert (code, document["verdict"], document["first_failing"]["probe"]) == (1, "FAIL", fault.first)
    assert (document["cause"]["level"], document["cause"]["names"]) == ("explained", [fault.cause])
    assert cli("gate", tmp_path / f"diff-tiny-masked_lm-fp32-{fault.phase}.json")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--phase", "sideways"), "unknown phase `sideways`"),
        (("--phase", "backward", "--engine", "stream"), "--engine chooses what drives the forward phase"),
        (("--steps", "2"), "--steps is for --phase step, not forward"),
        (("--phase", "step", "--steps", "1"), "--steps is 1"),
        (("--phase", "step", "--steps", "11"), "--steps is 11"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(cli, tmp_path, arguments, message):
    code, _, err = cli("diff", "--model", "tiny", "--report-dir", tmp_path, *arguments)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_two_steps_are_enough(cli, tmp_path):
    code, out, _ = cli("diff", "--model", "tiny", "--phase", "step", "--steps", 2, "--report-dir", tmp_path, "--json")
    assert code == 0
    losses = {row["probe"] for row in json.loads(out)["rows"] if row["probe"].startswith("loss")}
    assert losses == {"loss.1", "loss.2"}
    said = cli("gate", tmp_path / "diff-tiny-masked_lm-fp32-step.json")[1]
    assert "step of 2 steps: 178 of 178 rows" in said


@pytest.mark.parametrize("phase", ["backward", "step"])
def test_zero_against_zero_is_not_a_pass(cli, reports, tmp_path, phase):
    numbers = ("mean_abs", "max_abs", "rel_l2", "reference_rms", "candidate_error", "reference_error")

    def vanish(document):
        for row in document["rows"]:
            if ("moment" in row["probe"]) if phase == "step" else row["probe"].startswith("model."):
                row.update(dict.fromkeys(numbers, 0.0))

    code, out, _ = cli("gate", edited(reports(phase), tmp_path, vanish), "--json")
    assert code == 5
    assert "nothing reached it" in out
