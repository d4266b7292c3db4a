"""Runs every forward pass of a comparison in lock-step and measures each probe as soon as all have reached it.

Seven passes run side by side, each a coroutine that stops when a probe has computed its output: the reference; the
candidate on its own values (accumulated) and with every probe's output replaced by the reference's (isolated); and the
reference again with other kernels, in both modes. The models' own forward() runs, hooks only stop it. Nothing but the
outputs of the current probe is held, so memory is that of the models and a few activations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import paddle
import torch

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.compare import Beside, Context, Mask, rel_l2
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Dtype, Mode, Record
from modernbert_align.engines.pair import Nulls, compare
from modernbert_align.engines.truth import Truth

VARIATIONS = ("sdpa", "permuted")


@dataclass(frozen=True, kw_only=True)
class _Stop:
    """A pass that has computed a probe's output."""

    probe: str
    outputs: dict[str, Any]


class _Pass:
    """One forward pass that can be advanced from probe to probe.

    Attributes:
        outputs: What the whole model returned; None before its end.
        error: What ended it early.
        counts: probe -> how often it ran.
    """

    def __init__(self, forward: Callable[[], Mapping[str, Any]], enter: Callable[[], None]) -> None:
        self.outputs: Mapping[str, Any] | None = None
        self.error = ""
        self.counts: dict[str, int] = {}
        self._forward, self._enter = forward, enter
        self._greenlet = greenlet.greenlet(self._run)
        self._ahead: _Stop | None = None
        self._replacement: Any = None

    @property
    def greenlet(self) -> Any:
        """What `greenlet.getcurrent` returns inside this pass."""
        return self._greenlet

    def _run(self, _: object) -> None:
        try:
            self.outputs = self._forward()
        except Exception as raised:  # noqa: BLE001 - whatever a wrong model raises is a finding about it, not ours
            self.error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:400]}"

    def _resume(self) -> _Stop | None:
        """Run to the next probe; None at the end."""
        if self._greenlet.dead:
            return None
        self._enter()
        replacement, self._replacement = self._replacement, None
        stop: _Stop | None = self._greenlet.switch(replacement)
        if stop is not None:
            self.counts[stop.probe] = self.counts.get(stop.probe, 0) + 1
        return stop

    def advance(self, probe: str, finished: set[str]) -> dict[str, Any] | None:
        """Run until `probe` has its output and return that; None if this pass goes past it without.

        Args:
            finished: Probes behind this one; running one of them again is counted and otherwise passed over.
        """
        stop, self._ahead = self._ahead, None
        while stop is None or stop.probe in finished:
            stop = self._resume()
            if stop is None:
                return None
        if stop.probe != probe:
            self._ahead = stop
            return None
        return stop.outputs

    def next_probe(self) -> _Stop | None:
        """Run to whatever probe comes next."""
        return self._resume()

    def replace(self, value: Any) -> None:
        """Have the pass go on with another output of the probe it stands at."""
        self._replacement = value

    def finish(self) -> None:
        """Run to the end."""
        while self._resume() is not None:
            pass


class _Passes:
    """All passes of one comparison.

    Attributes:
        finished: Probes that all passes are past.
    """

    def __init__(
        self, reference: _Pass, candidates: dict[Mode, _Pass], variations: dict[tuple[str, Mode], _Pass]
    ) -> None:
        self.reference, self.candidates, self.variations = reference, candidates, variations
        self.finished: set[str] = set()

    def all(self) -> tuple[_Pass, ...]:
        """Every pass."""
        return (self.reference, *self.candidates.values(), *self.variations.values())

    def probes(
        self, probes: Sequence[Probe], mask: Mask
    ) -> Iterator[tuple[Probe, dict[str, torch.Tensor], dict[Mode, dict[str, float]]]]:
        """Advance the reference and its variations from probe to probe.

        Yields:
            The probe, what the reference returned, and how far its variations are from that.
        """
        by_name = {probe.name: probe for probe in probes}
        while (stop := self.reference.next_probe()) is not None:
            if stop.probe in self.finished:
                continue
            probe = by_name[stop.probe]
            nulls: dict[Mode, dict[str, float]] = {mode: {} for mode in MODES}
            first = next(iter(stop.outputs.values()))
            expected = hf.to_numpy(first)
            for (name, mode), other in self.variations.items():
                outputs = other.advance(probe.name, self.finished)
                if outputs is not None:
                    values = hf.to_numpy(next(iter(outputs.values())))
                    _add(nulls[mode], name, rel_l2(probe, mask if probe.tokens else None, values, expected))
                    if mode == "isolated":
                        other.replace([first])
            yield probe, stop.outputs, nulls
            self.finished.add(stop.probe)

    def finish(self) -> None:
        """Run every pass to its end."""
        for one in self.all():
            one.finish()

    def output_nulls(self, probe: Probe, mode: Mode, mask: Mask) -> dict[str, float]:
        """How far the variations are from the reference in what the whole model returns."""
        found: dict[str, float] = {}
        theirs = self.reference.outputs
        for (name, its_mode), other in self.variations.items():
            if its_mode == mode and theirs is not None and other.outputs is not None and probe.key in theirs:
                values, expected = hf.to_numpy(other.outputs[probe.key]), hf.to_numpy(theirs[probe.key])
                _add(found, name, rel_l2(probe, mask if probe.tokens else None, values, expected))
        return found


