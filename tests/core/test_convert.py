"""A conversion: right element by element, the same bytes after a return trip, and all or nothing on disk."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from modernbert_align.core import checkpoint as checkpoint_module
from modernbert_align.core import convert as module
from modernbert_align.core.checkpoint import open_checkpoint
from modernbert_align.core.convert import convert, plan_conversion, translate_config
from modernbert_align.core.manifest import MANIFEST, digest_file, read_manifest
from modernbert_align.core.table import load_table
from modernbert_align.errors import CheckpointError, ConfigError, UsageError

WEIGHTS = "model.safetensors"
EMBEDDING = "model.embeddings.tok_embeddings.weight"
SWITCHES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings")


class StopError(Exception):
    """Raised by a progress callback."""


def run(request, out, *, force=False, progress=None):
    return convert(request, load_table(), out, force=force, progress=progress)


def stored(folder, dtype):
    """What a folder's weights are, by the library that the frameworks use."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name).view(dtype) for name in checkpoint.tensors}


def is_linear(name, array):
    return array.ndim == 2 and "embeddings" not in name


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


@settings(max_examples=25)
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
    whole = root / "whole.safetensors"
    save_file(built.arrays, whole, metadata={"format": "pt"})  # one file, whatever the source was
    assert (root / "back" / WEIGHTS).read_bytes() == whole.read_bytes()
    assert (root / "back" / "config.json").read_bytes() == (built.folder / "config.json").read_bytes()
    shutil.rmtree(root)


def test_the_return_trip_starts_from_either_side(build, asking, tmp_path):
    built = build(tmp_path / "paddle", side="paddle", dtype="BF16")
    run(asking(built.folder, "paddle"), tmp_path / "hf")
    run(asking(tmp_path / "hf"), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (built.folder / WEIGHTS).read_bytes()


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


def test_a_matrix_of_more_than_1024_rows_is_right(build, asking, tmp_path):
    built = build(tmp_path / "hf", intermediate_size=700)  # Wi has 1400 rows
    run(asking(built.folder), tmp_path / "paddle")
    name = "model.layers.1.mlp.Wi.weight"
    found = stored(tmp_path / "paddle", np.float32)[name]
    r, c = np.meshgrid(np.arange(1400), np.arange(8))
    assert np.array_equal(found, built.arrays[name][r, c])


def test_large_tensors_are_copied_in_chunks(source, asking, tmp_path, monkeypatch):
    run(asking(source.folder), tmp_path / "at-once")
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", 52)  # 13 elements; no tensor is a multiple
    run(asking(source.folder), tmp_path / "chunked")
    assert (tmp_path / "chunked" / WEIGHTS).read_bytes() == (tmp_path / "at-once" / WEIGHTS).read_bytes()


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


def test_bfloat16_that_paddle_stored_as_u16_is_bfloat16(build, asking, tmp_path):
    real = build(tmp_path / "real", side="paddle", dtype="BF16")
    build(tmp_path / "u16", side="paddle", dtype="U16")
    run(asking(real.folder, "paddle"), tmp_path / "from-real")
    run(asking(tmp_path / "u16", "paddle"), tmp_path / "from-u16")
    assert formats(tmp_path / "u16") == {"U16"}
    assert formats(tmp_path / "from-u16") == {"BF16"}
    assert (tmp_path / "from-u16" / WEIGHTS).read_bytes() == (tmp_path / "from-real" / WEIGHTS).read_bytes()


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
    with pytest.raises(CheckpointError, match=f"1 values of `{name}` do not fit float16") as refused:
        run(asking(built.folder, dtype="fp16"), tmp_path / "out" / "paddle")
    assert "bf16" in refused.value.hint
    assert snapshot(tmp_path / "out") == {}
    run(asking(built.folder, dtype="bf16"), tmp_path / "out" / "paddle")  # the hint works


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
    for chunk_bytes in (8 << 20, 96):  # in one piece, and in a different number of pieces
        monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", chunk_bytes)
        with pytest.raises(CheckpointError, match=f"`decoder.weight` is tied to `{EMBEDDING}`"):
            run(asking(built.folder), tmp_path / "paddle")


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


def test_a_sharded_source_gives_the_file_a_whole_one_gives(build, asking, tmp_path):
    whole, sharded = build(tmp_path / "whole"), build(tmp_path / "sharded", shards=3)
    run(asking(whole.folder), tmp_path / "from-whole")
    result = run(asking(sharded.folder), tmp_path / "from-sharded")
    assert (tmp_path / "from-sharded" / WEIGHTS).read_bytes() == (tmp_path / "from-whole" / WEIGHTS).read_bytes()
    assert [f.name for f in result.manifest.source.files] == [
        "config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    ]


def test_the_manifest_describes_the_files_that_are_there(source, asking, tmp_path):
    result = run(asking(source.folder), tmp_path / "paddle")
    manifest = read_manifest(tmp_path / "paddle")
    assert manifest == result.manifest
    assert [digest_file(tmp_path / "paddle" / file.name) for file in manifest.files] == list(manifest.files)
    assert manifest.files[0].name == WEIGHTS
    assert [digest_file(source.folder / f.name) for f in manifest.source.files] == list(manifest.source.files)
    assert (manifest.src, manifest.dst, manifest.head, manifest.dtype) == ("hf", "paddle", "masked_lm", "keep")
    assert manifest.tensors == len(source.arrays)
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
    plan, config = plan_conversion(asking(source.folder, dtype="bf16"), load_table())
    assert len(plan.items) == len(source.arrays)
    assert config["dtype"] == "bfloat16"
    assert snapshot(source.folder.parent) == before


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
    assert read_manifest(tmp_path / "out").tensors == len(source.arrays)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "paddle", "a/b/paddle", "../hf", "../hf/paddle", ".."])
def test_an_output_in_the_way_of_the_source_is_refused(source, asking, snapshot, place):
    before = snapshot(source.folder.parent)
    with pytest.raises(CheckpointError, match="are in each other's way") as refused:
        run(asking(source.folder), source.folder / place, force=True)
    assert "outside the source folder" in refused.value.hint
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


def test_a_source_of_links_is_followed(source, asking, tmp_path):
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in source.folder.iterdir():  # as the hub cache does
        (linked / path.name).symlink_to(path)
    run(asking(source.folder), tmp_path / "one")
    run(asking(linked), tmp_path / "two")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert not (tmp_path / "two" / WEIGHTS).is_symlink()


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
        assert len(snapshot(tmp_path / "out")) == 2
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


def test_a_full_disk_leaves_nothing_and_says_so(source, asking, tmp_path, snapshot, monkeypatch):
    (tmp_path / "out").mkdir()

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot make `.*paddle`: .*No space left on device") as refused:
        run(asking(source.folder), tmp_path / "out" / "paddle")
    assert "free space" in refused.value.hint
    assert snapshot(tmp_path / "out") == {}


def test_a_file_that_does_not_read_back_is_refused_and_removed(source, asking, tmp_path, snapshot, monkeypatch):
    (tmp_path / "out").mkdir()
    write = module._write

    def damaged(plan, path, progress):
        digest = write(plan, path, progress)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        return digest

    monkeypatch.setattr(module, "_write", damaged)
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        run(asking(source.folder), tmp_path / "out" / "paddle")
    assert snapshot(tmp_path / "out") == {}


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
