"""Runs the command line inside the test process."""

import pytest

from modernbert_align.cli import main


@pytest.fixture
def cli(capsys):
    """Call with arguments; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
