"""The files of a conversion: which tensor goes where, and every byte as the library and transformers write it."""

import errno
import hashlib
import json
import math
import os
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st
from safetensors import TensorSpec, serialize
from safetensors.numpy import load_file

from modernbert_align.core import stream as stream_module
from modernbert_align.core import writer as module
from modernbert_align.core.checkpoint import (
    DTYPE_BYTES,
    INDEX,
    WEIGHTS,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    unsigned,
)
from modernbert_align.core.convert import convert, plan_conversion
from modernbert_align.core.ops import OPS
from modernbert_align.core.output import (
    header_bytes,
    index_text,
    lay_out,
    parse_shard_size,
    shard_name,
)
from modernbert_align.core.partial import Partial
from modernbert_align.core.plan import Layout, Plan, PlanItem
from modernbert_align.core.table import load_table
from modernbert_align.core.writer import read_back, write_outputs
from modernbert_align.errors import CheckpointError, ProofError, UsageError

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
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def filled(tensors):
    """Different bytes for every tensor."""
    generator = np.random.default_rng(7)
    return {
        name: generator.integers(0, 256, (*shape, DTYPE_BYTES[dtype]), np.uint8).view(unsigned(dtype)).reshape(shape)
        if dtype != "BOOL"
        else generator.integers(0, 2, shape).astype(unsigned(dtype))
        for name, (dtype, shape) in tensors.items()
    }


def by_library(tensors, bits, file_format):
    """The bytes the library writes."""
    specs = {
        name: TensorSpec(dtype=LIBRARY[dtype], shape=shape, data_ptr=bits[name].ctypes.data, data_len=bits[name].nbytes)
        for name, (dtype, shape) in tensors.items()
    }
    return bytes(serialize(specs, {"format": file_format}))


def copying(tensors, *, dst="paddle", checkpoint=None):
    """The plan that copies tensors as they are; without a checkpoint it is for looking at only."""
    items = [
        PlanItem(
            sources=(name,), target=name, op=OPS["id"], rows=None, source_dtype=dtype, target_dtype=dtype,
            source_shape=shape, target_shape=shape, shape_blind=False,
        )
        for name, (dtype, shape) in tensors.items()
    ]  # fmt: skip
    return Plan(
        src="hf" if dst == "paddle" else "paddle",
        dst=dst,
        head="base",
        table=load_table(),
        checkpoint=checkpoint or Checkpoint(folder=Path("nowhere"), tensors={}, files=()),
        items=tuple(items),
        prefix="",
        stored={name: name for name in tensors},
        tied=(),
        absent_ties=(),
        dropped=(),
        layout=Layout(agree=0, disagree=0),
        problems=(),
    )


def sharded(homes, *, index=None, **tensors):
    """A plan of bytes, each tensor in the shard `homes` says."""
    infos = {
        name: TensorInfo(name=name, dtype="U8", shape=(size,), path=Path("source") / home, offset=0)
        for (name, size), home in zip(tensors.items(), homes, strict=True)
    }
    files = tuple(Path("source") / home for home in sorted(set(homes)))
    checkpoint = Checkpoint(folder=Path("source"), tensors=infos, files=files, index=index or Path("source") / INDEX)
    return copying({name: ("U8", (size,)) for name, size in tensors.items()}, checkpoint=checkpoint)


def whole(**tensors):
    """A plan of bytes out of one file."""
    return copying({name: ("U8", (size,)) for name, size in tensors.items()})


def names_in(outputs):
    return {output.name: [item.target for item in output.items] for output in outputs}


def written(plan, folder, *, shard_size="none", algorithm="sha256"):
    """Write a plan into an existing folder."""
    outputs = lay_out(plan, shard_size)
    with (folder / "journal").open("w+b") as journal:
        partial = Partial(path=folder, done={}, journal=journal)
        records = write_outputs(plan, outputs, partial, algorithm, allow_overflow=False, progress=None)
    return outputs, records


@pytest.fixture
def source(tmp_path):
    """Writes tensors by the library and gives the plan that copies them."""

    def made(tensors, **options):
        folder = tmp_path / "source"
        folder.mkdir()
        bits = filled(tensors)
        (folder / WEIGHTS).write_bytes(by_library(tensors, bits, "pt"))
        return copying(tensors, checkpoint=open_checkpoint(folder), **options), bits

    return made


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# --- header -----------------------------------------------------------------------------------------------------------


