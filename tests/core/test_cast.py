"""Casts between float formats, against a rounding written out in whole fractions here."""

import math
import tracemalloc
from fractions import Fraction
from itertools import permutations
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import cast as module
from modernbert_align.core.cast import CONFIG_NAMES, FLOATS, SHORT_NAMES, WIDENING, CastLoss, cast_bits, check_loss
from modernbert_align.errors import CheckpointError

LAYOUT = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}  # exponent and fraction bits
PAIRS = list(permutations(FLOATS, 2))
NARROWING = [pair for pair in PAIRS if pair not in WIDENING]
EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def infinity(dtype):
    exponent, fraction = LAYOUT[dtype]
    return ((1 << exponent) - 1) << fraction


def sign_bit(dtype):
    return 1 << sum(LAYOUT[dtype])


def value_of(pattern, dtype):
    """What a bit pattern stands for, by the definition of the formats."""
    exponent, fraction = LAYOUT[dtype]
    sign = -1.0 if pattern & sign_bit(dtype) else 1.0
    scale, digits = divmod(pattern & ~sign_bit(dtype), 1 << fraction)
    if scale == (1 << exponent) - 1:
        return sign * (math.nan if digits else math.inf)
    if scale:
        digits += 1 << fraction
    return sign * math.ldexp(digits, max(scale, 1) - ((1 << (exponent - 1)) - 1) - fraction)


def nearest(value, dtype):
    """Bit pattern of the nearest number of a format, the even one of two; for a value that is not NaN."""
    exponent, fraction = LAYOUT[dtype]
    sign = sign_bit(dtype) if math.copysign(1, value) < 0 else 0
    if value == 0 or math.isinf(value):
        return sign | (infinity(dtype) if value else 0)
    smallest = 2 - (1 << (exponent - 1))
    scale = max(math.frexp(value)[1] - 1, smallest)
    digits = round(abs(Fraction(value)) / Fraction(2) ** (scale - fraction))  # round() goes to the even one
    return sign | min(((scale - smallest) << fraction) + digits, infinity(dtype))


def expected_of(patterns, source, target):
    """(bit patterns, CastLoss) of a cast, one value after the other; None for a NaN."""
    _, fraction = LAYOUT[target]
    loss = CastLoss(elements=len(patterns))
    found = []
    for pattern in patterns:
        value = value_of(pattern, source)
        if math.isnan(value):
            found.append(None)
            loss.nan += 1
            continue
        found.append(nearest(value, target))
        rounded = value_of(found[-1], target)
        if math.isinf(value):
            loss.inf += 1
        elif math.isinf(rounded):
            loss.overflow += 1
            loss.overflow_max = max(loss.overflow_max, abs(value))
        elif value != 0:
            loss.max_abs = max(loss.max_abs, abs(value - rounded))
            loss.max_rel = max(loss.max_rel, abs(value - rounded) / abs(value))
            loss.underflow += rounded == 0
            normal = pattern & ~sign_bit(source) >= 1 << LAYOUT[source][1]
            loss.subnormal += normal and 0 < found[-1] & ~sign_bit(target) < 1 << fraction
    return found, loss


def bits_of(values, dtype):
    array = np.asarray(values, dtype=FLOATS[dtype])
    return array.view(f"u{array.itemsize}")


def from_patterns(patterns, dtype):
    return np.array(patterns, dtype=f"u{FLOATS[dtype].itemsize}")


def check(patterns, source, target):
    """Cast, and compare bits and account with the slow reference."""
    loss = CastLoss()
    found = cast_bits(from_patterns(patterns, source), source, target, loss)
    assert found.dtype == np.dtype(f"u{FLOATS[target].itemsize}")
    expected, expected_loss = expected_of(patterns, source, target)
    for pattern, right, ours in zip(patterns, expected, found.tolist(), strict=True):
        if right is None:
            assert ours & ~sign_bit(target) > infinity(target), f"NaN {pattern:#x} became {ours:#x}"
        else:
            assert ours == right, f"{pattern:#x} became {ours:#x}, not {right:#x}"
    assert loss == expected_loss


