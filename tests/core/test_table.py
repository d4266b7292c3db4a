"""The name-mapping table: what it lists for a model, and which mistakes in it are refused."""

import copy
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import OPS
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.core.table import load_table, nearest_row, parse_table, table_for, table_names
from modernbert_align.errors import ConfigError, TableError, UsageError

LAYER = [
    "attn_norm.weight",
    "attn.Wqkv.weight",
    "attn.Wo.weight",
    "mlp_norm.weight",
    "mlp.Wi.weight",
    "mlp.Wo.weight",
]
# What transformers' ModernBertForMaskedLM with three layers and no biases saves, plus the tied decoder.
MASKED_LM = [
    "model.embeddings.tok_embeddings.weight",
    "model.embeddings.norm.weight",
    *(f"model.layers.{i}.{name}" for i in range(3) for name in LAYER if (i, name) != (0, "attn_norm.weight")),
    "model.final_norm.weight",
    "head.dense.weight",
    "head.norm.weight",
    "decoder.weight",
    "decoder.bias",
]
BIASES = {
    "norm_bias": ["embeddings.norm", "layers.2.attn_norm", "layers.0.mlp_norm", "final_norm", "head.norm"],
    "attention_bias": ["layers.0.attn.Wqkv", "layers.2.attn.Wo"],
    "mlp_bias": ["layers.0.mlp.Wi", "layers.2.mlp.Wo"],
    "classifier_bias": ["head.dense"],
    "decoder_bias": ["decoder"],
}
HEADS = {
    "base": "ModernBertModel",
    "masked_lm": "ModernBertForMaskedLM",
    "sequence_classification": "ModernBertForSequenceClassification",
    "token_classification": "ModernBertForTokenClassification",
    "question_answering": "ModernBertForQuestionAnswering",
    "multiple_choice": "ModernBertForMultipleChoice",
}
CLASSIFIERS = sorted({*HEADS} - {"base", "masked_lm"})
FLAGS = st.fixed_dictionaries({flag: st.booleans() for flag in (*BIASES, "tie_word_embeddings")})


@pytest.fixture
def document():
    """The shipped table as plain data, to be broken."""
    raw, _ = read_toml(configs_dir() / "tables" / "modernbert.toml")
    return copy.deepcopy(raw)


def row(**changes):
    base = {
        "hf": "x.weight",
        "paddle": "x.weight",
        "op": "id",
        "shape": "H",
        "kind": "norm",
        "probe": "embeddings",
    }
    return base | changes


def minimal(*rows, **groups):
    """A whole table document of the given body rows."""
    return {
        "id": "test/1",
        "prefix": "model.",
        "sides": {
            "hf": {"linear": "[out, in]", "format": "pt"},
            "paddle": {"linear": "[in, out]", "format": "np"},
        },
        "symbols": {"H": "hidden_size", "V": "vocab_size"},
        "heads": {"base": {"architecture": "ModernBertModel", "rows": list(groups)}},
        "rows": {"body": list(rows), **groups},
        "config": {"model_type": "modernbert", "paddle_only": [], "carried_files": []},
    }


def expand(document, config=None):
    return parse_table(document, "digest", where="test.toml").expand(config or ModelConfig(num_hidden_layers=3), "base")


def test_masked_lm_lists_the_names_transformers_saves(table, tiny_config):
    assert [entry.hf for entry in table.expand(tiny_config(), "masked_lm")] == MASKED_LM


def test_the_base_model_has_no_prefix_and_no_head(table, tiny_config):
    body = [name.removeprefix("model.") for name in MASKED_LM if name.startswith("model.")]
    assert [entry.hf for entry in table.expand(tiny_config(), "base")] == body


