"""The folder a conversion is written to before it gets its name, and the journal that makes it resumable.

`OUT.partial` holds a journal from its first moment to its last: a first line that says what the folder is and what is
being converted, then a line per tensor that is safely on the disk. Only one process at a time can hold the journal.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modernbert_align.errors import CheckpointError

JOURNAL = "conversion_journal.jsonl"
MANIFEST = "conversion_manifest.json"
_WHAT = (
    "This folder is an unfinished output of modernbert-align and not a checkpoint. Repeat the command to start "
    "over (convert also finishes it, with --resume), or delete the folder."
)


@dataclass(frozen=True, kw_only=True)
class Partial:
    """An open partial folder.

    Attributes:
        path: The folder.
        done: file name -> journal entries of its tensors that are complete, in file order.
    """

    path: Path
    done: Mapping[str, list[dict[str, Any]]]
    journal: BinaryIO

    def record(self, entries: list[dict[str, Any]]) -> None:
        """Add lines to the journal, on the disk when this returns."""
        self.journal.write(b"".join(_line(entry) for entry in entries))
        self.journal.flush()
        os.fsync(self.journal.fileno())


def partial_path(out: Path) -> Path:
    """Where a conversion to `out` is written first."""
    return out.with_name(f"{out.name}.partial")


@contextlib.contextmanager
def open_partial(
    out: Path, request: Mapping[str, Any], *, resume: bool, replace: bool, notify: Callable[[str], None]
) -> Iterator[Partial]:
    """A folder beside `out` that becomes `out` on success and disappears on any failure but the process's death.

    Args:
        request: What is converted and how; a folder begun with another one is not resumed.
        resume: Continue what an earlier process left; otherwise it is deleted.
        replace: Whether `out` may exist.
        notify: Told, in one line, that an earlier attempt is deleted or continued.

    Raises:
        CheckpointError: Something else is in the way, another process converts to `out`, the earlier attempt was of
            another conversion, or the disk cannot be written.
    """
    path = partial_path(out)
    try:
        journal = _lock(path, out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to `{out.parent}`: {error.strerror}", hint="choose another --out or free the path"
        ) from None
    try:
        done = _earlier(path, journal, request, resume, notify)
    except CheckpointError:
        journal.close()
        raise
    except OSError as error:
        _remove(path)
        journal.close()
        raise CheckpointError(f"cannot write to `{path}`: {error}", hint="check free space and permissions") from None
    try:
        yield Partial(path=path, done=done, journal=journal)
        _sync_folder(path)
        _take_place(path, out, replace)
        (out / JOURNAL).unlink()  # only now: while it was in `path`, its lock kept other processes out of there
        _sync_folder(out)
        _sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"cannot make `{out}`: {error}", hint="check free space and permissions") from None
    finally:
        if _holds(journal, path):  # else it has become `out`, and `path` may be another process's already
            _remove(path)
        journal.close()


def _lock(path: Path, out: Path) -> BinaryIO:
    """Create the folder or take over an abandoned one, and hold its journal."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CheckpointError(f"`{path}` is in the way", hint="remove it or choose another --out")
    if path.is_dir() and any(path.iterdir()) and not (path / JOURNAL).is_file():
        raise CheckpointError(
            f"`{path}` is in the way and no conversion wrote it", hint="move it away or choose another --out"
        )
    path.mkdir(exist_ok=True)
    journal = (path / JOURNAL).open("a+b")
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = _holds(journal, path)
    except BlockingIOError:
        free = False
    if not free:
        journal.close()
        raise CheckpointError(
            f"another process is converting to `{out}`", hint="wait for it or choose another --out"
        ) from None
    return journal


def _holds(journal: BinaryIO, path: Path) -> bool:
    """Whether an open journal is still the one in the folder."""
    try:
        return os.path.samestat(os.fstat(journal.fileno()), (path / JOURNAL).stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    """Delete the folder as far as that is possible; the journal last, which says what the rest is."""
    with contextlib.suppress(OSError):
        _empty(path)
        (path / JOURNAL).unlink()
        path.rmdir()


def _empty(path: Path) -> None:
    """Delete everything in the folder but the journal."""
    for child in path.iterdir():
        if child.name == JOURNAL:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _earlier(
    path: Path, journal: BinaryIO, request: Mapping[str, Any], resume: bool, notify: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Read the journal of an abandoned attempt, or begin a new one.

    Returns:
        file name -> entries of complete tensors.
    """
    first = _line({"what": _WHAT, "request": request})
    journal.seek(0)
    lines = journal.read().splitlines(keepends=True)
    done: dict[str, list[dict[str, Any]]] = {}
    if resume and lines:
        if lines[0] != first:
            raise CheckpointError(
                f"`{path}` was begun from another source, with other options or by another version",
                hint="repeat the command without --resume to start over",
            )
        size = len(first)
        for line in lines[1:]:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else {}
                done.setdefault(entry["file"], []).append(entry)
            except (ValueError, KeyError, TypeError):  # cut off or damaged when the machine stopped
                break
            size += len(line)
        journal.truncate(size)
        notify(f"continuing the conversion in {path}: {sum(map(len, done.values()))} tensors are done")
        return done
    if lines or any(child.name != JOURNAL for child in path.iterdir()):
        notify(f"an unfinished conversion in {path} is started over")
    _empty(path)
    journal.truncate(0)
    journal.write(first)
    journal.flush()
    os.fsync(journal.fileno())
    return done


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _take_place(path: Path, out: Path, replace: bool) -> None:
    """Give the finished folder its name; what was there before stays until then."""
    old = None
    try:
        if out.exists() and (replace or not any(out.iterdir())):
            old = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
            out.rename(old / out.name)
        path.rename(out)
    except BaseException:
        if old is not None:
            if not out.exists():
                (old / out.name).rename(out)
            old.rmdir()
        raise
    if old is not None:
        shutil.rmtree(old)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
