"""`compare`: two reports, one trend, and files that are no reports."""

import json
from pathlib import Path

import pytest

from modernbert_align.report.comparison import Comparison

SCHEMA = Path(__file__).parents[2] / "docs" / "comparison.schema.json"


def row(document, probe="layers.2.mlp", dtype="bf16", mode="isolated"):
    return next(r for r in document["rows"] if (r["probe"], r["dtype"], r["mode"]) == (probe, dtype, mode))


def grown(document):
    """An error that still passes, three quarters of the most that rounding explains above what it was."""
    of = row(document)
    of["rel_l2"] += 0.75 * of["direct_limit"]


def failing(document):
    row(document).update(mean_abs=1.0, rel_l2=1.0)


def gone(document):
    document["rows"].remove(row(document))


def other_machine(document):
    document["environment"].update(cpu="another CPU", torch_threads=64)
    document["environment"]["versions"]["torch"] = "9.9"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda _: None, 0, "nothing to compare  tiny masked_lm bf16 forward, exit 0"),
        (grown, 1, "layers.2.mlp bf16  own pass"),
        (failing, 1, "layers.2.mlp bf16  own pass -> fail"),
        (gone, 5, "no longer compared: layers.2.mlp (bf16, isolated)"),
        (other_machine, 0, "changed: environment.versions.torch: "),
    ],
)
def test_exit_code_follows_what_changed(cli, tiny_report, variant, change, code, said):
    got, out, err = cli("compare", tiny_report, variant("new.json", change))
    assert (got, err.startswith("error")) == (code, False)
    assert said in out


@pytest.mark.parametrize(("change", "list_name"), [(failing, "improvements"), (gone, "added")])
def test_the_other_way_round_it_is_better(cli, tiny_report, variant, change, list_name):
    code, out, _ = cli("compare", variant("old.json", change), tiny_report, "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 0
    assert [r["probe"] for r in document[list_name] if r["mode"] == "isolated"] == ["layers.2.mlp"]


def test_status_written_in_a_file_counts_for_nothing(cli, tiny_report, variant):
    def lie(document):
        failing(document)
        row(document).update(status="pass", failed=[], direct_limit=100.0, null_ratio=0.0, noise_ratio=None)

    assert cli("compare", tiny_report, variant("new.json", lie))[0] == 1


def test_json_is_alone_on_stdout_and_follows_the_schema(cli, tiny_report, variant):
    _, out, _ = cli("compare", tiny_report, variant("new.json", grown), "--json")
    assert Comparison.model_validate_json(out).regressions[0].reasons == ("direct",)
    assert json.loads(out)["schema_version"] == 1


def test_committed_schema_is_the_one_of_the_command(cli):
    code, out, _ = cli("compare", "--schema")
    assert code == 0
    assert out == SCHEMA.read_text()


def test_reports_of_different_heads_are_refused(cli, tiny_report, variant):
    def other_phase(document):
        document["phase"] = "backward"
        for r in document["rows"]:
            r.update(phase="backward", loss="head")

    code, out, err = cli("compare", tiny_report, variant("new.json", other_phase))
    assert (code, out) == (2, "")
    assert "phase forward and backward" in err


def edited(text):
    return text.replace('"verdict": "PASS"', '"verdict": "FAIL"')


def no_report(_):
    return '{"a": 1}'


def older_schema(text):
    return text.replace('"schema_version": 4', '"schema_version": 2')


def cut(text):
    return text[: len(text) // 2]


def not_text(_):
    return "\x00\x01"


@pytest.mark.parametrize("change", [edited, no_report, older_schema, cut, not_text])
@pytest.mark.parametrize("side", ["old", "new"])
def test_file_that_is_no_untouched_report_is_one_line(cli, tiny_report, tmp_path, change, side):
    path = tmp_path / "hostile.json"
    text = tiny_report.read_text()
    assert change(text) != text
    path.write_text(change(text))
    code, out, err = cli("compare", *((path, tiny_report) if side == "old" else (tiny_report, path)))
    assert (code, out) == (2, "")
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_only_one_report_is_refused(cli, tiny_report):
    assert cli("compare", tiny_report)[0] == 2
    assert cli("compare", tiny_report, tiny_report, "--schema")[0] == 2
