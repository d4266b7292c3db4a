"""Digests of files and tensors, computed beside the work that makes the bytes."""

import hashlib
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import numpy as np

from modernbert_align.core.ops import Bits
from modernbert_align.core.stream import RING

Algorithm = Literal["sha256", "crc32", "none"]
ALGORITHMS: tuple[Algorithm, ...] = ("sha256", "crc32", "none")
_READ_BYTES = 1 << 20


class Hasher(Protocol):
    """What `hashlib` objects offer."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest of all bytes added."""


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview | bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def new_hasher(algorithm: Algorithm) -> Hasher:
    """A fresh hasher of `sha256` or `crc32`."""
    return hashlib.sha256() if algorithm == "sha256" else _Crc32()


def file_digest(path: Path, algorithm: Algorithm = "sha256") -> str:
    """Digest of a file as `algorithm:hex`, read 1 MiB at a time; not for `none`."""
    hasher = new_hasher(algorithm)
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(memoryview(buffer)[:count])
    return f"{algorithm}:{hasher.hexdigest()}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    return file_digest(path).removeprefix("sha256:")


class Background:
    """One thread that adds pieces to hashers in order while the next pieces are made.

    A piece must not change before `RING - 1` more were given: then `add` waits.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
        self._pending: list[Future[None]] = []

    def add(self, hasher: Hasher, piece: Bits) -> None:
        """Have `piece` added to `hasher`."""
        while len(self._pending) >= RING - 1:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(hasher.update, piece.view(np.uint8).data))

    def wait(self) -> None:
        """Return when everything given is added."""
        while self._pending:
            self._pending.pop(0).result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
