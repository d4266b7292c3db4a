"""What a path leads to, and text files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from modernbert_align.errors import UsageError


def kind_of(path: Path) -> Literal["file", "folder", "none"]:
    """What a path leads to; `none` also where that cannot be found out."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else "none"
    except OSError:  # a folder that may not be entered, a name too long
        return "none"


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary name beside `path` and rename it.

    Raises:
        UsageError: The folder cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise UsageError(
            f"cannot write to `{path.parent}`: {error.strerror}", hint="choose another folder or free the path"
        ) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror}", hint="check free space and permissions") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Write several text files of one folder: all of them, or none.

    Everything that can fail for want of space or permission is done beside the files; then each is renamed into its
    place. If a renaming fails or is interrupted, those before it are taken back. A process killed between two renames
    leaves files that are each whole, some new and some old.

    Args:
        texts: File name -> text.

    Raises:
        UsageError: The folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as staging:
            new, old = Path(staging, "new"), Path(staging, "old")
            new.mkdir()
            old.mkdir()
            for name, text in texts.items():
                with (new / name).open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                if (folder / name).exists():
                    shutil.copyfile(folder / name, old / name)
            try:
                for name in texts:
                    (new / name).replace(folder / name)
            except BaseException:  # an interrupt too
                for name in texts:
                    if (old / name).exists():
                        (old / name).replace(folder / name)
                    else:
                        (folder / name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UsageError(
            f"cannot write to `{folder}`: {error.strerror}",
            hint="choose another folder, or check space and permissions",
        ) from None