@given(tensors=TENSORS, file_format=st.sampled_from(["pt", "np"]))
def test_the_header_is_the_one_the_library_writes(tensors, file_format):
    library = by_library(tensors, filled(tensors), file_format)
    header, order = header_bytes([(name, *spec) for name, spec in tensors.items()], file_format)
    data = sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in tensors.values())
    assert header == library[: len(library) - data]
    described = json.loads(header[8:])
    assert sorted(order, key=lambda name: (described[name]["data_offsets"], order.index(name))) == order


def test_wider_formats_come_first_and_names_decide_within_one():
    specs = [("b", "BF16", (1,)), ("a", "F32", (1,)), ("c", "F32", (2,)), ("a2", "BF16", ()), ("z", "I64", (1,))]
    header, order = header_bytes(specs, "pt")
    assert order == ["z", "a", "c", "a2", "b"]
    offsets = {name: entry["data_offsets"] for name, entry in json.loads(header[8:]).items() if name in order}
    assert offsets == {"z": [0, 8], "a": [8, 12], "c": [12, 20], "a2": [20, 22], "b": [22, 24]}


@given(tensors=TENSORS, data=st.data())
def test_the_header_does_not_depend_on_the_order_of_the_list(tensors, data):
    specs = [(name, *spec) for name, spec in tensors.items()]
    assert header_bytes(data.draw(st.permutations(specs)), "pt") == header_bytes(specs, "pt")


def test_the_data_begins_at_a_multiple_of_eight():
    for length in range(1, 20):
        header, _ = header_bytes([("n" * length, "F64", (1,))], "pt")
        assert len(header) % 8 == 0
        assert int.from_bytes(header[:8], "little") == len(header) - 8


# --- shard sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keep", "keep"), ("none", "none"), ("1", 1), ("500", 500), ("7B", 7), ("3KB", 3000), ("500MB", 500_000_000),
        ("2GB", 2_000_000_000), ("3KiB", 3072), ("5MiB", 5 << 20), ("2GiB", 2 << 30), ("2 GiB", 2 << 30),
        ("2gib", 2 << 30), ("500mb", 500_000_000), ("007", 7),
    ],
)  # fmt: skip
def test_a_shard_size_is_read_in_bytes(text, expected):
    assert parse_shard_size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "0",
        "0GB",
        "-1",
        "1.5GB",
        "GB",
        "2TB",
        "2 G",
        "2G",
        "K",
        "Keep",
        "NONE",
        "all",
        "2GBs",
        "2GB 3",
        "1e9",
        "1_000",
    ],
)
def test_what_is_no_shard_size_is_refused(text):
    with pytest.raises(UsageError) as refused:
        parse_shard_size(text)
    assert refused.value.message == f"`{text}` is no shard size"
    assert refused.value.hint == "keep, none, or a size such as 500MB or 2GiB"


# --- layout -----------------------------------------------------------------------------------------------------------


def test_shards_are_counted_from_one():
    assert [shard_name(number, 12) for number in (0, 11)] == [
        "model-00001-of-00012.safetensors",
        "model-00012-of-00012.safetensors",
    ]


