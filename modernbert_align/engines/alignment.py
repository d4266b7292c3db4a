"""Runs one alignment from end to end: both models, every dtype, both passes, the null, the weights."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from modernbert_align.backends import hf, paddle_training
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.hypotheses import Ground
from modernbert_align.backends.oracle import Oracle
from modernbert_align.backends.ranks import DEFAULT_TIMEOUT_S
from modernbert_align.core.cause import Cause
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Dtype, Mode, RankCheck, Record, WeightCheck
from modernbert_align.core.table import Entry
from modernbert_align.core.training import Run
from modernbert_align.core.verdict import Judgement
from modernbert_align.core.weight_check import check_weights
from modernbert_align.engines import backward_engine, padiff_engine, reference_side, step_engine, stream_engine
from modernbert_align.engines.backward_engine import Candidate
from modernbert_align.engines.phase_cause import examine_phase
from modernbert_align.engines.ranked import ranked_candidate
from modernbert_align.engines.truth import Truth

Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PassNote:
    """What PaDiff itself said of one pass."""

    dtype: Dtype
    mode: Mode
    padiff_verdict: bool | None
    error: str


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Everything that was measured.

    Attributes:
        execution: dtype -> native or emulated, of the candidate.
        timings_s: Seconds per step.
        cause: Of the first dtype that fails, if one of its probes is wrong by itself; not looked for if the candidate
            is divided among ranks.
        ranks: What the ranks of a divided candidate showed.
    """

    records: tuple[Record, ...]
    weights: tuple[WeightCheck, ...]
    passes: tuple[PassNote, ...]
    execution: dict[Dtype, str]
    timings_s: dict[str, float]
    cause: Cause | None
    ranks: tuple[RankCheck, ...]


def run_alignment(
    reference: Path,
    candidate: Path,
    architecture: str,
    config: ModelConfig,
    head: str,
    run: Run,
    prefix: str,
    entries: tuple[Entry, ...],
    probes: tuple[Probe, ...],
    batch: Inputs,
    dtypes: tuple[Dtype, ...],
    notify: Notify,
    judged: Callable[[Sequence[Record], WeightCheck], Judgement] | None = None,
    rank_timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Alignment:
    """Compare two checkpoints.

    Args:
        reference: Hugging Face checkpoint.
        candidate: Paddle checkpoint.
        architecture: Class name, the same on both sides.
        prefix: What module paths of the encoder start with.
        entries: The table for this model.
        notify: Told in one line what happens now.
        judged: Judges the records of one dtype, so that a failure is looked into; None looks into nothing.
        rank_timeout_s: How long a rank of a divided candidate may take for one answer.

    Raises:
        CheckpointError: One of the two cannot be loaded.
        RankError: A rank died, hung or returned nothing.
    """
    records: list[Record] = []
    weights: list[WeightCheck] = []
    passes: list[PassNote] = []
    checks: list[RankCheck] = []
    timings: dict[str, float] = {}
    failed, cause = False, None
    with ExitStack() as stack:
        ranked = None
        if run.tensor_parallel > 1:
            notify(f"starting {run.tensor_parallel} ranks")
            ranked = stack.enter_context(
                ranked_candidate(candidate, architecture, head, config, batch, entries, run, rank_timeout_s)
            )
        for dtype in dtypes:
            clock = _Clock(timings, dtype)
            notify(f"{dtype}: loading both models")
            theirs = hf.load(reference, architecture, dtype)
            ours = None if ranked else paddle_backend.load(candidate, architecture, dtype, run.attention)
            state = ranked.load(dtype) if ranked else paddle_backend.state_bits(ours)
            clock.lap("load")
            notify(f"{dtype}: comparing {len(entries)} weights bit for bit")
            weights.append(check_weights(entries, state, hf.state_bits(theirs), dtype))
            clock.lap("weights")
            oracle = Oracle(config, head, theirs)
            trainee: Candidate = ranked or paddle_training.Trainee(model=ours, batch=batch)
            if run.phase == "backward":
                notify(f"{dtype}: gradients of {len(probes)} probes and {len(entries)} weights")
                records += backward_engine.run(
                    trainee,
                    theirs,
                    lambda model: Oracle(config, head, model),
                    batch,
                    probes,
                    entries,
                    prefix=prefix,
                    dtype=dtype,
                )
                clock.lap(run.phase)
            elif run.phase == "step":
                notify(f"{dtype}: {run.steps} AdamW steps")
                records += step_engine.run(
                    trainee,
                    theirs,
                    lambda model: Oracle(config, head, model),
                    batch,
                    probes,
                    entries,
                    dtype=dtype,
                    steps=run.steps or 0,
                )
                clock.lap(run.phase)
            elif ranked is not None:
                notify(f"{dtype}: the reference's passes over {len(probes)} probes")
                recording = reference_side.record(theirs, batch, probes, oracle)
                clock.lap("reference")
                notify(f"{dtype}: both passes of {run.tensor_parallel} ranks over {len(probes)} probes")
                side = ranked.forward(recording, probes)
                records += stream_engine.measure(recording, side, batch, probes, dtype, run.attention)
                del recording, side
                clock.lap("stream")
            elif run.engine == "stream":
                notify(f"{dtype}: all passes in lock-step over {len(probes)} probes")
                records += stream_engine.run(ours, theirs, oracle, batch, probes, dtype, run.attention)
                clock.lap("stream")
            else:
                notify(f"{dtype}: measuring the reference against itself ({', '.join(reference_side.VARIATIONS)})")
                nulls = reference_side.measure_nulls(theirs, batch, probes)
                clock.lap("null")
                for mode in MODES:
                    notify(f"{dtype}: {mode} pass over {len(probes)} probes")
                    with padiff_engine.clean_hooks(ours, theirs):
                        result = padiff_engine.run(
                            ours, theirs, batch, probes, dtype=dtype, mode=mode, truth=Truth(oracle, batch), nulls=nulls
                        )
                    clock.lap(mode)
                    records += result.records
                    note = PassNote(dtype=dtype, mode=mode, padiff_verdict=result.padiff_verdict, error=result.error)
                    passes.append(note)
                    del result
            if ranked is not None:
                notify(f"{dtype}: comparing what the ranks have in common and what they draw")
                checks += ranked.checks()
                clock.lap("ranks")
            own = [record for record in records if record.dtype == dtype]
            judgement = None if judged is None or failed or ranked is not None else judged(own, weights[-1])
            if judgement is not None and judgement.verdict == "FAIL":
                failed = True
                notify(f"{dtype}: looking for the cause")
                ground = Ground(config=config, head=head, reference=theirs)
                cause = examine_phase(run, prefix, ours, ground, batch, probes, entries, judgement, weights[-1])
                clock.lap("cause")
            del ours, theirs, oracle, state, trainee
            gc.collect()
    return Alignment(
        records=tuple(records),
        weights=tuple(weights),
        passes=tuple(passes),
        execution={dtype: paddle_backend.execution(dtype) for dtype in dtypes},
        timings_s=timings,
        cause=cause,
        ranks=tuple(checks),
    )


def environment() -> dict[str, object]:
    """What the frameworks say of themselves once they are loaded."""
    import paddle

    return {
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "paddle_device": paddle.get_device(),
    }


class _Clock:
    def __init__(self, into: dict[str, float], dtype: str) -> None:
        self._into, self._dtype, self._last = into, dtype, time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self._into[f"{self._dtype}_{step}"] = round(now - self._last, 3)
        self._last = now
