"""Finds out which known mistake a candidate makes whose gradients are wrong, from the first that is wrong by itself.

Both models stand on the reference's values and take the reference's gradients, so what goes back through a residual
connection or through a module beside it can be told from the gradients that were recorded: no pass is run for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modernbert_align.backends import hf, paddle_training
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.hypotheses import ACTIVATIONS, OWN_NAME, Ground
from modernbert_align.backends.oracle import Oracle
from modernbert_align.backends.torch_training import Recording, Trainee
from modernbert_align.core.cause import Cause
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import WeightCheck
from modernbert_align.core.table import Entry
from modernbert_align.core.training import EMBEDDED, backward_probes, projections, taps
from modernbert_align.core.verdict import Judgement
from modernbert_align.engines.backward_engine import candidate_values, reference_values
from modernbert_align.engines.cause import explained_by_rounding, scope_of
from modernbert_align.engines.training_cause import Guess, Shown, decide, nothing_to_look_at, rms, rows_of

_FEW = 64  # of so many numbers and fewer a factor is no finding
_PARTS = ("queries", "keys", "values")


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """What a wrong gradient can be explained from.

    Attributes:
        gradient: The reference's at the first failing row.
        candidate: The candidate's there.
        expected: The reference's pass.
    """

    ground: Ground
    batch: Inputs
    probe: str
    gradient: torch.Tensor
    candidate: Floats
    expected: Recording

    def back(self, name: str) -> torch.Tensor:
        """The reference's gradient at a probe, float64."""
        return self.expected.gradients[name].double()

    def through(self, oracle: Oracle, start: str, end: str, module: Callable[[Oracle, torch.Tensor], Any]) -> Floats:
        """The gradient at `start` that comes back through a module from its output `end`."""
        x = self.expected.values[start].double().requires_grad_()
        with torch.enable_grad():
            module(oracle, x).backward(self.back(end))
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        return np.asarray(gradient.numpy(), dtype=np.float64)


def examine_backward(
    candidate: Any,
    ground: Ground,
    batch: Inputs,
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    judgement: Judgement,
    weights: WeightCheck,
    *,
    prefix: str,
) -> Cause | None:
    """Look for the cause of a FAIL of the backward phase.

    Args:
        candidate: The Paddle model that failed, unchanged.
        ground: The reference and its configuration.
        probes: Those of the forward phase.
        judgement: Of one dtype.
        prefix: What module paths of the encoder start with.

    Returns:
        None where there is nothing to look at: no FAIL, or every gradient is right by itself.
    """
    first = judgement.first_failing
    if judgement.verdict != "FAIL" or first is None:
        return None
    rows = rows_of(judgement, first)
    structural = nothing_to_look_at(judgement, weights, rows)
    if structural is not None or first.mode == "accumulated":
        return structural

    def unexplained(text: str) -> Cause:
        return Cause(probe=first.probe, dtype=first.dtype, level="unexplained", statement=text)

    if first.probe == "loss":
        return unexplained("the loss is wrong before anything goes back; `diff --phase forward` looks for the reason")
    tapped = taps(probes, prefix)
    theirs = Trainee(ground.reference, batch, tapped, probes, entries)
    arrays = projections(batch, probes, theirs.shapes()) if first.loss == "projection" else None
    expected = theirs.run(None if arrays is None else {name: torch.from_numpy(one) for name, one in arrays.items()})
    given = paddle_training.Given(
        values={name: paddle_backend.from_torch(value) for name, value in expected.values.items()},
        gradients={name: paddle_backend.from_torch(value) for name, value in expected.gradients.items()},
    )
    try:
        ours = candidate_values(paddle_training.run(candidate, batch, tapped, probes, arrays, given), entries)
    except Exception as raised:  # noqa: BLE001 - a wrong model may raise anything
        return unexplained(f"it could not be run again: {paddle_training.one_line(raised)}")
    if first.probe not in ours:
        return unexplained("run again, the candidate computes no gradient here")
    probe = next(one for one in backward_probes(probes, entries, prefix) if one.name == first.probe)
    scene = _Scene(
        ground=ground,
        batch=batch,
        probe=first.probe,
        gradient=reference_values(expected)[first.probe],
        candidate=ours[first.probe].values().astype(np.float64),
        expected=expected,
    )
    mask = batch.attention_mask.astype(bool)

    def compared(values: Floats) -> Floats:
        return values[mask] if probe.tokens else values

    reference = hf.to_numpy(scene.gradient).astype(np.float64)
    shown = Shown(
        probe=first.probe,
        difference=compared(scene.candidate - reference),
        size=rms(compared(reference)),
        rounding=explained_by_rounding(rows[first.probe], probe),
    )
    guesses = [
        Guess(name=name, value=value, statement=statement, effects=(compared(effect),))
        for name, value, statement, effect in _mistakes(scene, reference)
    ]
    found = decide([shown], guesses, first.dtype, "no known mistake explains the difference")
    scope = scope_of(first.probe, rows, ground) if len(found.names) == 1 and found.names[0] in _ANYWHERE else ""
    return found.model_copy(update={"statement": f"{found.statement}, {scope}"}) if scope else found


_ANYWHERE = ("activation gradient", *(f"{part} cut off" for part in (*_PARTS, "attention weights")))
_Mistakes = Iterator[tuple[str, str, str, Floats]]  # name, value, statement, effect


