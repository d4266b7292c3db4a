"""A conversion: right element by element, the same bytes after a return trip, and all or nothing on disk."""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import zlib
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import TensorSpec, safe_open, serialize

from modernbert_align.core import convert as module
from modernbert_align.core import stream as stream_module
from modernbert_align.core import writer as writer_module
from modernbert_align.core.checkpoint import open_checkpoint
from modernbert_align.core.convert import Request, convert, plan_conversion, translate_config
from modernbert_align.core.manifest import digest_file, read_manifest
from modernbert_align.core.output import index_text, lay_out
from modernbert_align.core.partial import JOURNAL, MANIFEST
from modernbert_align.core.table import load_table, parse_table
from modernbert_align.errors import CheckpointError, ConfigError, ProofError, UsageError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embeddings.tok_embeddings.weight"
PARTS = ("q_proj", "k_proj", "v_proj")
SWITCHES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings")


@pytest.fixture
def unsynced(monkeypatch):
    """For tests of many conversions: without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class StopError(Exception):
    """Raised by a progress callback."""


def run(request, out, *, force=False, progress=None, table=None):
    return convert(request, table or load_table(), out, force=force, progress=progress)


def stored(folder, dtype):
    """What a folder's weights are, by the library that the frameworks use."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name).view(dtype) for name in checkpoint.tensors}


def is_linear(name, array):
    return array.ndim == 2 and "embeddings" not in name


