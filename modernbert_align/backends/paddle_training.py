"""Gradients and AdamW steps of the candidate, in Paddle."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import paddle

from modernbert_align.backends import paddle as backend
from modernbert_align.core.compare import Output
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.table import Entry
from modernbert_align.core.training import MOMENTS, Optimizer, outputs

Tensors = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What replaces the candidate's own values and gradients: those of the reference, by probe."""

    values: Mapping[str, paddle.Tensor]
    gradients: Mapping[str, paddle.Tensor]


@dataclass(kw_only=True)
class Recording:
    """What one forward and backward pass gave.

    Attributes:
        gradients: Probe -> gradient of the loss with respect to its first output.
        weights: Paddle name -> gradient of the loss with respect to the weight.
        loss: The loss, a scalar.
    """

    gradients: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    loss: paddle.Tensor | None = None


class _Tap(paddle.autograd.PyLayer):
    """Records the gradient of a value, and may replace value and gradient."""

    @staticmethod
    def forward(ctx: Any, value: paddle.Tensor, probe: str, recording: Recording, given: Given | None) -> paddle.Tensor:
        ctx.probe, ctx.recording, ctx.given = probe, recording, given
        return (value if given is None else given.values[probe]).clone()

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        ctx.recording.gradients[ctx.probe] = gradient.detach()
        return (gradient if ctx.given is None else ctx.given.gradients[ctx.probe]).clone()


def parameters(model: Any) -> dict[str, Any]:
    """Everything that is trained, by name; what two modules share, once."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if not any(parameter is other for other in found.values()):
            found[name] = parameter
    return found


def run(
    model: Any,
    batch: Inputs,
    taps: Sequence[Probe],
    probes: Sequence[Probe],
    projections: Mapping[str, Any] | None,
    given: Given | None = None,
) -> Recording:
    """One forward and backward pass.

    Args:
        model: In evaluation mode.
        taps: Modules whose first output is recorded.
        probes: All probes of the forward phase.
        projections: Output probe -> weights to sum it up with; None for the loss of the model's own head.
        given: Replaces every value and, after it was recorded, every gradient.
    """
    recording = Recording()
    layers = dict(model.named_sublayers())

    def hook(probe: str) -> Callable[..., Any]:
        def tap(_layer: Any, _inputs: Any, output: Any) -> Any:
            first, *rest = output if isinstance(output, list | tuple) else (output,)
            tapped = _Tap.apply(first, probe, recording, given)
            return type(output)((tapped, *rest)) if isinstance(output, list | tuple) else tapped

        return tap

    handles = []
    model.clear_gradients(set_to_zero=False)
    try:
        for tap in taps:
            handles.append(layers[tap.paddle].register_forward_post_hook(hook(tap.name)))
        with paddle.enable_grad():
            value = _loss(model(**backend.inputs(batch)), probes, projections)
            value.backward()
        recording.loss = value.detach()
        for name, parameter in parameters(model).items():
            gradient = parameter.grad  # freed when cleared
            recording.weights[name] = paddle.zeros_like(parameter) if gradient is None else gradient.clone()
    finally:
        model.clear_gradients(set_to_zero=False)
        for handle in handles:
            handle.remove()
    return recording


def loss(model: Any, batch: Inputs, probes: Sequence[Probe], projections: Mapping[str, Any] | None) -> paddle.Tensor:
    """The loss alone; see `run`."""
    with paddle.no_grad():
        return _loss(model(**backend.inputs(batch)), probes, projections)


def _loss(returned: Mapping[str, Any], probes: Sequence[Probe], projections: Mapping[str, Any] | None) -> paddle.Tensor:
    if projections is None:
        return returned["loss"]
    keys = {probe.name: probe.key for probe in outputs(probes)}
    return paddle.add_n(
        [
            (returned[keys[name]].astype("float32") * paddle.to_tensor(weights)).sum()
            for name, weights in projections.items()
        ]
    )


def turned(entry: Entry, tensor: paddle.Tensor) -> paddle.Tensor:
    """A weight, its gradient or its moment in the other side's layout; either way round."""
    return tensor.t() if entry.op.name == "T" else tensor


