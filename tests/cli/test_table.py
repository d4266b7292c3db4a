"""`table show`, `lint`, `explain`, `diff`, and `doctor`."""

import json
import re
import sys

import pytest

from modernbert_align.core import table as table_module
from modernbert_align.core.ops import OPS, Op
from modernbert_align.core.resources import configs_dir
from modernbert_align.core.table_check import RULES

ENCODER, DECODER = "modernbert", "modernbert-decoder"
Q, K, V = (f"layers.{{i}}.attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj"))


# --- broken tables: edits of the text of a shipped one ---


def on_row(hf, old, new, nth=0):
    """Edit the nth row of that Hugging Face name."""

    def edit(text):
        lines = text.splitlines(keepends=True)
        places = [n for n, line in enumerate(lines) if line.lstrip().startswith(f'{{ hf = "{hf}"')]
        assert old in lines[places[nth]]
        lines[places[nth]] = lines[places[nth]].replace(old, new)
        return "".join(lines)

    return edit


def without_row(hf):
    return lambda text: re.sub(rf'^  \{{ hf = "{re.escape(hf)}".*\n', "", text, flags=re.MULTILINE)


def with_row(line, group="body"):
    return lambda text: text.replace(f"{group} = [\n", f"{group} = [\n  {line},\n")


def replaced(old, new):
    return lambda text: text.replace(old, new)


def few_heads(text):
    """One head for each way to end, and so fewer models to build."""
    left_out = "base|token_classification|question_answering|multiple_choice"
    return re.sub(rf"^({left_out}) .*\n", "", text, flags=re.MULTILINE)


@pytest.fixture
def table_file(tmp_path):
    def write(*edits, of=ENCODER):
        text = (configs_dir() / "tables" / f"{of}.toml").read_text()
        for edit in (few_heads, *edits) if of == ENCODER else edits:
            edited = edit(text)
            assert edited != text
            text = edited
        path = tmp_path / "broken.toml"
        path.write_text(text)
        return path

    return write


# --- lint ---


@pytest.fixture
def lint(cli):
    """Lints a table; gives (exit code, rules it breaks, all problems as one text, the whole document)."""

    def run(*arguments):
        code, out, err = cli("table", "lint", *arguments, "--json")
        assert out, err
        document = json.loads(out)
        for problem in document["problems"]:
            assert RULES[problem["rule"]] == problem["name"]
        text = "\n".join(f"{problem['row']}: {problem['message']}" for problem in document["problems"])
        return code, {problem["rule"] for problem in document["problems"]}, text, document

    return run


def test_lint_finds_the_table_in_order_and_tells_every_rule(cli):
    code, out, err = cli("table", "lint")
    assert code == 0, out + err
    for rule, name in RULES.items():
        assert f"rule {rule} ({name}): ok; " in out
    assert "for the fixture tiny" in out
    assert "6 heads" in out
    assert "both frameworks" in out
    assert "of one shape [192, 64], a swap does not show: layers.{i}.attn.Wqkv.weight, layers.{i}.mlp.Wi.weight" in out
    assert out.endswith("modernbert/1: 0 problems\n")


def test_lint_of_the_decoder_says_that_there_is_no_paddle_model_to_hold_it_against(lint):
    code, rules, text, document = lint("--table", DECODER)
    assert (code, rules) == (0, set()), text
    assert document["model"] == "the table's default sizes with 2 of 22 layers"
    coverage = next(rule for rule in document["rules"] if rule["rule"] == 3)
    assert "state dict of the reference" in coverage["checked"]
    (note,) = coverage["notes"]
    assert note.startswith("the Paddle side was not held against a model: this package has no ModernBertDecoderModel")


