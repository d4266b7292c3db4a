"""Every command that a page of this repository tells a user to type is run here, in the order of its page.

A command stands after `$ ` in a fence of kind `console`. It runs in a folder of its own for every page, with the
fixture `tiny` in place of `base` and of what the hub has, since only the size differs. What cannot be run here is
listed with the reason, and is then checked otherwise.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modernbert_align.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/**/*.md", "reports/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"^\w*\$ +")
# `base` takes minutes where `tiny` takes seconds; nothing else differs.
SMALLER = (
    (r"\bmodel=base\b", "model=tiny"),
    (r"--model base\b(?!-)", "--model tiny"),
    (r"\bdiff-base-", "diff-tiny-"),
    (r"checkpoints/base-paddle", "checkpoints/tiny-paddle"),
    (r"--to large\b", "--to path/to/wider"),
    (r"(-m examples\.\w+_classification) --seeds 3", r"\1 --seeds 2 --steps 2"),
    (
        r"-m examples\.pretrain_mlm(?! --recipe)",
        "-m examples.pretrain_mlm --recipe examples/pretrain_mlm/few-steps.toml",
    ),
)
HUB = ("answerdotai/ModernBERT-base", "answerdotai/ModernBERT-large")
EXIT_CODES = {"modernbert-align table diff modernbert modernbert-decoder": 1}  # they differ
NOT_RUN = {
    "pip": "installs; the installation is what these tests run in",
    "pre-commit": "its hooks are run by the tests of the workflows",
    "make": "calls the tests that call this; what its targets run is run, see below",
    "hyperfine": "a benchmark of minutes, by a program that need not be here",
    "/usr/bin/time": "the same",
}


def joined(text):
    """Lines that end in a backslash, and the next, as one."""
    return text.replace("\\\n", " ")


def commands(page):
    """The commands of a page, in order, without their comments."""
    found = []
    for kind, body in FENCE.findall(page.read_text()):
        if kind == "console":
            lines = joined(body).splitlines()
            found += [PROMPT.sub("", line).partition("  #")[0].strip() for line in lines if PROMPT.match(line)]
    return found


@pytest.fixture(scope="module")
def hub(fixture_folder, tmp_path_factory):
    """A hub cache in which `tiny` goes by the names of the published checkpoints."""
    cache = tmp_path_factory.mktemp("hub")
    commit = "8949b909ec900327062f0ebf497f51aef5e6f0c8"
    for name in HUB:
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        shutil.copytree(fixture_folder("tiny"), folder / "snapshots" / commit)
    return cache


@pytest.fixture
def sandbox(tmp_path, monkeypatch, hub, fixture_folder, converted):
    """A folder with what the pages speak of."""
    from huggingface_hub import constants

    from modernbert_align.engines import faults

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in ("CONVERT", "DIFF", "TRACE"):
        monkeypatch.setenv(f"MODERNBERT_ALIGN_{command}_MODEL", "tiny")
    # Three of the bugs: that all are found is what the tests of selftest are for.
    few = dict(list(faults.catalogue().items())[:3])
    monkeypatch.setattr(faults, "catalogue", lambda: few)
    monkeypatch.setenv("MODERNBERT_ALIGN_SELFTEST_SEEDS", "0")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "hf-folder").symlink_to(fixture_folder("tiny"))
    (tmp_path / "path" / "to" / "paddle-folder").symlink_to(converted("tiny"))
    wider = json.loads((fixture_folder("tiny") / "config.json").read_text()) | {"hidden_size": 96}
    wider |= {"num_attention_heads": 6, "num_hidden_layers": 5, "layer_types": None}
    (tmp_path / "path" / "to" / "wider").mkdir()
    (tmp_path / "path" / "to" / "wider" / "config.json").write_text(json.dumps(wider))
    for name in ("benchmarks", "configs", "constraints", "docs", "examples", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(line):
    """Run one command; gives its exit code."""
    for pattern, smaller in SMALLER:
        line = re.sub(pattern, smaller, line)
    words = shlex.split(line, comments=True)
    if words[0] in NOT_RUN or words[0].rpartition("/")[2] in NOT_RUN:
        return check_otherwise(words)
    if words[0].rpartition("/")[2] == "modernbert-align" and not {"|", ">", "&&", "||", ";"} & set(words):
        return main(
            [name for word in words[1:] for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
        )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    if len(words) > 1 and words[1].startswith("benchmarks/"):
        line += " --model tiny" + (" --runs 1" if words[1].endswith("bench_convert.py") else "")
    line = line.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    return subprocess.run(["bash", "-c", line], env=environment, stdout=subprocess.DEVNULL, check=False).returncode


def check_otherwise(words):
    """Of what is not run: whether a target exists, or a file that is named."""
    if words[0] == "make":
        arguments = ["make", "--dry-run", *words[1:]]
        return subprocess.run(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    if "-c" in words:
        return 0 if (ROOT / words[words.index("-c") + 1]).is_file() else 1
    return 0


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, sandbox, capsys, monkeypatch):
    if page.is_relative_to(ROOT / "examples"):  # has a project file, which says what is compared
        monkeypatch.delenv("MODERNBERT_ALIGN_DIFF_MODEL")
        shutil.copytree(page.parent, sandbox, dirs_exist_ok=True)
    for line in commands(page):
        code = run(line)
        said = capsys.readouterr()
        assert code == EXIT_CODES.get(line, 0), f"{line}\n{said.out[-2000:]}\n{said.err[-2000:]}"


@pytest.mark.parametrize("target", ["align", "align-hub"])
def test_what_make_runs_for_a_user_runs(target, sandbox, capsys):
    shown = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in joined(shown).splitlines() if line.startswith(".venv/bin/modernbert-align")]
    assert len(lines) == shown.count(".venv/bin/modernbert-align")
    assert lines
    for line in lines:
        code = run(line)
        said = capsys.readouterr()
        assert code == 0, f"{line}\n{said.out[-2000:]}\n{said.err[-2000:]}"


def test_no_command_stands_where_it_would_not_be_run():
    """Only `console` fences are run, so a command for users may not stand in any other kind, nor be indented."""
    for page in PAGES:
        text = page.read_text()
        outside = FENCE.sub(lambda fence: "" if fence[1] == "console" else fence[2], text)
        strays = [line for line in outside.splitlines() if re.match(r"^(\s{4,}|\$ )(modernbert-align|make) ", line)]
        assert strays == [], page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_within_sentences_have_options_that_exist(page):
    """`modernbert-align VERB --option ...` in running text is held against the command line's own help."""
    import typer

    from modernbert_align.cli import app

    root = typer.main.get_command(app)
    for line in re.findall(r"`modernbert-align ([^`\n]*)`", page.read_text()):
        words = line.split()
        command = root
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        known = {name for parameter in (*command.params, *root.params) for name in parameter.opts} | {"--help"}
        assert command is not root or words[0].startswith("-"), f"{page.name}: {line}"
        assert [word for word in words if word.startswith("--") and word.partition("=")[0] not in known] == [], line


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_reason_for_not_running_something_is_still_needed():
    words = {line.split()[0].rpartition("/")[2] for page in PAGES for line in commands(page)}
    assert {name.rpartition("/")[2] for name in NOT_RUN} - words == set()
