"""Finding models: folders, fixtures, and the hub through a cache made here."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from modernbert_align.backends.sources import resolve_model
from modernbert_align.core.table import load_table
from modernbert_align.errors import CheckpointError, UsageError

MODEL = "answerdotai/ModernBERT-base"
COMMIT = "8949b909ec900327062f0ebf497f51aef5e6f0c8"


def quietly(_message):
    pass


def hub_cache(root, checkpoint):
    """A hub cache as huggingface_hub lays it out: refs, blobs named by digest, snapshots of links."""
    repo = root / "hub" / f"models--{MODEL.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for path in checkpoint.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return root


def run(arguments, home, cwd):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-m", "modernbert_align", *arguments],
        capture_output=True, text=True, env=environment, cwd=cwd, check=False,
    )  # fmt: skip


def test_hub_id_is_read_from_the_cache(tmp_path, fixture_folder):
    home = hub_cache(tmp_path / "home", fixture_folder("tiny"))
    before = sorted(str(p) for p in home.rglob("*"))
    done = run(["convert", "--src", "hf", "--dst", "paddle", "--model", MODEL, "--json"], home, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["out"] == "checkpoints/answerdotai--ModernBERT-base-paddle"
    assert result["manifest"]["source"]["revision"] == COMMIT
    assert (tmp_path / result["out"] / "tokenizer.json").is_file()
    assert sorted(str(p) for p in home.rglob("*")) == before  # the cache is never written to


def test_hub_id_that_is_not_cached_says_what_to_run(tmp_path):
    done = run(["convert", "--src", "hf", "--dst", "paddle", "--model", MODEL], tmp_path / "home", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    error, hint = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert MODEL in error
    assert str(tmp_path / "home" / "hub") in error
    assert f"hf download {MODEL}" in hint
    assert not (tmp_path / "checkpoints").exists()


def test_hub_id_with_a_revision_keeps_its_plain_name(tmp_path, fixture_folder):
    home = hub_cache(tmp_path / "home", fixture_folder("tiny"))
    command = ["convert", "--src", "hf", "--dst", "paddle", "--json", "--model"]
    done = run([*command, f"{MODEL}@{COMMIT}"], home, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["out"] == "checkpoints/answerdotai--ModernBERT-base-paddle"
    assert result["manifest"]["source"]["model"] == "answerdotai--ModernBERT-base"
    assert result["manifest"]["source"]["revision"] == COMMIT
    done = run([*command, f"{MODEL}@v9"], home, tmp_path)
    assert done.returncode == 2
    assert "`v9`" in done.stderr


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}@v1", "owner/not a hub id"])
def test_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert resolve_model(name, load_table(), quietly).kind == "directory"


@pytest.mark.parametrize("model", ["owner/name@", "owner/name@../../x", "owner/na me"])
def test_malformed_hub_id_is_a_usage_error(model):
    with pytest.raises(UsageError) as caught:
        resolve_model(model, load_table(), quietly)
    assert caught.value.hint


@pytest.mark.parametrize("model", ["a" * 5000, "~nobody-of-that-name/model"])
def test_path_that_cannot_be_looked_at_is_a_checkpoint_error(model):
    with pytest.raises(CheckpointError, match="cannot be read"):
        resolve_model(model, load_table(), quietly)


def test_path_that_does_not_exist_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_model(str(tmp_path / "a" / "b"), load_table(), quietly)


def test_unknown_name_is_refused():
    with pytest.raises(UsageError, match="neither a directory nor a fixture"):
        resolve_model("bert", load_table(), quietly)


def test_fixture_is_written_once_and_the_same_every_time(tmp_path, monkeypatch):
    digests = []
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        told = []
        source = resolve_model("tiny", load_table(), told.append)
        assert len(told) == 1
        assert resolve_model("tiny", load_table(), told.append).folder == source.folder
        assert len(told) == 1
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in source.folder.iterdir()})
        assert list((tmp_path / name / "modernbert-align" / "fixtures").iterdir()) == [source.folder]
    assert digests[0] == digests[1]


def test_fixture_has_a_tokenizer_with_the_configs_ids(fixture_folder):
    import transformers

    folder = fixture_folder("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    ids = tokenizer("The window is inclusive at both edges.")["input_ids"]
    assert ids[0] == config["cls_token_id"] == tokenizer.cls_token_id
    assert ids[-1] == config["sep_token_id"] == tokenizer.sep_token_id
    assert tokenizer.pad_token_id == config["pad_token_id"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The window is inclusive at both edges."
    assert max(ids) < config["vocab_size"]


def test_sensitive_fixture_hides_no_term(fixture_folder):
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(fixture_folder("tiny-sensitive") / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith(".bias"):
            assert abs(values).min() > 0 or abs(values).mean() > 0.01, name
        elif values.ndim == 1:
            assert abs(values - 1).mean() > 0.1, name
