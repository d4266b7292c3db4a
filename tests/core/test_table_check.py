"""The rules about a table that need no framework: each is kept by the shipped tables and broken by a broken one."""

import copy

import pytest

from modernbert_align.core import table as table_module
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import OPS, Op
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.core.table import Row, load_table, parse_table, table_names
from modernbert_align.core.table_check import (
    RULES,
    Sightings,
    check_aliases,
    check_expansion,
    check_inverse_law,
    check_placeholders,
    check_table,
    list_shape_blind,
    row_name,
    same_shapes,
)
from modernbert_align.core.table_diff import Change, diff_tables

TINY = ModelConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=512)


@pytest.fixture(params=table_names())
def shipped(request):
    """A shipped table as plain data, to be broken."""
    raw, _ = read_toml(configs_dir() / "tables" / f"{request.param}.toml")
    return copy.deepcopy(raw)


@pytest.fixture
def document():
    raw, _ = read_toml(configs_dir() / "tables" / "modernbert.toml")
    return copy.deepcopy(raw)


@pytest.fixture
def decoder():
    raw, _ = read_toml(configs_dir() / "tables" / "modernbert-decoder.toml")
    return copy.deepcopy(raw)


def table_of(raw):
    return parse_table(raw, "digest", where="test.toml")


def sizes_of(table):
    return TINY if table.model_type == "modernbert" else table.sizes({}, where="defaults")


def check(raw):
    table = table_of(raw)
    return {finding.rule: finding for finding in check_table(table, sizes_of(table))}


def broken(raw):
    """Numbers of the rules a table breaks, and everything said about them."""
    findings = check(raw)
    faults = [fault for finding in findings.values() for fault in finding.faults]
    text = "\n".join(f"{fault.row}: {fault.message}" for fault in faults)
    return {rule for rule, finding in findings.items() if finding.faults}, text


def row_of(raw, hf, group="body"):
    return next(row for row in raw["rows"][group] if row["hf"] == hf)


def body_row(**changes):
    return {"hf": "x.weight", "paddle": "x.weight", "op": "id", "shape": "H", "kind": "norm", "probe": "x"} | changes


def test_the_shipped_tables_keep_every_rule_and_say_what_was_looked_at(shipped):
    findings = check(shipped)
    assert list(findings) == [1, 2, 5, 6, 7]
    for rule, finding in findings.items():
        assert (finding.name, finding.faults, finding.skipped) == (RULES[rule], (), False)
        assert finding.checked


def test_the_rules_look_at_every_row(shipped):
    table = table_of(shipped)
    findings = check(shipped)
    rows = {row for head in table.heads for row in table.rows(head)}
    assert findings[1].checked.startswith(f"{len(rows)} rows")
    stored = {row.hf for row in rows if row.op != "tie"}
    assert findings[6].checked.startswith(f"{len(stored)} rows")


# --- 1 ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"paddle": "x.{j}.weight"}, "a brace that is not the placeholder"),
        ({"probe": "x}"}, "a brace that is not the placeholder"),
        ({"paddle": "layers.{i}.weight"}, "in some of the names only"),
        ({"hf": "layers.{i}.weight"}, "in some of the names only"),
        ({"probe": "layers.{i}"}, "in some of the names only"),
        ({"op": "tie", "to": "layers.{i}.weight"}, "in some of the names only"),
        ({"layers": "1:"}, "without the placeholder"),
    ],
)
def test_placeholders(changes, words):
    good, bad = Row.model_validate(body_row()), Row.model_validate(body_row(**changes))
    assert check_placeholders([good]).faults == ()
    faults = check_placeholders([good, bad]).faults
    assert {fault.row for fault in faults} == {bad.hf}
    assert any(words in fault.message for fault in faults)


def test_a_row_for_layers_from_1_needs_layers(document):
    row_of(document, "embeddings.norm.weight")["layers"] = "1:"
    rules, text = broken(document)
    assert rules == {1}
    assert text.startswith("embeddings.norm.weight: ")


# --- 2 ---


def test_one_name_for_two_rows_breaks_the_expansion(document):
    document["rows"]["body"].append(body_row(hf="final_norm.weight", paddle="other.weight"))
    rules, text = broken(document)
    assert rules == {2}
    assert "give the hf name `final_norm.weight`" in text


