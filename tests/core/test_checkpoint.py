"""Reading and writing safetensors: what the library writes is read, what it never wrote is refused."""

import hashlib
import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import TensorSpec, serialize
from safetensors.numpy import load_file, save_file

from modernbert_align.core import checkpoint as module
from modernbert_align.core.checkpoint import (
    DTYPE_BYTES,
    INDEX,
    WEIGHTS,
    SafetensorsWriter,
    canonical_order,
    file_sha256,
    open_checkpoint,
    read_header,
    unsigned,
)
from modernbert_align.errors import CheckpointError

# What the library calls each format.
LIBRARY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32",
    "F32": "float32", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


def filled(tensors):
    """Different bytes for every tensor."""
    generator = np.random.default_rng(7)
    return {
        name: generator.integers(0, 2, shape).astype(unsigned(dtype))
        if dtype == "BOOL"
        else generator.integers(0, 256, (*shape, DTYPE_BYTES[dtype]), np.uint8).view(unsigned(dtype)).reshape(shape)
        for name, (dtype, shape) in tensors.items()
    }


def written(path, tensors, bits, file_format="pt"):
    specs = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    with SafetensorsWriter(path, specs, file_format) as writer:
        for name in writer.order:
            writer.write(name, iter([bits[name]]))
    return writer


def raw_file(path, header, body=b"", *, length=None):
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(start, end, shape, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"a": entry(0, 6, [2, 3]), "b": entry(6, 8, [2])}
BODY = bytes(range(10, 18))


@pytest.fixture
def file(tmp_path):
    return tmp_path / WEIGHTS