def _mistakes(scene: _Scene, reference: Floats) -> _Mistakes:
    """Every mistake that could show at a gradient."""
    name, candidate = scene.probe, scene.candidate
    if not candidate.any():
        text = f"the gradient of {name} is zero: none arrives, or it is thrown away"
        yield "gradient zero", "", text, -reference
        return
    square = float(np.square(reference).sum())
    if square and reference.size > _FEW:
        factor = float((reference * candidate).sum()) / square
        text = f"the gradient of {name} is {factor:.6g} times what it should be"
        yield "gradient scaled", f"{factor:.6g}", text, (factor - 1) * reference
    match name.split("."):
        case ["embeddings"]:
            yield from _into_layer(scene, 0)
        case ["layers", index]:
            if int(index) + 1 < scene.ground.config.num_hidden_layers:
                yield from _into_layer(scene, int(index) + 1)
        case ["layers", index, "attn"]:
            beside = scene.back(f"layers.{index}")
            transformed = (scene.gradient.double() - beside).numpy()
            text = f"no gradient passes through layers.{index}.mlp"
            yield "feed-forward block cut off", "", text, -transformed
            text = f"no gradient passes layers.{index} beside its feed-forward block"
            yield "residual cut off", "", text, -beside.numpy()
        case ["layers", index, "attn_norm"]:
            yield from _attention(scene, int(index))
        case ["layers", index, "mlp_norm"]:
            yield from _activation(
                scene, f"layers.{index}.mlp", "hidden_activation", lambda oracle, x: oracle.mlp(int(index), x)
            )
        case ["final_norm"] if scene.ground.head != "base":
            mask = torch.from_numpy(scene.batch.attention_mask)
            yield from _activation(
                scene, "head", "classifier_activation", lambda oracle, x: oracle.head(oracle.pooled(x, mask))
            )
    if name == f"{scene.ground.prefix}embeddings.tok_embeddings.weight":
        yield from _embedding(scene, reference)


def _into_layer(scene: _Scene, layer: int) -> _Mistakes:
    """Where a layer starts, its attention and its first residual connection come together."""
    beside = scene.back(f"layers.{layer}.attn")  # nothing but a sum is between
    attended = (scene.gradient.double() - beside).numpy()
    yield "attention cut off", "", f"no gradient passes through layers.{layer}.attn", -attended
    yield "residual cut off", "", f"no gradient passes layers.{layer} beside its attention", -beside.numpy()


def _attention(scene: _Scene, layer: int) -> _Mistakes:
    """Parts of attention that no gradient passes."""
    right, end = scene.ground.oracle, f"layers.{layer}.attn"
    mask = torch.from_numpy(scene.batch.attention_mask)

    def gradient(oracle: Oracle) -> Floats:
        return scene.through(oracle, scene.probe, end, lambda of, x: of.attn(layer, x, mask))

    def without(part: int) -> Callable[..., Any]:
        def positioned(layer: int, *values: torch.Tensor) -> Any:
            kept = [value.detach() if n == part else value for n, value in enumerate(values)]
            return right.positioned(layer, kept[0], kept[1], kept[2])

        return positioned

    def fixed(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return right.weights(scores, seen).detach()

    truth = gradient(right)
    cut: Mapping[str, Oracle] = {
        **{part: scene.ground.but(positioned=without(n)) for n, part in enumerate(_PARTS)},
        "attention weights": scene.ground.but(weights=fixed),
    }
    for part, oracle in cut.items():
        text = f"no gradient passes through the {part} of attention"
        yield f"{part} cut off", "", text, gradient(oracle) - truth


def _activation(scene: _Scene, end: str, key: str, module: Callable[[Oracle, torch.Tensor], Any]) -> _Mistakes:
    """The right activation function with the derivative of another."""
    own = getattr(scene.ground.config, key)
    right = scene.ground.oracle
    truth = scene.through(right, scene.probe, end, module)
    for name, other in ACTIVATIONS.items():
        if name == OWN_NAME.get(own):
            continue

        def activation(
            called: str, x: torch.Tensor, other: Callable[[torch.Tensor], torch.Tensor] = other
        ) -> torch.Tensor:
            wrong = other(x)
            return wrong + (right.activation(called, x) - wrong).detach()

        effect = scene.through(scene.ground.but(activation=activation), scene.probe, end, module) - truth
        yield "activation gradient", name, f"the gradient of the activation function is that of {name}", effect


def _embedding(scene: _Scene, reference: Floats) -> _Mistakes:
    """An embedding that is the decoder as well has two parts in its gradient."""
    if scene.ground.head != "masked_lm" or not scene.ground.config.tie_word_embeddings:
        return
    ids = torch.from_numpy(scene.batch.input_ids).flatten()
    own = torch.zeros(reference.shape, dtype=torch.float64)
    own.index_add_(0, ids, scene.back(EMBEDDED).flatten(0, -2))
    text = "the decoder's part of the embedding's gradient is missing: the decoder is not tied to it"
    yield "decoder untied", "", text, own.numpy() - reference
    text = "the embedding's gradient is the decoder's part alone: no gradient passes through the embedding"
    yield "embedding cut off", "", text, -own.numpy()
