"""Finds out which known mistake a failing candidate makes, from the first probe that is wrong by itself."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle
import torch

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.hypotheses import Ground, Hypothesis, Shared, WithWeights, hypotheses, other_layers
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.cause import Cause, Level, Tried
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Dtype, Row, WeightCheck, WeightDifference
from modernbert_align.core.table import Entry
from modernbert_align.core.verdict import Judgement

ROUNDING = 2.0  # what rounding may leave, over what it explains at the probe: measured at most 0.77, in bf16 1.5
COLLAPSE = 4.0  # an explained difference is at least so many times what is left of it
CLEAR = 2.0  # a mistake that leaves less than another by this factor explains more
PARTIAL = 10.0  # a mistake that leaves less than this part of the difference is worth a word
_COARSE = 0.5  # what a listed number may leave, over what rounding explains, before a better one is looked for
_AMPLIFIED = 10.0  # more than this a mistake is not granted for making more of rounding
_NUDGE = 1e-7  # relative change of inputs
_STEPS, _STEP = 8, 1e-3  # of a fit; the second is a change of the number's logarithm
_TENSOR_DTYPES = {"fp32": (np.int32, torch.float32), "bf16": (np.int16, torch.bfloat16)}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What both models returned at a probe, its inputs being the reference's.

    Attributes:
        rounding: rms that rounding alone explains there.
        failing: Whether the comparison found it wrong.
    """

    probe: Probe
    candidate: Floats
    reference: Floats
    rounding: float
    failing: bool


@dataclass(frozen=True, kw_only=True)
class Captured:
    """Values of one run of both models.

    Attributes:
        recorded: Probe name -> what the reference returned.
        candidate: Probe name -> what the candidate returned on the reference's values.
    """

    recorded: dict[str, torch.Tensor]
    candidate: dict[str, Floats]


def examine(
    candidate: Any,
    ground: Ground,
    batch: Inputs,
    probes: Sequence[Probe],
    entries: Sequence[Entry],
    judgement: Judgement,
    weights: WeightCheck,
) -> Cause | None:
    """Look for the cause of a FAIL.

    Args:
        candidate: The Paddle model that failed, unchanged.
        ground: The reference and its configuration.
        judgement: Of one dtype.

    Returns:
        None where there is nothing to look at: no FAIL, or every probe is right by itself.
    """
    first = judgement.first_failing
    if judgement.verdict != "FAIL" or first is None or first.mode == "accumulated":
        return None
    by_name = {probe.name: probe for probe in probes}
    rows = {row.probe: row for row in judgement.rows if row.mode == "isolated" and row.dtype == first.dtype}
    row = rows.get(first.probe)
    if row is None or row.observation != "compared" or first.probe not in by_name:
        return Cause(probe=first.probe, dtype=first.dtype, level="structural", statement=first.detail)
    differing = [difference for difference in weights.differences if difference.problem == "values"]
    weights_differ = any(difference.probe == first.probe for difference in differing)
    if first.status == "weights" and not weights_differ:
        return Cause(probe=first.probe, dtype=first.dtype, level="structural", statement=first.detail)
    unseen = [name for name in _starts(first.probe, probes) if name in rows and rows[name].observation != "compared"]
    if unseen:
        text = f"it starts from {unseen[0]}, of which nothing was compared: {rows[unseen[0]].reason}"
        return Cause(probe=first.probe, dtype=first.dtype, level="structural", statement=text)
    chosen = [by_name[name] for name in (first.probe, *_witnesses(first.probe, rows, ground))]

    def run() -> Captured:
        return capture(candidate, ground.reference, batch, probes, chosen)

    captured = run()
    evidence = [
        Evidence(
            probe=probe,
            candidate=captured.candidate[probe.name],
            reference=hf.to_numpy(captured.recorded[probe.name]),
            rounding=explained_by_rounding(rows[probe.name], probe),
            failing=rows[probe.name].status == "fail",
        )
        for probe in chosen
        if probe.name in captured.candidate
    ]
    if not evidence or evidence[0].probe.name != first.probe:
        return Cause(probe=first.probe, dtype=first.dtype, level="unexplained", statement="it could not be run again")
    own = _values(candidate, entries, differing, first.dtype)
    return find_cause(
        evidence,
        ground,
        batch,
        captured.recorded,
        first.dtype,
        weights=own,
        weights_differ=weights_differ,
        again=lambda: run().candidate.get(first.probe),
        scope=scope_of(first.probe, rows, ground),
    )


