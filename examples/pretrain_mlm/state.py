"""Everything a training is, saved whole or not at all.

    OUT/checkpoints/step-000100/model/                  a checkpoint as any other, with its tokenizer
                                optimizer.safetensors   both moments of every weight
                                state.json              step, and what the training was: recipe, data, digests

Random numbers and the place in the data follow from the seed and the step, so the step stands for them.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from examples.pretrain_mlm.optimizer import StableAdamW
from modernbert_align.backends.paddle import quiet
from modernbert_align.core.digest import file_sha256
from modernbert_align.errors import CheckpointError, UsageError
from modernbert_align.models.modernbert import ModernBertForMaskedLM, ModernBertTokenizer

MODEL, MOMENTS, STATE = "model", "optimizer.safetensors", "state.json"
WEIGHTS = "model.safetensors"
LOCK = ".lock"
_NEW = ".new-"  # what a folder is called before it is whole
_NAME = re.compile(r"step-(\d{6,})")


class State(BaseModel):
    """What is known of a training beside weights and moments.

    Attributes:
        step: Steps that were taken.
        recipe: Digest of the recipe.
        data: Digest of the data.
        weights: Digest of the weights' file.
        moments: Digest of the moments' file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    recipe: str
    data: str
    weights: str
    moments: str


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes out of a training's folder, and remove what killed ones left half written.

    Raises:
        UsageError: Another process trains there, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a")
    except OSError as error:
        raise UsageError(f"cannot write to `{out}`: {error.strerror}", hint="choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process trains in `{out}`", hint="wait, or choose another --out") from None
        for unfinished in (*out.glob(f"{_NEW}*"), *out.glob(f"checkpoints/{_NEW}*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield


def folders(out: Path) -> list[Path]:
    """The checkpoints of a training, oldest first."""
    found = {path: _NAME.fullmatch(path.name) for path in (out / "checkpoints").glob("step-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name[5:]))


def save(
    out: Path,
    model: ModernBertForMaskedLM,
    tokenizer: ModernBertTokenizer,
    optimizer: StableAdamW,
    *,
    recipe: str,
    data: str,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove the oldest ones.

    Args:
        keep: How many remain.

    Raises:
        CheckpointError: The disk cannot be written.
    """
    out = out / "checkpoints"

    def write(folder: Path) -> None:
        write_model(folder / MODEL, model, tokenizer)
        save_file(optimizer.state(), folder / MOMENTS)
        state = State(
            step=optimizer.steps,
            recipe=recipe,
            data=data,
            weights=file_sha256(folder / MODEL / WEIGHTS),
            moments=file_sha256(folder / MOMENTS),
        )
        (folder / STATE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")

    folder = whole(out / f"step-{optimizer.steps:06d}", write)
    for old in folders(out.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def write_model(folder: Path, model: ModernBertForMaskedLM, tokenizer: ModernBertTokenizer) -> None:
    """Write a checkpoint that PaddleNLP loads and `convert --src paddle` takes."""
    with quiet():
        model.save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))


def whole(folder: Path, write: Callable[[Path], object]) -> Path:
    """Have a folder written beside its place and moved there, replacing what was there, when all of it is on the disk.

    Raises:
        CheckpointError: The disk cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_NEW, dir=folder.parent, ignore_cleanup_errors=True) as staging:
            new, old = Path(staging, "new"), Path(staging, "old")
            new.mkdir()
            write(new)
            for path in (*(p for p in new.rglob("*") if p.is_file()), *(p for p in new.rglob("*") if p.is_dir()), new):
                _sync(path)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:  # an interrupt too
                if old.exists():
                    old.rename(folder)
                raise
            _sync(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write `{folder}`: {error.strerror or error}", hint="check free space and permissions"
        ) from None
    return folder


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(folder: Path, *, recipe: str, data: str) -> State:
    """What a checkpoint says of itself, after a look at its files.

    Raises:
        CheckpointError: A file is missing, or is not the one that was written.
        UsageError: The checkpoint is of another recipe, or other data.
    """
    try:
        state = State.model_validate(json.loads((folder / STATE).read_text(encoding="utf-8")))
        intact = (state.weights, state.moments) == (
            file_sha256(folder / MODEL / WEIGHTS),
            file_sha256(folder / MOMENTS),
        )
    except (OSError, ValueError, ValidationError):
        intact = False
    if not intact:
        raise CheckpointError(
            f"`{folder}` is damaged: a file is missing or was changed",
            hint="delete the folder; --resume then continues from the one before",
        )
    if state.recipe != recipe:
        raise UsageError(
            f"`{folder}` was written under another recipe", hint="resume with the same one, or choose another --out"
        )
    if state.data != data:
        raise UsageError(
            f"`{folder}` was trained on other data than there is now", hint="another Python has another library"
        )
    return state


def restore_optimizer(folder: Path, state: State, optimizer: StableAdamW) -> None:
    """Give an optimizer the moments of a checkpoint.

    Raises:
        CheckpointError: They are not those of this model.
    """
    try:
        optimizer.restore(state.step, load_file(folder / MOMENTS))
    except (KeyError, SafetensorError) as error:
        raise CheckpointError(f"`{folder / MOMENTS}` does not fit the model: {error}") from None