@pytest.mark.parametrize("head", CLASSIFIERS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_has_its_own_end_in_place_of_the_decoder(table, tiny_config, head, tied):
    names = [entry.hf for entry in table.expand(tiny_config(tie_word_embeddings=tied), head)]
    assert names == [*MASKED_LM[:-2], "classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("head", CLASSIFIERS)
def test_a_classifier_has_a_row_per_label_and_that_of_multiple_choice_has_one(table, tiny_config, head):
    for labels in (1, 2, 5):
        config = tiny_config(id2label={str(i): f"label {i}" for i in range(labels)})
        entries = {e.hf: e for e in table.expand(config, head)}
        width = 1 if head == "multiple_choice" else labels
        weight, bias = entries["classifier.weight"], entries["classifier.bias"]
        assert (weight.shape("hf"), weight.shape("paddle"), weight.op.name) == ((width, 8), (8, width), "T")
        assert (bias.shape("hf"), bias.shape("paddle"), bias.op.name) == ((width,), (width,), "id")
        assert weight.probe == bias.probe == "logits"


@pytest.mark.parametrize("head", CLASSIFIERS)
def test_the_bias_of_a_classifier_depends_on_no_switch(table, tiny_config, head):
    def biases(value):
        config = tiny_config(classifier_bias=value, decoder_bias=value)
        return {e.hf for e in table.expand(config, head) if e.hf.endswith(".bias")}

    assert biases(False) == {"classifier.bias"}
    assert biases(True) == {"classifier.bias", "head.dense.bias"}


@pytest.mark.parametrize("head", HEADS)
def test_names_are_the_same_on_both_sides(table, tiny_config, head):
    assert all(entry.hf == entry.paddle for entry in table.expand(tiny_config(), head))


def test_layer_0_has_no_attention_norm_and_every_other_layer_has_one(table, tiny_config):
    names = {entry.hf for entry in table.expand(tiny_config(norm_bias=True), "base")}
    assert not any(name.startswith("layers.0.attn_norm") for name in names)
    for i in (1, 2):
        assert {f"layers.{i}.attn_norm.weight", f"layers.{i}.attn_norm.bias"} <= names


@pytest.mark.parametrize("switch", BIASES)
def test_a_bias_switch_adds_its_biases_and_no_others(table, tiny_config, switch):
    names = {
        value: {e.hf.removeprefix("model.") for e in table.expand(tiny_config(**{switch: value}), "masked_lm")}
        for value in (False, True)
    }
    assert names[False] < names[True]
    added = names[True] - names[False]
    assert {f"{owner}.bias" for owner in BIASES[switch]} <= added
    assert all(name.endswith(".bias") for name in added)
    owners = {"norm_bias": "norm", "attention_bias": "attn", "mlp_bias": "mlp"}.get(switch, BIASES[switch][0])
    assert all(owners in name for name in added)


def test_a_tied_decoder_repeats_the_embedding_and_is_not_stored(table, tiny_config):
    entries = {e.hf: e for e in table.expand(tiny_config(tie_word_embeddings=True), "masked_lm")}
    decoder = entries["decoder.weight"]
    assert not decoder.op.stored
    assert decoder.to == decoder.to_paddle == "model.embeddings.tok_embeddings.weight"
    assert decoder.hf_shape == entries[decoder.to].hf_shape


def test_an_untied_decoder_is_a_weight_of_its_own(table, tiny_config):
    entries = {e.hf: e for e in table.expand(tiny_config(tie_word_embeddings=False), "masked_lm")}
    decoder = entries["decoder.weight"]
    assert decoder.op.stored
    assert decoder.op.name == "id"
    assert decoder.to == ""
    assert decoder.paddle_shape == (23, 8)  # the embedding's layout on both sides


def test_shapes_are_in_out_on_the_paddle_side(table, tiny_config):
    entries = {e.hf: e for e in table.expand(tiny_config(attention_bias=True, mlp_bias=True), "base")}
    expected = {
        "embeddings.tok_embeddings.weight": ((23, 8), (23, 8)),
        "layers.1.attn_norm.weight": ((8,), (8,)),
        "layers.1.attn.Wqkv.weight": ((24, 8), (8, 24)),
        "layers.1.attn.Wqkv.bias": ((24,), (24,)),
        "layers.1.mlp.Wi.weight": ((12, 8), (8, 12)),
        "layers.1.mlp.Wi.bias": ((12,), (12,)),
        "layers.1.mlp.Wo.weight": ((8, 6), (6, 8)),
        "layers.1.mlp.Wo.bias": ((8,), (8,)),
    }
    assert {name: (entries[name].shape("hf"), entries[name].shape("paddle")) for name in expected} == expected


def test_square_transposed_weights_are_known_to_be_shape_blind(table, tiny_config):
    def blind(**changes):
        return {e.hf for e in table.expand(tiny_config(**changes), "masked_lm") if e.shape_blind}

    squares = {*(f"model.layers.{i}.attn.Wo.weight" for i in range(3)), "head.dense.weight"}
    assert blind() == squares
    assert blind(intermediate_size=4) == squares | {f"model.layers.{i}.mlp.Wi.weight" for i in range(3)}
    assert blind(intermediate_size=8) == squares | {f"model.layers.{i}.mlp.Wo.weight" for i in range(3)}
    assert blind(vocab_size=8) == squares  # the embedding is square and not transposed


def test_the_published_parameter_counts_come_out(table):
    def parameters(config, head):
        total = 0
        for entry in table.expand(config, head):
            size = 1
            for dim in entry.hf_shape:
                size *= dim
            total += size * entry.op.stored
        return total

    assert parameters(ModelConfig(), "base") == 149_014_272
    assert parameters(ModelConfig(), "masked_lm") == 149_655_232
    classifier = 149_014_272 + 768 * 768 + 768  # with the prediction head
    for head in ("sequence_classification", "token_classification", "question_answering"):
        assert parameters(ModelConfig(), head) == classifier + 2 * 768 + 2 == 149_606_402
        assert parameters(ModelConfig(num_labels=9), head) == classifier + 9 * 768 + 9
    assert parameters(ModelConfig(), "multiple_choice") == classifier + 768 + 1
    assert parameters(ModelConfig(num_labels=9), "multiple_choice") == classifier + 768 + 1
    large = ModelConfig(hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16)
    assert parameters(large, "masked_lm") == 395_881_664


@given(flags=FLAGS, layers=st.integers(1, 5), head=st.sampled_from(sorted(HEADS)))
def test_every_model_has_unique_names_known_probes_and_paths_back(flags, layers, head):
    table = load_table()
    config = ModelConfig(num_hidden_layers=layers, **flags)
    entries = table.expand(config, head)
    names = [e.hf for e in entries]
    assert len(set(names)) == len(names)
    assert {name for name in names if ".layers." in f".{name}"} == {
        e.hf for e in entries if e.probe.startswith("layers.")
    }
    for entry in entries:
        assert OPS[entry.op.inverse] is entry.inverse_op()
        assert entry.inverse_op().shape(entry.paddle_shape) == entry.hf_shape
        if entry.probe.startswith("layers."):
            assert f"{entry.probe}." in entry.hf


def test_weights_belong_to_the_probe_of_their_module(table, tiny_config):
    probes = {e.hf: e.probe for e in table.expand(tiny_config(), "masked_lm")}
    assert probes["model.embeddings.tok_embeddings.weight"] == "embeddings"
    assert probes["model.layers.2.attn.Wqkv.weight"] == "layers.2.attn"
    assert probes["head.dense.weight"] == "head"
    assert probes["decoder.bias"] == "logits"


def test_the_digest_is_that_of_the_file(table):
    file = configs_dir() / "tables" / "modernbert.toml"
    assert table.digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_safetensors_formats_are_those_both_frameworks_read(table):
    assert (table.format("hf"), table.format("paddle")) == ("pt", "np")


def test_the_head_is_read_from_the_architecture(table):
    for head, architecture in HEADS.items():
        assert table.head_of([architecture], where="c") == head
        assert table.architecture(head) == architecture
        assert table.prefix(head) == ("" if head == "base" else "model.")
    assert table.heads == tuple(HEADS)


@pytest.mark.parametrize("declared", [["BertForMaskedLM"], ["ModernBertDecoderForCausalLM"], [], None])
def test_an_architecture_outside_the_table_is_refused_by_name(table, declared):
    with pytest.raises(UsageError, match=f"`{(declared or ['none'])[0]}` of `some/config.json`") as refused:
        table.head_of(declared, where="some/config.json")
    assert refused.value.hint == f"supported: {', '.join(HEADS.values())}"


def test_a_mistyped_head_gets_a_suggestion(table):
    assert table.check_head("base") == "base"
    with pytest.raises(UsageError, match="unknown head `maskedlm`") as refused:
        table.check_head("maskedlm")
    assert refused.value.hint == "did you mean `masked_lm`?"
    with pytest.raises(UsageError, match="unknown head `sequence-classification`") as refused:
        table.check_head("sequence-classification")
    assert refused.value.hint == "did you mean `sequence_classification`?"
    with pytest.raises(UsageError, match="unknown head `zzz`") as refused:
        table.check_head("zzz")
    assert refused.value.hint == f"heads: {', '.join(HEADS)}"


@pytest.mark.parametrize(
    ("name", "head", "near"),
    [
        ("model.layers.7.attn.Wo.weights", "masked_lm", "layers.{i}.attn.Wo.weight"),
        ("embeddings.tok_embedding.weight", "base", "embeddings.tok_embeddings.weight"),
        ("decoder.biases", "masked_lm", "decoder.bias"),
        ("qqqqqqqq", "masked_lm", ""),
    ],
)
def test_the_nearest_row_is_found_for_a_mistyped_weight(table, name, head, near):
    assert nearest_row(name, table, head, "hf") == near


def test_the_shipped_document_parses_and_each_break_of_it_is_refused(document):
    parse_table(document, "d", where="modernbert.toml")
    document["rows"]["body"][3]["paddle"] = "layers.attn_norm.weight"
    with pytest.raises(TableError, match=r"`modernbert.toml`: row `layers.\{i\}.attn_norm.weight` has the placeholder"):
        parse_table(document, "d", where="modernbert.toml")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (row(op="permute"), "op"),
        (row(opp="id"), "opp"),
        (row(kind="conv"), "kind"),
        (row(layers="2:"), "layers"),
        (row(op="tie"), "row `x.weight`: `to` belongs to op `tie`"),
        (row(to="x.weight"), "row `x.weight`: `to` belongs to op `tie`"),
        (row(op="tie", to="y.weight"), "row `x.weight` is tied to `y.weight`, which no row has"),
        (row(op="T"), "row `x.weight` transposes a shape that is not a matrix"),
        (row(op="T", shape="H H H"), "row `x.weight` transposes a shape that is not a matrix"),
        (row(hf="layers.{i}.x"), r"row `layers.\{i\}.x` has the placeholder"),
        (row(probe="layers.{i}.mlp"), "row `x.weight` has the placeholder"),
        (row(op="tie", to="layers.{i}.y"), "row `x.weight` has the placeholder"),
        (row(hf="x.{j}", paddle="x.{j}"), r"row `x.\{j\}` has a placeholder that is not \{i\}"),
        (row(paddle="x.{"), r"row `x.weight` has a placeholder that is not \{i\}"),
        (row(probe="}"), r"row `x.weight` has a placeholder that is not \{i\}"),
        (row(op="tie", to="x.weight", part=True), "row `x.weight` is a part, which op `tie` cannot be"),
        (row(shape="", part=True), "row `x.weight` is a part and has no axis to be stacked along"),
        (row(part=1.5), "part"),
        (row(tp="colrow"), "row `x.weight` has the unknown tp `colrow`: col, col:2, col:3, row or vocab"),
        (row(tp="col:1"), "has the unknown tp `col:1`"),
        (row(tp="row:2", shape="H H"), "has the unknown tp `row:2`"),
        (row(tp="COL"), "has the unknown tp `COL`"),
        (row(tp="row"), "row `x.weight` cannot be divided by `row`"),  # a vector has no input features
        (row(tp="col", shape=""), "row `x.weight` cannot be divided by `col`"),
        (row(tp="col", part=True), "row `x.weight` cannot be divided by `col`"),
        # A fused Wqkv, cut as if it were one block: rank 0 would get all of q and half of k.
        (row(tp="col", shape="3H H"), "row `x.weight` is 3 blocks .* by its shape `3H H` and 1 by its tp `col`"),
        (row(tp="col:2", shape="3H H"), "is 3 blocks .* and 2 by its tp `col:2`"),
        (row(tp="col:3", shape="H H"), "is 1 blocks .* and 3 by its tp `col:3`"),
        (row(tp="vocab", shape="2H H"), "is 2 blocks .* and 1 by its tp `vocab`"),
        (row(tp="row", shape="H 2H"), "is 2 blocks .* and 1 by its tp `row`"),
    ],
)
def test_a_broken_row_is_refused_when_the_table_is_loaded(broken, message):
    assert expand(minimal(row()))
    with pytest.raises(TableError, match=f"`test.toml`.*{message}"):
        expand(minimal(broken))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (row(shape="Q"), "shape `Q` of row `x.weight` has the unknown dimension `Q`"),
        (row(shape="H h"), "shape `H h` of row `x.weight` has the unknown dimension `h`"),
        (row(shape="2Q"), "shape `2Q` of row `x.weight` has the unknown dimension `2Q`"),
        (row(shape="1.5"), "shape `1.5` of row `x.weight` has the unknown dimension `1.5`"),
        (row(shape="-1 H"), "shape `-1 H` of row `x.weight` has the unknown dimension `-1`"),
        (row(shape="HV"), "shape `HV` of row `x.weight` has the unknown dimension `HV`"),
        (row(shape="H2"), "shape `H2` of row `x.weight` has the unknown dimension `H2`"),
        (row(when="hidden_size"), "row `x.weight` depends on `hidden_size`"),
        (row(when="not such_switch"), "row `x.weight` depends on `such_switch`"),
    ],
)
def test_a_row_that_config_cannot_resolve_is_refused_when_it_is_expanded(broken, message):
    with pytest.raises(TableError, match=message):
        expand(minimal(broken))