def test_one_paddle_name_for_two_rows_breaks_the_expansion(document):
    document["rows"]["body"].append(body_row(paddle="final_norm.weight"))
    assert "give the paddle name `final_norm.weight`" in broken(document)[1]


def test_a_name_that_only_some_switches_give_twice_is_found(document):
    document["rows"]["body"].append(body_row(hf="final_norm.bias", paddle="final_norm.bias", when="mlp_bias"))
    rules, text = broken(document)
    assert rules == {2}
    assert "all switches on" in text


def test_names_that_collide_without_the_prefix_are_found(document):
    document["rows"]["body"].append(body_row(hf="head.norm.weight", paddle="head.norm.weight"))
    rules, text = broken(document)
    assert rules == {2}
    assert "masked_lm without the prefix" in text


def test_a_shape_of_an_unknown_symbol_breaks_the_expansion(document):
    row_of(document, "layers.{i}.mlp.Wi.weight")["shape"] = "2Q H"
    rules, text = broken(document)
    assert rules == {2}
    assert "row `layers.{i}.mlp.Wi.weight` has the unknown dimension `2Q`" in text


def test_parts_of_different_width_break_the_expansion(decoder):
    row_of(decoder, "layers.{i}.attn.k_proj.weight")["shape"] = "H I"
    rules, text = broken(decoder)
    assert rules == {2}
    assert "do not fit together" in text


def test_the_later_rules_are_skipped_when_the_table_does_not_expand(document):
    row_of(document, "layers.{i}.mlp.Wi.weight")["shape"] = "2Q H"
    assert {rule for rule, finding in check(document).items() if finding.skipped} == {5, 6, 7}


def test_a_fault_of_many_models_is_told_once_with_how_often(document):
    row_of(document, "layers.{i}.mlp.Wi.weight")["shape"] = "2Q H"
    (fault,) = check_expansion(table_of(document), TINY).faults
    assert fault.message.endswith("(base, as configured, and 54 more)")


def test_a_fault_seen_once_is_told_without_a_count():
    seen = Sightings()
    seen.add("row", "wrong", where="here")
    seen.add("row", "also wrong")
    assert [fault.message for fault in seen.faults()] == ["wrong (here)", "also wrong"]


# --- 5 ---


def test_square_rows_are_named_with_their_shape():
    finding = list_shape_blind(load_table(), TINY)
    assert finding.faults == ()
    assert [note for note in finding.notes if note.startswith("square")] == [
        "square, a forgotten transpose does not show: layers.{i}.attn.Wo.weight [64, 64]",
        "square, a forgotten transpose does not show: head.dense.weight [64, 64]",
    ]


@pytest.mark.parametrize(("intermediate", "alike"), [(96, True), (80, False)])
def test_wqkv_and_wi_can_be_swapped_unseen_only_if_they_have_one_shape(intermediate, alike):
    config = ModelConfig(hidden_size=64, intermediate_size=intermediate, num_attention_heads=4)
    pair = ("layers.{i}.attn.Wqkv.weight", "layers.{i}.mlp.Wi.weight")
    assert (((192, 64), pair) in same_shapes(load_table(), config)) is alike


def test_rows_of_different_heads_are_no_pair():
    table = load_table("modernbert-decoder")
    for _, names in same_shapes(table, table.sizes({}, where="defaults")):
        assert not {"lm_head.norm.weight", "head.norm.weight"} <= set(names)


def test_of_groups_that_grow_with_the_head_only_the_largest_are_told(shipped):
    table = table_of(shipped)
    groups = [set(names) for _, names in same_shapes(table, sizes_of(table))]
    assert not any(one < other for one in groups for other in groups)


def test_parts_of_a_stack_can_be_swapped_unseen():
    table = load_table("modernbert-decoder")
    groups = dict(same_shapes(table, table.sizes({}, where="defaults")))
    assert groups[768, 768] == tuple(
        f"layers.{{i}}.attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "Wo")
    )


# --- 6 ---


def with_op(monkeypatch, name, **changes):
    op = OPS[name]
    made = {"name": op.name, "inverse": op.inverse, "shape": op.shape, "apply": op.apply, "stored": op.stored}
    monkeypatch.setattr(table_module, "OPS", {**OPS, name: Op(**{**made, **changes})})


