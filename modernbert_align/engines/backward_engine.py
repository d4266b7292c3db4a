"""Compares gradients: of the loss with respect to every module's output, the inputs and every weight.

Accumulated, each model goes forward and back on its own values. Isolated, every module's output is replaced by the
reference's on the way forward and its gradient by the reference's on the way back, so that what is recorded at a module
is the error of the few operations since the last one, and a weight's gradient is the error of its own module.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from modernbert_align.backends import hf, paddle_training, torch_training
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.oracle import Oracle
from modernbert_align.backends.torch_training import OracleTrainee, Trainee
from modernbert_align.core.compare import Beside, Context, Mask, Output, compare, rel_l2
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Dtype, Loss, Record
from modernbert_align.core.table import Entry
from modernbert_align.core.training import Optimizer, backward_probes, losses, projections, taps
from modernbert_align.engines.reference_side import VARIATIONS
from modernbert_align.errors import AlignError

_CANCELLED = 0.01


class Candidate(Protocol):
    """The Paddle model as training sees it; see `backends.paddle_training.Trainee`."""

    def gradients(
        self,
        taps: Sequence[Probe],
        probes: Sequence[Probe],
        projections: Mapping[str, Any] | None,
        given: paddle_training.Given | None = None,
    ) -> paddle_training.Recording:
        """One forward and backward pass."""

    def train(
        self,
        probes: Sequence[Probe],
        entries: Sequence[Entry],
        projections: Mapping[str, Any] | None,
        gradients: Sequence[Mapping[str, Any]] | None,
        settings: Optimizer,
        steps: int,
    ) -> tuple[dict[str, Any], str]:
        """Optimizer steps; the model has its weights back afterwards."""


def run(
    candidate: Candidate,
    reference: torch.nn.Module,
    oracle: Callable[[torch.nn.Module], Oracle],
    batch: Inputs,
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    *,
    prefix: str,
    dtype: Dtype,
) -> tuple[Record, ...]:
    """Run both models forward and backward and measure every gradient in both modes.

    Args:
        candidate: The Paddle model, here or divided among ranks.
        reference: The PyTorch model, in evaluation mode with eager attention.
        oracle: Gives the oracle of a model.
        probes: Those of the forward phase.
        prefix: What module paths of the encoder start with.

    Returns:
        A record for every row of the phase, whatever happened.
    """
    tapped = taps(probes, prefix)
    rows = backward_probes(probes, entries, prefix)
    theirs = Trainee(reference, batch, tapped, probes, entries)
    truth = OracleTrainee(oracle, reference, batch, tapped, probes, entries)
    records: list[Record] = []
    for loss in losses(batch):
        weights = projections(batch, probes, theirs.shapes()) if loss == "projection" else None
        records += _compare(candidate, theirs, truth, batch, tapped, probes, entries, rows, loss, weights, dtype)
    return tuple(records)


def _compare(
    candidate: Candidate,
    theirs: Trainee,
    truth: OracleTrainee,
    batch: Inputs,
    tapped: Sequence[Probe],
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    rows: Sequence[Probe],
    loss: Loss,
    weights: Mapping[str, Floats] | None,
    dtype: Dtype,
) -> list[Record]:
    """All rows of one loss."""
    projected = None if weights is None else {name: torch.from_numpy(values) for name, values in weights.items()}
    expected = theirs.run(projected)
    reference = reference_values(expected)
    mask = batch.attention_mask.astype(bool)
    scales = _scales(expected, entries)
    rows = [replace(row, scale=max(row.scale, scales.get(row.name, 0.0))) for row in rows]
    given = paddle_training.Given(
        values={name: paddle_backend.from_torch(value) for name, value in expected.values.items()},
        gradients={name: paddle_backend.from_torch(value) for name, value in expected.gradients.items()},
    )
    found = []
    for mode in MODES:
        injected = expected if mode == "isolated" else None
        nulls: dict[str, dict[str, float]] = {row.name: {} for row in rows}
        for name in VARIATIONS:
            with torch_training.variation(theirs.model, name):
                varied = reference_values(theirs.run(projected, injected))
            for row in rows:
                nulls[row.name] |= distances(row, mask, {name: varied}, reference)
            del varied
        exact = reference_values(truth.run(projected, injected))
        nulls = {row.name: nulls[row.name] | distances(row, mask, {"oracle": exact}, reference) for row in rows}
        error = ""
        try:
            recording = candidate.gradients(tapped, probes, weights, given if mode == "isolated" else None)
        except AlignError:
            raise
        except Exception as raised:  # noqa: BLE001 - whatever a wrong model raises is a finding about it, not ours
            recording = paddle_training.Recording()
            error = paddle_training.one_line(raised)
        ours = candidate_values(recording, entries)
        context = Context(mask=mask, dtype=dtype, mode=mode, phase="backward", loss=loss)
        for row in rows:
            if row.name not in ours:
                reason = error or "the candidate computes no gradient here"
                found.append(context.unseen(row, "missing", reason))
                continue
            beside = Beside(oracle=hf.to_numpy(exact[row.name]), null_parts=nulls[row.name])
            key = row.key or "0"
            values = Output(
                shape=tuple(reference[row.name].shape),
                dtype=hf.dtype_name(reference[row.name]),
                values=functools.partial(hf.to_numpy, reference[row.name]),
            )
            record = compare(row, context, {key: ours[row.name]}, {key: values}, beside)
            found.append(record.model_copy(update={"scale": row.scale}))
    return found


def distances(
    row: Probe, mask: Mask, variations: Mapping[str, Mapping[str, torch.Tensor]], reference: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """How far each variation of the reference is from it, relatively; without those that cannot be measured.

    The oracle is one of them here: PyTorch sums some gradients in bfloat16, and a candidate that does not must not fail
    for being nearer to the truth. Criterion 3 sees what that would hide.
    """
    expected = hf.to_numpy(reference[row.name])
    found = {
        name: rel_l2(row, mask if row.tokens else None, hf.to_numpy(values[row.name]), expected)
        for name, values in variations.items()
    }
    return {name: distance for name, distance in found.items() if distance is not None}


def _scales(expected: torch_training.Recording, entries: Sequence[Entry]) -> dict[str, float]:
    """What the error of a head's bias is relative to, at least: a hundredth of what its gradient is a sum of.

    Such a sum may cancel: the choices of a question push a classifier's bias in opposite directions, and what is left
    is rounding on both sides.
    """
    found = {}
    for entry in entries:
        if entry.op.stored and len(entry.hf_shape) == 1 and entry.probe in ("head", "logits"):
            terms = expected.gradients[entry.probe].double().flatten(0, -2)  # [terms features]
            found[entry.hf] = _CANCELLED * float(terms.square().sum(dim=0).mean().sqrt())
    return found


def reference_values(recording: torch_training.Recording) -> dict[str, torch.Tensor]:
    """Everything that is compared, by row."""
    return {**recording.gradients, **recording.weights, "loss": recording.loss}


def candidate_values(recording: paddle_training.Recording, entries: Sequence[Entry]) -> dict[str, Output]:
    """The same of the candidate, weights in the reference's layout."""
    found = {name: paddle_training.output(value) for name, value in recording.gradients.items()}
    if recording.loss is not None:
        found["loss"] = paddle_training.output(recording.loss)
    for entry in entries:
        gradient = recording.weights.get(entry.paddle) if entry.op.stored else None
        if gradient is not None:
            found[entry.hf] = paddle_training.output(paddle_training.turned(entry, gradient))
    return found
