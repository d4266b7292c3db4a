"""The record of a conversion: what makes two requests the same, and what is no manifest."""

import hashlib
import json
import zlib

import pytest

from modernbert_align.core.manifest import (
    FileDigest,
    Manifest,
    Proof,
    Source,
    digest_file,
    read_manifest,
)
from modernbert_align.core.partial import MANIFEST
from modernbert_align.core.writer import CastRecord, TensorRecord
from modernbert_align.errors import CheckpointError

FILE = FileDigest(name="model.safetensors", size_bytes=7, digest="sha256:ab")
SOURCE = Source(model="base", location="/models/base", revision="r1", files=(FILE,))
CAST = CastRecord(
    elements=6, max_abs=0.5, max_rel=0.25, overflow=1, overflow_max=7e4, underflow=2, subnormal=3, nan=4, inf=5
)


def manifest(**changes):
    values = {
        "src": "hf",
        "dst": "paddle",
        "head": "masked_lm",
        "dtype": "keep",
        "shard_size": "keep",
        "lossless": True,
        "table": "modernbert/1",
        "table_sha256": "cd",
        "source": SOURCE,
        "files": (FILE,),
        "tensors": {
            "x": TensorRecord(file="model.safetensors", digest="sha256:ef", cast=None),
            "y": TensorRecord(file="model.safetensors", digest=None, cast=CAST),
        },
        "tied": (("a", "b"),),
        "dropped": ("c",),
        "proofs": (Proof(level="dye", statement="every element arrived"),),
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
        {"shard_size": "none"},
        {"shard_size": 5},
        *(
            {"source": SOURCE.model_copy(update={"files": (FILE.model_copy(update={key: value}),)})}
            for key, value in (("digest", "sha256:ac"), ("digest", "crc32:ab"), ("size_bytes", 8), ("name", "other"))
        ),
        {"source": SOURCE.model_copy(update={"files": ()})},
        {"source": SOURCE.model_copy(update={"files": (FILE, FILE)})},
    ],
)
def test_what_decides_the_bytes_makes_another_request(changes):
    assert not manifest().same_request(manifest(**changes))
    assert not manifest(**changes).same_request(manifest())


def test_what_does_not_touch_the_bytes_leaves_the_request_the_same():
    published = FILE.model_copy(update={"published": True})
    renamed = Source(model="./copy", location="/elsewhere", revision=None, files=(published,))
    other = manifest(command="other", versions={}, source=renamed, files=(), tensors={}, proofs=())
    assert manifest().same_request(other)
    assert other.same_request(manifest())


def test_bytes_without_a_digest_are_never_known_to_be_the_same():
    unknown = manifest(source=SOURCE.model_copy(update={"files": (FILE.model_copy(update={"digest": None}),)}))
    assert not unknown.same_request(unknown)
    assert manifest().same_request(manifest())


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest().model_dump(mode="json")))
    assert read_manifest(tmp_path) == manifest()
    assert read_manifest(tmp_path / "..") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        *(json.dumps(manifest().model_dump(mode="json") | {"schema_version": n}) for n in (1, 3)),
        json.dumps(manifest().model_dump(mode="json") | {"tensors": 5}),  # as version 1 had it
        json.dumps(manifest().model_dump(mode="json") | {"shard_size": "some"}),
        json.dumps(manifest().model_dump(mode="json") | {"proofs": [{"level": "faith", "statement": ""}]}),
    ],
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
    sha256 = f"sha256:{hashlib.sha256(b'hello').hexdigest()}"
    assert digest_file(tmp_path / "x.json") == FileDigest(name="x.json", size_bytes=5, digest=sha256)
    crc32 = digest_file(tmp_path / "x.json", "crc32")
    assert crc32 == FileDigest(name="x.json", size_bytes=5, digest=f"crc32:{zlib.crc32(b'hello'):08x}")
    assert digest_file(tmp_path / "x.json", "none") == FileDigest(name="x.json", size_bytes=5, digest=None)
    assert not crc32.published
