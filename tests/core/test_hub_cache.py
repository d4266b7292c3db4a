"""Recognising the hub's cache: published digests, places not to write to, links that leave a checkpoint."""

import hashlib
import os
from pathlib import Path

import pytest

from modernbert_align.core.hub_cache import in_hub_cache, inside_source, published_sha256

COMMIT = "8949b909ec900327062f0ebf497f51aef5e6f0c8"
SMALL_BLOB = "7cb18dc9bafbfcf74629a4b760af1b160957a83e"


@pytest.fixture(autouse=True)
def no_cache_in_the_environment(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def snapshot(tmp_path):
    """One large file by its SHA-256, one small file by its git digest."""
    repository = tmp_path / "cache" / "models--owner--name"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    large = hashlib.sha256(b"weights").hexdigest()
    for name, blob, content in (("model.safetensors", large, b"weights"), ("config.json", SMALL_BLOB, b"{}")):
        (repository / "blobs" / blob).write_bytes(content)
        (folder / name).symlink_to(Path("..") / ".." / "blobs" / blob)
    return folder


def share_blob(snapshot):
    """Move the large blob where newer versions of huggingface_hub keep it, under a digest that is not its SHA-256."""
    cache = snapshot.parents[2]
    blob = cache / "models--owner--name" / "blobs" / (snapshot / "model.safetensors").readlink().name
    store = cache / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"
    return store


def test_large_file_has_the_digest_of_its_link(snapshot):
    assert published_sha256(snapshot / "model.safetensors") == hashlib.sha256(b"weights").hexdigest()


def test_shared_blob_does_not_pass_its_own_digest_for_a_sha256(snapshot):
    share_blob(snapshot)
    assert published_sha256(snapshot / "model.safetensors") == hashlib.sha256(b"weights").hexdigest()


def test_file_in_a_subfolder_and_absolute_link_have_it_too(snapshot):
    blob = snapshot.parents[1] / "blobs" / ("0" * 64)
    blob.write_bytes(b"")
    (snapshot / "onnx").mkdir()
    (snapshot / "onnx" / "model.onnx").symlink_to(os.path.relpath(blob, snapshot / "onnx"))
    (snapshot / "absolute.bin").symlink_to(blob)
    assert published_sha256(snapshot / "onnx" / "model.onnx") == "0" * 64
    assert published_sha256(snapshot / "absolute.bin") == "0" * 64


def test_snapshot_reached_through_a_link_or_relatively_has_it_too(snapshot, tmp_path, monkeypatch):
    (tmp_path / "shortcut").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    expected = hashlib.sha256(b"weights").hexdigest()
    assert published_sha256(tmp_path / "shortcut" / "model.safetensors") == expected
    assert published_sha256(Path("model.safetensors")) == expected


def test_small_file_has_no_published_sha256(snapshot):
    assert published_sha256(snapshot / "config.json") is None


@pytest.mark.parametrize("name", ["plain", "elsewhere", "absent", "foreign"])
def test_file_that_no_hub_link_vouches_for_has_none(snapshot, tmp_path, name):
    digest = "f" * 64
    (tmp_path / digest).write_bytes(b"")
    (snapshot / "plain").write_bytes(b"")
    (snapshot / "elsewhere").symlink_to(tmp_path / digest)
    other = tmp_path / "cache" / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "foreign").symlink_to(other / digest)
    assert published_sha256(snapshot / name) is None


@pytest.mark.parametrize("repository", ["checkpoint", "datasets--owner--name"])
def test_link_to_blobs_outside_a_model_repository_has_none(tmp_path, repository):
    folder = tmp_path / repository / "snapshots" / "x"
    folder.mkdir(parents=True)
    (tmp_path / repository / "blobs").mkdir()
    (folder / "model.safetensors").symlink_to(f"../../blobs/{'0' * 64}")
    assert published_sha256(folder / "model.safetensors") is None


@pytest.mark.parametrize(
    "below", ["", "snapshots", f"snapshots/{COMMIT}", f"snapshots/{COMMIT}/new/out", "blobs/x", "new"]
)
def test_anything_in_a_cached_repository_is_in_the_hub_cache(snapshot, below):
    assert in_hub_cache(snapshot.parents[1] / below)


def test_dataset_repository_is_in_the_hub_cache(tmp_path):
    (tmp_path / "datasets--owner--name" / "snapshots").mkdir(parents=True)
    assert in_hub_cache(tmp_path / "datasets--owner--name" / "out")


def test_path_that_leads_into_the_cache_through_a_link_is_in_it(snapshot, tmp_path):
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert in_hub_cache(tmp_path / "shortcut" / "out")
    assert in_hub_cache(tmp_path / "elsewhere" / ".." / "shortcut" / "out")


