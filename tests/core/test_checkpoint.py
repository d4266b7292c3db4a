"""Reading checkpoints: what the library writes is read, what it never wrote is refused."""

import json
import pickle
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import TensorSpec, serialize_file
from safetensors.numpy import load_file, save_file

from modernbert_align.core.checkpoint import (
    DTYPE_BYTES,
    INDEX,
    PADDLE_WEIGHTS,
    TORCH_WEIGHTS,
    WEIGHTS,
    Checkpoint,
    TensorInfo,
    check_inside,
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


def written(path, tensors, bits):
    """A file by the library."""
    specs = {
        name: TensorSpec(dtype=LIBRARY[dtype], shape=shape, data_ptr=bits[name].ctypes.data, data_len=bits[name].nbytes)
        for name, (dtype, shape) in tensors.items()
    }
    serialize_file(specs, path, {"format": "pt"})


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
def test_what_the_library_writes_is_read_as_it_is(tensors, tmp_path_factory):
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


@given(elements=st.integers(1, 40), data=st.data(), dtype=st.sampled_from(["U8", "BF16", "F32", "F64"]))
def test_any_run_of_elements_can_be_read(elements, data, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / WEIGHTS
    bits = filled({"first": (dtype, (3,)), "second": (dtype, (elements,)), "third": (dtype, (2,))})
    written(path, {name: (dtype, array.shape) for name, array in bits.items()}, bits)
    start = data.draw(st.integers(0, elements))
    stop = data.draw(st.integers(start, elements))
    out = np.empty(stop - start, dtype=unsigned(dtype))
    open_checkpoint(path.parent).fill("second", start, out)
    assert np.array_equal(out, bits["second"][start:stop])


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
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0.0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, true]}}',
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
        opened.fill("last", 6, np.empty(3, dtype=np.uint32))