def explained_by_rounding(row: Row, probe: Probe) -> float:
    """What rounding explains at a probe, as an rms: the reference's own error, or what it differs from itself."""
    size = max(row.reference_rms or 0.0, probe.scale, row.scale)
    null = row.rel_l2 / row.null_ratio if row.rel_l2 and row.null_ratio else 0.0
    return max(row.reference_error or 0.0, null * size)


def _siblings(name: str, rows: Mapping[str, Row]) -> list[str]:
    """The same module in the other layers."""
    parts = name.split(".")
    if parts[0] != "layers":
        return []
    return [
        other
        for other, row in rows.items()
        if other != name and other.split(".")[0::2] == parts[0::2] and row.observation == "compared"
        if not (parts[2:] == ["attn_norm"] and other.split(".")[1] == "0")
    ]


def _witnesses(name: str, rows: Mapping[str, Row], ground: Ground) -> list[str]:
    """Up to three more probes to tell apart what looks the same at the first: failing ones first, of both kinds."""
    kinds = ground.config.layer_types
    found: list[str] = []
    siblings = _siblings(name, rows)
    for failing in (True, False):
        for same in (False, True):
            for other in siblings:
                if (rows[other].status == "fail") == failing and (
                    kinds[int(other.split(".")[1])] == kinds[int(name.split(".")[1])]
                ) == same:
                    found.append(other)
                    break
    return found[:3]


def scope_of(name: str, rows: Mapping[str, Row], ground: Ground) -> str:
    """In which layers the same module fails, in words."""
    siblings = _siblings(name, rows)
    if not siblings:
        return ""
    kinds = ground.config.layer_types
    same = {other for other in siblings if kinds[int(other.split(".")[1])] == kinds[int(name.split(".")[1])]}
    failing = {other for other in siblings if rows[other].status == "fail"}
    if not failing:
        return "in this layer only"
    if failing == set(siblings):
        return "in every layer"
    if failing == same:
        return f"in every {kinds[int(name.split('.')[1])]} layer"
    layers = sorted({int(other.split(".")[1]) for other in {*failing, name}})
    return f"in layers {', '.join(map(str, layers))}"


def _values(
    candidate: Any, entries: Sequence[Entry], differences: Sequence[WeightDifference], dtype: Dtype
) -> dict[str, torch.Tensor]:
    """The candidate's values of weights that differ, in the reference's layout, under the reference's names."""
    if not differences:
        return {}
    wanted = {difference.hf for difference in differences}
    state = paddle_backend.state_bits(candidate)
    integers, floats = _TENSOR_DTYPES[dtype]
    return {
        entry.hf: torch.from_numpy(entry.op.apply(state[entry.paddle][0]).copy().view(integers)).view(floats)
        for entry in entries
        if entry.hf in wanted
    }


