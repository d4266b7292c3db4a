"""The oracle's values of a comparison, in the order in which the reference's modules run."""

from collections.abc import Mapping

import torch

from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Mode


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
