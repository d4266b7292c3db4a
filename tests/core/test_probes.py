"""Which modules are compared, and in which order."""

import copy

import pytest

from modernbert_align.core.probes import load_probes, parse_probes
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.errors import TableError

LAYER = ("attn_norm", "attn", "mlp_norm", "mlp")


@pytest.fixture
def document():
    raw, _ = read_toml(configs_dir() / "probes" / "modernbert.toml")
    return copy.deepcopy(raw)


def parsed(document, config, head="masked_lm", prefix="model."):
    return parse_probes(document, config, head, prefix, where="probes.toml")


def row(name, **changes):
    return {"name": name, "hf": name, "paddle": name, "fan_in": "H"} | changes


def test_probes_come_in_execution_order(tiny_config):
    names = [probe.name for probe in load_probes(tiny_config(), "masked_lm", "model.")]
    layers = [name for i in range(3) for name in (*(f"layers.{i}.{part}" for part in LAYER), f"layers.{i}")]
    assert names == ["embeddings", *layers, "final_norm", "head", "logits", "output"]
    assert len(set(names)) == len(names)


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
    assert paths["output"] == ("", "")  # the whole model, prefix or not


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
    for head, prefix in (("base", ""), ("masked_lm", "model.")):
        names = {probe.name for probe in load_probes(tiny_config(), head, prefix)}
        assert {entry.probe for entry in table.expand(tiny_config(norm_bias=True), head)} <= names


def test_the_number_of_probes_grows_with_the_layers(tiny_config):
    counts = [len(load_probes(tiny_config(num_hidden_layers=n), "masked_lm", "model.")) for n in (1, 2, 22)]
    assert counts == [10, 15, 115]


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
    document["probes"]["masked_lm"][0]["fan_in"] = "Q"
    with pytest.raises(TableError, match="probe `head` has the unknown fan_in `Q`"):
        parsed(document, tiny_config())


@pytest.mark.parametrize("change", [{"tolerance": 1e-3}, {"fan_in": 8}, {"hf": None}])
def test_a_malformed_row_is_refused_with_its_place(document, tiny_config, change):
    document["probes"]["masked_lm"][1].update(change)
    with pytest.raises(TableError, match=rf"`probes\.toml`: probes\.masked_lm\.1\.{next(iter(change))}"):
        parsed(document, tiny_config())


def test_rows_before_and_after_the_layers_stay_there(tiny_config):
    rows = [row("first"), row("l.{i}.a"), row("l.{i}"), row("last"), row("very_last")]
    document = {"id": "x", "probes": {"body": rows}, "heads": {"base": ["body"]}}
    names = [probe.name for probe in parsed(document, tiny_config(num_hidden_layers=2), "base", "")]
    assert names == ["first", "l.0.a", "l.0", "l.1.a", "l.1", "last", "very_last"]
    document["probes"]["body"] = rows[:3]
    assert [p.name for p in parsed(document, tiny_config(num_hidden_layers=1), "base", "")] == ["first", "l.0.a", "l.0"]
