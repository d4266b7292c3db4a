"""The candidate divided among processes: asks its ranks, puts their shares together, and compares the ranks.

A value that every rank must have whole is taken from rank 0 once all ranks have shown the same bits; a divided one is
put together from all shares.
"""

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from modernbert_align.backends import hf, paddle_training
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.ranks import Answers, Job, Ranks, Request
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import Bits
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Dtype, Loss, Mode, RankCheck, RankFact
from modernbert_align.core.table import Entry
from modernbert_align.core.tensor_parallel import divisions, dropout_sites
from modernbert_align.core.training import MOMENTS, Optimizer, Run, weight_of
from modernbert_align.core.weight_check import State
from modernbert_align.engines.passes import Pass, Stop
from modernbert_align.engines.reference_side import Recording, compared_tensor
from modernbert_align.engines.stream_engine import CandidateSide

_SAME_DRAW = 0.9  # of two shares drawn with probability one half, a third is kept in both of what is kept in either
_ALL_KEPT = 0.9  # of what is drawn with probability one half; attention keeps less, since masks hide some


@contextlib.contextmanager
def ranked_candidate(
    folder: Path,
    architecture: str,
    head: str,
    config: ModelConfig,
    batch: Inputs,
    entries: Sequence[Entry],
    run: Run,
    timeout_s: float,
) -> Iterator["RankedCandidate"]:
    """Start the ranks of a candidate; they and their files are gone at the end, whatever happened.

    Args:
        folder: Paddle checkpoint.
        architecture: Class name.
        config: The reference's architecture.
        entries: The table for this model.
        timeout_s: How long a rank may take for one answer.

    Raises:
        RankError: A rank died, hung or returned nothing.
    """
    job = Job(
        candidate=str(folder.resolve()),
        architecture=architecture,
        head=head,
        config=vars(config) | {"layer_types": list(config.layer_types)},
        inputs=batch.spec,
        attention=run.attention,
    )
    device = "cpu" if paddle.get_device() == "cpu" else "gpu"
    with (
        tempfile.TemporaryDirectory(prefix="modernbert-align-ranks-") as place,
        Ranks(run.tensor_parallel, Path(place), job, timeout_s, device) as ranks,
    ):
        yield RankedCandidate(ranks, entries, config, head)


class RankedCandidate:
    """A Paddle model whose weights are divided among processes. `load` first."""

    def __init__(self, ranks: Ranks, entries: Sequence[Entry], config: ModelConfig, head: str) -> None:
        self._ranks, self._entries = ranks, entries
        self._divisions = divisions(entries, ranks.degree)
        self._sites = dropout_sites(config, head)
        self._dtype: Dtype = "fp32"
        self._checks: list[RankCheck] = []
        self._compared, self._expected = 0, 0
        self._wrong: list[str] = []

    def load(self, dtype: Dtype) -> State:
        """Have every rank load its share; returns the whole weights, put together as they are asked for."""
        self._dtype, self._checks = dtype, []
        self._compared, self._expected, self._wrong = 0, 0, []
        answers = self._ranks.ask(Request(kind="load", dtype=dtype))
        names = list(dict.fromkeys(entry.paddle for entry in self._entries))
        self._look(answers, names)
        known = set(answers.first.rows)
        self._wrong += [name for answer in answers.ranks for name in answer.rows if name not in known]
        self._checks.append(self._check("weights", len(names)))
        return _Weights(self, answers)

    def forward(self, reference: Recording, probes: Sequence[Probe]) -> CandidateSide:
        """Both forward passes, run to their end."""
        passes: dict[Mode, Pass] = {}
        given = {
            f"value/{one.probe.name}": hf.tensor_bits(compared_tensor(one.probe, one.outputs))[0]
            for one in reference.expected
            if not one.probe.key and one.outputs
        }
        absent: Mapping[str, str] = {}
        for mode in MODES:
            request = Request(kind="forward", dtype=self._dtype, mode=mode, skipped=tuple(reference.absent))
            answers = self._ranks.ask(request, given if mode == "isolated" else None)
            self._look(answers, [probe.name for probe in probes], f" ({mode})")
            if any(answer.stops != answers.first.stops for answer in answers.ranks):
                self._wrong.append(f"the order of modules ({mode})")
            passes[mode] = _RecordedPass(functools.partial(self._tensor, answers), answers)
            absent = answers.first.absent
        return CandidateSide(passes, dict(absent))

    def gradients(
        self,
        taps: Sequence[Probe],
        probes: Sequence[Probe],
        projections: Mapping[str, Any] | None,
        given: paddle_training.Given | None = None,
    ) -> paddle_training.Recording:
        """See `paddle_training.Trainee.gradients`."""
        tensors = _projections(projections)
        if given is not None:
            for group, values in (("value", given.values), ("gradient", given.gradients)):
                tensors |= {f"{group}/{name}": paddle_backend.tensor_bits(value)[0] for name, value in values.items()}
        mode: Mode = "accumulated" if given is None else "isolated"
        loss: Loss = "head" if projections is None else "projection"
        answers = self._ranks.ask(Request(kind="backward", dtype=self._dtype, mode=mode, loss=loss), tensors)
        weights = dict.fromkeys(entry.paddle for entry in self._entries if entry.op.stored)
        self._look(answers, ["loss", *(tap.name for tap in taps), *weights], f" ({mode}, {loss} loss)")
        _raise_error(answers)
        rows = answers.first.rows
        return paddle_training.Recording(
            gradients={tap.name: self._tensor(answers, rows[tap.name]) for tap in taps if tap.name in rows},
            weights={name: self._tensor(answers, rows[name]) for name in weights if name in rows},
            loss=self._tensor(answers, rows["loss"]) if "loss" in rows else None,
        )

    def train(
        self,
        probes: Sequence[Probe],
        entries: Sequence[Entry],
        projections: Mapping[str, Any] | None,
        gradients: Sequence[Mapping[str, Any]] | None,
        settings: Optimizer,
        steps: int,
    ) -> tuple[dict[str, Any], str]:
        """See `paddle_training.Trainee.train`."""
        tensors = _projections(projections)
        for n, step in enumerate(gradients or ()):
            tensors |= {f"step{n}/{name}": hf.tensor_bits(value)[0] for name, value in step.items()}
        mode: Mode = "accumulated" if gradients is None else "isolated"
        loss: Loss = "head" if projections is None else "projection"
        request = Request(kind="step", dtype=self._dtype, mode=mode, loss=loss, steps=steps, optimizer=settings)
        answers = self._ranks.ask(request, tensors)
        names = [
            name + kind
            for name in dict.fromkeys(entry.paddle for entry in entries if entry.op.stored)
            for kind in ("", *(f".{moment}" for moment in MOMENTS))
        ]
        names += [f"loss.{n + 1}" for n in range(steps)]
        self._look(answers, names, f" ({mode})")
        found = {name: self._tensor(answers, name) for name in names if name in answers.first.rows}
        return found, next((answer.error for answer in answers.ranks if answer.error), "")

    def checks(self) -> tuple[RankCheck, ...]:
        """What the ranks showed since `load`, and how they draw random numbers."""
        values = self._check("values", self._expected)
        answers = self._ranks.ask(Request(kind="randomness", dtype=self._dtype))
        self._compared, self._wrong = 0, []
        for name, divided in self._sites.items():
            if answers.everywhere(name):
                self._compared += 1
                if not _drawn_rightly([np.unpackbits(bits).astype(bool) for bits in answers.shards(name)], divided):
                    self._wrong.append(name)
        return (*self._checks, values, self._check("randomness", len(self._sites)))

    def tensor_bits(self, answers: Answers, key: str) -> Bits:
        """The bits of a whole tensor."""
        divided = self._divisions.get(weight_of(key))
        return answers.bits(key) if divided is None else divided.join(answers.shards(key))

    def _tensor(self, answers: Answers, key: str) -> paddle.Tensor:
        bits, dtype = self.tensor_bits(answers, key), answers.first.dtypes[key]
        return paddle.to_tensor(bits if dtype == "bfloat16" else bits.view(dtype))

    def _look(self, answers: Answers, rows: Sequence[str], where: str = "") -> None:
        """Count what every rank has, and note what is not the same on all though it must be."""
        self._expected += len(rows)
        for row in rows:
            if answers.everywhere(row):
                self._compared += 1
                if weight_of(row) not in self._divisions and not answers.equal(row):
                    self._wrong.append(row + where)

    def _check(self, what: RankFact, expected: int) -> RankCheck:
        check = RankCheck(
            dtype=self._dtype, what=what, expected=expected, compared=self._compared, wrong=tuple(self._wrong)
        )
        self._compared, self._expected, self._wrong = 0, 0, []
        return check


