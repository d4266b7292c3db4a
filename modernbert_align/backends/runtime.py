"""Process-wide settings that must be in place before a framework is imported, and what they turned out to be.

Rounding depends on the instruction set: with avx512_bf16 or AMX, oneDNN multiplies bfloat16 natively and rounds
differently from float32 kernels. The comparison pins oneDNN to plain AVX-512 so that machines agree. (Where a
machine has less, the pin does nothing.) The number of threads was measured to make no difference to the results.
"""

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modernbert_align.core.memory import return_large_blocks
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


def pin() -> None:
    """Set the environment for a reproducible comparison. Call before importing torch or paddle.

    A value the user has set stays, and the report shows it. Freed memory goes back to the system.
    """
    return_large_blocks()
    let_mkl_use_avx2()
    for name, value in _PINS.items():
        os.environ.setdefault(name, value)
    for noise in ("No ccache found", "Setuptools is replacing distutils"):  # said on import, no use to anyone here
        warnings.filterwarnings("ignore", message=noise)


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