@pytest.fixture
def decoder_folder(tmp_path):
    def write(**changes):
        sizes = {"hidden_size": 96, "num_hidden_layers": 3, "id2label": {"0": "no", "1": "yes"}}
        config = {"model_type": DECODER, "architectures": ["ModernBertDecoderForCausalLM"], **sizes, **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_lint_takes_the_table_of_a_folder_by_its_model_type(lint, decoder_folder):
    folder = decoder_folder()
    code, _, text, document = lint("--model", folder)
    assert (code, text) == (0, "")
    assert (document["table"], document["model"]) == ("modernbert-decoder/1", str(folder))
    assert "layers.{i}.attn.Wo.weight [96, 96]" in json.dumps(document["rules"])


def test_a_number_of_labels_that_is_right_by_chance_is_found(lint, table_file, decoder_folder):
    file = table_file(on_row("classifier.weight", '"C H"', '"2 H"'), of=DECODER)
    code, rules, text, _ = lint("--table", file, "--model", decoder_folder())
    assert (code, rules) == (1, {3})
    assert "the hf shape is [2, 48], that of the live `classifier.weight` [5, 48]" in text


def test_lint_of_a_model_that_transformers_refuses_says_so(cli, decoder_folder):
    code, out, err = cli("table", "lint", "--model", decoder_folder(num_attention_heads=7))
    assert (code, out) == (2, "")
    assert "transformers does not build ModernBertDecoderModel: " in err


def test_lint_of_a_paddle_checkpoint_with_named_labels(lint, converted, tmp_path):
    config = json.loads((converted("tiny") / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **labels, "paddlenlp_version": None}))
    code, _, text, _ = lint("--model", tmp_path)
    assert (code, text) == (0, "")


WO, WI, EMBEDDING = "layers.{i}.attn.Wo.weight", "layers.{i}.mlp.Wi.weight", "embeddings.tok_embeddings.weight"
TIES_SWAPPED = [
    on_row("decoder.weight", '"not tie', '"tie', 1),
    on_row("decoder.weight", '"tie_word', '"not tie_word', 0),
]
EXTRA = '{ hf = "%s", paddle = "%s", op = "id", shape = "H", kind = "norm", probe = "final_norm" }'


@pytest.mark.parametrize(
    ("edits", "broken", "words"),
    [
        ([on_row("embeddings.norm.weight", "kind =", 'layers = "1:", kind =')], {1}, "embeddings.norm.weight: `layers"),
        ([with_row(EXTRA % ("final_norm.weight", "x"))], {2}, "give the hf name `final_norm.weight`"),
        ([with_row(EXTRA % ("x", "final_norm.weight"))], {2}, "give the paddle name `final_norm.weight`"),
        ([with_row(EXTRA % ("decoder.bias", "decoder.bias"))], {2}, "masked_lm without the prefix"),
        ([on_row(WI, '"2I H"', '"2Q H"')], {2}, "unknown dimension `2Q`"),
        ([without_row("final_norm.weight")], {3}, "final_norm.weight: no row is for hf `model.final"),
        ([without_row("layers.{i}.mlp.Wi.bias")], {3}, "layers.{i}.mlp.Wi.bias: no row is for paddle"),
        ([with_row(EXTRA % ("x.weight", "x.weight"))], {3}, "x.weight: the paddle model has no `model.x.weight`"),
        ([on_row(WI, '"2I H"', '"2H H"')], {3}, "Wi.weight: the hf shape is [128, 64], that of"),
        ([on_row("classifier.weight", '"C H"', '"2 H"')], {3}, "the paddle shape is [48, 2], that of the live `classi"),
        ([on_row("head.dense.bias", "classifier_bias", "decoder_bias")], {3}, "classifier_bias alone"),
        ([on_row("layers.{i}.attn_norm.weight", ', layers = "1:"', "")], {3}, "has no `model.layers.0.attn_norm"),
        (
            [on_row("final_norm.weight", 'paddle = "final', 'paddle = "last')],
            {3},
            "no row is for paddle `model.final_norm",
        ),
        ([replaced("ModernBertForMaskedLM", "ModernBertForMasks")], {3}, "has no class `ModernBertForMasks`"),
        ([on_row(WO, '"T"', '"id"')], {4}, f"{WO}: a Linear weight needs the op T"),
        ([on_row("head.dense.weight", '"T"', '"id"')], {4}, "head.dense.weight: a Linear weight needs the op T"),
        ([on_row("final_norm.weight", '"norm"', '"linear"')], {4}, "the row says kind linear, the hf module is a"),
        ([on_row(WO, '"T"', '"id"'), on_row(WO, '"linear"', '"decoder"')], {4}, "kind decoder"),
        (TIES_SWAPPED, {4}, "are two parameters of the paddle model"),
        (TIES_SWAPPED, {4}, "are one hf parameter"),
        ([on_row(EMBEDDING, '"id"', '"T"')], {3, 4}, "with 2 axes of a module of kind embedding"),
        (
            [replaced('".gamma" = ".weight", ".beta" = ".bias"', '".beta" = ".gamma", ".gamma" = ".weight"')],
            {7},
            "and that as",
        ),
        (
            [replaced('".gamma" = ".weight"', '".attn_norm.weight" = ".mlp_norm.weight"')],
            {7},
            "the name of another row",
        ),
        ([replaced('"_orig_mod"', '"attn"')], {7}, "a name no row has"),
    ],
)
def test_lint_catches_a_wrong_table(lint, table_file, edits, broken, words):
    code, rules, text, document = lint("--table", table_file(*edits))
    assert (code, rules) == (1, broken), text
    assert words in text
    skipped = {rule["rule"] for rule in document["rules"] if rule["skipped"]}
    assert skipped == ({3, 4, 5, 6, 7} if broken & {1, 2} else set())


