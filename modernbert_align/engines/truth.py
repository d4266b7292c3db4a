"""The oracle's values of a comparison, in the order in which the reference's modules run."""

from collections.abc import Mapping

import torch

from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import ByRow, Floats
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

    def value(self, probe: Probe, mode: Mode) -> Floats | ByRow | None:
        """The value of a probe, float64; None if an earlier one that it starts from was never seen."""
        logits = self._recorded.get("logits")
        if logits is not None and logits.ndim > 2 and probe.name in ("logits", "output"):
            return self._by_row(probe.name, mode, tuple(logits.shape))
        if mode == "isolated":
            try:
                return self._oracle.isolated(probe.name, self._batch, self._recorded).numpy()
            except KeyError:
                return None
        found = self._accumulated(probe.name)
        return None if found is None else found.numpy()

    def _accumulated(self, probe: str) -> torch.Tensor | None:
        while probe not in self._current:
            found = next(self._ahead, None)
            if found is None:
                return None
            self._current = dict([found])
        return self._current[probe]

    def _by_row(self, probe: str, mode: Mode, shape: tuple[int, ...]) -> ByRow | None:
        """Logits of every token, a sequence at a time: with a whole vocabulary they are larger than all else."""
        if mode == "isolated" and probe == "output":
            logits = self._recorded["logits"]
            return ByRow(shape, lambda row: logits[row].to(torch.float64).numpy())
        head = self._recorded.get("head") if mode == "isolated" else self._accumulated("head")
        return None if head is None else ByRow(shape, lambda row: self._oracle.logits(head[row : row + 1])[0].numpy())
