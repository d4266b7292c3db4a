"""Compares what both models returned at one probe, whichever framework or file the values come from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modernbert_align.core.metrics import ByRow, Floats, finite, measure
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Attention, Dtype, Loss, Mode, Observation, Phase, Record

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor that a module returned.

    Attributes:
        dtype: Without its framework's name, for example `bfloat16`.
        values: Gives the values as float32 (exact for half precision) or float64; asked only for what is compared.
    """

    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], Floats]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a comparison has in common for all probes of one pass.

    Attributes:
        mask: [batch seq], true at real tokens.
        attention: Of the candidate; other than eager attention has no probabilities to return.
    """

    mask: Mask
    dtype: Dtype
    mode: Mode
    phase: Phase = "forward"
    loss: Loss | None = None
    attention: Attention = "eager"

    def mask_for(self, probe: Probe) -> Mask | None:
        """The mask of a probe's positions; None where all are compared."""
        return self.mask if probe.tokens else None

    def unseen(self, probe: Probe, observation: Observation, reason: str) -> Record:
        """The record of a probe that was not measured."""
        return self.record(probe, observation=observation, reason=reason)

    def record(self, probe: Probe, **measured: Any) -> Record:
        """A record of a probe."""
        return Record(probe=probe.name, dtype=self.dtype, mode=self.mode, phase=self.phase, loss=self.loss, **measured)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What else was computed for a probe.

    Attributes:
        oracle: Its value without rounding, or None.
        null_parts: The reference against itself: variation -> rel_l2.
    """

    oracle: Floats | ByRow | None = None
    null_parts: Mapping[str, float] = field(default_factory=dict)


def compare(
    probe: Probe, context: Context, ours: Mapping[str, Output], theirs: Mapping[str, Output], beside: Beside
) -> Record:
    """Compare what both models returned at a probe.

    Args:
        ours: The candidate's outputs: name (position, where it has none) -> output.
        theirs: The same of the reference.
    """

    def unseen(observation: Observation, reason: str) -> Record:
        return context.unseen(probe, observation, reason)

    if not theirs:
        return unseen("missing", "the reference returned no tensor here")
    if probe.may_omit and context.attention != "eager" and len(ours) > 1:
        return unseen("extra", f"the candidate returns {', '.join(ours)}: {context.attention} attention did not run")
    # What follows the first output is not compared, and either side may have a reason to leave it out.
    omitted = [name for name in ours if name not in theirs and len(ours) > 1]
    lacking = [name for name in theirs if name not in ours]
    may_omit = probe.may_omit if len(theirs) == 1 else 0
    may_lack = probe.may_omit if len(ours) == 1 and context.attention != "eager" else 0
    if len(omitted) > may_omit or len(lacking) > may_lack:
        return unseen("extra", f"the candidate returns {', '.join(ours)}, the reference {', '.join(theirs)}")
    for name in (name for name in theirs if name not in lacking):
        c, r = ours[name], theirs[name]
        if c.shape != r.shape:
            return unseen("shape_mismatch", f"output {name} is {list(c.shape)}, the reference's is {list(r.shape)}")
        if c.dtype != r.dtype:
            return unseen("dtype_mismatch", f"output {name} is {c.dtype}, the reference's is {r.dtype}")
    compared = probe.key or next(iter(theirs))
    if compared not in theirs or compared in lacking:
        return unseen("missing", f"the models return {', '.join(theirs)}, not {compared}")
    values, expected = ours[compared].values(), theirs[compared].values()
    mask = context.mask_for(probe)
    try:
        for side, array in (("reference", expected), ("candidate", values)):
            if not finite(array, mask):
                return unseen("nonfinite", f"the {side}'s output has values that are not finite")
        ulps = context.dtype == "bf16" and not probe.float32
        metrics = measure(values, expected, mask, scale=probe.scale, oracle=beside.oracle, ulps=ulps)
    except ValueError as empty:
        return unseen("empty", str(empty))
    if metrics.reference_error is not None and not math.isfinite(metrics.reference_error):
        return unseen("nonfinite", "the oracle's value is not finite")
    return context.record(
        probe,
        observation="compared",
        shape=tuple(expected.shape),
        null_rel_l2=max(beside.null_parts.values(), default=None),
        null_parts=dict(beside.null_parts),
        **vars(metrics),
    )


def rel_l2(probe: Probe, mask: Mask | None, variation: Floats, reference: Floats) -> float | None:
    """Relative distance of a variation of the reference from it; None if either is not finite or nothing compares."""
    if not (finite(variation, mask) and finite(reference, mask)):
        return None
    return measure(variation, reference, mask, scale=probe.scale).rel_l2