class _Weights(Mapping[str, tuple[Bits, str]]):
    """All weights of a divided model, each put together when it is asked for."""

    def __init__(self, candidate: RankedCandidate, answers: Answers) -> None:
        self._candidate, self._answers = candidate, answers

    def __getitem__(self, name: str) -> tuple[Bits, str]:
        return self._candidate.tensor_bits(self._answers, self._answers.first.rows[name]), self._answers.first.dtypes[
            name
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers.first.rows)

    def __len__(self) -> int:
        return len(self._answers.first.rows)


class _RecordedPass(Pass):
    """A forward pass of the ranks that has ended, gone through probe by probe."""

    def __init__(self, tensor: Any, answers: Answers) -> None:
        super().__init__(dict)
        self._tensor, self._answers = tensor, answers
        self._stops = iter(answers.first.stops)

    def next_stop(self) -> Stop | None:
        """The next probe that rank 0 came by; None at the end."""
        note = next(self._stops, None)
        if note is None:
            returned = self._answers.first.returned
            self.outputs = None if returned is None else {name: self._tensor(key) for name, key in returned.items()}
            self.error = next((answer.error for answer in self._answers.ranks if answer.error), "")
            return None
        self.counts[note.probe] = self.counts.get(note.probe, 0) + 1
        return Stop(probe=note.probe, outputs={name: self._tensor(key) for name, key in note.outputs.items()})


def _projections(projections: Mapping[str, Any] | None) -> dict[str, Bits]:
    return {f"projection/{name}": values.view(np.uint32) for name, values in (projections or {}).items()}


def _raise_error(answers: Answers) -> None:
    """Raise what went wrong in the model of any rank, as a local model would have."""
    for rank, answer in enumerate(answers.ranks):
        if answer.error:
            raise RuntimeError(f"rank {rank}: {answer.error}")


def _drawn_rightly(masks: Sequence[npt.NDArray[np.bool_]], divided: bool) -> bool:
    """Whether every rank dropped something and kept something, each pair the same values or, if divided, others.

    Args:
        masks: What every rank kept.
    """
    if not all(0 < mask.mean() < _ALL_KEPT for mask in masks):
        return False
    if not divided:
        return all(np.array_equal(masks[0], mask) for mask in masks[1:])
    return all(
        np.logical_and(one, other).sum() <= _SAME_DRAW * np.logical_or(one, other).sum()
        for one, other in itertools.combinations(masks, 2)
    )
