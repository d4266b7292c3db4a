"""Gradients and AdamW steps of the reference and of the oracle, in PyTorch."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from modernbert_align.backends import hf
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.table import Entry
from modernbert_align.core.training import MOMENTS, Optimizer, outputs

Tensors = dict[str, torch.Tensor]
Projections = Mapping[str, torch.Tensor] | None


@dataclass(kw_only=True)
class Recording:
    """What one forward and backward pass gave.

    Attributes:
        values: Probe -> what the module returned (its first output).
        gradients: Probe -> gradient of the loss with respect to that.
        weights: Hugging Face name -> gradient of the loss with respect to the weight.
        loss: The loss, a scalar.
    """

    values: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    loss: torch.Tensor = field(default_factory=lambda: torch.tensor(float("nan")))


class _Tap(torch.autograd.Function):
    """Records a value on the way forward and its gradient on the way back, and may replace both."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, probe: str, recording: Recording, given: Recording | None
    ) -> torch.Tensor:
        ctx.probe, ctx.recording, ctx.given = probe, recording, given
        recording.values[probe] = value.detach()
        return value.view_as(value) if given is None else given.values[probe].to(value.dtype).view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (own,) = gradients
        ctx.recording.gradients[ctx.probe] = own
        return (own if ctx.given is None else ctx.given.gradients[ctx.probe].to(own.dtype)), None, None, None


class Trainee:
    """Something that can be run forward and backward: the reference or, below, the oracle.

    Args:
        model: The reference, in evaluation mode.
        taps: Modules whose first output is recorded.
        probes: All probes of the forward phase.
        entries: The table for the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Inputs,
        taps: Sequence[Probe],
        probes: Sequence[Probe],
        entries: Sequence[Entry],
    ) -> None:
        self.model, self._batch, self._taps = model, batch, taps
        self._outputs = outputs(probes)
        parameters = dict(model.named_parameters())
        self.parameters = {entry.hf: parameters[entry.hf] for entry in entries if entry.op.stored}

    def run(self, projections: Projections, given: Recording | None = None) -> Recording:
        """One forward and backward pass.

        Args:
            projections: Output probe -> weights to sum it up with; None for the loss of the model's own head.
            given: Replaces every recorded value and gradient, after it was recorded, by that of another pass.
        """
        recording = Recording()
        with torch.enable_grad():
            loss = _loss(self._forward(recording, given), projections)
            loss.backward()
        recording.loss = loss.detach()
        for name, parameter in self.parameters.items():
            recording.weights[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self.model.zero_grad(set_to_none=True)
        return recording

    def loss(self, projections: Projections) -> torch.Tensor:
        """The loss alone; see `run`."""
        with torch.no_grad():
            return _loss(self._forward(Recording(), None), projections)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every output of the model, by probe."""
        with torch.no_grad():
            returned = self.model(**hf.inputs(self._batch))
        return {probe.name: tuple(returned[probe.key].shape) for probe in self._outputs}

    def _forward(self, recording: Recording, given: Recording | None) -> Tensors:
        modules = dict(self.model.named_modules())

        def hook(probe: str) -> Callable[..., Any]:
            def tap(_module: Any, _inputs: Any, output: Any) -> Any:
                first, *rest = output if isinstance(output, tuple) else (output,)
                tapped = _Tap.apply(first, probe, recording, given)
                return (tapped, *rest) if isinstance(output, tuple) else tapped

            return tap

        handles = []
        try:
            for tap in self._taps:
                handles.append(modules[tap.hf].register_forward_hook(hook(tap.name)))
            returned = self.model(**hf.inputs(self._batch))
        finally:
            for handle in handles:
                handle.remove()
        found = {probe.name: returned[probe.key] for probe in self._outputs}
        return found | ({"loss": returned["loss"]} if "loss" in returned else {})


def _loss(returned: Tensors, projections: Projections) -> torch.Tensor:
    if projections is None:
        return returned["loss"]
    parts = []
    for name, weights in projections.items():
        wide = torch.promote_types(returned[name].dtype, torch.float32)
        parts.append((returned[name].to(wide) * weights).sum())
    return torch.stack(parts).sum()


class OracleTrainee(Trainee):
    """The oracle, with the reference's weights in float64.

    Args:
        oracle: Gives the oracle of a model.
        sums: What the reference rounds residual sums to.
    """

    def __init__(
        self,
        oracle: Callable[[torch.nn.Module], Oracle],
        model: torch.nn.Module,
        batch: Inputs,
        taps: Sequence[Probe],
        probes: Sequence[Probe],
        entries: Sequence[Entry],
    ) -> None:
        self._sums = next(model.parameters()).dtype
        super().__init__(copy.deepcopy(model).double(), batch, taps, probes, entries)
        self._oracle = oracle(self.model)

    def _forward(self, recording: Recording, given: Recording | None) -> Tensors:
        tapped = {tap.name for tap in self._taps}
        passing = self._oracle.accumulated(self._batch, self._sums if given is not None else torch.float64)
        found: Tensors = {}
        sent: torch.Tensor | None = None
        while True:
            try:
                probe, value = passing.send(sent)
            except StopIteration:
                return found
            sent = None
            if probe in tapped:
                sent = _Tap.apply(value, probe, recording, given)
            else:
                found[probe] = value


class Masters:
    """Weights in float32 (those of the oracle in float64) and their AdamW.

    Args:
        weights: Hugging Face name -> weight; copied if in half precision, else changed in place.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], entries: Sequence[Entry], settings: Optimizer) -> None:
        self._weights: Tensors = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in weights.items()
        }
        decayed = {entry.hf for entry in entries if settings.decays(entry)}
        groups = [
            {"params": [w for name, w in self._weights.items() if (name in decayed) is decays], "weight_decay": decay}
            for decays, decay in ((True, settings.weight_decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            foreach=False,
        )

    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Change the weights by one step."""
        for name, weight in self._weights.items():
            weight.grad = gradients[name].to(weight.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def copy_to(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Give a half-precision model these weights, rounded to its dtype."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                if parameters[name].dtype != weight.dtype:
                    parameters[name].copy_(weight)

    def state(self) -> Tensors:
        """Every weight by name, and its moments as `<name>.moment1` and `<name>.moment2`."""
        found = dict(self._weights)
        for name, weight in self._weights.items():
            state = self._optimizer.state[weight]
            found |= {
                f"{name}.{moment}": state[key] for moment, key in zip(MOMENTS, ("exp_avg", "exp_avg_sq"), strict=True)
            }
        return found


@contextmanager
def variation(model: torch.nn.Module, name: str) -> Iterator[None]:
    """The reference with other kernels: `sdpa` for eager attention, or `permuted` order of every sum in a Linear."""
    permuted = hf.PermutedSums(model)
    try:
        permuted.active = name == "permuted"
        hf.set_attention(model, "sdpa" if name == "sdpa" else "eager")
        yield
    finally:
        hf.set_attention(model, "eager")
        permuted.remove()
