"""The values that stand for module outputs in the isolated passes of traces."""

import hashlib

import ml_dtypes
import numpy as np
import pytest

from modernbert_align.core.drawn import draw, drawn_digest

INPUTS = "0" * 64
EXPECTED = "2c4e407b4c6ce1003478198567b65ae3b7796cd2b593072f1f47d92c28874305"


def test_they_are_the_same_on_every_machine():
    """Integers and one exact scaling: a change here makes new traces incomparable with old ones."""
    values = draw(INPUTS, "layers.0.attn", (1000,), "fp32")
    assert hashlib.sha256(values.tobytes()).hexdigest() == EXPECTED
    sums = values.astype(np.float64) * 2**16
    assert (sums == np.round(sums)).all()
    assert np.abs(values).max() < 6


def test_they_are_like_normal_numbers():
    values = draw(INPUTS, "p", (300, 400), "fp32")
    assert values.shape == (300, 400)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert np.unique(values).size > 80_000


def test_every_probe_and_every_batch_has_its_own():
    first = draw(INPUTS, "layers.0", (8,), "fp32")
    assert (first == draw(INPUTS, "layers.0", (8,), "fp32")).all()
    assert (first != draw(INPUTS, "layers.1", (8,), "fp32")).any()
    assert (first != draw("1" * 64, "layers.0", (8,), "fp32")).any()
    assert drawn_digest(INPUTS) != drawn_digest("1" * 64)


@pytest.mark.parametrize("count", [1, 65_535, 65_536, 65_537])
def test_how_many_are_asked_for_does_not_change_them(count):
    assert (draw(INPUTS, "p", (count,), "fp32") == draw(INPUTS, "p", (70_000,), "fp32")[:count]).all()


def test_in_bf16_they_are_the_same_rounded():
    wide, narrow = (draw(INPUTS, "p", (2, 3), dtype) for dtype in ("fp32", "bf16"))
    assert narrow.dtype == ml_dtypes.bfloat16
    assert (narrow == wide.astype(ml_dtypes.bfloat16)).all()
