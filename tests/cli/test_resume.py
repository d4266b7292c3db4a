"""`convert` when its process is killed, at moments nobody chose, with files large enough to be hit in the middle."""

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from modernbert_align.core.model_config import parse_config
from modernbert_align.core.partial import JOURNAL, MANIFEST, partial_path
from modernbert_align.core.table import load_table
from modernbert_align.core.verify import verify

CONFIG = {
    "architectures": ["ModernBertForMaskedLM"],
    "hidden_size": 512,
    "intermediate_size": 768,
    "model_type": "modernbert",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "vocab_size": 4000,
}
# A shard is recorded when it is whole; of one large file every 256 MB are, here every 4 MB.
OPTIONS = (("--shard-size", "6MB"), ("--digest", "crc32"))
SYNCED_OFTEN = """
import sys
from modernbert_align.cli import main
from modernbert_align.core import writer
writer._SYNC_BYTES = 4 << 20
sys.exit(main())
"""
MOMENTS = 20


@dataclass(frozen=True)
class Reference:
    """What a conversion gives that nobody kills.

    Attributes:
        seconds: From the journal to OUT.
    """

    options: tuple[str, ...]
    content: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of some 60 MB."""
    folder = tmp_path_factory.mktemp("killed") / "source"
    folder.mkdir()
    random_bits = np.random.default_rng(0)
    arrays = {
        entry.hf: random_bits.standard_normal(entry.hf_shape, dtype=np.float32)
        for entry in load_table().expand(parse_config(CONFIG), "masked_lm")
        if entry.op.stored
    }
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder


def arguments(source: Path, out: Path, *options: str) -> list[str]:
    return ["convert", "--src", "hf", "--dst", "paddle", "--model", str(source), "--out", str(out), *options]


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    program = ["-m", "modernbert_align.cli"] if "--shard-size" in options else ["-c", SYNCED_OFTEN]
    command = [sys.executable, *program, *arguments(source, out, *options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], out: Path, file: str = "") -> float:
    """The time at which OUT is there, or a file in OUT.partial, or the process has ended."""
    while process.poll() is None and not out.exists():
        if file and any(partial_path(out).glob(file)):
            break
        time.sleep(0.001)
    return time.monotonic()


def content(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest all but the command line."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files[MANIFEST])
    del manifest["command"]
    files[MANIFEST] = json.dumps(manifest).encode()
    return files


@pytest.fixture(scope="module")
def references(source):
    """What each set of options gives, by a process of its own."""
    found = []
    for number, options in enumerate(OPTIONS):
        out = source.parent / f"reference-{number}"
        process = start(source, out, *options)
        began = wait_for(process, out, JOURNAL)
        ended = wait_for(process, out)
        _, err = process.communicate()
        assert process.returncode == 0, err
        found.append(Reference(options, content(out), ended - began))
    return found


def traces(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes about a file that is written or replaced."""
    return {p.name: (p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir()}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_conversion_killed_at_any_moment_is_finished_by_resume(source, references, cli):
    chosen = random.Random(20)
    before, whole_before = traces(source), digests(source)
    hit = recorded = 0
    for number in range(MOMENTS):
        reference = references[number % len(references)]
        out = source.parent / f"out-{number}"
        process = start(source, out, *reference.options)
        wait_for(process, out, JOURNAL)
        time.sleep(chosen.uniform(0, reference.seconds))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err

        # Whatever the moment, nothing is there that is not what it says.
        partial = partial_path(out)
        if out.exists():
            assert verify(out, load_table(), source=source).problems == []
            assert not partial.exists()
        elif partial.exists():
            hit += 1
            assert (partial / JOURNAL).is_file() or list(partial.iterdir()) == []
        assert traces(source) == before

        code, text, err = cli(*arguments(source, out, *reference.options, "--resume"))
        assert code == 0, err
        done = re.search(r"continuing the conversion in .*: (\d+) tensors are done", err)
        recorded += int(done[1]) if done else 0
        assert content(out) == reference.content
        assert not partial.exists()

        if number < len(references):  # there is nothing to resume, and that is fine
            made = traces(out)
            code, text, _ = cli(*arguments(source, out, *reference.options, "--resume"))
            assert (code, "is up to date" in text) == (0, True)
            assert traces(out) == made
        shutil.rmtree(out)
    assert digests(source) == whole_before
    # The moments were moments of writing, and what was written before them was used.
    assert hit > 0
    assert recorded > 0


@pytest.mark.parametrize(
    ("options", "head_start"), [((), False), ((), True), (("--resume",), False), (("--force",), True)]
)
def test_two_processes_at_once_do_not_damage_each_other(source, references, options, head_start):
    """One of them converts; the other is refused in one line, or finds the work done, or does it again."""
    reference = references[0]
    out = source.parent / "out-both"
    first = start(source, out, *reference.options, *options)
    if head_start:
        wait_for(first, out, JOURNAL)
    second = start(source, out, *reference.options, *options)
    outputs = [(process.communicate(), process.returncode) for process in (first, second)]
    codes = [code for _, code in outputs]
    assert 0 in codes
    assert set(codes) <= {0, 2}
    for (_, err), code in outputs:
        assert "Traceback" not in err
        assert err.count("error: ") == (code == 2)
    assert content(out) == reference.content
    assert [path.name for path in source.parent.glob("out-both*")] == ["out-both"]
    shutil.rmtree(out)


def test_two_processes_that_resume_the_same_folder_do_not_damage_it(source, references):
    reference = references[0]
    out = source.parent / "out-resumed"
    process = start(source, out, *reference.options)
    wait_for(process, out, "model-00004-*")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    both = [start(source, out, *reference.options, "--resume") for _ in range(2)]
    codes = {(process.communicate(), process.returncode)[1] for process in both}
    assert 0 in codes
    assert codes <= {0, 2}
    assert content(out) == reference.content
    assert [path.name for path in source.parent.glob("out-resumed*")] == ["out-resumed"]


def test_the_interrupt_key_leaves_nothing(source, references):
    """Unlike a kill it lets the process clean up, so that there is nothing to resume."""
    out = source.parent / "out-interrupted"
    process = start(source, out, *references[0].options)
    wait_for(process, out, "model-00001-*")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert "Traceback" not in err
    if out.exists():  # this process was not quick enough
        assert content(out) == references[0].content
        return
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted"
    assert list(source.parent.glob("out-interrupted*")) == []
