"""`--format` of `diff` and `report`: which files there are, what is said, what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from junitparser import JUnitXml
from safetensors.numpy import load_file, save_file

from modernbert_align.cli import main
from modernbert_align.commands.options import complete_formats
from modernbert_align.report.formats import FORMATS
from modernbert_align.report.json_report import read_report

STEM = "diff-tiny-masked_lm-fp32"
NOTICE = "::notice title=PASS%3A tiny masked_lm fp32 forward::The Paddle model computes what"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a tiny fp32 run in all formats that are files."""
    folder = tmp_path_factory.mktemp("reports")
    arguments = ["diff", "--model", "tiny", "--report-dir", str(folder), "--format", "json,html,junit,markdown"]
    assert main(arguments) == 0
    return folder


@pytest.fixture
def summary(tmp_path, monkeypatch):
    """The file that GitHub would make the job's page from; not there yet."""
    path = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    return path


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []


def test_each_format_is_a_file_of_its_own(written):
    assert files(written) == [f"{STEM}.html", f"{STEM}.json", f"{STEM}.md", f"{STEM}.xml"]
    assert read_report(written / f"{STEM}.json").verdict == "PASS"
    junit = JUnitXml.fromfile(str(written / f"{STEM}.xml"))
    assert (junit.failures, junit.errors, junit.skipped) == (0, 0, 0)
    assert junit.tests > 50
    assert (written / f"{STEM}.md").read_text().startswith("## ✓ PASS: ")


def test_diff_writes_what_is_asked_for_and_nothing_else(cli, tmp_path, summary):
    folder = tmp_path / "reports"
    code, out, _ = cli("diff", "--model", "tiny", "--report-dir", folder, "--format", "github")
    assert code == 0
    assert files(folder) == []
    assert "reports:" not in out
    assert any(line.startswith(NOTICE) for line in out.splitlines())
    assert summary.read_text().startswith("## ✓ PASS: ")
    code, out, err = cli("diff", "--model", "tiny", "--report-dir", folder, "--format", "github,junit", "--json")
    assert json.loads(out)["verdict"] == "PASS", "the JSON has stdout for itself"
    assert any(line.startswith(NOTICE) for line in err.splitlines())
    assert files(folder) == [f"{STEM}.xml"]
    assert summary.read_text().count("## ✓ PASS: ") == 2


def test_a_wrong_model_is_red_in_every_format(cli, converted, tmp_path, summary):
    candidate = tmp_path / "candidate"
    shutil.copytree(converted("tiny"), candidate)
    (weights,) = candidate.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("layers.1.attn.Wo.weight"))
    save_file(tensors | {name: np.ascontiguousarray(tensors[name].T)}, weights, {"format": "np"})
    arguments = ("--model", "tiny", "--candidate", candidate, "--report-dir", tmp_path / "r")
    code, out, _ = cli("diff", *arguments, "--format", "junit,markdown,github")
    assert code == 1
    junit = JUnitXml.fromfile(str(tmp_path / "r" / f"{STEM}.xml"))
    failed = [(case.classname, case.name) for suite in junit for case in suite if not case.is_passed]
    assert failed[:3] == [
        ("tiny.masked_lm.forward.verdict", "verdict"),
        ("tiny.masked_lm.forward.weights", "fp32"),
        ("tiny.masked_lm.forward.fp32.isolated", "layers.1.attn"),
    ]
    errors = [line for line in out.splitlines() if line.startswith("::")]
    assert len(errors) == 11
    assert all(line.startswith("::error title=") for line in errors)
    assert f"`{name}`" in errors[0]
    assert summary.read_text() == (tmp_path / "r" / f"{STEM}.md").read_text()
    assert summary.read_text().startswith("## ✗ FAIL: ")


def test_report_makes_every_format_again(cli, written, tmp_path):
    code, out, _ = cli("report", written / f"{STEM}.json", "--report-dir", tmp_path, "--format", "markdown,json,junit")
    assert code == 0
    assert out.splitlines() == [f"{tmp_path / STEM}.{suffix} (PASS)" for suffix in ("md", "json", "xml")]
    for suffix in ("md", "json", "xml"):
        assert (tmp_path / f"{STEM}.{suffix}").read_bytes() == (written / f"{STEM}.{suffix}").read_bytes()


