"""Measures one probe of both models, however it was recorded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats, finite, measure
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Dtype, Mode, Observation, Record

Mask = npt.NDArray[np.bool_]
Nulls = Mapping[tuple[str, Mode], dict[str, float]]  # (probe, mode) -> variation of the reference -> rel_l2


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a comparison has in common for all probes of one pass.

    Attributes:
        mask: [batch seq], true at real tokens.
    """

    mask: Mask
    dtype: Dtype
    mode: Mode

    def mask_for(self, probe: Probe) -> Mask | None:
        """The mask of a probe's positions; None where all are compared."""
        return self.mask if probe.tokens else None

    def unseen(self, probe: Probe, observation: Observation, reason: str) -> Record:
        """The record of a probe that was not measured."""
        return Record(probe=probe.name, dtype=self.dtype, mode=self.mode, observation=observation, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What else was computed for a probe.

    Attributes:
        oracle: Its value without rounding, or None.
        null_parts: The reference against itself: variation -> rel_l2.
    """

    oracle: Floats | None = None
    null_parts: dict[str, float] = field(default_factory=dict)


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
    """Compare what both models returned at a probe.

    Args:
        ours: Output name (position, where it has none) -> Paddle tensor.
        theirs: The same of the reference's torch tensors.
    """

    def unseen(observation: Observation, reason: str) -> Record:
        return context.unseen(probe, observation, reason)

    omitted = [name for name in ours if name not in theirs and len(ours) > 1]
    if set(theirs) - set(ours) or len(omitted) > (probe.may_omit if len(theirs) == 1 else 0):
        return unseen("extra", f"the candidate returns {', '.join(ours)}, the reference {', '.join(theirs)}")
    for name, r in theirs.items():
        c = ours[name]
        if list(c.shape) != list(r.shape):
            return unseen("shape_mismatch", f"output {name} is {list(c.shape)}, the reference's is {list(r.shape)}")
        if paddle_backend.dtype_name(c) != hf.dtype_name(r):
            return unseen("dtype_mismatch", f"output {name} is {c.dtype}, the reference's is {r.dtype}")
    compared = probe.key or next(iter(theirs))
    if compared not in theirs:
        return unseen("missing", f"the models return {', '.join(theirs)}, not {compared}")
    values, expected = paddle_backend.to_numpy(ours[compared]), hf.to_numpy(theirs[compared])
    mask = context.mask_for(probe)
    try:
        for side, array in (("reference", expected), ("candidate", values)):
            if not finite(array, mask):
                return unseen("nonfinite", f"the {side}'s output has values that are not finite")
        metrics = measure(values, expected, mask, scale=probe.scale, oracle=beside.oracle, ulps=context.dtype == "bf16")
    except ValueError as empty:
        return unseen("empty", str(empty))
    if metrics.reference_error is not None and not math.isfinite(metrics.reference_error):
        return unseen("nonfinite", "the oracle's value is not finite")
    return Record(
        probe=probe.name,
        dtype=context.dtype,
        mode=context.mode,
        observation="compared",
        shape=tuple(expected.shape),
        null_rel_l2=max(beside.null_parts.values(), default=None),
        null_parts=beside.null_parts,
        **vars(metrics),
    )


def rel_l2(probe: Probe, mask: Mask | None, variation: Floats, reference: Floats) -> float | None:
    """Relative distance of a variation of the reference from it; None if either is not finite or nothing compares."""
    if not (finite(variation, mask) and finite(reference, mask)):
        return None
    return measure(variation, reference, mask, scale=probe.scale).rel_l2