@pytest.mark.parametrize(
    ("edits", "broken", "words"),
    [
        ([on_row("embeddings.tok_embeddings.weight", '"id"', '"T"')], {4}, "the op T on a weight with 2 axes"),
        ([on_row(Q, '"H H"', '"H I"')], {2}, "do not fit together"),
        ([on_row(row, '"T"', '"id"') for row in (Q, K, V)], {4}, "q_proj.weight: a Linear weight needs the op T"),
        ([without_row(V)], {3}, f"{V}: no row is for hf"),
        ([replaced("ModernBertDecoderModel", "ModernBertDecoderModle")], {3}, "no class `ModernBertDecoderModle`"),
    ],
)
def test_lint_catches_a_wrong_table_of_a_model_that_paddle_does_not_have(lint, table_file, edits, broken, words):
    code, rules, text, _ = lint("--table", table_file(*edits, of=DECODER))
    assert (code, rules) == (1, broken), text
    assert words in text


def test_lint_catches_an_operation_that_its_inverse_does_not_undo(lint, monkeypatch, table_file):
    op = OPS["T"]
    monkeypatch.setattr(table_module, "OPS", {**OPS, "T": Op("T", "id", op.shape, op.apply)})
    code, rules, text, _ = lint("--table", table_file())
    assert (code, rules) == (1, {6})
    assert "layers.{i}.attn.Wo.weight: the op id does not undo T" in text


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            on_row("layers.{i}.mlp.Wo.weight", 'paddle = "layers.{i}', 'paddle = "layers.0'),
            "the placeholder {i} in some",
        ),
        (on_row("layers.{i}.mlp.Wo.weight", 'probe = "layers.{i}', 'probe = "layers.0'), "the placeholder {i} in some"),
        (on_row("final_norm.weight", 'paddle = "final', 'paddle = "{j}'), "a placeholder that is not {i}"),
        (on_row("final_norm.weight", '"id"', '"permute"'), "rows.body."),
        (on_row("final_norm.weight", '"id"', '"T"'), "transposes a shape that is not a matrix"),
        (on_row("decoder.weight", "embeddings.tok_", "embeddings.token_"), "which no row has"),
    ],
)
def test_what_the_loader_refuses_never_gets_to_the_rules(cli, table_file, edit, words):
    code, out, err = cli("table", "lint", "--table", table_file(edit))
    assert (code, out) == (2, "")
    assert words in err


def test_problems_are_printed_with_rule_and_row(cli, table_file):
    code, out, _ = cli("table", "lint", "--table", table_file(without_row("final_norm.weight")))
    assert code == 1
    assert "rule 3 (coverage): 2 problems; " in out
    assert (
        "problem: rule 3 (coverage), row `final_norm.weight`: no row is for hf `model.final_norm.weight` (masked_lm, as"
        in out
    )
    assert out.endswith("modernbert/1: 2 problems\n")


def test_lint_without_the_frameworks_says_what_to_do(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "modernbert_align.engines.table_lint", None)
    code, out, err = cli("table", "lint")
    assert (code, out) == (4, "")
    assert "a package is missing" in err


# --- show ---


