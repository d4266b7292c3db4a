"""Compares the tensors that both models returned at one probe, whichever engine recorded them."""

import functools
from collections.abc import Mapping
from typing import Any

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core import compare as core
from modernbert_align.core.compare import Beside, Context, Output
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Record


def compare(
    probe: Probe, context: Context, ours: Mapping[str, Any], theirs: Mapping[str, Any], beside: Beside
) -> Record:
    """Compare what both models returned at a probe; see `core.compare.compare`.

    Args:
        ours: Output name (position, where it has none) -> Paddle tensor.
        theirs: The same of the reference's torch tensors.
    """
    return core.compare(probe, context, _outputs(paddle_backend, ours), _outputs(hf, theirs), beside)


def _outputs(backend: Any, tensors: Mapping[str, Any]) -> dict[str, Output]:
    return {
        name: Output(
            shape=tuple(tensor.shape),
            dtype=backend.dtype_name(tensor),
            values=functools.partial(backend.to_numpy, tensor),
        )
        for name, tensor in tensors.items()
    }
