"""Trace files: what is written is what is read, and the header always fits."""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from modernbert_align.core.checkpoint import read_header
from modernbert_align.core.trace_file import TraceWriter
from modernbert_align.errors import UsageError

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def document(size=0):
    return SimpleNamespace(model_dump=lambda mode: {"mode": mode, "filler": "x" * size})


def contents(path):
    tensors, metadata = read_header(path)
    found = {}
    for name, info in tensors.items():
        kind = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}[info.dtype]
        found[name] = np.fromfile(path, dtype=kind, count=info.elements, offset=info.offset).reshape(info.shape)
    return found, json.loads(metadata["trace"])


@pytest.mark.parametrize("room", [8, 512, 1 << 16])
@pytest.mark.parametrize("size", [0, 5000, 3_000_000])
def test_a_header_larger_than_its_room_moves_the_tensors(tmp_path, room, size):
    big = np.random.default_rng(0).random(700_000, dtype=np.float32)  # more than is moved at a time
    with TraceWriter(tmp_path / "t", room) as writer:
        writer.add("a", VALUES.view(np.uint32), "float32")
        writer.add("b", VALUES.astype(ml_dtypes.bfloat16).view(np.uint16), "bfloat16")
        writer.add("big", big.view(np.uint32), "float32")
        writer.add("scalar", np.float32(2).view(np.uint32), "float32")
        writer.finish(document(size))
    found, said = contents(tmp_path / "t")
    assert len(said["filler"]) == size
    assert set(found) == set(writer.digests) == {"a", "b", "big", "scalar"}
    assert (found["a"] == VALUES).all()
    assert (found["b"] == VALUES.astype(ml_dtypes.bfloat16)).all()
    assert (found["big"] == big).all()
    assert (found["scalar"].shape, found["scalar"]) == ((), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_equal_tensors_are_held_once(tmp_path):
    with TraceWriter(tmp_path / "t", 1 << 12) as writer:
        assert writer.add("a", VALUES.view(np.uint32), "float32") == "a"
        assert writer.add("b", VALUES.copy().view(np.uint32), "float32") == "a"
        assert writer.add("c", VALUES.reshape(4, 3).view(np.uint32), "float32") == "c"
        writer.finish(document())
    assert set(contents(tmp_path / "t")[0]) == {"a", "c"}


def test_what_is_not_contiguous_is_written_in_its_order(tmp_path):
    with TraceWriter(tmp_path / "t", 1 << 12) as writer:
        writer.add("a", VALUES.view(np.uint32).T, "float32")
        writer.finish(document())
    assert (contents(tmp_path / "t")[0]["a"] == VALUES.T).all()


def test_an_unfinished_trace_leaves_the_old_one(tmp_path):
    (tmp_path / "t").write_text("old")
    with TraceWriter(tmp_path / "t", 64) as writer:
        writer.add("a", VALUES.view(np.uint32), "float32")
        assert (tmp_path / "t.partial").exists()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("t", "old")]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write `.*/file/t`"):
        TraceWriter(tmp_path / "file" / "t", 64)
