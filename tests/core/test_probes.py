"""Which modules are compared, and in which order."""

import copy

import pytest

from modernbert_align.core.probes import load_probes, parse_probes
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.errors import TableError

LAYER = ("attn_norm", "attn", "mlp_norm", "mlp")
# What follows the encoder, in execution order.
ENDS = {
    "base": ["output"],
    "masked_lm": ["head", "logits", "output", "loss"],
    "sequence_classification": ["head", "logits", "output", "loss"],
    "token_classification": ["head", "logits", "output", "loss"],
    "question_answering": ["head", "logits", "start_logits", "end_logits", "loss"],
    "multiple_choice": ["head", "logits", "output", "loss"],
}
POOLED = ("sequence_classification", "multiple_choice")


@pytest.fixture
def document():
    raw, _ = read_toml(configs_dir() / "probes" / "modernbert.toml")
    return copy.deepcopy(raw)


def parsed(document, config, head="masked_lm", prefix="model."):
    return parse_probes(document, config, head, prefix, where="probes.toml")


def row(name, **changes):
    return {"name": name, "hf": name, "paddle": name, "fan_in": "H"} | changes


def by_name(config, head):
    return {probe.name: probe for probe in load_probes(config, head, "" if head == "base" else "model.")}


@pytest.mark.parametrize("head", ENDS)
def test_probes_come_in_execution_order(tiny_config, head):
    names = [probe.name for probe in load_probes(tiny_config(), head, "model.")]
    layers = [name for i in range(3) for name in (*(f"layers.{i}.{part}" for part in LAYER), f"layers.{i}")]
    assert names == ["embeddings", *layers, "final_norm", *ENDS[head]]
    assert len(set(names)) == len(names)


def test_every_head_of_the_table_has_probes_and_no_other_head_has(table, document):
    assert set(document["heads"]) == set(table.heads) == set(ENDS)


def test_every_group_is_used(document):
    assert {group for groups in document["heads"].values() for group in groups} == set(document["probes"])


@pytest.mark.parametrize("head", ENDS)
def test_every_head_but_base_ends_with_its_loss(tiny_config, head):
    probes = load_probes(tiny_config(), head, "model.")
    losses = [probe for probe in probes if probe.key == "loss"]
    if head == "base":
        assert losses == []
        return
    assert losses == [probes[-1]]
    assert (probes[-1].name, probes[-1].pattern) == ("loss", "loss")
    assert (probes[-1].hf, probes[-1].paddle) == ("", "")
    assert (probes[-1].tokens, probes[-1].scale) == (False, 1.0)


@pytest.mark.parametrize("head", ENDS)
def test_sparse_prediction_drops_the_loss_and_nothing_else(tiny_config, head):
    sparse = load_probes(tiny_config(sparse_prediction=True), head, "model.")
    dense = load_probes(tiny_config(sparse_prediction=False), head, "model.")
    assert sparse == tuple(probe for probe in dense if probe.name != "loss")
    assert len(dense) - len(sparse) == (head != "base")


@pytest.mark.parametrize("head", ENDS)
def test_what_the_model_returns_is_compared_by_name(tiny_config, head):
    whole = {probe.name: probe.key for probe in by_name(tiny_config(), head).values() if probe.hf == ""}
    expected = {
        "base": {"output": "last_hidden_state"},
        "question_answering": {"start_logits": "start_logits", "end_logits": "end_logits", "loss": "loss"},
    }
    assert whole == expected.get(head, {"output": "logits", "loss": "loss"})


@pytest.mark.parametrize("head", ENDS)
def test_padding_is_left_out_wherever_there_are_tokens(tiny_config, head):
    without = {probe.name for probe in by_name(tiny_config(), head).values() if not probe.tokens}
    if head in POOLED:
        assert without == {"head", "logits", "output", "loss"}
    else:
        assert without == {"loss"} & set(ENDS[head])


@pytest.mark.parametrize("head", ENDS)
def test_errors_are_relative_to_the_reference_but_for_the_loss(tiny_config, head):
    probes = by_name(tiny_config(), head).values()
    assert {probe.name for probe in probes if probe.scale} == {"loss"} & set(ENDS[head])


@pytest.mark.parametrize("head", ENDS)
def test_only_attention_may_return_less_in_the_reference(tiny_config, head):
    probes = by_name(tiny_config(), head).values()
    omitting = {probe.name: probe.may_omit for probe in probes if probe.may_omit}
    assert omitting == {f"layers.{i}.attn": 1 for i in range(3)}


def test_the_base_model_has_no_head_and_no_prefix(tiny_config):
    probes = load_probes(tiny_config(num_hidden_layers=1), "base", "")
    assert [probe.name for probe in probes][-2:] == ["final_norm", "output"]
    assert probes[0].hf == "embeddings"
    assert probes[1].paddle == "layers.0.attn_norm"


def test_paths_of_the_encoder_carry_the_prefix_and_those_of_the_head_do_not(tiny_config):
    paths = {probe.name: (probe.hf, probe.paddle) for probe in load_probes(tiny_config(), "masked_lm", "model.")}
    assert paths["layers.2.attn"] == ("model.layers.2.attn", "model.layers.2.attn")
    assert paths["final_norm"] == ("model.final_norm", "model.final_norm")
    assert paths["head"] == ("head", "head")
    assert paths["logits"] == ("decoder", "decoder")
    assert paths["output"] == paths["loss"] == ("", "")  # the whole model, prefix or not