def capture(
    candidate: Any, reference: torch.nn.Module, batch: Inputs, probes: Sequence[Probe], targets: Sequence[Probe]
) -> Captured:
    """Run both models once and keep what they return at a few probes, the candidate on the reference's values.

    Args:
        targets: Probes to keep; their inputs are the outputs of the probes since the layer before, so only those are
            held and given to the candidate.
    """
    held = {name for target in targets for name in (*_starts(target.name, probes), target.name)}
    hooked = [probe for probe in probes if probe.name in held and not probe.key]
    wanted = {target.name for target in targets}
    captured = Captured(recorded={}, candidate={})

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            captured.recorded.setdefault(name, _first(output).detach())

        return hook

    def replace_by(name: str) -> Callable[..., Any]:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if name in wanted:
                captured.candidate.setdefault(name, paddle_backend.to_numpy(_first(output)))
            value = paddle_backend.from_torch(captured.recorded[name])
            return type(output)([value, *output[1:]]) if isinstance(output, tuple | list) else value

        return hook

    modules, layers = dict(reference.named_modules()), dict(candidate.named_sublayers())
    hooked = [probe for probe in hooked if probe.hf in modules and probe.paddle in layers]
    handles: list[Any] = []
    try:
        handles += [modules[probe.hf].register_forward_hook(keep(probe.name)) for probe in hooked]
        place = paddle_backend.places(candidate, batch)
        handles += [place(layers[probe.paddle])(replace_by(probe.name)) for probe in hooked]
        with torch.no_grad(), paddle.no_grad():
            theirs = reference(**hf.inputs(batch))
            ours = _run(candidate, batch)
    finally:
        for handle in handles:
            handle.remove()
    for target in targets:
        if target.key and ours is not None and target.key in ours:
            captured.recorded[target.name] = theirs[target.key].detach()
            captured.candidate[target.name] = paddle_backend.to_numpy(ours[target.key])
    return captured


def _starts(name: str, probes: Sequence[Probe]) -> list[str]:
    """The probes since the layer before: all whose values a probe can start from."""
    end = next(n for n, probe in enumerate(probes) if probe.name == name)
    before = [n for n in range(end) if probes[n].pattern in ("embeddings", "layers.{i}")]
    return [probe.name for probe in probes[max(before, default=0) : end]]


