"""The folder a conversion is written to: one process at a time, nobody else's files, and no work done twice."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_align.core import convert as convert_module
from modernbert_align.core import partial as module
from modernbert_align.core import writer
from modernbert_align.core.convert import Request, convert, plan_conversion
from modernbert_align.core.manifest import read_manifest
from modernbert_align.core.partial import JOURNAL, MANIFEST, Partial, open_partial, partial_path
from modernbert_align.core.table import load_table
from modernbert_align.errors import AlignError, CheckpointError, ProofError

WEIGHTS = "model.safetensors"
SHARDED = 700  # bytes: several tensors in most shards, one larger than a shard
REQUEST = {"one": 1}


def opened(out: Path, request=REQUEST, *, resume=False, replace=False, notify: Callable[[str], None] = lambda _: None):
    return open_partial(out, request, resume=resume, replace=replace, notify=notify)


def abandon(out: Path, *lines: bytes, request=REQUEST, files: dict[str, bytes] | None = None) -> Path:
    """Leave what a process leaves that is killed after it recorded `lines`."""
    path = partial_path(out)
    path.mkdir(parents=True)
    (path / JOURNAL).write_bytes(module._line({"what": module._WHAT, "request": request}) + b"".join(lines))
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    return path


def entry(tensor: str, file: str = WEIGHTS) -> dict[str, object]:
    return {"file": file, "tensor": tensor, "record": {}}


def attempt(out: Path, work: Callable[[Partial], None], **options) -> None:
    """Do `work` in the folder, and then give it its name."""
    with opened(out, **options) as partial:
        work(partial)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """No machine dies here, and waiting for the disk is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _handle: None)


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_second_conversion_to_the_same_output_is_refused(out, snapshot):
    with opened(out) as partial:
        (partial.path / WEIGHTS).write_bytes(b"first")
        before = snapshot(partial.path)
        for resume in (False, True):
            with pytest.raises(CheckpointError, match=r"another process is converting to `.*/out`") as refused:
                opened(out, resume=resume).__enter__()
            assert refused.value.hint == "wait for it or choose another --out"
            assert snapshot(partial.path) == before
    assert (out / WEIGHTS).read_bytes() == b"first"


def test_another_process_is_refused_and_the_first_goes_on(build, asking, out, tmp_path):
    built = build(tmp_path / "source" / "hf")

    def in_another_process() -> int:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                convert(asking(built.folder), load_table(), out, force=True)
            except CheckpointError as error:
                code = 2 if error.message == f"another process is converting to `{out}`" else 98
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    codes = []
    convert(
        asking(built.folder), load_table(), out, force=False, progress=lambda *_: codes.append(in_another_process())
    )
    assert codes
    assert set(codes) == {2}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", MANIFEST, WEIGHTS]


def test_the_lock_is_free_after_each_end(out):
    for error in (None, ValueError, KeyboardInterrupt):
        try:
            with opened(out, replace=True):
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
    assert out.is_dir()
    assert not partial_path(out).exists()


@pytest.mark.parametrize("moment", ["before it gets its name", "after it got its name"])
def test_nobody_gets_in_while_a_folder_gets_its_name(out, monkeypatch, moment):
    """Between the last tensor and the end, what is there is complete and must not be cleared by another process."""
    original = module._take_place

    def other_process() -> None:
        with pytest.raises(CheckpointError), opened(out) as second:
            (second.path / "second").touch()

    def take_place(path, target, replace):
        if moment == "before it gets its name":
            other_process()
        original(path, target, replace)
        if moment == "after it got its name":
            other_process()  # finds OUT taken when it is done itself

    monkeypatch.setattr(module, "_take_place", take_place)
    with opened(out) as first:
        (first.path / WEIGHTS).write_bytes(b"first")
    assert [path.name for path in out.iterdir()] == [WEIGHTS]
    assert (out / WEIGHTS).read_bytes() == b"first"