def test_repository_kept_on_another_disk_is_in_the_hub_cache(snapshot, tmp_path):
    repository = snapshot.parents[1]
    repository.rename(tmp_path / "big-disk")
    repository.symlink_to(tmp_path / "big-disk")
    assert in_hub_cache(repository / "out")


def test_shared_blobs_are_in_the_hub_cache(snapshot):
    assert in_hub_cache(share_blob(snapshot).parent / "out")


def test_ordinary_folders_are_not_in_the_hub_cache(snapshot, tmp_path):
    assert not in_hub_cache(tmp_path / "checkpoints" / "owner--name-paddle")
    assert not in_hub_cache(snapshot.parents[1] / ".." / ".." / "out")
    (tmp_path / "models--owner--mine").mkdir()
    assert not in_hub_cache(tmp_path / "models--owner--mine" / "out")  # only called like one


@pytest.mark.parametrize(
    ("variable", "value", "root"),
    [
        ("HF_HUB_CACHE", "{}/a", "a"),
        ("HUGGINGFACE_HUB_CACHE", "{}/b", "b"),
        ("HF_HOME", "{}/c", "c/hub"),
        ("XDG_CACHE_HOME", "{}/d", "d/huggingface/hub"),
        ("HF_HUB_CACHE", "~/e", "home/e"),
        ("HF_HUB_CACHE", "$HOME/f", "home/f"),
        ("HF_HUB_CACHE", "", "home/.cache/huggingface/hub"),
    ],
)
def test_cache_folder_of_the_environment_is_the_hub_cache(tmp_path, monkeypatch, variable, value, root):
    monkeypatch.chdir(tmp_path)
    assert not in_hub_cache(tmp_path / root / "out") or not value
    monkeypatch.setenv(variable, value.format(tmp_path))
    assert in_hub_cache(tmp_path / root)
    assert in_hub_cache(tmp_path / root / "out")
    assert not in_hub_cache((tmp_path / root).parent / "out")


def test_cache_folder_that_is_a_link_is_the_hub_cache_at_both_ends(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "link"))
    assert in_hub_cache(tmp_path / "disk" / "out")
    assert in_hub_cache(tmp_path / "link" / "out")


def test_files_of_a_plain_folder_stay_in_it(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "a").write_bytes(b"")
    (folder / "b").symlink_to("a")
    (tmp_path / "shortcut").symlink_to(folder)
    assert inside_source(folder / "a", folder)
    assert inside_source(folder / "b", folder)
    assert inside_source(tmp_path / "shortcut" / "a", folder)
    assert inside_source(folder / "a", tmp_path / "shortcut")


def test_link_out_of_a_plain_folder_leaves_it(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "a").write_bytes(b"")
    (folder / "absolute").symlink_to(tmp_path / "secret")
    (folder / "relative").symlink_to("../secret")
    (folder / "sibling").symlink_to("../checkpoint-2/a")
    (folder / "loop").symlink_to("loop")
    (folder / "chain").symlink_to("absolute")
    for name in ("absolute", "relative", "sibling", "chain"):
        assert not inside_source(folder / name, folder), name
    assert not inside_source(folder / ".." / "secret", folder)
    assert inside_source(folder / "loop", folder)  # leads nowhere, and raises nothing


def test_files_of_a_snapshot_stay_in_its_repository(snapshot, tmp_path):
    assert inside_source(snapshot / "model.safetensors", snapshot)
    assert inside_source(snapshot / "config.json", snapshot)
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert inside_source(tmp_path / "shortcut" / "config.json", tmp_path / "shortcut")
    share_blob(snapshot)
    assert inside_source(snapshot / "model.safetensors", snapshot)


def test_snapshot_of_a_repository_kept_on_another_disk_stays_in_it(snapshot, tmp_path):
    repository = snapshot.parents[1]
    repository.rename(tmp_path / "big-disk")
    repository.symlink_to(tmp_path / "big-disk")
    assert inside_source(snapshot / "model.safetensors", snapshot)


def test_link_out_of_a_snapshots_repository_leaves_it(snapshot, tmp_path):
    (tmp_path / "secret").write_bytes(b"")
    other = tmp_path / "cache" / "models--owner--other" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    unmarked = tmp_path / "cache" / "blobs" / "x"
    unmarked.parent.mkdir()
    unmarked.write_bytes(b"")
    for name, target in (("secret", tmp_path / "secret"), ("other", other), ("unmarked", unmarked)):
        (snapshot / name).symlink_to(target)
        assert not inside_source(snapshot / name, snapshot), name


def test_folder_that_is_only_laid_out_like_a_snapshot_gets_no_wider_bounds(tmp_path):
    folder = tmp_path / "checkpoint" / "snapshots" / "x"
    folder.mkdir(parents=True)
    (tmp_path / "checkpoint" / "blob").write_bytes(b"")
    (folder / "a").symlink_to("../../blob")
    assert not inside_source(folder / "a", folder)