def test_without_format_report_makes_the_page_beside_the_report(cli, written, tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes((written / f"{STEM}.json").read_bytes())
    assert cli("report", path)[0] == 0
    assert files(tmp_path) == ["r.html", "r.json"]


def test_report_says_annotations_and_adds_to_the_summary(cli, written, tmp_path, summary):
    folder = tmp_path / "none"
    code, out, _ = cli("report", written / f"{STEM}.json", "--report-dir", folder, "--format", "github")
    assert code == 0
    assert out.startswith(NOTICE)
    assert len(out.splitlines()) == 1
    assert files(folder) == []
    assert summary.read_text() == (written / f"{STEM}.md").read_text()


def test_only_the_format_github_touches_the_summary(cli, written, tmp_path, summary):
    cli("report", written / f"{STEM}.json", "--report-dir", tmp_path / "r", "--format", "html,markdown")
    assert not summary.exists()


def test_without_a_summary_there_are_annotations_alone(cli, written, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "")
    code, out, err = cli("report", written / f"{STEM}.json", "--report-dir", tmp_path, "--format", "github")
    assert (code, err) == (0, "")
    assert out.startswith(NOTICE)


def test_a_summary_that_cannot_be_written_is_one_error(cli, written, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    code, _, err = cli("report", written / f"{STEM}.json", "--report-dir", tmp_path / "r", "--format", "github,junit")
    assert code == 2
    assert err.startswith(f"error: cannot write the job summary `{tmp_path}`: ")
    assert len(err.splitlines()) == 2
    assert files(tmp_path / "r") == [f"{STEM}.xml"], "the files are there"


@pytest.mark.parametrize(
    ("formats", "error", "hint"),
    [
        ("junitt", "unknown format `junitt`", "did you mean `junit`?"),
        ("json,HTML", "unknown format `HTML`", "did you mean `html`?"),
        ("pdf", "unknown format `pdf`", "one or more of json,html,junit,markdown,github"),
        ("", "--format `` leaves a name out", "one or more of"),
        ("json,", "--format `json,` leaves a name out", "one or more of"),
    ],
)
@pytest.mark.parametrize("command", ["diff", "report"])
def test_an_unknown_format_is_refused_before_anything_is_run(cli, written, tmp_path, command, formats, error, hint):
    what = [written / f"{STEM}.json"] if command == "report" else ["--model", "tiny"]
    code, out, err = cli(command, *what, "--report-dir", tmp_path / "r", "--format", formats)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"error: {error}"
    assert err.splitlines()[1].startswith(f"hint: {hint}")
    assert files(tmp_path / "r") == []


def test_a_format_given_twice_is_written_once(cli, written, tmp_path, summary):
    code, out, _ = cli(
        "report", written / f"{STEM}.json", "--report-dir", tmp_path, "--format", "junit, github,junit,github"
    )
    assert code == 0
    assert len(out.splitlines()) == 2
    assert summary.read_text().count("## ✓ PASS: ") == 1


def test_a_blocked_folder_is_one_error(cli, written, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("report", written / f"{STEM}.json", "--report-dir", tmp_path / "file", "--format", "junit")
    assert code == 2
    assert err.startswith("error: cannot write to")


def test_help_and_docs_name_every_format(cli):
    docs = (Path(__file__).parents[2] / "docs" / "ci.md").read_text()
    for command in ("diff", "report"):
        shown = re.findall(r"\w+", cli(command, "--help")[1])
        assert [name for name in FORMATS if name not in shown] == []
    assert [name for name in FORMATS if f"| `{name}` |" not in docs] == []


def test_completion_knows_what_is_there_already():
    assert complete_formats("j") == ["json", "junit"]
    assert complete_formats("json,j") == ["json,junit"]
    assert complete_formats("") == list(FORMATS)


def test_the_project_file_and_the_environment_name_formats_too(cli, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "modernbert-align.toml").write_text('[report]\nformat = ["junit", "markdown"]\nreport-dir = "r"\n')
    assert cli("report", written / f"{STEM}.json")[0] == 0
    assert files(tmp_path / "r") == [f"{STEM}.md", f"{STEM}.xml"]
    monkeypatch.setenv("MODERNBERT_ALIGN_REPORT_FORMAT", "json")
    assert cli("report", written / f"{STEM}.json")[0] == 0
    assert files(tmp_path / "r") == [f"{STEM}.json", f"{STEM}.md", f"{STEM}.xml"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"mean_abs": float("nan")}, "it holds NaN, which is not JSON"),
        ({"status": "fail", "failed": ("contract",), "mean_abs": None}, "fails the contract criterion without"),
        ({"status": "fail", "failed": ("noise",), "noise_limit": None}, "fails the noise criterion without"),
        ({"status": "fail", "failed": ("direct",), "direct_limit": None}, "fails the direct criterion without"),
    ],
)
def test_a_report_that_nobody_could_have_written_is_one_error(cli, written, tmp_path, row, complaint):
    report = read_report(written / f"{STEM}.json")
    rows = (report.rows[0].model_copy(update=row), *report.rows[1:])
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report.model_copy(update={"rows": rows}).sealed().model_dump(mode="json")))
    code, out, err = cli("report", path, "--format", ",".join(FORMATS))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert complaint in err.splitlines()[0]
    assert files(tmp_path) == ["r.json"]


def test_names_that_are_not_utf8_are_in_no_format_a_problem(tmp_path):
    program = [sys.executable, "-m", "modernbert_align"]
    folder = os.fsencode(tmp_path) + b"/\xff"
    arguments = ["diff", "--model", "tiny", "--format", ",".join(FORMATS), "--report-dir", folder]
    done = subprocess.run([*program, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(files(os.fsdecode(folder))) == 4
    assert b"\\xff" in Path(os.fsdecode(folder), f"{STEM}.md").read_bytes()