def test_the_end_of_one_conversion_leaves_the_next_one_alone(out, monkeypatch):
    """As soon as OUT has its name, another process may begin in OUT.partial: it is not the first one's to delete."""
    original = module._sync_folder
    started = []

    def sync(path):
        if path == out.parent and not started:
            started.append(opened(out, replace=True))
            (started[0].__enter__().path / "second").write_bytes(b"second")
        original(path)

    monkeypatch.setattr(module, "_sync_folder", sync)
    with opened(out) as first:
        (first.path / WEIGHTS).touch()
    assert [path.name for path in out.iterdir()] == [WEIGHTS]
    assert (partial_path(out) / "second").read_bytes() == b"second"
    started[0].__exit__(None, None, None)
    assert [path.name for path in out.iterdir()] == ["second"]


def test_the_failure_of_one_conversion_leaves_the_next_one_alone(out, monkeypatch):
    """The lock is given up after the folder is removed, not before."""
    original = shutil.rmtree
    refused = []

    def rmtree(path, *arguments, **options):
        try:
            opened(out).__enter__()
        except CheckpointError as error:
            refused.append(error.message)
        original(path, *arguments, **options)

    def work(first):
        (first.path / "folder").mkdir()
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        attempt(out, work)
    assert refused == [f"another process is converting to `{out}`"]
    assert not partial_path(out).exists()


def test_a_folder_renamed_while_its_journal_was_opened_is_refused(out, monkeypatch):
    """The other process finished between `open` and `flock`: what was opened is no longer in the way."""
    original = module.fcntl.flock
    path = partial_path(out)
    abandon(out)

    def flock(journal, how):
        path.rename(out)
        original(journal, how)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match="another process is converting"):
        opened(out).__enter__()


# --- whose folder it is -----------------------------------------------------------------------------------------------


def test_an_abandoned_folder_is_started_over_with_a_notice(out):
    path = abandon(out, module._line(entry("a")), files={WEIGHTS: b"half", "other.safetensors": b"x"})
    (path / "folder").mkdir()
    (path / "folder" / "file").touch()
    told = []
    with opened(out, notify=told.append) as partial:
        assert partial.done == {}
        assert [child.name for child in path.iterdir()] == [JOURNAL]
    assert told == [f"an unfinished conversion in {path} is started over"]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_left_before_the_first_line_is_begun_anew(out, resume):
    for journal in (None, b""):
        partial_path(out).mkdir()
        if journal is not None:
            (partial_path(out) / JOURNAL).write_bytes(journal)
        told = []
        with opened(out, resume=resume, replace=True, notify=told.append) as partial:
            assert partial.done == {}
            assert json.loads((partial.path / JOURNAL).read_bytes())["request"] == REQUEST
        assert told == []


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", WEIGHTS, MANIFEST])
def test_a_folder_of_somebody_else_is_never_touched(out, snapshot, name, resume):
    """A finished conversion that the user named so is somebody else's as well."""
    partial_path(out).mkdir()
    (partial_path(out) / name).write_bytes(b"mine")
    before = snapshot(out.parent)
    with pytest.raises(CheckpointError, match=r"`.*/out.partial` is in the way and no conversion wrote it") as refused:
        opened(out, resume=resume).__enter__()
    assert refused.value.hint == "move it away or choose another --out"
    assert snapshot(out.parent) == before


def test_a_finished_conversion_with_that_name_is_kept(build, asking, out, tmp_path, snapshot):
    built = build(tmp_path / "source" / "hf")
    convert(asking(built.folder), load_table(), partial_path(out), force=False)
    before = snapshot(partial_path(out))
    with pytest.raises(CheckpointError, match="is in the way"):
        convert(asking(built.folder), load_table(), out, force=True)
    assert snapshot(partial_path(out)) == before