def test_show_lists_every_weight(cli):
    code, out, _ = cli("table", "show", "--model", "tiny", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert len(rows) == 30
    assert {r["hf"] for r in rows if r["shape_blind"]} == {
        *(f"model.layers.{i}.attn.Wo.weight" for i in range(4)),
        "head.dense.weight",
    }
    assert {row["stack_rows"] for row in rows} == {None}
    divided = {row["hf"]: row["tp"] for row in rows if row["tp"] and not row["hf"].startswith("model.layers.")}
    assert divided == {
        "model.embeddings.tok_embeddings.weight": "vocab", "decoder.weight": "vocab", "decoder.bias": "vocab"
    }  # fmt: skip


def test_show_says_how_ranks_divide_a_weight(cli):
    lines = cli("table", "show", "--model", "tiny")[1].splitlines()
    (line,) = (line for line in lines if line.startswith("model.layers.1.attn.Wqkv.weight "))
    assert line.endswith("T    [192, 64]  tp col:3")
    (line,) = (line for line in lines if line.startswith("head.norm.weight "))
    assert "tp" not in line


def test_show_needs_no_weights_of_a_fixture(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, _ = cli("table", "show", "--model", "large", "--head", "base")
    assert code == 0
    assert "layers.27.mlp.Wo.weight" in out
    assert list(tmp_path.iterdir()) == []


def test_show_of_another_table_takes_its_default_sizes(cli):
    code, out, _ = cli("table", "show", "--table", DECODER)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("model.layers.21.attn.v_proj.weight "))
    assert line.endswith("T    [768, 768]  -> model.layers.21.attn.Wqkv.weight  rows 1536 to 2304 of [2304, 768]")
    assert "for the head causal_lm of the table's default sizes," in out


def test_a_folder_comes_before_a_fixture_of_its_name(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    config = {"model_type": DECODER, "architectures": ["ModernBertDecoderModel"], "num_hidden_layers": 1}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    code, out, _ = cli("table", "show", "--model", "tiny")
    assert code == 0
    assert "for the head base of tiny," in out
    assert "modernbert-decoder/1" in out


def test_the_fixtures_are_no_models_of_another_table(cli):
    code, _, err = cli("table", "show", "--table", DECODER, "--model", "tiny")
    assert code == 2
    assert "the fixture tiny is a modernbert model, table `modernbert-decoder/1` is for modernbert-decoder" in err


def test_a_table_without_defaults_needs_a_model(cli, table_file):
    file = table_file(lambda text: re.sub(r"^defaults.*\n", "", text, flags=re.MULTILINE), of=DECODER)
    code, _, err = cli("table", "show", "--table", file)
    assert code == 2
    assert "`[config] defaults of table modernbert-decoder/1` is missing" in err


@pytest.mark.parametrize("verb", ["show", "lint"])
def test_an_unknown_table_is_refused_with_those_there_are(cli, verb):
    code, _, err = cli("table", verb, "--table", "nosuch")
    assert code == 2
    assert "no table `nosuch`" in err
    assert "modernbert, modernbert-decoder, or the path" in err


# --- explain ---


@pytest.fixture
def explain(cli):
    def run(*arguments):
        code, out, err = cli("table", "explain", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)["rows"]

    return run


def test_explain_tells_everything_about_a_weight(explain):
    (row,) = explain("model.layers.3.attn.Wo.weight", "--model", "tiny")
    assert row == {
        "row": {"hf": "layers.{i}.attn.Wo.weight", "paddle": "layers.{i}.attn.Wo.weight"},
        "hf": {"name": "model.layers.3.attn.Wo.weight", "symbols": "H H", "shape": [64, 64]},
        "paddle": {"name": "model.layers.3.attn.Wo.weight", "symbols": "H H", "shape": [64, 64]},
        "op": "T",
        "tied_to": "",
        "stack": None,
        "when": "",
        "in_model": True,
        "absent_because": [],
        "kind": "linear",
        "probe": "layers.3.attn",
        "tp": "row",
        "shape_blind": True,
        "same_shape": [],
        "heads": [
            "masked_lm",
            "base",
            "sequence_classification",
            "token_classification",
            "question_answering",
            "multiple_choice",
        ],
    }


def test_explain_in_words(cli):
    code, out, _ = cli("table", "explain", "module.layers.2.mlp.Wi._orig_mod.weight", "--model", "tiny")
    assert code == 0
    assert "module.layers.2.mlp.Wi._orig_mod.weight is read as layers.2.mlp.Wi.weight" in out
    assert "hf        model.layers.2.mlp.Wi.weight  2I H = [192, 64]" in out
    assert "paddle    model.layers.2.mlp.Wi.weight  H 2I = [64, 192]" in out
    assert "T, transposed" in out
    assert "a forgotten transpose shows; a swap with layers.{i}.attn.Wqkv.weight does not show" in out
    assert "ranks     col:2, divided among tensor-parallel ranks by output features, of each of their 2 blocks" in out
    assert "in model  yes" in out
    assert "modernbert/1 for the fixture tiny" in out
    square = cli("table", "explain", "layers.1.attn.Wo.weight")[1]
    assert "the matrix is square, a forgotten transpose does not show; no other weight beside it has its" in square


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp_norm.weight",
        "layers.2.mlp_norm.weight",
        "layers.2.mlp_norm.gamma",
        "module.model.layers.2.mlp_norm.gamma",
        "model._orig_mod.layers.2._orig_mod.mlp_norm.weight",
    ],
)
def test_explain_knows_a_weight_under_every_spelling(explain, name):
    (row,) = explain(name)
    assert row["hf"]["name"] == "model.layers.2.mlp_norm.weight"
    assert row["same_shape"] == ["layers.{i}.attn_norm.weight"]


