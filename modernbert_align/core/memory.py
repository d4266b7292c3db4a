"""What the C library does with memory that is freed: give it back, or keep it for the next forward.

Source: glibc, mallopt(3), M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_MMAP_MAX.
"""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGE_BLOCK = 2 << 20  # bytes: larger than a layer's output, smaller than its weights
_NEVER = (1 << 31) - 1


def return_large_blocks() -> None:
    """Have large blocks given back when they are freed; without this, glibc keeps those below 32 MB.

    Does nothing with another C library, or where `MALLOC_MMAP_THRESHOLD_` is set.
    """
    if not os.environ.get("MALLOC_MMAP_THRESHOLD_"):
        _set({_TRIM_THRESHOLD: _LARGE_BLOCK, _MMAP_THRESHOLD: _LARGE_BLOCK})


def keep_freed_memory() -> bool:
    """Have freed memory kept for what is allocated next, in this process, from now on.

    Paddle on CPU asks the C library for every tensor. By default that gives much of it back after each layer, and the
    system clears and maps it anew page by page, which may take a quarter of a forward's time. The price: the process
    stays as large as it ever was.

    Returns:
        Whether the C library could be told so; False with another one than glibc.
    """
    return _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})


def _set(options: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is None:
        return False
    taken = [mallopt(option, value) for option, value in options.items()]
    return all(taken)
