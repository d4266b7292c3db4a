"""Moving tensors a piece at a time: the same as moving them whole, in memory that is used again and not too early."""

import contextlib
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core import stream as module
from modernbert_align.core.cast import CastLoss
from modernbert_align.core.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, unsigned
from modernbert_align.core.ops import OPS, TILE
from modernbert_align.core.plan import PlanItem
from modernbert_align.core.stream import PIECE_BYTES, RING, Scratch, pieces

DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16"])


def numbered(start, shape, dtype):
    """Every element another one, as far as the width allows."""
    return np.arange(start, start + math.prod(shape), dtype=np.uint64).astype(unsigned(dtype)).reshape(shape)


def checkpoint_of(arrays, dtype):
    """A checkpoint in memory."""
    tensors = {
        name: TensorInfo(name=name, dtype=dtype, shape=array.shape, path=Path("memory"), offset=0)
        for name, array in arrays.items()
    }
    return Checkpoint(folder=Path("memory"), tensors=tensors, files=(), arrays=arrays)


def item_of(arrays, op, dtype, target_dtype="", rows=None):
    """The plan to stack `arrays` and move them, or to move some rows of the only one."""
    shapes = [array.shape for array in arrays.values()]
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
    if rows is None:
        target = OPS[op].shape(whole)
    else:
        target = (rows[1] - rows[0], whole[0]) if op == "T" else (rows[1] - rows[0], *whole[1:])
    return PlanItem(
        sources=tuple(arrays),
        target="target",
        op=OPS[op],
        rows=rows,
        source_dtype=dtype,
        target_dtype=target_dtype or dtype,
        source_shape=whole,
        target_shape=target,
        shape_blind=False,
    )


def moved(arrays, op, dtype, *, scratch=None, **options):
    """All pieces put together, in the shape of the target; each is copied when it is given."""
    item = item_of(arrays, op, dtype, **options)
    found = pieces(checkpoint_of(arrays, dtype), item, scratch or Scratch(), CastLoss())
    flat = [piece.copy() for piece in found]
    assert all(piece.ndim == 1 for piece in flat)
    return np.concatenate([*flat, np.empty(0, unsigned(item.target_dtype))]).reshape(item.target_shape)


