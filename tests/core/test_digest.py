"""Digests: the right ones, and of what a piece held when it was given, not of what its memory holds later."""

import hashlib
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import digest as module
from modernbert_align.core.digest import ALGORITHMS, Background, file_digest, file_sha256, new_hasher
from modernbert_align.core.stream import RING, Scratch

CONTENT = bytes(range(256)) * 10


class SlowHasher:
    """Keeps what it was given, long after it was given it."""

    def __init__(self, seconds=0.0):
        self.seen = []
        self._seconds = seconds

    def update(self, data):
        time.sleep(self._seconds)
        self.seen.append(bytes(data))

    def hexdigest(self):
        return ""


class GatedHasher(SlowHasher):
    """Adds nothing before it is let."""

    def __init__(self):
        super().__init__()
        self.gate, self.started = threading.Event(), threading.Event()

    def update(self, data):
        self.started.set()
        assert self.gate.wait(10)
        super().update(data)


def piece(*values):
    return np.array(values, dtype=np.uint8)


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("digest")]


# --- algorithms -------------------------------------------------------------------------------------------------------


@given(parts=st.lists(st.binary(max_size=50), max_size=5))
def test_a_hasher_adds_up_what_it_is_given(parts):
    for algorithm, expected in (
        ("sha256", hashlib.sha256(b"".join(parts)).hexdigest()),
        ("crc32", f"{zlib.crc32(b''.join(parts)):08x}"),
    ):
        hasher = new_hasher(algorithm)
        for part in parts:
            hasher.update(memoryview(part))
        assert hasher.hexdigest() == expected


def test_known_digests():
    """Published check values, which do not come from the libraries used here."""
    for algorithm, expected in (
        ("crc32", "cbf43926"),
        ("sha256", "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"),
    ):
        hasher = new_hasher(algorithm)
        hasher.update(b"123456789")
        assert hasher.hexdigest() == expected
    assert new_hasher("crc32").hexdigest() == "00000000"  # all eight digits


@pytest.mark.parametrize("step", [1, 100, 2560, 1 << 20])
def test_a_digest_is_that_of_the_whole_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    monkeypatch.setattr(module, "_READ_BYTES", step)
    assert file_digest(path) == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert file_digest(path, "crc32") == f"crc32:{zlib.crc32(CONTENT):08x}"
    assert file_sha256(path) == hashlib.sha256(CONTENT).hexdigest()


def test_an_empty_file_has_a_digest(tmp_path):
    (tmp_path / "file").touch()
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


def test_the_algorithms_are_these():
    assert ALGORITHMS == ("sha256", "crc32", "none")


# --- in the background ------------------------------------------------------------------------------------------------


@given(order=st.lists(st.integers(0, 2), max_size=30))
def test_every_hasher_gets_its_pieces_in_the_order_they_were_given(order):
    hashers = [SlowHasher() for _ in range(3)]
    with Background() as background:
        for number, hasher in enumerate(order):
            background.add(hashers[hasher], piece(number))
        background.wait()
        found = [list(hasher.seen) for hasher in hashers]
    assert found == [[bytes([n]) for n, h in enumerate(order) if h == hasher] for hasher in range(3)]


def test_pieces_of_the_ring_are_hashed_before_they_are_written_again():
    scratch, hasher = Scratch(), SlowHasher(seconds=0.002)
    expected = []
    with Background() as background:
        for number in range(5 * RING):
            out = scratch.piece(3, "F32")
            out[:] = number
            expected.append(out.tobytes())
            background.add(hasher, out)
        background.wait()
    assert hasher.seen == expected


def test_pieces_wider_than_a_byte_are_hashed_by_their_bytes():
    hasher = SlowHasher()
    with Background() as background:
        background.add(hasher, np.array([1, 0x0203], dtype=np.uint16))
        background.add(hasher, np.array([], dtype=np.uint64))
        background.wait()
    assert hasher.seen == [np.array([1, 0x0203], dtype="<u2").tobytes(), b""]


def test_as_many_pieces_as_the_ring_keeps_are_taken_without_waiting_and_no_more():
    hasher, added = GatedHasher(), threading.Event()
    with Background() as background:
        for number in range(RING - 1):
            background.add(hasher, piece(number))  # returns although nothing is hashed
        assert hasher.seen == []

        def one_more():
            background.add(hasher, piece(RING - 1))
            added.set()

        thread = threading.Thread(target=one_more)
        thread.start()
        assert not added.wait(0.1)
        hasher.gate.set()
        assert added.wait(10)
        thread.join()
        background.wait()
    assert hasher.seen == [bytes([number]) for number in range(RING)]


def test_waiting_returns_when_everything_is_added():
    hasher = SlowHasher(seconds=0.02)
    with Background() as background:
        background.add(hasher, piece(1))
        background.add(hasher, piece(2))
        background.wait()
        assert hasher.seen == [b"\x01", b"\x02"]
        background.wait()  # nothing to wait for


def test_an_error_of_the_hasher_is_raised_where_it_is_waited_for():
    class Broken(SlowHasher):
        def update(self, data):
            raise MemoryError

    with Background() as background:
        background.add(Broken(), piece(1))
        with pytest.raises(MemoryError):
            background.wait()


def test_leaving_ends_the_thread_and_after_an_error_drops_what_is_pending():
    hasher = GatedHasher()

    def interrupted():
        with Background() as background:
            for number in range(RING - 1):
                background.add(hasher, piece(number))
            assert hasher.started.wait(10)
            assert threads()
            threading.Timer(0.05, hasher.gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threads() == []
    assert hasher.seen == [b"\x00"]  # the one that was already under way
