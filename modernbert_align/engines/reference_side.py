"""Everything about the reference that a candidate is measured against, probe by probe.

Five passes of the reference run side by side: as it is, and with other kernels in both modes (its nulls). The oracle's
values join them. Nothing here knows of a candidate, so what comes out can be used at once (`live`) or kept and used
again (`record`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from modernbert_align.backends import hf
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.compare import Beside, Mask, rel_l2
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import ByRow
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Mode
from modernbert_align.engines.passes import Outputs, Pass, hooked, outputs_of, stopping
from modernbert_align.engines.truth import Truth

Nulls = Mapping[tuple[str, Mode], dict[str, float]]  # (probe, mode) -> variation of the reference -> rel_l2
VARIATIONS = ("sdpa", "permuted")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a candidate is measured against at one probe.

    Attributes:
        outputs: What the reference returned, as torch tensors; of a probe with a key, everything that the whole model
            returned. Read them only: the reference goes on with them.
        beside: Mode -> the oracle's value and the null there.
    """

    probe: Probe
    outputs: Outputs
    beside: Mapping[Mode, Beside]


class Reference(Protocol):
    """One run of the reference. What it says of the whole run is complete once its steps are through."""

    @property
    def absent(self) -> Mapping[str, str]:
        """Probe -> why the reference cannot have it."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Probe -> how often it ran."""

    @property
    def error(self) -> str:
        """What ended the run early; empty if nothing did."""

    def steps(self) -> Iterator[Expected]:
        """The probes in execution order, then what the whole model returned; a probe that never ran is left out."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A run of the reference that is kept. See `Reference` for the attributes."""

    expected: tuple[Expected, ...]
    absent: Mapping[str, str]
    counts: Mapping[str, int]
    error: str

    def steps(self) -> Iterator[Expected]:
        """See `Reference.steps`; can be asked for as often as wanted."""
        return iter(self.expected)


class _Live:
    """A run of the reference that goes on as its steps are asked for, once."""

    def __init__(
        self,
        passes: tuple[Pass, Mapping[tuple[str, Mode], Pass]],
        batch: Inputs,
        probes: Sequence[Probe],
        absent: Mapping[str, str],
        oracle: Oracle | None,
    ) -> None:
        self._reference, self._variations = passes
        self._mask = batch.attention_mask.astype(bool)
        self._probes = probes
        self._truth = None if oracle is None else Truth(oracle, batch)
        self._stops = sum(not probe.key and probe.name not in absent for probe in probes)
        self._nulls: dict[tuple[str, Mode], dict[str, float]] = {}
        self.absent = absent

    @property
    def counts(self) -> Mapping[str, int]:
        return self._reference.counts

    @property
    def error(self) -> str:
        return self._reference.error

    def steps(self) -> Iterator[Expected]:
        by_name = {probe.name: probe for probe in self._probes}
        finished: set[str] = set()
        while (stop := self._reference.next_stop()) is not None:
            if stop.probe in finished:
                continue
            probe = by_name[stop.probe]
            if len(finished) + 1 == self._stops:
                # Whole-model outputs may be as large as everything else: with the reference's at hand, one variation
                # after the other can be measured and forgotten.
                self._reference.finish()
            for (name, mode), one in self._variations.items():
                outputs = one.advance(probe.name, finished)
                if outputs is not None:
                    self._add_null(probe, name, mode, stop.outputs, outputs)
                    if mode == "isolated":
                        one.replace([compared_tensor(probe, stop.outputs)])
                del outputs
                if self._reference.outputs is not None:
                    self._finish(name, mode, one)
            yield self._expected(probe, stop.outputs)
            finished.add(stop.probe)
        self._reference.finish()
        for (name, mode), one in self._variations.items():
            self._finish(name, mode, one)
        for probe in self._probes:
            if probe.key and self._reference.outputs is not None:
                yield self._expected(probe, self._reference.outputs)

    def _finish(self, name: str, mode: Mode, variation: Pass) -> None:
        """Run a variation to its end and measure what the whole model returned."""
        variation.finish()
        returned, variation.outputs = variation.outputs, None
        if returned is not None and self._reference.outputs is not None:
            for probe in self._probes:
                if probe.key:
                    self._add_null(probe, name, mode, self._reference.outputs, returned)

    def _add_null(self, probe: Probe, name: str, mode: Mode, theirs: Outputs, variation: Outputs) -> None:
        """Measure how far a variation is from the reference at a probe."""
        found = null_parts(probe, self._mask, theirs, {name: variation})
        self._nulls.setdefault((probe.name, mode), {}).update(found)

    def _expected(self, probe: Probe, outputs: Outputs) -> Expected:
        if self._truth is not None:
            self._truth.record(probe, outputs)
        return Expected(
            probe=probe,
            outputs=outputs,
            beside={
                mode: Beside(
                    oracle=None if self._truth is None else self._truth.value(probe, mode),
                    null_parts=self._nulls.get((probe.name, mode), {}),
                )
                for mode in MODES
            },
        )