def weight_files(folder):
    """Everything a framework loads weights from: name -> bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name == INDEX or p.suffix == ".safetensors"}


def formats(folder):
    return {info.dtype for info in open_checkpoint(folder).tensors.values()}


@pytest.fixture
def source(build, tmp_path):
    return build(tmp_path / "source" / "hf")


# --- there and back ---------------------------------------------------------------------------------------------------


def test_there_and_back_gives_the_same_files(source, asking, tmp_path):
    run(asking(source.folder), tmp_path / "paddle")
    run(asking(tmp_path / "paddle", "paddle"), tmp_path / "hf")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source.folder / name).read_bytes()
    # The trip did something: the Paddle file is another one.
    assert (tmp_path / "paddle" / WEIGHTS).read_bytes() != (source.folder / WEIGHTS).read_bytes()


@pytest.mark.usefixtures("unsynced")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    switches=st.fixed_dictionaries({name: st.booleans() for name in SWITCHES}),
    hidden=st.sampled_from([4, 8, 12]),
    intermediate=st.integers(1, 9),
    layers=st.integers(1, 3),
    vocab=st.integers(2, 30),
    architecture=st.sampled_from(["ModernBertForMaskedLM", "ModernBertModel"]),
    dtype=st.sampled_from(["F32", "BF16", "F16", "F64"]),
    shards=st.sampled_from([0, 0, 2]),
)
def test_every_small_model_survives_the_return_trip(
    build, asking, tmp_path_factory, switches, hidden, intermediate, layers, vocab, architecture, dtype, shards
):
    root = tmp_path_factory.mktemp("trip")
    built = build(
        root / "hf",
        dtype=dtype,
        shards=shards,
        architectures=[architecture],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        vocab_size=vocab,
        **switches,
    )
    there = run(asking(built.folder), root / "paddle")
    back = run(asking(root / "paddle", "paddle"), root / "back")
    assert there.manifest.lossless
    assert back.manifest.lossless
    assert weight_files(root / "back") == weight_files(built.folder)
    assert len(weight_files(root / "paddle")) == (shards + 1 if shards else 1)
    assert (root / "back" / "config.json").read_bytes() == (built.folder / "config.json").read_bytes()
    shutil.rmtree(root)


def test_the_return_trip_starts_from_either_side(build, asking, tmp_path):
    built = build(tmp_path / "paddle", side="paddle", dtype="BF16")
    run(asking(built.folder, "paddle"), tmp_path / "hf")
    run(asking(tmp_path / "hf"), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (built.folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("side", ["hf", "paddle"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    "architecture",
    ["ModernBertDecoderModel", "ModernBertDecoderForCausalLM", "ModernBertDecoderForSequenceClassification"],
)
def test_a_decoder_survives_the_return_trip_from_either_side(
    build_decoder, asking, tmp_path, decoder_table, side, biases, architecture
):
    other = "paddle" if side == "hf" else "hf"
    built = build_decoder(
        tmp_path / side, side=side, architectures=[architecture], attention_bias=biases, norm_bias=biases
    )
    run(asking(built.folder, side), tmp_path / other, table=decoder_table)
    run(asking(tmp_path / other, other), tmp_path / "back", table=decoder_table)
    assert weight_files(tmp_path / "back") == weight_files(built.folder)
    assert (tmp_path / "back" / "config.json").read_bytes() == (built.folder / "config.json").read_bytes()
    fused = {name for name in open_checkpoint(tmp_path / "paddle").tensors if "Wqkv" in name}
    assert len(fused) == (6 if biases else 3)
    assert not any("_proj" in name for name in open_checkpoint(tmp_path / "paddle").tensors)
    assert not any("Wqkv" in name for name in open_checkpoint(tmp_path / "hf").tensors)


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("side", ["hf", "paddle"])
def test_shards_come_back_byte_for_byte_and_so_does_their_index(build, asking, tmp_path, shards, side):
    built = build(tmp_path / "source", side=side, shards=shards)
    index = json.loads((built.folder / INDEX).read_text())
    index["metadata"] |= {"total_parameters": 1234, "written_by": "someone"}
    (built.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    there = run(asking(built.folder, side), tmp_path / "there")
    run(asking(tmp_path / "there", "paddle" if side == "hf" else "hf"), tmp_path / "back")
    files = weight_files(built.folder)
    assert len(files) == shards + 1
    assert weight_files(tmp_path / "back") == files
    between = weight_files(tmp_path / "there")
    assert set(between) == set(files)
    assert between[INDEX] == files[INDEX]
    assert not any(between[name] == files[name] for name in files if name != INDEX)
    assert there.manifest.shard_size == "keep"
    assert {record.file for record in there.manifest.tensors.values()} == set(files) - {INDEX}
    assert {name: record.file for name, record in there.manifest.tensors.items()} == index["weight_map"]


@pytest.mark.parametrize("shards", [0, 3])
def test_the_split_of_the_output_does_not_change_a_tensor(build, asking, tmp_path, shards):
    built = build(tmp_path / "hf", shards=shards)
    run(asking(built.folder, shard_size="none"), tmp_path / "one")
    whole = stored(tmp_path / "one", np.float32)
    for size in (1, 500, 3000, "keep"):
        out = tmp_path / f"by-{size}"
        result = run(asking(built.folder, shard_size=size), out)
        assert {name: array.tolist() for name, array in stored(out, np.float32).items()} == {
            name: array.tolist() for name, array in whole.items()
        }
        assert result.manifest.shard_size == size
        if size != "keep":
            run(asking(out, "paddle", shard_size="none"), tmp_path / f"back-{size}")
            assert weight_files(tmp_path / f"back-{size}") == weight_files(tmp_path / "back-1")
    assert len(weight_files(tmp_path / "by-1")) == len(whole) + 1
    assert weight_files(tmp_path / "one").keys() == {WEIGHTS}


def test_a_shard_called_like_another_file_of_the_output_does_not_take_its_place(build, asking, tmp_path):
    built = build(tmp_path / "hf", shards=2)
    first = "model-00001-of-00002.safetensors"
    (built.folder / first).rename(built.folder / "tokenizer.json")
    (built.folder / INDEX).write_text((built.folder / INDEX).read_text().replace(first, "tokenizer.json"))
    run(asking(built.folder), tmp_path / "paddle")
    assert set(weight_files(tmp_path / "paddle")) == {first, "model-00002-of-00002.safetensors", INDEX}
    assert "tokenizer.json" not in (tmp_path / "paddle" / INDEX).read_text()
    assert set(open_checkpoint(tmp_path / "paddle").tensors) == set(built.arrays)


# --- values -----------------------------------------------------------------------------------------------------------


def test_every_element_arrives_where_it_belongs(source, asking, tmp_path):
    run(asking(source.folder), tmp_path / "paddle")
    found = stored(tmp_path / "paddle", np.float32)
    assert set(found) == set(source.arrays)
    matrices = 0
    for name, array in source.arrays.items():
        matrices += is_linear(name, array)
        if is_linear(name, array):  # Paddle's Linear stores [in, out]
            rows, cols = array.shape
            assert found[name].shape == (cols, rows)
            assert all(found[name][c, r] == array[r, c] for r in range(rows) for c in range(cols))
            assert not np.array_equal(found[name].ravel(), array.ravel())
        else:
            assert np.array_equal(found[name], array)
    assert matrices == 13


def test_no_two_elements_of_the_test_checkpoint_are_equal(source):
    values = np.concatenate([array.ravel() for array in source.arrays.values()])
    assert len(np.unique(values)) == len(values) > 1500


def test_an_untied_decoder_keeps_the_layout_of_the_embedding(build, asking, tmp_path):
    built = build(tmp_path / "hf", tie_word_embeddings=False)
    run(asking(built.folder), tmp_path / "paddle")
    assert np.array_equal(stored(tmp_path / "paddle", np.float32)["decoder.weight"], built.arrays["decoder.weight"])


@pytest.mark.parametrize("side", ["hf", "paddle"])
def test_q_k_and_v_lie_one_after_the_other_in_paddles_stack(build_decoder, asking, tmp_path, decoder_table, side):
    built = build_decoder(tmp_path / side, side=side, attention_bias=True)
    other = "paddle" if side == "hf" else "hf"
    run(asking(built.folder, side), tmp_path / other, table=decoder_table)
    hf, paddle = stored(tmp_path / "hf", np.float32), stored(tmp_path / "paddle", np.float32)
    for layer in range(3):
        attention = f"model.layers.{layer}.attn"
        for number, part in enumerate(PARTS):
            columns = slice(8 * number, 8 * number + 8)
            weight, bias = hf[f"{attention}.{part}.weight"], hf[f"{attention}.{part}.bias"]
            assert np.array_equal(paddle[f"{attention}.Wqkv.weight"][:, columns], weight.T)
            assert np.array_equal(paddle[f"{attention}.Wqkv.bias"][columns], bias)
            assert not np.array_equal(weight, weight.T)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".attn.", "._orig_mod.attn.").replace("norm.weight", "norm.gamma"),
    ],
)
@pytest.mark.parametrize("shards", [0, 2])
def test_a_checkpoint_of_wrapped_or_older_names_gives_the_file_a_plain_one_gives(
    build, asking, tmp_path, rename, shards
):
    def wrapped(arrays):
        for name in list(arrays):
            arrays[rename(name)] = arrays.pop(name)

    plain, renamed = build(tmp_path / "plain"), build(tmp_path / "renamed", change=wrapped, shards=shards)
    assert not set(plain.arrays) & set(renamed.arrays) or "gamma" in str(renamed.arrays)
    run(asking(plain.folder), tmp_path / "from-plain")
    run(asking(renamed.folder, shard_size="none"), tmp_path / "from-renamed")
    assert weight_files(tmp_path / "from-renamed") == weight_files(tmp_path / "from-plain")


def test_two_versions_of_a_weight_are_refused(build, asking, tmp_path):
    def twice(arrays):
        arrays["model.final_norm.gamma"] = arrays["model.final_norm.weight"].copy()

    built = build(tmp_path / "hf", change=twice)
    with pytest.raises(CheckpointError, match=r"are both `model.final_norm.weight`"):
        run(asking(built.folder), tmp_path / "paddle")
    assert not (tmp_path / "paddle").exists()


def test_a_matrix_of_more_than_1024_rows_is_right(build, asking, tmp_path):
    built = build(tmp_path / "hf", intermediate_size=700)  # Wi has 1400 rows
    run(asking(built.folder), tmp_path / "paddle")
    name = "model.layers.1.mlp.Wi.weight"
    found = stored(tmp_path / "paddle", np.float32)[name]
    r, c = np.meshgrid(np.arange(1400), np.arange(8))
    assert np.array_equal(found, built.arrays[name][r, c])


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_large_tensors_are_moved_in_pieces(build, asking, tmp_path, monkeypatch, dtype):
    source = build(tmp_path / "hf", intermediate_size=70)  # Wi is wider than a tile
    run(asking(source.folder, dtype=dtype), tmp_path / "at-once")
    monkeypatch.setattr(stream_module, "PIECE_BYTES", 52)  # 13 elements; no tensor is a multiple
    run(asking(source.folder, dtype=dtype), tmp_path / "in-pieces")
    assert (tmp_path / "in-pieces" / WEIGHTS).read_bytes() == (tmp_path / "at-once" / WEIGHTS).read_bytes()
    one, other = (read_manifest(tmp_path / name) for name in ("at-once", "in-pieces"))
    assert one.tensors == other.tensors


def test_not_a_number_keeps_its_payload(build, asking, tmp_path):
    name = "model.layers.1.attn.Wo.weight"

    def poison(arrays):
        arrays[name].view(np.uint32)[2, 5] = 0x7F80BEEF

    built = build(tmp_path / "hf", change=poison)
    run(asking(built.folder), tmp_path / "paddle")
    assert open_checkpoint(tmp_path / "paddle").read(name)[5, 2] == 0x7F80BEEF


def test_the_metadata_says_which_framework_reads_the_file(source, asking, tmp_path):
    run(asking(source.folder), tmp_path / "paddle")
    run(asking(tmp_path / "paddle", "paddle"), tmp_path / "hf")
    for folder, expected in (("paddle", "np"), ("hf", "pt")):
        with safe_open(tmp_path / folder / WEIGHTS, framework="numpy") as file:
            assert file.metadata() == {"format": expected}


@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_bfloat16_that_paddle_stored_as_u16_is_bfloat16(build, asking, tmp_path, digest, dtype):
    options = {"digest": digest, "dtype": dtype, "prove": ()}
    real = build(tmp_path / "real", side="paddle", dtype="BF16")
    build(tmp_path / "u16", side="paddle", dtype="U16")
    run(asking(real.folder, "paddle", **options), tmp_path / "from-real")
    result = run(asking(tmp_path / "u16", "paddle", **options), tmp_path / "from-u16")
    assert result.manifest.lossless
    assert {record.cast for record in result.manifest.tensors.values()} == {None}
    assert formats(tmp_path / "u16") == {"U16"}
    assert formats(tmp_path / "from-u16") == {"BF16"}
    assert (tmp_path / "from-u16" / WEIGHTS).read_bytes() == (tmp_path / "from-real" / WEIGHTS).read_bytes()


def test_u16_is_read_as_bfloat16_when_it_is_cast(build, asking, tmp_path):
    built = build(tmp_path / "u16", side="paddle", dtype="U16")
    run(asking(built.folder, "paddle", dtype="fp32"), tmp_path / "hf")
    found = stored(tmp_path / "hf", np.float32)
    for name, array in built.arrays.items():
        there = array.T if is_linear(name, array) else array
        assert np.array_equal(found[name], there.view(ml_dtypes.bfloat16).astype(np.float32))


def test_u16_in_a_hugging_face_checkpoint_is_refused(build, asking, tmp_path):
    with pytest.raises(CheckpointError, match="has the dtype U16, which is not a float format"):
        run(asking(build(tmp_path / "hf", dtype="U16").folder), tmp_path / "paddle")


# --- casts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "target", "name"),
    [("bf16", ml_dtypes.bfloat16, "bfloat16"), ("fp16", np.float16, "float16"), ("fp32", np.float32, "float32")],
)
@pytest.mark.parametrize("stored_as", ["F32", "BF16", "F16"])
def test_a_cast_rounds_every_tensor_to_nearest_even(build, asking, tmp_path, dtype, target, name, stored_as):
    built = build(tmp_path / "hf", dtype=stored_as)
    result = run(asking(built.folder, dtype=dtype), tmp_path / "paddle")
    found = stored(tmp_path / "paddle", target)
    rounded = 0
    for tensor, array in built.arrays.items():
        there = array.T if is_linear(tensor, array) else array
        expected = there.astype(np.float32).astype(target)
        assert found[tensor].shape == expected.shape
        assert found[tensor].tobytes() == expected.tobytes()
        rounded += int((expected.astype(np.float32) != there.astype(np.float32)).sum())
    if (stored_as, dtype) in {("F32", "bf16"), ("F32", "fp16"), ("F16", "bf16")}:
        assert rounded > 100
    else:
        assert rounded == 0
    widening = {("F32", "fp32"), ("BF16", "fp32"), ("F16", "fp32"), ("BF16", "bf16"), ("F16", "fp16")}
    assert result.manifest.lossless is ((stored_as, dtype) in widening)
    assert result.manifest.dtype == dtype
    assert json.loads((tmp_path / "paddle" / "config.json").read_text())["dtype"] == name


def test_fp16_overflow_is_refused_by_name_and_leaves_nothing(build, asking, tmp_path, snapshot):
    name = "model.layers.2.mlp.Wo.weight"

    def overflow(arrays):
        arrays[name][3, 1] = 70000.0

    built = build(tmp_path / "source" / "hf", change=overflow)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"1 value of `{name}` does not fit float16") as refused:
        run(asking(built.folder, dtype="fp16"), tmp_path / "out" / "paddle")
    assert "bf16" in refused.value.hint
    assert snapshot(tmp_path / "out") == {}
    run(asking(built.folder, dtype="bf16"), tmp_path / "out" / "paddle")  # the hint works


def test_overflow_may_be_accepted_and_is_counted(build, asking, tmp_path):
    name = "model.layers.2.mlp.Wo.weight"

    def overflow(arrays):
        arrays[name][3, 1], arrays[name][0, 5] = 70000.0, -1e30

    built = build(tmp_path / "hf", change=overflow)
    result = run(asking(built.folder, dtype="fp16", allow_overflow=True), tmp_path / "paddle")
    found = stored(tmp_path / "paddle", np.float16)[name]
    assert (found[1, 3], found[5, 0]) == (np.inf, -np.inf)
    assert np.isinf(found).sum() == 2
    record = result.manifest.tensors[name].cast
    assert (record.overflow, record.overflow_max, record.inf) == (2, float(np.float32(1e30)), 0)
    assert sum(tensor.cast.overflow for tensor in result.manifest.tensors.values()) == 2
    assert not result.manifest.lossless


def test_an_overflow_that_was_accepted_once_is_not_accepted_for_ever(build, asking, tmp_path):
    def overflow(arrays):
        arrays[EMBEDDING][3, 1] = 70000.0

    built = build(tmp_path / "hf", change=overflow)
    request = asking(built.folder, dtype="fp16")
    run(replace(request, allow_overflow=True), tmp_path / "paddle")
    assert run(replace(request, allow_overflow=True), tmp_path / "paddle").up_to_date
    with pytest.raises(CheckpointError, match="is another or a changed conversion"):
        run(request, tmp_path / "paddle")


def test_the_parts_of_a_stack_that_overflow_are_named(build_decoder, asking, tmp_path, decoder_table):
    def overflow(arrays):
        arrays["model.layers.1.attn.k_proj.weight"][0, 0] = 70000.0

    built = build_decoder(tmp_path / "hf", change=overflow)
    names = " and ".join(f"model.layers.1.attn.{part}.weight" for part in PARTS)
    with pytest.raises(CheckpointError, match=f"1 value of `{names}` does not fit float16"):
        run(asking(built.folder, dtype="fp16"), tmp_path / "paddle", table=decoder_table)


@pytest.mark.parametrize(("dtype", "target"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_the_manifest_says_what_casting_each_tensor_lost(build, asking, tmp_path, dtype, target):
    special = "model.layers.1.mlp.Wi.weight"

    def change(arrays):
        arrays[special][0, :5] = [np.nan, np.inf, -np.inf, 1e-40, 0.0]
        arrays["head.norm.weight"] = arrays["head.norm.weight"].astype(target)

    built = build(tmp_path / "hf", change=change)
    result = run(asking(built.folder, dtype=dtype), tmp_path / "paddle")
    assert set(result.manifest.tensors) == set(built.arrays)
    for name, array in built.arrays.items():
        record = result.manifest.tensors[name].cast
        if name == "head.norm.weight":
            assert record is None  # it was of that format
            continue
        with np.errstate(all="ignore"):
            exact, rounded = array.astype(np.float64), array.astype(target).astype(np.float64)
        kept = np.isfinite(exact)
        error = np.abs(exact[kept] - rounded[kept])
        size = np.abs(exact)[kept]
        assert record.elements == array.size
        assert record.max_abs == error.max() > 0
        assert record.max_rel == (error[size > 0] / size[size > 0]).max()
        assert record.underflow == ((rounded[kept] == 0) & (size > 0)).sum()
        assert (record.nan, record.inf) == ((1, 2) if name == special else (0, 0))
        assert (record.overflow, record.overflow_max) == (0, 0)
    assert (result.manifest.tensors[special].cast.underflow > 0) == (dtype == "fp16")
    assert read_manifest(tmp_path / "paddle") == result.manifest


def test_nothing_is_recorded_where_nothing_was_cast(source, asking, tmp_path):
    result = run(asking(source.folder), tmp_path / "paddle")
    assert {record.cast for record in result.manifest.tensors.values()} == {None}


def test_a_cast_that_widens_is_recorded_as_losing_nothing(build, asking, tmp_path):
    built = build(tmp_path / "hf", dtype="BF16")
    result = run(asking(built.folder, dtype="fp32"), tmp_path / "paddle")
    assert result.manifest.lossless
    for name, record in result.manifest.tensors.items():
        assert (record.cast.elements, record.cast.max_abs) == (built.arrays[name].size, 0)


# --- digests ----------------------------------------------------------------------------------------------------------


def crc32(content):
    return f"{zlib.crc32(content):08x}"


@pytest.mark.parametrize("shards", [0, 2])
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_the_output_is_the_same_whatever_is_digested(build, asking, tmp_path, snapshot, shards, dtype):
    built = build(tmp_path / "hf", shards=shards, files={"tokenizer.json": "{}"})
    found = {}
    for digest in ("sha256", "crc32", "none"):
        run(asking(built.folder, dtype=dtype, digest=digest, prove=()), tmp_path / digest)
        found[digest] = {n: b for n, b in snapshot(tmp_path / digest).items() if n != MANIFEST}
    assert found["sha256"] == found["crc32"] == found["none"]


@pytest.mark.parametrize(
    ("digest", "compute"), [("sha256", lambda content: hashlib.sha256(content).hexdigest()), ("crc32", crc32)]
)
def test_every_file_and_every_tensor_has_its_digest(build, asking, tmp_path, digest, compute):
    built = build(tmp_path / "hf", shards=2, files={"tokenizer.json": "{}"})
    manifest = run(asking(built.folder, digest=digest), tmp_path / "paddle").manifest
    checkpoint = open_checkpoint(tmp_path / "paddle")
    assert set(manifest.tensors) == set(checkpoint.tensors)
    for name, record in manifest.tensors.items():
        assert record.digest == f"{digest}:{compute(checkpoint.read(name).tobytes())}"
        assert record.file == checkpoint.tensors[name].path.name
    for folder, files in ((tmp_path / "paddle", manifest.files), (built.folder, manifest.source.files)):
        assert {file.name for file in files} == {path.name for path in folder.iterdir()} - {MANIFEST}
        for file in files:
            content = (folder / file.name).read_bytes()
            weights = file.name.endswith(".safetensors")
            expected = f"{digest}:{compute(content)}" if weights else f"sha256:{hashlib.sha256(content).hexdigest()}"
            assert (file.digest, file.size_bytes, file.published) == (expected, len(content), False)
    assert [(proof.level, "read back from the disk" in proof.statement) for proof in manifest.proofs] == [
        ("tensors", True)
    ]
    assert f"the {digest} they were written with" in manifest.proofs[0].statement


def test_without_digests_there_are_none(build, asking, tmp_path):
    built = build(tmp_path / "hf", shards=2, files={"tokenizer.json": "{}"})
    request = asking(built.folder, digest="none", prove=())
    manifest = run(request, tmp_path / "paddle").manifest
    assert {record.digest for record in manifest.tensors.values()} == {None}
    undigested = {file.name for file in manifest.files if file.digest is None}
    assert undigested == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {file.name for file in manifest.source.files if file.digest is None} == undigested
    with pytest.raises(CheckpointError, match="is another or a changed conversion"):  # who could tell?
        run(request, tmp_path / "paddle")


def test_without_digests_what_does_not_change_is_copied_by_the_system(source, asking, tmp_path, monkeypatch):
    copied = []

    def copy(source_handle, target_handle, count, offset):
        copied.append(os.write(target_handle, os.pread(source_handle, count, offset)))
        return copied[-1]

    monkeypatch.setattr(writer_module.os, "copy_file_range", copy, raising=False)
    run(asking(source.folder, digest="none", prove=()), tmp_path / "paddle")
    assert sum(copied) == sum(array.nbytes for name, array in source.arrays.items() if not is_linear(name, array))
    copied.clear()
    run(asking(source.folder, prove=()), tmp_path / "digested")
    run(asking(source.folder, digest="none", prove=(), dtype="bf16"), tmp_path / "cast")
    assert copied == []


def test_digests_that_are_not_made_cannot_be_proved_with(source, asking, tmp_path):
    with pytest.raises(UsageError, match="--digest none makes none"):
        run(asking(source.folder, digest="none"), tmp_path / "paddle")
    assert not (tmp_path / "paddle").exists()


def test_a_digest_the_hub_publishes_is_not_computed_again(source, asking, tmp_path):
    published = "5" * 64  # not that of the bytes: nobody looked
    linked = hub_snapshot(tmp_path, source.folder, {WEIGHTS: published})
    manifest = run(asking(linked), tmp_path / "paddle").manifest
    weights, others = (
        [file for file in manifest.source.files if (file.name == WEIGHTS) is wanted] for wanted in (True, False)
    )
    assert [(file.digest, file.published) for file in weights] == [(f"sha256:{published}", True)]
    assert {file.published for file in others} == {False}


# --- the same bytes every time ----------------------------------------------------------------------------------------

CONVERT = """
import sys
from pathlib import Path
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.table import load_table
source, out, dtype, size = sys.argv[1:]
request = Request(folder=Path(source), model="m", revision=None, src="hf", dst="paddle", dtype=dtype,
                  shard_size=int(size) if size.isdigit() else size)
