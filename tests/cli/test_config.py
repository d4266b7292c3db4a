"""Defaults: command line before environment before project file before what is built in."""

import json

import pytest

MODEL = "MODERNBERT_ALIGN_TABLE_SHOW_MODEL"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to be in, with a project file."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "modernbert-align.toml").write_text(text)

    return write


def options(cli, *arguments):
    code, out, _ = cli(*arguments, "config", "show", "--json")
    assert code == 0
    document = json.loads(out)
    return {(row["command"], row["option"]): row for row in document["options"]}, document


def layers(cli, *arguments):
    """How many layers the shown model has: tiny 4, base 22, large 28."""
    code, out, _ = cli("table", "show", "--json", *arguments)
    assert code == 0
    return max(int(row["hf"].split(".")[2]) for row in json.loads(out)["rows"] if ".layers." in row["hf"]) + 1


def test_command_line_environment_project_file_default(cli, project, monkeypatch):
    assert layers(cli) == 22
    project('[table.show]\nmodel = "tiny"\n')
    assert layers(cli) == 4
    monkeypatch.setenv(MODEL, "large")
    assert layers(cli) == 28
    assert layers(cli, "--model", "base") == 22


def test_show_says_where_every_value_comes_from(cli, project, monkeypatch):
    project('[diff]\nmodel = "tiny"\ndtype = "bf16"\n')
    monkeypatch.setenv("MODERNBERT_ALIGN_DIFF_DTYPE", "fp32")
    found, document = options(cli)
    assert document["project_file"].endswith("modernbert-align.toml")
    assert (found["diff", "model"]["value"], found["diff", "model"]["origin"]) == ("tiny", "modernbert-align.toml")
    assert found["diff", "dtype"] == {
        "command": "diff",
        "option": "dtype",
        "value": "fp32",
        "origin": "MODERNBERT_ALIGN_DIFF_DTYPE",
    }
    assert (found["diff", "phase"]["value"], found["diff", "phase"]["origin"]) == ("forward", "default")
    code, out, _ = cli("config", "show")
    assert code == 0
    assert any(
        "diff --model" in line and "tiny" in line and "modernbert-align.toml" in line for line in out.splitlines()
    )


def test_lists_and_paths_are_shown(cli, project, tmp_path):
    project('[gate]\nrequire=["model=a,dtype=fp32", "model=b,dtype=fp32"]\nbaseline=["b"]\n')
    found, _ = options(cli)
    assert found["gate", "baseline"]["value"] == [str(tmp_path / "b")]
    assert "model=a,dtype=fp32, model=b,dtype=fp32" in " ".join(cli("config", "show")[1].split())


def test_no_config_reads_no_project_file_and_config_names_one(cli, project, tmp_path):
    project("[wrong]\n")
    assert options(cli, "--no-config")[1]["project_file"] is None
    other = tmp_path / "other.toml"
    other.write_text('[diff]\nmodel = "tiny"\n')
    assert options(cli, "--config", other)[0]["diff", "model"]["value"] == "tiny"
    code, _, err = cli("--config", other, "--no-config", "config", "show")
    assert (code, err.splitlines()[0]) == (2, "error: --config names a project file and --no-config reads none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gate]\nrequired = 'x'\n", "did you mean `require`?"),
        ("[gat]\n", "did you mean `gate`?"),
        ("=", "not valid TOML"),
    ],
)
def test_a_wrong_project_file_stops_every_command_with_one_line(cli, project, text, said):
    project(text)
    code, out, err = cli("table", "show")
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_named_file_that_is_absent_is_an_error(cli, tmp_path):
    code, _, err = cli("--config", tmp_path / "none.toml", "config", "show")
    assert code == 2
    assert "cannot read the project file" in err


def test_a_misspelt_variable_is_an_error(cli, monkeypatch):
    monkeypatch.setenv("MODERNBERT_ALIGN_DIFF_DTYP", "bf16")
    code, _, err = cli("config", "show")
    assert code == 2
    assert "did you mean `MODERNBERT_ALIGN_DIFF_DTYPE`?" in err


def test_own_limits_are_shown_with_their_reason(cli, project):
    project('[[tolerance]]\nprobe="logits"\ndtype="fp32"\ncriterion="direct"\nlimit=3\nreason="why [not]"\n')
    assert "because why [not]" in cli("config", "show")[1]
    assert options(cli)[1]["tolerance"][0]["limit"] == 3.0


def test_the_judging_project_sets_its_limits_and_a_report_does_not(cli, project, tmp_path):
    project(
        '[diff]\nmodel="tiny"\n'
        '[[tolerance]]\nprobe="logits"\ndtype="fp32"\ncriterion="noise"\nlimit=1e-6\nreason="strict"\n'
    )
    code, out, err = cli("diff", "--quiet")
    assert (code, err) == (1, "")
    assert out.splitlines()[0].startswith("FAIL  tiny masked_lm fp32 forward")
    path = tmp_path / "reports" / "diff-tiny-masked_lm-fp32.json"
    (limit,) = json.loads(path.read_text())["overrides"]
    assert (limit["rows"], limit["reason"]) == (2, "strict")
    code, out, _ = cli("gate", path)
    assert code == 1
    assert "own limit: logits (fp32, both modes): noise at most 1e-06, 2 rows: strict" in out
    assert cli("--no-config", "gate", path)[0] == 0


def test_verbose_says_how_long_everything_took(cli, project):
    project("")
    code, out, err = cli("diff", "--model", "tiny", "-v")
    assert code == 0
    assert any(line.rstrip().endswith("accumulated") and " s " in line for line in out.splitlines())
    assert all(line.startswith("[") and " s] " in line for line in err.splitlines() if "importing" in line)


def test_defaults_for_live_comparisons_do_not_contradict_traces(cli, project, tmp_path, monkeypatch):
    project('[diff]\nmodel="base"\nhead="masked_lm"\ndtype="bf16"\nengine="stream"\n')
    for backend in ("hf", "paddle"):
        assert cli("trace", "--backend", backend, "--model", "tiny", "--out", f"{backend}.trace")[0] == 0
    traces = ("--reference", "hf.trace", "--candidate", "paddle.trace")
    assert cli("diff", *traces)[0] == 0
    code, _, err = cli("diff", *traces, "--model", "base")
    assert (code, err.splitlines()[0]) == (2, "error: --model cannot be chosen for traces")
