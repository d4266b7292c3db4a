"""Tiling: which element every element of the large model is, by hand, by an independent rule and bit for bit."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from modernbert_align.core import tiled_checkpoint as module
from modernbert_align.core.checkpoint import Checkpoint, unsigned
from modernbert_align.core.model_config import parse_config
from modernbert_align.core.table import load_table
from modernbert_align.core.tiled_checkpoint import TILING_MANIFEST, TileRequest, plan_tile, tile
from modernbert_align.core.tiling import plan_tiling, tile_axis, tile_layers, wraparound
from modernbert_align.errors import CheckpointError, ConfigError, UsageError

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LARGER = {"hidden_size": 16, "intermediate_size": 13, "num_hidden_layers": 5, "num_attention_heads": 4}
ARCHITECTURES = (
    "ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification",
    "ModernBertForQuestionAnswering", "ModernBertForMultipleChoice",
)  # fmt: skip


def request(folder, target, **options):
    """Tile the checkpoint in `folder` to the config.json document `target`."""
    return TileRequest(folder=folder, model="small", to="large", target=target, target_where="target", **options)


def around(array, axis, parts, size):
    """`array` with an axis of stacked parts laid out to `parts * size` elements, by repetition and not by index."""
    tiled = []
    for part in np.split(array, parts, axis=axis):
        before = (size - part.shape[axis]) // 2
        copies = 1 + 2 * (size // part.shape[axis] + 1)  # an odd number, with the original in the middle
        middle = copies // 2 * part.shape[axis]
        long = np.concatenate([part] * copies, axis=axis)
        tiled.append(np.take(long, np.arange(middle - before, middle - before + size), axis=axis))
    return np.concatenate(tiled, axis=axis)


def expected(name, arrays, config):
    """What the weight `name` of a model of `config` is, in words of its name and not of the table."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    small_layers = 1 + max(int(n.split("layers.")[1].split(".")[0]) for n in arrays if "layers." in n)
    source = name
    if "layers." in name:
        before, _, rest = name.partition("layers.")
        layer, _, rest = rest.partition(".")
        source = f"{before}layers.{round(int(layer) * small_layers / config['num_hidden_layers'])}.{rest}"
    array = arrays[source]
    leaf = name.removesuffix(".weight").removesuffix(".bias")
    if name.endswith(("tok_embeddings.weight", "decoder.weight", "classifier.weight")):
        return around(array, 1, 1, hidden)
    if name.endswith(("decoder.bias", "classifier.bias")):
        return array
    if leaf.endswith("Wqkv"):
        array = around(array, 0, 3, hidden)
    elif leaf.endswith("Wi"):
        array = around(array, 0, 2, inner)
    else:
        array = around(array, 0, 1, hidden)
    if array.ndim == 2:
        array = around(array, 1, 1, inner if leaf.endswith("mlp.Wo") else hidden)
    return array


@pytest.mark.parametrize(
    ("source", "target", "elements"),
    [
        (3, 3, [0, 1, 2]),
        (2, 4, [1, 0, 1, 0]),
        (3, 4, [0, 1, 2, 0]),
        (3, 5, [2, 0, 1, 2, 0]),
        (2, 5, [1, 0, 1, 0, 1]),
        (3, 8, [1, 2, 0, 1, 2, 0, 1, 2]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_the_small_axis_lies_in_the_middle_and_is_repeated_around_it(source, target, elements):
    assert wraparound(source, target).tolist() == elements


def test_parts_of_a_stack_are_tiled_each_on_its_own():
    assert tile_axis(3, 2, 4).tolist() == [1, 0, 1, 0, 3, 2, 3, 2, 5, 4, 5, 4]
    assert tile_axis(2, 3, 5).tolist() == [2, 0, 1, 2, 0, 5, 3, 4, 5, 3]


def test_layers_of_base_and_large_are_those_of_the_reference():
    assert tile_layers(22, 28) == (
        0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 13, 13, 14, 15, 16, 16, 17, 18, 19, 20, 20, 21,
    )  # fmt: skip


def test_half_a_layer_is_rounded_to_even():
    assert tile_layers(5, 6) == (0, 1, 2, 2, 3, 4)
    assert tile_layers(3, 4) == (0, 1, 2, 2)


@given(source=st.integers(1, 60), more=st.integers(0, 60))
def test_layer_0_alone_is_made_from_layer_0_and_all_layers_are_used(source, more):
    target = source + min(more, source - 1)
    layers = tile_layers(source, target)
    assert [layer for layer, small in enumerate(layers) if small == 0] == [0]
    assert set(layers) == set(range(source))


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 4), (3, 6), (22, 44), (22, 100)])
def test_twice_as_many_layers_are_refused(source, target):
    with pytest.raises(UsageError, match=f"{source} layers cannot become {target}"):
        tile_layers(source, target)


