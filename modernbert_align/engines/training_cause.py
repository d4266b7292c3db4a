"""Finds out which known mistake a candidate makes whose optimizer steps are wrong; decides between guesses."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends import paddle_training, torch_training
from modernbert_align.backends.hypotheses import Ground
from modernbert_align.backends.optimizer_hypotheses import Course, Variant, right, variants
from modernbert_align.backends.torch_training import Projections, Trainee
from modernbert_align.core.cause import Cause, Level, Tried
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Dtype, Row, WeightCheck
from modernbert_align.core.table import Entry
from modernbert_align.core.training import MOMENTS, Optimizer, losses, projections, step_probes
from modernbert_align.core.verdict import Failing, Judgement
from modernbert_align.engines.cause import CLEAR, COLLAPSE, PARTIAL, ROUNDING, explained_by_rounding
from modernbert_align.engines.reference_side import VARIATIONS

_KINDS = ("", *MOMENTS)
_MOST = 1 << 16  # elements of a weight that are looked at
_TIES = 2.0**-12  # of weights kept narrow, so many lie where float32's rounding decides to which side they go
_STEPS, _STEP = 8, 1e-3  # of a fit; the second is a change of the number's logarithm


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One compared row.

    Attributes:
        difference: Candidate minus reference, the compared elements.
        size: rms of the reference.
        rounding: rms that rounding alone explains there.
    """

    probe: str
    difference: Floats
    size: float
    rounding: float


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A known mistake.

    Attributes:
        name: The mistake; several guesses share it if they differ in a number only.
        value: Which of those, in words; may be empty.
        statement: What the candidate does, as the end of a sentence.
        effects: What it changes in every shown row.
        slack: What it may leave in every row, as an rms, where rounding does more with it; empty if that is not known.
        number: Where the mistake is a wrong positive number: that number.
        at: The same mistake with another number.
    """

    name: str
    value: str = ""
    statement: str
    effects: tuple[Floats, ...]
    slack: tuple[float, ...] = ()
    number: float = 0.0
    at: "Callable[[float], Guess] | None" = None


def decide(rows: Sequence[Shown], guesses: Iterable[Guess], dtype: Dtype, unexplained: str) -> Cause:
    """Which mistake explains every row, the first of which fails.

    Args:
        unexplained: What to say if none does.
    """
    court = _Court(rows)
    first, whole = rows[0], rms(rows[0].difference)
    if not whole:
        text = "run again, it does not differ from the reference"
        return Cause(probe=first.probe, dtype=dtype, level="unexplained", statement=text)
    trials = sorted(((court.score(guess), guess) for guess in guesses if court.shows(guess)), key=_score)
    if not trials or trials[0][0] > 1.0:
        closest: dict[str, Guess] = {}
        for _, guess in trials:
            if guess.at is not None:
                closest.setdefault(guess.name, guess)
        fitted = [court.fitted(guess) for guess in closest.values()]
        trials = sorted([*trials, *((court.score(guess), guess) for guess in fitted)], key=_score)
    tried = tuple(
        Tried(name=guess.name, value=guess.value, ratio=rms(first.difference - guess.effects[0]) / whole)
        for _, guess in sorted(trials, key=lambda trial: rms(first.difference - trial[1].effects[0]))
    )
    best, found = trials[0] if trials else (math.inf, None)
    left = whole if found is None else rms(first.difference - found.effects[0])
    explained = best <= 1.0 and left * COLLAPSE <= whole
    partial = not explained and left * PARTIAL <= whole and best * PARTIAL <= court.score(None)
    fitting = [guess for score, guess in trials if score <= CLEAR * max(best, 0.5)] if explained or partial else []
    if explained:
        fitting = [guess for guess in fitting if court.score(guess) <= 1.0]
    names = tuple(dict.fromkeys(guess.name for guess in fitting))
    by_name: dict[str, str] = {}
    for guess in fitting:
        by_name.setdefault(guess.name, guess.statement)
    text = " or ".join(by_name.values()) or unexplained
    if explained and len(names) > 1:
        text = f"one of these, which cannot be told apart here: {text}"
    elif partial:
        text = (
            f"not certain: {text} would explain all but {left / whole:.1e} of the difference, but rounding leaves less"
        )
    level: Level = "explained" if explained else "partial" if partial else "unexplained"
    return Cause(
        probe=first.probe,
        dtype=dtype,
        level=level,
        names=names,
        statement=text,
        residual=whole,
        left=left,
        ratio=left / whole if whole else None,
        rounding=ROUNDING * first.rounding,
        tried=tried,
    )


class _Court:
    def __init__(self, rows: Sequence[Shown]) -> None:
        self._rows = rows

    def shows(self, guess: Guess) -> bool:
        """Whether rounding does not hide it."""
        finite = all(np.isfinite(effect).all() for effect in guess.effects)
        pairs = zip(guess.effects, self._rows, strict=True)
        return finite and any(rms(effect) > row.rounding for effect, row in pairs)

    def score(self, guess: Guess | None) -> float:
        """The most that is left in any row, over what may be left there; without a mistake, of the whole.

        Rounding grows with the values that are rounded, so a mistake that makes them larger may leave more.
        """
        worst = 0.0
        for n, row in enumerate(self._rows):
            most, left = ROUNDING * row.rounding, rms(row.difference)
            if guess is not None:
                left = rms(row.difference - guess.effects[n])
                most *= 1 + (rms(guess.effects[n]) / row.size if row.size else 0.0)
                most = max(most, guess.slack[n] if guess.slack else 0.0)
            worst = max(worst, left / most if most else math.inf if left else 0.0)
        return worst

    def fitted(self, guess: Guess) -> Guess:
        """A mistake with the number that leaves least: Gauss-Newton steps on its logarithm."""
        if guess.at is None or guess.number <= 0:  # logarithms need a positive one
            return guess
        at, number, best = guess.at, guess.number, guess
        for _ in range(_STEPS):
            here, beside = at(number), at(number * math.exp(_STEP))
            slope = (self._weighted(beside.effects) - self._weighted(here.effects)) / _STEP
            size = float(np.square(slope).sum())
            if not size or not math.isfinite(size):
                break
            rest = self._weighted([row.difference for row in self._rows]) - self._weighted(here.effects)
            move = float((slope * rest).sum()) / size
            number *= math.exp(max(-1.0, min(1.0, move)))
            best = min(best, at(number), key=self.score)
            if abs(move) < 1e-6:
                break
        return best

    def _weighted(self, values: Sequence[Floats]) -> Floats:
        """All rows as one, each in units of its rounding."""
        pairs = zip(values, self._rows, strict=True)
        return np.concatenate(
            [value.ravel() / (row.rounding * math.sqrt(value.size)) for value, row in pairs if row.rounding]
        )


def _score(trial: tuple[float, Guess]) -> float:
    return trial[0]


def rms(values: Floats) -> float:
    """Root mean square."""
    return float(np.sqrt(np.square(values).mean()))


def nothing_to_look_at(judgement: Judgement, weights: WeightCheck, rows: Mapping[str, Row]) -> Cause | None:
    """The cause of a failure that has no values to explain."""
    first = judgement.first_failing
    assert first is not None
    if weights.differences:
        text = f"the weights differ: `{weights.differences[0].paddle}`; nothing that is made of them can be right"
        return Cause(probe=first.probe, dtype=first.dtype, level="structural", statement=text)
    if first.probe not in rows or rows[first.probe].observation != "compared":
        return Cause(probe=first.probe, dtype=first.dtype, level="structural", statement=first.detail)
    return None


def rows_of(judgement: Judgement, first: Failing) -> dict[str, Row]:
    """The rows of the pass in which the first failure is."""
    return {
        row.probe: row
        for row in judgement.rows
        if (row.dtype, row.mode, row.loss) == (first.dtype, first.mode, first.loss)
    }


# Steps


def examine_step(
    candidate: Any,
    ground: Ground,
    batch: Inputs,
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    judgement: Judgement,
    weights: WeightCheck,
    *,
    steps: int,
) -> Cause | None:
    """Look for the cause of a FAIL of the step phase. Afterwards the candidate has the weights it had.

    Args:
        candidate: The Paddle model that failed, unchanged.
        ground: The reference and its configuration.
        probes: Those of the forward phase.
        judgement: Of one dtype.

    Returns:
        None where nothing fails.
    """
    first = judgement.first_failing
    if judgement.verdict != "FAIL" or first is None:
        return None
    rows = rows_of(judgement, first)
    structural = nothing_to_look_at(judgement, weights, rows)
    if structural is not None:
        return structural
    by_name = {probe.name: probe for probe in step_probes(probes, entries, steps)}
    stored = [entry for entry in entries if entry.op.stored]
    entry = next((one for one in stored if first.probe in _names(one)), None)
    if entry is None:  # a loss
        text = "the loss is wrong before the optimizer has done anything; `diff --phase forward` looks for the reason"
        return Cause(probe=first.probe, dtype=first.dtype, level="unexplained", statement=text)
    training = _Training(candidate, ground, batch, probes, stored, steps)
    chosen = _chosen(entry, stored)
    gradients = training.reference(cleared=True)
    own = first.mode == "accumulated"
    ours = training.candidate(chosen, None if own else gradients.given)
    names = [
        first.probe,
        *(name for one in chosen for name in _names(one) if name != first.probe and _compared(rows, name)),
    ]
    differences = {name: _sample(ours[name]) - _sample(gradients.values[name]) for name in names}
    shown = [
        Shown(
            probe=name,
            difference=differences[name],
            size=rms(_sample(gradients.values[name])),
            rounding=explained_by_rounding(rows[name], by_name[name]),
        )
        for name in names
    ]
    if own:
        again = training.reference(cleared=False)
        effects = tuple(_sample(again.values[name]) - _sample(gradients.values[name]) for name in names)
        nulls = [0.0] * len(names)  # what rounding makes of the mistake itself, not of the right training
        for variation in VARIATIONS:
            varied = training.reference(cleared=False, variation=variation)
            nulls = [
                max(null, rms(_sample(varied.values[name]) - _sample(again.values[name])))
                for null, name in zip(nulls, names, strict=True)
            ]
        guess = Guess(
            name="gradients not cleared",
            statement="gradients are not cleared: every step adds its own to those before",
            effects=effects,
            slack=tuple(ROUNDING * null for null in nulls),
        )
        text = "every step is right by itself, the gradients are not; look with --phase forward, then --phase backward"
        return decide(shown, [guess], first.dtype, text)
    courses = {one.hf: training.course(one, gradients.given) for one in chosen}
    text = "no known mistake of an optimizer explains the difference"
    return decide(shown, _guesses(courses, names, stored), first.dtype, text)


def _names(entry: Entry) -> tuple[str, ...]:
    return tuple(f"{entry.hf}.{kind}" if kind else entry.hf for kind in _KINDS)


def _compared(rows: Mapping[str, Row], name: str) -> bool:
    return name in rows and rows[name].observation == "compared"


def _chosen(first: Entry, stored: Sequence[Entry]) -> list[Entry]:
    """A few weights to tell mistakes apart: the one that fails first, and of every kind one more."""

    def sort(entry: Entry) -> tuple[str, bool]:
        return entry.kind, entry.hf.endswith(".bias")

    found = {sort(entry): entry for entry in reversed(stored)}
    others = [entry for key, entry in found.items() if key != sort(first) and entry.hf != first.hf]
    return [first, *reversed(others)]


def _sample(values: torch.Tensor) -> Floats:
    """Evenly spread elements of a tensor, all of a small one; float64."""
    flat = values.detach().flatten()
    sampled: Floats = flat[:: math.ceil(flat.numel() / _MOST)].double().numpy()
    return sampled


def _guesses(courses: Mapping[str, Course], names: Sequence[str], stored: Sequence[Entry]) -> Iterator[Guess]:
    """Every mistake of an optimizer, with what it changes."""
    settings = Optimizer()
    wanted = {f"{name}.{kind}" if kind else name: (name, kind) for name in courses for kind in _KINDS}

    def values(variant: Variant) -> list[Floats]:
        found = {name: variant.run(course) for name, course in courses.items()}
        return [found[wanted[name][0]][wanted[name][1]].numpy() for name in names]

    truth = values(right(settings))

    def guess(variant: Variant) -> Guess:
        made = values(variant)
        slack: tuple[float, ...] = ()
        if variant.kept is not None:
            step = torch.finfo(variant.kept).eps
            slack = tuple(step * rms(one) * math.sqrt(max(_TIES, 4 / one.size)) for one in made)
        at = variant.at
        return Guess(
            name=variant.name,
            value=variant.value,
            statement=variant.statement,
            effects=tuple(one - other for one, other in zip(made, truth, strict=True)),
            slack=slack,
            number=variant.number,
            at=None if at is None else lambda number: guess(at(number)),
        )

    for variant in variants(settings, stored):
        yield guess(variant)


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """Where training led the reference.

    Attributes:
        values: Weights and moments by row.
        given: The gradients of every step, by Hugging Face name.
    """

    values: Mapping[str, torch.Tensor]
    given: Sequence[Mapping[str, torch.Tensor]]


class _Training:
    """Trains both sides again, and keeps what the comparison did not."""

    def __init__(
        self,
        candidate: Any,
        ground: Ground,
        batch: Inputs,
        probes: Sequence[Probe],
        stored: Sequence[Entry],
        steps: int,
    ) -> None:
        self._candidate, self._ground, self._batch = candidate, ground, batch
        self._probes, self._stored, self._steps = probes, stored, steps
        self._settings = Optimizer()
        self._projected: Mapping[str, Any] | None = None

    def reference(self, *, cleared: bool, variation: str = "") -> _Trained:
        """Train the reference with its own gradients, or with their sum since the first step.

        Args:
            variation: Of the reference's kernels, see `torch_training.variation`; empty for its own.
        """
        trainee = Trainee(copy.deepcopy(self._ground.reference), self._batch, (), self._probes, self._stored)
        projected: Projections = None
        if losses(self._batch)[-1] == "projection":
            self._projected = projections(self._batch, self._probes, trainee.shapes())
            projected = {name: torch.from_numpy(values) for name, values in self._projected.items()}
        masters = torch_training.Masters(trainee.parameters, self._stored, self._settings)
        given: list[Mapping[str, torch.Tensor]] = []
        for _ in range(self._steps):
            with torch_training.variation(trainee.model, variation):
                gradients = trainee.run(projected).weights
            if given and not cleared:
                gradients = {name: given[-1][name] + value for name, value in gradients.items()}
            masters.step(gradients)
            masters.copy_to(trainee.parameters)
            given.append(gradients)
        return _Trained(values=masters.state(), given=given)

    def candidate(
        self, chosen: Sequence[Entry], given: Sequence[Mapping[str, torch.Tensor]] | None
    ) -> dict[str, torch.Tensor]:
        """Train the candidate and give it its weights back; returns the chosen weights and their moments by row.

        Args:
            given: Gradients to take every step with, the chosen weights alone; None for the candidate's own.
        """
        parameters = paddle_training.parameters(self._candidate)
        before = {name: parameter.clone() for name, parameter in parameters.items()}
        trained = parameters if given is None else {one.paddle: parameters[one.paddle] for one in chosen}
        for parameter in parameters.values():
            parameter.clear_gradient(set_to_zero=False)  # of a candidate that does not do so itself
        try:
            masters = paddle_training.Masters(trained, self._stored, self._settings)
            for n in range(self._steps):
                if given is None:
                    recording = paddle_training.run(self._candidate, self._batch, (), self._probes, self._projected)
                    gradients = recording.weights
                else:
                    gradients = {
                        one.paddle: paddle_backend.from_torch(one_side(one, given[n][one.hf])) for one in chosen
                    }
                masters.step(gradients)
                masters.copy_to(trained)
            state = masters.state()
            return {
                name: one_side(one, torch.from_numpy(paddle_backend.to_numpy(state[key])))
                for one in chosen
                for name, key in zip(_names(one), _names(replace(one, hf=one.paddle)), strict=True)
            }
        finally:
            paddle_training.restore(parameters, before)

    def course(self, entry: Entry, given: Sequence[Mapping[str, torch.Tensor]]) -> Course:
        """What the optimizer starts from, the elements that are looked at."""
        weight = dict(self._ground.reference.named_parameters())[entry.hf]

        def sampled(values: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(_sample(values))

        return Course(entry=entry, start=sampled(weight), gradients=[sampled(one[entry.hf]) for one in given])


def one_side(entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one side in the other side's layout."""
    return tensor.t().contiguous() if entry.op.name == "T" else tensor
