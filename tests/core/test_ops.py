"""The operations a table row may name: each moves bits, and each has an inverse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import ops
from modernbert_align.core.ops import OPS, TILE, transpose, transpose_into

# Around one tile and two, and sizes of real models.
ROWS = st.one_of(
    st.integers(0, 30), st.sampled_from([TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 1152, 2304])
)
COLS = st.one_of(st.integers(0, 7), st.sampled_from([TILE - 1, TILE, TILE + 1, 3 * TILE]))


def numbered(rows, cols, dtype):
    return np.arange(rows * cols, dtype=np.uint64).astype(dtype).reshape(rows, cols)


def test_the_set_of_operations_is_closed():
    assert set(OPS) == {"id", "T", "tie"}
    assert [name for name, op in OPS.items() if not op.stored] == ["tie"]
    assert all(op.name == name and op.inverse in OPS for name, op in OPS.items())


@given(rows=ROWS, cols=COLS, dtype=st.sampled_from(["u2", "u4", "u8"]))
def test_transpose_puts_every_element_where_it_belongs(rows, cols, dtype):
    source = numbered(rows, cols, dtype)
    found = transpose(source)
    assert found.shape == (cols, rows)
    assert found.dtype == source.dtype
    assert found.flags.c_contiguous
    if source.size:  # [c, r] of the result is [r, c] of the source, whose value is r * cols + c
        r, c = np.meshgrid(np.arange(rows), np.arange(cols))
        assert np.array_equal(found, (r * cols + c).astype(dtype))


@pytest.mark.parametrize("rows", [5, TILE, TILE + 1, 1300])
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


@pytest.mark.parametrize("tile", [1, 7, 1 << 20])
def test_the_size_of_a_tile_changes_nothing(monkeypatch, tile):
    source = numbered(150, 130, "u4")
    whole = transpose(source)
    assert np.array_equal(whole, source.T)
    monkeypatch.setattr(ops, "TILE", tile)
    assert np.array_equal(transpose(source), whole)


def test_a_transpose_into_memory_fills_exactly_that_memory():
    around = np.zeros((140, 90), dtype=np.uint16)
    source = numbered(70, 130, "u2") + 1  # [rows cols]
    transpose_into(around[5:135, 10:80], source)  # a view with strides, inside of something else
    assert np.array_equal(around[5:135, 10:80], source.T)
    around[5:135, 10:80] = 0
    assert not around.any()


@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 67), (64, 128), (100, 130)])
def test_columns_of_a_matrix_are_transposed_where_they_are(first, last):
    source = numbered(80, 130, "u4")
    out = np.empty((last - first, 80), dtype=np.uint32)
    transpose_into(out, source[:, first:last])
    assert all(out[c, r] == r * 130 + first + c for r in range(80) for c in range(last - first))


@given(
    name=st.sampled_from(sorted(OPS)),
    rows=st.one_of(st.integers(1, 9), st.just(TILE + 3)),
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