def test_a_file_removed_after_it_was_opened_is_noticed(tmp_path):
    save_file({"a": np.arange(8, dtype=np.float32)}, tmp_path / WEIGHTS)
    opened = open_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors` cannot be read: No such file"):
        opened.read("a")


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
    for name in ("pytorch_model.bin", "tf.safetensors", "notes.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    assert refused.value.hint == "found pytorch_model.bin, tf.safetensors; save the model as safetensors first"


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
    with pytest.raises(CheckpointError, match="is not a valid index of shards") as refused:
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


# --- pickles ----------------------------------------------------------------------------------------------------------


def bits_of(*values):
    return np.array(values, dtype=np.uint32)


def read_torch(path):
    """In the place of torch: a file that lists its tensors as text."""
    return {name: (bits_of(*values), "F32") for name, values in json.loads(path.read_text()).items()}


def write_paddle(path, **arrays):
    path.write_bytes(pickle.dumps(arrays, protocol=4))


def test_safetensors_go_before_torchs_pickles_and_those_before_paddles(tmp_path):
    write_paddle(tmp_path / PADDLE_WEIGHTS, paddle=np.zeros(2, np.float32))
    assert set(open_checkpoint(tmp_path, read_torch=read_torch).tensors) == {"paddle"}
    (tmp_path / TORCH_WEIGHTS).write_text('{"torch": [1, 2]}')
    assert set(open_checkpoint(tmp_path, read_torch=read_torch).tensors) == {"torch"}
    save_file({"safe": np.zeros(2, np.float32)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"safe": "model-00001-of-00001.safetensors"}}')
    assert set(open_checkpoint(tmp_path, read_torch=read_torch).tensors) == {"safe"}


def test_torchs_pickles_are_passed_over_without_something_that_reads_them(tmp_path):
    (tmp_path / TORCH_WEIGHTS).write_text('{"torch": [1, 2]}')
    with pytest.raises(CheckpointError, match=r"no `model.safetensors`") as refused:
        open_checkpoint(tmp_path)
    assert "pytorch_model.bin" in refused.value.hint
    write_paddle(tmp_path / PADDLE_WEIGHTS, paddle=np.zeros(2, np.float32))
    assert set(open_checkpoint(tmp_path).tensors) == {"paddle"}


def test_what_a_pickle_holds_is_read_like_a_file(tmp_path):
    (tmp_path / TORCH_WEIGHTS).write_text('{"a": [5, 6, 7, 8]}')
    opened = open_checkpoint(tmp_path, read_torch=read_torch)
    assert opened.pickled
    info = opened.tensors["a"]
    assert (info.dtype, info.shape, info.path, info.size_bytes) == ("F32", (4,), tmp_path / TORCH_WEIGHTS, 16)
    assert opened.read("a").tolist() == [5, 6, 7, 8]
    out = np.empty(2, dtype=np.uint32)
    opened.fill("a", 1, out)
    assert out.tolist() == [6, 7]


def test_safetensors_are_no_pickles(sharded):
    assert not open_checkpoint(sharded[0].folder).pickled


def test_shards_of_pickles_are_held_against_their_index(tmp_path):
    (tmp_path / "one.bin").write_text('{"a": [1]}')
    (tmp_path / "two.bin").write_text('{"b": [2]}')
    index = tmp_path / f"{TORCH_WEIGHTS}.index.json"
    index.write_text('{"weight_map": {"a": "one.bin", "b": "two.bin"}}')
    opened = open_checkpoint(tmp_path, read_torch=read_torch)
    assert (opened.read("a").tolist(), opened.read("b").tolist(), opened.pickled) == ([1], [2], True)
    assert (opened.index, [path.name for path in opened.files]) == (index, ["one.bin", "two.bin"])
    index.write_text('{"weight_map": {"a": "two.bin", "b": "two.bin"}}')
    with pytest.raises(CheckpointError, match=r"places `a` in `two.bin`, which does not hold it"):
        open_checkpoint(tmp_path, read_torch=read_torch)


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(sharded, tmp_path):
    """The checkpoint of three shards as the hub's cache stores one: a snapshot of links to blobs."""
    repository = tmp_path / "models--owner--name"
    folder = repository / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(sharded[0].folder.iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    return folder


def test_a_snapshot_of_the_hub_is_read_through_its_links(sharded, hub):
    assert set(open_checkpoint(hub).tensors) == set(sharded[0].arrays)
    check_inside(hub / "config.json", hub)


@pytest.mark.parametrize("name", [INDEX, "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_a_link_that_leaves_the_checkpoint_is_refused(sharded, hub, tmp_path, name, snapshot):
    folder = hub if snapshot else sharded[0].folder
    outside = tmp_path / "elsewhere"
    shutil.copyfile(sharded[0].folder / name, outside)
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link that leads out of") as refused:
        open_checkpoint(folder)
    assert f"`{folder / name}`" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("weights", [WEIGHTS, TORCH_WEIGHTS, PADDLE_WEIGHTS])
def test_a_whole_file_that_is_a_link_out_is_refused_before_it_is_read(tmp_path, weights):
    (tmp_path / "private").write_bytes(b"no weights at all")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / weights).symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        open_checkpoint(tmp_path / "model", read_torch=read_torch)


def test_a_link_within_the_checkpoint_is_followed(tmp_path):
    (tmp_path / "files").mkdir()
    save_file({"a": np.arange(3, dtype=np.float32)}, tmp_path / "files" / "weights")
    (tmp_path / WEIGHTS).symlink_to("files/weights")
    assert open_checkpoint(tmp_path).read("a").view(np.float32).tolist() == [0, 1, 2]


def test_a_checkpoint_that_is_itself_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    save_file({"a": np.arange(3, dtype=np.float32)}, tmp_path / "real" / WEIGHTS)
    (tmp_path / "link").symlink_to("real")
    assert set(open_checkpoint(tmp_path / "link").tensors) == {"a"}


def test_a_tensor_without_elements_takes_no_bytes(tmp_path):
    info = TensorInfo(name="a", dtype="F32", shape=(3, 0), path=tmp_path / "absent", offset=0)
    assert (info.elements, info.size_bytes) == (0, 0)
    scalar = TensorInfo(name="a", dtype="F64", shape=(), path=tmp_path / "absent", offset=0)
    assert (scalar.elements, scalar.size_bytes) == (1, 8)
    assert not Checkpoint(folder=tmp_path, tensors={"a": info}, files=()).pickled