@pytest.mark.parametrize("head", sorted({*ENDS} - {"base", "masked_lm"}))
def test_the_logits_of_a_classifier_are_those_of_its_classifier(tiny_config, head):
    probes = by_name(tiny_config(), head)
    assert (probes["logits"].hf, probes["logits"].paddle) == ("classifier", "classifier")
    assert (probes["head"].hf, probes["head"].paddle) == ("head", "head")


def test_patterns_are_the_names_without_the_layer(tiny_config):
    patterns = {probe.name: probe.pattern for probe in load_probes(tiny_config(), "masked_lm", "model.")}
    assert patterns["layers.2.mlp"] == "layers.{i}.mlp"
    assert patterns["layers.0"] == "layers.{i}"
    assert patterns["embeddings"] == "embeddings"


def test_the_fan_in_is_the_width_of_the_sum(tiny_config):
    fan_in = {p.name: p.fan_in for p in load_probes(tiny_config(intermediate_size=20), "masked_lm", "model.")}
    assert fan_in["layers.1.attn"] == fan_in["logits"] == fan_in["embeddings"] == 8
    assert fan_in["layers.1.mlp"] == fan_in["layers.1"] == 20


def test_every_weight_belongs_to_a_probe_of_its_model(table, tiny_config):
    for head in ENDS:
        assert {entry.probe for entry in table.expand(tiny_config(norm_bias=True), head)} <= set(
            by_name(tiny_config(), head)
        )


def test_the_number_of_probes_grows_with_the_layers(tiny_config):
    counts = [len(load_probes(tiny_config(num_hidden_layers=n), "masked_lm", "model.")) for n in (1, 2, 22)]
    assert counts == [11, 16, 116]


def test_an_unknown_head_is_refused(document, tiny_config):
    assert parsed(document, tiny_config())
    with pytest.raises(TableError, match=r"`probes\.toml` lists no probes for the head `pooler`"):
        parsed(document, tiny_config(), head="pooler")


@pytest.mark.parametrize("rows", [None, []])
def test_a_head_with_an_unknown_or_empty_group_is_refused(document, tiny_config, rows):
    document["heads"]["masked_lm"] = ["body", "pooler"]
    if rows is not None:
        document["probes"]["pooler"] = rows
    with pytest.raises(TableError, match="head `masked_lm` names the unknown or empty group `pooler`"):
        parsed(document, tiny_config())


def test_an_unknown_fan_in_is_refused(document, tiny_config):
    document["probes"]["token_head"][0]["fan_in"] = "Q"
    with pytest.raises(TableError, match="probe `head` has the unknown fan_in `Q`"):
        parsed(document, tiny_config())


@pytest.mark.parametrize(
    "change",
    [
        {"tolerance": 1e-3},
        {"fan_in": 8},
        {"hf": None},
        {"key": 1},
        {"tokens": "sometimes"},
        {"scale": "large"},
        {"may_omit": 0.5},
    ],
)
def test_a_malformed_row_is_refused_with_its_place(document, tiny_config, change):
    document["probes"]["token_output"][1].update(change)
    with pytest.raises(TableError, match=rf"`probes\.toml`: probes\.token_output\.1\.{next(iter(change))}"):
        parsed(document, tiny_config())


@pytest.mark.parametrize(
    ("hf", "paddle", "key", "good"),
    [
        ("", "", "logits", True),
        ("x", "x", "", True),
        ("", "", "", False),
        ("x", "x", "logits", False),
        ("", "x", "logits", False),
        ("x", "", "logits", False),
        ("", "x", "", False),
        ("x", "", "", False),
    ],
)
def test_a_key_belongs_to_the_whole_model_and_only_to_it(document, tiny_config, hf, paddle, key, good):
    document["probes"]["token_output"][0] |= {"hf": hf, "paddle": paddle, "key": key}
    if good:
        found = {probe.name: probe for probe in parsed(document, tiny_config())}["output"]
        assert (found.hf, found.paddle, found.key) == (hf, paddle, key)
        return
    with pytest.raises(TableError, match=r"`probes\.toml`: probe `output`: `key` belongs to the whole model and only"):
        parsed(document, tiny_config())


def test_what_a_row_says_is_what_its_probe_has(tiny_config):
    said = {"key": "logits", "tokens": False, "scale": 0.5, "may_omit": 2}
    rows = [row("plain"), row("told", hf="", paddle="", **said)]
    document = {"id": "x", "probes": {"body": rows}, "heads": {"base": ["body"]}}
    plain, told = parsed(document, tiny_config(), "base", "")
    assert {name: getattr(told, name) for name in said} == said
    assert (plain.key, plain.tokens, plain.scale, plain.may_omit) == ("", True, 0.0, 0)


def test_rows_before_and_after_the_layers_stay_there(tiny_config):
    rows = [row("first"), row("l.{i}.a"), row("l.{i}"), row("last"), row("very_last")]
    document = {"id": "x", "probes": {"body": rows}, "heads": {"base": ["body"]}}
    names = [probe.name for probe in parsed(document, tiny_config(num_hidden_layers=2), "base", "")]
    assert names == ["first", "l.0.a", "l.0", "l.1.a", "l.1", "last", "very_last"]
    document["probes"]["body"] = rows[:3]
    assert [p.name for p in parsed(document, tiny_config(num_hidden_layers=1), "base", "")] == ["first", "l.0.a", "l.0"]
