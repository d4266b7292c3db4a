"""What both engines do with the tensors of one probe: the oracle's values in order, and the comparison."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core import compare as core
from modernbert_align.core.compare import Beside, Context, Output
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Mode, Record

Nulls = Mapping[tuple[str, Mode], dict[str, float]]  # (probe, mode) -> variation of the reference -> rel_l2


class Truth:
    """The oracle's values of one comparison, asked for in execution order.

    Isolated values start from what the reference returned at earlier probes, so those are recorded; what no later
    probe can start from is forgotten.
    """

    def __init__(self, oracle: Oracle, batch: Inputs) -> None:
        self._oracle, self._batch = oracle, batch
        self._recorded: dict[str, torch.Tensor] = {}
        self._layer = ""  # the layer just finished: all that the next one starts from
        self._ahead = oracle.accumulated(batch)
        self._current: dict[str, torch.Tensor] = {}

    def record(self, probe: Probe, theirs: Mapping[str, torch.Tensor]) -> None:
        """Keep what the reference returned at a probe."""
        if probe.key:
            return
        if self._layer:
            self._recorded = {self._layer: self._recorded[self._layer]}
        self._recorded[probe.name] = next(iter(theirs.values()))
        self._layer = probe.name if probe.pattern == "layers.{i}" else ""

    def value(self, probe: Probe, mode: Mode) -> Floats | None:
        """The value of a probe, float64; None if an earlier one that it starts from was never seen."""
        if mode == "isolated":
            try:
                return self._oracle.isolated(probe.name, self._batch, self._recorded).numpy()
            except KeyError:
                return None
        while probe.name not in self._current:
            found = next(self._ahead, None)
            if found is None:
                return None
            self._current = dict([found])
        return self._current[probe.name].numpy()


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
