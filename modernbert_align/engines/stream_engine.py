"""Runs every forward pass of a comparison in lock-step and measures each probe as soon as all have reached it.

Seven passes run side by side: those of the reference (`reference_side`), and the candidate's on its own values
(accumulated) and with every probe's output replaced by the reference's (isolated). Nothing but the outputs of the
current probe is held, so memory is that of the models and a few activations. A candidate can also run beside a
recording of the reference, which gives the same figures for two forward passes.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
import torch

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.compare import Context
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Attention, Dtype, Mode, Record
from modernbert_align.engines import reference_side
from modernbert_align.engines.pair import compare
from modernbert_align.engines.passes import Outputs, Pass, hooked, outputs_of, stopping
from modernbert_align.engines.reference_side import Expected, Reference


def run(
    candidate: Any,
    reference: torch.nn.Module,
    oracle: Oracle,
    batch: Inputs,
    probes: Sequence[Probe],
    dtype: Dtype,
    attention: Attention = "eager",
) -> tuple[Record, ...]:
    """Run both models and measure every probe in both modes.

    Args:
        candidate: The Paddle model, in evaluation mode.
        reference: The PyTorch model, in evaluation mode with eager attention.
        attention: Of the candidate.

    Returns:
        A record for every probe and mode, whatever happened.
    """
    with reference_side.live(reference, batch, probes, oracle) as running:
        return run_beside(running, candidate, batch, probes, dtype, attention)


def run_beside(
    reference: Reference,
    candidate: Any,
    batch: Inputs,
    probes: Sequence[Probe],
    dtype: Dtype,
    attention: Attention = "eager",
) -> tuple[Record, ...]:
    """Run the candidate beside one run of the reference, live or recorded, and measure every probe in both modes.

    Args:
        batch, probes: What the reference ran on and where it was looked at.

    Returns:
        A record for every probe and mode, whatever happened.
    """
    with candidate_side(candidate, batch, probes, reference.absent) as ours:
        return measure(reference, ours, batch, probes, dtype, attention)


def measure(
    reference: Reference,
    ours: "CandidateSide",
    batch: Inputs,
    probes: Sequence[Probe],
    dtype: Dtype,
    attention: Attention = "eager",
) -> tuple[Record, ...]:
    """Measure every probe in both modes; see `run_beside`.

    Args:
        ours: Both passes of the candidate.
    """
    mask = batch.attention_mask.astype(bool)
    contexts = {mode: Context(mask=mask, dtype=dtype, mode=mode, attention=attention) for mode in MODES}
    records: dict[tuple[str, Mode], Record] = {}
    for expected in reference.steps():
        probe = expected.probe
        for mode in MODES:
            outputs = ours.reach(expected, mode)
            if outputs is not None:
                records[probe.name, mode] = compare(
                    probe, contexts[mode], outputs, expected.outputs, expected.beside[mode]
                )
    ours.finish()
    return tuple(
        _final(probe, contexts[mode], records.get((probe.name, mode)), ours, reference)
        for mode in MODES
        for probe in probes
    )


class CandidateSide:
    """Both passes of a candidate.

    Attributes:
        absent: Probe -> why the candidate cannot have it.
        passes: By mode.
    """

    def __init__(self, passes: dict[Mode, Pass], absent: dict[str, str]) -> None:
        self.passes, self.absent = passes, absent
        self._finished: dict[Mode, set[str]] = {mode: set() for mode in MODES}

    def reach(self, expected: Expected, mode: Mode) -> Outputs | None:
        """Run one pass to the probe that the reference has reached.

        Returns:
            What the candidate returned there (of a probe with a key: at its end), as Paddle tensors; None if it went
            past it without, or cannot have it.
        """
        probe, one = expected.probe, self.passes[mode]
        if probe.key:
            one.finish()
            return one.outputs
        if probe.name in self.absent:
            return None
        outputs = one.advance(probe.name, self._finished[mode])
        self._finished[mode].add(probe.name)
        if outputs is not None and mode == "isolated":
            one.replace([paddle_backend.from_torch(value) for value in list(expected.outputs.values())[: len(outputs)]])
        return outputs

    def finish(self) -> None:
        """Run both passes to their end."""
        for one in self.passes.values():
            one.finish()


@contextmanager
def candidate_side(
    candidate: Any, batch: Inputs, probes: Sequence[Probe], skipped: Collection[str]
) -> Iterator[CandidateSide]:
    """Both passes of a candidate, about to start; hooks are removed at the end, whatever happened.

    Args:
        skipped: Probes that the reference cannot have, so the passes do not stop there.
    """
    layers, absent = hooked(probes, dict(candidate.named_sublayers()), "candidate")
    place = paddle_backend.places(candidate, batch)
    places = {name: place(layer) for name, layer in layers.items() if name not in skipped}
    passes = {mode: Pass(lambda: paddle_outputs(candidate(**paddle_backend.inputs(batch)))) for mode in MODES}
    with paddle.no_grad(), stopping(passes.values(), places, paddle_outputs):
        yield CandidateSide(passes, absent)


def paddle_outputs(output: Any) -> dict[str, Any]:
    """The tensors that a Paddle layer returned: name (position, where it has none) -> tensor."""
    return outputs_of(output, paddle.Tensor)


def _final(
    probe: Probe, context: Context, record: Record | None, candidate: CandidateSide, reference: Reference
) -> Record:
    """The record of a probe, once it is known how often each side ran it."""
    absent = reference.absent.get(probe.name) or candidate.absent.get(probe.name)
    if absent is not None:
        return context.unseen(probe, "missing", absent)
    one = candidate.passes[context.mode]
    ours, theirs = one.counts.get(probe.name, 0), reference.counts.get(probe.name, 0)
    if not probe.key and record is not None and (ours > 1 or theirs > 1):
        return context.unseen(probe, "extra", f"the candidate ran this module {ours} times, the reference {theirs}")
    if record is None:
        error = reference.error or one.error
        if ours and theirs and not error:
            return context.unseen(probe, "missing", "the candidate ran this module out of the reference's order")
        side = "candidate" if theirs else "reference"
        return context.unseen(probe, "missing", error or f"no call of this module was seen in the {side}")
    return record
