"""Settings that must be in place before a framework is imported, and checkpoints that many tests share."""

import os
from pathlib import Path

import pytest

from modernbert_align.backends import runtime

runtime.pin()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on models this small, more threads only wait for each other


@pytest.fixture(scope="session")
def fixture_folder():
    """Gives the folder of a fixture, written on first use."""
    from modernbert_align.backends.sources import resolve_model
    from modernbert_align.core.table import load_table

    def folder(name: str) -> Path:
        return resolve_model(name, load_table(), lambda _message: None).folder

    return folder


@pytest.fixture(scope="session")
def converted(fixture_folder, tmp_path_factory):
    """Gives the Paddle conversion of a fixture."""
    from modernbert_align.core.convert import Request, convert
    from modernbert_align.core.table import load_table

    done: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in done:
            out = tmp_path_factory.mktemp("converted") / name
            request = Request(folder=fixture_folder(name), model=name, revision=None, src="hf", dst="paddle")
            done[name] = convert(request, load_table(), out, force=False).out
        return done[name]

    return folder