@pytest.mark.parametrize("kind", ["link", "link to nothing", "file"])
def test_something_else_in_its_place_is_refused(out, tmp_path, snapshot, kind):
    path, elsewhere = partial_path(out), tmp_path / "elsewhere"
    if kind == "file":
        path.write_bytes(b"mine")
    else:
        path.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
        (elsewhere / JOURNAL).write_bytes(module._line({"what": module._WHAT, "request": REQUEST}))
    before = snapshot(elsewhere), path.is_symlink(), path.exists() and path.is_file()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"`.*/out.partial` is in the way") as refused:
            opened(out, resume=resume).__enter__()
        assert refused.value.hint == "remove it or choose another --out"
    assert (snapshot(elsewhere), path.is_symlink(), path.exists() and path.is_file()) == before


def test_links_in_an_abandoned_folder_are_deleted_and_not_followed(out, tmp_path):
    path = abandon(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes(b"mine")
    (path / "folder").symlink_to(tmp_path / "mine")
    (path / "file").symlink_to(tmp_path / "mine" / "file")
    with opened(out):
        assert [child.name for child in path.iterdir()] == [JOURNAL]
    assert (tmp_path / "mine" / "file").read_bytes() == b"mine"


# --- the journal ------------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_the_folder_is(out):
    with opened(out) as partial:
        first = json.loads((partial.path / JOURNAL).read_text().splitlines()[0])
        assert first["request"] == REQUEST
        for part in ("unfinished output", "modernbert-align", "not a checkpoint", "--resume", "delete the folder"):
            assert part in first["what"]


def test_recorded_lines_are_on_the_disk_when_record_returns(out, monkeypatch):
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), original(handle)))
    with opened(out) as partial:
        partial.record([entry("a"), entry("b")])
        size = (partial.path / JOURNAL).stat().st_size
        assert synced[-1] == size
        assert [json.loads(line) for line in (partial.path / JOURNAL).read_text().splitlines()[1:]] == [
            entry("a"),
            entry("b"),
        ]


def test_a_tensor_is_on_the_disk_before_it_is_recorded(case, tmp_path, monkeypatch):
    """The other way round, a machine that stops in between would leave a promise."""
    made = case("sha256", SHARDED)
    synced: dict[int, int] = {}
    original = Partial.record

    def sync(handle: int) -> None:
        found = os.fstat(handle)
        synced[found.st_ino] = found.st_size

    def record(self, entries):
        for line in entries:
            found = (self.path / line["file"]).stat()
            assert synced[found.st_ino] == found.st_size
        original(self, entries)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Partial, "record", record)
    for number, at_once in enumerate((1, 1 << 30)):
        monkeypatch.setattr(writer, "_SYNC_BYTES", at_once)
        convert(made.request, load_table(), tmp_path / str(number), force=False)


def test_a_conversion_has_a_journal_until_it_has_its_name(out, monkeypatch):
    original = Path.rename
    seen = []

    def rename(path, target):
        seen.append((path / JOURNAL).is_file())
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with opened(out):
        pass
    assert seen == [True]
    assert list(out.iterdir()) == []


