"""Every malformed checkpoint: exit code 2, one line that names the place, nothing written, run or used up."""

import contextlib
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from malformed import HOSTILE, INDEX, MALFORMED, MARKER, SECOND, WEIGHTS, shard, write_good

from modernbert_align.core.resources import configs_dir

SECONDS = 5
WAITING = 30
MEGABYTES = 1024


@contextlib.contextmanager
def bounded():
    """Fail what takes long, and let no more memory be reserved than some beyond what the process has."""

    def late(number, _frame):
        pytest.fail(f"took more than {SECONDS} s" if number == signal.SIGPROF else f"waited for {WAITING} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MEGABYTES << 20), hard))
    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of all threads, and not of other processes
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def everything(folder):
    """What is below a folder: kind, permissions, size, times and content of each."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        what = path.lstat()
        kept = what.st_mode, what.st_size, what.st_mtime_ns, what.st_ctime_ns
        if stat.S_ISLNK(what.st_mode):
            kept += (path.readlink(),)
        elif stat.S_ISREG(what.st_mode) and what.st_size < 1 << 24:
            kept += (path.read_bytes(),)
        found[path.relative_to(folder)] = kept
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, which is also where relative paths lead."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(result, says):
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = err.split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() and len(line) < 2000 for line in lines), err[:5000]
    assert lines[0].startswith("error: ")
    assert re.search(says, lines[0]), lines[0]
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), err


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_checkpoint_is_refused(cli, place, name):
    case = MALFORMED[name]
    if name.startswith("torch"):
        pytest.importorskip("torch")
    write_good(place / "source", case.src)
    case.damage(place / "source")
    before = everything(place)
    dst = "paddle" if case.src == "hf" else "hf"
    command = ("convert", "--src", case.src, "--dst", dst, "--model", place / "source", "--out", place / "out")
    with bounded():
        result = cli(*command)
    refused(result, case.says)
    assert everything(place) == before
    with bounded():
        code, out, err = cli(*command, "--dry-run")
    assert code == 2 or (code == 0 and not case.headers_tell), err
    assert "Traceback" not in err
    assert all(line.isprintable() for line in (out + err).split("\n"))
    assert everything(place) == before


def test_there_are_enough_cases():
    assert len(MALFORMED) >= 60


@pytest.mark.parametrize("src", ["hf", "paddle"])
def test_what_is_damaged_was_good(cli, place, src):
    write_good(place / "source", src)
    dst = "paddle" if src == "hf" else "hf"
    with bounded():
        code, _, err = cli("convert", "--src", src, "--dst", dst, "--model", place / "source", "--out", place / "out")
    assert code == 0, err
    assert (place / "out" / "tokenizer.json").read_bytes() == (place / "source" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", [b"new\nline\x1b[31m", b"not UTF-8 \xff", "Ünïcode 模型".encode()])
def test_any_name_of_a_folder_will_do(cli, place, name):
    source, out = (place / f"{os.fsdecode(name)}{end}" for end in ("", "-out"))
    write_good(source)
    command = ("convert", "--src", "hf", "--dst", "paddle", "--model", source)
    for more in (("--dry-run",), (), ("--out", out), ("--out", out), ("--out", out, "--force")):
        code, text, err = cli(*command, *more)
        assert code == 0, err
        assert all(line.isprintable() for line in (text + err).split("\n"))
    code, text, err = cli("verify", out)
    assert code == 0, err
    assert all(line.isprintable() for line in (text + err).split("\n"))


def test_name_that_the_terminal_cannot_show_is_escaped(place):
    write_good(place / "模型")
    command = ("convert", "--src", "hf", "--dst", "paddle", "--model", "模型", "--out", "out-模型")
    done = subprocess.run(
        [sys.executable, "-m", "modernbert_align.cli", *command],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"out-\\u6a21\\u578b: 23 tensors" in done.stdout


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_would_have_run(place, name):
    with contextlib.suppress(TypeError):
        pickle.loads(HOSTILE[name])
    assert (place / MARKER).exists()


# Where the output may not go


def link(place, name, target):
    (place / name).symlink_to(target)
    return name


def in_the_way(place, name):
    (place / name).mkdir()
    (place / name / "thesis.tex").write_text("years of work")


# What makes it so, and the --out that cannot be used.
OUTS = {
    "the source": lambda _: "source",
    "in the source": lambda _: "source/out",
    "deep in the source": lambda _: "source/a/b/out",
    "above the source": lambda place: place,
    "far above the source": lambda place: place.parent,
    "the root": lambda _: "/",
    "nothing": lambda _: "",
    "here": lambda _: ".",
    "above": lambda _: "..",
    "below the source and up again": lambda _: "source/..",
    "in the source by a detour": lambda place: f"../{place.name}/source/out",
    "a link to the source": lambda place: link(place, "link", "source"),
    "in the source by a link": lambda place: f"{link(place, 'link', 'source')}/out",
    "a link to nothing": lambda place: link(place, "link", "nothing"),
    "a link to itself": lambda place: link(place, "link", "link"),
    "below a link to itself": lambda place: f"{link(place, 'link', 'link')}/out",
    "a file": lambda _: "source/config.json",
    "below a file": lambda _: "source/config.json/out",
    "another file": lambda place: (place / "mine").write_text("mine") and "mine",
    "below another file": lambda place: (place / "mine").write_text("mine") and "mine/out",
    "a pipe": lambda place: os.mkfifo(place / "pipe") or "pipe",
    "a device": lambda _: "/dev/null",
    "below a device": lambda _: "/dev/null/out",
    "a folder nobody can write": lambda _: "/proc/out",
    "a folder with something else": lambda place: in_the_way(place, "mine") or "mine",
    "a name that is too long": lambda _: "a" * 300,
    "a name that is too long with `.partial`": lambda _: "a" * 250,
    "a path that is too long": lambda _: "/".join(["a" * 200] * 30),
    "beside a file called .partial": lambda place: (place / "out.partial").write_text("mine") and "out",
    "beside a folder called .partial": lambda place: in_the_way(place, "out.partial") or "out",
    "beside a link called .partial": lambda place: link(place, "out.partial", "source") and "out",
    "beside a source called .partial": lambda place: (place / "source").rename(place / "out.partial") and "out",
    "in a hub's cache": lambda place: (place / "models--a--b" / "blobs").mkdir(parents=True) or "models--a--b/out",
}


@pytest.mark.parametrize("name", OUTS)
def test_output_that_cannot_be_is_refused(cli, place, name):
    write_good(place / "source")
    out = OUTS[name](place)
    source = place / "source" if (place / "source").exists() else place / "out.partial"
    before = everything(place)
    command = ("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--out", out)
    for more in ((), ("--force",), ("--resume",)):
        with bounded():
            result = cli(*command, *more)
        refused(result, "output|cannot write|in the way|its disk has|cannot be read or written")
        assert everything(place) == before
    with bounded():
        code, _, err = cli(*command, "--dry-run")
    assert code in (0, 2), err
    assert everything(place) == before


# What may not be read or written. Root may do everything, so these give it up for the moment.

NOBODY = 65534


@pytest.fixture
def unprivileged(tmp_path, monkeypatch, cli):
    """A folder of a user who may not do everything, and a function that becomes that user."""
    write_good(tmp_path / "warm")  # imports what this user may perhaps not read
    assert (
        cli("convert", "--src", "hf", "--dst", "paddle", "--model", tmp_path / "warm", "--out", tmp_path / "up")[0] == 0
    )
    base = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    root = os.geteuid() == 0

    @contextlib.contextmanager
    def become():
        if root:
            for path in (base, *base.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
            os.seteuid(NOBODY)
        try:
            if not os.access(configs_dir(), os.R_OK, effective_ids=True):
                pytest.skip("this package is not readable by others")
            yield
        finally:
            if root:
                os.seteuid(0)

    monkeypatch.chdir(base)
    yield base, become
    for path in (base, *base.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700)
    monkeypatch.undo()
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("name", "mode", "sharded"),
    [
        (WEIGHTS, 0, False),
        ("config.json", 0, False),
        ("tokenizer.json", 0, False),
        (SECOND, 0, True),
        (INDEX, 0, True),
        (".", 0, False),
        (".", 0o400, False),
        (".", 0o100, False),
    ],
)
def test_what_may_not_be_read_is_refused_by_name(cli, unprivileged, name, mode, sharded):
    base, become = unprivileged
    source = base / "source"
    write_good(source)
    if sharded:
        shard(source)
    if mode == 0o100:  # what is in the folder may be read, but not which files these are
        (source / WEIGHTS).unlink()
    path = source / name
    command = ("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--out", base / "out")
    path.chmod(mode)
    for more in ((), ("--dry-run",)):
        with become(), bounded():
            result = cli(*command, *more)
        refused(result, f"{re.escape(str(path))}.*cannot be read.*Permission denied")
        assert sorted(p.name for p in base.iterdir()) == ["source"]


def test_folder_that_may_not_be_written_is_refused(cli, unprivileged):
    base, become = unprivileged
    write_good(base / "source")
    (base / "closed").mkdir()
    (base / "closed").chmod(0o500)
    command = ("convert", "--src", "hf", "--dst", "paddle", "--model", base / "source", "--out")
    with become(), bounded():
        refused(cli(*command, base / "closed" / "out"), f"cannot write to `{base / 'closed'}`: Permission denied")
        assert not any((base / "closed").iterdir())
    (base / "closed").chmod(0)
    with become(), bounded():
        refused(cli(*command, base / "closed" / "out"), f"{base / 'closed'}.*Permission denied")
        refused(cli(*command, base / "closed"), f"{base / 'closed'}.*Permission denied")
    (base / "closed").chmod(0o700)
    assert not any((base / "closed").iterdir())