def output(tensor: paddle.Tensor) -> Output:
    """A tensor for comparison."""
    return Output(
        shape=tuple(tensor.shape),
        dtype=backend.dtype_name(tensor),
        values=functools.partial(backend.to_numpy, tensor),
    )


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """The candidate as the engines of the training phases see it, in this process.

    Attributes:
        model: The Paddle model, in evaluation mode: dropout is off.
    """

    model: Any
    batch: Inputs

    def gradients(
        self,
        taps: Sequence[Probe],
        probes: Sequence[Probe],
        projections: Mapping[str, Any] | None,
        given: Given | None = None,
    ) -> Recording:
        """See `run`."""
        return run(self.model, self.batch, taps, probes, projections, given)

    def train(
        self,
        probes: Sequence[Probe],
        entries: Sequence[Entry],
        projections: Mapping[str, Any] | None,
        gradients: Sequence[Mapping[str, Any]] | None,
        settings: Optimizer,
        steps: int,
    ) -> tuple[Tensors, str]:
        """See `train`, but for the gradients: torch tensors, by Hugging Face name and in its layout."""
        by_name = {entry.hf: entry for entry in entries if entry.op.stored}
        given = None
        if gradients is not None:
            given = [
                {by_name[name].paddle: turned(by_name[name], backend.from_torch(value)) for name, value in step.items()}
                for step in gradients
            ]
        return train(self.model, self.batch, probes, entries, projections, given, settings, steps)


def train(
    model: Any,
    batch: Inputs,
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    projections: Mapping[str, Any] | None,
    gradients: Sequence[Mapping[str, paddle.Tensor]] | None,
    settings: Optimizer,
    steps: int,
) -> tuple[Tensors, str]:
    """Take AdamW steps, then give the model its weights back.

    Args:
        projections: See `run`.
        gradients: Of every step, by Paddle name, to take instead of the model's own.

    Returns:
        Every weight by name, its moments (see `Masters.state`) and the loss before every step as `loss.1`, ...; and
        what went wrong, in one line.
    """
    weights = parameters(model)
    before = {name: parameter.clone() for name, parameter in weights.items()}
    found: Tensors = {}
    try:
        masters = Masters(weights, entries, settings)
        for n in range(steps):
            if gradients is None:
                recording = run(model, batch, (), probes, projections)
                found[f"loss.{n + 1}"], taken = recording.loss, recording.weights
            else:
                found[f"loss.{n + 1}"], taken = loss(model, batch, probes, projections), dict(gradients[n])
            masters.step(taken)
            masters.copy_to(weights)
        found |= masters.state()
    except Exception as raised:  # noqa: BLE001 - whatever a wrong model raises is a finding about it, not ours
        return found, one_line(raised)
    finally:
        restore(weights, before)
    return found, ""


def one_line(raised: Exception) -> str:
    """What an exception says."""
    return f"{type(raised).__name__}: {' '.join(str(raised).split())[:400]}"


class Masters:
    """Weights in float32 and their AdamW.

    Args:
        weights: Paddle name -> weight; copied.
    """

    def __init__(self, weights: Mapping[str, Any], entries: Sequence[Entry], settings: Optimizer) -> None:
        self._weights: dict[str, Any] = {}
        for name, values in weights.items():
            master = paddle.create_parameter(list(values.shape), "float32")
            master.set_value(values.astype("float32"))
            self._weights[name] = master
        chosen = decayed_weights(entries, settings)
        decayed = {weight.name for name, weight in self._weights.items() if name in chosen}
        self._optimizer = paddle.optimizer.AdamW(
            learning_rate=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
            parameters=list(self._weights.values()),
            apply_decay_param_fun=lambda name: name in decayed,
        )

    def step(self, gradients: Mapping[str, paddle.Tensor]) -> None:
        """Change the weights by one step."""
        for name, weight in self._weights.items():
            given = gradients.get(name)  # a weight that only the candidate has is given none
            weight.grad = paddle.zeros_like(weight) if given is None else given.astype("float32").contiguous()
        self._optimizer.step()
        self._optimizer.clear_grad(set_to_zero=False)

    def copy_to(self, parameters: Mapping[str, Any]) -> None:
        """Give a model these weights, rounded to its dtype."""
        restore(parameters, self._weights)

    def state(self) -> Tensors:
        """Every weight by name, and its moments as `<name>.moment1` and `<name>.moment2`."""
        stored = self._optimizer.state_dict()
        found = dict(self._weights)
        for name, weight in self._weights.items():
            found |= {f"{name}.{moment}": stored[f"{weight.name}_{moment}_0"] for moment in MOMENTS}
        return found


def restore(parameters: Mapping[str, Any], values: Mapping[str, paddle.Tensor]) -> None:
    """Overwrite a model's weights in place, rounded to its dtype."""
    with paddle.no_grad():
        for name, parameter in parameters.items():
            parameter.set_value(values[name].astype(parameter.dtype))


def decayed_weights(entries: Sequence[Entry], settings: Optimizer) -> set[str]:
    """Paddle names of the weights that are decayed."""
    return {entry.paddle for entry in entries if settings.decays(entry)}