LINES = [module._line(entry(name)) for name in "abc"]
DAMAGED = {
    "nothing": (LINES, ["a", "b", "c"]),
    "last line torn": ([*LINES[:2], LINES[2][:-9]], ["a", "b"]),
    "last line without its end": ([*LINES[:2], LINES[2][:-1]], ["a", "b"]),
    "line in the middle damaged": ([LINES[0], LINES[1].replace(b"{", b"(", 1), LINES[2]], ["a"]),
    "zeros in the middle": ([LINES[0], bytes(len(LINES[1])), LINES[2]], ["a"]),
    "no text in the middle": ([LINES[0], b"\xff\xfe\n", LINES[2]], ["a"]),
    "empty line in the middle": ([LINES[0], b"\n", LINES[2]], ["a"]),
    "a list in the middle": ([LINES[0], b"[1]\n", LINES[2]], ["a"]),
    "another object in the middle": ([LINES[0], b'{"tensor":"b"}\n', LINES[2]], ["a"]),
    "a file that is no name": ([LINES[0], b'{"file":["x"]}\n', LINES[2]], ["a"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_resuming_trusts_the_journal_up_to_the_first_damaged_line(out, damage):
    lines, kept = DAMAGED[damage]
    path = abandon(out, *lines, files={WEIGHTS: b"half"})
    told = []
    with opened(out, resume=True, notify=told.append) as partial:
        assert [line["tensor"] for line in partial.done.get(WEIGHTS, [])] == kept
        assert (path / WEIGHTS).read_bytes() == b"half"
        # What comes next is added behind the last good line.
        partial.record([entry("next")])
        written = [json.loads(line) for line in (path / JOURNAL).read_text().splitlines()[1:]]
        assert [line["tensor"] for line in written] == [*kept, "next"]
    assert told == [f"continuing the conversion in {path}: {len(kept)} tensors are done"]


@pytest.mark.parametrize("first", ["another request", "torn", "another tool's"])
def test_the_journal_of_another_request_is_not_resumed(out, snapshot, first):
    path = abandon(out, LINES[0], request={"one": 2}, files={WEIGHTS: b"half"})
    if first == "torn":
        (path / JOURNAL).write_bytes(module._line({"what": module._WHAT, "request": REQUEST})[:-5])
    elif first == "another tool's":
        (path / JOURNAL).write_bytes(b"something else\n")
    before = snapshot(path)
    with pytest.raises(CheckpointError, match="was begun from another source, with other options or") as refused:
        opened(out, resume=True).__enter__()
    assert refused.value.hint == "repeat the command without --resume to start over"
    assert snapshot(path) == before
    with opened(out) as partial:  # which is free again
        assert partial.done == {}


def changes(asking, built):
    """Requests that another journal must not be continued with."""
    first = asking(built.folder)
    (built.folder / "tokenizer.json").write_text("{}")
    yield asking(built.folder)
    (built.folder / "tokenizer.json").unlink()
    yield asking(built.folder, dtype="bf16")
    yield asking(built.folder, head="base")
    yield asking(built.folder, shard_size=SHARDED)
    yield asking(built.folder, digest="crc32")
    other = built.folder.parent / "other"
    shutil.copytree(built.folder, other)
    yield asking(other)
    os.utime(built.folder / WEIGHTS, ns=(0, 0))
    yield first


def test_whatever_the_output_depends_on_is_part_of_the_request(build, asking, out, tmp_path, snapshot):
    built = build(tmp_path / "source" / "hf")
    killed(asking(built.folder), out, after=3)
    before = snapshot(partial_path(out))
    count = 0
    for request in changes(asking, built):
        with pytest.raises(CheckpointError, match="was begun from another source, with other options or"):
            convert(request, load_table(), out, force=False, resume=True)
        assert snapshot(partial_path(out)) == before
        count += 1
    assert count == 7


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, CheckpointError, ProofError])
def test_a_failure_removes_the_folder_and_leaves_the_earlier_output(out, snapshot, error):
    out.mkdir()
    (out / "earlier").write_bytes(b"earlier")
    before = snapshot(out.parent)
    raised = error("stop")

    def work(partial):
        (partial.path / WEIGHTS).write_bytes(b"half")
        (partial.path / "folder").mkdir()
        (partial.path / "folder" / "file").touch()
        raise raised

    with pytest.raises(error) as caught:
        attempt(out, work, replace=True)
    assert caught.value is raised
    assert snapshot(out.parent) == before


def test_a_failure_after_resuming_removes_the_folder_too(out):
    abandon(out, *LINES)
    with pytest.raises(ProofError), opened(out, resume=True):
        raise ProofError("stop")
    assert not partial_path(out).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_conversion_interrupted_after_any_tensor_leaves_nothing(build, asking, out, tmp_path, error):
    built = build(tmp_path / "source" / "hf", num_hidden_layers=1)
    tensors = len(plan_conversion(asking(built.folder), load_table()).plan.items)
    for stop in range(1, tensors + 1):
        count = iter(range(1, tensors + 1))

        def interrupt(*_, count=count, stop=stop):
            if next(count) == stop:
                raise error

        with pytest.raises(error):
            convert(asking(built.folder), load_table(), out, force=False, progress=interrupt)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_one_error_and_leaves_nothing(out, monkeypatch):
    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write to `.*/out.partial`: .*No space left") as refused:
        opened(out).__enter__()
    assert refused.value.hint == "check free space and permissions"
    assert list(out.parent.iterdir()) == []


def test_an_output_that_appeared_meanwhile_is_kept(out):
    def work(partial):
        (partial.path / WEIGHTS).write_bytes(b"late")
        out.mkdir()
        (out / "first").write_bytes(b"first")

    with pytest.raises(CheckpointError, match=r"cannot make `.*/out`"):
        attempt(out, work)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"first": b"first"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_deleted_keeps_its_journal(out, monkeypatch):
    """Then the next command finds out whose it is."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    def work(partial):
        (partial.path / "folder").mkdir()
        monkeypatch.setattr(shutil, "rmtree", refuse)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        attempt(out, work)
    assert (partial_path(out) / JOURNAL).is_file()
    monkeypatch.undo()
    with opened(out):
        pass
    assert list(out.iterdir()) == []


# --- a process that dies ----------------------------------------------------------------------------------------------


def killed(request: Request, out: Path, *, after: int, of: str = "tensor", resume: bool = False) -> bool:
    """Convert in a process that is killed; every tensor is in the journal as soon as it is written.

    Args:
        after: Number of tensors to write, or of calls of `os.fsync` to make, before that.

    Returns:
        Whether it was; else it finished.
    """
    child = os.fork()
    if child == 0:
        try:
            writer._SYNC_BYTES = 1
            left = iter(range(after))
            sync = os.fsync

            def count(*_: object) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            def counted_sync(handle: int) -> None:
                count()
                sync(handle)

            if of == "fsync":
                os.fsync = counted_sync
            elif after == 0:
                module.Partial.record = count
            else:
                next(left)
            progress = count if of == "tensor" else None
            convert(request, load_table(), out, force=False, resume=resume, progress=progress)
        except BaseException:  # noqa: BLE001 - it must not come back into the test
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def content(folder: Path) -> dict[str, object]:
    """What has to be equal, however often a conversion was resumed: all but the command line."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = read_manifest(folder)
    assert manifest is not None
    files[MANIFEST] = manifest.model_dump(exclude={"command"})
    return files


@dataclass(frozen=True)
class Case:
    """A request and what it gives when nobody disturbs it."""

    request: Request
    whole: dict[str, object]
    tensors: int


@pytest.fixture(scope="module")
def case(build, asking, tmp_path_factory):
    """Gives the case for a digest and a shard size."""
    folder = build(tmp_path_factory.mktemp("resume") / "source" / "hf", num_hidden_layers=1, norm_bias=True).folder
    cases = {}

    def made(digest="sha256", shard_size="keep", **options) -> Case:
        key = (digest, shard_size, *options.items())
        if key not in cases:
            prove = () if digest == "none" else ("tensors",)
            request = asking(folder, digest=digest, shard_size=shard_size, prove=prove, **options)
            out = folder.parent.parent / str(len(cases))
            manifest = convert(request, load_table(), out, force=False).manifest
            cases[key] = Case(request, content(out), len(manifest.tensors))
        return cases[key]

    return made


def resumed(case: Case, out: Path, monkeypatch, *, recorded: int | None = None) -> int:
    """Resume, hold the result against an undisturbed conversion, and give the number of tensors written again.

    Args:
        recorded: Tensors in the journal, if these are not those that are not written again.
    """
    written = []
    original = writer._write_item
    monkeypatch.setattr(writer, "_write_item", lambda *a: (written.append(a[1].target), original(*a))[1])
    told: list[str] = []
    convert(case.request, load_table(), out, force=False, resume=True, notify=told.append)
    assert content(out) == case.whole
    assert not partial_path(out).exists()
    monkeypatch.setattr(writer, "_write_item", original)
    continuing = [line for line in told if line.startswith("continuing")]
    recorded = case.tensors - len(written) if recorded is None else recorded
    assert not continuing or continuing[0].endswith(f": {recorded} tensors are done")
    return len(written)


@pytest.mark.parametrize("shard_size", ["keep", SHARDED])
@pytest.mark.parametrize("digest", ["sha256", "crc32", "none"])
def test_resuming_after_any_tensor_gives_the_same_and_writes_the_rest_only(
    case, tmp_path, monkeypatch, digest, shard_size
):
    made = case(digest, shard_size)
    assert (len([name for name in made.whole if name.endswith(".safetensors")]) > 2) == (shard_size == SHARDED)
    for done in range(made.tensors + 1):
        out = tmp_path / str(done)
        assert killed(made.request, out, after=done)
        assert not out.exists()
        assert resumed(made, out, monkeypatch) == made.tensors - done


def test_resuming_a_cast_gives_the_same_account_of_it(case, tmp_path, monkeypatch):
    made = case(dtype="bf16")
    for done in range(0, made.tensors + 1, 3):
        assert killed(made.request, tmp_path / str(done), after=done)
        assert resumed(made, tmp_path / str(done), monkeypatch) == made.tensors - done


def test_resuming_after_a_death_before_any_sync_gives_the_same(case, tmp_path, monkeypatch):
    """Before tensors are on the disk, between that and the journal, and between proofs, manifest and name."""
    made = case("sha256", SHARDED)
    done = 0
    while killed(made.request, tmp_path / str(done), after=done, of="fsync"):
        out = tmp_path / str(done)
        if not out.exists():
            resumed(made, out, monkeypatch)
        assert content(out) == made.whole
        done += 1
    assert done > 2 * made.tensors


def test_a_conversion_that_dies_again_and_again_is_finished_in_the_end(case, tmp_path, monkeypatch):
    made = case("crc32", SHARDED)
    deaths = 0
    while killed(made.request, tmp_path / "out", after=deaths + 1, resume=True):
        deaths += 1
    assert deaths > 3
    assert content(tmp_path / "out") == made.whole


def test_not_resuming_starts_over_and_gives_the_same(case, tmp_path):
    made = case()
    assert killed(made.request, tmp_path / "out", after=4)
    told: list[str] = []
    convert(made.request, load_table(), tmp_path / "out", force=False, notify=told.append)
    assert content(tmp_path / "out") == made.whole
    assert told[0] == f"an unfinished conversion in {tmp_path / 'out.partial'} is started over"


@pytest.mark.parametrize("shard_size", ["keep", SHARDED])
@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_garbage_behind_what_is_recorded_is_written_over(case, tmp_path, monkeypatch, digest, shard_size):
    made = case(digest, shard_size)
    for done in range(0, made.tensors, 4):
        out = tmp_path / str(done)
        assert killed(made.request, out, after=done)
        for path in partial_path(out).glob("*.safetensors"):
            with path.open("ab") as file:
                file.write(b"garbage" * 1000)
        assert resumed(made, out, monkeypatch) == made.tensors - done


@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_a_file_shorter_than_what_is_recorded_is_written_again_from_there(case, tmp_path, monkeypatch, digest):
    made = case(digest)
    (output,) = plan_conversion(made.request, load_table()).outputs
    for kept in range(0, made.tensors, 3):
        out = tmp_path / str(kept)
        assert killed(made.request, out, after=made.tensors)
        os.truncate(partial_path(out) / WEIGHTS, output.offset(kept) + 1)
        assert resumed(made, out, monkeypatch, recorded=made.tensors) == made.tensors - kept


@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_a_file_with_another_header_is_written_again(case, tmp_path, monkeypatch, digest):
    made = case(digest)
    assert killed(made.request, tmp_path / "out", after=made.tensors)
    with (partial_path(tmp_path / "out") / WEIGHTS).open("r+b") as file:
        file.seek(20)
        file.write(b"\0")
    assert resumed(made, tmp_path / "out", monkeypatch, recorded=made.tensors) == made.tensors


def test_a_bit_that_flips_in_what_is_recorded_is_found_by_reading_back(case, tmp_path):
    made = case()
    assert killed(made.request, tmp_path / "out", after=made.tensors)
    weights = partial_path(tmp_path / "out") / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ProofError, match="does not read back as it was written"):
        convert(made.request, load_table(), tmp_path / "out", force=False, resume=True)
    assert list(tmp_path.iterdir()) == []


