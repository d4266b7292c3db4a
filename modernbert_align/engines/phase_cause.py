"""Finds out which known mistake a failing candidate makes, whatever was compared."""

from collections.abc import Sequence
from typing import Any

from modernbert_align.backends.hypotheses import Ground
from modernbert_align.core.cause import Cause
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import WeightCheck
from modernbert_align.core.table import Entry
from modernbert_align.core.training import Run
from modernbert_align.core.verdict import Judgement
from modernbert_align.engines.backward_cause import examine_backward
from modernbert_align.engines.cause import examine
from modernbert_align.engines.training_cause import examine_step


def examine_phase(
    run: Run,
    prefix: str,
    candidate: Any,
    ground: Ground,
    batch: Inputs,
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    judgement: Judgement,
    weights: WeightCheck,
) -> Cause | None:
    """Look for the cause of a FAIL of any phase; see `examine`, whose arguments the others are.

    Args:
        prefix: What module paths of the encoder start with.
    """
    if run.phase == "forward":
        return examine(candidate, ground, batch, probes, entries, judgement, weights)
    if run.steps is not None:
        return examine_step(candidate, ground, batch, probes, entries, judgement, weights, steps=run.steps)
    return examine_backward(candidate, ground, batch, probes, entries, judgement, weights, prefix=prefix)
