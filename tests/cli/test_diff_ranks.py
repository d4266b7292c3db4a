"""`diff --tensor-parallel`: several processes go through the gate of one, and none is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DIFF = ("diff", "--model", "tiny-sensitive", "--tensor-parallel", "2")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two ranks, both precisions; not to be changed."""
    from modernbert_align.cli import main

    folder = tmp_path_factory.mktemp("ranks")
    assert main([*DIFF, "--dtype", "bf16", "--report-dir", str(folder)]) == 0
    return folder / "diff-tiny-sensitive-masked_lm-bf16-tp2.json"


def changed(report, folder, change):
    from modernbert_align.report.schema import Report

    document = json.loads(report.read_text())
    change(document)
    path = folder / "changed.json"
    path.write_text(Report.model_validate(document).sealed().model_dump_json())
    return path


def test_two_ranks_meet_the_contract_in_both_precisions(report):
    found = json.loads(report.read_text())
    assert found["verdict"] == "PASS"
    assert found["tensor_parallel"] == 2
    assert {row["dtype"] for row in found["rows"]} == {"fp32", "bf16"}
    assert [check["compared"] for check in found["ranks"]] == [check["expected"] for check in found["ranks"]]
    assert {(check["dtype"], check["what"]) for check in found["ranks"]} == {
        (dtype, what) for dtype in ("fp32", "bf16") for what in ("weights", "values", "randomness")
    }


def test_gate_takes_one_number_of_ranks_for_itself_only(cli, report):
    code, out, _ = cli("gate", report)
    assert code == 0
    assert "forward on 2 ranks" in out
    assert cli("gate", report, "--require", "model=tiny-sensitive,dtype=bf16,tensor_parallel=2")[0] == 0
    for other in ("", ",tensor_parallel=1", ",tensor_parallel=4"):
        assert cli("gate", report, "--require", f"model=tiny-sensitive,dtype=bf16{other}")[0] == 5
    assert cli("gate", report, "--require", "model=tiny-sensitive,dtype=bf16,tensor_parallel=two")[0] == 2


def test_gate_judges_what_ranks_showed_anew(cli, report, tmp_path):
    def without(document):
        document["ranks"] = document["ranks"][1:]

    def fewer(document):
        document["ranks"][1]["expected"] = document["ranks"][1]["compared"] = 3

    def disagreeing(document):
        document["ranks"][1]["wrong"] = ["layers.1"]

    def one_process(document):
        document["tensor_parallel"], document["ranks"] = 1, []

    assert cli("gate", changed(report, tmp_path, without))[0] == 5
    assert cli("gate", changed(report, tmp_path, fewer))[0] == 5
    assert cli("gate", changed(report, tmp_path, disagreeing))[0] == 1
    path = changed(report, tmp_path, one_process)
    assert cli("gate", path, "--require", "model=tiny-sensitive,dtype=bf16,tensor_parallel=2")[0] == 5


@pytest.mark.parametrize("phase", ["backward", "step"])
def test_gradients_and_steps_of_two_ranks_meet_the_contract(cli, tmp_path, phase):
    code, out, err = cli(*DIFF, "--phase", phase, "--json", "--report-dir", tmp_path)
    assert code == 0, err
    found = json.loads(out)
    assert (found["phase"], found["verdict"]) == (phase, "PASS")
    values = next(check for check in found["ranks"] if check["what"] == "values")
    assert values["compared"] == len(found["rows"])


def test_packed_rows_on_four_ranks_meet_the_contract(cli, tmp_path):
    code, out, err = cli(
        "diff",
        "--model",
        "tiny",
        "--tensor-parallel",
        "4",
        "--attention",
        "blockwise",
        "--json",
        "--report-dir",
        tmp_path,
    )
    assert code == 0, err
    assert json.loads(out)["tensor_parallel"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tensor-parallel", "3"), "4 attention heads cannot be divided among 3 ranks"),
        (("--tensor-parallel", "0"), "--tensor-parallel is 0"),
        (("--tensor-parallel", "1000"), "--tensor-parallel is 1000"),
        (("--tensor-parallel", "2", "--engine", "padiff"), "padiff cannot look into several processes"),
        (("--rank-timeout", "5"), "--rank-timeout is for --tensor-parallel"),
        (("--tensor-parallel", "2", "--rank-timeout", "0"), "--rank-timeout is 0"),
        (("--tensor-parallel", "2", "--rank-timeout", "nan"), "--rank-timeout is nan"),
    ],
)
def test_what_cannot_be_divided_is_refused(cli, tmp_path, arguments, words):
    code, _, err = cli("diff", "--model", "tiny", "--report-dir", tmp_path, *arguments)
    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ranks_of(pid):
    return [child for child in _children(pid) if b"rank_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_that_ends_or_stops_ends_the_command_and_leaves_no_process(tmp_path, sent):
    command = [
        sys.executable,
        "-m",
        "modernbert_align.cli",
        *DIFF,
        "--rank-timeout",
        "20",
        "--report-dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(found := _ranks_of(process.pid)) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(found[1], sent)
        started = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert time.monotonic() - started < 60
    assert process.returncode == 5
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert ("rank 1 of 2 was ended by SIGKILL" if sent == signal.SIGKILL else "no answer to `load`") in line
    assert "PASS" not in out
    assert not list(tmp_path.glob("*.json"))
    assert not any(Path(f"/proc/{rank}").exists() for rank in found)