def test_explain_takes_a_row_as_the_table_writes_it(explain):
    (row,) = explain("layers.{i}.attn_norm.weight")
    assert row["hf"]["name"] == "model.layers.1.attn_norm.weight"
    assert row["in_model"]


def test_explain_takes_a_name_of_another_head(explain):
    (row,) = explain("model.final_norm.weight", "--head", "base")
    assert (row["hf"]["name"], row["heads"]) == ("final_norm.weight", ["base"])


def test_explain_finds_the_parts_of_a_stacked_weight_by_its_paddle_name(explain):
    rows = explain("model.layers.5.attn.Wqkv.weight", "--table", DECODER)
    assert [row["row"]["hf"] for row in rows] == [Q, K, V]
    assert [row["stack"]["rows"] for row in rows] == [[0, 768], [768, 1536], [1536, 2304]]
    parts = [f"model.layers.5.attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    for row, part in zip(rows, parts, strict=True):
        assert row["hf"] == {"name": part, "symbols": "H H", "shape": [768, 768]}
        assert row["paddle"]["name"] == "model.layers.5.attn.Wqkv.weight"
        assert (row["paddle"]["symbols"], row["paddle"]["shape"]) == ("H H+H+H", [768, 2304])
        assert (row["stack"]["of"], row["stack"]["parts"]) == ([2304, 768], parts)
        assert row["shape_blind"] is False
        assert len(row["same_shape"]) == 3
    (one,) = explain(parts[1], "--table", DECODER)
    assert one == rows[1]


def test_explain_tells_whether_a_condition_holds(explain):
    tied, untied = explain("decoder.weight")
    assert (tied["when"], tied["in_model"], tied["op"]) == ("tie_word_embeddings", True, "tie")
    assert tied["tied_to"] == "model.embeddings.tok_embeddings.weight"
    assert (untied["when"], untied["in_model"]) == ("not tie_word_embeddings", False)
    assert untied["absent_because"] == ["`tie_word_embeddings` is true"]
    assert untied["same_shape"] == ["embeddings.tok_embeddings.weight"]
    (bias,) = explain("layers.1.attn.Wqkv.bias")
    assert (bias["when"], bias["absent_because"]) == ("attention_bias", ["`attention_bias` is false"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("layers.0.attn_norm.weight", "layer 0 has no such weight"),
        ("layers.4.attn_norm.weight", "it has 4 layers"),
        ("layers.123456789.mlp.Wo.weight", "it has 4 layers"),
    ],
)
def test_explain_tells_a_layer_that_the_model_has_not(explain, name, why):
    (row,) = explain(name, "--model", "tiny")
    assert (row["in_model"], row["absent_because"]) == (False, [why])


def test_explain_tells_the_rows_of_heads_that_differ_apart(explain):
    rows = explain("classifier.weight")
    assert [row["hf"]["symbols"] for row in rows] == ["C H", "1 H"]
    assert rows[1]["heads"] == ["multiple_choice"]
    assert [row["hf"]["shape"] for row in explain("classifier.weight", "--head", "multiple_choice")] == [[1, 768]]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["layers.3.attn.Wo.wieght"],
            "no row of table `modernbert/1` maps",
            "did you mean `layers.{i}.attn.Wo.weight`?",
        ),
        (["model.decoder.weight"], "maps `model.decoder.weight`", "did you mean `decoder.weight`?"),
        (["layers.03.attn.Wo.weight"], "maps `layers.03.attn.Wo.weight`", "did you mean `layers.{i}.attn.Wo.weight`?"),
        (["qqqqqq"], "maps `qqqqqq`", "`modernbert-align table show` lists every name"),
        (["decoder.bias", "--head", "base"], "the head base has no `decoder.bias`", "heads that have it: masked_lm"),
        (["decoder.bias", "--head", "bass"], "unknown head `bass`", "did you mean `base`?"),
    ],
)
def test_a_name_that_explain_does_not_know_gets_a_hint(cli, arguments, message, hint):
    code, out, err = cli("table", "explain", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert f"hint: {hint}" in err


# --- diff ---


def test_tables_that_say_the_same_are_equal_whatever_their_layout(cli, tmp_path):
    text = (configs_dir() / "tables" / "modernbert.toml").read_text()
    (tmp_path / "same.toml").write_text("# another comment\n" + text.replace("  ", " "))
    code, out, _ = cli("table", "diff", ENCODER, tmp_path / "same.toml")
    assert code == 0
    assert out.endswith("they say the same\n")


def test_diff_names_what_differs(cli, table_file):
    file = table_file(
        on_row("layers.{i}.attn.Wo.weight", '"T"', '"id"'),
        without_row("final_norm.weight"),
        with_row(EXTRA % ("x.weight", "x.weight")),
        replaced('id = "modernbert/1"', 'id = "mine/1"'),
    )
    code, out, _ = cli("table", "diff", ENCODER, file)
    assert code == 1
    assert "only in a  body: final_norm.weight\n" in out
    assert "only in b  body: x.weight\n" in out
    assert "changed    body: layers.{i}.attn.Wo.weight: op 'T' -> 'id'\n" in out
    assert "setting    id 'modernbert/1' -> 'mine/1'\n" in out
    assert "setting    heads.multiple_choice.architecture 'ModernBertForMultipleChoice' -> absent\n" in out
    assert out.endswith("12 differences\n")


def test_diff_as_json(cli):
    code, out, _ = cli("table", "diff", ENCODER, DECODER, "--json")
    document = json.loads(out)
    assert (code, document["equal"]) == (1, False)
    assert document["a"]["table"] == "modernbert/1"
    assert f"body: {Q}" in document["rows"]["only_b"]
    assert "body: layers.{i}.attn.Wqkv.weight" in document["rows"]["only_a"]
    assert {"path": "config.model_type", "a": "modernbert", "b": DECODER} in document["settings"]
    change = {"place": "classifier: classifier.bias", "field": "when", "a": "", "b": "classifier_bias"}
    changed = document["rows"]["changed"]
    assert [found for found in changed if found["field"] != "tp"] == [change]
    # Only the encoder's table says how its weights are divided; rows that stack several are the others' own.
    divided = {found["place"]: (found["a"], found["b"]) for found in changed if found["field"] == "tp"}
    assert divided["body: layers.{i}.mlp.Wi.weight"] == ("col:2", "")
    assert {there for _, there in divided.values()} == {""}
    code, out, _ = cli("table", "diff", DECODER, DECODER, "--json")
    assert (code, json.loads(out)["equal"]) == (0, True)


def test_diff_of_a_table_that_is_not_there(cli, tmp_path):
    code, _, err = cli("table", "diff", ENCODER, tmp_path / "none.toml")
    assert code == 2
    assert "no table `" in err


# --- doctor ---


def test_doctor_says_what_is_emulated(cli):
    code, out, _ = cli("doctor", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["problems"] == []
    assert document["paddle_kernels"]["matmul"]["float32"] is True
    assert document["versions"]["padiff"] == "0.2.0"
    assert cli("doctor")[1].count("emulated") >= 1


def test_doctor_reports_a_package_that_does_not_import(cli, monkeypatch):
    from modernbert_align.commands import doctor

    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no_such_package"))
    code, out, _ = cli("doctor")
    assert code == 4
    assert "no_such_package cannot be imported" in out