@given(tensors=TENSORS)
def test_the_writer_writes_what_the_library_writes(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("canonical") / WEIGHTS
    bits = filled(tensors)
    specs = {
        name: TensorSpec(dtype=LIBRARY[dtype], shape=shape, data_ptr=bits[name].ctypes.data, data_len=bits[name].nbytes)
        for name, (dtype, shape) in tensors.items()
    }
    library = bytes(serialize(specs, {"format": "np"}))
    writer = written(path, tensors, bits, "np")
    assert path.read_bytes() == library
    assert writer.sha256 == hashlib.sha256(library).hexdigest() == file_sha256(path)


@given(tensors=TENSORS)
def test_what_is_written_reads_back(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / WEIGHTS
    bits = filled(tensors)
    written(path, tensors, bits)
    opened = open_checkpoint(path.parent)
    assert {name: (info.dtype, info.shape) for name, info in opened.tensors.items()} == tensors
    for name, expected in bits.items():
        found = opened.read(name)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert np.array_equal(found, expected)
        assert opened.tensors[name].size_bytes == expected.nbytes


@given(
    step=st.integers(8, 200),
    elements=st.integers(0, 150),
    dtype=st.sampled_from(["U8", "BF16", "F32", "F64"]),
)
def test_chunks_are_the_whole_tensor_in_order(step, elements, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("chunks") / WEIGHTS
    tensors = {"first": (dtype, (3,)), "second": (dtype, (elements,)), "third": (dtype, (2,))}
    bits = filled(tensors)
    written(path, tensors, bits)
    opened = open_checkpoint(path.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", step)
        pieces = list(opened.chunks("second"))
    assert all(piece.nbytes <= step for piece in pieces)
    assert len(pieces) == -(-elements // (step // DTYPE_BYTES[dtype]))
    assert np.array_equal(np.concatenate([*pieces, bits["second"][:0]]), bits["second"])


def test_wider_formats_come_first_and_names_decide_within_one():
    specs = [
        ("b", "BF16", (1,)),
        ("a", "F32", (1,)),
        ("c", "F32", (2,)),
        ("a2", "BF16", ()),
        ("z", "I64", (1,)),
    ]
    assert [name for name, _, _ in canonical_order(specs)] == ["z", "a", "c", "a2", "b"]


def test_a_file_of_the_library_is_read(tmp_path):
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.array([7, 8], np.int64)}
    save_file(arrays, tmp_path / WEIGHTS, metadata={"format": "pt"})
    tensors, metadata = read_header(tmp_path / WEIGHTS)
    assert metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape, t.elements) for name, t in tensors.items()} == {
        "x": ("F32", (2, 3), 6),
        "y": ("I64", (2,), 2),
    }
    assert open_checkpoint(tmp_path).read("x").view(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_without_metadata_is_read(file):
    tensors, metadata = read_header(raw_file(file, GOOD, BODY))
    assert metadata == {}
    assert open_checkpoint(file.parent).read("b").tolist() == [16, 17]
    assert set(tensors) == {"a", "b"}


@pytest.mark.parametrize("missing", [1, 2, 7])
def test_a_truncated_file_is_refused(file, missing):
    raw_file(file, GOOD, BODY[:-missing])
    with pytest.raises(CheckpointError, match="truncated or has trailing bytes") as refused:
        read_header(file)
    assert f"`{file}`" in refused.value.message
    assert "fetch it again" in refused.value.hint


def test_trailing_bytes_are_refused(file):
    raw_file(file, GOOD, BODY + b"\0")
    size = file.stat().st_size
    with pytest.raises(CheckpointError, match=f"{size} bytes, its header describes {size - 1}"):
        read_header(file)


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\0" * 8, struct.pack("<Q", 2**63) + b"{}", b"PK\x03\x04 a zip file"]
)
def test_a_file_that_is_no_safetensors_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file") as refused:
        read_header(file)
    assert f"`{file}`" in refused.value.message


def test_a_header_longer_than_the_file_is_refused(file):
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_header(raw_file(file, GOOD, b"", length=10_000))


def test_duplicate_tensor_names_are_refused(file):
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
    with pytest.raises(CheckpointError, match="duplicate entry `a`"):
        read_header(raw_file(file, text, b"12"))


@pytest.mark.parametrize(
    ("second", "body"),
    [
        (entry(7, 9, [2]), 9),  # a hole before it
        (entry(5, 7, [2]), 7),  # overlaps the first
        (entry(0, 2, [2]), 6),  # overlaps from the start
        (entry(6, 9, [2]), 9),  # more bytes than elements
        (entry(6, 7, [2]), 7),  # fewer bytes than elements
        (entry(6, 8, [2], "F32"), 8),  # the right number for another dtype
        (entry(8, 6, [2]), 8),  # backwards
        (entry(-2, 0, [2]), 6),
    ],
)
def test_offsets_that_do_not_tile_the_file_are_refused(file, second, body):
    read_header(raw_file(file, GOOD, BODY))
    with pytest.raises(CheckpointError, match="does not fill its place in the file") as refused:
        read_header(raw_file(file, GOOD | {"b": second}, bytes(body)))
    assert f"in `{file}`" in refused.value.message
    assert "`b`" in refused.value.message or "`a`" in refused.value.message


def test_a_hole_before_the_first_tensor_is_refused(file):
    with pytest.raises(CheckpointError, match=r"`a` in .* does not fill its place"):
        read_header(raw_file(file, {"a": entry(2, 8, [6])}, BODY))


@pytest.mark.parametrize(
    "header",
    [
        b"[1,2]",
        b"nonsense!",
        b'{"a": 5}',
        b'{"a": {"dtype": "U8", "shape": [1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}',
        b'{"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": ["x"], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, "1"]}}',
        b'{"a": {"dtype": "U8", "shape": [-1, -1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}}',
        b'{"__metadata__": [1], "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"__metadata__": "pt", "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a\xff": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
    ],
)
def test_a_malformed_header_is_refused_with_the_file_named(file, header):
    read_header(raw_file(file, b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"x"))
    with pytest.raises(CheckpointError) as refused:
        read_header(raw_file(file, header, b"x"))
    assert f"`{file}`" in refused.value.message


@pytest.mark.parametrize("dtype", ["F4", "C64", "float32", ""])
def test_an_unknown_dtype_is_refused_by_name(file, dtype):
    with pytest.raises(CheckpointError, match=f"`a` in .* has the unsupported dtype `{dtype}`"):
        read_header(raw_file(file, {"a": entry(0, 1, [1], dtype)}, b"x"))


def test_empty_tensors_are_read_wherever_they_lie(file):
    header = {"a": entry(0, 0, [0]), "b": entry(0, 2, [2]), "c": entry(2, 2, [3, 0]), "d": entry(2, 3, [])}
    raw_file(file, header, b"\x05\x06\x07")
    opened = open_checkpoint(file.parent)
    assert {name: opened.read(name).tolist() for name in opened.tensors} == {
        "a": [],
        "b": [5, 6],
        "c": [[], [], []],
        "d": 7,
    }


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path):
    arrays = {"first": np.arange(8, dtype=np.float32), "last": np.arange(9, dtype=np.float32)}
    save_file(arrays, tmp_path / WEIGHTS)
    opened = open_checkpoint(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-4])
    assert opened.read("first").size == 8
    with pytest.raises(CheckpointError, match="ended while `last` was read"):
        opened.read("last")
    with pytest.raises(CheckpointError, match="ended while `last` was read"):
        list(opened.chunks("last"))