convert(request, load_table("modernbert-decoder"), Path(out), force=False)
"""


@pytest.mark.parametrize(("dtype", "size"), [("keep", "keep"), ("bf16", "900")])
def test_equal_requests_give_equal_bytes_in_every_process(
    build_decoder, asking, tmp_path, snapshot, decoder_table, dtype, size
):
    built = build_decoder(tmp_path / "hf", shards=3, attention_bias=True, files={"tokenizer.json": "{}"})
    found = []
    for number, seed in enumerate(("1", "2")):
        out = tmp_path / f"out-{number}"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", CONVERT, built.folder, out, dtype, size], check=True, env=environment)
        found.append(snapshot(out))
    shard_size = "keep" if size == "keep" else int(size)
    request = replace(asking(built.folder, dtype=dtype, shard_size=shard_size), model="m")
    for number in (2, 3):
        run(request, tmp_path / f"out-{number}", table=decoder_table)
        found.append(snapshot(tmp_path / f"out-{number}"))
    manifests = [json.loads(files.pop(MANIFEST)) for files in found]
    assert found[0]
    assert all(files == found[0] for files in found)
    assert len({json.dumps(manifest | {"command": ""}) for manifest in manifests}) == 1


# --- tied weights -----------------------------------------------------------------------------------------------------


def test_an_equal_tied_copy_is_left_out(build, asking, tmp_path):
    tied = build(tmp_path / "tied", tied_copy=True)
    plain = build(tmp_path / "plain")
    result = run(asking(tied.folder), tmp_path / "from-tied")
    run(asking(plain.folder), tmp_path / "from-plain")
    assert "decoder.weight" in tied.arrays
    assert "decoder.weight" not in open_checkpoint(tmp_path / "from-tied").tensors
    assert (tmp_path / "from-tied" / WEIGHTS).read_bytes() == (tmp_path / "from-plain" / WEIGHTS).read_bytes()
    assert result.manifest.tied == (("decoder.weight", EMBEDDING),)


@pytest.mark.parametrize("where", [(0, 0), (22, 7)])
@pytest.mark.parametrize("side", ["hf", "paddle"])
def test_a_tied_copy_that_differs_in_one_element_is_refused(build, asking, tmp_path, snapshot, where, side):
    def retrain(arrays):
        arrays["decoder.weight"][where] += 0.5

    built = build(tmp_path / "source" / "x", side=side, tied_copy=True, change=retrain)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"`decoder.weight` is tied to `{EMBEDDING}` but their values") as refused:
        run(asking(built.folder, side), tmp_path / "out" / "x")
    assert "`tie_word_embeddings` to false" in refused.value.hint
    assert snapshot(tmp_path / "out") == {}


def test_a_tied_copy_of_another_dtype_is_refused(build, asking, tmp_path, monkeypatch):
    def narrow(arrays):
        arrays["decoder.weight"] = arrays["decoder.weight"].astype(np.float16)

    built = build(tmp_path / "hf", tied_copy=True, change=narrow)
    for piece_bytes in (8 << 20, 96):  # in one piece, and in a different number of pieces
        monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
        with pytest.raises(CheckpointError, match=f"`decoder.weight` is tied to `{EMBEDDING}`"):
            run(asking(built.folder), tmp_path / "paddle")


@pytest.mark.parametrize("piece_bytes", [8 << 20, 96, 4])
def test_tied_copies_are_compared_to_the_last_piece(build, asking, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)

    def retrain(arrays):
        arrays["decoder.weight"][-1, -1] += 0.5

    built = build(tmp_path / "hf", tied_copy=True)
    run(asking(built.folder), tmp_path / "paddle")
    retrained = build(tmp_path / "retrained", tied_copy=True, change=retrain)
    with pytest.raises(CheckpointError, match=f"`decoder.weight` is tied to `{EMBEDDING}`"):
        run(asking(retrained.folder), tmp_path / "other")


def test_a_tied_copy_that_differs_only_in_the_sign_of_zero_is_refused(build, asking, tmp_path):
    def zeros(arrays):
        arrays[EMBEDDING][0, 0], arrays["decoder.weight"][0, 0] = 0.0, -0.0

    with pytest.raises(CheckpointError, match="but their values differ"):
        run(asking(build(tmp_path / "hf", tied_copy=True, change=zeros).folder), tmp_path / "paddle")


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["hf", "paddle"])
def test_the_base_is_written_without_the_head(build, asking, tmp_path, side):
    built = build(tmp_path / "source", side=side)
    base = build(tmp_path / "base", side=side, architectures=["ModernBertModel"])
    result = run(asking(built.folder, side, head="base"), tmp_path / "from-whole")
    run(asking(base.folder, side), tmp_path / "from-base")
    assert weight_files(tmp_path / "from-whole") == weight_files(tmp_path / "from-base")
    assert result.manifest.dropped == ("head.dense.weight", "head.norm.weight", "decoder.bias")
    assert result.manifest.head == "base"
    config = json.loads((tmp_path / "from-whole" / "config.json").read_text())
    assert config == built.config | {"architectures": ["ModernBertModel"]}


@pytest.mark.parametrize("head", ["sequence_classification", "masked_lm"])
def test_a_head_the_source_has_not_is_never_made_up(build, asking, tmp_path, head):
    declared = "ModernBertForMaskedLM" if head != "masked_lm" else "ModernBertModel"
    built = build(tmp_path / "hf", architectures=[declared])
    with pytest.raises(UsageError, match=f"not {head}: its weights for {head} are missing"):
        run(asking(built.folder, head=head), tmp_path / "paddle")


# --- config and other files -------------------------------------------------------------------------------------------


def test_config_keys_that_only_paddle_writes_are_left_out_for_hugging_face():
    table = load_table()
    raw = {"model_type": "modernbert", "hidden_size": 8, "paddlenlp_version": "3.0", "tensor_parallel_degree": 1}
    assert translate_config(raw, table, "hf", None) == {"model_type": "modernbert", "hidden_size": 8}
    assert translate_config(raw, table, "paddle", None) == raw
    assert "paddlenlp_version" in raw


def test_the_config_is_written_as_transformers_writes_it(source, asking, tmp_path):
    (source.folder / "config.json").write_text(json.dumps(dict(reversed(source.config.items()))))
    run(asking(source.folder), tmp_path / "paddle")
    expected = json.dumps(source.config, indent=2, sort_keys=True) + "\n"
    assert (tmp_path / "paddle" / "config.json").read_text() == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_cast_is_written_under_the_key_the_config_uses(key):
    raw = {"model_type": "modernbert", key: "float32"}
    assert translate_config(raw, load_table(), "paddle", "BF16") == {"model_type": "modernbert", key: "bfloat16"}
    assert translate_config(raw, load_table(), "paddle", None) == raw


def test_tokenizer_files_are_carried_unchanged_and_others_are_not(build, asking, tmp_path):
    carried = {name: f"content of {name} \u00fc\r\n" for name in load_table().carried_files}
    others = {"pytorch_model.bin": "x", "README.md": "x", "optimizer.pt": "x", "tokenizer.json.bak": "x"}
    built = build(tmp_path / "hf", files=carried | others)
    result = run(asking(built.folder), tmp_path / "paddle")
    assert {p.name for p in (tmp_path / "paddle").iterdir()} == {*carried, WEIGHTS, "config.json", MANIFEST}
    for name in carried:
        assert (tmp_path / "paddle" / name).read_bytes() == (built.folder / name).read_bytes()
    assert {file.name for file in result.manifest.files} == {*carried, WEIGHTS, "config.json"}


def test_a_sharded_source_can_give_the_file_a_whole_one_gives(build, asking, tmp_path):
    whole, sharded = build(tmp_path / "whole"), build(tmp_path / "sharded", shards=3)
    run(asking(whole.folder), tmp_path / "from-whole")
    result = run(asking(sharded.folder, shard_size="none"), tmp_path / "from-sharded")
    assert weight_files(tmp_path / "from-sharded") == weight_files(tmp_path / "from-whole")
    assert [f.name for f in result.manifest.source.files] == [
        "config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        INDEX,
    ]


def test_the_manifest_describes_the_files_that_are_there(source, asking, tmp_path):
    result = run(asking(source.folder), tmp_path / "paddle")
    manifest = read_manifest(tmp_path / "paddle")
    assert manifest == result.manifest
    assert [digest_file(tmp_path / "paddle" / file.name) for file in manifest.files] == list(manifest.files)
    assert manifest.files[0].name == WEIGHTS
    assert [digest_file(source.folder / f.name) for f in manifest.source.files] == list(manifest.source.files)
    assert (manifest.src, manifest.dst, manifest.head, manifest.dtype) == ("hf", "paddle", "masked_lm", "keep")
    assert set(manifest.tensors) == set(source.arrays)
    assert manifest.table_sha256 == load_table().digest
    assert not result.up_to_date


def test_progress_counts_every_byte_and_ends_at_the_total(source, asking, tmp_path):
    calls = []
    run(asking(source.folder), tmp_path / "paddle", progress=lambda done, total: calls.append((done, total)))
    size = sum(array.nbytes for array in source.arrays.values())
    assert len(calls) == len(source.arrays)
    assert {total for _, total in calls} == {size}
    done = [d for d, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == size


def test_a_dry_run_plans_without_writing(source, asking, snapshot):
    before = snapshot(source.folder.parent)
    conversion = plan_conversion(asking(source.folder, dtype="bf16"), load_table())
    assert len(conversion.plan.items) == len(source.arrays)
    assert conversion.target_config["dtype"] == "bfloat16"
    assert not conversion.lossless
    assert snapshot(source.folder.parent) == before


def test_what_a_dry_run_promises_is_what_is_written(build, asking, tmp_path):
    built = build(tmp_path / "hf", shards=2, files={"tokenizer.json": "x" * 3_000_000})
    for size in ("keep", "none", 2000):
        request = asking(built.folder, shard_size=size)
        conversion = plan_conversion(request, load_table())
        out = run(request, tmp_path / f"by-{size}").out
        promised = {output.name: output.size_bytes for output in conversion.outputs}
        assert promised == {name: len(b) for name, b in weight_files(out).items() if name != INDEX}
        assert (out / INDEX).is_file() == (conversion.index is not None)
        taken = sum(path.stat().st_size for path in out.iterdir())
        assert taken <= conversion.needs_bytes < taken + (1 << 20)


def test_a_dry_run_lists_problems_that_a_conversion_refuses(build, asking, tmp_path):
    def broken(arrays):
        del arrays["decoder.bias"]
        arrays["extra.weight"] = np.zeros(2, np.float32)

    request = asking(build(tmp_path / "hf", change=broken).folder)
    problems = plan_conversion(request, load_table()).plan.problems
    assert len(problems) == 2
    with pytest.raises(CheckpointError) as refused:
        run(request, tmp_path / "paddle")
    assert refused.value.message == f"{problems[0].message} (and 1 more problems; --dry-run lists them)"
    assert refused.value.hint == problems[0].hint
    assert not (tmp_path / "paddle").exists()


def test_the_source_is_never_touched(source, asking, tmp_path, snapshot):
    before = snapshot(source.folder)
    run(asking(source.folder), tmp_path / "paddle")
    run(asking(source.folder, dtype="bf16"), tmp_path / "paddle", force=True)
    assert snapshot(source.folder) == before


# --- running again ----------------------------------------------------------------------------------------------------


def test_a_second_run_finds_everything_up_to_date(source, asking, tmp_path):
    first = run(asking(source.folder), tmp_path / "paddle")
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "paddle").iterdir()}
    second = run(asking(source.folder), tmp_path / "paddle")
    assert second.up_to_date
    assert second.manifest == first.manifest
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "paddle").iterdir()} == stamps


def change_output_weight(out, _source):
    content = bytearray((out / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (out / WEIGHTS).write_bytes(content)


def remove_output_config(out, _source):
    (out / "config.json").unlink()


def change_output_config(out, _source):
    (out / "config.json").write_text((out / "config.json").read_text() + " ")


def change_output_tokenizer(out, _source):
    (out / "tokenizer.json").write_text("changed")


def change_source_weight(_out, source):
    change_output_weight(source, None)


def change_source_config(_out, source):
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"local_attention": 16', '"local_attention": 18'))


def change_source_tokenizer(_out, source):
    (source / "tokenizer.json").write_text("changed")


def add_source_tokenizer_file(_out, source):
    (source / "added_tokens.json").write_text("{}")


def remove_source_tokenizer(_out, source):
    (source / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        change_output_weight,
        change_output_config,
        remove_output_config,
        change_output_tokenizer,
        change_source_weight,
        change_source_config,
        change_source_tokenizer,
        add_source_tokenizer_file,
        remove_source_tokenizer,
    ],
)
def test_after_a_change_only_force_converts_again(build, asking, tmp_path, snapshot, change):
    built = build(tmp_path / "hf", files={"tokenizer.json": "a tokenizer"})
    out = tmp_path / "paddle"
    run(asking(built.folder), out)
    change(out, built.folder)
    changed = snapshot(out)
    with pytest.raises(CheckpointError, match="exists and is another or a changed conversion") as refused:
        run(asking(built.folder), out)
    assert f"`{out}`" in refused.value.message
    assert "--force" in refused.value.hint
    assert snapshot(out) == changed
    assert not run(asking(built.folder), out, force=True).up_to_date
    run(asking(built.folder), tmp_path / "fresh")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "fresh" / WEIGHTS).read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "fresh").iterdir()}
    assert run(asking(built.folder), out).up_to_date


def test_a_proof_that_was_not_made_is_not_passed_over(source, asking, tmp_path):
    run(asking(source.folder, prove=("tensors", "dye")), tmp_path / "paddle")
    for done in ((), ("tensors",), ("dye",), ("tensors", "dye")):
        assert run(asking(source.folder, prove=done), tmp_path / "paddle").up_to_date
    request = asking(source.folder, prove=("tensors", "dye", "roundtrip"))
    with pytest.raises(CheckpointError, match="is up to date, but was converted without --prove roundtrip") as refused:
        run(request, tmp_path / "paddle")
    assert "--force" in refused.value.hint
    assert len(run(request, tmp_path / "paddle", force=True).manifest.proofs) == 3


@pytest.mark.parametrize("options", [{"shard_size": 500}, {"digest": "crc32"}, {"head": "base"}])
def test_other_options_at_the_same_place_need_force(source, asking, tmp_path, options):
    run(asking(source.folder), tmp_path / "paddle")
    with pytest.raises(CheckpointError, match="is another or a changed conversion"):
        run(asking(source.folder, **options), tmp_path / "paddle")
    run(asking(source.folder, **options), tmp_path / "paddle", force=True)
    assert run(asking(source.folder, **options), tmp_path / "paddle").up_to_date


def test_another_dtype_at_the_same_place_needs_force(source, asking, tmp_path):
    run(asking(source.folder), tmp_path / "paddle")
    with pytest.raises(CheckpointError, match="is another or a changed conversion"):
        run(asking(source.folder, dtype="bf16"), tmp_path / "paddle")
    run(asking(source.folder, dtype="bf16"), tmp_path / "paddle", force=True)
    assert formats(tmp_path / "paddle") == {"BF16"}


def test_replacing_leaves_nothing_of_the_old_conversion(source, asking, tmp_path):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "paddle"
    run(asking(source.folder), out)
    run(asking(source.folder, dtype="bf16"), out, force=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["paddle"]
    assert {p.name for p in out.iterdir()} == {WEIGHTS, "config.json", MANIFEST}


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_no_conversion_wrote_is_never_replaced(source, asking, tmp_path, snapshot, force):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and no conversion wrote it") as refused:
        run(asking(source.folder), out, force=force)
    assert f"`{out}`" in refused.value.message
    assert snapshot(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_place_of_the_output_is_never_replaced(source, asking, tmp_path, force):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        run(asking(source.folder), tmp_path / "out", force=force)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_filled(source, asking, tmp_path):
    (tmp_path / "out").mkdir()
    run(asking(source.folder), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).is_file()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name or "old" in p.name]


def test_an_unreadable_manifest_needs_force(source, asking, tmp_path):
    run(asking(source.folder), tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a conversion manifest"):
        run(asking(source.folder), tmp_path / "out")
    run(asking(source.folder), tmp_path / "out", force=True)
    assert set(read_manifest(tmp_path / "out").tensors) == set(source.arrays)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "paddle", "a/b/paddle", "../hf", "../hf/paddle"])
def test_an_output_in_the_way_of_the_source_is_refused(source, asking, snapshot, place):
    before = snapshot(source.folder.parent)
    with pytest.raises(CheckpointError, match="are in each other's way") as refused:
        run(asking(source.folder), source.folder / place, force=True)
    assert "outside the source folder" in refused.value.hint
    assert snapshot(source.folder.parent) == before


def test_an_output_around_the_source_is_refused(source, asking, snapshot):
    before = snapshot(source.folder.parent)
    for place in (source.folder.parent, source.folder / ".."):
        with pytest.raises(CheckpointError, match=r"are in each other's way|has no name of its own"):
            run(asking(source.folder), place, force=True)
    assert snapshot(source.folder.parent) == before


def test_an_output_beside_a_source_of_similar_name_is_fine(source, asking):
    out = source.folder.parent / (source.folder.name + "-paddle")
    assert run(asking(source.folder), out).out.is_dir()


def test_a_link_into_the_source_is_seen_through(source, asking, tmp_path, snapshot):
    (tmp_path / "link").symlink_to(source.folder)
    before = snapshot(source.folder)
    with pytest.raises(CheckpointError, match="are in each other's way"):
        run(asking(source.folder), tmp_path / "link" / "paddle")
    assert snapshot(source.folder) == before


def hub_snapshot(root, folder, blobs=None):
    """The files of a folder as the hub's cache stores them: links to blobs, the large ones named by their SHA-256."""
    repository = root / "cache" / "models--owner--name"
    linked = repository / "snapshots" / "c0ffee"
    linked.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        blob = (blobs or {}).get(path.name, path.name)
        shutil.copyfile(path, repository / "blobs" / blob)
        (linked / path.name).symlink_to(f"../../blobs/{blob}")
    return linked