def test_two_rows_with_one_name_are_refused_on_either_side():
    with pytest.raises(TableError, match=r"give the hf name `x.weight`"):
        expand(minimal(row(), row(paddle="y.weight")))
    with pytest.raises(TableError, match=r"give the paddle name `x.weight`"):
        expand(minimal(row(), row(hf="y.weight")))


def test_exclusive_conditions_may_share_a_name():
    rows = (row(when="norm_bias"), row(when="not norm_bias", shape="V"))
    assert [e.hf_shape for e in expand(minimal(*rows), ModelConfig(norm_bias=True))] == [(768,)]
    assert [e.hf_shape for e in expand(minimal(*rows), ModelConfig(norm_bias=False))] == [(50368,)]


def test_a_head_that_names_unknown_rows_is_refused():
    broken = minimal(row())
    broken["heads"]["base"]["rows"] = ["pooler"]
    with pytest.raises(TableError, match="head `base` names the unknown rows `pooler`"):
        expand(broken)


def test_a_table_without_a_body_is_refused():
    broken = minimal()
    broken["rows"] = {"head": [row()]}
    with pytest.raises(TableError, match=r"`test.toml`: there are no rows `body`"):
        expand(broken)


@pytest.mark.parametrize("key", ["no_such_key", "norm_bias", "norm_eps", "hidden_activation"])
def test_a_symbol_that_is_no_size_is_refused_when_it_is_used(key):
    broken = minimal(row(shape="2Z"))
    broken["symbols"]["Z"] = key
    with pytest.raises(TableError, match=f"the dimension `Z` of table `test/1` is `{key}`, which is not a size"):
        expand(broken)