def near_ties(source, target):
    """Patterns of `source` at and near the middle of two neighbours of `target`; in F64 also fractions of F32 away."""

    def build(drawn):
        pattern, nudge, coarse, sign = drawn
        middle = (Fraction(value_of(pattern, target)) + Fraction(value_of(pattern + 1, target))) / 2
        tie = nearest(float(middle), source)
        if source == "F64":
            nudge += coarse << 27  # a quarter of the distance between two float32 numbers
        return max(tie + nudge, 0) % sign_bit(source) | (sign_bit(source) if sign else 0)

    finite = st.integers(0, infinity(target) - 2)
    return st.tuples(finite, st.integers(-2, 2), st.integers(-6, 6), st.booleans()).map(build)


def patterns(source, target):
    anything = st.integers(0, 2 * sign_bit(source) - 1)
    return st.lists(st.one_of(anything, near_ties(source, target)), min_size=1, max_size=30)


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] in ("F16", "BF16")])
def test_all_16_bit_patterns_are_cast_and_accounted_for_as_by_hand(source, target):
    check(EVERY_16_BITS.tolist(), source, target)


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] in ("F32", "F64")])
@given(data=st.data())
def test_wide_patterns_are_cast_and_accounted_for_as_by_hand(source, target, data):
    check(data.draw(patterns(source, target)), source, target)


@pytest.mark.parametrize(("source", "target"), [("F32", "F16"), ("F32", "BF16"), ("F64", "F16"), ("F64", "BF16")])
def test_every_tie_between_16_bit_numbers_goes_to_the_even_one_and_its_neighbours_to_the_nearer(source, target):
    below = EVERY_16_BITS[: infinity(target) - 1]
    numbers = EVERY_16_BITS[: infinity(target)].view(FLOATS[target]).astype(np.float64)
    tie = bits_of((numbers[:-1] + numbers[1:]) / 2, source)
    for nudged, right in ((tie - 1, below), (tie, below + (below & 1)), (tie + 1, below + 1)):
        assert np.array_equal(cast_bits(nudged, source, target, CastLoss()), right)
        negative = nudged | nudged.dtype.type(sign_bit(source))
        assert np.array_equal(cast_bits(negative, source, target, CastLoss()), right | sign_bit(target))


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (Fraction(1) + Fraction(1, 2**8) + Fraction(1, 2**40), 0x3F81),  # just above the middle: up
        (Fraction(1) + Fraction(3, 2**8) - Fraction(1, 2**40), 0x3F81),  # just below the middle: down
        (Fraction(1) + Fraction(1, 2**8) + Fraction(3, 2**25), 0x3F81),  # above it by 3/4 of the fp32 spacing
        (Fraction(1) + Fraction(3, 2**8) - Fraction(3, 2**25), 0x3F81),  # below it by as much
        (Fraction(1) + Fraction(1, 2**8), 0x3F80),  # the middle itself: to the even one
        (Fraction(1, 2**134) + Fraction(1, 2**170), 0x0001),  # above the middle of 0 and the smallest number
        (Fraction(1, 2**134), 0x0000),
        (Fraction(511, 2) * 2**120 - 2**80, 0x7F7F),  # just below where infinity begins
        (Fraction(511, 2) * 2**120, 0x7F80),
    ],
)
def test_fp64_to_bf16_rounds_once(value, pattern):
    assert Fraction(float(value)) == value
    for sign, number in ((0, value), (0x8000, -value)):
        found = cast_bits(bits_of([float(number)], "F64"), "F64", "BF16", CastLoss())
        assert hex(found[0]) == hex(pattern | sign)