@pytest.fixture(scope="module")
def in_pieces_of():
    """Gives a context in which pieces have another size."""

    @contextlib.contextmanager
    def patched(size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PIECE_BYTES", size)
            yield

    return patched


# --- right ------------------------------------------------------------------------------------------------------------


@given(
    parts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    rest=st.lists(st.integers(0, 4), max_size=2),
    dtype=DTYPES,
    size=st.sampled_from([8, 24, 56, PIECE_BYTES]),
)
def test_copies_are_stacked_whole_and_in_order(in_pieces_of, parts, rest, dtype, size):
    arrays = {f"part {n}": numbered(100 * n, (rows, *rest), dtype) for n, rows in enumerate(parts)}
    with in_pieces_of(size):
        found = moved(arrays, "id", dtype)
    assert np.array_equal(found, np.concatenate(list(arrays.values())))


@given(
    parts=st.lists(st.sampled_from([0, 1, 3, TILE - 1, TILE, 2 * TILE + 5]), min_size=1, max_size=3),
    cols=st.sampled_from([0, 1, 5, TILE, TILE + 1, 3 * TILE + 7]),
    dtype=DTYPES,
    size=st.sampled_from([64, 40_000, PIECE_BYTES]),
)
def test_a_stack_is_transposed_whole(in_pieces_of, parts, cols, dtype, size):
    arrays = {f"part {n}": numbered(5000 * n, (rows, cols), dtype) for n, rows in enumerate(parts)}
    with in_pieces_of(size):
        found = moved(arrays, "T", dtype)
    assert np.array_equal(found, np.concatenate(list(arrays.values())).T)


@given(data=st.data(), rest=st.lists(st.integers(0, 4), max_size=2), dtype=DTYPES, size=st.sampled_from([8, 56]))
def test_rows_are_copied_out_of_a_stack(in_pieces_of, data, rest, dtype, size):
    source = numbered(0, (9, *rest), dtype)
    first = data.draw(st.integers(0, 9))
    last = data.draw(st.integers(first, 9))
    with in_pieces_of(size):
        found = moved({"whole": source}, "id", dtype, rows=(first, last))
    assert np.array_equal(found, source[first:last])


@given(
    data=st.data(),
    rows=st.sampled_from([1, 5, TILE + 1]),
    cols=st.sampled_from([7, 3 * TILE + 2]),
    dtype=DTYPES,
    size=st.sampled_from([64, 40_000]),
)
def test_rows_are_transposed_out_of_a_stack(in_pieces_of, data, rows, cols, dtype, size):
    source = numbered(0, (rows, cols), dtype)  # Paddle's [in, out]
    first = data.draw(st.integers(0, cols))
    last = data.draw(st.integers(first, cols))
    with in_pieces_of(size):
        found = moved({"whole": source}, "T", dtype, rows=(first, last))
    assert np.array_equal(found, source.T[first:last])


def test_a_single_number_and_nothing_at_all_are_moved():
    assert moved({"a": np.array(7, np.uint32)}, "id", "F32").tolist() == 7
    assert moved({"a": np.empty((0,), np.uint32)}, "id", "F32").tolist() == []
    assert moved({"a": np.empty((2, 0), np.uint32)}, "T", "F32").shape == (0, 2)


@pytest.mark.parametrize("op", ["id", "T"])
def test_a_cast_gives_the_same_whatever_the_pieces(in_pieces_of, op):
    values = np.random.default_rng(5).normal(size=(5, 200)).astype(np.float32)
    values[3, 150] = np.inf if op == "id" else np.nan
    arrays = {"a": values.view(np.uint32)}
    expected = (values if op == "id" else values.T).astype(ml_dtypes.bfloat16)
    losses = []
    for size in (64, PIECE_BYTES):
        with in_pieces_of(size):
            assert np.array_equal(moved(arrays, op, "F32", target_dtype="BF16"), expected.view(np.uint16))
            item, loss = item_of(arrays, op, "F32", "BF16"), CastLoss()
            count = sum(1 for _ in pieces(checkpoint_of(arrays, "F32"), item, Scratch(), loss))
            assert (count > 1) == (size == 64)
            losses.append(loss)
    assert losses[0] == losses[1]
    assert losses[0].elements == 1000
    assert losses[0].max_abs > 0


def test_what_a_piece_loses_is_added_to_what_was_lost_before():
    loss = CastLoss(elements=7, overflow=2)
    arrays = {"a": np.array([1e39, 1.0]).view(np.uint64)}
    list(pieces(checkpoint_of(arrays, "F64"), item_of(arrays, "id", "F64", "F32"), Scratch(), loss))
    assert (loss.elements, loss.overflow, loss.overflow_max) == (9, 3, 1e39)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_a_large_copy_comes_in_pieces_of_one_size(dtype):
    elements = 3 * PIECE_BYTES // DTYPE_BYTES[dtype] + 5
    arrays = {"a": numbered(0, (elements,), dtype)}
    item = item_of(arrays, "id", dtype)
    sizes = [piece.nbytes for piece in pieces(checkpoint_of(arrays, dtype), item, Scratch(), CastLoss())]
    assert sizes == [PIECE_BYTES] * 3 + [5 * DTYPE_BYTES[dtype]]


def test_a_large_transpose_comes_in_whole_tiles_of_about_that_size():
    arrays = {"a": np.zeros((1000, 1100), np.uint32)}
    found = pieces(checkpoint_of(arrays, "F32"), item_of(arrays, "T", "F32"), Scratch(), CastLoss())
    widths = [piece.size // 1000 for piece in found]
    assert widths == [128] * 8 + [76]
    assert all(width % TILE == 0 for width in widths[:-1])


def test_a_matrix_too_tall_for_a_piece_comes_a_tile_at_a_time():
    rows = PIECE_BYTES // 4 // TILE + 100
    source = numbered(0, (rows, 2 * TILE + 1), "F32")
    item = item_of({"a": source}, "T", "F32")
    sizes = [p.size // rows for p in pieces(checkpoint_of({"a": source}, "F32"), item, Scratch(), CastLoss())]
    assert sizes == [TILE, TILE, 1]
    assert np.array_equal(moved({"a": source}, "T", "F32"), source.T)


@pytest.mark.parametrize("op", ["id", "T"])
def test_a_piece_keeps_what_it_holds_while_the_ring_comes_round(in_pieces_of, op):
    source = numbered(0, (4, 40 * TILE), "F32")
    expected = (source if op == "id" else source.T).reshape(-1)
    held = []
    with in_pieces_of(2048):
        start = 0
        item = item_of({"a": source}, op, "F32")
        for piece in pieces(checkpoint_of({"a": source}, "F32"), item, Scratch(), CastLoss()):
            held = [*held, (start, piece)][-RING:]
            start += piece.size
            for begin, earlier in held:
                assert np.array_equal(earlier, expected[begin : begin + earlier.size])
    assert start == expected.size
    assert len(held) == RING


def test_memory_is_used_again():
    scratch = Scratch()
    buffers = [scratch.piece(5, "F32") for _ in range(2 * RING)]
    for number in range(RING):
        assert np.shares_memory(buffers[number], buffers[number + RING])
        assert not any(np.shares_memory(buffers[number], other) for other in buffers[number + 1 : number + RING])
    large, small = scratch.matrix(1000, "F64"), scratch.matrix(10, "BF16")
    assert np.shares_memory(large, small)
    assert (large.size, large.dtype, small.size, small.dtype) == (1000, np.uint64, 10, np.uint16)


def test_memory_grows_when_more_is_needed():
    scratch = Scratch()
    for elements in (3, PIECE_BYTES, 2 * PIECE_BYTES):
        assert scratch.piece(elements, "F64").size == scratch.matrix(elements, "F64").size == elements


def test_one_scratch_serves_tensors_of_any_order_and_dtype():
    scratch = Scratch()
    for shape, dtype, op in (
        ((70, 90), "F32", "T"),
        ((3, 2), "F64", "T"),
        ((5,), "BF16", "id"),
        ((99, 98), "F16", "T"),
    ):
        source = numbered(1, shape, dtype)
        expected = source.T if op == "T" else source
        assert np.array_equal(moved({"a": source}, op, dtype, scratch=scratch), expected)