def test_a_weight_tied_to_one_its_head_does_not_store_is_refused():
    tied = row(hf="t", paddle="t", op="tie", to="y")
    with pytest.raises(TableError, match="`t` is tied to `y`, which table `test/1` does not store"):
        expand(minimal(row(), row(hf="y", paddle="y", op="tie", to="x.weight"), tied))  # itself a repetition
    other_head = minimal(row(), tied, other=[row(hf="y", paddle="y")])
    assert [entry.to for entry in expand(other_head)] == ["", "y", ""]
    other_head["heads"]["base"]["rows"] = []
    with pytest.raises(TableError, match="`t` is tied to `y`"):
        expand(other_head)


def test_a_weight_of_a_layer_is_tied_to_a_weight_of_that_layer():
    named = {"probe": "layers.{i}"}
    first = row(hf="layers.{i}.a", paddle="layers.{i}.A", **named)
    second = row(hf="layers.{i}.b", paddle="layers.{i}.b", op="tie", to="layers.{i}.a", **named)
    entries = expand(minimal(row(), first, second))
    assert [(e.to, e.to_paddle) for e in entries if e.hf == "layers.2.b"] == [("layers.2.a", "layers.2.A")]


def test_a_multiplied_dimension_is_multiplied():
    assert [e.hf_shape for e in expand(minimal(row(shape="3H 2V")))] == [(3 * 768, 2 * 50368)]


