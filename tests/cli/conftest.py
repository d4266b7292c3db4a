"""Runs the command line inside the test process."""

import json

import pytest

from modernbert_align.cli import main
from modernbert_align.report.schema import Report


@pytest.fixture
def cli(capsys):
    """Call with arguments; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_report(tmp_path_factory):
    """The path of a report of `tiny`, fp32 and bf16; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny-report")
    assert main(["diff", "--model", "tiny", "--dtype", "bf16", "--engine", "stream", "--report-dir", str(folder)]) == 0
    return folder / "diff-tiny-masked_lm-bf16.json"


@pytest.fixture
def variant(tiny_report, tmp_path):
    """Write a report that differs from `tiny_report` and is sealed again; gives its path."""

    def write(name, change=lambda document: None):
        document = json.loads(tiny_report.read_text())
        change(document)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Report.model_validate_json(json.dumps(document)).sealed().model_dump_json())
        return path

    return write