def test_a_snapshot_of_the_hub_is_read_through_its_links(source, asking, tmp_path):
    (source.folder / "tokenizer.json").write_text("{}")
    linked = hub_snapshot(tmp_path, source.folder)
    run(asking(source.folder), tmp_path / "one")
    run(asking(linked), tmp_path / "two")
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "two")
    assert not any(path.is_symlink() for path in (tmp_path / "two").iterdir())
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("hub", [False, True])
def test_a_link_that_leaves_the_source_is_refused(source, asking, tmp_path, name, hub):
    (source.folder / "tokenizer.json").write_text("{}")
    folder = hub_snapshot(tmp_path, source.folder) if hub else source.folder
    outside = tmp_path / "private"
    shutil.copyfile(source.folder / name, outside)
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link that leads out of") as refused:
        run(asking(folder), tmp_path / "paddle")
    assert f"`{folder / name}`" in refused.value.message
    assert not (tmp_path / "paddle").exists()


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", ""])
def test_an_output_in_a_hub_cache_is_refused(source, asking, tmp_path, snapshot, monkeypatch, variable):
    cache = tmp_path / "cache"
    place = cache / "hub" if variable == "HF_HOME" else cache
    (place / "models--owner--name" / "blobs").mkdir(parents=True)
    if variable:
        monkeypatch.setenv(variable, str(cache))
        out = place / "paddle"
    else:
        out = place / "models--owner--name" / "paddle"  # recognised by its layout
    with pytest.raises(CheckpointError, match=f"the output `{out}` is in the hub cache") as refused:
        run(asking(source.folder), out, force=True)
    assert "choose an --out outside" in refused.value.hint
    assert set(snapshot(cache).values()) == {None}


