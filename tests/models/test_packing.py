"""The packer: nothing lost, nothing repeated, rows full; what it refuses."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_align.errors import UsageError
from modernbert_align.models.modernbert import Packer


def unpacked(rows, key="input_ids"):
    """The sequences of rows, in order."""
    return [part.tolist() for row in rows for part in np.split(row[key][0], row["cu_seqlens"][1:-1])]


def documents(count, seed=0):
    """Lengths as of web text: most are some hundred tokens, a few are thousands."""
    lengths = np.random.default_rng(seed).lognormal(6.0, 1.0, count).astype(int).clip(8, 8192)
    return [np.arange(length) for length in lengths]


@st.composite
def streams(draw):
    max_tokens = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, max_tokens), max_size=60))
    start = 0
    sequences = []
    for length in lengths:  # some ids come twice in the stream, some sequences are alike
        start = draw(st.sampled_from([start, 0]))
        sequences.append(list(range(start, start + length)))
        start += length
    return sequences, max_tokens, draw(st.integers(1, 12))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(streams())
def test_every_sequence_comes_out_once_and_no_row_is_too_long(drawn):
    sequences, max_tokens, look_ahead = drawn
    packer = Packer(iter(sequences), max_tokens, look_ahead=look_ahead)
    rows = list(packer)
    assert Counter(map(tuple, unpacked(rows))) == Counter(map(tuple, sequences))
    totals = [row["input_ids"].shape[1] for row in rows]
    assert all(total <= max_tokens for total in totals)
    assert packer.rows == len(rows)
    assert packer.tokens == sum(totals) == sum(map(len, sequences))
    assert packer.efficiency == (sum(totals) / (len(rows) * max_tokens) if rows else None)
    for row in rows:
        assert row["cu_seqlens"][0] == 0
        assert row["cu_seqlens"][-1] == row["input_ids"].shape[1]
        lengths = np.diff(row["cu_seqlens"])
        assert (lengths > 0).all()
        assert row["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(streams())
def test_a_sequence_waits_for_no_more_rows_than_the_look_ahead(drawn):
    sequences, max_tokens, look_ahead = drawn
    rows = []
    entered = []

    def stream():
        for number, sequence in enumerate(sequences):
            entered.append(len(rows))
            yield {"input_ids": sequence, "labels": number}

    for row in Packer(stream(), max_tokens, look_ahead=look_ahead):
        rows.append(row["labels"])
        assert len(entered) - sum(map(len, rows)) <= look_ahead
    for place, numbers in enumerate(rows):
        assert all(place - entered[number] <= look_ahead for number in numbers)


def test_rows_are_the_same_each_time():
    packer = Packer(documents(300))
    first, second = list(packer), list(packer)
    assert packer.rows == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("max_tokens", "least"), [(8192, 0.99), (1024, 0.98)])
def test_documents_of_common_lengths_fill_rows(max_tokens, least):
    packer = Packer((ids[:max_tokens] for ids in documents(5000)), max_tokens)
    for _ in packer:
        pass
    assert packer.efficiency > least


def test_a_longer_look_ahead_fills_rows_better():
    found = []
    for look_ahead in (1, 8, 64):
        packer = Packer((ids[:1024] for ids in documents(2000)), 1024, look_ahead=look_ahead)
        assert list(packer)
        found.append(packer.efficiency)
    assert found == sorted(set(found))


def test_longest_that_fits_comes_next():
    rows = list(Packer([[1] * 5, [2] * 2, [3] * 4, [4] * 6, [5] * 1], 10))
    assert unpacked(rows) == [[1] * 5, [3] * 4, [5], [2] * 2, [4] * 6]
    assert [row["cu_seqlens"].tolist() for row in rows] == [[0, 5, 9, 10], [0, 2, 8]]


def test_dtypes_are_the_models():
    (row,) = Packer([[1, 2], (3,), np.array([4, 5], dtype=np.int32)])
    assert {key: (str(value.dtype), value.shape) for key, value in row.items()} == {
        "input_ids": ("int64", (1, 5)),
        "position_ids": ("int64", (1, 5)),
        "cu_seqlens": ("int32", (4,)),
    }


def test_rows_come_before_the_stream_ends():
    def endless():
        while True:
            yield [7] * 30

    row = next(iter(Packer(endless(), 100, look_ahead=4)))
    assert row["cu_seqlens"].tolist() == [0, 30, 60, 90]


def test_labels_of_tokens_travel_with_them():
    sequences = [list(range(start, start + length)) for start, length in ((0, 7), (50, 3), (80, 9), (20, 1))]
    rows = list(Packer([{"input_ids": ids, "labels": [i + 1000 for i in ids], "other": 1} for ids in sequences], 10))
    for row in rows:
        np.testing.assert_array_equal(row["labels"], row["input_ids"] + 1000)
        assert row["labels"].dtype == np.int64


@pytest.mark.parametrize(("kind", "dtype"), [(int, "int64"), (float, "float32")])
def test_labels_of_sequences_travel_with_them(kind, dtype):
    rows = list(Packer([{"input_ids": [n] * n, "labels": kind(n)} for n in (7, 3, 9, 1)], 10))
    assert len(rows) == 2
    for row in rows:
        assert str(row["labels"].dtype) == dtype
        np.testing.assert_array_equal(row["labels"], row["input_ids"][0, row["cu_seqlens"][:-1]])


def test_too_long_a_sequence_is_refused_unless_split():
    long = {"input_ids": list(range(25)), "labels": list(range(100, 125))}
    with pytest.raises(UsageError, match="sequence 1 of the stream has 25 tokens, a row has 10") as refused:
        list(Packer([{"input_ids": [7], "labels": [8]}, long], 10))
    assert "split" in refused.value.hint
    rows = list(Packer([long], 10, too_long="split"))
    assert unpacked(rows) == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert unpacked(rows, "labels") == [list(range(100, 110)), list(range(110, 120)), list(range(120, 125))]
    assert unpacked(rows, "position_ids") == [list(range(10)), list(range(10)), list(range(5))]


def test_splitting_a_sequence_with_one_label_is_refused():
    with pytest.raises(UsageError, match="one label"):
        list(Packer([{"input_ids": list(range(11)), "labels": 1}], 10, too_long="split"))


@pytest.mark.parametrize(
    ("sequence", "words"),
    [
        ([], "at least one token id"),
        ([0.5], "integers"),
        ([[1, 2]], "at least one token id"),
        ("text", "integers"),
        ({"ids": [1]}, "without input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "each of its 2 tokens"),
        ({"input_ids": [1, 2], "labels": [0.5, 1.0]}, "each of its 2 tokens"),
        ({"input_ids": [1, 2], "labels": [1, 1]}, "has labels per token, those before have no labels"),
        ({"input_ids": [1, 2], "labels": 0.5}, "has a fraction as label"),
    ],
)
def test_unusable_sequence_is_refused_by_its_number(sequence, words):
    with pytest.raises(UsageError, match=words) as refused:
        list(Packer([[1, 2], sequence]))
    assert "sequence 1 of the stream" in refused.value.message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 8192.0}, "max_tokens"),
        ({"look_ahead": 0}, "look_ahead"),
        ({"look_ahead": True}, "look_ahead"),
        ({"too_long": "truncate"}, "one of refuse, split"),
    ],
)
def test_unusable_argument_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        Packer([], **arguments)


def test_packing_needs_no_framework():
    code = "import sys; from modernbert_align.models.modernbert import Packer; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
