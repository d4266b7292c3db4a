"""The record of a conversion: what makes two requests the same, and what is no manifest."""

import hashlib
import json

import pytest

from modernbert_align.core.manifest import (
    MANIFEST,
    FileDigest,
    Manifest,
    Source,
    digest_file,
    package_versions,
    read_manifest,
)
from modernbert_align.errors import CheckpointError

FILE = FileDigest(name="model.safetensors", size_bytes=7, sha256="ab")


def manifest(**changes):
    source = Source(model="base", revision="r1", files=(FILE,))
    values = {
        "src": "hf",
        "dst": "paddle",
        "head": "masked_lm",
        "dtype": "keep",
        "lossless": True,
        "table": "modernbert/1",
        "table_sha256": "cd",
        "source": source,
        "files": (FILE,),
        "tensors": 5,
        "tied": (("a", "b"),),
        "versions": {"numpy": "1"},
        "command": "modernbert-align convert",
    }
    return Manifest(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"src": "paddle"},
        {"dst": "hf"},
        {"head": "base"},
        {"dtype": "bf16"},
        {"table_sha256": "ce"},
        {"tool": "modernbert-align 0.0.0"},
        {"source": Source(model="base", revision="r1", files=(FILE.model_copy(update={"sha256": "ac"}),))},
        {"source": Source(model="base", revision="r1", files=())},
    ],
)
def test_what_decides_the_bytes_makes_another_request(changes):
    assert not manifest().same_request(manifest(**changes))
    assert not manifest(**changes).same_request(manifest())


def test_what_does_not_touch_the_bytes_leaves_the_request_the_same():
    renamed = Source(model="./copy", revision=None, files=(FILE,))
    assert manifest().same_request(manifest(command="other", versions={}, source=renamed, files=()))


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest().model_dump(mode="json")))
    assert read_manifest(tmp_path) == manifest()
    assert read_manifest(tmp_path / "..") is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", json.dumps(manifest().model_dump(mode="json") | {"schema_version": 2})]
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="is not a conversion manifest this version can read") as refused:
        read_manifest(tmp_path)
    assert MANIFEST in refused.value.message
    assert "--force" in refused.value.hint


def test_unknown_keys_make_no_manifest(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest().model_dump(mode="json") | {"signed": True}))
    with pytest.raises(CheckpointError, match="is not a conversion manifest"):
        read_manifest(tmp_path)


def test_a_file_is_digested_by_name_size_and_content(tmp_path):
    (tmp_path / "x.json").write_bytes(b"hello")
    expected = FileDigest(name="x.json", size_bytes=5, sha256=hashlib.sha256(b"hello").hexdigest())
    assert digest_file(tmp_path / "x.json") == expected


def test_absent_packages_are_left_out_of_the_versions():
    found = package_versions(("numpy", "no-such-package-anywhere"))
    assert set(found) == {"python", "numpy"}
