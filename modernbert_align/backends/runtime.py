"""Process-wide settings that must be in place before a framework is imported, and what they turned out to be.

Rounding depends on the instruction set: with avx512_bf16 or AMX, oneDNN multiplies bfloat16 natively and rounds
differently from float32 kernels. The comparison pins oneDNN to plain AVX-512 so that machines agree. (Where a
machine has less, the pin does nothing.) The number of threads was measured to make no difference to the results.
"""

import ctypes
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modernbert_align.core.processor import MKL_TYPE, cpu_flags, cpu_model, let_mkl_use_avx2

PINNED_ISA = "AVX512_CORE"
_PINS = {
    "ONEDNN_MAX_CPU_ISA": PINNED_ISA,  # torch's oneDNN and Paddle's read it at first use
    "PADIFF_API_CHECK": "OFF",  # on, it wraps several hundred functions of both frameworks for good
    "PADIFF_CUDA_MEMORY": "OFF",  # on, it moves both models to the CPU
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOG_minloglevel": "2",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK = 2 << 20  # bytes: larger than a layer's output, smaller than its weights


def pin() -> None:
    """Set the environment for a reproducible comparison. Call before importing torch or paddle.

    A value the user has set stays, and the report shows it. Freed memory goes back to the system.
    """
    _return_large_blocks()
    let_mkl_use_avx2()
    for name, value in _PINS.items():
        os.environ.setdefault(name, value)
    for noise in ("No ccache found", "Setuptools is replacing distutils"):  # said on import, no use to anyone here
        warnings.filterwarnings("ignore", message=noise)


def _return_large_blocks() -> None:
    """Have the C library give large blocks back when they are freed; without this, glibc keeps those below 32 MB.

    Source: glibc, mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None and not os.environ.get("MALLOC_MMAP_THRESHOLD_"):
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(option, _LARGE_BLOCK)


def describe() -> dict[str, Any]:
    """Versions, processor and pins, without importing a framework."""
    return {
        "versions": package_versions(
            ("torch", "transformers", "paddlepaddle", "paddlenlp", "padiff", "safetensors", "numpy", "modernbert-align")
        ),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_flags": list(cpu_flags()),
        "pins": {name: os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", MKL_TYPE, "PADIFF_API_CHECK")},
    }


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, without importing the packages; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