@pytest.mark.parametrize(
    ("changes", "words", "shows_on_squares"),
    [
        ({"inverse": "id"}, ") back, not (", True),
        ({"inverse": "id"}, "the op id does not undo T", True),
        ({"shape": lambda shape: shape}, "), not (", False),
        ({"apply": lambda bits: bits.T[::-1]}, "the op T does not undo T", True),
        ({"apply": lambda bits: bits.T[:-1]}, "), not (", True),
    ],
)
def test_an_operation_that_its_inverse_does_not_undo_is_found(monkeypatch, changes, words, shows_on_squares):
    table = load_table()
    with_op(monkeypatch, "T", **changes)
    faults = check_inverse_law(table, TINY).faults
    transposed = {row for head in table.heads for row in table.rows(head) if row.op == "T"}
    expected = {row.hf for row in transposed if shows_on_squares or row.shape != "H H"}
    assert {fault.row for fault in faults} == expected
    assert any(words in fault.message for fault in faults)


def test_an_operation_that_forgets_one_element_is_found(monkeypatch):
    def forget(bits):
        return bits * (bits != 3)

    with_op(monkeypatch, "id", apply=forget)
    assert "embeddings.norm.weight" in {fault.row for fault in check_inverse_law(load_table(), TINY).faults}


def test_the_parts_of_a_stack_are_told_together(monkeypatch):
    with_op(monkeypatch, "T", apply=lambda bits: bits.T[::-1])
    table = load_table("modernbert-decoder")
    rows = {fault.row for fault in check_inverse_law(table, table.sizes({}, where="defaults")).faults}
    assert ", ".join(f"layers.{{i}}.attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")) in rows


def test_a_tied_row_of_another_shape_than_what_it_repeats_is_found(document):
    row_of(document, "decoder.weight", "decoder")["shape"] = "H V"
    rules, text = broken(document)
    assert rules == {6}
    assert "decoder.weight: has not the shape of `model.embeddings.tok_embeddings.weight`" in text


# --- 7 ---


@pytest.mark.parametrize(
    ("aliases", "words"),
    [
        ({"suffixes": {".beta": ".gamma", ".gamma": ".weight"}}, "and that as"),
        ({"suffixes": {".attn_norm.weight": ".mlp_norm.weight"}}, "layers.1.mlp_norm.weight`, the name of another row"),
        ({"suffixes": {".weight": ".kernel"}}, "a name no row has"),
        ({"suffixes": {".weight": ".weight.weight"}}, "into `embeddings.norm.weight.weight`, a name no row has"),
        ({"prefixes": ["model."]}, "turns `model.embeddings.tok_embeddings.weight` into `embeddings"),
        ({"prefixes": ["head."]}, "turns `head.dense.weight` into `dense.weight`"),
        ({"components": ["attn"]}, "turns `layers.0.attn.Wqkv.weight` into `layers.0.Wqkv.weight`"),
        ({"components": ["_orig_mod.module"]}, "_orig_mod.module."),
    ],
)
def test_an_alias_that_changes_what_a_name_means_is_found(document, aliases, words):
    document["aliases"] = aliases
    rules, text = broken(document)
    assert rules == {7}
    assert words in text
    assert "layers.{i}" in text or "head.dense.weight" in text


@pytest.mark.parametrize("when", ["", "norm_bias", "not norm_bias"])
def test_a_row_whose_own_name_is_a_legacy_spelling_is_found(document, when):
    document["rows"]["body"].append(body_row(hf="extra.gamma", paddle="extra.gamma", when=when))
    rules, text = broken(document)
    assert rules == {7}
    assert text.startswith("extra.gamma: an alias turns `extra.gamma` into `extra.weight`")


def test_spellings_are_tried_with_every_alias_and_none_means_just_the_names(document):
    tried = int(check(document)[7].checked.split()[0])
    document["aliases"] = {}
    finding = check_aliases(table_of(document), TINY)
    names = int(finding.checked.split()[4])
    assert finding.checked.startswith(f"{names} legacy spellings")
    assert tried > 50 * names


