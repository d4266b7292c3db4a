"""Baselines: only `baseline update` writes them, `gate --baseline` holds reports against them."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modernbert_align.commands.baseline import _machine_paths
from modernbert_align.core.files import write_together
from modernbert_align.errors import UsageError
from modernbert_align.report.baselines import file_name, key_of
from modernbert_align.report.json_report import read_report

NAME = "diff-tiny-masked_lm-bf16.json"
ROOT = Path(__file__).parents[2]


def row(document, probe="layers.2.mlp"):
    return next(r for r in document["rows"] if (r["probe"], r["dtype"], r["mode"]) == (probe, "bf16", "isolated"))


def grown(document):
    of = row(document)
    of["rel_l2"] += 0.75 * of["direct_limit"]


def failing(document):
    row(document).update(mean_abs=1.0, rel_l2=1.0)


def gone(document):
    document["rows"].remove(row(document))


def fp32_only(document):
    document["dtype"] = "fp32"
    document["rows"] = [r for r in document["rows"] if r["dtype"] == "fp32"]
    document["weights"] = document["weights"][:1]


@pytest.fixture
def folder(cli, tiny_report, tmp_path):
    """A baseline folder that holds the report of tiny."""
    path = tmp_path / "baseline"
    assert cli("baseline", "update", tiny_report, "--baseline-dir", path)[0] == 0
    return path


# --- gate --baseline ---


def test_report_as_good_as_its_baseline_passes(cli, folder, variant):
    def later(document):
        document["created"] = "2099-01-01T00:00:00+00:00"

    code, out, _ = cli("gate", variant("new.json", later), "--baseline", folder)
    assert code == 0
    assert "nothing worse" in out
    assert "104 rows in both, 104 equal to the last bit" in out


@pytest.mark.parametrize(("change", "code"), [(grown, 1), (failing, 1), (gone, 5)])
def test_report_worse_than_its_baseline_does_not_pass(cli, folder, variant, change, code):
    report = variant("new.json", change)
    assert cli("gate", report, "--baseline", folder)[0] == code
    assert cli("gate", report)[0] == (0 if change is grown else code)


def test_report_without_a_baseline_is_said_and_passes(cli, folder, tiny_report, variant):
    report = variant("new.json", fp32_only)
    code, out, _ = cli("gate", tiny_report, report, "--baseline", folder)
    assert code == 0
    assert f"no baseline  tiny masked_lm fp32 forward  {report}" in out
    document = json.loads(cli("gate", tiny_report, report, "--baseline", folder, "--json")[1])
    assert document["without_baseline"] == [str(report)]


def test_baseline_without_a_report_exits_5(cli, folder, variant):
    report = variant("new.json", fp32_only)
    code, out, _ = cli("gate", report, "--baseline", folder)
    assert code == 5
    assert "NOT_COMPARED tiny masked_lm bf16 forward: no report for the baseline" in out
    document = json.loads(cli("gate", report, "--baseline", folder, "--json")[1])
    assert [(b["report"], b["exit_code"], b["comparison"]) for b in document["baselines"]] == [(None, 5, None)]


def test_json_keeps_its_keys_and_adds_the_comparison(cli, folder, variant):
    document = json.loads(cli("gate", variant("new.json", grown), "--baseline", folder, "--json")[1])
    assert list(document) == ["exit_code", "unmet", "reports", "baselines", "without_baseline"]
    baseline = document["baselines"][0]
    assert (baseline["model"], baseline["dtype"], baseline["exit_code"]) == ("tiny", "bf16", 1)
    assert [r["probe"] for r in baseline["comparison"]["regressions"]] == ["layers.2.mlp"]


def test_gate_without_baselines_compares_with_none(cli, tiny_report):
    document = json.loads(cli("gate", tiny_report, "--json")[1])
    assert (document["baselines"], document["without_baseline"]) == ([], [])


def test_two_baselines_of_the_same_comparison_are_refused(cli, folder, tiny_report):
    (folder / "again.json").write_text(tiny_report.read_text())
    code, _, err = cli("gate", tiny_report, "--baseline", folder)
    assert code == 2
    assert "are both baselines of tiny masked_lm bf16 forward" in err


@pytest.mark.parametrize("place", ["none", "none/*.json", "none.json", "."])
def test_baseline_that_is_not_there_is_refused(cli, tiny_report, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("gate", tiny_report, "--baseline", place)
    assert code == 2
    assert err.startswith("error: ")


def test_edited_baseline_is_refused(cli, folder, tiny_report):
    text = (folder / NAME).read_text()
    (folder / NAME).write_text(text.replace('"verdict":"PASS"', '"verdict":"FAIL"'))
    code, _, err = cli("gate", tiny_report, "--baseline", folder)
    assert code == 2
    assert "changed after it was written" in err


def shell(command, where):
    """Run a command line of the real program through a real shell."""
    program = f"{shlex.quote(sys.executable)} -m modernbert_align"
    return subprocess.run(
        ["/bin/sh", "-c", command.replace("modernbert-align", program)],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        "modernbert-align gate reports/*.json --baseline reports/baseline/*.json",
        "modernbert-align gate reports/*.json --baseline reports/baseline/*.json --require model=tiny,dtype=bf16",
        "modernbert-align gate --baseline reports/baseline/*.json -- reports/*.json",
        "modernbert-align gate --baseline reports/baseline/*.json --policy contract reports/*.json",
        "modernbert-align gate reports/*.json --baseline 'reports/baseline/*.json'",
        "modernbert-align gate reports/*.json --baseline=reports/baseline",
        f"modernbert-align gate reports/*.json --baseline reports/baseline/{NAME} --baseline reports/baseline/*32.json",
    ],
)
def test_pattern_that_the_shell_expands_names_baselines_only(cli, variant, tmp_path, command):
    reports = [variant(f"reports/{NAME}"), variant("reports/diff-tiny-masked_lm-fp32.json", fp32_only)]
    assert cli("baseline", "update", *reports, "--baseline-dir", tmp_path / "reports" / "baseline")[0] == 0
    result = shell(command.replace(" gate ", " gate --json "), tmp_path)
    assert result.stderr == ""
    assert result.returncode == 0
    document = json.loads(result.stdout)
    assert [r["path"] for r in document["reports"]] == [f"reports/{path.name}" for path in reports]
    assert [b["report"] for b in document["baselines"]] == [f"reports/{path.name}" for path in reports]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--baseline", "folder", "report"], "there is no report to judge"),
        (["report", "--baseline"], "requires an argument"),
        (["report", "--baseline", "--json"], "--json"),
    ],
)
def test_baseline_option_that_takes_too_much_or_nothing_is_refused(cli, folder, tiny_report, arguments, said):
    known = {"folder": folder, "report": tiny_report}
    code, out, err = cli("gate", *(known.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert said in err


# --- baseline update ---


def test_baseline_is_the_report_itself_in_compact_lines(folder, tiny_report):
    text = (folder / NAME).read_text()
    assert read_report(folder / NAME) == read_report(tiny_report)
    assert len(text) < 100_000
    assert sum(line.startswith('{"probe"') for line in text.splitlines()) == 104


@pytest.mark.parametrize(("change", "code"), [(failing, 1), (gone, 5)])
def test_report_that_does_not_pass_is_refused_and_with_it_every_other(cli, variant, tmp_path, change, code):
    bad, good = variant("bad.json", change), variant("good.json", fp32_only)
    folder = tmp_path / "none"
    got, out, _ = cli("baseline", "update", good, bad, "--baseline-dir", folder)
    assert got == code
    assert "nothing was written" in out
    assert not folder.exists()
    document = json.loads(cli("baseline", "update", good, bad, "--baseline-dir", folder, "--json")[1])
    assert (document["exit_code"], document["written"]) == (code, False)


def test_update_shows_what_changes_and_replaces_the_baseline(cli, folder, variant):
    code, out, _ = cli("baseline", "update", variant("new.json", grown), "--baseline-dir", folder)
    assert code == 0
    assert "1 worse" in out
    assert row(json.loads((folder / NAME).read_text()))["rel_l2"] > row_of(folder)["direct_limit"] / 2


def row_of(folder):
    return row(json.loads((folder / NAME).read_text()))


def test_update_json_holds_the_comparison(cli, folder, variant):
    code, out, _ = cli("baseline", "update", variant("new.json", grown), "--baseline-dir", folder, "--json")
    document = json.loads(out)
    assert (code, document["written"]) == (0, True)
    assert document["reports"][0]["comparison"]["exit_code"] == 1


def test_unreadable_baseline_is_said_and_replaced(cli, folder, tiny_report):
    (folder / NAME).write_text("{}")
    code, out, _ = cli("baseline", "update", tiny_report, "--baseline-dir", folder)
    assert code == 0
    assert "the present baseline cannot be compared with" in out
    assert read_report(folder / NAME) == read_report(tiny_report)


def test_two_reports_of_the_same_comparison_are_refused(cli, tiny_report, variant, tmp_path):
    assert cli("baseline", "update", tiny_report, variant("b.json"), "--baseline-dir", tmp_path / "x")[0] == 2
    assert not (tmp_path / "x").exists()


def test_baseline_under_another_name_is_not_doubled(cli, folder, tiny_report):
    (folder / NAME).rename(folder / "mine.json")
    code, _, err = cli("baseline", "update", tiny_report, "--baseline-dir", folder)
    assert code == 2
    assert "mine.json" in err
    assert [path.name for path in folder.iterdir()] == ["mine.json"]


def test_path_of_this_machine_is_pointed_out(cli, variant, tmp_path):
    def with_path(document):
        document["command"] = "modernbert-align diff --report-dir=/home/me/reports"

    _, _, err = cli("baseline", "update", variant("new.json", with_path), "--baseline-dir", tmp_path / "b")
    assert "command holds a path of this machine: /home/me/reports" in err


def test_name_in_a_report_cannot_lead_out_of_the_folder(tiny_report):
    report = read_report(tiny_report)
    hostile = report.model_copy(update={"model": report.model.model_copy(update={"name": "../../x/.."})})
    name = file_name(key_of(hostile))
    assert "/" not in name
    assert name.startswith("diff-")


def test_different_comparisons_have_different_files(tiny_report):
    key = key_of(read_report(tiny_report))
    runs = [("step", 3, "eager", 1), ("step", 4, "eager", 1), ("backward", None, "eager", 1)]
    runs += [("forward", None, "blockwise", 1), ("forward", None, "eager", 2), ("forward", None, "eager", 4)]
    others = [*[(*key[:3], *run) for run in runs], ("a/b", *key[1:]), ("a%2Fb", *key[1:]), key]
    assert len({file_name(other) for other in others}) == len(others)


# --- all or nothing ---


def test_files_that_were_written_before_an_interruption_are_taken_back(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    replace, calls = Path.replace, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path, {"a": "new", "b": "new", "c": "new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        write_together(tmp_path / "file" / "folder", {"a": "new"})


def test_updates_at_the_same_time_lose_nothing(variant, tmp_path):
    reports = [variant("a.json"), variant("b.json", fp32_only)]
    command = [sys.executable, "-m", "modernbert_align", "baseline", "update", "--baseline-dir", "both"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([*command, path.name], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        for path in (*reports, *reports)
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [NAME, "diff-tiny-masked_lm-fp32.json"]
    for path in (tmp_path / "both").iterdir():
        assert read_report(path).verdict == "PASS"


# --- baseline show ---


def test_show_lists_every_baseline(cli, folder):
    code, out, _ = cli("baseline", "show", "--baseline-dir", folder)
    assert code == 0
    assert "PASS         tiny masked_lm bf16 forward: 104 rows" in out
    assert "1 baselines in" in out
    document = json.loads(cli("baseline", "show", "--baseline-dir", folder, "--json")[1])
    assert [(b["model"], b["verdict"], b["rows"]) for b in document["baselines"]] == [("tiny", "PASS", 104)]


def test_show_names_what_it_cannot_read(cli, folder):
    (folder / "other.json").write_text("{}")
    code, out, _ = cli("baseline", "show", "--baseline-dir", folder)
    assert code == 2
    assert "unreadable" in out
    assert "PASS" in out


def test_show_fails_for_a_baseline_that_no_longer_passes(cli, folder, tmp_path, monkeypatch):
    own = '[[tolerance]]\nprobe="logits"\ndtype="fp32"\ncriterion="noise"\nlimit=1e-6\nreason="stricter"\n'
    (tmp_path / "modernbert-align.toml").write_text(own)
    assert cli("baseline", "show", "--baseline-dir", folder)[0] == 0
    code, out, _ = cli("--config", tmp_path / "modernbert-align.toml", "baseline", "show", "--baseline-dir", folder)
    assert code == 1
    assert "FAIL" in out


def test_show_of_no_folder_is_refused(cli, tmp_path):
    assert cli("baseline", "show", "--baseline-dir", tmp_path / "none")[0] == 2


def test_committed_baselines_are_readable_and_pass(cli):
    code, out, _ = cli("baseline", "show", "--baseline-dir", ROOT / "reports" / "baseline", "--json")
    assert code == 0, f"make them again as docs/baselines.md says: {out}"
    assert [(b["model"], b["verdict"]) for b in json.loads(out)["baselines"]] == [("tiny-sensitive", "PASS")]


def test_committed_baselines_hold_no_path_of_a_machine():
    for path in (ROOT / "reports" / "baseline").glob("*.json"):
        assert _machine_paths(read_report(path)) == []


def test_make_clean_keeps_baselines(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "reports" / "baseline").mkdir(parents=True)
    kept, removed = tmp_path / "reports" / "baseline" / NAME, tmp_path / "reports" / NAME
    for path in (kept, removed):
        path.write_text("{}")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert (kept.exists(), removed.exists()) == (True, False)


def test_show_of_an_empty_folder_is_not_green(cli, tmp_path):
    assert cli("baseline", "show", "--baseline-dir", tmp_path)[0] == 5


def test_show_refuses_two_of_one_comparison(cli, folder):
    (path,) = folder.glob("*.json")
    (folder / "again.json").write_bytes(path.read_bytes())
    code, out, _ = cli("baseline", "show", "--baseline-dir", folder)
    assert code == 2
    assert "twice        tiny masked_lm bf16 forward" in out
