"""Text files appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from modernbert_align.core.files import kind_of, write_atomically
from modernbert_align.errors import UsageError


def test_a_file_is_written_with_the_folders_it_needs(tmp_path):
    path = tmp_path / "a" / "b" / "report.json"
    write_atomically(path, "text ü\n")
    assert path.read_bytes() == "text ü\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_an_older_file_is_replaced(tmp_path):
    write_atomically(tmp_path / "r.json", "a long first text")
    write_atomically(tmp_path / "r.json", "second")
    assert (tmp_path / "r.json").read_text() == "second"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_is_respected(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "r.json", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_keeps_the_older_file_and_leaves_nothing_else(tmp_path, monkeypatch, error):
    write_atomically(tmp_path / "r.json", "first")

    def fail(_self, _target):
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((KeyboardInterrupt, UsageError)):
        write_atomically(tmp_path / "r.json", "second")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "first"


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "r.json", "good \ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_refused_by_name(tmp_path):
    (tmp_path / "r.json").mkdir()
    with pytest.raises(UsageError, match=r"cannot write `.*r\.json`"):
        write_atomically(tmp_path / "r.json", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_parent_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"cannot write to `.*file`"):
        write_atomically(tmp_path / "file" / "r.json", "x")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_path_leads_to(tmp_path):
    (tmp_path / "f").write_text("")
    assert kind_of(tmp_path) == "folder"
    assert kind_of(tmp_path / "f") == "file"
    assert kind_of(tmp_path / "g") == "none"
    assert kind_of(tmp_path / ("x" * 300)) == "none"  # a name too long for the system
