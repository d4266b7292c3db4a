"""Freed memory is kept, or given back: seen in the pages that a process has to fetch again."""

import subprocess
import sys

import pytest

from modernbert_align.core import memory

COUNT = """
import resource
from modernbert_align.core import memory
memory.{call}()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (1, 5, 40):
        b"x" * (megabytes << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def pages_fetched_again(call):
    code = COUNT.format(call=call)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept_or_given_back():
    assert pages_fetched_again("keep_freed_memory") < 100
    assert pages_fetched_again("return_large_blocks") > 5000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("musl", ""))
    assert memory.keep_freed_memory() is False
    memory.return_large_blocks()