LINE_CHANGES = {
    "no record": lambda line: {**line, "record": None},
    "an empty record": lambda line: {**line, "record": {}},
    "a record of the wrong kind": lambda line: {**line, "record": {**line["record"], "digest": 1}},
    "a record of another file": lambda line: {**line, "record": {**line["record"], "file": "other.safetensors"}},
    "no tensor": lambda line: {"file": line["file"], "record": line["record"]},
    "another tensor": lambda line: {**line, "tensor": "decoder.bias"},
}


@pytest.mark.parametrize("change", LINE_CHANGES)
def test_a_line_that_is_not_the_next_tensors_ends_what_is_trusted(case, tmp_path, monkeypatch, change):
    made = case()
    assert killed(made.request, tmp_path / "out", after=made.tensors)
    journal = partial_path(tmp_path / "out") / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[4] = module._line(LINE_CHANGES[change](json.loads(lines[4])))
    journal.write_bytes(b"".join(lines))
    assert resumed(made, tmp_path / "out", monkeypatch, recorded=made.tensors) == made.tensors - 3


def test_a_lost_line_ends_what_is_trusted(case, tmp_path, monkeypatch):
    made = case()
    assert killed(made.request, tmp_path / "out", after=made.tensors)
    journal = partial_path(tmp_path / "out") / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    del lines[4]
    journal.write_bytes(b"".join(lines))
    assert resumed(made, tmp_path / "out", monkeypatch, recorded=made.tensors - 1) == made.tensors - 3


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(where * len(data))] ^= 1 << int(where * 1000) % 8
        path.write_bytes(data)


