"""`table show`, `table lint` and `doctor`."""

import json

import pytest

from modernbert_align.commands import table as table_command
from modernbert_align.core import table as table_module
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.core.table import parse_table


def test_show_lists_every_weight(cli):
    code, out, _ = cli("table", "show", "--model", "tiny", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert len(rows) == 30
    assert {r["hf"] for r in rows if r["shape_blind"]} == {
        *(f"model.layers.{i}.attn.Wo.weight" for i in range(4)),
        "head.dense.weight",
    }


def test_show_needs_no_weights_of_a_fixture(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, _ = cli("table", "show", "--model", "large", "--head", "base")
    assert code == 0
    assert "layers.27.mlp.Wo.weight" in out
    assert list(tmp_path.iterdir()) == []


def test_lint_finds_the_table_in_order(cli):
    code, out, err = cli("table", "lint", "--model", "tiny")
    assert code == 0, out + err
    assert "0 problems" in out


def missing_row(rows):
    rows["body"] = [r for r in rows["body"] if r["hf"] != "final_norm.weight"]


def invented_row(rows):
    rows["body"].append({**rows["body"][1], "hf": "embeddings.norm.scale", "paddle": "embeddings.norm.scale"})


def untransposed_square(rows):
    next(r for r in rows["body"] if r["hf"] == "layers.{i}.attn.Wo.weight")["op"] = "id"


def transposed_embedding(rows):
    rows["body"][0]["op"] = "T"


def wrong_shape(rows):
    next(r for r in rows["body"] if r["hf"] == "layers.{i}.mlp.Wi.weight")["shape"] = "I H"


def wrong_kind(rows):
    next(r for r in rows["body"] if r["hf"] == "final_norm.weight")["kind"] = "linear"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_row, "no row for hf `final_norm.weight`"),
        (invented_row, "`embeddings.norm.scale` has no weight"),
        (untransposed_square, "needs the op T"),
        (transposed_embedding, "the op T on a embedding"),
        (wrong_shape, "mlp.Wi.weight`: hf shape"),
        (wrong_kind, "of kind linear"),
    ],
)
def test_lint_catches_a_wrong_table(cli, monkeypatch, damage, words):
    raw, digest = read_toml(configs_dir() / "tables" / "modernbert.toml")
    damage(raw["rows"])
    wrong = parse_table(raw, digest, where="wrong.toml")
    monkeypatch.setattr(table_command, "load_table", lambda: wrong)
    assert table_module.load_table().digest == digest
    code, out, _ = cli("table", "lint", "--model", "tiny")
    assert code == 1
    assert words in out


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
