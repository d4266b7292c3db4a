"""Error measures, against plain formulas in float64."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import metrics as module
from modernbert_align.core.metrics import ULP_BINS, finite, measure

SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)


def pair(shape, seed, dtype=np.float32):
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=shape).astype(dtype)
    candidate = (reference.astype(np.float64) + generator.normal(size=shape) * 1e-2).astype(dtype)
    same = generator.random(shape) < 0.3
    return np.where(same, reference, candidate), reference


def naive(candidate, reference, mask):
    """Everything from one boolean selection of the whole tensors."""
    chosen = np.ones(candidate.shape, bool)
    if mask is not None:
        chosen = np.broadcast_to(mask.reshape(mask.shape + (1,) * (candidate.ndim - 2)), candidate.shape)
    c, r = candidate.astype(np.float64)[chosen], reference.astype(np.float64)[chosen]
    error = np.where(chosen, np.abs(candidate.astype(np.float64) - reference.astype(np.float64)), -1)
    return {
        "elements": c.size,
        "mean_abs": np.mean(np.abs(c - r)),
        "max_abs": np.max(np.abs(c - r)),
        "rel_l2": np.linalg.norm(c - r) / np.linalg.norm(r),
        "reference_rms": math.sqrt(np.mean(r**2)),
        "equal_share": np.mean(c == r),
        "worst_index": tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape)),
    }


def agree(found, expected, candidate, reference):
    for name, value in expected.items():
        assert getattr(found, name) == (
            value if name in ("elements", "worst_index", "max_abs") else pytest.approx(value, rel=1e-12)
        ), name
    assert found.worst_candidate == float(candidate[found.worst_index])
    assert found.worst_reference == float(reference[found.worst_index])
    assert abs(found.worst_candidate - found.worst_reference) == found.max_abs


@given(
    shape=SHAPES,
    seed=st.integers(0, 10_000),
    masked=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16]),
    size=st.sampled_from([1, 2, 3, 7, 1 << 18]),
)
def test_the_measures_are_those_of_the_formulas(shape, seed, masked, dtype, size):
    candidate, reference = pair(shape, seed, dtype)
    mask = np.random.default_rng(seed + 1).random(shape[:2]) < 0.6 if masked else None
    if mask is not None:
        mask[-1, -1] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE", size)
        found = measure(candidate, reference, mask)
    agree(found, naive(candidate, reference, mask), candidate, reference)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 30, 1 << 18])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 6), (3, 4, 2, 3), (11,), (5, 7), ()])
def test_the_slice_size_changes_nothing(shape, size, monkeypatch):
    candidate, reference = pair(shape, 5)
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]], bool) if shape[:2] == (3, 4) else None
    whole = measure(candidate, reference, mask)
    monkeypatch.setattr(module, "_SLICE", size)
    sliced = measure(candidate, reference, mask)
    assert sliced.worst_index == whole.worst_index
    assert (sliced.elements, sliced.max_abs, sliced.equal_share) == (whole.elements, whole.max_abs, whole.equal_share)
    assert sliced.mean_abs == pytest.approx(whole.mean_abs, rel=1e-12)
    assert sliced.rel_l2 == pytest.approx(whole.rel_l2, rel=1e-12)


def test_padding_is_not_compared():
    reference = np.arange(1, 25, dtype=np.float32).reshape(2, 4, 3)
    candidate = reference.copy()
    candidate[0, 2:] = 1e9  # padding
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    found = measure(candidate, reference, mask)
    assert (found.mean_abs, found.max_abs, found.rel_l2, found.equal_share) == (0, 0, 0, 1)
    assert found.elements == 18
    assert found.reference_rms == pytest.approx(math.sqrt(np.mean(reference[mask].astype(np.float64) ** 2)))
    assert measure(candidate, reference, None).max_abs > 9e8


def test_an_error_at_the_last_real_token_is_seen():
    reference = np.ones((2, 4, 3), np.float32)
    candidate = reference.copy()
    candidate[0, 1, 2] = 1.5
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    found = measure(candidate, reference, mask)
    assert found.worst_index == (0, 1, 2)
    assert (found.max_abs, found.mean_abs) == (0.5, 0.5 / 18)
    assert found.equal_share == 17 / 18


@pytest.mark.parametrize("place", [(0, 0, 0), (0, 3, 4), (1, 0, 0), (1, 5, 2), (2, 6, 4)])
@pytest.mark.parametrize("size", [1, 4, 5, 11, 1 << 18])
def test_the_worst_index_is_that_of_the_whole_tensor(place, size, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", size)
    reference = np.zeros((3, 7, 5), np.float32)
    candidate = reference.copy()
    candidate[place] = -2.0
    mask = np.array([[1, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]], bool)
    for chosen in (None, mask):
        found = measure(candidate, reference, chosen)
        assert found.worst_index == place
        assert (found.worst_candidate, found.worst_reference, found.max_abs) == (-2.0, 0.0, 2.0)


@pytest.mark.parametrize("size", [1, 3, 1 << 18])
def test_of_equally_large_errors_the_first_is_named(size, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", size)
    reference = np.zeros((2, 4, 3), np.float32)
    candidate = reference.copy()
    candidate[0, 1, 2] = candidate[0, 3, 0] = candidate[1, 0, 0] = 2.0
    assert measure(candidate, reference, None).worst_index == (0, 1, 2)
    assert measure(candidate, reference, np.ones((2, 4), bool)).worst_index == (0, 1, 2)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5), (4, 2), (2,), (8,), (), (1, 2, 4)])
def test_a_tensor_that_is_not_batch_by_seq_is_refused_with_a_mask(shape):
    reference = np.ones(shape, np.float32)
    candidate = reference.copy()
    candidate[(-1,) * len(shape)] = 3
    mask = np.zeros((2, 4), bool)
    mask[0, 0] = True
    place = rf"{re.escape(str(list(shape)))} is not \[batch seq \.\.\.\] for the mask \[2, 4\]"
    with pytest.raises(ValueError, match=place):
        measure(candidate, reference, mask)
    with pytest.raises(ValueError, match=place):
        finite(candidate, mask)
    assert finite(candidate, None)
    whole = measure(candidate, reference, None)
    assert whole.elements == reference.size
    assert whole.worst_index == tuple(n - 1 for n in shape)


def test_no_value_that_is_not_finite_hides_behind_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match="is not"):
        finite(np.full((3, 4), np.nan, np.float32), np.ones((2, 4), bool))


def test_a_zero_reference_has_a_relative_error_only_if_it_is_met():
    zero = np.zeros((2, 3), np.float32)
    assert measure(zero, zero, None).rel_l2 == 0.0
    off = zero.copy()
    off[1, 2] = 1e-30
    found = measure(off, zero, None)
    assert found.rel_l2 is None
    assert found.max_abs == pytest.approx(1e-30)
    assert found.reference_rms == 0


@given(shape=SHAPES, seed=st.integers(0, 10_000), masked=st.booleans(), scale=st.sampled_from([0.0, 1e-3, 1.0, 50.0]))
def test_errors_are_relative_to_the_reference_or_to_the_scale_whichever_is_larger(shape, seed, masked, scale):
    candidate, reference = pair(shape, seed)
    mask = np.ones(shape[:2], bool) if masked else None
    plain, scaled = measure(candidate, reference, mask), measure(candidate, reference, mask, scale=scale)
    c, r = candidate.astype(np.float64), reference.astype(np.float64)
    size = max(np.linalg.norm(r), scale * math.sqrt(r.size))
    assert scaled.rel_l2 == pytest.approx(np.linalg.norm(c - r) / size, rel=1e-12)
    others = set(vars(plain)) - {"rel_l2"}
    assert plain.candidate_error is plain.reference_error is plain.ulps is None
    assert {name: getattr(scaled, name) for name in others} == {name: getattr(plain, name) for name in others}


def test_a_scale_makes_small_values_absolute_and_leaves_large_ones_relative():
    small, large = np.full((4, 9), 1e-3, np.float32), np.full((4, 9), 8.0, np.float32)
    assert measure(small + np.float32(1e-3), small, None).rel_l2 == pytest.approx(1.0)
    assert measure(small + np.float32(1e-3), small, None, scale=1.0).rel_l2 == pytest.approx(1e-3)
    assert measure(large + 2, large, None, scale=1.0).rel_l2 == measure(large + 2, large, None).rel_l2 == 0.25
    assert measure(np.float32(2.5), np.float32(2.0), None, scale=1.0).rel_l2 == 0.25  # a loss
    assert measure(np.float32(0.5), np.float32(0.25), None, scale=1.0).rel_l2 == 0.25


def test_the_scale_counts_compared_elements_only():
    reference = np.zeros((2, 4, 3), np.float32)
    candidate = reference.copy()
    candidate[0, 0] = 3.0
    candidate[1, 3] = 1e9  # padding
    mask = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    assert measure(candidate, reference, mask, scale=1.0).rel_l2 == pytest.approx(math.sqrt(3 * 9.0 / 9))


def test_with_a_scale_a_zero_reference_has_a_relative_error():
    zero = np.zeros((2, 3), np.float32)
    off = zero.copy()
    off[1, 2] = 2.0
    assert measure(off, zero, None).rel_l2 is None
    assert measure(off, zero, None, scale=1.0).rel_l2 == pytest.approx(2 / math.sqrt(6))
    assert measure(zero, zero, None, scale=1.0).rel_l2 == 0.0


def test_equal_tensors_have_no_error_anywhere():
    values = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 4, 3)
    found = measure(values, values.copy(), None)
    assert (found.mean_abs, found.max_abs, found.rel_l2, found.equal_share) == (0, 0, 0, 1)
    assert found.worst_index == (0, 0, 0)


def test_small_errors_on_large_values_are_not_lost():
    reference = np.full((1, 1000), 4096.0, np.float32)
    candidate = np.nextafter(reference, np.float32(np.inf))  # one unit in the last place: 2**-11
    found = measure(candidate, reference, None)
    assert found.mean_abs == found.max_abs == 2**-11
    assert found.rel_l2 == 2**-23
    assert found.equal_share == 0


def test_different_storage_formats_are_compared_by_value():
    reference = np.array([[1.0, 2.0, 3.0]], np.float32)
    assert measure(reference.astype(ml_dtypes.bfloat16), reference, None).mean_abs == 0
    assert measure(np.array([[1.0, 2.0, 3.5]], ml_dtypes.bfloat16), reference, None).max_abs == 0.5


def test_views_are_compared_like_copies():
    base, other = pair((4, 6, 5), 3)
    mask = np.array([[1, 0, 1], [1, 1, 1]], bool)
    views = base[::2, ::2], other[::2, ::2]
    assert not views[0].flags.c_contiguous
    assert measure(*views, mask) == measure(views[0].copy(), views[1].copy(), mask)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        measure(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32), None)


@pytest.mark.parametrize(
    ("shape", "mask"), [((0,), None), ((2, 3, 4), np.zeros((2, 3), bool)), ((2, 3, 0), np.ones((2, 3), bool))]
)
def test_nothing_to_compare_is_no_success(shape, mask):
    with pytest.raises(ValueError, match="nothing to compare"):
        measure(np.ones(shape, np.float32), np.ones(shape, np.float32), mask)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [2, 1 << 18])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_value_that_is_not_finite_is_found_unless_it_is_padding(bad, size, dtype, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", size)
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    values = np.ones((2, 3, 4), dtype)
    assert finite(values, mask)
    values[0, 2, 1] = bad
    assert finite(values, mask)
    assert not finite(values, None)
    values[1, 2, 3] = bad
    assert not finite(values, mask)


# --- against an oracle ------------------------------------------------------------------------------------------------


@given(
    shape=SHAPES,
    seed=st.integers(0, 10_000),
    masked=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16]),
    size=st.sampled_from([1, 2, 3, 7, 1 << 18]),
    scale=st.sampled_from([0.0, 50.0]),
)
def test_both_errors_are_rms_distances_from_the_oracle(shape, seed, masked, dtype, size, scale):
    candidate, reference = pair(shape, seed, dtype)
    generator = np.random.default_rng(seed + 2)
    oracle = reference.astype(np.float64) + generator.normal(size=shape) * 1e-3
    mask = generator.random(shape[:2]) < 0.6 if masked else None
    if mask is not None:
        mask[-1, -1] = True
        oracle[~mask] = np.nan  # padding
    plain = measure(candidate, reference, mask, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE", size)
        found = measure(candidate, reference, mask, scale=scale, oracle=oracle)
    chosen = (
        np.ones(shape, bool)
        if mask is None
        else np.broadcast_to(mask.reshape(*shape[:2], *[1] * (len(shape) - 2)), shape)
    )
    for side, error in ((candidate, found.candidate_error), (reference, found.reference_error)):
        far = side.astype(np.float64)[chosen] - oracle[chosen]
        assert error == pytest.approx(math.sqrt(np.mean(far**2)), rel=1e-12)
    assert (found.elements, found.max_abs, found.worst_index) == (plain.elements, plain.max_abs, plain.worst_index)
    assert found.mean_abs == pytest.approx(plain.mean_abs, rel=1e-12)
    assert found.rel_l2 == pytest.approx(plain.rel_l2, rel=1e-12)


def test_tensors_longer_than_a_slice_are_measured_to_their_end():
    """The real slice size: an error behind each boundary, and none of them lost or counted twice."""
    tokens, width = 3 * module._SLICE // 512 + 5, 512
    reference = np.zeros((1, tokens, width), np.float32)
    candidate, oracle = reference.copy(), reference.astype(np.float64)
    flat, boundaries = candidate.reshape(-1), range(0, reference.size, module._SLICE)
    for start in boundaries:
        flat[start] = 3.0
    flat[-1] = 4.0
    oracle[0, -1, -1] = 1.0
    total = 9.0 * len(boundaries)
    assert len(boundaries) == 4
    for mask in (None, np.ones((1, tokens), bool)):
        found = measure(candidate, reference, mask, oracle=oracle, ulps=True)
        assert found.worst_index == (0, tokens - 1, width - 1)
        assert found.candidate_error == pytest.approx(math.sqrt((total + 9.0) / reference.size), rel=1e-12)
        assert found.reference_error == pytest.approx(math.sqrt(1.0 / reference.size), rel=1e-12)
        assert sum(found.ulps) == found.elements == reference.size
        assert found.ulps[ULP_BINS.index("65-")] == len(boundaries) + 1


def test_no_error_at_all_against_the_oracle_is_zero():
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    found = measure(values + 1, values, None, oracle=values.astype(np.float64))
    assert (found.candidate_error, found.reference_error) == (1.0, 0.0)


def test_errors_smaller_than_float32_resolves_are_not_lost():
    reference = np.full((1, 1000), 1.0, np.float32)
    oracle = np.full((1, 1000), 1.0 + 2.0**-40)
    found = measure(reference, reference, None, oracle=oracle)
    assert found.candidate_error == found.reference_error == 2.0**-40


def test_an_oracle_of_another_shape_is_refused():
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 3\) and \(3, 2\)"):
        measure(ones, ones, None, oracle=np.ones((3, 2)))


# --- in bfloat16 steps ------------------------------------------------------------------------------------------------

PATTERNS = np.arange(1 << 16, dtype=np.uint32) << 16  # every bfloat16, as the float32 it is
FLOATS = PATTERNS.view(np.float32)
EVERY = np.unique(FLOATS[np.isfinite(FLOATS)].astype(np.float64))  # every finite bfloat16 in order; both zeros are one


def test_consecutive_bfloat16_values_have_consecutive_numbers():
    finite_values = FLOATS[np.isfinite(FLOATS)]
    numbers = module._ordinal(finite_values)
    assert len(finite_values) == 2 * 0x7F80
    by_value = dict(zip(finite_values.tolist(), numbers.tolist(), strict=True))
    assert [by_value[value] for value in EVERY.tolist()] == list(range(-0x7F7F, 0x7F80))
    assert module._ordinal(np.array([0.0, -0.0], np.float32)).tolist() == [0, 0]


def test_the_numbers_of_all_patterns_follow_their_sign_and_magnitude():
    """Infinities and NaN patterns too: nothing wraps round at either end."""
    numbers = module._ordinal(FLOATS)
    magnitudes = np.arange(1 << 15)
    assert numbers[: 1 << 15].tolist() == magnitudes.tolist()
    assert numbers[1 << 15 :].tolist() == (-magnitudes).tolist()


def naive_ulps(candidate, reference, near_zero):
    """Bin by bin from the words in `ULP_BINS`."""
    counts = dict.fromkeys(ULP_BINS, 0)
    for c, r in zip(candidate.reshape(-1).tolist(), reference.reshape(-1).tolist(), strict=True):
        apart = abs(int(np.searchsorted(EVERY, c)) - int(np.searchsorted(EVERY, r)))
        if abs(c) < near_zero and abs(r) < near_zero:
            counts["near zero"] += 1
            continue
        for name in ULP_BINS[:-1]:
            first, dash, last = name.partition("-")
            if int(first) <= apart <= (int(last) if last else math.inf if dash else int(first)):
                counts[name] += 1
    return tuple(counts.values())


@given(
    seed=st.integers(0, 10_000),
    masked=st.booleans(),
    size=st.sampled_from([1, 3, 7, 1 << 18]),
    spread=st.sampled_from([1, 4, 70, 40_000]),
    scale=st.sampled_from([0.0, 1.0]),
)
def test_the_bins_hold_what_a_walk_from_value_to_value_counts(seed, masked, size, spread, scale):
    generator = np.random.default_rng(seed)
    shape = (3, 5, 4)
    places = generator.integers(len(EVERY) // 2 - 500, len(EVERY) // 2 + 16_500, shape)  # both signs, up to about 2
    moved = np.clip(places + generator.integers(-spread, spread + 1, shape), 0, len(EVERY) // 2 + 16_500)
    reference, candidate = EVERY[places].astype(np.float32), EVERY[moved].astype(np.float32)
    mask = generator.random(shape[:2]) < 0.6 if masked else np.ones(shape[:2], bool)
    mask[-1, -1] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE", size)
        found = measure(candidate, reference, mask if masked else None, scale=scale, ulps=True)
    near_zero = 2.0**-8 * max(found.reference_rms, scale)
    assert found.ulps == naive_ulps(candidate[mask], reference[mask], near_zero)
    assert sum(found.ulps) == found.elements


def one_row(*pairs):
    """The bins of pairs beside a 1, whose rms makes values below about 2**-8 count as near zero."""
    candidate, reference = (np.array([*side, 1.0], np.float32) for side in zip(*pairs, strict=True))
    found = measure(candidate, reference, None, scale=1.0, ulps=True).ulps
    counts = dict(zip(ULP_BINS, found, strict=True))
    counts["0"] -= 1
    return {name: n for name, n in counts.items() if n}


def test_both_zeros_are_the_same_value():
    zeros = np.array([0.0, -0.0], np.float32)
    assert measure(zeros, zeros[::-1], None, ulps=True).ulps[0] == 2
    assert one_row((0.0, -0.0), (-0.0, 0.0)) == {"near zero": 2}


def test_steps_are_counted_through_zero_and_alike_on_both_sides():
    step = 2.0**-7  # of values from 1 to 2
    assert one_row((1.0, 1.0 + step), (-1.0, -1.0 - step), (1.0 + step, 1.0)) == {"1": 3}
    assert one_row((-1.5, -1.5 - 3 * step), (1.5, 1.5 - 3 * step)) == {"3-4": 2}
    assert one_row((1.0, -1.0)) == {"65-": 1}
    assert one_row((1.0, 1.0 - step / 2)) == {"1": 1}  # half as far, below a power of two


@pytest.mark.parametrize(
    ("apart", "name"),
    [
        (0, "0"),
        (1, "1"),
        (2, "2"),
        (3, "3-4"),
        (4, "3-4"),
        (5, "5-8"),
        (8, "5-8"),
        (9, "9-16"),
        (16, "9-16"),
        (17, "17-64"),
        (64, "17-64"),
        (65, "65-"),
        (127, "65-"),
    ],
)
def test_the_ends_of_the_bins_belong_where_their_names_say(apart, name):
    assert one_row((1.0 + apart * 2.0**-7, 1.0), (-1.0, -1.0 - apart * 2.0**-7)) == {name: 2}


def test_only_pairs_with_both_values_near_zero_are_set_apart():
    edge = 2.0**-8
    assert one_row((edge / 2, -edge / 2)) == {"near zero": 1}
    assert one_row((0.0, 0.0)) == {"near zero": 1}
    assert one_row((edge, edge)) == {"0": 1}
    assert one_row((edge, 0.0)) == {"65-": 1}
    assert one_row((0.0, -edge)) == {"65-": 1}


def test_near_zero_is_relative_to_the_compared_values_of_the_reference():
    large = np.array([[[1024.0, 2.0], [3.0, 3.0]]], np.float32)
    padded = np.array([[1, 0]], bool)
    assert measure(large, large, padded, ulps=True).ulps == (1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert measure(large, large, ~padded, ulps=True).ulps == (2, 0, 0, 0, 0, 0, 0, 0, 0)


def test_steps_are_only_counted_when_asked_for():
    ones = np.ones((2, 3), np.float32)
    assert measure(ones, ones, None).ulps is None
    assert len(measure(ones, ones, None, ulps=True).ulps) == len(ULP_BINS)


def test_an_oracle_by_row_is_the_oracle():
    candidate, reference = pair((3, 4, 5), 0)
    oracle = reference.astype(np.float64) + 1e-3
    by_row = module.ByRow(oracle.shape, lambda row: oracle[row])
    for mask in (None, np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)):
        assert measure(candidate, reference, mask, oracle=by_row) == measure(candidate, reference, mask, oracle=oracle)
    with pytest.raises(ValueError, match="shapes differ"):
        measure(candidate, reference, None, oracle=module.ByRow((3, 4), lambda row: oracle[row]))