def test_heads_of_base_stay_whole_in_large():
    """The middle begins two heads in, so element d of head h is element d of head (h - 2) mod 12."""
    elements = wraparound(768, 1024).reshape(16, 64)
    for head, found in enumerate(elements):
        assert found.tolist() == list(range((head - 2) % 12 * 64, (head - 2) % 12 * 64 + 64))


def test_an_index_coded_matrix_by_hand(build, table, tmp_path):
    """Wqkv of two heads of width 2 to four: every element says which part, row and column it was."""

    def code(arrays):
        rows, columns = np.meshgrid(np.arange(12), np.arange(4), indexing="ij")
        arrays["model.layers.0.attn.Wqkv.weight"] = (100 * rows + columns).astype(np.float32)

    small = build(tmp_path / "small", change=code, hidden_size=4, num_hidden_layers=1)
    target = small.config | {"hidden_size": 8, "num_attention_heads": 4}
    tile(request(small.folder, target), table, tmp_path / "large", force=False)
    found = load_file(tmp_path / "large" / "model.safetensors")["model.layers.0.attn.Wqkv.weight"]
    columns = [2, 3, 0, 1, 2, 3, 0, 1]
    rows = [2, 3, 0, 1, 2, 3, 0, 1, 6, 7, 4, 5, 6, 7, 4, 5, 10, 11, 8, 9, 10, 11, 8, 9]
    assert found.tolist() == [[100 * row + column for column in columns] for row in rows]


@st.composite
def models(draw):
    """(small config, large config, dtype, side) of models that fit each other."""
    width, heads = draw(st.sampled_from([2, 4])), draw(st.integers(1, 3))
    more = 2 * draw(st.integers(0, 3))
    inner, layers = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    small = {
        "hidden_size": width * heads,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "architectures": [draw(st.sampled_from(ARCHITECTURES))],
        "id2label": {"0": "a", "1": "b", "2": "c"},
    }
    switches = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings")
    small |= {key: draw(st.booleans()) for key in switches}
    large = small | {
        "hidden_size": width * (heads + more),
        "num_attention_heads": heads + more,
        "intermediate_size": inner + draw(st.integers(0, 9)),
        "num_hidden_layers": draw(st.integers(layers, 2 * layers - 1)),
    }
    return small, large, draw(st.sampled_from(["F32", "BF16", "F16"])), draw(st.sampled_from(["hf", "paddle"]))


@given(case=models())
def test_every_element_is_the_one_that_the_rule_names_bit_for_bit(build, case):
    small, large, dtype, side = case
    table = load_table()
    with tempfile.TemporaryDirectory() as place:
        built = build(Path(place, "small"), side=side, dtype=dtype, **small)
        target = built.config | large
        result = tile(request(built.folder, target), table, Path(place, "large"), force=False)
        found = load_file(result.out / "model.safetensors")
        written = json.loads((result.out / "config.json").read_text())
    entries = table.expand(parse_config(target), table.head_of(large["architectures"], where="test"))
    assert {name: array.shape for name, array in found.items()} == {e.hf: e.hf_shape for e in entries if e.op.stored}
    assert written == target
    turned = {e.paddle for e in entries if e.op.name == "T"} if side == "paddle" else ()
    arrays = {name: array.T if name in turned else array for name, array in built.arrays.items()}
    for name, array in found.items():
        wanted = expected(name, arrays, target)
        assert array.dtype == wanted.dtype, name
        bits = unsigned(dtype)
        assert np.array_equal(np.ascontiguousarray(array).view(bits), np.ascontiguousarray(wanted).view(bits)), name


@given(case=models())
def test_the_same_sizes_give_the_same_file(build, case):
    small, _, dtype, _ = case
    with tempfile.TemporaryDirectory() as place:
        built = build(Path(place, "small"), dtype=dtype, **small)
        result = tile(request(built.folder, built.config), load_table(), Path(place, "same"), force=False)
        for name in ("model.safetensors", "config.json"):
            assert (result.out / name).read_bytes() == (built.folder / name).read_bytes(), name
    assert result.manifest.moved == ()
    assert result.manifest.layers == tuple(range(small["num_hidden_layers"]))


@pytest.mark.parametrize("side", ["hf", "paddle"])
@given(data=st.data())
def test_any_piece_of_a_tiled_tensor_is_that_piece_of_the_whole(build, tmp_path_factory, side, data):
    folder = tmp_path_factory.mktemp("small")
    built = build(folder, side=side)
    checkpoint = plan_tile(request(folder, built.config | LARGER), load_table()).plan.checkpoint
    name = data.draw(st.sampled_from(sorted(checkpoint.tensors)))
    whole = checkpoint.read(name).reshape(-1)
    start = data.draw(st.integers(0, whole.size - 1))
    piece = np.empty(data.draw(st.integers(1, whole.size - start)), dtype=whole.dtype)
    checkpoint.fill(name, start, piece)
    assert np.array_equal(piece, whole[start : start + piece.size])


