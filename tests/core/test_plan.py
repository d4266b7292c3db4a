"""The plan: every tensor mapped, or an error that names the one that is not."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, open_checkpoint
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.plan import describe, make_plan, stored_dtype
from modernbert_align.core.table import load_table
from modernbert_align.errors import CheckpointError

QKV, WO, WI = "model.layers.1.attn.Wqkv.weight", "model.layers.1.attn.Wo.weight", "model.layers.1.mlp.Wi.weight"
SWITCHES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings")


def headers(config, head="masked_lm", side="hf", dtype="F32", with_ties=False):
    """Tensor headers of a correct checkpoint. Its files do not exist: planning reads no data."""
    tensors = {
        entry.name(side): TensorInfo(
            name=entry.name(side), dtype=dtype, shape=entry.shape(side), path=Path("nowhere"), offset=0
        )
        for entry in load_table().expand(config, head)
        if entry.op.stored or with_ties
    }
    return Checkpoint(folder=Path("some/folder"), tensors=tensors, files=())


def changed(checkpoint, name, **changes):
    info = checkpoint.tensors.get(name) or TensorInfo(
        name=name, dtype="F32", shape=(2,), path=Path("nowhere"), offset=0
    )
    tensors = dict(checkpoint.tensors) | {changes.get("name", name): replace(info, **changes)}
    return replace(checkpoint, tensors=tensors)


def without(checkpoint, *names):
    assert set(names) <= set(checkpoint.tensors)
    return replace(checkpoint, tensors={n: t for n, t in checkpoint.tensors.items() if n not in names})


def plan_of(checkpoint, config, head="masked_lm", src="hf", dtype=None):
    return make_plan(checkpoint, load_table(), config, head, src, "paddle" if src == "hf" else "hf", dtype)


def refusal(checkpoint, config, **options):
    with pytest.raises(CheckpointError) as error:
        plan_of(checkpoint, config, **options)
    return error.value


@pytest.fixture
def config(tiny_config):
    return tiny_config()


def test_every_tensor_is_planned_once_with_its_operation(config):
    plan = plan_of(headers(config), config)
    assert [item.source for item in plan.items] == list(headers(config).tensors)
    transposed = {item.source for item in plan.items if item.op.name == "T"}
    assert transposed == {
        *(f"model.layers.{i}.{n}.weight" for i in range(3) for n in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")),
        "head.dense.weight",
    }
    assert {item.op.name for item in plan.items} == {"id", "T"}
    qkv = next(item for item in plan.items if item.source == QKV)
    assert (qkv.source_shape, qkv.target_shape, qkv.size_bytes) == ((24, 8), (8, 24), 24 * 8 * 4)
    assert (plan.tied, plan.absent_ties) == ((), ("decoder.weight",))


def test_a_tied_copy_in_the_source_is_planned_to_be_left_out(config):
    plan = plan_of(headers(config, with_ties=True), config)
    assert plan.tied == (("decoder.weight", "model.embeddings.tok_embeddings.weight"),)
    assert plan.absent_ties == ()
    assert "decoder.weight" not in {item.target for item in plan.items}


@given(
    switches=st.fixed_dictionaries({name: st.booleans() for name in SWITCHES}),
    hidden=st.sampled_from([4, 8, 12]),
    intermediate=st.integers(1, 12),
    layers=st.integers(1, 4),
    head=st.sampled_from(["base", "masked_lm"]),
    dtype=st.sampled_from(["F32", "BF16", "F16", "F64"]),
    with_ties=st.booleans(),
)
def test_planning_there_and_back_is_the_identity(switches, hidden, intermediate, layers, head, dtype, with_ties):
    config = ModelConfig(
        vocab_size=13,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=2,
        **switches,
    )
    there = plan_of(headers(config, head, dtype=dtype, with_ties=with_ties), config, head)
    paddle = Checkpoint(
        folder=Path("paddle"),
        tensors={
            i.target: TensorInfo(name=i.target, dtype=i.target_dtype, shape=i.target_shape, path=Path("x"), offset=0)
            for i in there.items
        },
        files=(),
    )
    back = plan_of(paddle, config, head, src="paddle")
    original = headers(config, head, dtype=dtype)
    assert {i.target: (i.target_dtype, i.target_shape) for i in back.items} == {
        name: (info.dtype, info.shape) for name, info in original.tensors.items()
    }
    assert {i.source: i.op.inverse for i in there.items} == {i.target: i.op.name for i in back.items}
    assert there.size_bytes == back.size_bytes == sum(t.size_bytes for t in original.tensors.values())


def test_an_unknown_weight_is_an_error(config):
    error = refusal(changed(headers(config), "model.layers.1.attn.Wo.weights"), config)
    assert error.message == "no row of table `modernbert/1` maps `model.layers.1.attn.Wo.weights` [2] (masked_lm head)"
    assert error.hint == "nearest row: `layers.{i}.attn.Wo.weight`"


def test_an_unknown_weight_that_resembles_nothing_says_so(config):
    error = refusal(changed(headers(config), "zzzzzzzz"), config)
    assert "`zzzzzzzz`" in error.message
    assert error.hint == "nothing in the table looks like it; is it another model?"


def test_a_bias_that_config_switches_off_is_unknown(config, tiny_config):
    with_biases = headers(tiny_config(mlp_bias=True))
    assert plan_of(with_biases, tiny_config(mlp_bias=True))
    error = refusal(with_biases, config)
    assert "`model.layers.0.mlp.Wi.bias` [12]" in error.message
    assert "(and 5 more problems)" in error.message


def test_a_layer_too_many_is_an_error(config, tiny_config):
    error = refusal(headers(tiny_config(num_hidden_layers=4)), config)
    assert "`model.layers.3.attn_norm.weight`" in error.message
    assert error.hint == "nearest row: `layers.{i}.attn_norm.weight`"


def test_an_attention_norm_in_layer_0_is_an_error(config):
    error = refusal(changed(headers(config), "model.layers.0.attn_norm.weight", shape=(8,)), config)
    assert "`model.layers.0.attn_norm.weight` [8]" in error.message


@pytest.mark.parametrize("name", [QKV, WO, "model.embeddings.norm.weight", "head.norm.weight", "decoder.bias"])
def test_a_missing_weight_is_an_error(config, name):
    error = refusal(without(headers(config), name), config)
    assert error.message.startswith(f"`{name}` is missing from `some/folder`")
    pattern = name.removeprefix("model.").replace(".1.", ".{i}.")
    assert f"(row `{pattern}`, masked_lm head)" in error.message
    assert "incomplete" in error.hint


def test_a_missing_untied_decoder_is_an_error_and_a_missing_tied_one_is_not(config, tiny_config):
    untied = tiny_config(tie_word_embeddings=False)
    assert plan_of(headers(untied), untied)
    error = refusal(headers(config), untied)
    assert error.message.startswith("`decoder.weight` is missing")


def test_all_problems_are_counted(config):
    broken = without(changed(headers(config), "extra.weight"), QKV, "decoder.bias")
    assert refusal(broken, config).message.endswith("(and 2 more problems)")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embeddings.tok_embeddings.weight", (24, 8)),
        ("model.embeddings.tok_embeddings.weight", (8, 23)),
        ("model.layers.2.attn_norm.weight", (9,)),
        ("model.layers.2.attn_norm.weight", (8, 1)),
        (WO, (8, 9)),
        (QKV, (23, 8)),
        ("decoder.bias", (8,)),
    ],
)
def test_a_wrong_shape_is_an_error(config, name, shape):
    right = headers(config).tensors[name].shape
    error = refusal(changed(headers(config), name, shape=shape), config)
    assert error.message == f"`{name}` is {list(shape)}, the row and config.json say {list(right)}"


def test_a_tied_copy_of_the_wrong_shape_is_an_error(config):
    broken = changed(headers(config, with_ties=True), "decoder.weight", shape=(22, 8))
    assert refusal(broken, config).message.startswith("`decoder.weight` is [22, 8]")


@pytest.mark.parametrize("dtype", ["I64", "I8", "BOOL", "F8_E4M3", "U16"])
def test_a_dtype_that_is_no_float_format_is_an_error(config, dtype):
    error = refusal(changed(headers(config), WO, dtype=dtype), config)
    assert error.message == f"`{WO}` has the dtype {dtype}, which is not a float format"


def test_u16_is_bfloat16_on_the_paddle_side_only(config):
    checkpoint = headers(config, side="paddle", dtype="U16")
    assert {item.target_dtype for item in plan_of(checkpoint, config, src="paddle").items} == {"BF16"}
    info = checkpoint.tensors[WO]
    assert (stored_dtype(info, "paddle"), stored_dtype(info, "hf")) == ("BF16", "U16")
    assert stored_dtype(replace(info, dtype="F16"), "paddle") == "F16"


@pytest.mark.parametrize(("src", "stored", "says"), [("hf", "paddle", "Paddle"), ("paddle", "hf", "Hugging Face")])
def test_a_checkpoint_that_is_already_converted_is_refused(config, src, stored, says):
    assert plan_of(headers(config, side=src), config, src=src)
    error = refusal(headers(config, side=stored), config, src=src)
    assert error.message.startswith(f"`some/folder` is already in {says} layout: all 9 non-square Linear weights")
    assert f"convert with --src {stored} --dst {src}" in error.hint


@pytest.mark.parametrize("name", [QKV, WI, "model.layers.2.mlp.Wo.weight"])
def test_a_mixed_layout_is_refused_and_names_one_weight_of_each(config, name):
    checkpoint = headers(config)
    error = refusal(changed(checkpoint, name, shape=checkpoint.tensors[name].shape[::-1]), config)
    assert error.message == (
        f"`some/folder` mixes both layouts: `model.layers.0.attn.Wqkv.weight` is Hugging Face's, `{name}` is Paddle's"
    )


def test_config_of_another_size_is_no_layout_problem(config, tiny_config):
    error = refusal(headers(tiny_config(hidden_size=12)), config)
    assert "the row and config.json say" in error.message
    assert error.hint == "config.json and the weights do not belong together"


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_cast_changes_every_target_and_its_size(config, dtype):
    plan = plan_of(headers(config, dtype="F32"), config, dtype=dtype)
    assert {(item.source_dtype, item.target_dtype) for item in plan.items} == {("F32", dtype)}
    elements = sum(info.elements for info in headers(config).tensors.values())
    assert plan.size_bytes == elements * DTYPE_BYTES[dtype]


def test_each_tensor_keeps_its_own_dtype_without_a_cast(config):
    plan = plan_of(changed(headers(config), WO, dtype="BF16"), config)
    assert {item.source for item in plan.items if item.target_dtype == "BF16"} == {WO}
    assert {item.target_dtype for item in plan.items} == {"BF16", "F32"}


def test_square_transposed_weights_are_marked(config):
    plan = plan_of(headers(config), config)
    assert {item.source for item in plan.items if item.shape_blind} == {
        *(f"model.layers.{i}.attn.Wo.weight" for i in range(3)),
        "head.dense.weight",
    }


def test_the_description_adds_up(config):
    plan = plan_of(headers(config, with_ties=True), config, dtype="BF16")
    text = describe(plan)
    assert text["tensors"] == len(plan.items) == 23
    assert {op: entry["tensors"] for op, entry in text["by_op"].items()} == {"id": 10, "T": 13}
    assert sum(entry["size_bytes"] for entry in text["by_op"].values()) == text["size_bytes"] == plan.size_bytes
    assert text["shape_blind"] == 4
    assert text["tied"] == [["decoder.weight", "model.embeddings.tok_embeddings.weight"]]
    assert text["dtypes"] == ["F32->BF16"]
    assert (text["src"], text["dst"], text["head"], text["table"]) == ("hf", "paddle", "masked_lm", "modernbert/1")


def test_a_plan_from_files_is_the_plan_from_their_headers(build, tmp_path, config):
    built = build(tmp_path / "hf", shards=2)
    plan = plan_of(open_checkpoint(built.folder), config)
    assert plan.items == plan_of(headers(config), config).items
