"""What wrong optimizers would make of the same gradients: AdamW in float64 with one decision made otherwise."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from modernbert_align.core.table import Entry
from modernbert_align.core.training import MOMENTS, Optimizer

_BETA1 = (0.0, 0.8, 0.9, 0.95, 0.99)
_BETA2 = (0.9, 0.95, 0.98, 0.99, 0.999, 0.9999)
_EPSILONS = (0.0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)
_DECAYS = (0.001, 0.01, 0.05, 0.1)
_RATES = (0.5, 2.0)  # times the right one


@dataclass(frozen=True, kw_only=True)
class Course:
    """One weight and the gradients of every step.

    Attributes:
        start: Its values before the first step, float64.
        gradients: float64, one for each step, shaped like `start`.
    """

    entry: Entry
    start: torch.Tensor
    gradients: Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An optimizer with one mistake, or none.

    Attributes:
        name: The mistake; several variants share it if they differ in a number only.
        value: Which of those, in words; may be empty.
        statement: What the candidate does, as the end of a sentence.
        decays: Which weights are decayed.
        in_gradient: Decay is added to the gradient.
        coupled: Decay is multiplied by the learning rate.
        corrected: Moments are divided by what their start at zero takes from them.
        epsilon_last: Epsilon is added to the corrected second moment's root, not to the one before.
        kept: What weights are rounded to after every step.
        number: Where the mistake is a wrong positive number: that number.
        at: The same mistake with another number.
    """

    name: str = ""
    value: str = ""
    statement: str = ""
    settings: Optimizer
    decays: Callable[[Entry], bool]
    in_gradient: bool = False
    coupled: bool = True
    corrected: bool = True
    epsilon_last: bool = True
    kept: torch.dtype | None = None
    number: float = 0.0
    at: "Callable[[float], Variant] | None" = None

    def run(self, course: Course) -> dict[str, torch.Tensor]:
        """Take all steps.

        Returns:
            The weight under "", and its moments by name.
        """
        settings, weight = self.settings, course.start.clone()
        decay = settings.weight_decay if self.decays(course.entry) else 0.0
        moment1, moment2 = torch.zeros_like(weight), torch.zeros_like(weight)
        for n, given in enumerate(course.gradients, start=1):
            gradient = given + decay * weight if self.in_gradient else given
            if not self.in_gradient:
                weight = weight * (1 - decay * (settings.learning_rate if self.coupled else 1.0))
            moment1 = settings.beta1 * moment1 + (1 - settings.beta1) * gradient
            moment2 = settings.beta2 * moment2 + (1 - settings.beta2) * gradient.square()
            first, second = (1 - settings.beta1**n, 1 - settings.beta2**n) if self.corrected else (1.0, 1.0)
            if self.epsilon_last:
                below = (moment2 / second).sqrt() + settings.epsilon
            else:
                below = (moment2.sqrt() + settings.epsilon) / math.sqrt(second)
            moved = moment1 / first / below
            weight = weight - settings.learning_rate * torch.where(moment1 == 0, torch.zeros_like(moved), moved)
            if self.kept is not None:
                weight = weight.float().to(self.kept).double()
        return dict(zip(("", *MOMENTS), (weight, moment1, moment2), strict=True))


def right(settings: Optimizer) -> Variant:
    """The optimizer without a mistake."""
    return Variant(settings=settings, decays=settings.decays)


def variants(settings: Optimizer, entries: Sequence[Entry]) -> Iterator[Variant]:
    """Every known mistake.

    Args:
        entries: All weights of the model: two choices of what is decayed that are the same for them are one.
    """
    truth = right(settings)
    yield from _decayed(truth, entries)
    yield replace(
        truth, name="decay in the gradient", statement="weight decay is added to the gradient (L2)", in_gradient=True
    )
    yield replace(
        truth,
        name="decay without the rate",
        statement="weight decay is not multiplied by the learning rate",
        coupled=False,
    )
    yield replace(truth, name="no bias correction", statement="moments have no bias correction", corrected=False)
    yield replace(
        truth,
        name="epsilon before correction",
        statement="epsilon is added before the second moment is corrected",
        epsilon_last=False,
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        yield replace(
            truth,
            name="weights kept narrow",
            value=name,
            statement=f"weights are rounded to {name} after every step",
            kept=dtype,
        )
    for key, words, numbers in (
        ("learning_rate", "learning rate", [factor * settings.learning_rate for factor in _RATES]),
        ("weight_decay", "weight decay", _DECAYS),
        ("epsilon", "epsilon", _EPSILONS),
    ):
        for number in numbers:
            yield _numbered(truth, key, words, number)
    for key, betas in (("beta1", _BETA1), ("beta2", _BETA2)):
        for beta in betas:
            yield _beta(truth, key, 1 - beta)


def _decayed(truth: Variant, entries: Sequence[Entry]) -> Iterator[Variant]:
    def norms_too(entry: Entry) -> bool:
        return truth.decays(entry) or entry.kind == "norm"

    def biases_too(entry: Entry) -> bool:
        return truth.decays(entry) or entry.hf.endswith(".bias")

    def but_embeddings(entry: Entry) -> bool:
        return truth.decays(entry) and entry.kind != "embedding"

    seen = {frozenset(entry.hf for entry in entries if truth.decays(entry))}
    for name, statement, decays in (
        ("no weight decay", "no weight is decayed", lambda _: False),
        ("decay on norms", "norms are decayed too", norms_too),
        ("decay on biases", "biases are decayed too", biases_too),
        ("decay on everything", "everything is decayed, norms and biases too", lambda _: True),
        ("no decay on embeddings", "embeddings are not decayed", but_embeddings),
    ):
        chosen = frozenset(entry.hf for entry in entries if decays(entry))
        if chosen not in seen:
            seen.add(chosen)
            yield replace(truth, name=name, statement=statement, decays=decays)


def _numbered(truth: Variant, key: str, words: str, number: float) -> Variant:
    right_number = getattr(truth.settings, key)
    return replace(
        truth,
        name=words,
        value=f"{number:g}",
        statement=f"the {words} is {number:.6g} instead of {right_number:.6g}",
        settings=replace(truth.settings, **{key: number}),
        number=number,
        at=lambda other: _numbered(truth, key, words, other),
    )


def _beta(truth: Variant, key: str, rest: float) -> Variant:
    """Another beta; the number is its distance from one."""
    return replace(
        truth,
        name=key,
        value=f"{1 - rest:g}",
        statement=f"{key} is {1 - rest:.6g} instead of {getattr(truth.settings, key):.6g}",
        settings=replace(truth.settings, **{key: 1 - rest}),
        number=rest,
        at=lambda other: _beta(truth, key, min(other, 1.0)),
    )