def test_a_dimension_may_be_a_plain_integer():
    assert [e.hf_shape for e in expand(minimal(row(shape="1")))] == [(1,)]
    (entry,) = expand(minimal(row(shape="17 H", op="T")))
    assert (entry.hf_shape, entry.paddle_shape) == ((17, 768), (768, 17))


def test_layers_are_written_out_one_layer_after_the_other():
    rows = [row(hf=f"layers.{{i}}.{n}", paddle=f"layers.{{i}}.{n}", probe="layers.{i}") for n in ("a", "b")]
    names = [e.hf for e in expand(minimal(row(), *rows, row(hf="end", paddle="end")))]
    assert names == ["x.weight", *(f"layers.{i}.{n}" for i in range(3) for n in ("a", "b")), "end"]


def test_a_table_that_ends_with_layer_rows_keeps_its_layers():
    last = row(hf="layers.{i}.a", paddle="layers.{i}.a", probe="layers.{i}")
    assert [e.hf for e in expand(minimal(row(), last))] == [
        "x.weight",
        "layers.0.a",
        "layers.1.a",
        "layers.2.a",
    ]


def test_a_file_that_is_no_toml_is_refused(tmp_path):
    (tmp_path / "broken.toml").write_text("id = [")
    with pytest.raises(TableError, match=r"broken.toml` is not valid TOML"):
        read_toml(tmp_path / "broken.toml")


