"""Ports for processes that find each other by them."""

import socket

import pytest

from modernbert_align.core import ports
from modernbert_align.core.ports import free_ports


def test_ports_are_free_different_and_below_those_the_system_gives_away():
    found = free_ports(8)
    assert len(set(found)) == 8
    assert max(found) < 32768
    for port in found:
        with socket.socket() as one:
            one.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_found(monkeypatch):
    (taken, free) = sorted(free_ports(2))
    with socket.socket() as one:
        one.bind(("127.0.0.1", taken))
        one.listen()
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [taken, free, free + 1])
        assert free_ports(1) == [free]
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [taken])
        with pytest.raises(OSError, match="no 1 free ports"):
            free_ports(1)
