"""Text from hostile files and strange file names."""

import shlex

import pytest

from modernbert_align.core.text import command_line, name_text, one_line


def test_one_line_shows_what_cannot_be_printed():
    assert one_line("a\n\x1b[31m\ud800\u202eb") == "a\\n\\x1b[31m\\ud800\\u202eb"
    assert one_line("e\u0301 中文 \U0001f600") == "e\u0301 中文 \U0001f600"


def test_one_line_leaves_the_middle_of_long_text_out():
    assert one_line("a" * 900 + "b" * 900) == "a" * 750 + " [...] " + "b" * 250
    assert one_line("abcdefghij", 8) == "abcdef [...] ij"


@pytest.mark.parametrize("name", ["plain", "ümläut", "\udcff", "a\udc80b"])
def test_a_name_of_the_file_system_can_be_encoded(name):
    assert name_text(name).encode()
    assert (name_text(name) == name) is name.isprintable()


def test_the_command_line_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "diff", "--model", "my model", "--report-dir", "it's"])
    assert shlex.split(command_line()) == ["modernbert-align", "diff", "--model", "my model", "--report-dir", "it's"]
    monkeypatch.setattr("sys.argv", ["program", "\udcff"])
    assert "\\xff" in command_line()
