"""Help, completion and suggestions: what a user meets before anything runs."""

import os
import subprocess
import sys

import pytest

COMMANDS = [
    "", "convert", "verify", "tile", "diff", "trace", "selftest", "gate", "compare", "report", "doctor", "table",
    "baseline", "baseline update", "config",
]  # fmt: skip


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "modernbert_align", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80", **environment},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_shows_no_colour_off_a_terminal(command):
    found = run(*command.split(), "--help")
    assert found.returncode == 0
    assert max(len(line) for line in found.stdout.splitlines()) <= 80
    assert "\x1b" not in found.stdout


@pytest.mark.parametrize("command", ["convert", "verify", "tile", "diff", "trace", "selftest", "gate", "compare"])
def test_help_has_an_example(command):
    assert "Example: modernbert-align" in run(command, "--help").stdout.replace("\n", " ")


def test_options_of_diff_are_grouped():
    out = run("diff", "--help").stdout
    assert [
        title for title in ("What is compared", "How it is run", "How it is judged", "Output") if title not in out
    ] == []


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [(("diff", "--dtyp", "fp32"), "--dtype"), (("diff", "--model", "tinny"), "`tiny`"), (("gaet",), "gate")],
)
def test_what_is_mistyped_gets_a_suggestion(arguments, suggestion):
    found = run(*arguments)
    assert found.returncode == 2
    assert suggestion in found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("modernbert-align diff --model tiny-", 3, {"tiny-sensitive", "tiny-stress"}),
        ("modernbert-align diff --dtype ", 3, {"fp32", "bf16"}),
        ("modernbert-align table show --table modernbert-", 4, {"modernbert-decoder"}),
        ("modernbert-align gate --policy n", 3, {"noise-aware"}),
    ],
)
def test_shell_completion(words, position, expected):
    found = run(_MODERNBERT_ALIGN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(position))
    assert set(found.stdout.split()) == expected


def test_completion_of_a_head_and_of_a_checkpoint_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    from modernbert_align.commands.options import complete_head, complete_model

    assert complete_head("token") == ["token_classification"]
    assert complete_head("m") == ["masked_lm", "multiple_choice"]
    assert complete_model(f"{tmp_path}/") == [f"{tmp_path}/mine"]


@pytest.mark.parametrize("command", ["table show --model base", "table show --model base --json"])
def test_a_closed_pipe_is_not_a_misalignment(command):
    line = f"{sys.executable} -m modernbert_align {command} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)  # 0 where the pipe took all of it
    assert "Traceback" not in done.stderr
