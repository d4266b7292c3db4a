"""Runs the steps of a GitHub workflow here, without a container: what the runner would do with `run`, `env` and `if`.

Source: GitHub's workflow syntax: `run` without `shell` is `bash -e FILE`; a job stops at the first failing step unless
it says `continue-on-error`, and then runs only steps with `if: always()`.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
# Stands for the Python of `setup-python`: the tool is installed already, so that installing is checked and not done.
PYTHON = """#!/usr/bin/env bash
set -euo pipefail
if [ "${1:-} ${2:-} ${3:-}" = "-m pip install" ]; then
  shift 3
  while [ $# -gt 0 ]; do
    case "$1" in
      --quiet) ;;
      --constraint) shift; test -f "$1" ;;
      *) test -f "$1/pyproject.toml" ;;
    esac
    shift
  done
  exit 0
fi
exec "$REAL_PYTHON" "$@"
"""


@dataclass
class Run:
    """How a job ended."""

    failed: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    output: str = ""
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    summary: str = ""


def load(path: Path) -> dict:
    """A workflow; YAML reads its key `on` as true."""
    document = yaml.safe_load(path.read_text())
    document["on"] = document.pop(True)
    return document


def called(job: dict) -> tuple[dict, dict]:
    """The reusable workflow that a job calls, and its inputs with their defaults."""
    owner, _, path = job["uses"].partition("/.github/")
    assert owner == "OWNER/modernbert-align", "a caller names this repository"
    workflow = load(ROOT / ".github" / path.partition("@")[0])
    declared = workflow["on"]["workflow_call"]["inputs"]
    given = job.get("with", {})
    unknown, absent = (
        set(given) - set(declared),
        [k for k, v in declared.items() if v.get("required") and k not in given],
    )
    assert not unknown, f"inputs that the workflow does not have: {sorted(unknown)}"
    assert not absent, f"inputs that are required: {absent}"
    return workflow, {name: given.get(name, one.get("default")) for name, one in declared.items()}


def run_job(job: dict, workspace: Path, source: Path, inputs: dict | None = None, **environment: str) -> Run:
    """Run the steps of a job.

    Args:
        workspace: An empty folder, which becomes the checkout.
        source: What `actions/checkout` of the calling repository checks out.
        environment: More variables; they win over the job's own.
    """
    inputs = inputs or {}
    found = Run()
    programs = workspace.parent / "programs"
    programs.mkdir()
    (programs / "python").write_text(PYTHON)
    (programs / "python").chmod(0o755)
    summary = workspace.parent / "summary.md"
    summary.touch()
    base = {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REAL_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(summary),
        "CI": "true",
    }
    for step in job["steps"]:
        name = step.get("name", step.get("uses"))
        if found.failed and step.get("if") != "always()":
            continue
        found.ran.append(name)
        if "uses" in step:
            _use(step, workspace, source, inputs, found)
            continue
        variables = {**job.get("env", {}), **step.get("env", {})}
        step_environment = {**base, **{k: fill(str(v), inputs) for k, v in variables.items()}, **environment}
        script = workspace.parent / "step.sh"
        script.write_text(fill(step["run"], inputs))
        done = subprocess.run(
            ["bash", "-e", str(script)],
            cwd=workspace,
            env=step_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        found.output += f"--- {name}\n{done.stdout}"
        if done.returncode and not step.get("continue-on-error"):
            found.failed.append(name)
    found.summary = summary.read_text()
    return found


def fill(text: str, inputs: dict) -> str:
    """Replace `${{ inputs.name }}`; any other expression is one this runner does not know."""

    def value(match: re.Match) -> str:
        context, _, name = match[1].partition(".")
        assert context == "inputs", f"an expression that cannot be run here: {match[1]}"
        return str(inputs[name])

    return EXPRESSION.sub(value, text)


def _use(step: dict, workspace: Path, source: Path, inputs: dict, found: Run) -> None:
    action, options = step["uses"].partition("@")[0], step.get("with", {})
    if action == "actions/checkout" and "repository" in options:
        assert fill(options["repository"], inputs) == "OWNER/modernbert-align"
        (workspace / options["path"]).symlink_to(ROOT)
    elif action == "actions/checkout":
        shutil.copytree(source, workspace, dirs_exist_ok=True, symlinks=True)
    elif action == "actions/setup-python":
        assert (workspace / options["cache-dependency-path"]).is_file()
    elif action == "actions/upload-artifact":
        patterns = fill(options["path"], inputs).split()
        files = sorted(str(path.relative_to(workspace)) for one in patterns for path in workspace.glob(one))
        if not files and options.get("if-no-files-found") == "error":
            found.failed.append(step["name"])
        found.artifacts[options["name"]] = files
    else:
        raise AssertionError(f"an action that cannot be run here: {action}")
