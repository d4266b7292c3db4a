"""Whether the two trainings are the same but for noise. Knows no framework; what is missing never passes."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from examples.downstream.recipe import Recipe, Run, Side, run_path
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, EXIT_NOT_COMPARED

Status = Literal["PASS", "FAIL", "NOT_COMPARED"]
Curves = npt.NDArray[np.float64]  # [seeds steps]
Runs = Mapping[tuple[Side, int], Run]

SIDES: tuple[Side, ...] = ("reference", "null", "candidate")
EXIT_CODES: dict[Status, int] = {"PASS": EXIT_ALIGNED, "FAIL": EXIT_MISALIGNED, "NOT_COMPARED": EXIT_NOT_COMPARED}
SEVERITY: tuple[Status, ...] = ("FAIL", "NOT_COMPARED", "PASS")  # worst first
ROUNDINGS = 10.0  # the two frameworks round everywhere, the null only in its Linears and attention
LAST_PLACE = 2.0**-23  # of a float32 loss, relative
RATE_TOLERANCE = 1e-6  # relative; Paddle keeps the learning rate in float32


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Criterion(_Strict):
    """One thing that is asked, and the answer.

    Attributes:
        name: What is asked.
        detail: The answer, with its numbers.
    """

    name: str
    status: Status
    detail: str


class SeedResult(_Strict):
    """The trainings of one seed.

    Attributes:
        loss_difference, null_difference: Largest difference from the reference's loss over all steps, of the candidate
            and of the null.
        accuracy: Share of right answers on the evaluation set, by side.
        disagreements: Answers of the candidate that are not the reference's.
    """

    seed: int
    loss_difference: float
    null_difference: float
    accuracy: dict[Side, float]
    disagreements: int


class Comparison(_Strict):
    """What came out.

    Attributes:
        sentence: The outcome in words.
        results: Empty unless all runs can be compared.
        answers: Size of the evaluation set.
        majority: Accuracy of always answering the most frequent class.
        runs: Everything that was recorded.
    """

    verdict: Status
    sentence: str
    criteria: tuple[Criterion, ...]
    results: tuple[SeedResult, ...] = ()
    answers: int = 0
    majority: float = 0.0
    recipe: Recipe
    runs: tuple[Run, ...]

    @property
    def exit_code(self) -> int:
        """0, 1 or 5."""
        return EXIT_CODES[self.verdict]


def read_runs(folder: Path, recipe: Recipe) -> dict[tuple[Side, int], Run]:
    """The records of a folder; what is absent or cannot be read is left out, and so not compared."""
    found: dict[tuple[Side, int], Run] = {}
    for side, seed in itertools.product(SIDES, recipe.seeds):
        try:
            run = Run.model_validate_json(run_path(folder, side, seed).read_bytes())
        except (OSError, ValidationError):
            continue
        if (run.side, run.seed) == (side, seed):
            found[side, seed] = run
    return found


def compare(recipe: Recipe, runs: Runs) -> Comparison:
    """Judge the records of all trainings."""
    problems = list(incomparable(recipe, runs))
    given: dict[str, Any] = {"recipe": recipe, "runs": tuple(runs[key] for key in sorted(runs))}
    if problems:
        first = Criterion(name="the same training on both sides", status="NOT_COMPARED", detail="; ".join(problems))
        return Comparison(verdict="NOT_COMPARED", sentence=f"{first.detail}.", criteria=(first,), **given)
    curves = {side: np.array([runs[side, seed].losses for seed in recipe.seeds], dtype=np.float64) for side in SIDES}
    accuracies = {side: [_accuracy(runs[side, seed]) for seed in recipe.seeds] for side in SIDES}
    targets = np.array(runs["reference", recipe.seeds[0]].targets)
    majority = float(np.bincount(targets).max() / len(targets))
    criteria = (
        Criterion(
            name="the same training on both sides",
            status="PASS",
            detail=f"{len(recipe.seeds)} seeds, {recipe.steps} steps each, every batch equal bit for bit",
        ),
        _learning_rates(recipe, runs),
        _rounding(curves),
        _seeds(curves),
        _metric(accuracies, len(targets)),
    )
    results = tuple(
        SeedResult(
            seed=seed,
            loss_difference=float(_largest(curves["candidate"] - curves["reference"])[place]),
            null_difference=float(_largest(curves["null"] - curves["reference"])[place]),
            accuracy={side: accuracies[side][place] for side in SIDES},
            disagreements=_disagreements(runs["candidate", seed], runs["reference", seed]),
        )
        for place, seed in enumerate(recipe.seeds)
    )
    failed = [criterion for criterion in criteria if criterion.status != "PASS"]
    return Comparison(
        verdict=min((criterion.status for criterion in criteria), key=SEVERITY.index),
        sentence=_sentence(results, curves, len(targets), failed),
        criteria=criteria,
        results=results,
        answers=len(targets),
        majority=majority,
        **given,
    )


def incomparable(recipe: Recipe, runs: Runs) -> list[str]:
    """Why the runs say nothing about each other; empty if they do."""
    if len(set(recipe.seeds)) < 2:
        return ["fewer than two seeds, so there is no spread to compare with"]
    found = []
    for seed in recipe.seeds:
        reference = runs.get(("reference", seed))
        for side in SIDES:
            where, run = f"{side} of seed {seed}", runs.get((side, seed))
            if run is None:
                found.append(f"{where}: no record")
                continue
            counts = {len(run.losses), len(run.learning_rates), len(run.batches)}
            if counts != {recipe.steps} or not recipe.steps:
                found.append(f"{where}: {len(run.losses)} steps where the recipe has {recipe.steps}")
            if not all(loss is not None and np.isfinite(loss) for loss in run.losses):
                found.append(f"{where}: a loss that is not a finite number")
            if not run.targets or len(run.predictions) != len(run.targets):
                found.append(f"{where}: nothing evaluated")
            if reference is not None and run.batches != reference.batches:
                found.append(f"{where}: other batches than the reference's")
            if reference is not None and run.targets != reference.targets:
                found.append(f"{where}: evaluated on something else than the reference")
    return found


def _learning_rates(recipe: Recipe, runs: Runs) -> Criterion:
    """The schedule is part of the recipe: another one is a difference even where the losses hide it."""
    name = "the same learning rate at every step"
    worst = 0.0
    for seed, side in itertools.product(recipe.seeds, SIDES):
        reference, run = (np.array(runs[s, seed].learning_rates) for s in ("reference", side))
        worst = max(worst, float(np.abs(run - reference).max()) / recipe.learning_rate)
    status: Status = "PASS" if worst <= RATE_TOLERANCE else "FAIL"
    return Criterion(name=name, status=status, detail=f"largest difference {worst:.1e} of the highest rate")


def _rounding(curves: Mapping[Side, Curves]) -> Criterion:
    """Step by step: no further from the reference than some times what rounding alone has done up to there."""
    name = "at no step further from the reference than rounding takes the reference from itself"
    difference, limit = np.abs(curves["candidate"] - curves["reference"]).max(axis=0), rounding_limit(curves)
    if limit.max() >= seed_distance(curves["reference"]):
        detail = f"rounding alone would allow {limit.max():.1e}, as much as another seed: too much to tell anything"
        return Criterion(name=name, status="NOT_COMPARED", detail=detail)
    over = np.flatnonzero(~(difference <= limit))
    worst = int(np.argmax(difference / limit))
    detail = f"step {worst + 1} comes closest to its limit, {difference[worst]:.1e} of {limit[worst]:.1e}"
    if len(over):
        detail = (
            f"{len(over)} steps over their limit, the first of them step {over[0] + 1}: "
            f"{difference[over[0]]:.1e}, limit {limit[over[0]]:.1e}"
        )
    return Criterion(name=name, status="FAIL" if len(over) else "PASS", detail=detail)


def rounding_limit(curves: Mapping[Side, Curves]) -> Curves:
    """Per step, how far the losses may be apart: a multiple of the null's largest difference up to there.

    Where the null does not differ at all, a multiple of the last place that a loss has in float32.

    Returns:
        [steps].
    """
    null = np.maximum.accumulate(np.abs(curves["null"] - curves["reference"]).max(axis=0))  # [steps]
    return ROUNDINGS * np.maximum(null, LAST_PLACE * np.abs(curves["reference"]).max(axis=0))


def _seeds(curves: Mapping[Side, Curves]) -> Criterion:
    """Over the whole curve: closer to the reference of the same seed than its two closest seeds are to each other."""
    apart = float(_rms(curves["candidate"] - curves["reference"]).max())
    closest = seed_distance(curves["reference"])
    detail = f"root mean square over the steps: {apart:.1e} between frameworks, {closest:.1e} between seeds"
    name = "the curves of a seed closer than any two seeds"
    return Criterion(name=name, status="PASS" if apart < closest else "FAIL", detail=detail)


def seed_distance(curves: Curves) -> float:
    """Root mean square over the steps between the two closest seeds."""
    return min(float(_rms(a - b)) for a, b in itertools.combinations(curves, 2))


def _metric(accuracies: Mapping[Side, Sequence[float]], answers: int) -> Criterion:
    """The metric: within the range of the seeds, or within the standard error that so many answers have."""
    reference = np.array(accuracies["reference"])
    apart = float(np.abs(np.array(accuracies["candidate"]) - reference).max())
    spread = float(np.ptp(reference))
    error = float(np.sqrt(reference * (1 - reference) / answers).max())
    detail = (
        f"largest difference {apart:.4f}; range over the seeds {spread:.4f}, standard error of {answers} answers "
        f"{error:.4f}"
    )
    name = "accuracies closer than seeds or chance make them"
    return Criterion(name=name, status="PASS" if apart <= max(spread, error) else "FAIL", detail=detail)


def _sentence(
    results: Sequence[SeedResult], curves: Mapping[Side, Curves], answers: int, failed: Sequence[Criterion]
) -> str:
    largest = max(result.loss_difference for result in results)
    rounding = max(result.null_difference for result in results)
    apart = max(abs(result.accuracy["candidate"] - result.accuracy["reference"]) for result in results)
    values = [result.accuracy["reference"] for result in results]
    facts = (
        f"The losses of Paddle and PyTorch differ by {largest:.1e} at most, of PyTorch and PyTorch with other rounding "
        f"by {rounding:.1e}, of the two closest seeds by {seed_distance(curves['reference']):.1e} (root mean square). "
        f"The accuracies differ by {apart:.4f}, of two seeds by up to {max(values) - min(values):.4f}; "
        f"{sum(result.disagreements for result in results)} of {answers * len(results)} answers differ."
    )
    return facts + "".join(f" Not so: {criterion.name} ({criterion.detail})." for criterion in failed)


def _accuracy(run: Run) -> float:
    return float(np.mean(np.array(run.targets) == np.array(run.predictions)))


def _disagreements(run: Run, reference: Run) -> int:
    return int(np.sum(np.array(run.predictions) != np.array(reference.predictions)))


def _largest(differences: Curves) -> Curves:
    """[seeds steps] -> [seeds]."""
    return np.asarray(np.abs(differences).max(axis=-1))


def _rms(differences: Curves) -> Curves:
    """[... steps] -> [...]."""
    return np.asarray(np.sqrt(np.mean(np.square(differences), axis=-1)))
