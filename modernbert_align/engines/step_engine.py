"""Compares training: both sides take the same number of AdamW steps from equal weights.

Accumulated, each side follows its own gradients; compared is where that leads: the loss before every step, and after
the last one every weight and both its moments. Isolated, every step is taken with the reference's gradients, so that
what is compared is the optimizer alone, and the loss of the weights that it made.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modernbert_align.backends import hf, paddle_training, torch_training
from modernbert_align.backends.oracle import Oracle
from modernbert_align.backends.torch_training import OracleTrainee, Projections, Trainee
from modernbert_align.core.compare import Beside, Context, Output, compare
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Dtype, Loss, Record
from modernbert_align.core.table import Entry
from modernbert_align.core.training import MOMENTS, Optimizer, losses, projections, step_probes
from modernbert_align.engines.backward_engine import Candidate, distances
from modernbert_align.engines.reference_side import VARIATIONS

Gradients = list[Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Course:
    """Where training led.

    Attributes:
        values: Every row of the phase.
        gradients: Of every step, by Hugging Face name, if kept.
    """

    values: dict[str, torch.Tensor]
    gradients: Gradients


def run(
    candidate: Candidate,
    reference: torch.nn.Module,
    oracle: Callable[[torch.nn.Module], Oracle],
    batch: Inputs,
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    *,
    dtype: Dtype,
    steps: int,
) -> tuple[Record, ...]:
    """Train both models and measure where that led, in both modes. Afterwards both have the weights they had.

    Args:
        candidate: The Paddle model, in evaluation mode (dropout is off), here or divided among ranks.
        reference: The PyTorch model, in evaluation mode with eager attention.
        oracle: Gives the oracle of a model.
        probes: Those of the forward phase.
        steps: How many, at least one.

    Returns:
        A record for every row of the phase, whatever happened.
    """
    settings = Optimizer()
    loss: Loss = losses(batch)[-1]
    follow = functools.partial(_follow, entries=entries, settings=settings, steps=steps)
    trainee = Trainee(copy.deepcopy(reference), batch, (), probes, entries)
    arrays = projections(batch, probes, trainee.shapes()) if loss == "projection" else None
    projected = None if arrays is None else {name: torch.from_numpy(values) for name, values in arrays.items()}
    theirs = follow(trainee, projected, keep=True)
    del trainee
    rows = step_probes(probes, entries, steps)
    mask = batch.attention_mask.astype(bool)
    found = []
    for mode in MODES:
        given = theirs.gradients if mode == "isolated" else None
        nulls: dict[str, dict[str, float]] = {row.name: {} for row in rows}
        for name in VARIATIONS if mode == "accumulated" else ():
            varied = Trainee(copy.deepcopy(reference), batch, (), probes, entries)
            with torch_training.variation(varied.model, name):
                values = follow(varied, projected).values
            for row in rows:
                nulls[row.name] |= distances(row, mask, {name: values}, theirs.values)
            del varied, values
        errors = _errors(follow(OracleTrainee(oracle, reference, batch, (), probes, entries), projected, given), theirs)
        found_ours, error = candidate.train(probes, entries, arrays, given, settings, steps)
        ours = _outputs(found_ours, entries)
        context = Context(mask=mask, dtype=dtype, mode=mode, phase="step", loss=loss)
        for row in rows:
            if row.name not in ours:
                found.append(context.unseen(row, "missing", error or "the candidate has no such value"))
                continue
            expected = theirs.values[row.name]
            values_of = functools.partial(hf.to_numpy, expected)
            output = Output(shape=tuple(expected.shape), dtype=hf.dtype_name(expected), values=values_of)
            exact = expected.double() - errors[row.name]
            parts = nulls[row.name] | distances(row, mask, {"oracle": {row.name: exact}}, theirs.values)
            beside = Beside(oracle=hf.to_numpy(exact), null_parts=parts)
            found.append(compare(row, context, {"0": ours[row.name]}, {"0": output}, beside))
    return tuple(found)


def _errors(exact: _Course, theirs: _Course) -> dict[str, torch.Tensor]:
    """What the reference is off the oracle by, in float32: as precise as the whole in float64, in half the memory."""
    return {name: (value.double() - exact.values[name]).float() for name, value in theirs.values.items()}


def _follow(
    trainee: Trainee,
    projected: Projections,
    given: Gradients | None = None,
    *,
    keep: bool = False,
    entries: Sequence[Entry],
    settings: Optimizer,
    steps: int,
) -> _Course:
    """Train the reference or the oracle; changes the trainee's weights.

    Args:
        given: Gradients to take every step with, instead of its own.
        keep: Keep the gradients of every step.
    """
    masters = torch_training.Masters(trainee.parameters, entries, settings)
    values: dict[str, torch.Tensor] = {}
    kept: Gradients = []
    gradients: Mapping[str, torch.Tensor]
    for n in range(steps):
        if given is None:
            recording = trainee.run(projected)
            values[f"loss.{n + 1}"], gradients = recording.loss, recording.weights
        else:
            values[f"loss.{n + 1}"], gradients = trainee.loss(projected), given[n]
        masters.step(gradients)
        masters.copy_to(trainee.parameters)
        if keep:
            kept.append(gradients)
    return _Course(values=masters.state() | values, gradients=kept)


def _outputs(found: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Output]:
    """Where training led, by row: in the reference's names and layout."""
    outputs = {name: paddle_training.output(value) for name, value in found.items() if name.startswith("loss.")}
    for entry in entries:
        for kind in ("", *(f".{moment}" for moment in MOMENTS)) if entry.op.stored else ():
            value = found.get(f"{entry.paddle}{kind}")
            if value is not None:
                outputs[f"{entry.hf}{kind}"] = paddle_training.output(paddle_training.turned(entry, value))
    return outputs