def test_shards_are_filled_in_model_order_and_a_larger_tensor_has_its_own():
    sizes = {"f": 3, "e": 3, "d": 2, "big": 50, "c": 1, "b": 8, "a": 1}
    found = names_in(lay_out(whole(**sizes), 9))
    assert found == {
        "model-00001-of-00004.safetensors": ["d", "e", "f"],  # within a file by name
        "model-00002-of-00004.safetensors": ["big"],
        "model-00003-of-00004.safetensors": ["b", "c"],  # full to the last byte
        "model-00004-of-00004.safetensors": ["a"],
    }


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), limit=st.integers(1, 14))
def test_every_shard_is_as_full_as_it_can_be(sizes, limit):
    # Names fall so that the order within a file is never the order of the model.
    plan = whole(**{f"t{99 - n}": size for n, size in enumerate(sizes)})
    outputs = lay_out(plan, limit)
    shards = [sorted((item.target for item in output.items), reverse=True) for output in outputs]
    assert [name for shard in shards for name in shard] == [item.target for item in plan.items]
    of = {item.target: item.size_bytes for item in plan.items}
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        assert shard
        size = sum(of[name] for name in shard)
        assert size <= limit or [of[name] > 0 for name in shard].count(True) == 1
        assert following is None or size + of[following[0]] > limit
    if len(shards) == 1:
        assert [output.name for output in outputs] == [WEIGHTS]
    else:
        assert [output.name for output in outputs] == [shard_name(n, len(shards)) for n in range(len(shards))]


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12), limit=st.integers(12, 40))
def test_shards_are_those_of_the_hubs_library_when_every_tensor_fits_one(sizes, limit):
    tensors = {f"t{n}": size for n, size in enumerate(sizes)}
    library = split_state_dict_into_shards_factory(
        tensors, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    outputs = lay_out(whole(**tensors), limit)
    assert {name: sorted(found) for name, found in names_in(outputs).items()} == {
        name: sorted(found) for name, found in library.filename_to_tensors.items()
    }
    text = index_text(whole(**tensors), outputs)
    if library.is_sharded:
        index = {"metadata": library.metadata, "weight_map": library.tensor_to_filename}
        assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    else:
        assert text is None


@pytest.mark.parametrize("shard_size", ["none", 100])
def test_one_file_is_no_shard(shard_size):
    for plan in (whole(a=5, b=6), sharded([FIRST, SECOND], a=5, b=6)):
        outputs = lay_out(plan, shard_size)
        assert names_in(outputs) == {WEIGHTS: ["a", "b"]}
        assert index_text(plan, outputs) is None


def test_what_was_one_file_stays_one_file():
    assert names_in(lay_out(whole(a=5, b=6), "keep")) == {WEIGHTS: ["a", "b"]}


@pytest.mark.parametrize(
    "names",
    [
        (FIRST, SECOND),
        ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"),
        ("z.safetensors", "a.safetensors"),
        ("model.fp32-00001-of-00002.safetensors", "model.fp32-00002-of-00002.safetensors"),
    ],
)
def test_shards_keep_their_names_and_their_tensors(names):
    plan = sharded([names[0], names[1], names[0]], c=5, b=6, a=7)
    found = names_in(lay_out(plan, "keep"))
    assert found == {names[0]: ["a", "c"], names[1]: ["b"]}
    assert list(found) == sorted(names)


def test_a_single_shard_keeps_its_name_and_its_index(tmp_path):
    index = tmp_path / INDEX
    index.write_text('{"metadata": {}, "weight_map": {}}')
    plan = sharded(["model-00001-of-00001.safetensors"] * 2, index=index, a=5, b=6)
    outputs = lay_out(plan, "keep")
    assert names_in(outputs) == {"model-00001-of-00001.safetensors": ["a", "b"]}
    assert json.loads(index_text(plan, outputs))["weight_map"] == dict.fromkeys(
        "ab", "model-00001-of-00001.safetensors"
    )


@pytest.mark.parametrize(
    "hostile",
    [
        "config.json",
        "conversion_manifest.json",
        "conversion_journal.jsonl",
        INDEX,
        "tokenizer.json",
        "pytorch_model-00002-of-00002.bin",
        "model_state-00002-of-00002.pdparams",
        "weights.safetensors.exe",
        ".bashrc",
    ],
)
def test_a_shard_whose_name_is_not_that_of_weights_is_renumbered(hostile):
    names = [FIRST, hostile, FIRST]
    found = names_in(lay_out(sharded(names, a=5, b=6, c=7), "keep"))
    assert set(found) == {FIRST, SECOND}
    assert sorted(found.values()) == [["a", "c"], ["b"]]


def test_shards_that_end_up_empty_leave_no_gap():
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    plan = sharded(names, a=5, b=6, c=7)
    plan = replace(plan, items=tuple(item for item in plan.items if item.target != "b"))
    assert names_in(lay_out(plan, "keep")) == {FIRST: ["a"], SECOND: ["c"]}


def test_a_stack_is_kept_where_its_first_part_is(build_decoder, asking, tmp_path, decoder_table):
    built = build_decoder(tmp_path / "hf", shards=2)
    outputs = plan_conversion(asking(built.folder), decoder_table).outputs
    where = {name: info.path.name for name, info in open_checkpoint(built.folder).tensors.items()}
    apart = 0
    for output in outputs:
        for item in output.items:
            assert where[item.sources[0]] == output.name
            apart += len({where[source] for source in item.sources}) > 1
    assert apart == 3  # in every layer: the builder deals the tensors out in turn


def test_a_file_knows_its_size_and_where_its_tensors_begin():
    (output,) = lay_out(copying({"b": ("F32", (2, 3)), "a": ("BF16", (5,)), "c": ("F32", ())}), "none")
    start = len(output.header)
    assert [item.target for item in output.items] == ["b", "c", "a"]
    assert [output.offset(n) for n in range(4)] == [start, start + 24, start + 28, start + 38]
    assert output.size_bytes == start + 38


# --- index ------------------------------------------------------------------------------------------------------------


def test_the_index_is_written_like_transformers_does():
    plan = whole(b=5, a=6)
    assert index_text(plan, lay_out(plan, 6)) == (
        '{\n  "metadata": {\n    "total_size": 11\n  },\n  "weight_map": {\n'
        f'    "a": "{SECOND}",\n    "b": "{FIRST}"\n  }}\n}}\n'
    )


@pytest.fixture
def indexed(tmp_path):
    """Gives the index of a plan whose source has one with some metadata."""

    def document(metadata, shard_size="keep", **changes):
        index = tmp_path / INDEX
        index.write_text(json.dumps({"metadata": metadata, "weight_map": {}}))
        plan = replace(sharded([FIRST, SECOND], index=index, a=5, b=6), **changes)
        return json.loads(index_text(plan, lay_out(plan, shard_size)))["metadata"]

    return document


@pytest.mark.parametrize("shard_size", ["keep", 6])
def test_what_the_sources_index_says_is_kept_but_for_the_size(indexed, shard_size):
    metadata = {"total_size": 99, "total_parameters": 11, "by": {"x": [1, None]}}
    assert indexed(metadata, shard_size) == metadata | {"total_size": 11}


@pytest.mark.parametrize("metadata", [None, [], "x", 5, {}])
def test_metadata_that_is_none_is_replaced(indexed, metadata):
    assert indexed(metadata) == {"total_size": 11}


def test_what_the_index_says_of_a_whole_model_is_not_said_of_its_base(indexed):
    assert indexed({"total_size": 99, "total_parameters": 11}, dropped=("head.weight",)) == {"total_size": 11}


# --- writing ----------------------------------------------------------------------------------------------------------


@given(tensors=TENSORS, dst=st.sampled_from(["hf", "paddle"]), algorithm=st.sampled_from(["sha256", "crc32", "none"]))
def test_what_is_written_is_what_the_library_writes(tensors, dst, algorithm, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    bits = filled(tensors)
    (root / "source").mkdir()
    (root / "out").mkdir()
    (root / "source" / WEIGHTS).write_bytes(by_library(tensors, bits, "pt"))
    plan = copying(tensors, dst=dst, checkpoint=open_checkpoint(root / "source"))
    (output,), records = written(plan, root / "out", algorithm=algorithm)
    library = by_library(tensors, bits, "pt" if dst == "hf" else "np")
    assert (root / "out" / WEIGHTS).read_bytes() == library
    assert output.size_bytes == len(library)
    assert list(records) == list(tensors)
    for name, record in records.items():
        digest = {
            "sha256": f"sha256:{hashlib.sha256(bits[name].tobytes()).hexdigest()}",
            "crc32": f"crc32:{zlib.crc32(bits[name].tobytes()):08x}",
            "none": None,
        }[algorithm]
        assert (record.file, record.digest, record.cast) == (WEIGHTS, digest, None)
    if algorithm != "none":
        whole_file = {"sha256": hashlib.sha256(library).hexdigest(), "crc32": f"{zlib.crc32(library):08x}"}[algorithm]
        assert read_back(root / "out", [output], records) == {WEIGHTS: f"{algorithm}:{whole_file}"}


@pytest.mark.parametrize("algorithm", ["sha256", "crc32"])
@pytest.mark.parametrize("op", ["id", "T"])
def test_a_digest_is_of_what_was_written_however_slow_the_hasher_is(source, out, monkeypatch, algorithm, op):
    """Else a piece was written into before it was hashed."""
    monkeypatch.setattr(stream_module, "PIECE_BYTES", 1024)
    new_hasher = module.new_hasher

    class Slow:
        def __init__(self, algorithm):
            self._hasher = new_hasher(algorithm)
            self.hexdigest = self._hasher.hexdigest

        def update(self, data):
            time.sleep(0.002)
            self._hasher.update(data)

    monkeypatch.setattr(module, "new_hasher", Slow)
    plan, bits = source({"a": ("F32", (4, 2000)), "b": ("F32", (8, 1000))})
    items = tuple(replace(item, op=OPS[op], target_shape=OPS[op].shape(item.source_shape)) for item in plan.items)
    outputs, records = written(replace(plan, items=items), out, algorithm=algorithm)
    monkeypatch.undo()
    read_back(out, outputs, records)
    for name, array in bits.items():
        moved = OPS[op].apply(array)
        assert np.array_equal(open_checkpoint(out).read(name), moved)
        hasher = new_hasher(algorithm)
        hasher.update(moved.tobytes())
        assert records[name].digest == f"{algorithm}:{hasher.hexdigest()}"


def test_shards_are_written_each_as_the_library_would(source, out):
    tensors = {"b": ("F32", (3,)), "a": ("BF16", (5,)), "c": ("F64", (2, 2))}
    plan, bits = source(tensors)
    outputs, records = written(plan, out, shard_size=24)
    assert names_in(outputs) == {FIRST: ["b", "a"], SECOND: ["c"]}
    for name, part in ((FIRST, ("b", "a")), (SECOND, ("c",))):
        library = by_library({n: tensors[n] for n in part}, {n: bits[n] for n in part}, "np")
        assert (out / name).read_bytes() == library
        assert {records[n].file for n in part} == {name}


def test_the_order_of_the_source_is_not_seen_in_the_output(source, out, tmp_path):
    tensors = {"b": ("F32", (2,)), "a": ("BF16", (3,)), "c": ("F32", (1,))}
    plan, _ = source(tensors)
    written(plan, out)
    (tmp_path / "two").mkdir()
    written(replace(plan, items=plan.items[::-1]), tmp_path / "two")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_what_lies_in_the_partial_folder_is_written_over(source, out):
    plan, bits = source({"a": ("F32", (3,))})
    (out / WEIGHTS).write_bytes(b"x" * 10_000)
    written(plan, out)
    assert (out / WEIGHTS).read_bytes() == by_library({"a": ("F32", (3,))}, bits, "np")


# --- without digests --------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch):
    """The byte counts asked of a system that copies at most 100 at a time."""
    calls = []

    def copy(source, target, count, offset):
        calls.append(count)
        return os.write(target, os.pread(source, min(count, 100), offset))

    monkeypatch.setattr(module.os, "copy_file_range", copy, raising=False)
    return calls


def test_without_digests_unchanged_tensors_are_copied_by_the_system(source, out, copies):
    plan, bits = source({"a": ("F32", (60,)), "b": ("BF16", (5,)), "empty": ("F32", (0, 3))})
    _, records = written(plan, out, algorithm="none")
    assert copies == [240, 140, 40, 10]
    assert {name: open_checkpoint(out).read(name).tolist() for name in bits} == {n: a.tolist() for n, a in bits.items()}
    assert {record.digest for record in records.values()} == {None}


@pytest.mark.parametrize("algorithm", ["sha256", "crc32"])
def test_with_digests_the_bytes_have_to_come_by(source, out, copies, algorithm):
    plan, _ = source({"a": ("F32", (60,))})
    written(plan, out, algorithm=algorithm)
    assert copies == []


def test_tensors_that_change_do_not_take_the_short_way(source, out, copies):
    plan, bits = source({"a": ("F32", (4, 15))})
    transposed = replace(plan.items[0], op=OPS["T"], target_shape=(15, 4))
    written(replace(plan, items=(transposed,)), out, algorithm="none")
    assert np.array_equal(open_checkpoint(out).read("a"), bits["a"].T)
    written(replace(plan, items=(replace(plan.items[0], target_dtype="F64"),)), out, algorithm="none")
    assert np.array_equal(open_checkpoint(out).read("a").view(np.float64), bits["a"].view(np.float32), equal_nan=True)
    assert copies == []


def test_stacks_are_put_together_and_taken_apart_by_the_system(source, out, copies, tmp_path):
    plan, bits = source({"a": ("F32", (4, 5)), "b": ("F32", (3, 5))})
    both = replace(plan.items[0], sources=("b", "a"), target="ba", source_shape=(7, 5), target_shape=(7, 5))
    written(replace(plan, items=(both,)), out, algorithm="none")
    assert np.array_equal(open_checkpoint(out).read("ba"), np.concatenate([bits["b"], bits["a"]]))
    assert copies == [60, 80]
    parts = [
        replace(both, sources=("ba",), target=target, rows=rows, target_shape=(rows[1] - rows[0], 5))
        for target, rows in (("b", (0, 3)), ("a", (3, 7)))
    ]
    (tmp_path / "back").mkdir()
    written(replace(plan, checkpoint=open_checkpoint(out), items=tuple(parts)), tmp_path / "back", algorithm="none")
    for name, array in bits.items():
        assert np.array_equal(open_checkpoint(tmp_path / "back").read(name), array)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_system_cannot_copy_the_bytes_go_through_this_process(source, out, monkeypatch, code):
    def refuse(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    plan, bits = source({"a": ("F32", (60,)), "b": ("BF16", (5,))})
    written(plan, out, algorithm="none")
    assert all(np.array_equal(open_checkpoint(out).read(name), array) for name, array in bits.items())


def test_a_system_without_such_a_call_copies_through_this_process(source, out, monkeypatch):
    monkeypatch.delattr(module.os, "copy_file_range", raising=False)
    plan, bits = source({"a": ("F32", (60,))})
    written(plan, out, algorithm="none")
    assert np.array_equal(open_checkpoint(out).read("a"), bits["a"])


def test_an_error_of_the_disk_is_no_reason_to_copy_another_way(source, out, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "copy_file_range", full, raising=False)
    plan, _ = source({"a": ("F32", (60,))})
    with pytest.raises(OSError, match="No space left"):
        written(plan, out, algorithm="none")


@pytest.mark.parametrize("algorithm", ["sha256", "none"])
def test_a_source_that_ends_early_is_noticed(source, out, algorithm):
    plan, _ = source({"a": ("F32", (60,))})
    path = plan.checkpoint.files[0]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model.safetensors` ended while `a` was read"):
        written(plan, out, algorithm=algorithm)


# --- reading back -----------------------------------------------------------------------------------------------------


def flip(position):
    def damage(content):
        content[position] ^= 1
        return content

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip(0), "the header of `.*` does not read back as it was written"),
        (flip(20), "the header of `.*` does not read back as it was written"),
        (flip(-1), "`b` in `.*` does not read back as it was written"),
        (flip(-25), "`a` in `.*` does not read back as it was written"),
        (lambda content: content[:-1], "`b` in `.*` does not read back as it was written"),
        (lambda content: content + b"\0", "is longer than what was written"),
        (lambda _: b"", "the header of `.*` does not read back as it was written"),
    ],
)
@pytest.mark.parametrize("algorithm", ["sha256", "crc32"])
def test_what_does_not_read_back_is_refused(source, out, damage, says, algorithm):
    plan, _ = source({"a": ("F32", (60,)), "b": ("BF16", (5,))})
    outputs, records = written(plan, out, algorithm=algorithm)
    read_back(out, outputs, records)
    (out / WEIGHTS).write_bytes(damage(bytearray((out / WEIGHTS).read_bytes())))
    with pytest.raises(ProofError, match=says) as refused:
        read_back(out, outputs, records)
    assert refused.value.exit_code == 1
    assert f"`{out / WEIGHTS}`" in refused.value.message


# --- transformers -----------------------------------------------------------------------------------------------------


def test_shards_and_index_of_transformers_come_back_byte_for_byte(tmp_path, asking, table, tiny_config):
    import torch
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    config = tiny_config()
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=config.vocab_size, hidden_size=8, intermediate_size=6, num_hidden_layers=3,
            num_attention_heads=2, pad_token_id=3, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "hf", max_shard_size=2000)
    model.save_pretrained(tmp_path / "whole")
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    there = convert(asking(tmp_path / "hf"), table, tmp_path / "paddle", force=False)
    convert(asking(tmp_path / "paddle", "paddle"), table, tmp_path / "back", force=False)
    for name in (*shards, INDEX, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert sorted(file.name for file in there.manifest.files) == sorted([*shards, INDEX, "config.json"])
    assert (tmp_path / "paddle" / shards[0]).read_bytes() != (tmp_path / "hf" / shards[0]).read_bytes()

    # The same split of a single file: transformers counts the parameters too, which only its index can tell.
    convert(asking(tmp_path / "whole"), table, tmp_path / "one", force=False)
    split = asking(tmp_path / "one", "paddle", shard_size=2000)
    convert(split, table, tmp_path / "split", force=False)
    del index["metadata"]["total_parameters"]
    assert (tmp_path / "split" / INDEX).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"
    for name in shards:
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
        assert set(load_file(tmp_path / "split" / name)) == {n for n, s in index["weight_map"].items() if s == name}