def test_a_v4_and_a_v5_config_expand_to_the_same_weights(table, tiny_config):
    v5 = tiny_config(
        global_attn_every_n_layers=None,
        global_rope_theta=None,
        local_rope_theta=None,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    assert table.expand(v5, "masked_lm") == table.expand(tiny_config(), "masked_lm")


# --- parts ------------------------------------------------------------------------------------------------------------


def part(hf, shape="H", **changes):
    return row(hf=hf, paddle="whole", shape=shape, part=True, **changes)


def test_parts_take_their_rows_of_the_whole_in_table_order():
    a, b, c, d = expand(minimal(part("a", "2H H"), part("b", "3 H"), row(), part("c", "H H")))
    assert [e.rows for e in (a, b, c, d)] == [(0, 1536), (1536, 1539), None, (1539, 2307)]
    assert {e.stacked for e in (a, b, d)} == {(2307, 768)}
    assert (c.stacked, c.paddle_shape) == ((), (768,))
    assert [e.hf_shape for e in (a, b, d)] == [(1536, 768), (3, 768), (768, 768)]
    assert {e.paddle_shape for e in (a, b, d)} == {(2307, 768)}


def test_a_transposed_stack_is_transposed_whole():
    for entry in expand(minimal(part("a", "2H H", op="T"), part("b", "3 H", op="T"))):
        assert (entry.paddle_shape, entry.shape_blind) == ((768, 1539), False)


def test_a_stack_is_shape_blind_if_the_whole_is_square():
    entries = expand(minimal(part("a", "1 4", op="T"), part("b", "3 4", op="T")))
    assert [entry.shape_blind for entry in entries] == [True, True]
    entries = expand(minimal(part("a", "4 4", op="T"), part("b", "3 4", op="T")))
    assert [entry.shape_blind for entry in entries] == [False, False]


def test_a_part_alone_is_the_whole():
    (entry,) = expand(minimal(part("a", "3 H")))
    assert (entry.rows, entry.stacked, entry.paddle_shape) == ((0, 3), (3, 768), (3, 768))


def test_every_layer_has_a_stack_of_its_own():
    named = {"part": True, "paddle": "layers.{i}.ab", "probe": "layers.{i}"}
    entries = expand(minimal(*(row(hf=f"layers.{{i}}.{n}", **named) for n in "ab")))
    assert [(e.hf, e.paddle, e.rows) for e in entries] == [
        (f"layers.{i}.{n}", f"layers.{i}.ab", rows)
        for i in range(3)
        for n, rows in (("a", (0, 768)), ("b", (768, 1536)))
    ]


@pytest.mark.parametrize("other", [part("b", "H 4"), part("b", "H H", op="T"), part("b", "H"), part("b", "H H 1")])
def test_parts_that_do_not_fit_together_are_refused(other):
    assert expand(minimal(part("a", "3 H"), part("b", "H H")))
    with pytest.raises(TableError, match="the parts of `whole` in table `test/1` do not fit together"):
        expand(minimal(part("a", "3 H"), other))


@pytest.mark.parametrize(
    ("rows", "side", "name"),
    [
        ((part("a"), row(hf="b", paddle="whole")), "paddle", "whole"),
        ((part("a"), part("a")), "hf", "a"),
        ((part("a"), row(hf="a", paddle="b")), "hf", "a"),
    ],
)
def test_a_name_is_not_shared_by_anything_but_parts(rows, side, name):
    with pytest.raises(TableError, match=f"two rows of table `test/1` give the {side} name `{name}`"):
        expand(minimal(*rows))


# --- decoders ---------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
DECODER_LAYER = [
    "attn.q_proj.weight",
    "attn.k_proj.weight",
    "attn.v_proj.weight",
    "attn.Wo.weight",
    "mlp_norm.weight",
    "mlp.Wi.weight",
    "mlp.Wo.weight",
]


def decoder_entries(table, head, **changes):
    return {entry.hf: entry for entry in table.expand(table.sizes(SIZES | changes, where="c"), head)}


def test_the_decoder_lists_the_names_transformers_saves(decoder_table):
    body = [
        "embeddings.tok_embeddings.weight",
        "embeddings.norm.weight",
        *(f"layers.0.{name}" for name in DECODER_LAYER),
        "layers.1.attn_norm.weight",
        *(f"layers.1.{name}" for name in DECODER_LAYER),
        "final_norm.weight",
    ]
    assert list(decoder_entries(decoder_table, "base")) == body
    model = [f"model.{name}" for name in body]
    assert list(decoder_entries(decoder_table, "causal_lm")) == [
        *model, "lm_head.dense.weight", "lm_head.norm.weight", "decoder.weight", "decoder.bias",
    ]  # fmt: skip
    assert list(decoder_entries(decoder_table, "sequence_classification", classifier_bias=True)) == [
        *model, "head.dense.weight", "head.dense.bias", "head.norm.weight", "classifier.weight", "classifier.bias",
    ]  # fmt: skip


def test_paddles_decoder_has_one_weight_for_q_k_and_v(decoder_table):
    entries = decoder_entries(decoder_table, "causal_lm", attention_bias=True)
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind, whole in (("weight", (8, 24)), ("bias", (24,))):
            entry = entries[f"model.layers.1.attn.{name}.{kind}"]
            assert (entry.paddle, entry.paddle_shape) == (f"model.layers.1.attn.Wqkv.{kind}", whole)
            assert entry.rows == (8 * number, 8 * number + 8)
    paddle = {entry.paddle for entry in entries.values()}
    assert len(paddle) == len(entries) - 2 * 2 * 2
    assert not any("_proj" in name for name in paddle)


def test_sizes_that_config_does_not_give_are_those_of_the_reference(decoder_table):
    assert vars(decoder_table.sizes({}, where="c")) == {
        "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_labels": 2,
        "norm_bias": False, "attention_bias": False, "mlp_bias": False, "classifier_bias": False, "decoder_bias": True,
        "tie_word_embeddings": True,
    }  # fmt: skip
    given = decoder_table.sizes({"hidden_size": 8, "mlp_bias": True, "unknown": [1]}, where="c")
    assert (given.hidden_size, given.mlp_bias, hasattr(given, "unknown")) == (8, True, False)


def test_labels_are_counted_by_their_names_if_config_does_not_count_them(decoder_table):
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    assert decoder_table.sizes(names, where="c").num_labels == 3
    assert decoder_table.sizes(names | {"num_labels": 5}, where="c").num_labels == 5
    assert decoder_table.sizes({"id2label": None}, where="c").num_labels == 2


@pytest.mark.parametrize(
    ("key", "value", "says", "needs"),
    [
        ("hidden_size", None, "missing", "a positive number"),
        ("hidden_size", "768", "'768'", "a positive number"),
        ("hidden_size", 768.0, "768.0", "a positive number"),
        ("hidden_size", 0, "0", "a positive number"),
        ("hidden_size", -1, "-1", "a positive number"),
        ("hidden_size", True, "True", "a positive number"),
        ("num_hidden_layers", [2], r"\[2\]", "a positive number"),
        ("norm_bias", None, "missing", "true or false"),
        ("norm_bias", 1, "1", "true or false"),
        ("tie_word_embeddings", "true", "'true'", "true or false"),
        ("id2label", {}, "0", "a positive number"),
    ],
)
def test_a_size_or_switch_of_the_wrong_kind_is_refused(decoder_table, key, value, says, needs):
    key_named = "num_labels" if key == "id2label" else key
    message = f"^`{key_named}` of `some/config.json` is {says}, table `modernbert-decoder/1` needs {needs}$"
    with pytest.raises(ConfigError, match=message):
        decoder_table.sizes({key: value}, where="some/config.json")


def test_a_size_without_a_default_must_be_given():
    document = minimal(row(), row(hf="v", paddle="v", shape="V", when="not biased"))
    document["config"] |= {"model_type": "other", "defaults": {"vocab_size": 5, "num_hidden_layers": 1}}
    table = parse_table(document, "digest", where="test.toml")
    given = {"hidden_size": 8, "biased": False}
    assert [e.hf_shape for e in table.expand(table.sizes(given, where="c"), "base")] == [(8,), (5,)]
    for key in given:
        absent = {name: value for name, value in given.items() if name != key}
        with pytest.raises(ConfigError, match=f"`{key}` of `c` is missing, table `test/1` needs"):
            table.sizes(absent, where="c")


def test_modernbert_itself_is_checked_whole(table):
    with pytest.raises(ConfigError, match="`layer_types` is `5` in `c`"):  # no row needs it
        table.sizes({"model_type": "modernbert", "layer_types": 5}, where="c")
    assert isinstance(table.sizes({"model_type": "modernbert"}, where="c"), ModelConfig)


# --- which table ------------------------------------------------------------------------------------------------------


def test_the_shipped_tables_are_listed_and_load():
    assert table_names() == ("modernbert", "modernbert-decoder")
    assert [load_table(name).id for name in table_names()] == ["modernbert/1", "modernbert-decoder/1"]
    assert load_table().id == "modernbert/1"


def test_a_table_is_found_by_the_model_type():
    for name in table_names():
        assert table_for({"model_type": name}, where="c").id == f"{name}/1"


@pytest.mark.parametrize(("raw", "said"), [({"model_type": "bert"}, "'bert'"), ({}, "None"), ({"model_type": 5}, "5")])
def test_a_model_type_without_a_table_is_refused(raw, said):
    with pytest.raises(ConfigError, match=f"`model_type` of `some/config.json` is {said}, which no table") as refused:
        table_for(raw, where="some/config.json")
    assert refused.value.hint == "supported: modernbert, modernbert-decoder; another one needs --table FILE.toml"


def test_a_table_is_loaded_from_a_file(tmp_path):
    text = (configs_dir() / "tables" / "modernbert.toml").read_bytes().replace(b"modernbert/1", b"mine/7")
    (tmp_path / "mine.toml").write_bytes(text)
    table = load_table(str(tmp_path / "mine.toml"))
    assert (table.id, table.digest) == ("mine/7", hashlib.sha256(text).hexdigest())


@pytest.mark.parametrize("name", ["modernbertt", "absent.toml", "../tables/modernbert.toml", ""])
def test_a_table_that_is_not_there_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        load_table(name)
    assert refused.value.message == f"no table `{name}`"
    assert refused.value.hint == "modernbert, modernbert-decoder, or the path of a .toml file"


def test_a_broken_table_from_a_file_is_refused_by_its_name(tmp_path):
    (tmp_path / "mine.toml").write_text('id = "x"\n')
    with pytest.raises(TableError, match=r"`mine.toml`: prefix: Field required"):
        load_table(str(tmp_path / "mine.toml"))


# --- aliases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", table_names())
@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.final_norm.weight", "model.final_norm.weight"),
        ("module.model.final_norm.weight", "model.final_norm.weight"),
        ("module.module.final_norm.weight", "final_norm.weight"),
        ("_orig_mod.final_norm.weight", "final_norm.weight"),
        ("module._orig_mod.module.final_norm.weight", "final_norm.weight"),
        ("model.layers._orig_mod.3._orig_mod.attn.Wo.weight", "model.layers.3.attn.Wo.weight"),
        ("final_norm.weight._orig_mod", "final_norm.weight"),
        ("model.final_norm.gamma", "model.final_norm.weight"),
        ("model.final_norm.beta", "model.final_norm.bias"),
        ("module.final_norm._orig_mod.beta", "final_norm.bias"),
        ("gamma.weight", "gamma.weight"),  # an alias where it is not one
        ("final_norm.gammas", "final_norm.gammas"),
        ("final_norm_gamma", "final_norm_gamma"),
        ("model.module.weight", "model.module.weight"),
        ("modules.weight", "modules.weight"),
        ("x_orig_mod.weight", "x_orig_mod.weight"),
    ],
)
def test_what_wrappers_and_older_versions_add_is_taken_off(name, stored, canonical):
    table = load_table(name)
    assert table.canonical(stored, "hf") == canonical
    assert table.canonical(stored, "paddle") == stored


