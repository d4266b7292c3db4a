"""What processor this is, and what Paddle's matrix library has to be told about it."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
MKL_TYPE = "MKL_DEBUG_CPU_TYPE"
_AVX2 = "5"


def cpu_model() -> str:
    """The processor's name."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """Instruction-set extensions that decide how these frameworks round."""
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "sve", "bf16")
    facts = _facts()
    present = set(facts.get("flags", facts.get("Features", "")).split())
    return tuple(flag for flag in wanted if flag in present)


def let_mkl_use_avx2() -> None:
    """Have Paddle's MKL use AVX2 where it would not by itself. Call before the first matrix product.

    The MKL of Paddle's x86 wheels takes SSE kernels on processors that are not Intel's, two to three times slower than
    the AVX2 kernels those run as well. A value of the variable that the user has set stays.

    Source: measured with paddlepaddle 3.3.1 (docs/attention.md); MATLAB sets the same variable on AMD since R2020a.
    """
    vendor = _facts().get("vendor_id", "")
    if vendor and vendor != "GenuineIntel" and {"avx2", "fma"} <= set(cpu_flags()):
        os.environ.setdefault(MKL_TYPE, _AVX2)


def _facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    try:
        first = CPUINFO.read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