DiskUsage = namedtuple("DiskUsage", "total used free")


def with_free(monkeypatch, free):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return DiskUsage(10**15, 0, free)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    return asked


def test_a_disk_that_is_too_full_is_refused_before_the_first_byte(source, asking, tmp_path, snapshot, monkeypatch):
    needs = plan_conversion(asking(source.folder), load_table()).needs_bytes
    asked = with_free(monkeypatch, needs - 1)
    before = snapshot(tmp_path)
    out = tmp_path / "a" / "b" / "paddle"
    with pytest.raises(CheckpointError) as refused:
        run(asking(source.folder), out)
    assert refused.value.message == f"`{out}` needs {needs:,} bytes and its disk has {needs - 1:,} free"
    assert "free space" in refused.value.hint
    assert snapshot(tmp_path) == before
    assert asked == [tmp_path]  # the disk is that of the nearest folder there is
    with_free(monkeypatch, needs)
    run(asking(source.folder), out)


def test_what_an_abandoned_attempt_takes_is_free(source, asking, tmp_path, monkeypatch):
    needs = plan_conversion(asking(source.folder), load_table()).needs_bytes
    partial = tmp_path / "paddle.partial"
    partial.mkdir()
    (partial / JOURNAL).write_bytes(b"")
    (partial / WEIGHTS).write_bytes(b"x" * 1000)
    with_free(monkeypatch, needs - 1001)
    with pytest.raises(CheckpointError, match="bytes and its disk has"):
        run(asking(source.folder), tmp_path / "paddle")
    assert partial.is_dir()
    with_free(monkeypatch, needs - 1000)
    run(asking(source.folder), tmp_path / "paddle")


