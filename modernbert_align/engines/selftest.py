"""Proves that the comparison can fail: injects every known fault into a candidate, and counts alarms without one."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from modernbert_align.backends import hf, paddle_training
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.fixture_writer import draw_model
from modernbert_align.backends.hypotheses import Ground
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.cause import Cause
from modernbert_align.core.fixtures import Fixture, Inputs, contract_fixture, make_inputs
from modernbert_align.core.model_config import ModelConfig, parse_config, read_config_file
from modernbert_align.core.outcomes import CRITERIA, Alarm, Outcome
from modernbert_align.core.probes import Probe, load_probes
from modernbert_align.core.rows import MODES, Dtype, Phase, Record, WeightCheck
from modernbert_align.core.table import Table
from modernbert_align.core.tolerance import load_tolerance
from modernbert_align.core.training import DEFAULT_STEPS, Run, phase_losses, phase_probes
from modernbert_align.core.verdict import Expectation, Judgement, default_policy, judge
from modernbert_align.core.weight_check import check_weights
from modernbert_align.engines import backward_engine, reference_side, step_engine, stream_engine
from modernbert_align.engines.faults import Fault
from modernbert_align.engines.phase_cause import examine_phase
from modernbert_align.engines.reference_side import Recording

EFFECT = 3.0  # in bf16 a fault has to be found if it moves a module's output by this many times what rounding does


class Subject:
    """Both models of a fixture with one head and in one precision, loaded once.

    Args:
        reference: Hugging Face checkpoint.
        candidate: Its conversion.
    """

    def __init__(
        self, fixture: Fixture, reference: Path, candidate: Path, head: str, dtype: Dtype, table: Table
    ) -> None:
        self.fixture, self.head, self.dtype = fixture, head, dtype
        self.config: ModelConfig = parse_config(read_config_file(reference), where=str(reference / "config.json"))
        self.architecture = table.architecture(head)
        self.reference = hf.load(reference, self.architecture, dtype)
        self.candidate = paddle_backend.load(candidate, self.architecture, dtype)
        self.batch = make_inputs(fixture.inputs, self.config, head)
        self._prefix = table.prefix(head)
        self._entries = table.expand(self.config, head)
        self._probes = load_probes(self.config, head, self._prefix)
        self._oracle = Oracle(self.config, head, self.reference)
        self._tolerance = load_tolerance(dtype)

    @functools.cached_property
    def recording(self) -> Recording:
        """The reference with its present weights on the fixture's inputs, run once for all faults."""
        return reference_side.record(self.reference, self.batch, self._probes, self._oracle)

    def compare(
        self, batch: Inputs | None = None, phase: Phase = "forward"
    ) -> tuple[Judgement, tuple[Record, ...], WeightCheck]:
        """Compare and judge as `diff` does, in this precision alone.

        Args:
            batch: Inputs other than the fixture's, on which the reference is run anew.
        """
        run = _run(phase)
        records = self._records(batch, run)
        batch = self.batch if batch is None else batch
        weights = check_weights(
            self._entries, paddle_backend.state_bits(self.candidate), hf.state_bits(self.reference), self.dtype
        )
        fixture = contract_fixture(self.fixture.name)
        judgement = judge(
            records,
            [weights],
            Expectation(
                probes=self._probes_of(run),
                dtypes=(self.dtype,),
                weights=len(self._entries),
                fixture=fixture,
                needs={"padding": batch.padded, "the sliding window": batch.window_bites},
                phase=phase,
                losses=phase_losses(phase, batch),
            ),
            {self.dtype: self._tolerance},
            default_policy(fixture),
        )
        return judgement, records, weights

    def _probes_of(self, run: Run) -> tuple[Probe, ...]:
        return phase_probes(run, self._probes, self._entries, self._prefix)

    def _records(self, batch: Inputs | None, run: Run) -> tuple[Record, ...]:
        """What the engine of a phase sees; on the fixture's own inputs the forward phase runs the reference once."""
        own = self.batch if batch is None else batch
        if run.phase == "forward":
            if batch is None:
                return stream_engine.run_beside(self.recording, self.candidate, own, self._probes, self.dtype)
            with reference_side.live(self.reference, own, self._probes, self._oracle) as reference:
                return stream_engine.run_beside(reference, self.candidate, own, self._probes, self.dtype)

        def oracle(model: torch.nn.Module) -> Oracle:
            return Oracle(self.config, self.head, model)

        ours = paddle_training.Trainee(model=self.candidate, batch=own)
        models = (ours, self.reference, oracle, own, self._probes, self._entries)
        if run.phase == "backward":
            return backward_engine.run(*models, prefix=self._prefix, dtype=self.dtype)
        return step_engine.run(*models, dtype=self.dtype, steps=run.steps or 0)

    def try_fault(self, fault: Fault) -> Outcome:
        """Inject a fault, compare, and take it out again."""
        with fault.inject(self.candidate):
            judgement, records, weights = self.compare(phase=fault.phase)
            cause = self.cause(judgement, weights, fault.phase)
        effect = self._effect(records, weights, fault.phase)
        shows = self.dtype in fault.dtypes and self.fixture.weights in fault.weights and not fault.equivalent
        seen = {
            mode: tuple(c for c in CRITERIA if any(c in row.failed for row in judgement.rows if row.mode == mode))
            for mode in MODES
        }
        found = {criterion for criteria in seen.values() for criterion in criteria}
        found |= {"weights"} if weights.differences else set()
        crashed = judgement.verdict == "NOT_COMPARED" and fault.verdict != "NOT_COMPARED"
        killed = judgement.exit_code != 0 and not crashed
        return Outcome(
            name=fault.name,
            head=self.head,
            dtype=self.dtype,
            phase=fault.phase,
            must_die=shows and (self.dtype != "bf16" or effect is None or effect > EFFECT),
            equivalent=bool(fault.equivalent),
            killed=killed,
            killed_by=tuple(criterion for criterion in CRITERIA if criterion in found) if killed else (),
            seen=seen,
            verdict=judgement.verdict,
            first_probe=judgement.first_failing.probe if judgement.first_failing else "",
            expected_probe=fault.first,
            effect=effect,
            cause_level=cause.level if cause is not None else None,
            cause_names=cause.names if cause is not None else (),
            expected_cause=fault.cause,
        )

    def cause(self, judgement: Judgement, weights: WeightCheck, phase: Phase = "forward") -> Cause | None:
        """Why the candidate as it is now fails, as `diff` says it; on the fixture's inputs."""
        ground = Ground(config=self.config, head=self.head, reference=self.reference)
        found = (self.candidate, ground, self.batch, self._probes, self._entries, judgement, weights)
        return examine_phase(_run(phase), self._prefix, *found)

    def _effect(self, records: tuple[Record, ...], weights: WeightCheck, phase: Phase) -> float | None:
        """See `Outcome.effect`. Taken from the measurements, not from the verdict that is on trial."""
        if weights.differences or any(record.observation != "compared" for record in records):
            return None
        floors = {probe.name: self._tolerance.floor(probe) for probe in self._probes_of(_run(phase))}
        effects = [
            (record.rel_l2 or 0.0) / max(record.null_rel_l2 or 0.0, floors[record.probe])
            for record in records
            if record.mode == "isolated" or phase != "forward"
        ]
        return max(effects)

    def redraw(self, seed: int) -> Inputs:
        """Give both models other weights of the fixture's distribution; returns other inputs.

        The candidate gets them through the table, as a conversion would write them.
        """
        vars(self).pop("recording", None)
        drawn = draw_model(self.fixture, self.architecture, seed)
        with torch.no_grad():
            self.reference.load_state_dict(drawn.state_dict())
        theirs = hf.state_bits(self.reference)
        paddle_backend.set_state_bits(
            self.candidate, {e.paddle: e.op.apply(theirs[e.hf][0]) for e in self._entries if e.op.stored}
        )
        return make_inputs(self.fixture.inputs.model_copy(update={"seed": seed}), self.config, self.head)


def _run(phase: Phase) -> Run:
    return Run(phase=phase, forward_engine="stream", steps=DEFAULT_STEPS if phase == "step" else None)


def unbroken(subject: Subject, seeds: int, phases: Sequence[Phase]) -> Iterator[Alarm | None]:
    """Compare models without a fault in every phase: the fixture itself, then as many others as asked for.

    Afterwards the subject holds the weights of the last seed.

    Yields:
        For every comparison the alarm, or None if there was none.
    """
    for seed in (None, *range(subject.fixture.seed + 1, subject.fixture.seed + 1 + seeds)):
        batch = None if seed is None else subject.redraw(seed)
        for phase in phases:
            judgement, _, _ = subject.compare(batch, phase)
            first = judgement.first_failing
            yield (
                Alarm(
                    head=subject.head,
                    dtype=subject.dtype,
                    phase=phase,
                    seed=seed,
                    verdict=judgement.verdict,
                    detail=f"{first.probe} ({first.mode}): {first.detail}" if first else "",
                )
                if judgement.exit_code
                else None
            )
