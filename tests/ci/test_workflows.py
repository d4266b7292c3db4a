"""The gate as others use it: the workflows, the example repository and the pre-commit hooks are run, not read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from workflow_runner import ROOT, called, fill, load, run_job

EXAMPLE = ROOT / "examples" / "ci-gate"
WORKFLOWS = [
    *sorted((ROOT / ".github" / "workflows").glob("*.yml")),
    EXAMPLE / ".github" / "workflows" / "alignment.yml",
]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_workflow_is_one_by_githubs_schema(path):
    arguments = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def example(tmp_path):
    """A copy of the example repository, and a way to run its gate."""
    source = tmp_path / "repository"
    shutil.copytree(EXAMPLE, source)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    workflow, inputs = called(load(source / ".github" / "workflows" / "alignment.yml")["jobs"]["alignment"])

    def run(**changes):
        return run_job(workflow["jobs"]["gate"], workspace, source, inputs | changes)

    run.source = source
    return run


def test_the_example_passes_its_gate(example):
    run = example()
    assert run.failed == [], run.output
    assert "gate: exit 0" in run.output
    stem = "reports/diff-tiny-sensitive-masked_lm-bf16"
    assert {f"{stem}.{suffix}" for suffix in ("json", "html", "xml", "md")} <= set(run.artifacts["alignment-reports"])
    assert f"{stem}-backward.json" in run.artifacts["alignment-reports"]
    assert "::notice" in run.output
    assert "PASS" in run.summary
    assert "tiny-sensitive" in run.summary


def test_the_example_stops_a_change_that_misaligns(example):
    with (example.source / "modernbert-align.toml").open("a") as file:
        file.write('\n[[tolerance]]\nprobe="logits"\ndtype="fp32"\ncriterion="noise"\nlimit=1e-6\nreason="a test"\n')
    run = example(phases="forward")
    assert run.failed == ["Gate"], run.output
    assert "::error" in run.output
    assert run.artifacts["alignment-reports"]  # also where the gate is red


def absent(source):
    text = (source / "modernbert-align.toml").read_text()
    (source / "modernbert-align.toml").write_text(text.replace('model = "tiny-sensitive" ', 'model = "absent" '))


def test_a_comparison_that_never_ran_is_not_let_through(example):
    absent(example.source)
    run = example(phases="forward")
    assert run.failed == ["Compare", "Upload the reports"], run.output


def test_a_report_that_was_checked_in_does_not_stand_in_for_a_comparison(example):
    (baseline,) = (example.source / "reports" / "baseline").glob("*.json")
    shutil.copy(baseline, example.source / "reports")
    absent(example.source)
    run = example(phases="forward")
    assert run.failed == ["Compare", "Upload the reports"], run.output
    assert "gate:" not in run.output


def test_a_misspelt_phase_stops_the_job(example):
    run = example(phases="bakward forward")
    assert run.failed[0] == "Compare"
    assert "unknown phase" in run.output


def test_without_a_project_file_nothing_would_be_required(example):
    (example.source / "modernbert-align.toml").unlink()
    run = example(phases="forward")
    assert run.failed[0] == "Environment"
    assert "has no modernbert-align.toml" in run.output


def test_a_comparison_that_is_required_and_left_out_is_not_let_through(example):
    run = example(phases="forward")
    assert run.failed == ["Gate"]
    assert "phase=backward: no report covers it" in run.output


def test_a_caller_with_a_wrong_input_is_found_by_these_tests():
    job = load(EXAMPLE / ".github" / "workflows" / "alignment.yml")["jobs"]["alignment"]
    with pytest.raises(AssertionError, match="does not have"):
        called({**job, "with": {**job["with"], "fases": "forward"}})
    with pytest.raises(AssertionError, match="are required"):
        called({**job, "with": {}})
    with pytest.raises(AssertionError, match="cannot be run here"):
        fill("${{ secrets.TOKEN }}", {})


@pytest.fixture
def own_workflow(tmp_path):
    """Runs the workflow of this repository on a copy of it."""

    source = tmp_path / "repository"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    (source / ".venv").symlink_to(Path(sys.executable).parent.parent)
    job = load(ROOT / ".github" / "workflows" / "alignment.yml")["jobs"]["alignment"]
    # Installing is what made these tests run, and the kill matrix has tests of its own.
    without = ("Set up", "Can the comparison fail?")
    steps = [step for step in job["steps"] if step.get("name") not in without]
    assert len(steps) == len(job["steps"]) - len(without)
    workspace = tmp_path / "workspace"
    workspace.mkdir()

    def run(replace=("", ""), **environment):
        changed = [
            {**step, "run": step["run"].replace(*replace)} if "run" in step and replace[0] else step for step in steps
        ]
        return run_job({**job, "steps": changed}, workspace, source, **environment)

    return run


def test_the_workflow_of_this_repository(own_workflow):
    run = own_workflow(MODEL="tiny")
    assert run.failed == [], run.output
    assert "reports/diff-tiny-masked_lm-bf16.html" in run.artifacts["alignment-reports"]


def test_the_workflow_of_this_repository_ends_where_nothing_can_be_compared(own_workflow):
    run = own_workflow(MODEL="absent")
    assert run.failed[0] == "Compare", run.output


def test_the_workflow_of_this_repository_stops_what_it_requires_and_does_not_get(own_workflow):
    run = own_workflow(replace=("model=$MODEL,dtype=fp32", "model=base,dtype=fp32"), MODEL="tiny")
    assert run.failed == ["Gate"], run.output


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def hooked(tmp_path, monkeypatch):
    """The example as a git repository, and a way to run its hooks from this checkout."""
    tool, repository = tmp_path / "tool", tmp_path / "repository"
    tool.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", tool)
    git(tool, "init", "-q")
    git(tool, "add", "-A")
    git(tool, "commit", "-qm", "hooks")
    shutil.copytree(EXAMPLE, repository)
    git(repository, "init", "-q")
    git(repository, "add", "-A")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run():
        git(repository, "add", "-A")
        arguments = [sys.executable, "-m", "pre_commit", "try-repo", str(tool), "--all-files"]
        done = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    run.repository = repository
    return run


def test_the_hooks_of_the_example_pass(hooked):
    code, out = hooked()
    assert code == 0, out
    assert out.count("Passed") == 2, out


def test_a_hook_refuses_a_key_that_is_not_known(hooked):
    path = hooked.repository / "modernbert-align.toml"
    path.write_text(path.read_text().replace("[gate]", "[gatte]"))
    code, out = hooked()
    assert code == 1
    assert "did you mean `gate`?" in out


def test_a_hook_misses_a_baseline_that_was_deleted(hooked):
    (path,) = (hooked.repository / "reports" / "baseline").glob("*bf16.json")
    path.unlink()
    (hooked.repository / "reports" / "baseline" / ".gitkeep").touch()
    assert hooked()[0] == 1


def test_a_hook_refuses_an_edited_baseline(hooked):
    (path,) = sorted((hooked.repository / "reports" / "baseline").glob("*bf16.json"))
    document = json.loads(path.read_text())
    document["rows"][0]["mean_abs"] = 0.0
    path.write_text(json.dumps(document))
    code, out = hooked()
    assert code == 1
    assert "was changed after it was written" in out


def test_the_example_configures_the_hooks_that_there_are():
    import yaml

    offered = {hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    (repository,) = yaml.safe_load((EXAMPLE / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["id"] for hook in repository["hooks"]} == offered
