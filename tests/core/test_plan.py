"""The plan: every tensor mapped, or an error that names the one that is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, open_checkpoint
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.plan import describe, draft_plan, make_plan, stored_dtype
from modernbert_align.core.table import load_table
from modernbert_align.errors import CheckpointError

QKV, WO, WI = "model.layers.1.attn.Wqkv.weight", "model.layers.1.attn.Wo.weight", "model.layers.1.mlp.Wi.weight"
SWITCHES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings")


def headers(config, head="masked_lm", side="hf", dtype="F32", with_ties=False, table="modernbert"):
    """Tensor headers of a correct checkpoint. Its files do not exist: planning reads no data."""
    tensors = {
        entry.name(side): TensorInfo(
            name=entry.name(side), dtype=dtype, shape=entry.shape(side), path=Path("nowhere"), offset=0
        )
        for entry in load_table(table).expand(config, head)
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


def renamed(checkpoint, rename):
    """The same tensors under other stored names."""
    tensors = {rename(name): replace(info, name=rename(name)) for name, info in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def plan_of(checkpoint, config, head="masked_lm", src="hf", dtype=None, table="modernbert", make=make_plan, **options):
    dst = "paddle" if src == "hf" else "hf"
    return make(checkpoint, load_table(table), config, head, src, dst, dtype, **options)


def draft_of(checkpoint, config, **options):
    return plan_of(checkpoint, config, make=draft_plan, **options)


def refusal(checkpoint, config, **options):
    with pytest.raises(CheckpointError) as error:
        plan_of(checkpoint, config, **options)
    return error.value


@pytest.fixture
def config(tiny_config):
    return tiny_config()


def test_every_tensor_is_planned_once_with_its_operation(config):
    plan = plan_of(headers(config), config)
    assert [item.sources for item in plan.items] == [(name,) for name in headers(config).tensors]
    assert {item.rows for item in plan.items} == {None}
    transposed = {item.sources[0] for item in plan.items if item.op.name == "T"}
    assert transposed == {
        *(f"model.layers.{i}.{n}.weight" for i in range(3) for n in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")),
        "head.dense.weight",
    }
    assert {item.op.name for item in plan.items} == {"id", "T"}
    qkv = next(item for item in plan.items if item.sources == (QKV,))
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
    assert {i.sources[0]: i.op.inverse for i in there.items} == {i.target: i.op.name for i in back.items}
    assert there.size_bytes == back.size_bytes == sum(t.size_bytes for t in original.tensors.values())


def test_an_unknown_weight_is_an_error(config):
    error = refusal(changed(headers(config), "model.layers.1.attn.Wo.weights"), config)
    assert error.message == "no row of table `modernbert/1` maps `model.layers.1.attn.Wo.weights` [2] (masked_lm head)"
    assert error.hint == "nearest row: `layers.{i}.attn.Wo.weight`"


@pytest.mark.parametrize(
    ("shape", "evidence"),
    [((8, 8), "`{}` is missing and has the same shape"), ((8, 9), "`{}` is missing and has another shape")],
)
@pytest.mark.parametrize("side", ["hf", "paddle"])
def test_a_misspelt_weight_is_held_against_the_missing_one_it_looks_like(config, side, shape, evidence):
    misspelt = "model.layers.1.attn.Wo.weights"
    broken = changed(without(headers(config, side=side), WO), misspelt, shape=shape)
    plan = draft_of(broken, config, src=side)
    assert [problem.message.split("`")[1:4:2] for problem in plan.problems] == [
        ["modernbert/1", misspelt],
        [WO, "some/folder"],
    ]
    assert plan.problems[0].hint == f"nearest row: `layers.{{i}}.attn.Wo.weight`; {evidence.format(WO)}"


def test_the_shape_that_counts_is_that_of_the_side_the_weight_is_on(config):
    wi, misspelt = "model.layers.1.mlp.Wi.weight", "model.layers.1.mlp.Wi.weights"
    for side, shape in (("hf", (12, 8)), ("paddle", (8, 12))):
        for found, same in ((shape, "the same"), (shape[::-1], "another")):
            broken = changed(without(headers(config, side=side), wi), misspelt, shape=found)
            hint = draft_of(broken, config, src=side).problems[0].hint
            assert hint.endswith(f"; `{wi}` is missing and has {same} shape")


def test_a_weight_that_looks_like_one_that_is_there_is_no_evidence(config):
    (problem,) = draft_of(changed(headers(config), "model.layers.1.attn.Wo.weights"), config).problems
    assert "is missing" not in problem.hint


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


def test_a_draft_lists_every_problem_and_maps_what_it_can(config):
    broken = without(changed(headers(config), "extra.weight"), QKV, "decoder.bias")
    broken = changed(changed(broken, WI, shape=(12, 9)), "head.norm.weight", dtype="I64")
    plan = draft_of(broken, config)
    assert {problem.message for problem in plan.problems} == {
        "no row of table `modernbert/1` maps `extra.weight` [2] (masked_lm head)",
        f"`{WI}` is [12, 9], the row and config.json say [12, 8]",
        "`head.norm.weight` has the dtype I64, which is not a float format",
        f"`{QKV}` is missing from `some/folder` (row `layers.{{i}}.attn.Wqkv.weight`, masked_lm head)",
        "`decoder.bias` is missing from `some/folder` (row `decoder.bias`, masked_lm head)",
    }
    assert {item.target for item in plan.items} == set(headers(config).tensors) - {QKV, "decoder.bias"}
    assert describe(plan)["problems"] == [{"message": p.message, "hint": p.hint} for p in plan.problems]


def test_a_draft_of_a_good_checkpoint_has_no_problems_and_is_the_plan(config):
    draft, plan = draft_of(headers(config), config), plan_of(headers(config), config)
    assert draft.problems == ()
    assert (draft.items, draft.layout, draft.stored) == (plan.items, plan.layout, plan.stored)


def test_a_draft_of_the_wrong_layout_says_so_and_nothing_else(config):
    plan = draft_of(headers(config, side="paddle"), config)
    assert [problem.message.split(":")[0] for problem in plan.problems] == ["`some/folder` is already in Paddle layout"]


def test_a_plan_to_the_side_it_comes_from_is_a_bug(config):
    with pytest.raises(ValueError, match="from hf to hf"):
        make_plan(headers(config), load_table(), config, "masked_lm", "hf", "hf", None)


# --- layout -----------------------------------------------------------------------------------------------------------


def test_the_layout_is_told_by_every_matrix_that_is_not_square(config):
    for src in ("hf", "paddle"):
        layout = plan_of(headers(config, side=src), config, src=src).layout
        assert (layout.agree, layout.disagree) == (9, 0)  # Wqkv, Wi and Wo of three layers
    other = draft_of(headers(config, side="paddle"), config).layout
    assert (other.agree, other.disagree) == (0, 9)


def test_square_matrices_and_foreign_shapes_do_not_vote(config, tiny_config):
    def layout(**changes):
        found = tiny_config(**changes)
        return draft_of(headers(found), found).layout.agree

    assert layout(intermediate_size=4) == 6  # Wi is square
    assert layout(intermediate_size=8) == 6  # Wo of the mlp is
    mixed = changed(headers(config), WI, shape=(8, 12))
    assert (draft_of(mixed, config).layout.agree, draft_of(mixed, config).layout.disagree) == (8, 1)
    foreign = changed(headers(config), WI, shape=(7, 5))
    assert (draft_of(foreign, config).layout.agree, draft_of(foreign, config).layout.disagree) == (8, 0)


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
    assert [item.sources for item in plan.items if item.target_dtype == "BF16"] == [(WO,)]
    assert {item.target_dtype for item in plan.items} == {"BF16", "F32"}


def test_square_transposed_weights_are_marked(config):
    plan = plan_of(headers(config), config)
    assert {item.target for item in plan.items if item.shape_blind} == {
        *(f"model.layers.{i}.attn.Wo.weight" for i in range(3)),
        "head.dense.weight",
    }


def test_the_description_adds_up(config):
    plan = plan_of(headers(config, with_ties=True), config, dtype="BF16")
    text = describe(plan)
    assert text["tensors"] == len(plan.items) == 23
    assert {op: entry["tensors"] for op, entry in text["by_op"].items()} == {"id": 10, "T": 13}
    assert sum(entry["size_bytes"] for entry in text["by_op"].values()) == text["size_bytes"] == plan.size_bytes
    assert text["shape_blind"] == [item.target for item in plan.items if item.shape_blind]
    assert len(text["shape_blind"]) == 4
    assert text["tied"] == [["decoder.weight", "model.embeddings.tok_embeddings.weight"]]
    assert text["dtypes"] == ["F32->BF16"]
    assert (text["src"], text["dst"], text["head"], text["table"]) == ("hf", "paddle", "masked_lm", "modernbert/1")
    assert text["layout"] == {"agree": 9, "disagree": 0}
    assert (text["stacked"], text["renamed"], text["dropped"], text["problems"]) == (0, 0, [], [])
    json.dumps(text)


def test_a_plan_from_files_is_the_plan_from_their_headers(build, tmp_path, config):
    built = build(tmp_path / "hf", shards=2)
    plan = plan_of(open_checkpoint(built.folder), config)
    assert plan.items == plan_of(headers(config), config).items


# --- aliases ----------------------------------------------------------------------------------------------------------


def gamma_and_beta(name):
    return name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta")


@pytest.mark.parametrize(
    ("rename", "count"),
    [
        (lambda name: f"module.{name}", 37),
        (lambda name: f"_orig_mod.{name}", 37),
        (lambda name: f"module._orig_mod.module.{name}", 37),
        (lambda name: name.replace(".attn.", "._orig_mod.attn._orig_mod."), 12),
        (gamma_and_beta, 16),
        (lambda name: f"module.{gamma_and_beta(name)}", 37),
    ],
)
def test_names_of_wrappers_and_older_versions_are_read_and_never_written(tiny_config, rename, count):
    config = tiny_config(norm_bias=True, attention_bias=True)
    plain = headers(config)
    assert len(plain.tensors) == 37
    plan, expected = plan_of(renamed(plain, rename), config), plan_of(plain, config)
    assert [item.sources for item in plan.items] == [(rename(name),) for (name,) in (i.sources for i in expected.items)]
    assert [replace(i, sources=()) for i in plan.items] == [replace(i, sources=()) for i in expected.items]
    assert plan.stored == {name: rename(name) for name in plain.tensors}
    assert describe(plan)["renamed"] == count
    assert describe(expected)["renamed"] == 0


def test_a_tied_copy_under_another_name_is_left_out(config):
    checkpoint = renamed(headers(config, with_ties=True), lambda name: f"module.{name}")
    plan = plan_of(checkpoint, config)
    assert plan.tied == (("module.decoder.weight", "module.model.embeddings.tok_embeddings.weight"),)
    assert plan.absent_ties == ()


def test_paddles_names_have_no_aliases(config):
    checkpoint = renamed(headers(config, side="paddle"), gamma_and_beta)
    messages = [problem.message for problem in draft_of(checkpoint, config, src="paddle").problems]
    assert any("no row of table `modernbert/1` maps `model.final_norm.gamma`" in message for message in messages)


@pytest.mark.parametrize(
    "other", ["model.final_norm.gamma", "module.model.final_norm.weight", "model._orig_mod.final_norm.weight"]
)
def test_two_stored_names_of_one_weight_are_refused(config, other):
    checkpoint = changed(headers(config), other, shape=(8,))
    (problem,) = draft_of(checkpoint, config).problems
    assert problem.message == (
        f"`{other}` and `model.final_norm.weight` of `some/folder` are both `model.final_norm.weight`"
    )
    assert "two versions of a weight" in problem.hint
    assert refusal(checkpoint, config).message == problem.message


def test_an_unknown_weight_is_named_as_it_is_stored(config):
    checkpoint = renamed(changed(headers(config), "extra.weight"), lambda name: f"module.{name}")
    assert "maps `module.extra.weight` [2]" in refusal(checkpoint, config).message
    assert (
        f"`module.{WO}` is [8, 9]"
        in refusal(renamed(changed(headers(config), WO, shape=(8, 9)), lambda name: f"module.{name}"), config).message
    )


# --- stacks -----------------------------------------------------------------------------------------------------------

PARTS = ("q_proj", "k_proj", "v_proj")
DECODER = {"head": "causal_lm", "table": "modernbert-decoder"}


@pytest.fixture
def decoder(decoder_table):
    def sizes(**changes):
        raw = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 3} | changes
        return decoder_table.sizes(raw, where="test")

    return sizes


def test_parts_are_stacked_for_paddle_in_the_order_of_the_table(decoder):
    sizes = decoder(attention_bias=True)
    plan = plan_of(headers(sizes, **DECODER), sizes, **DECODER)
    items = {item.target: item for item in plan.items}
    weight, bias = items[QKV], items["model.layers.1.attn.Wqkv.bias"]
    for item, kind, source_shape, target_shape in (
        (weight, "weight", (24, 8), (8, 24)),
        (bias, "bias", (24,), (24,)),
    ):
        assert item.sources == tuple(f"model.layers.1.attn.{part}.{kind}" for part in PARTS)
        assert (item.source_shape, item.target_shape, item.rows) == (source_shape, target_shape, None)
    assert (weight.op.name, bias.op.name) == ("T", "id")
    assert not weight.shape_blind  # 8 x 24, whatever its parts are
    assert describe(plan)["stacked"] == 6
    assert len([item for item in plan.items if "attn.W" in item.target]) == 12


def test_a_stack_is_taken_apart_for_hugging_face_row_by_row(decoder):
    sizes = decoder(attention_bias=True)
    plan = plan_of(headers(sizes, side="paddle", **DECODER), sizes, src="paddle", **DECODER)
    items = {item.target: item for item in plan.items}
    for number, part in enumerate(PARTS):
        weight, bias = (items[f"model.layers.1.attn.{part}.{kind}"] for kind in ("weight", "bias"))
        assert (weight.sources, bias.sources) == ((QKV,), ("model.layers.1.attn.Wqkv.bias",))
        assert weight.rows == bias.rows == (8 * number, 8 * number + 8)
        assert (weight.source_shape, weight.target_shape, weight.op.name) == ((8, 24), (8, 8), "T")
        assert (bias.source_shape, bias.target_shape, bias.op.name) == ((24,), (8,), "id")
    assert describe(plan)["stacked"] == 18


@given(
    switches=st.fixed_dictionaries({name: st.booleans() for name in SWITCHES}),
    layers=st.integers(1, 3),
    head=st.sampled_from(["base", "causal_lm", "sequence_classification"]),
    dtype=st.sampled_from(["F32", "BF16"]),
)
def test_planning_a_decoder_there_and_back_is_the_identity(switches, layers, head, dtype):
    table = load_table("modernbert-decoder")
    raw = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": layers} | switches
    sizes = table.sizes(raw, where="test")
    there = plan_of(
        headers(sizes, head, dtype=dtype, table="modernbert-decoder"), sizes, head, table="modernbert-decoder"
    )
    paddle = Checkpoint(
        folder=Path("paddle"),
        tensors={
            i.target: TensorInfo(name=i.target, dtype=i.target_dtype, shape=i.target_shape, path=Path("x"), offset=0)
            for i in there.items
        },
        files=(),
    )
    back = plan_of(paddle, sizes, head, src="paddle", table="modernbert-decoder")
    original = headers(sizes, head, dtype=dtype, table="modernbert-decoder")
    assert {i.target: (i.target_dtype, i.target_shape) for i in back.items} == {
        name: (info.dtype, info.shape) for name, info in original.tensors.items()
    }
    assert there.size_bytes == back.size_bytes
    assert not any(part in item.target for item in there.items for part in PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_missed_by_its_own_name(decoder, part):
    name = f"model.layers.1.attn.{part}.weight"
    error = refusal(without(headers(decoder(), **DECODER), name), decoder(), **DECODER)
    assert error.message == (
        f"`{name}` is missing from `some/folder` (row `layers.{{i}}.attn.{part}.weight`, causal_lm head)"
    )


def test_a_missing_stack_is_missed_once(decoder):
    checkpoint = without(headers(decoder(), side="paddle", **DECODER), QKV)
    (problem,) = draft_of(checkpoint, decoder(), src="paddle", **DECODER).problems
    assert problem.message.startswith(f"`{QKV}` is missing from `some/folder`")


def test_a_stack_of_another_size_is_refused(decoder):
    checkpoint = changed(headers(decoder(), side="paddle", **DECODER), QKV, shape=(8, 16))
    error = refusal(checkpoint, decoder(), src="paddle", **DECODER)
    assert error.message == f"`{QKV}` is [8, 16], the row and config.json say [8, 24]"


def test_parts_of_different_dtypes_are_refused(decoder):
    name = "model.layers.1.attn.k_proj.weight"
    mixed = changed(headers(decoder(), **DECODER), name, dtype="BF16")
    error = refusal(mixed, decoder(), **DECODER)
    assert error.message == f"the parts of `{QKV}` have different dtypes: BF16, F32"
    whole = changed(headers(decoder(), **DECODER), "model.layers.1.attn.Wo.weight", dtype="BF16")
    assert plan_of(whole, decoder(), **DECODER)


def test_a_decoder_of_paddle_given_as_one_of_hugging_face_is_seen_through(decoder):
    error = refusal(headers(decoder(), side="paddle", **DECODER), decoder(), **DECODER)
    assert error.message.startswith("`some/folder` is already in Paddle layout: all 6 non-square Linear weights")
    error = refusal(headers(decoder(), **DECODER), decoder(), src="paddle", **DECODER)
    assert error.message.startswith("`some/folder` is already in Hugging Face layout")


# --- other heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("src", ["hf", "paddle"])
def test_the_base_of_a_model_with_a_head_drops_the_head_and_the_prefix(config, src):
    whole = headers(config, side=src)
    plan = plan_of(whole, config, "base", src=src, declared="masked_lm")
    heads = [name for name in whole.tensors if not name.startswith("model.")]
    assert list(plan.dropped) == heads == ["head.dense.weight", "head.norm.weight", "decoder.bias"]
    assert {item.target: item.sources for item in plan.items} == {
        name.removeprefix("model."): (name,) for name in whole.tensors if name.startswith("model.")
    }
    assert plan.prefix == "model."
    assert describe(plan)["dropped"] == heads


def test_what_is_in_no_head_is_not_dropped_but_refused(config):
    error = refusal(changed(headers(config), "extra.weight"), config, head="base", declared="masked_lm")
    assert "maps `extra.weight` [2] (base head)" in error.message


def test_a_base_saved_with_the_prefix_is_read_and_written_without(config):
    checkpoint = renamed(headers(config, "base"), lambda name: f"model.{name}")
    plan = plan_of(checkpoint, config, "base")
    assert all(item.sources == (f"model.{item.target}",) for item in plan.items)
    assert describe(plan)["renamed"] == 0  # the prefix is no alias
