"""A candidate divided among ranks: equal to one process, and every mistake of this field turns the gate red."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from modernbert_align.backends import hf, ranks
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.rows import MODES
from modernbert_align.core.table import load_table
from modernbert_align.core.tensor_parallel import rank_expectation
from modernbert_align.core.tolerance import load_tolerances
from modernbert_align.core.training import Run, phase_losses, phase_probes
from modernbert_align.core.verdict import Expectation, judge
from modernbert_align.core.weight_check import check_weights
from modernbert_align.engines import backward_engine, reference_side, stream_engine
from modernbert_align.engines.ranked import ranked_candidate
from modernbert_align.errors import RankError

RUN = Run(forward_engine="stream", tensor_parallel=2)


class Bench:
    """Two ranks of tiny-sensitive that make whatever mistake they are told to."""

    def __init__(self, models, folder, fault_file):
        self.models, self.folder, self.fault_file = models, folder, fault_file
        m = models
        self.recording = reference_side.record(m.reference, m.batch, m.probes, m.oracle)

    @contextmanager
    def start(self, timeout_s=120.0, run=RUN):
        m = self.models
        architecture = load_table().architecture(m.head)
        with ranked_candidate(
            self.folder, architecture, m.head, m.config, m.batch, m.entries, run, timeout_s
        ) as candidate:
            yield candidate

    def tell(self, fault):
        self.fault_file.write_text(fault)

    def judged(self, candidate, run=RUN):
        """The verdict over everything, as `diff` has it."""
        m = self.models
        prefix = load_table().prefix(m.head)
        state = candidate.load(m.dtype)
        weights = check_weights(m.entries, state, hf.state_bits(m.reference), m.dtype)
        if run.phase == "forward":
            side = candidate.forward(self.recording, m.probes)
            records = stream_engine.measure(self.recording, side, m.batch, m.probes, m.dtype)
        else:
            records = backward_engine.run(
                candidate,
                m.reference,
                lambda model: Oracle(m.config, m.head, model),
                m.batch,
                m.probes,
                m.entries,
                prefix=prefix,
                dtype=m.dtype,
            )
        shown = candidate.checks()
        rows, losses = phase_probes(run, m.probes, m.entries, prefix), phase_losses(run.phase, m.batch)
        expectation = Expectation(
            probes=rows,
            dtypes=(m.dtype,),
            weights=len(m.entries),
            fixture="tiny-sensitive",
            needs={},
            phase=run.phase,
            losses=losses,
            ranks=rank_expectation(2, m.config, m.head, m.entries, len(rows) * len(losses) * len(MODES)),
        )
        tolerances = load_tolerances((m.dtype,))
        return judge(records, [weights], expectation, tolerances, "contract", ranks=shown), weights, shown


@pytest.fixture(scope="module")
def bench(load_models, tmp_path_factory, converted):
    place = tmp_path_factory.mktemp("faulty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_WORKER", "faulty_rank")
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", "")))))
        patch.setenv("FAULTY_RANK", str(place / "fault"))
        made = Bench(load_models("tiny-sensitive"), converted("tiny-sensitive"), place / "fault")
        made.tell("none")
        yield made


@pytest.fixture(scope="module")
def two_ranks(bench):
    with bench.start() as candidate:
        yield candidate


@pytest.fixture(autouse=True)
def no_fault_afterwards(bench):
    yield
    bench.tell("none")


def test_two_ranks_pass_like_one_process(bench, two_ranks):
    judgement, weights, shown = bench.judged(two_ranks)
    assert judgement.verdict == "PASS"
    assert weights.compared == len(bench.models.entries)
    assert {(check.what, check.compared == check.expected, check.wrong) for check in shown} == {
        (what, True, ()) for what in ("weights", "values", "randomness")
    }


def test_two_ranks_are_one_process_but_for_rounding(bench, two_ranks):
    two_ranks.load("fp32")
    side = two_ranks.forward(bench.recording, bench.models.probes)
    side.finish()
    m = bench.models
    ours = side.passes["accumulated"].outputs
    alone = m.candidate(**paddle_backend.inputs(m.batch))
    mask = m.batch.attention_mask.astype(bool)
    difference = np.abs(ours["logits"].numpy() - alone["logits"].numpy())[mask]
    assert difference.mean() <= 1e-6
    assert abs(float(ours["loss"]) - float(alone["loss"])) <= 1e-6


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        ("qkv_cut_naively", "layers.0.attn"),
        ("shards_swapped", "layers.0.mlp"),
        ("bias_on_every_rank", "layers.0.attn"),
        ("sum_missing", "layers.0.attn"),
        ("vocabulary_offset", "embeddings"),
        ("norms_differ", "layers.1.mlp"),
        ("same_randomness", "model.layers.0.attn"),
        ("own_randomness_everywhere", "model.embeddings.drop"),
        ("nothing_dropped randomness", "model.embeddings.drop"),
        ("everything_dropped randomness", "model.embeddings.drop"),
        ("weight_of_its_own load", "model.layers.0.extra"),
        ("order_of_its_own forward", "the order of modules (isolated)"),
    ],
)
def test_mistake_of_ranks_turns_the_gate_red(bench, two_ranks, fault, first):
    bench.tell(fault)
    judgement, _, shown = bench.judged(two_ranks)
    assert judgement.verdict == "FAIL"
    assert judgement.exit_code == 1
    named = {judgement.first_failing.probe, *(name for check in shown for name in check.wrong)}
    assert any(first in name for name in named)


def test_weights_cut_or_dealt_wrongly_are_named(bench, two_ranks):
    for fault, weight in (("qkv_cut_naively", "attn.Wqkv.weight"), ("shards_swapped", "mlp.Wi.weight")):
        bench.tell(fault)
        _, weights, _ = bench.judged(two_ranks)
        assert {d.paddle.partition(".layers.")[2][2:] for d in weights.differences} >= {weight}


def test_gradient_that_is_not_summed_turns_the_backward_phase_red(bench, two_ranks):
    run = Run(phase="backward", tensor_parallel=2)
    assert bench.judged(two_ranks, run)[0].verdict == "PASS"
    bench.tell("gradient_sum_missing")
    assert bench.judged(two_ranks, run)[0].verdict == "FAIL"
    assert bench.judged(two_ranks)[0].verdict == "PASS"  # the forward phase cannot see it


def test_probe_that_one_rank_does_not_show_was_not_compared(bench, two_ranks):
    bench.tell("probe_not_seen")
    judgement, _, shown = bench.judged(two_ranks)
    assert judgement.verdict == "NOT_COMPARED"
    assert judgement.exit_code == 5
    values = next(check for check in shown if check.what == "values")
    assert values.compared == values.expected - len(MODES)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dies", "rank 1 of 2 was ended by SIGKILL during `forward`"),
        ("raises", "no room left in this rank"),
        ("answers_nonsense", "cannot be read"),
    ],
)
def test_rank_that_ends_is_an_error_and_no_process_is_left(bench, fault, words):
    started = time.monotonic()
    with bench.start() as candidate:
        candidate.load("fp32")
        processes = candidate._ranks.process_ids
        bench.tell(f"{fault} forward")
        with pytest.raises(RankError) as raised:
            candidate.forward(bench.recording, bench.models.probes)
    assert words in str(raised.value)
    assert raised.value.exit_code == 5
    assert time.monotonic() - started < 60
    assert len(processes) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_rank_that_hangs_is_given_up_on(bench):
    with bench.start() as candidate:
        candidate.load("fp32")
        candidate._ranks._timeout_s = 3.0
        bench.tell("hangs forward")
        with pytest.raises(RankError, match="no answer to `forward` from rank 0, 1 of 2 in 3 s"):
            candidate.forward(bench.recording, bench.models.probes)


def test_ranks_end_when_their_parent_is_gone(bench):
    with bench.start() as candidate:
        candidate.load("fp32")
        for process in candidate._ranks._processes:
            process.stdin.close()  # all that they see of it
        assert [process.wait(timeout=20) for process in candidate._ranks._processes] == [1, 1]
