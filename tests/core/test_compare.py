"""What two sides returned at one probe, compared without a framework."""

from dataclasses import replace

import numpy as np
import pytest

from modernbert_align.core.compare import Beside, Context, Output, compare
from modernbert_align.core.probes import Probe

PROBE = Probe(name="p", pattern="p", hf="p", paddle="p", fan_in=8, tokens=False)
CONTEXT = Context(mask=np.ones((2, 3), bool), dtype="fp32", mode="isolated")


def output(values, dtype="float32"):
    array = np.asarray(values, np.float32)
    return Output(shape=array.shape, dtype=dtype, values=lambda: array)


def unread(*shape, dtype="float32"):
    """An output whose values must not be asked for."""
    return Output(shape=shape, dtype=dtype, values=lambda: pytest.fail("its values were read"))


def test_only_the_compared_output_is_read():
    ours, theirs = {"0": output([1.5]), "1": unread(4)}, {"0": output([1.0]), "1": unread(4)}
    record = compare(PROBE, CONTEXT, ours, theirs, Beside(oracle=np.array([1.25]), null_parts={"sdpa": 0.5}))
    assert (record.observation, record.mean_abs, record.null_rel_l2) == ("compared", 0.5, 0.5)
    assert (record.candidate_error, record.reference_error) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("other", "observation", "reason"),
    [
        (unread(5), "shape_mismatch", "output 1 is [5], the reference's is [4]"),
        (unread(4, dtype="bfloat16"), "dtype_mismatch", "output 1 is bfloat16, the reference's is float32"),
    ],
)
def test_shapes_and_dtypes_are_checked_before_anything_is_read(other, observation, reason):
    record = compare(PROBE, CONTEXT, {"0": unread(2), "1": other}, {"0": unread(2), "1": unread(4)}, Beside())
    assert (record.observation, record.reason) == (observation, reason)


def test_where_the_reference_returns_nothing_there_is_nothing_to_compare():
    assert compare(PROBE, CONTEXT, {"0": unread(2)}, {}, Beside()).observation == "missing"
    assert compare(replace(PROBE, key="logits"), CONTEXT, {}, {}, Beside()).observation == "missing"


ATTN = replace(PROBE, may_omit=1)  # its second output are the probabilities
BLOCKWISE = replace(CONTEXT, attention="blockwise")


def test_only_eager_attention_has_to_return_probabilities():
    ours, theirs = {"0": output([1.5])}, {"0": output([1.0]), "1": unread(4)}
    assert compare(ATTN, BLOCKWISE, ours, theirs, Beside()).mean_abs == 0.5
    assert compare(ATTN, CONTEXT, ours, theirs, Beside()).observation == "extra"
    assert compare(PROBE, BLOCKWISE, ours, theirs, Beside()).observation == "extra"
    assert compare(replace(ATTN, key="1"), BLOCKWISE, ours, theirs, Beside()).observation == "missing"


@pytest.mark.parametrize("theirs", [{"0": unread(2)}, {"0": unread(2), "1": unread(4)}])
def test_blockwise_attention_that_returns_probabilities_did_not_run(theirs):
    record = compare(ATTN, BLOCKWISE, {"0": unread(2), "1": unread(4)}, theirs, Beside())
    assert (record.observation, record.reason) == (
        "extra",
        "the candidate returns 0, 1: blockwise attention did not run",
    )
