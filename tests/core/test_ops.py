"""The operations a table row may name: each moves bits, and each has an inverse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import ops
from modernbert_align.core.ops import OPS, transpose

# Around the switch to strips (1024), around whole strips of 192, and sizes of real models.
ROWS = st.one_of(st.integers(0, 30), st.sampled_from([1023, 1024, 1025, 1151, 1152, 1153, 1344, 2304]))


def numbered(rows, cols, dtype):
    return np.arange(rows * cols, dtype=np.uint64).astype(dtype).reshape(rows, cols)


def test_the_set_of_operations_is_closed():
    assert set(OPS) == {"id", "T", "tie"}
    assert [name for name, op in OPS.items() if not op.stored] == ["tie"]
    assert all(op.name == name and op.inverse in OPS for name, op in OPS.items())


@given(rows=ROWS, cols=st.integers(0, 7), dtype=st.sampled_from(["u2", "u4", "u8"]))
def test_transpose_puts_every_element_where_it_belongs(rows, cols, dtype):
    source = numbered(rows, cols, dtype)
    found = transpose(source)
    assert found.shape == (cols, rows)
    assert found.dtype == source.dtype
    assert found.flags.c_contiguous
    if source.size:  # [c, r] of the result is [r, c] of the source, whose value is r * cols + c
        r, c = np.meshgrid(np.arange(rows), np.arange(cols))
        assert np.array_equal(found, (r * cols + c).astype(dtype))


@pytest.mark.parametrize("rows", [1024, 1025, 1300])
def test_transpose_never_returns_a_view_of_its_source(rows):
    source = numbered(rows, 3, "u4")
    found = transpose(source)
    assert not np.shares_memory(found, source)
    found[:] = 0
    assert source[1, 0] == 3


@pytest.mark.parametrize("rows", [5, 1300])
def test_a_source_that_is_itself_a_view_is_transposed_by_its_values(rows):
    base = numbered(rows * 2, 6, "u4")
    view = base[::2, 1::2]
    assert not view.flags.c_contiguous
    assert np.array_equal(transpose(view), np.array([[row[c] for row in view] for c in range(3)]))


def test_strips_and_the_plain_copy_agree(monkeypatch):
    source = numbered(1500, 5, "u4")
    whole = transpose(source)
    monkeypatch.setattr(ops, "_STRIP", 7)  # 1500 is no multiple of it
    assert np.array_equal(transpose(source), whole)


@given(
    name=st.sampled_from(sorted(OPS)),
    rows=st.one_of(st.integers(1, 9), st.just(1100)),
    cols=st.integers(1, 6),
)
def test_every_operation_is_undone_by_its_inverse(name, rows, cols):
    op, source = OPS[name], numbered(rows, cols, "u4")
    there = op.apply(source)
    assert there.shape == op.shape(source.shape)
    assert np.array_equal(OPS[op.inverse].apply(there), source)


@pytest.mark.parametrize("name", sorted(OPS))
def test_not_a_number_keeps_its_payload(name):
    source = np.array([[0x7FC00001, 0x7F800123], [0xFFC0BEEF, 0x80000000], [1, 2]], dtype=np.uint32)
    moved = OPS[name].apply(source)
    assert sorted(moved.ravel()) == sorted(source.ravel())
    assert moved[0, 1] == (0xFFC0BEEF if name == "T" else 0x7F800123)


def test_shapes_are_reversed_by_the_transpose_only():
    assert OPS["T"].shape((24, 8)) == (8, 24)
    assert OPS["id"].shape((24, 8)) == (24, 8)
    assert OPS["tie"].shape((24, 8)) == (24, 8)