def test_of_a_paddle_source_one_matrix_at_a_time_is_kept(build, table, tmp_path, monkeypatch):
    """Its Linear weights lie transposed in the file: they are read whole, but neither twice nor for good."""
    built = build(tmp_path / "small", side="paddle")
    checkpoint = plan_tile(request(built.folder, built.config | LARGER), table).plan.checkpoint
    reads, read = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    for name in ("model.layers.0.attn.Wqkv.weight", "model.layers.0.attn.Wo.weight", "model.layers.0.attn.Wqkv.weight"):
        for start in range(4):
            checkpoint.fill(name, 5 * start, np.empty(5, dtype=np.uint32))
    assert [name.split(".")[-2] for name in reads] == ["Wqkv", "Wo", "Wqkv"]


def test_shards_and_older_names_are_read(build, table, tmp_path):
    plain = build(tmp_path / "plain")
    sharded = build(tmp_path / "sharded", shards=3)

    def rename(arrays):
        for name in list(arrays):
            arrays[f"module.{name}"] = arrays.pop(name)

    renamed = build(tmp_path / "renamed", change=rename)
    files = set()
    for built in (plain, sharded, renamed):
        target = built.config | LARGER
        out = tile(request(built.folder, target), table, tmp_path / f"{built.folder.name}-large", force=False).out
        files.add((out / "model.safetensors").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 4, "num_attention_heads": 1}, "`hidden_size` 4 is smaller than the source's 8"),
        ({"intermediate_size": 5}, "`intermediate_size` 5 is smaller than the source's 6"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers` 2 is smaller than the source's 3"),
        ({"vocab_size": 24}, "`vocab_size` 24 is not the source's 23"),
        ({"norm_bias": True}, "`norm_bias` is false in the source and true in the target"),
        ({"tie_word_embeddings": False}, "`tie_word_embeddings` is true in the source and false in the target"),
        ({"hidden_size": 16}, "the heads are 4 wide in the source and 8 in the target"),
        ({"hidden_size": 12, "num_attention_heads": 3}, "from 2 heads to 3, the middle begins within a head"),
        ({"num_hidden_layers": 6}, "3 layers cannot become 6"),
    ],
)
def test_a_target_that_cannot_be_is_refused_by_name(tiny_config, table, changes, said):
    with pytest.raises(UsageError) as caught:
        plan_tiling(tiny_config(), tiny_config(**changes), table)
    assert said in caught.value.message


def test_a_target_that_is_no_modernbert_is_refused(build, table, tmp_path):
    built = build(tmp_path / "small")
    with pytest.raises(ConfigError, match="`model_type` is `bert` in `target`"):
        plan_tile(request(built.folder, built.config | {"model_type": "bert"}), table)


def test_what_differs_beside_the_sizes_is_recorded(tiny_config, table):
    changes = {"local_attention": 32, "global_rope_theta": 10000.0, "attention_dropout": 0.1}
    tiling = plan_tiling(tiny_config(), tiny_config(**changes, **LARGER), table)
    assert tiling.settings == {
        "local_attention": (16, 32),
        "full_rope_theta": (160000.0, 10000.0),
        "attention_dropout": (0.0, 0.1),
    }
    assert plan_tiling(tiny_config(), tiny_config(**LARGER), table).settings == {}
    scaled = tiny_config(**LARGER, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert plan_tiling(tiny_config(), scaled, table).settings == {
        "full_rope_scaling": (None, {"rope_type": "linear", "factor": 2.0}),
        "sliding_rope_scaling": (None, {"rope_type": "linear", "factor": 2.0}),
    }


def test_layers_whose_attention_changes_its_kind_are_recorded(tiny_config, table):
    """Layers 0 and 3 of five are full; they are made from 0, 1, 1, 2, 2 of three, of which 0 is full."""
    tiling = plan_tiling(tiny_config(), tiny_config(**LARGER), table)
    assert tiling.layers == (0, 1, 1, 2, 2)
    assert tiling.moved == (3,)


def test_tokenizer_labels_and_dtype_are_the_sources(build, table, tmp_path):
    built = build(
        tmp_path / "small", files={"tokenizer.json": "{}"}, id2label={"0": "no", "1": "yes", "2": "who"}, cls_token_id=1
    )
    target = {
        "model_type": "modernbert", "vocab_size": 23, **LARGER, "pad_token_id": 9, "eos_token_id": 8,
        "id2label": {"0": "x"}, "torch_dtype": "bfloat16", "architectures": ["ModernBertModel"],
        "paddlenlp_version": "3.0", "local_attention": 16,
    }  # fmt: skip
    out = tile(request(built.folder, target), table, tmp_path / "large", force=False).out
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "modernbert", "vocab_size": 23, **LARGER, "pad_token_id": 3, "cls_token_id": 1,
        "id2label": {"0": "no", "1": "yes", "2": "who"}, "dtype": "float32",
        "architectures": ["ModernBertForMaskedLM"], "local_attention": 16,
    }  # fmt: skip
    assert (out / "tokenizer.json").read_text() == "{}"


def test_the_head_can_be_dropped_and_is_never_made_up(build, table, tmp_path):
    built = build(tmp_path / "small")
    wanted = request(built.folder, built.config | LARGER, head="base")
    result = tile(wanted, table, tmp_path / "large", force=False)
    assert {name.split(".")[0] for name in result.manifest.tensors} == {"embeddings", "layers", "final_norm"}
    assert set(result.manifest.dropped) == {"head.dense.weight", "head.norm.weight", "decoder.bias"}
    assert json.loads((result.out / "config.json").read_text())["architectures"] == ["ModernBertModel"]
    with pytest.raises(UsageError, match="its weights for token_classification are missing"):
        plan_tile(replace(wanted, head="token_classification"), table)


def test_a_tied_copy_is_left_out_only_if_it_is_one(build, table, tmp_path):
    built = build(tmp_path / "small", tied_copy=True)
    result = tile(request(built.folder, built.config | LARGER), table, tmp_path / "large", force=False)
    assert "decoder.weight" not in result.manifest.tensors

    def change(arrays):
        arrays["decoder.weight"][3, 1] += 1

    build(tmp_path / "untied", tied_copy=True, change=change)
    with pytest.raises(CheckpointError, match="their values differ"):
        tile(request(tmp_path / "untied", built.config | LARGER), table, tmp_path / "other", force=False)
    assert not (tmp_path / "other").exists()


def test_a_source_that_is_not_what_its_config_says_is_refused(build, table, tmp_path):
    built = build(tmp_path / "small", change=lambda arrays: arrays.pop("model.layers.1.mlp.Wo.weight"))
    with pytest.raises(CheckpointError, match=r"`model\.layers\.1\.mlp\.Wo\.weight` is missing"):
        plan_tile(request(built.folder, built.config | LARGER), table)


def test_only_an_earlier_tiling_is_replaced(build, table, tmp_path, snapshot):
    built = build(tmp_path / "small")
    wanted = request(built.folder, built.config | LARGER)
    out = tile(wanted, table, tmp_path / "large", force=False).out
    with pytest.raises(CheckpointError, match="exists"):
        tile(wanted, table, out, force=False)
    (out / TILING_MANIFEST).write_text("{}")
    tile(wanted, table, out, force=True)
    assert json.loads((out / TILING_MANIFEST).read_text())["to"] == "large"
    before = snapshot(built.folder)
    other = build(tmp_path / "mine").folder
    with pytest.raises(CheckpointError, match="no tiling wrote it"):
        tile(wanted, table, other, force=True)
    with pytest.raises(CheckpointError, match="in each other's way"):
        tile(wanted, table, built.folder / "large", force=True)
    assert snapshot(built.folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "mine", "small"]


def test_a_failure_leaves_nothing(build, table, tmp_path, monkeypatch):
    built = build(tmp_path / "small")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "copy_files", full)
    with pytest.raises(CheckpointError, match="No space left"):
        tile(request(built.folder, built.config | LARGER), table, tmp_path / "large", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_source_that_changes_meanwhile_is_noticed(build, table, tmp_path, monkeypatch):
    built = build(tmp_path / "small")

    def copy(*_arguments):
        (built.folder / "config.json").write_text("{}")

    monkeypatch.setattr(module, "copy_files", copy)
    with pytest.raises(CheckpointError, match="changed while it was tiled"):
        tile(request(built.folder, built.config | LARGER), table, tmp_path / "large", force=False)
    assert not (tmp_path / "large").exists()


def test_the_manifest_says_what_was_made_from_what(build, table, tmp_path):
    built = build(tmp_path / "small")
    manifest = tile(request(built.folder, built.config | LARGER), table, tmp_path / "large", force=False).manifest
    assert manifest.sizes == {name: (built.config[name], LARGER[name]) for name in SIZES}
    assert {file.name for file in manifest.source.files} == {"config.json", "model.safetensors"}
    assert {file.name for file in manifest.files} == {"config.json", "model.safetensors"}
    assert all(file.digest for file in (*manifest.files, *manifest.source.files))