def test_an_up_to_date_output_needs_no_room(source, asking, tmp_path, monkeypatch):
    run(asking(source.folder), tmp_path / "paddle")
    with_free(monkeypatch, 0)
    assert run(asking(source.folder), tmp_path / "paddle").up_to_date


def test_missing_parents_of_the_output_are_made(source, asking, tmp_path):
    run(asking(source.folder), tmp_path / "a" / "b" / "paddle")
    assert (tmp_path / "a" / "b" / "paddle" / WEIGHTS).is_file()


def test_a_parent_that_is_a_file_is_refused(source, asking, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write to `.*file`") as refused:
        run(asking(source.folder), tmp_path / "file" / "paddle")
    assert "choose another --out" in refused.value.hint


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopError, SystemExit])
@pytest.mark.parametrize("after", [1, 10, 23])
def test_an_interrupted_conversion_leaves_nothing(source, asking, tmp_path, snapshot, error, after):
    (tmp_path / "out").mkdir()
    calls = []

    def stop(done, _total):
        calls.append(done)
        # Something is on disk at this moment, else the test would prove nothing.
        assert set(snapshot(tmp_path / "out")) == {
            "paddle.partial",
            f"paddle.partial/{JOURNAL}",
            f"paddle.partial/{WEIGHTS}",
        }
        if len(calls) == after:
            raise error

    with pytest.raises(error):
        run(asking(source.folder), tmp_path / "out" / "paddle", progress=stop)
    assert len(calls) == after
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopError])
def test_an_interrupted_replacement_keeps_the_old_conversion(source, asking, tmp_path, snapshot, error):
    (tmp_path / "out").mkdir()
    run(asking(source.folder), tmp_path / "out" / "paddle")
    before = snapshot(tmp_path / "out")

    def stop(_done, _total):
        raise error

    with pytest.raises(error):
        run(asking(source.folder, dtype="bf16"), tmp_path / "out" / "paddle", force=True, progress=stop)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_replacement_that_fails_while_swapping_keeps_the_old_conversion(
    source, asking, tmp_path, snapshot, monkeypatch, error
):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "paddle"
    run(asking(source.folder), out)
    before = snapshot(tmp_path / "out")
    rename = Path.rename
    failed = []

    def failing(self, target):
        if "partial" in self.name:
            failed.append(self)
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        run(asking(source.folder, dtype="bf16"), out, force=True)
    assert failed
    assert snapshot(tmp_path / "out") == before


