"""Measures what the layer-by-layer comparison costs over the plain forward passes it contains.

Linux, one process, one thread unless OMP_NUM_THREADS says otherwise: threads that wait for each other on a busy machine
spin, and would count as work.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from modernbert_align.backends import runtime
from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.checkpoint import open_checkpoint
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.fixtures import Inputs, default_inputs, make_inputs
from modernbert_align.core.model_config import ModelConfig, parse_config, read_config_file
from modernbert_align.core.probes import Probe, load_probes
from modernbert_align.core.rows import ENGINES, Dtype, EngineName
from modernbert_align.core.table import Entry, load_table
from modernbert_align.core.training import Run
from modernbert_align.errors import AlignError

ITEM_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
STEPS: dict[EngineName, tuple[str, ...]] = {
    "padiff": ("weights", "null", "isolated", "accumulated"),
    "stream": ("weights", "stream"),
}
# The reference with eager attention and its two variations (sdpa, permuted sums) in both modes; PaDiff runs the
# reference once more for each mode.
REFERENCE_FORWARDS: dict[EngineName, int] = {"padiff": 7, "stream": 5}
CANDIDATE_FORWARDS = 2  # isolated and accumulated
ORACLE_FORWARDS = 2  # isolated and accumulated


class Span(NamedTuple):
    """Elapsed seconds, and seconds of processor time over all threads."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison, prepared: what `modernbert-align diff` hands to the engine.

    Attributes:
        weights_bytes: Both models' weights in memory at the compared dtype.
    """

    reference: Path
    candidate: Path
    architecture: str
    prefix: str
    entries: tuple[Entry, ...]
    probes: tuple[Probe, ...]
    batch: Inputs
    dtype: Dtype
    weights_bytes: int
    config: ModelConfig
    head: str
    engine: EngineName


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="base", help="a fixture, a checkpoint folder or a hub id (default: base)")
    parser.add_argument("--dtype", choices=tuple(ITEM_BYTES), default="fp32", help="precision (default: fp32)")
    parser.add_argument("--engine", choices=ENGINES, default="padiff", help="what drives the models (default: padiff)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-diff-") as temp:
            result = {"model": options.model, **bench(prepare(options, Path(temp)))}
    except (AlignError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if options.json else tables(result))
    return 0


def prepare(options: argparse.Namespace, temp: Path) -> Case:
    """Find the model, convert it into `temp` and draw the inputs; imports no framework."""
    table = load_table()
    source = resolve_model(options.model, table, console.notify)
    raw = read_config_file(source.folder)
    where = str(source.folder / "config.json")
    config = parse_config(raw, where=where)
    head = table.head_of(raw.get("architectures"), where=where)
    request = Request(folder=source.folder, model=source.name, revision=source.revision, src="hf", dst="paddle")
    candidate = convert(request, table, temp / "candidate", force=False).out
    elements = sum(tensor.elements for tensor in open_checkpoint(candidate).tensors.values())
    return Case(
        reference=source.folder,
        candidate=candidate,
        architecture=table.architecture(head),
        prefix=table.prefix(head),
        entries=table.expand(config, head),
        probes=load_probes(config, head, table.prefix(head)),
        batch=make_inputs(source.inputs or default_inputs(config), config, head),
        dtype=options.dtype,
        weights_bytes=2 * elements * ITEM_BYTES[options.dtype],
        config=config,
        head=head,
        engine=options.engine,
    )


def bench(case: Case) -> dict[str, Any]:
    """Time the plain forwards, then the comparison.

    Raises:
        AlignError: A pass of the comparison did not run to its end, so its time means nothing.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runtime.pin()
    import transformers

    from modernbert_align.models import modernbert

    for namespace in (transformers, modernbert):  # both import a model's code when it is first asked for
        getattr(namespace, case.architecture)
    import modernbert_align.engines.alignment  # noqa: F401 - PaDiff too belongs to the imports

    imports_mib = memory_mib("VmRSS")
    (reference, oracle), candidate = reference_forwards(case), candidate_forward(case)
    gc.collect()  # the two models just timed; the comparison loads its own
    steps = compare(case)
    contained = total(
        [reference] * REFERENCE_FORWARDS[case.engine] + [candidate] * CANDIDATE_FORWARDS + [oracle] * ORACLE_FORWARDS
    )
    comparison = total(list(steps.values()))
    weights_mib = case.weights_bytes / 2**20
    above_mib = memory_mib("VmHWM") - imports_mib - weights_mib
    return {
        "dtype": case.dtype,
        "engine": case.engine,
        "tokens": list(case.batch.input_ids.shape),
        "probes": len(case.probes),
        "threads": os.environ["OMP_NUM_THREADS"],
        "reference_forward": reference._asdict(),
        "candidate_forward": candidate._asdict(),
        "oracle_forward": oracle._asdict(),
        "steps": {name: span._asdict() for name, span in steps.items()},
        "comparison": comparison._asdict(),
        "contained_forwards": contained._asdict(),
        "ratio": {
            "wall_s": comparison.wall_s / contained.wall_s,
            "cpu_s": comparison.cpu_s / contained.cpu_s,
            "memory": above_mib / weights_mib,
        },
        "imports_mib": imports_mib,
        "weights_mib": weights_mib,
        "peak_above_mib": above_mib,
    }


