"""Casts between float formats, against roundings written out here."""

import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core.cast import CONFIG_NAMES, FLOATS, SHORT_NAMES, cast_bits
from modernbert_align.errors import CheckpointError

FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bits_of(values, dtype):
    array = np.asarray(values, dtype=FLOATS[dtype])
    return array.view(f"u{array.itemsize}")


def cast(values, source, target):
    found = cast_bits(bits_of(values, source), source, target, name="layers.0.attn.Wo.weight")
    assert found.dtype == np.dtype(f"u{FLOATS[target].itemsize}")
    return found


def bf16_by_integers(bits):
    """Round to nearest even on the bit pattern of finite float32 values."""
    wide = bits.astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


@given(st.lists(FINITE32.filter(lambda x: abs(x) < 3e38), min_size=1, max_size=50))
def test_fp32_to_bf16_rounds_to_nearest_even(values):
    found = cast(values, "F32", "BF16")
    assert np.array_equal(found, bf16_by_integers(bits_of(values, "F32")))
    assert np.array_equal(found, np.float32(values).astype(ml_dtypes.bfloat16).view(np.uint16))


def test_fp32_ties_go_to_the_even_bf16():
    # Halfway between two bfloat16 values, below an odd and above an even one, and one bit to either side.
    patterns = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF818000], dtype=np.uint32)
    found = cast_bits(patterns, "F32", "BF16", name="w")
    assert [hex(x) for x in found] == ["0x3f80", "0x3f82", "0x3f80", "0x3f81", "0xbf82"]


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=50))
def test_fp32_to_fp16_rounds_to_nearest_even(values):
    expected = [struct.unpack("<H", struct.pack("<e", value))[0] for value in values]
    assert cast(values, "F32", "F16").tolist() == expected


@given(st.lists(st.floats(-3e38, 3e38), min_size=1, max_size=50))
def test_fp64_to_fp32_rounds_to_nearest_even(values):
    expected = [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]
    assert cast(values, "F64", "F32").tolist() == expected


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (Fraction(1) + Fraction(1, 2**8) + Fraction(1, 2**40), 0x3F81),  # just above the middle: up
        (Fraction(1) + Fraction(3, 2**8) - Fraction(1, 2**40), 0x3F81),  # just below the middle: down
        (Fraction(1) + Fraction(1, 2**8), 0x3F80),  # the middle itself: to the even one
    ],
)
def test_fp64_to_bf16_rounds_once(value, nearest):
    assert Fraction(float(value)) == value
    assert hex(cast([float(value)], "F64", "BF16")[0]) == hex(nearest)


@given(st.lists(st.integers(0, 0xFFFF).filter(lambda b: b & 0x7F80 != 0x7F80), min_size=1, max_size=40))
def test_bf16_to_fp32_keeps_every_value_and_comes_back(patterns):
    source = np.array(patterns, dtype=np.uint16)
    wide = cast_bits(source, "BF16", "F32", name="w")
    assert np.array_equal(wide, source.astype(np.uint32) << 16)
    assert np.array_equal(cast_bits(wide, "F32", "BF16", name="w"), source)


@given(st.lists(st.integers(0, 0xFFFF).filter(lambda b: b & 0x7C00 != 0x7C00), min_size=1, max_size=40))
def test_fp16_to_fp32_keeps_every_value_and_comes_back(patterns):
    source = np.array(patterns, dtype=np.uint16)
    wide = cast_bits(source, "F16", "F32", name="w")
    exact = [struct.unpack("<e", struct.pack("<H", pattern))[0] for pattern in patterns]
    assert wide.view(np.float32).tolist() == exact
    assert np.array_equal(cast_bits(wide, "F32", "F16", name="w"), source)


@pytest.mark.parametrize(
    ("source", "target", "fits", "too_large"),
    [
        ("F32", "F16", 65519.0, 65520.0),  # 65504 is the largest; its rounding interval ends at 65520
        ("BF16", "F16", 65280.0, 65536.0),
        ("F32", "BF16", 3.3895e38, 3.4e38),
        ("F64", "F32", 3.4028235e38, 3.5e38),
    ],
)
def test_a_value_beyond_the_target_is_refused_and_the_largest_that_fits_is_not(source, target, fits, too_large):
    assert np.isfinite(cast([1.0, -fits, fits], source, target).view(FLOATS[target]).astype(np.float64)).all()
    with pytest.raises(CheckpointError) as refused:
        cast([1.0, -too_large, fits, too_large], source, target)
    assert str(refused.value) == f"2 values of `layers.0.attn.Wo.weight` do not fit {CONFIG_NAMES[target]}"
    assert refused.value.hint


def test_infinities_and_nan_of_the_source_pass_through():
    found = cast([np.inf, -np.inf, np.nan, 2.0], "F32", "F16").view(np.float16)
    assert found[0] == np.inf
    assert found[1] == -np.inf
    assert np.isnan(found[2])
    assert found[3] == 2.0


def test_keeping_the_dtype_keeps_every_bit():
    source = np.array([0x7FC01234, 0x7F800001, 0x80000000, 5], dtype=np.uint32)
    assert cast_bits(source, "F32", "F32", name="w").tolist() == [0x7FC01234, 0x7F800001, 0x80000000, 5]


def test_shapes_survive_a_cast():
    source = bits_of(np.arange(6).reshape(2, 3), "F32")
    assert cast_bits(source, "F32", "BF16", name="w").shape == (2, 3)
    assert cast_bits(source[:0], "F32", "BF16", name="w").shape == (0, 3)
    assert cast_bits(bits_of(7.0, "F32"), "F32", "F64", name="w").shape == ()


def test_every_short_name_has_a_format_and_a_config_name():
    assert SHORT_NAMES == {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
    assert set(FLOATS) == set(CONFIG_NAMES)
