"""Recognises the Hugging Face hub's cache by its layout, without huggingface_hub.

A repository is the folder `models--owner--name`: `refs/main` holds a commit, `snapshots/<commit>/` the files as links
to `blobs/<digest>`. Newer versions move large blobs into `<cache>/blobs/<xx>/`, shared by all repositories, and leave
a link behind.

Source: huggingface_hub 0.36 and 1.33, `file_download.hf_hub_download`, `constants.py` and `utils/_shared_blobs.py`.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_REPOSITORY = re.compile(r"(?:models|datasets|spaces|kernels)--.+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARED_STORE, _SHARED_STORE_MARKER = "blobs", ".huggingface-shared-blobs"


def published_sha256(path: Path) -> str | None:
    """The SHA-256 that the hub publishes for a file of a cached model, read from its link and not from its bytes.

    Only large files have one: small ones are named by their git digest.

    Returns:
        64 hex digits, or None for any other file.
    """
    real = _real(path.parent) / path.name  # of the file itself only the first link counts: a shared blob has no SHA-256
    repository = next((p.parent.parent for p in real.parents if _is_snapshot(p)), None)
    if repository is None or not repository.name.startswith("models--") or not real.is_symlink():
        return None
    blob = Path(os.path.normpath(real.parent / real.readlink()))
    return blob.name if blob.parent == repository / "blobs" and _SHA256.fullmatch(blob.name) else None


def in_hub_cache(path: Path) -> bool:
    """Whether a path, which need not exist, is inside a hub cache: this user's, or any folder laid out as one."""
    roots = [variant for root in _cache_roots() for variant in _variants(root)]
    return any(
        place in roots or _is_repository(place) or _has_shared_store(place)
        for variant in _variants(path)
        for place in (variant, *variant.parents)
    )


def inside_source(path: Path, folder: Path) -> bool:
    """Whether a file of a checkpoint folder stays there when links are followed.

    The files of a hub snapshot may also be in the same repository's `blobs`, or in the cache's shared ones.
    """
    real = _real(path)
    allowed = [_real(folder)]
    for variant in _variants(folder):
        if _is_snapshot(variant):
            repository = _real(variant.parent.parent)
            allowed.append(repository)
            if _has_shared_store(repository.parent):
                allowed.append(repository.parent / _SHARED_STORE)
    return any(place in real.parents for place in allowed)


def _cache_roots() -> Iterator[Path]:
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if value := os.environ.get(variable):
            yield _expanded(value) / below
    yield _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expanded(value: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(value)))  # noqa: PTH111 - Path.expanduser raises without a home


def _variants(path: Path) -> tuple[Path, Path]:
    """A path made absolute, once as it is written and once with its links followed."""
    return Path(os.path.abspath(path)), _real(path)  # noqa: PTH100 - Path.absolute keeps `..`


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a loop of links


def _is_repository(folder: Path) -> bool:
    # Path.is_dir raises on a folder that may not be entered.
    return bool(_REPOSITORY.fullmatch(folder.name)) and any(os.path.isdir(folder / n) for n in ("snapshots", "blobs"))  # noqa: PTH112


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and bool(_REPOSITORY.fullmatch(folder.parent.parent.name))


def _has_shared_store(cache: Path) -> bool:
    return os.path.isfile(cache / _SHARED_STORE / _SHARED_STORE_MARKER)  # noqa: PTH113 - as above
