"""Records the reference alone, with all that a candidate is measured against: oracle and nulls.

End to end, and with drawn values after every module. In each mode three passes run side by side: the reference as it
is, and with other kernels.
"""

import gc
import time
from pathlib import Path

import numpy as np
import torch

from modernbert_align.backends import hf, runtime
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.drawn import draw
from modernbert_align.core.metrics import ByRow
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES
from modernbert_align.core.trace import Machine, TracedPass, TracedProbe, TracedWeights
from modernbert_align.core.trace_file import TraceWriter
from modernbert_align.core.weight_check import weight_digests
from modernbert_align.engines.passes import Outputs, Pass, hooked
from modernbert_align.engines.reference_side import VARIATIONS, compared_tensor, null_parts, side_by_side
from modernbert_align.engines.trace_side import Keeper, Notify, Recorded, Subject
from modernbert_align.engines.truth import Truth


def record(folder: Path, config: ModelConfig, subject: Subject, writer: TraceWriter, notify: Notify) -> Recorded:
    """Load a Hugging Face checkpoint and record it in every dtype.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    passes: list[TracedPass] = []
    weights: list[TracedWeights] = []
    absent: dict[str, str] = {}
    timings: dict[str, float] = {}
    for dtype in subject.dtypes:
        start = time.perf_counter()
        notify(f"{dtype}: loading the reference")
        model = hf.load(folder, subject.architecture, dtype)
        digests, unmapped = weight_digests(subject.entries, hf.state_bits(model), "hf")
        weights.append(TracedWeights(dtype=dtype, sha256=digests, unmapped=unmapped))
        places, absent = hooked(subject.probes, dict(model.named_modules()), "reference")
        oracle = Oracle(config, subject.head, model)
        for mode in MODES:
            notify(f"{dtype}: {mode} passes over {len(subject.probes)} probes, with oracle and {', '.join(VARIATIONS)}")
            keeper = Keeper(writer=writer, backend=hf, dtype=dtype, mode=mode)
            with side_by_side(model, subject.batch, places, [mode]) as (reference, variations):
                running = reference, {name: one for (name, _), one in variations.items()}
                passes.append(_record_pass(running, subject, Truth(oracle, subject.batch), keeper))
        del model, places, oracle
        gc.collect()
        timings[dtype] = round(time.perf_counter() - start, 3)
    return Recorded(
        passes=tuple(passes),
        weights=tuple(weights),
        absent=absent,
        execution=dict.fromkeys(subject.dtypes, "native"),
        machine=Machine(
            **runtime.describe(),
            torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
            torch_threads=torch.get_num_threads(),
        ),
        timings_s=timings,
    )


def _record_pass(running: tuple[Pass, dict[str, Pass]], subject: Subject, truth: Truth, keeper: Keeper) -> TracedPass:
    """The reference's pass, and how far the others are from it."""
    reference, variations = running
    by_name = {probe.name: probe for probe in subject.probes}
    stops: list[str] = []
    found: dict[str, TracedProbe] = {}
    while (stop := reference.next_stop()) is not None:
        stops.append(stop.probe)
        probe = by_name[stop.probe]
        going = [reference]
        if stop.probe not in found:
            others = {name: one.advance(probe.name, found) for name, one in variations.items()}
            going += [one for name, one in variations.items() if others[name] is not None]
            found[probe.name] = _traced(probe, stop.outputs, others, truth, subject, keeper)
        if keeper.mode == "isolated" and stop.outputs:
            shape = tuple(next(iter(stop.outputs.values())).shape)
            values = draw(subject.batch.sha256, probe.name, shape, keeper.dtype)
            truth.record(probe, {"": hf.from_numpy(values)})
            for one in going:
                one.replace([hf.from_numpy(values)])
    for one in variations.values():
        one.finish()
    if reference.outputs is not None:
        for probe in subject.probes:
            if probe.key:
                others = {name: one.outputs for name, one in variations.items()}
                found[probe.name] = _traced(probe, reference.outputs, others, truth, subject, keeper)
    return TracedPass(dtype=keeper.dtype, mode=keeper.mode, stops=tuple(stops), error=reference.error, probes=found)


def _traced(
    probe: Probe,
    outputs: Outputs,
    others: dict[str, Outputs | None],
    truth: Truth,
    subject: Subject,
    keeper: Keeper,
) -> TracedProbe:
    kept = keeper.keep(probe, outputs)
    if not any(output.tensor for output in kept):
        return TracedProbe(outputs=kept)
    expected, value = hf.to_numpy(compared_tensor(probe, outputs)), truth.value(probe, keeper.mode)
    value = value.whole() if isinstance(value, ByRow) else value
    oracle = ""
    if value is not None and value.shape == expected.shape:
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found where it is compared
            error = np.asarray(expected - value, dtype=np.float32)
        oracle = keeper.writer.add(f"{keeper.tensor_name(probe)}/oracle", error.view(np.uint32), "float32")
    mask = subject.batch.attention_mask.astype(bool)
    return TracedProbe(outputs=kept, oracle=oracle, null_parts=null_parts(probe, mask, outputs, others))
