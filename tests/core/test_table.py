"""The name-mapping table: what it lists for a model, and which mistakes in it are refused."""

import copy
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import OPS
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.core.table import load_table, nearest_row, parse_table
from modernbert_align.errors import TableError, UsageError

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
        "config": {"paddle_only": [], "carried_files": []},
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