def _add(found: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        found[name] = value


def run(
    candidate: Any, reference: torch.nn.Module, oracle: Oracle, batch: Inputs, probes: Sequence[Probe], dtype: Dtype
) -> tuple[Record, ...]:
    """Run both models and measure every probe in both modes.

    Args:
        candidate: The Paddle model, in evaluation mode.
        reference: The PyTorch model, in evaluation mode with eager attention.

    Returns:
        A record for every probe and mode, whatever happened.
    """
    mask = batch.attention_mask.astype(bool)
    contexts = {mode: Context(mask=mask, dtype=dtype, mode=mode) for mode in MODES}
    layers, modules = dict(candidate.named_sublayers()), dict(reference.named_modules())
    absent = {
        probe.name: f"the {side} has no module `{path}`"
        for probe in probes
        for side, path, found in (("candidate", probe.paddle, layers), ("reference", probe.hf, modules))
        if not probe.key and path not in found
    }
    hooked = [probe for probe in probes if not probe.key and probe.name not in absent]
    truth = Truth(oracle, batch)
    records: dict[tuple[str, Mode], Record] = {}
    with _passes(reference, batch, hooked, candidate) as passes:
        for probe, theirs, nulls in passes.probes(hooked, mask):
            truth.record(probe, theirs)
            for mode in MODES:
                ours = passes.candidates[mode].advance(probe.name, passes.finished)
                if ours is not None:
                    beside = Beside(oracle=truth.value(probe, mode), null_parts=nulls[mode])
                    records[probe.name, mode] = compare(probe, contexts[mode], ours, theirs, beside)
                    if mode == "isolated":
                        values = [paddle_backend.from_torch(value) for value in theirs.values()]
                        passes.candidates[mode].replace(values)
        passes.finish()
        for probe in probes:
            if probe.key and passes.reference.outputs is not None:
                for mode in MODES:
                    returned = passes.candidates[mode].outputs
                    if returned is not None:
                        null_parts = passes.output_nulls(probe, mode, mask)
                        beside = Beside(oracle=truth.value(probe, mode), null_parts=null_parts)
                        records[probe.name, mode] = compare(
                            probe, contexts[mode], returned, passes.reference.outputs, beside
                        )
    return tuple(
        _final(probe, contexts[mode], records.get((probe.name, mode)), passes, absent)
        for mode in MODES
        for probe in probes
    )


def measure_nulls(reference: torch.nn.Module, batch: Inputs, probes: Sequence[Probe]) -> Nulls:
    """How far the reference is from itself with other kernels, at every probe and in both modes."""
    mask = batch.attention_mask.astype(bool)
    modules = dict(reference.named_modules())
    found: dict[tuple[str, Mode], dict[str, float]] = {}
    hooked = [probe for probe in probes if not probe.key and probe.hf in modules]
    with _passes(reference, batch, hooked) as passes:
        for probe, _, nulls in passes.probes(hooked, mask):
            found |= {(probe.name, mode): nulls[mode] for mode in MODES}
        passes.finish()
        for probe in probes:
            if probe.key:
                found |= {(probe.name, mode): passes.output_nulls(probe, mode, mask) for mode in MODES}
    return found


def _final(probe: Probe, context: Context, record: Record | None, passes: _Passes, absent: dict[str, str]) -> Record:
    """The record of a probe, once it is known how often each side ran it."""
    if probe.name in absent:
        return context.unseen(probe, "missing", absent[probe.name])
    ours = passes.candidates[context.mode].counts.get(probe.name, 0)
    theirs = passes.reference.counts.get(probe.name, 0)
    if not probe.key and record is not None and (ours > 1 or theirs > 1):
        return context.unseen(probe, "extra", f"the candidate ran this module {ours} times, the reference {theirs}")
    if record is None:
        error = passes.reference.error or passes.candidates[context.mode].error
        if ours and theirs and not error:
            return context.unseen(probe, "missing", "the candidate ran this module out of the reference's order")
        side = "candidate" if theirs else "reference"
        return context.unseen(probe, "missing", error or f"the {side} never ran this module")
    return record


@contextmanager
def _passes(
    reference: torch.nn.Module, batch: Inputs, probes: Sequence[Probe], candidate: Any = None
) -> Iterator[_Passes]:
    """Every pass, hooked; hooks and kernels are put back at the end, whatever happened."""
    permuted = hf.PermutedSums(reference)

    def theirs(variation: str) -> _Pass:
        def enter() -> None:
            hf.set_attention(reference, "sdpa" if variation == "sdpa" else "eager")
            permuted.active = variation == "permuted"

        return _Pass(lambda: torch_outputs(reference(**hf.inputs(batch))), enter)

    def ours() -> _Pass:
        return _Pass(lambda: paddle_outputs(candidate(**paddle_backend.inputs(batch))), lambda: None)

    passes = _Passes(
        theirs("eager"),
        {} if candidate is None else {mode: ours() for mode in MODES},
        {(name, mode): theirs(name) for name in VARIATIONS for mode in MODES},
    )
    main = greenlet.getcurrent()
    running = {one.greenlet for one in passes.all()}

    def hook(probe: str, outputs_of: Callable[[Any], dict[str, Any]]) -> Callable[..., Any]:
        def stop(_module: Any, _inputs: Any, output: Any) -> Any:
            if greenlet.getcurrent() not in running:
                return None
            replacement = main.switch(_Stop(probe=probe, outputs=outputs_of(output)))
            return None if replacement is None else _replaced(output, replacement)

        return stop

    handles = []
    try:
        modules = dict(reference.named_modules())
        layers = {} if candidate is None else dict(candidate.named_sublayers())
        for probe in probes:
            handles.append(modules[probe.hf].register_forward_hook(hook(probe.name, torch_outputs)))
            if layers:
                handles.append(layers[probe.paddle].register_forward_post_hook(hook(probe.name, paddle_outputs)))
        with torch.no_grad(), paddle.no_grad():
            yield passes
    finally:
        for one in passes.all():
            one.greenlet.throw()
        for handle in handles:
            handle.remove()
        permuted.remove()
        hf.set_attention(reference, "eager")


def torch_outputs(output: Any) -> dict[str, Any]:
    """The tensors a module returned: name (position, where it has none) -> tensor."""
    return _outputs(output, torch.Tensor)


def paddle_outputs(output: Any) -> dict[str, Any]:
    """The same of a Paddle layer."""
    return _outputs(output, paddle.Tensor)


def _outputs(output: Any, kind: type) -> dict[str, Any]:
    named = output.items() if isinstance(output, Mapping) else enumerate(_flat(output, kind))
    found: dict[str, Any] = {}
    for name, value in named:
        tensors = _flat(value, kind)
        found |= {str(name) if len(tensors) == 1 else f"{name}.{n}": tensor for n, tensor in enumerate(tensors)}
    return found


def _flat(value: Any, kind: type) -> list[Any]:
    if isinstance(value, kind):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _flat(item, kind)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _flat(item, kind)]
    return []


def _replaced(output: Any, replacements: list[Any]) -> Any:
    """`output` with its first tensors replaced; what the reference does not return stays."""
    if isinstance(output, list | tuple):
        return type(output)([*replacements[: len(output)], *output[len(replacements) :]])
    return replacements[0]