def _run(candidate: Any, batch: Inputs) -> Any:
    try:
        return candidate(**paddle_backend.inputs(batch))
    except Exception:  # noqa: BLE001 - a wrong model may fail behind the probe that matters
        return None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A mistake and what it leaves of the difference."""

    hypothesis: Hypothesis
    left: float


class _Court:
    """Tries mistakes on the evidence.

    Args:
        truth: The oracle without a mistake.
    """

    def __init__(
        self, truth: Oracle, batch: Inputs, recorded: Mapping[str, torch.Tensor], evidence: Sequence[Evidence]
    ) -> None:
        self._oracle, self._batch, self._recorded = truth, batch, recorded
        self._mask = batch.attention_mask.astype(bool)
        self._truth: dict[str, Floats] = {}
        self._difference = {
            one.probe.name: self._compared(one, one.candidate.astype(np.float64) - one.reference) for one in evidence
        }

    def value(self, oracle: Oracle, one: Evidence) -> Floats:
        """What an oracle says of a probe, the compared elements."""
        return self._compared(one, oracle.isolated(one.probe.name, self._batch, self._recorded).numpy())

    def _compared(self, one: Evidence, values: Floats) -> Floats:
        return values[self._mask] if one.probe.tokens else values

    def difference(self, one: Evidence) -> float:
        """rms(candidate - reference)."""
        return _rms(self._difference[one.probe.name])

    def effect(self, oracle: Oracle, one: Evidence) -> Floats:
        """How an oracle with a mistake differs from the one without."""
        if one.probe.name not in self._truth:
            self._truth[one.probe.name] = self.value(self._oracle, one)
        return self.value(oracle, one) - self._truth[one.probe.name]

    def distance(self, one: Evidence, repeated: Floats) -> float:
        """How far, as an rms, is another run of the candidate from the first."""
        return _rms(self._compared(one, repeated.astype(np.float64) - one.candidate))

    def left(self, oracle: Oracle, one: Evidence) -> float:
        """What a mistake leaves of the difference between candidate and reference."""
        return self.remainder(self.effect(oracle, one), one)

    def remainder(self, effect: Floats, one: Evidence) -> float:
        """What an effect leaves of the difference between candidate and reference."""
        return _rms(self._difference[one.probe.name] - effect)

    def amplification(self, oracle: Oracle, one: Evidence) -> float:
        """How much more a mistake makes of small changes of its inputs, such as rounding, than the truth does."""
        generator = torch.Generator().manual_seed(0)
        moved = {
            name: values * (1 + _NUDGE * torch.randn(values.shape, generator=generator, dtype=torch.float64))
            for name, values in self._recorded.items()
        }

        def response(of: Oracle) -> float:
            nudged = self._compared(one, of.isolated(one.probe.name, self._batch, moved).numpy())
            return _rms(nudged - self.value(of, one))

        right = response(self._oracle)
        return response(oracle) / right if right else 1.0

    def fitted(self, trial: _Trial, one: Evidence) -> _Trial:
        """A mistake with the number that leaves least: Gauss-Newton steps on its logarithm, from one that is close."""
        at, number, best = trial.hypothesis.at, trial.hypothesis.number, trial
        if at is None or number <= 0:
            return trial
        for step in range(_STEPS):
            here = self.effect(at(number).oracle, one)
            slope = (self.effect(at(number * math.exp(_STEP)).oracle, one) - here) / _STEP
            size = float(np.square(slope).sum())
            if not size or not math.isfinite(size):
                break
            rest = self._difference[one.probe.name] - here
            move = float((slope * rest).sum()) / size
            if not step and CLEAR * _rms(rest - move * slope) > _rms(rest):  # no number nearby explains much more
                break
            number *= math.exp(max(-1.0, min(1.0, move)))
            hypothesis = at(number)
            best = min(best, _Trial(hypothesis=hypothesis, left=self.left(hypothesis.oracle, one)), key=_left)
            if abs(move) < 1e-4:
                break
        return best


def _left(trial: _Trial) -> float:
    return trial.left


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.square(values).mean()))


def find_cause(
    evidence: Sequence[Evidence],
    ground: Ground,
    batch: Inputs,
    recorded: Mapping[str, torch.Tensor | Floats],
    dtype: Dtype,
    *,
    weights: Mapping[str, torch.Tensor],
    weights_differ: bool,
    again: Callable[[], Floats | None],
    scope: str,
) -> Cause:
    """Which mistake makes the oracle differ from itself as the candidate differs from the reference.

    It needs values only, not where they come from.

    Args:
        evidence: The probe to explain, then others that tell apart what looks the same there.
        recorded: Probe name -> the reference's output; all that the oracle needs for the evidence.
        weights: The candidate's values of every weight that differs, in the reference's names and layout.
        weights_differ: Whether one of them belongs to the first probe's module.
        again: Runs the candidate once more and gives its output at the first probe.
        scope: In which layers the first probe's module fails, in words.
    """
    first = evidence[0]
    recorded = {name: torch.as_tensor(values).detach().double() for name, values in recorded.items()}
    ground = replace(ground, shared=Shared(recorded.values()))
    court = _Court(ground.oracle, batch, recorded, evidence)
    whole, most = court.difference(first), ROUNDING * first.rounding
    if weights_differ:
        ground = replace(ground, reference=WithWeights(ground.reference, weights))
        left = court.left(ground.oracle, first)
        if left <= most:
            text = "its weights differ; the reference with these weights would compute the same"
            return _cause(first, dtype, "explained", ("weights",), text, whole, most, left, ())
        if whole <= most:
            text = "its weights differ, but not what it returns: it seems to use others"
            return _cause(first, dtype, "unexplained", (), text, whole, most, whole, ())
    trials = _trials(court, ground, first, whole, most)
    tried = tuple(
        Tried(name=trial.hypothesis.name, value=trial.hypothesis.value, ratio=trial.left / whole) for trial in trials
    )
    best = trials[0].left if trials else whole
    if trials and most < best <= most * _AMPLIFIED:
        most *= max(1.0, court.amplification(trials[0].hypothesis.oracle, first))
    explained = bool(trials) and best <= min(most, whole / COLLAPSE)
    if not explained:
        repeated = again()
        if repeated is not None and court.distance(first, repeated) > max(most, whole / PARTIAL):
            text = "the candidate gives other values every time it runs: something random is left on, such as dropout"
            return _cause(first, dtype, "explained", ("random",), text, whole, most, None, tried)
    fitting = [trial for trial in trials if trial.left <= CLEAR * best and (explained or best * PARTIAL <= whole)]
    fitting = _confirmed(court, fitting, evidence[1:])
    names = tuple(dict.fromkeys(trial.hypothesis.name for trial in fitting))
    text = " or ".join(dict.fromkeys(trial.hypothesis.statement for trial in fitting))
    if explained:
        others = [one.probe.name for one in evidence[1:] if one.failing and not _fits(court, fitting[0], one)]
        if others:
            text += f"; {', '.join(others)} fail{'s' if len(others) == 1 else ''} for another reason"
        elif scope:
            text += f", {scope}"
        text = f"one of these, which cannot be told apart here: {text}" if len(names) > 1 else text
    elif fitting:
        text = (
            f"not certain: {text} would explain all but {best / whole:.1e} of the difference, but rounding leaves less"
        )
    else:
        known = len({one.name for one in tried})
        text = (
            f"none of {known} known kinds of mistake explains the difference"
            if known
            else "no known mistake shows here"
        )
    if weights_differ:
        text = f"its weights differ, and besides, {text}"
    level: Level = "explained" if explained else "partial" if fitting else "unexplained"
    return _cause(first, dtype, level, names, text, whole, most, best, tried)


def _cause(
    first: Evidence,
    dtype: Dtype,
    level: Level,
    names: tuple[str, ...],
    statement: str,
    residual: float,
    most: float,
    left: float | None,
    tried: tuple[Tried, ...],
) -> Cause:
    return Cause(
        probe=first.probe.name,
        dtype=dtype,
        level=level,
        names=names,
        statement=statement,
        residual=residual,
        left=left,
        ratio=left / residual if left is not None and residual else None,
        rounding=most,
        tried=tried,
    )


def _trials(court: _Court, ground: Ground, first: Evidence, whole: float, most: float) -> list[_Trial]:
    """Every mistake that shows on these inputs, best first; the costly are tried where the others do not explain."""

    def shown(candidates: Iterable[Hypothesis]) -> list[_Trial]:
        found = []
        for hypothesis in candidates:
            effect = court.effect(hypothesis.oracle, first)
            if np.isfinite(effect).all() and _rms(effect) > first.rounding:
                found.append(_Trial(hypothesis=hypothesis, left=court.remainder(effect, first)))
        return found

    if not whole:
        return []
    trials = sorted(shown(hypotheses(first.probe.name, ground)), key=_left)
    if not trials or trials[0].left > _COARSE * first.rounding:
        closest: dict[str, _Trial] = {}
        for trial in trials:
            closest.setdefault(trial.hypothesis.name, trial)
        fitted = ((trial, court.fitted(trial, first)) for trial in closest.values() if trial.hypothesis.at)
        trials += [better for trial, better in fitted if CLEAR * better.left < trial.left]
    if all(trial.left > most for trial in trials):
        trials += shown(other_layers(first.probe.name, ground))
    return sorted(trials, key=_left)


def _confirmed(court: _Court, trials: Sequence[_Trial], witnesses: Sequence[Evidence]) -> list[_Trial]:
    """Of mistakes that look the same at one probe, those that are right at most others."""
    scores = [sum(_fits(court, trial, one) for one in witnesses) for trial in trials]
    return [trial for trial, score in zip(trials, scores, strict=True) if score == max(scores)]


def _fits(court: _Court, trial: _Trial, one: Evidence) -> bool:
    return court.left(trial.hypothesis.oracle, one) <= ROUNDING * one.rounding