WORDS = st.lists(st.sampled_from(["module", "_orig_mod", "gamma", "beta", "weight", "bias", "x", "", "0"]), max_size=6)


@given(words=WORDS, name=st.sampled_from(table_names()))
def test_taking_aliases_off_twice_is_taking_them_off_once(words, name):
    table = load_table(name)
    once = table.canonical(".".join(words), "hf")
    assert table.canonical(once, "hf") == once
    assert not once.startswith("module.")
    assert "_orig_mod" not in once.split(".")
    assert not once.endswith((".gamma", ".beta"))


@given(layers=st.integers(1, 3), name=st.sampled_from(table_names()), flags=FLAGS)
def test_no_name_of_a_table_is_an_alias(layers, name, flags):
    table = load_table(name)
    sizes = table.sizes({"model_type": name, "num_hidden_layers": layers} | flags, where="c")
    for head in table.heads:
        names = [entry.hf for entry in table.expand(sizes, head)]
        assert [table.canonical(name, "hf") for name in names] == names


def test_a_table_without_aliases_changes_no_name():
    table = parse_table(minimal(row()), "digest", where="test.toml")
    assert table.canonical("module._orig_mod.x.gamma", "hf") == "module._orig_mod.x.gamma"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "conversion_manifest.json", "../x", "a/b", ""])
def test_a_carried_file_that_a_conversion_writes_itself_is_refused(name):
    broken = minimal(row())
    parse_table(broken, "d", where="t.toml")
    broken["config"]["carried_files"] = [name]
    with pytest.raises(TableError, match="cannot be a carried file"):
        parse_table(broken, "d", where="t.toml")
