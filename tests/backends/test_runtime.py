"""The pin of the instruction set works, and what is missing is found by trying."""

import os
import subprocess
import sys

import pytest

from modernbert_align.backends import runtime
from modernbert_align.backends.kernels import onednn_isa, paddle_kernels
from modernbert_align.core.processor import cpu_flags

NATIVE_BF16 = {"avx512_bf16", "amx_bf16"} & set(cpu_flags())


def test_pinned_onednn_multiplies_without_native_bf16(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", runtime.PINNED_ISA)
    pinned = onednn_isa()
    assert pinned != "not reported"
    assert "bfloat16" not in pinned
    assert "AMX" not in pinned


@pytest.mark.skipif(not NATIVE_BF16, reason="this processor has no native bfloat16 to pin away")
def test_without_the_pin_onednn_would_use_native_bf16(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT")
    assert "bfloat16" in onednn_isa() or "AMX" in onednn_isa()


def test_pin_respects_what_the_user_set(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    runtime.pin()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_kernels_are_tried_not_assumed():
    kernels = paddle_kernels()
    assert all(by_dtype["float32"] for by_dtype in kernels.values())
    assert kernels["cast"]["bfloat16"]


def test_engine_refuses_to_load_unpinned():
    code = "import modernbert_align.engines.padiff_engine"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PADIFF_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "runtime.pin()" in done.stderr


def test_absent_packages_are_left_out_of_the_versions():
    found = runtime.package_versions(("numpy", "no-such-package-anywhere"))
    assert set(found) == {"python", "numpy"}