def test_a_missing_folder_and_a_file_in_its_place_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such directory: .*absent"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file` is not a directory"):
        open_checkpoint(tmp_path / "file")


def test_a_folder_with_other_weights_names_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"no `model.safetensors` and no") as refused:
        open_checkpoint(tmp_path)
    assert refused.value.hint == "the folder has no weights"
    for name in ("pytorch_model.bin", "model_state.pdparams", "notes.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    assert refused.value.hint == "found model_state.pdparams, pytorch_model.bin; save the model as safetensors first"


@pytest.fixture
def sharded(build, tmp_path):
    """A good checkpoint of three shards, and its index to be broken."""
    built = build(tmp_path / "sharded", shards=3)
    index = json.loads((built.folder / INDEX).read_text())

    def rewrite(weight_map=None, **keys):
        document = index | keys | ({"weight_map": weight_map} if weight_map is not None else {})
        (built.folder / INDEX).write_text(json.dumps(document))
        return built.folder

    return built, index["weight_map"], rewrite


def test_shards_are_read_as_one_checkpoint(sharded):
    built, _, _ = sharded
    opened = open_checkpoint(built.folder)
    assert set(opened.tensors) == set(built.arrays)
    assert [path.name for path in opened.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, array in built.arrays.items():
        assert np.array_equal(opened.read(name).view(np.float32), array)


def test_a_missing_shard_is_refused_by_name(sharded):
    built, _, _ = sharded
    (built.folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the shard `model-00002-of-00003.safetensors` listed in .* is missing"):
        open_checkpoint(built.folder)


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/in.safetensors", "..", "."]
)
def test_an_index_that_leaves_its_folder_is_refused(sharded, where):
    built, weight_map, rewrite = sharded
    name = next(iter(weight_map))
    save_file({name: built.arrays[name]}, built.folder.parent / "outside.safetensors")
    (built.folder / "sub").mkdir()
    save_file({name: built.arrays[name]}, built.folder / "sub" / "in.safetensors")
    with pytest.raises(CheckpointError, match=r"which is outside its folder|is missing") as refused:
        open_checkpoint(rewrite(weight_map | {name: where}))
    assert f"`{where}`" in refused.value.message


def test_a_tensor_in_two_shards_is_refused(sharded):
    built, weight_map, _ = sharded
    name = next(n for n, shard in weight_map.items() if "00001" in shard)
    second = built.folder / "model-00002-of-00003.safetensors"
    save_file(load_file(second) | {name: built.arrays[name]}, second)
    with pytest.raises(CheckpointError, match=f"`{name}` is in two shards: .*00001-of.* and .*00002-of"):
        open_checkpoint(built.folder)


def test_a_tensor_the_index_places_in_another_shard_is_refused(sharded):
    _, weight_map, rewrite = sharded
    name = next(n for n, shard in weight_map.items() if "00001" in shard)
    other = "model-00003-of-00003.safetensors"
    with pytest.raises(CheckpointError, match=f"places `{name}` in `{other}`, which does not hold it"):
        open_checkpoint(rewrite(weight_map | {name: other}))


def test_a_tensor_that_only_the_index_knows_is_refused(sharded):
    _, weight_map, rewrite = sharded
    shard = "model-00001-of-00003.safetensors"
    with pytest.raises(CheckpointError, match=f"places `ghost.weight` in `{shard}`, which does not hold it"):
        open_checkpoint(rewrite(weight_map | {"ghost.weight": shard}))


def test_a_tensor_the_index_does_not_list_is_refused(sharded):
    _, weight_map, rewrite = sharded
    name = next(iter(weight_map))
    with pytest.raises(CheckpointError, match=f"`{name}` is in a shard but not in"):
        open_checkpoint(rewrite({n: s for n, s in weight_map.items() if n != name}))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "{",
        '{"weight_map": 5}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": 1, "b": "c"}}',
    ],
)
def test_an_index_that_is_no_index_is_refused(sharded, text):
    built, _, _ = sharded
    (built.folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is not a valid safetensors index") as refused:
        open_checkpoint(built.folder)
    assert INDEX in refused.value.message


def test_an_index_with_duplicate_names_is_refused(sharded):
    built, weight_map, _ = sharded
    name, shard = next(iter(weight_map.items()))
    (built.folder / INDEX).write_text(f'{{"weight_map": {{"{name}": "{shard}", "{name}": "{shard}"}}}}')
    with pytest.raises(CheckpointError, match=f"duplicate entry `{name}`"):
        open_checkpoint(built.folder)


def test_one_whole_file_goes_before_an_index(sharded):
    built, _, _ = sharded
    save_file({"only": np.arange(3, dtype=np.float32)}, built.folder / WEIGHTS)
    assert set(open_checkpoint(built.folder).tensors) == {"only"}


def test_the_writer_refuses_tensors_out_of_order(file):
    specs = [("a", "F32", (1,)), ("b", "F32", (1,))]
    with (
        pytest.raises(AssertionError, match="b written out of order"),
        SafetensorsWriter(file, specs, "pt") as writer,
    ):
        writer.write("b", iter([np.zeros(1, np.uint32)]))


@pytest.mark.parametrize("elements", [1, 3])
def test_the_writer_refuses_a_tensor_of_another_size(file, elements):
    with (
        pytest.raises(AssertionError, match=f"a: {4 * elements} bytes written, 8 declared"),
        SafetensorsWriter(file, [("a", "F32", (2,))], "pt") as writer,
    ):
        writer.write("a", iter([np.zeros(elements, np.uint32)]))


def test_the_writer_refuses_to_end_before_every_tensor_is_written(file):
    specs = [("a", "F32", (1,)), ("b", "F32", (1,))]
    with (
        pytest.raises(AssertionError, match="b was never written"),
        SafetensorsWriter(file, specs, "pt") as writer,
    ):
        writer.write("a", iter([np.zeros(1, np.uint32)]))


def test_the_writer_never_overwrites_a_file(file):
    file.write_text("mine")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(file, [("a", "F32", (1,))], "pt")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 4], [0, 2, 3, 4]])
def test_a_tensor_may_be_written_in_pieces_and_from_views(file, cuts):
    view = np.arange(12, dtype=np.uint32).reshape(3, 4).T
    assert not view.flags.c_contiguous  # the library would write garbage
    with SafetensorsWriter(file, [("t", "F32", (4, 3))], "pt") as writer:
        writer.write("t", (view[start:end] for start, end in pairwise(cuts)))
    assert open_checkpoint(file.parent).read("t").tolist() == view.tolist()


def test_equal_content_gives_equal_bytes_whatever_the_order_it_was_listed_in(tmp_path):
    tensors = {"b": ("F32", (2,)), "a": ("BF16", (3,)), "c": ("F32", (1,))}
    bits = filled(tensors)
    written(tmp_path / "one", tensors, bits)
    written(tmp_path / "two", dict(reversed(tensors.items())), bits)
    assert file_sha256(tmp_path / "one") == file_sha256(tmp_path / "two")


def test_a_digest_is_that_of_the_whole_file(tmp_path, monkeypatch):
    path = Path(tmp_path / "file")
    path.write_bytes(bytes(range(256)) * 10)
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    assert file_sha256(path) == hashlib.sha256(bytes(range(256)) * 10).hexdigest()