def compare(case: Case) -> dict[str, Span]:
    """Run the comparison.

    Returns:
        Its steps after loading. Wall time is its own clock's; it announces every step, so processor time is taken then
        (that of the last step includes freeing the models).

    Raises:
        AlignError: A pass did not run to its end, so its time means nothing.
    """
    from modernbert_align.engines import alignment

    marks: list[float] = []

    def notify(message: str) -> None:
        marks.append(time.process_time())
        console.notify(message)

    result = alignment.run_alignment(
        case.reference,
        case.candidate,
        case.architecture,
        case.config,
        case.head,
        Run(forward_engine=case.engine),
        case.prefix,
        case.entries,
        case.probes,
        case.batch,
        (case.dtype,),
        notify,
    )
    marks.append(time.process_time())
    for note in result.passes:
        if note.error:
            raise AlignError(f"the {note.mode} pass stopped: {note.error}")
    steps = STEPS[case.engine]
    starts, ends = marks[-len(steps) - 1 : -1], marks[-len(steps) :]
    return {
        step: Span(result.timings_s[f"{case.dtype}_{step}"], end - start)
        for step, start, end in zip(steps, starts, ends, strict=True)
    }


def reference_forwards(case: Case) -> tuple[Span, Span]:
    """Time of one forward of the Hugging Face model, without hooks, and of one of the float64 oracle."""
    import torch

    from modernbert_align.backends import hf
    from modernbert_align.backends.oracle import Oracle

    model, arguments = hf.load(case.reference, case.architecture, case.dtype), hf.inputs(case.batch)
    oracle = Oracle(case.config, case.head, model)
    with torch.no_grad():
        plain = median_span(lambda: model(**arguments))
        return plain, median_span(lambda: [None for _ in oracle.accumulated(case.batch)])


def candidate_forward(case: Case) -> Span:
    """Time of one forward of the Paddle model, without hooks."""
    import paddle

    from modernbert_align.backends import paddle as paddle_backend

    model = paddle_backend.load(case.candidate, case.architecture, case.dtype)
    arguments = paddle_backend.inputs(case.batch)
    with paddle.no_grad():
        return median_span(lambda: model(**arguments))


def median_span(call: Callable[[], Any]) -> Span:
    """Medians of three timed calls after one that is not counted."""
    call()
    spans = []
    for _ in range(3):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        call()
        spans.append(Span(time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return Span(*map(statistics.median, zip(*spans, strict=True)))


def total(spans: list[Span]) -> Span:
    """The sum of some spans."""
    return Span(*map(sum, zip(*spans, strict=True)))


def memory_mib(field: str) -> float:
    """A field of this process's `/proc/self/status`: VmRSS is memory now, VmHWM its highest value so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def tables(result: dict[str, Any]) -> str:
    """The result for people."""
    rows, seq = result["tokens"]
    engine = result["engine"]
    forwards = f"{REFERENCE_FORWARDS[engine]} + {CANDIDATE_FORWARDS} + {ORACLE_FORWARDS} forwards, plain"
    spans = {
        "plain forward, reference": result["reference_forward"],
        "plain forward, candidate": result["candidate_forward"],
        "plain forward, oracle": result["oracle_forward"],
        **{f"comparison, {step}": span for step, span in result["steps"].items()},
        "comparison, all steps": result["comparison"],
        forwards: result["contained_forwards"],
        "ratio of these two": result["ratio"],
    }
    memory = {
        "after the imports": f"{result['imports_mib']:.0f}",
        "weights of both models": f"{result['weights_mib']:.0f}",
        "peak above these two": f"{result['peak_above_mib']:.0f}",
        "ratio of that to the weights": f"{result['ratio']['memory']:.2f}",
    }
    lines = [
        f"{result['model']} in {result['dtype']}, engine {engine}: {rows} rows of {seq} tokens, "
        f"{result['probes']} probes, {result['threads']} thread(s)",
        "",
        f"{'':<36}{'CPU s':>10}{'wall s':>10}",
        *(f"{name:<36}{span['cpu_s']:>10.2f}{span['wall_s']:>10.2f}" for name, span in spans.items()),
        "",
        f"{'':<36}{'MiB':>10}",
        *(f"{name:<36}{value:>10}" for name, value in memory.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
