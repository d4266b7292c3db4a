"""Finds a model by what the user calls it: a folder, a fixture, or a hub id.

Fixtures are written once, by transformers in a process of its own, into the user's cache folder.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modernbert_align.backends.hub import fetch_snapshot, parse_hub_id
from modernbert_align.core.checkpoint import WEIGHTS
from modernbert_align.core.table import Table
from modernbert_align.errors import AlignError, CheckpointError, MissingPackageError

if TYPE_CHECKING:  # its schemas take a third of the time a conversion needs to start
    from collections.abc import Mapping

    from modernbert_align.core.fixtures import Fixture, InputSpec
    from modernbert_align.core.ops import Bits


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint on disk and where it came from.

    Attributes:
        name: What the user called it, shortened to something that can be part of a file name.
        revision: Hub commit, if any.
        fixture: The fixture it is, if any.
    """

    folder: Path
    name: str
    kind: Literal["fixture", "directory", "hub"]
    revision: str | None = None
    fixture: "Fixture | None" = None

    @property
    def inputs(self) -> "InputSpec | None":
        """The inputs a fixture is compared on; None for any other model."""
        return self.fixture.inputs if self.fixture else None


def resolve_model(model: str, table: Table, notify: Callable[[str], None], head: str | None = None) -> ModelSource:
    """Find `model`.

    Args:
        model: A folder, a fixture's name, or a hub id such as `answerdotai/ModernBERT-base`, which a branch, tag or
            commit may follow after an `@`. A folder comes before all others of its name.
        notify: Told, in one line, before something slow starts.
        head: Which head a fixture shall have, masked_lm by default; any other model has its own.

    Raises:
        UsageError, CheckpointError, ConfigError: Nothing of that name, or not what a model needs; see `fetch_snapshot`.
        MissingPackageError: A fixture has to be written and its packages are not there.
    """
    source = _directory(model)
    if source is not None:
        return source
    from modernbert_align.core.fixtures import fixture_names

    if model in fixture_names():
        return _fixture(model, table, notify, "masked_lm" if head in (None, "base") else head)
    hub_id = parse_hub_id(model)
    if hub_id is not None:
        folder = fetch_snapshot(hub_id, table.carried_files, notify)
        return ModelSource(folder=folder, name=hub_id.name, kind="hub", revision=folder.name)
    raise _unknown(model)


def name_model(model: str, folder: Path) -> ModelSource:
    """What `resolve_model` would find, with another folder in the place of its files: none of them is needed.

    Raises:
        UsageError, CheckpointError: Nothing can be of that name.
    """
    from modernbert_align.core.fixtures import fixture_names, load_fixture

    source = _directory(model)
    if source is not None:
        return replace(source, folder=folder)
    if model in fixture_names():
        return ModelSource(folder=folder, name=model, kind="fixture", fixture=load_fixture(model)[0])
    hub_id = parse_hub_id(model)
    if hub_id is not None:
        return ModelSource(folder=folder, name=hub_id.name, kind="hub", revision=hub_id.revision)
    raise _unknown(model)


def _directory(model: str) -> ModelSource | None:
    try:
        path = Path(model).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a folder that may not be entered, a name too long, `~nobody`
        raise CheckpointError(f"`{model}` cannot be read: {error}", hint="give a folder you can read") from None
    if exists and not is_folder:
        raise CheckpointError(f"`{model}` is a file", hint="give the folder that holds config.json")
    return ModelSource(folder=path, name=path.resolve().name, kind="directory") if is_folder else None


def _unknown(model: str) -> AlignError:
    from modernbert_align.core.fixtures import load_fixture

    if os.sep in model or model.startswith(("~", ".")):
        return CheckpointError(f"no such directory: `{model}`", hint="give a checkpoint folder, a hub id or a fixture")
    try:
        load_fixture(model)
    except AlignError as error:  # it says what is near
        return error
    raise AssertionError(model)


def read_torch(path: Path) -> "Mapping[str, tuple[Bits, str]]":
    """Read a PyTorch pickle; see `read_torch_file`, which most conversions never need."""
    from modernbert_align.backends.torch_files import read_torch_file

    return read_torch_file(path)


def cache_dir() -> Path:
    """Where fixtures are kept: `$XDG_CACHE_HOME/modernbert-align`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "modernbert-align"


def _fixture(name: str, table: Table, notify: Callable[[str], None], head: str) -> ModelSource:
    from modernbert_align.core.fixtures import load_fixture

    fixture, digest = load_fixture(name)
    parent = cache_dir() / "fixtures"
    folder = parent / f"{name}-{head}-{digest[:12]}"
    if not (folder / WEIGHTS).is_file():
        notify(f"writing the fixture {name} ({head}) with transformers, once, into {folder}")
        _write_fixture(name, table.architecture(head), parent, folder)
    return ModelSource(folder=folder, name=name, kind="fixture", fixture=fixture)


def _write_fixture(name: str, architecture: str, parent: Path, folder: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=parent))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the cache `{parent}`: {error.strerror}",
            hint="set XDG_CACHE_HOME to a folder you can write",
        ) from None
    try:
        command = [sys.executable, "-m", "modernbert_align.backends.fixture_writer", name, architecture, str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            kind = MissingPackageError if "ModuleNotFoundError" in last or "ImportError" in last else AlignError
            raise kind(f"the fixture `{name}` could not be written: {last}", hint="run `modernbert-align doctor`")
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
