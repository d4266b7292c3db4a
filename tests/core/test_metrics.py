"""Error measures, against plain formulas in float64."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import metrics as module
from modernbert_align.core.metrics import finite, measure

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
    size=st.sampled_from([1, 2, 3, 7, 1 << 21]),
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


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 30, 1 << 21])
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
@pytest.mark.parametrize("size", [1, 4, 5, 11, 1 << 21])
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


@pytest.mark.parametrize("size", [1, 3, 1 << 21])
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
@pytest.mark.parametrize("size", [2, 1 << 21])
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