def failing_at(call, number, monkeypatch):
    """Let a system call fail for want of room, the `number`-th time it is made; returns how often it was made."""
    made = []
    real = getattr(os, call)

    def fail(*arguments):
        made.append(arguments)
        if len(made) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(writer_module.os, call, fail)
    return made


@pytest.mark.parametrize(
    ("call", "number", "says"),
    [
        ("fsync", 1, "cannot write to"),  # the journal
        ("fsync", 2, "cannot make"),  # the weights
        ("fsync", 3, "cannot make"),
        ("fsync", 5, "cannot make"),  # the manifest
        ("write", 1, "cannot make"),  # the header
        ("write", 2, "cannot make"),
        ("write", 20, "cannot make"),
    ],
)
def test_a_full_disk_leaves_nothing_and_says_so(source, asking, tmp_path, snapshot, monkeypatch, call, number, says):
    (tmp_path / "out").mkdir()
    made = failing_at(call, number, monkeypatch)
    with pytest.raises(CheckpointError, match=rf"{says} `.*paddle.*`: .*No space left on device") as refused:
        run(asking(source.folder), tmp_path / "out" / "paddle")
    assert len(made) >= number
    assert "free space" in refused.value.hint
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize("digest", ["sha256", "crc32"])
@pytest.mark.parametrize("position", [0, 30, -3])
def test_a_file_that_does_not_read_back_is_refused_and_removed(
    source, asking, tmp_path, snapshot, monkeypatch, digest, position
):
    (tmp_path / "out").mkdir()
    write = module.write_outputs

    def damaged(plan, outputs, partial, *arguments, **options):
        records = write(plan, outputs, partial, *arguments, **options)
        content = bytearray((partial.path / WEIGHTS).read_bytes())
        content[position] ^= 1
        (partial.path / WEIGHTS).write_bytes(content)
        return records

    monkeypatch.setattr(module, "write_outputs", damaged)
    with pytest.raises(ProofError, match="does not read back as it was written"):
        run(asking(source.folder, digest=digest), tmp_path / "out" / "paddle")
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("change", ["touched", "replaced", "grown"])
def test_a_source_that_changes_while_it_is_converted_is_refused(source, asking, tmp_path, snapshot, name, change):
    (tmp_path / "out").mkdir()
    (source.folder / "tokenizer.json").write_text("{}")
    path = source.folder / name

    def alter(done, total):
        if done != total:  # once
            return
        before = path.stat()
        if change == "touched":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
        elif change == "replaced":
            content = path.read_bytes()
            path.write_bytes(content[:-1] + b" ")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
        else:
            with path.open("ab") as file:
                file.write(b"  ")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(CheckpointError, match=f"`{path}` changed while it was converted") as refused:
        run(asking(source.folder), tmp_path / "out" / "paddle", progress=alter)
    assert "at rest" in refused.value.hint
    assert snapshot(tmp_path / "out") == {}


def test_an_index_or_shard_that_changes_while_it_is_converted_is_noticed_too(build, asking, tmp_path):
    built = build(tmp_path / "hf", shards=2)
    for name in (INDEX, "model-00001-of-00002.safetensors"):

        def touch(_done, _total, path=built.folder / name):
            os.utime(path, ns=(0, 0))

        with pytest.raises(CheckpointError, match=f"{name}` changed while it was converted"):
            run(asking(built.folder), tmp_path / "paddle", progress=touch)
    assert not (tmp_path / "paddle").exists()