def cut(path: Path, where: float) -> None:
    os.truncate(path, int(where * path.stat().st_size))


def garbage(path: Path, where: float) -> None:
    with path.open("ab") as file:
        file.write(b"garbage" * int(1 + where * 500))


@settings(max_examples=40)
@given(
    done=st.integers(0, 12),
    digest=st.sampled_from(["sha256", "crc32"]),
    shard_size=st.sampled_from(["keep", SHARDED]),
    damage=st.lists(
        st.tuples(st.sampled_from([flip, cut, garbage]), st.booleans(), st.floats(0, 0.999)), min_size=1, max_size=3
    ),
)
def test_no_damage_to_an_abandoned_folder_gives_a_wrong_output(
    case, tmp_path_factory, done, digest, shard_size, damage
):
    """It is finished right, or refused with a reason, and then there is no output."""
    made = case(digest, shard_size)
    root = tmp_path_factory.mktemp("damage")
    out = root / "out"
    assert killed(made.request, out, after=min(done, made.tensors))
    for hurt, in_journal, where in damage:
        files = sorted(partial_path(out).glob("*.safetensors"))
        hurt(partial_path(out) / JOURNAL if in_journal else files[int(where * len(files))], where)
    refused: AlignError | None = None
    try:
        convert(made.request, load_table(), out, force=False, resume=True)
    except AlignError as error:
        refused = error
    if refused is None:
        assert content(out) == made.whole
    elif isinstance(refused, ProofError):
        assert list(root.iterdir()) == []
    else:
        assert "was begun from another source" in refused.message
        assert list(root.iterdir()) == [partial_path(out)]
    shutil.rmtree(root)


def test_what_is_left_of_a_dead_process_counts_as_room(case, tmp_path, monkeypatch):
    """A disk that holds the abandoned folder and little else has room to finish it."""
    made = case()
    assert killed(made.request, tmp_path / "out", after=made.tensors)
    left = sum(path.stat().st_size for path in partial_path(tmp_path / "out").iterdir())
    needs = plan_conversion(made.request, load_table()).needs_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage._replace(free=needs - left))
    assert resumed(made, tmp_path / "out", monkeypatch) == 0