def compared_tensor(probe: Probe, outputs: Outputs) -> Any:
    """The tensor that is compared at a probe; None if it is not there."""
    return outputs.get(probe.key) if probe.key else next(iter(outputs.values()), None)


def null_parts(probe: Probe, mask: Mask, theirs: Outputs, variations: Mapping[str, Outputs | None]) -> dict[str, float]:
    """How far variations of the reference are from it.

    Args:
        mask: [batch seq], true at real tokens.
        theirs: What the reference returned.
        variations: By name; None where one never ran the module.
    """
    found: dict[str, float] = {}
    expected = compared_tensor(probe, theirs)
    for name, outputs in variations.items():
        other = None if outputs is None else compared_tensor(probe, outputs)
        if expected is not None and other is not None:
            distance = rel_l2(probe, mask if probe.tokens else None, hf.to_numpy(other), hf.to_numpy(expected))
            if distance is not None:
                found[name] = distance
    return found


@contextmanager
def live(
    model: torch.nn.Module, batch: Inputs, probes: Sequence[Probe], oracle: Oracle | None = None
) -> Iterator[Reference]:
    """A run of the reference, step by step; hooks and kernels are put back at the end, whatever happened.

    Args:
        model: The PyTorch model, in evaluation mode with eager attention.
        oracle: Of the same model; without one there are no oracle values.
    """
    modules, absent = hooked(probes, dict(model.named_modules()), "reference")
    with side_by_side(model, batch, modules, MODES) as passes:
        yield _Live(passes, batch, probes, absent, oracle)


@contextmanager
def side_by_side(
    model: torch.nn.Module, batch: Inputs, modules: Mapping[str, torch.nn.Module], modes: Sequence[Mode]
) -> Iterator[tuple[Pass, dict[tuple[str, Mode], Pass]]]:
    """The reference's pass and one with other kernels for every variation and mode, about to start.

    Args:
        modules: Where they stop, by probe.
    """
    permuted = hf.PermutedSums(model)

    def one(variation: str) -> Pass:
        def enter() -> None:
            hf.set_attention(model, "sdpa" if variation == "sdpa" else "eager")
            permuted.active = variation == "permuted"

        return Pass(lambda: torch_outputs(model(**hf.inputs(batch))), enter)

    reference, variations = one("eager"), {(name, mode): one(name) for name in VARIATIONS for mode in modes}
    places = {name: module.register_forward_hook for name, module in modules.items()}
    try:
        with torch.no_grad(), stopping((reference, *variations.values()), places, torch_outputs):
            yield reference, variations
    finally:
        permuted.remove()
        hf.set_attention(model, "eager")


def record(model: torch.nn.Module, batch: Inputs, probes: Sequence[Probe], oracle: Oracle | None = None) -> Recording:
    """Run the reference and keep all of it: for each probe its outputs and two oracle values.

    Args:
        model, oracle: As for `live`.
    """
    with live(model, batch, probes, oracle) as run:
        expected = tuple(_whole(one) for one in run.steps())
        return Recording(expected=expected, absent=run.absent, counts=dict(run.counts), error=run.error)


def _whole(expected: Expected) -> Expected:
    """The same with all of the oracle's values computed."""
    return replace(
        expected,
        beside={
            mode: replace(beside, oracle=beside.oracle.whole()) if isinstance(beside.oracle, ByRow) else beside
            for mode, beside in expected.beside.items()
        },
    )


def measure_nulls(model: torch.nn.Module, batch: Inputs, probes: Sequence[Probe]) -> Nulls:
    """How far the reference is from itself with other kernels, at every probe and in both modes."""
    with live(model, batch, probes) as run:
        return {
            (expected.probe.name, mode): dict(expected.beside[mode].null_parts)
            for expected in run.steps()
            for mode in MODES
        }


def torch_outputs(output: Any) -> dict[str, Any]:
    """The tensors that a module returned: name (position, where it has none) -> tensor."""
    return outputs_of(output, torch.Tensor)