def test_a_file_that_shrinks_while_it_is_read_leaves_nothing(source, asking, tmp_path, snapshot):
    (tmp_path / "out").mkdir()

    def shrink(_done, _total):
        content = (source.folder / WEIGHTS).read_bytes()
        (source.folder / WEIGHTS).write_bytes(content[: len(content) // 2])

    with pytest.raises(CheckpointError, match=r"ended while `.*` was read"):
        run(asking(source.folder), tmp_path / "out" / "paddle", progress=shrink)
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)]
)
def test_the_umask_is_respected(source, asking, tmp_path, umask, folder_mode, file_mode):
    (source.folder / "tokenizer.json").write_text("{}")
    (source.folder / "tokenizer.json").chmod(0o600)
    before = os.umask(umask)
    try:
        run(asking(source.folder), tmp_path / "paddle")
        assert os.umask(umask) == umask  # and it is left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "paddle").stat().st_mode) == folder_mode
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "paddle").iterdir()}
    assert modes == dict.fromkeys([WEIGHTS, "config.json", "tokenizer.json", MANIFEST], file_mode)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"architectures": ["ModernBertDecoderForCausalLM"]}, UsageError, "ModernBertDecoderForCausalLM"),
        ({"architectures": None}, UsageError, "architecture `none`"),
        ({"model_type": "bert"}, ConfigError, "`model_type` is `bert`"),
        ({"rope_scaling": {"factor": 2}}, ConfigError, "`rope_scaling.factor`"),
    ],
)
def test_a_config_that_cannot_be_converted_writes_nothing(source, asking, tmp_path, snapshot, keys, error, message):
    (tmp_path / "out").mkdir()
    document = {key: value for key, value in (source.config | keys).items() if value is not None}
    (source.folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(error, match=message) as refused:
        run(asking(source.folder), tmp_path / "out" / "paddle")
    assert str(source.folder / "config.json") in refused.value.message
    assert snapshot(tmp_path / "out") == {}


# --- any table --------------------------------------------------------------------------------------------------------

UNSIGNED = {"F64": "u8", "F32": "u4", "F16": "u2", "BF16": "u2"}
LIBRARY = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_SIZES = st.one_of(st.sampled_from(["none", "keep"]), st.integers(1, 300))


@st.composite
def groups(draw):
    """Rows that give one Paddle weight: its op, dtype, whether each layer has one, and the shapes of its parts."""
    op = draw(st.sampled_from(["id", "T"]))
    stacked = draw(st.booleans())
    count = draw(st.integers(1, 3)) if stacked else 1
    dimension = st.integers(0, 4)
    rest = draw(st.lists(dimension, min_size=1 if op == "T" else 0, max_size=1 if op == "T" else 2))
    scalar = op == "id" and not stacked and draw(st.booleans())
    return {
        "op": op,
        "stacked": stacked,
        "dtype": draw(st.sampled_from(sorted(UNSIGNED))),
        "layered": draw(st.booleans()),
        "renamed": draw(st.booleans()),
        "shapes": [() if scalar else (draw(dimension), *rest) for _ in range(count)],
    }


def document_of(chosen):
    """The table that says what `chosen` says."""
    rows = []
    for number, group in enumerate(chosen):
        where, probe = ("layers.{i}.", "layers.{i}") if group["layered"] else ("", "model")
        for part, shape in enumerate(group["shapes"]):
            hf = f"{where}g{number}.p{part}.weight" if group["stacked"] else f"{where}g{number}.weight"
            same = not group["renamed"] and not group["stacked"]
            rows.append(
                {
                    "hf": hf,
                    "paddle": hf if same else f"{where}other{number}",
                    "op": group["op"],
                    "shape": " ".join(map(str, shape)),
                    "kind": "linear",
                    "probe": probe,
                    "part": group["stacked"],
                }
            )
    return {
        "id": "random/1",
        "prefix": "model.",
        "sides": {"hf": {"linear": "[out, in]", "format": "pt"}, "paddle": {"linear": "[in, out]", "format": "np"}},
        "symbols": {},
        "heads": {"base": {"architecture": "Base", "rows": []}, "full": {"architecture": "Full", "rows": []}},
        "rows": {"body": rows},
        "config": {"model_type": "random", "paddle_only": [], "carried_files": []},
    }


def arrays_of(chosen, layers, prefix, bits):
    """What both sides hold, by numpy alone: Hugging Face's arrays, Paddle's arrays, and the format of each name."""
    hf, paddle, dtypes = {}, {}, {}
    for number, group in enumerate(chosen):
        for layer in range(layers) if group["layered"] else [None]:
            where = prefix + ("" if layer is None else f"layers.{layer}.")
            own = []
            for part, shape in enumerate(group["shapes"]):
                size = math.prod(shape) * int(UNSIGNED[group["dtype"]][1])
                array = np.frombuffer(bits.bytes(size), dtype=UNSIGNED[group["dtype"]]).reshape(shape)
                name = f"{where}g{number}.p{part}.weight" if group["stacked"] else f"{where}g{number}.weight"
                hf[name] = array
                own.append(name)
            whole = np.concatenate([hf[name] for name in own]) if group["stacked"] else hf[own[0]]
            target = f"{where}other{number}" if group["renamed"] or group["stacked"] else own[0]
            paddle[target] = np.ascontiguousarray(whole.T) if group["op"] == "T" else whole
            dtypes |= dict.fromkeys([*own, target], group["dtype"])
    return hf, paddle, dtypes


def by_library(arrays, dtypes, file_format):
    specs = {
        name: TensorSpec(
            dtype=LIBRARY[dtypes[name]], shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    return bytes(serialize(specs, {"format": file_format}))


@pytest.mark.usefixtures("unsynced")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(groups(), min_size=1, max_size=4),
    layers=st.integers(1, 2),
    head=st.sampled_from(["base", "full"]),
    shards=st.integers(0, 3),
    sizes=st.tuples(SHARD_SIZES, SHARD_SIZES),
    digest=st.sampled_from(["sha256", "crc32", "none"]),
    proofs=st.sets(st.sampled_from(["dye", "roundtrip"])),
    seed=st.integers(0, 2**32 - 1),
    piece_bytes=st.sampled_from([16, 1 << 20]),
)
def test_any_table_converts_there_and_back(
    tmp_path_factory, chosen, layers, head, shards, sizes, digest, proofs, seed, piece_bytes
):
    root = tmp_path_factory.mktemp("any")
    table = parse_table(document_of(chosen), "digest", where="random.toml")
    bits = np.random.RandomState(seed)
    hf, paddle, dtypes = arrays_of(chosen, layers, "" if head == "base" else "model.", bits)
    source = root / "hf"
    source.mkdir()
    config = {"model_type": "random", "architectures": [table.architecture(head)], "num_hidden_layers": layers}
    (source / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if shards:
        home = {name: f"part-{bits.randint(shards)}.safetensors" for name in hf}
        for file in set(home.values()):
            part = {name: array for name, array in hf.items() if home[name] == file}
            (source / file).write_bytes(by_library(part, dtypes, "pt"))
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))
    else:
        (source / WEIGHTS).write_bytes(by_library(hf, dtypes, "pt"))
    prove = tuple(level for level in ("tensors", "dye", "roundtrip") if level in proofs and digest != "none")

    def converted(folder, src, out, size):
        dst = "paddle" if src == "hf" else "hf"
        request = Request(
            folder=folder, model="m", revision=None, src=src, dst=dst, shard_size=size, digest=digest, prove=prove
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream_module, "PIECE_BYTES", piece_bytes)
            convert(request, table, out, force=False)
        return plan_conversion(request, table)

    there = converted(source, "hf", root / "paddle", sizes[0])
    found = open_checkpoint(root / "paddle")
    assert set(found.tensors) == set(paddle)
    for name, array in paddle.items():
        assert found.tensors[name].dtype == dtypes[name]
        assert found.tensors[name].shape == array.shape
        assert found.read(name).tobytes() == array.tobytes()
    for output in there.outputs:
        part = {item.target: paddle[item.target] for item in output.items}
        assert (root / "paddle" / output.name).read_bytes() == by_library(part, dtypes, "np")
    assert set(weight_files(root / "paddle")) == {o.name for o in there.outputs} | ({INDEX} if there.index else set())
    assert [o.name for o in lay_out(there.plan, sizes[0])] == [o.name for o in there.outputs]
    assert index_text(there.plan, there.outputs) == there.index

    converted(root / "paddle", "paddle", root / "split", sizes[1])
    assert {name: array.tobytes() for name, array in hf.items()} == {
        name: open_checkpoint(root / "split").read(name).tobytes() for name in hf
    }
    converted(root / "paddle", "paddle", root / "back", "none")
    assert weight_files(root / "back") == {WEIGHTS: by_library(hf, dtypes, "pt")}
    assert (root / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    shutil.rmtree(root)