def test_a_row_is_named_as_the_table_writes_it():
    table = load_table()
    assert row_name("model.layers.12.attn.Wo.weight", table) == "layers.{i}.attn.Wo.weight"
    assert row_name("layers.0.attn_norm.weight", table) == "layers.{i}.attn_norm.weight"
    assert row_name("decoder.weight", table) == "decoder.weight"


# --- differences ---


def changed(raw, change):
    other = copy.deepcopy(raw)
    change(other)
    return diff_tables(table_of(raw), table_of(other))


def test_a_table_is_equal_to_itself(shipped):
    found = diff_tables(table_of(shipped), table_of(copy.deepcopy(shipped)))
    assert found.equal
    assert (found.only_a, found.only_b, found.changed, found.settings) == ((), (), (), ())


def test_rows_of_one_table_only_are_named_with_their_group_and_condition(document):
    found = changed(document, lambda raw: raw["rows"]["decoder"].pop(1))
    assert (found.only_a, found.only_b) == (("decoder: decoder.weight when not tie_word_embeddings",), ())
    found = changed(document, lambda raw: raw["rows"]["body"].append(body_row()))
    assert (found.only_a, found.only_b) == ((), ("body: x.weight",))


@pytest.mark.parametrize(
    ("hf", "field", "value"),
    [
        ("layers.{i}.attn.Wo.weight", "op", "id"),
        ("layers.{i}.mlp.Wi.weight", "shape", "2H H"),  # still two blocks, as its tp says
        ("layers.{i}.attn.Wo.weight", "tp", "col"),
        ("layers.{i}.attn.Wo.weight", "tp", ""),
        ("layers.{i}.attn_norm.weight", "layers", ""),
        ("final_norm.weight", "paddle", "last_norm.weight"),
        ("final_norm.bias", "when", "mlp_bias"),
        ("final_norm.weight", "hf", "last_norm.weight"),
    ],
)
def test_a_changed_field_of_a_row_is_one_change(document, hf, field, value):
    before = row_of(document, hf).get(field, "")
    found = changed(document, lambda raw: row_of(raw, hf).update({field: value}))
    condition = " when norm_bias" if hf.endswith(".bias") else ""
    assert found.changed == (Change(place=f"body: {hf}{condition}", field=field, a=before, b=value),)
    assert (found.only_a, found.only_b, found.settings) == ((), (), ())


def test_a_row_that_kept_only_its_name_is_a_changed_one(document):
    def change(raw):
        row_of(raw, "final_norm.bias").update({"paddle": "last_norm.bias", "when": "mlp_bias", "shape": "I"})

    found = changed(document, change)
    assert [c.field for c in found.changed] == ["paddle", "shape", "when"]
    assert (found.only_a, found.only_b) == ((), ())


def test_the_order_of_rows_counts(decoder):
    def swap(raw):
        rows = raw["rows"]["body"]
        rows[5], rows[6] = rows[6], rows[5]

    (change,) = changed(decoder, swap).changed
    assert (change.place, change.field) == ("body", "order")
    q, k = (f"layers.{{i}}.attn.{name}.weight" for name in ("q_proj", "k_proj"))
    assert change.a.index(q) < change.a.index(k)
    assert change.b.index(q) > change.b.index(k)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("id", "other/1"),
        ("prefix", "encoder."),
        ("sides.hf.format", "np"),
        ("symbols.C", "num_classes"),
        ("heads.base.architecture", "OtherModel"),
        ("aliases.prefixes", ["wrapped."]),
        ("config.model_type", "other"),
        ("config.carried_files", []),
    ],
)
def test_a_changed_setting_is_one_change(document, path, value):
    def change(raw):
        *where, last = path.split(".")
        for key in where:
            raw = raw[key]
        raw[last] = value

    (found,) = changed(document, change).settings
    assert (found.place, found.b) == (path, value)
    assert found.a not in (None, value)


def test_a_head_of_one_table_only_is_a_setting(document):
    found = changed(document, lambda raw: raw["heads"].pop("base"))
    assert {(c.place, c.b) for c in found.settings} == {("heads.base.architecture", None), ("heads.base.rows", None)}


def test_defaults_that_are_written_out_change_nothing(document):
    assert changed(document, lambda raw: row_of(raw, "final_norm.weight").update({"when": "", "part": False})).equal