def test_fp64_to_fp16_rounds_once():
    # In fp32 the first is the middle of 1 and the next number, which would go down to the even one.
    above, below = 1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40
    found = cast_bits(bits_of([above, below, 2.0**-25 + 2.0**-60], "F64"), "F64", "F16", CastLoss())
    assert [hex(x) for x in found] == ["0x3c01", "0x3c01", "0x1"]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_nan_stays_one_whatever_its_payload(source, target):
    _, fraction = LAYOUT[source]
    payloads = [1, 2, *(1 << bit for bit in range(2, fraction)), (1 << fraction) - 1, (1 << fraction - 1) + 1]
    check([sign | infinity(source) | payload for payload in payloads for sign in (0, sign_bit(source))], source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_infinities_and_both_zeros_stay_what_they_are(source, target):
    sign, end = sign_bit(source), infinity(source)
    loss = CastLoss()
    found = cast_bits(from_patterns([end, sign | end, 0, sign], source), source, target, loss)
    assert found.tolist() == [infinity(target), sign_bit(target) | infinity(target), 0, sign_bit(target)]
    assert loss == CastLoss(elements=4, inf=2)
    assert loss.lossless


def test_the_figures_of_a_cast_to_fp16():
    values = [1.0, 1 + 2.0**-12, -3.0, 0.0, 2.0**-20 * 1.0009765625, 1e-9, -1e-9, 7e4, -8e4, np.inf, np.nan, np.nan]
    loss = CastLoss()
    cast_bits(bits_of(values, "F32"), "F32", "F16", loss)
    assert loss == CastLoss(
        elements=12,
        max_abs=2.0**-12,
        max_rel=1.0,
        overflow=2,
        overflow_max=8e4,
        underflow=2,
        subnormal=1,
        nan=2,
        inf=1,
    )
    assert not loss.lossless


def test_relative_errors_are_those_of_float64():
    loss = CastLoss()
    cast_bits(bits_of([0.0, 0.1, -0.3], "F32"), "F32", "BF16", loss)
    tenth, third = float(np.float32(0.1)), float(np.float32(0.3))
    assert loss.max_abs == abs(third - 0.30078125)
    assert loss.max_rel == max(abs(third - 0.30078125) / third, abs(tenth - 0.10009765625) / tenth)


@pytest.mark.parametrize(("source", "target"), NARROWING)
def test_values_the_target_holds_are_lossless_and_one_it_does_not_hold_is_not(source, target):
    loss = CastLoss()
    cast_bits(bits_of([0.0, 1.0, -1.5, 2.0**-10, 128.0], source), source, target, loss)
    assert loss == CastLoss(elements=5)
    assert loss.lossless
    finest = from_patterns([infinity(source) >> 1 | 1, 1], source)  # next to 1, next to 0
    cast_bits(finest, source, target, loss)
    assert not loss.lossless


@pytest.mark.parametrize("lost", [{"max_abs": 1e-9}, {"overflow": 1}, {"underflow": 1}])
def test_any_lost_value_makes_a_cast_not_lossless(lost):
    assert CastLoss(elements=3, nan=1, inf=1, subnormal=1).lossless
    assert not CastLoss(elements=3, **lost).lossless


def test_losses_of_two_tensors_add_up():
    first = CastLoss(10, 0.5, 0.1, 1, 7e4, 2, 3, 4, 5)
    second = CastLoss(100, 0.25, 0.2, 10, 9e4, 20, 30, 40, 50)
    total = first
    total += second
    assert total is first
    assert total == CastLoss(110, 0.5, 0.2, 11, 9e4, 22, 33, 44, 55)
    assert second == CastLoss(100, 0.25, 0.2, 10, 9e4, 20, 30, 40, 50)
    second += CastLoss(1, 0.75, 0.1, 0, 1e4)
    assert second == CastLoss(101, 0.75, 0.2, 10, 9e4, 20, 30, 40, 50)


@given(data=st.data(), pair=st.sampled_from(PAIRS))
def test_an_account_does_not_depend_on_how_a_tensor_is_cut(data, pair):
    source, target = pair
    drawn = from_patterns(data.draw(patterns(source, target)), source)
    cut = data.draw(st.integers(0, drawn.size))
    whole, pieces, blocks, first, second = (CastLoss() for _ in range(5))
    expected = cast_bits(drawn, source, target, whole)
    parts = [cast_bits(part, source, target, pieces) for part in (drawn[:cut], drawn[cut:])]
    with mock.patch.object(module, "_BLOCK", data.draw(st.integers(1, 4))):
        in_blocks = cast_bits(drawn, source, target, blocks)
    cast_bits(drawn[:cut], source, target, first)
    cast_bits(drawn[cut:], source, target, second)
    first += second
    assert np.array_equal(np.concatenate(parts), expected)
    assert np.array_equal(in_blocks, expected)
    assert whole == pieces == blocks == first


@pytest.mark.parametrize("size", [n * module._BLOCK + more for n in (1, 2) for more in (-1, 0, 1)])
def test_no_value_is_lost_or_counted_twice_where_blocks_meet(size):
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    edges = [i for i in (0, module._BLOCK - 1, module._BLOCK, 2 * module._BLOCK - 1, size - 1) if i < size]
    values[edges] = -7e4
    values[edges[0]] = 1e5
    values[[1, 3]], values[100:110] = (1e-9, 1e-6), np.nan
    loss = CastLoss()
    found = cast_bits(values.view(np.uint32), "F32", "F16", loss)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert np.array_equal(found.view(np.float16), expected, equal_nan=True)
    small = np.abs(expected[expected != 0]) < 2.0**-14
    kept = np.isfinite(expected)
    error = np.abs(values[kept].astype(np.float64) - expected[kept])
    assert loss == CastLoss(
        elements=size,
        max_abs=error.max(),
        max_rel=1.0,
        overflow=len(set(edges)),
        overflow_max=1e5,
        underflow=int(np.count_nonzero((expected == 0) & (values != 0))),
        subnormal=int(small.sum()),
        nan=10,
    )


@pytest.mark.parametrize(
    ("source", "target", "fits", "too_large"),
    [
        ("F32", "F16", 65519.0, 65520.0),  # 65504 is the largest; its rounding interval ends at 65520
        ("F64", "F16", 65519.999999, 65520.0),
        ("BF16", "F16", 65280.0, 65536.0),
        ("F32", "BF16", 3.3895e38, 3.4e38),
        ("F64", "BF16", 3.3895e38, 3.4e38),
        ("F64", "F32", 3.4028235e38, 3.5e38),
    ],
)
def test_a_value_beyond_the_target_is_refused_and_the_largest_that_fits_is_not(source, target, fits, too_large):
    loss = CastLoss()
    found = cast_bits(bits_of([1.0, -fits, fits], source), source, target, loss)
    assert np.isfinite(found.view(FLOATS[target]).astype(np.float64)).all()
    check_loss(loss, "layers.0.attn.Wo.weight", target, allow_overflow=False)
    found = cast_bits(bits_of([1.0, -too_large, fits, too_large], source), source, target, loss)
    assert found.tolist()[1::2] == [sign_bit(target) | infinity(target), infinity(target)]
    check_loss(loss, "layers.0.attn.Wo.weight", target, allow_overflow=True)
    with pytest.raises(CheckpointError) as refused:
        check_loss(loss, "layers.0.attn.Wo.weight", target, allow_overflow=False)
    assert str(refused.value).startswith(
        f"2 values of `layers.0.attn.Wo.weight` do not fit {CONFIG_NAMES[target]} (largest "
    )
    assert "--allow-overflow" in refused.value.hint
    assert "keep the dtype" in refused.value.hint


def test_a_refusal_names_the_largest_value_and_the_limit():
    with pytest.raises(CheckpointError) as refused:
        check_loss(CastLoss(elements=99, overflow=12, overflow_max=1.2e5), "x", "F16", allow_overflow=False)
    assert str(refused.value) == "12 values of `x` do not fit float16 (largest 120000, limit 65504)"
    with pytest.raises(CheckpointError) as refused:
        check_loss(CastLoss(elements=99, overflow=1, overflow_max=3.4e38), "x", "BF16", allow_overflow=False)
    assert str(refused.value) == "1 value of `x` does not fit bfloat16 (largest 3.4e+38, limit 3.38953e+38)"


@pytest.mark.parametrize(
    ("target", "largest", "helps"), [("F16", 1e5, True), ("F16", 1e300, False), ("BF16", 1e39, False)]
)
def test_bf16_is_proposed_only_where_it_would_help(target, largest, helps):
    with pytest.raises(CheckpointError) as refused:
        check_loss(CastLoss(overflow=1, overflow_max=largest), "x", target, allow_overflow=False)
    assert ("choose bf16" in refused.value.hint) == helps


def test_keeping_the_dtype_returns_the_very_bits_and_counts_nothing_but_elements():
    source = np.array([0x7FC01234, 0x7F800001, 0x80000000, 0x7F800000], dtype=np.uint32)
    loss = CastLoss()
    assert cast_bits(source, "F32", "F32", loss) is source
    assert source.tolist() == [0x7FC01234, 0x7F800001, 0x80000000, 0x7F800000]
    assert loss == CastLoss(elements=4)


@pytest.mark.parametrize(("source", "target"), [("F32", "BF16"), ("F64", "BF16"), ("F32", "F16"), ("F32", "F64")])
def test_the_source_is_left_alone(source, target):
    values = bits_of([0.1, 1e5, 1e-9, 0.0, np.inf, np.nan, -0.1], source)
    before = values.copy()
    cast_bits(values, source, target, CastLoss())
    assert np.array_equal(values, before)


def test_shapes_survive_a_cast():
    source = bits_of(np.arange(6).reshape(2, 3), "F32")
    loss = CastLoss()
    assert cast_bits(source, "F32", "BF16", loss).shape == (2, 3)
    assert cast_bits(source[:0], "F32", "BF16", loss).shape == (0, 3)
    assert cast_bits(bits_of(7.0, "F32"), "F32", "F64", loss).shape == ()
    assert loss == CastLoss(elements=7)


@pytest.mark.parametrize("view", [np.transpose, lambda a: a[:, 1:3], lambda a: a[::-1, ::2]])
def test_a_view_with_strides_is_cast_in_its_own_order(view):
    values = np.arange(20, dtype=np.float32).reshape(4, 5) / 8
    found = cast_bits(view(values.view(np.uint32)), "F32", "F16", CastLoss())
    assert np.array_equal(found.view(np.float16), view(values))


def test_nothing_is_raised_or_warned_even_if_numpy_is_told_to():
    hard = [1e5, 1e-9, np.inf, -np.inf, np.nan, 0.0]
    signalling = bits_of(hard, "F64")
    signalling[4] = infinity("F64") | 1
    with np.errstate(all="raise"):
        for target in ("F32", "F16", "BF16"):
            loss = CastLoss()
            cast_bits(signalling, "F64", target, loss)
            assert (loss.nan, loss.inf) == (1, 2)


@pytest.mark.parametrize(("source", "target"), [("F32", "BF16"), ("F32", "F16"), ("F64", "BF16"), ("BF16", "F32")])
def test_a_cast_needs_little_more_memory_than_its_result(source, target):
    values = np.linspace(-1, 1, 1 << 22).astype(FLOATS[source])
    source_bits = values.view(f"u{values.itemsize}")
    tracemalloc.start()
    try:
        found = cast_bits(source_bits, source, target, CastLoss())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - found.nbytes < 4 << 20


def test_every_short_name_has_a_format_and_a_config_name():
    assert SHORT_NAMES == {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
    assert set(FLOATS) == set(CONFIG_NAMES)


def test_the_reference_here_agrees_with_the_formats():
    for dtype, (_, fraction) in LAYOUT.items():
        info = ml_dtypes.finfo(FLOATS[dtype])
        assert value_of(infinity(dtype) - 1, dtype) == float(info.max)
        assert value_of(1 << fraction, dtype) == float(info.smallest_normal)
        assert value_of(1, dtype) == float(info.smallest_subnormal)
