"""What is read of the processor, and what Paddle's matrix library is told."""

import os
import subprocess
import sys

import pytest

from modernbert_align.core import processor

X86 = (
    "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: Some CPU @ 2: fast\nflags\t\t: fpu {flags}\n\n"
    "processor\t: 1\nvendor_id\t: another\n"
)
AMD = X86.format(vendor="AuthenticAMD", flags="fma avx2 avx512f")
ARM = "processor\t: 0\nFeatures\t: fp sve bf16\n"


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    """Make the processor another one, and the variable unset."""
    monkeypatch.delenv(processor.MKL_TYPE, raising=False)

    def become(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        monkeypatch.setattr(processor, "CPUINFO", path)

    return become


def test_model_and_flags_of_the_first_processor(cpuinfo):
    cpuinfo(AMD)
    assert processor.cpu_model() == "Some CPU @ 2: fast"
    assert processor.cpu_flags() == ("avx2", "fma", "avx512f")
    cpuinfo(ARM)
    assert processor.cpu_flags() == ("sve", "bf16")


def test_no_cpuinfo_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "absent")
    assert processor.cpu_flags() == ()
    assert processor.cpu_model()
    processor.let_mkl_use_avx2()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AMD, "5"),
        (X86.format(vendor="HygonGenuine", flags="fma avx2"), "5"),
        (X86.format(vendor="GenuineIntel", flags="fma avx2"), None),
        (X86.format(vendor="AuthenticAMD", flags="avx fma"), None),
        (ARM, None),
    ],
)
def test_mkl_is_told_of_avx2_only_where_it_would_not_use_it(cpuinfo, text, expected):
    cpuinfo(text)
    processor.let_mkl_use_avx2()
    assert os.environ.get(processor.MKL_TYPE) == expected
    os.environ.pop(processor.MKL_TYPE, None)


def test_what_the_user_told_mkl_stays(cpuinfo, monkeypatch):
    cpuinfo(AMD)
    monkeypatch.setenv(processor.MKL_TYPE, "4")
    processor.let_mkl_use_avx2()
    assert os.environ[processor.MKL_TYPE] == "4"


@pytest.mark.skipif("vendor_id" not in processor._facts(), reason="not an x86 processor")
def test_the_model_tells_mkl_when_it_is_imported():
    code = f"import os, modernbert_align.models.modernbert.layers; print(os.environ.get({processor.MKL_TYPE!r}))"
    environment = {name: value for name, value in os.environ.items() if name != processor.MKL_TYPE}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    foreign = processor._facts()["vendor_id"] != "GenuineIntel" and {"avx2", "fma"} <= set(processor.cpu_flags())
    assert done.stdout.split()[-1] == ("5" if foreign else "None")
