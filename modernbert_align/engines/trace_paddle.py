"""Records the candidate alone: the Paddle model, end to end and with drawn values after every module."""

import gc
import time
from pathlib import Path
from typing import Any

import paddle

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends import runtime
from modernbert_align.core.drawn import draw
from modernbert_align.core.rows import MODES
from modernbert_align.core.trace import Machine, TracedPass, TracedProbe, TracedWeights
from modernbert_align.core.trace_file import TraceWriter
from modernbert_align.core.weight_check import weight_digests
from modernbert_align.engines.passes import Outputs, Pass, hooked, outputs_of, stopping
from modernbert_align.engines.trace_side import Keeper, Notify, Recorded, Subject


def record(folder: Path, subject: Subject, writer: TraceWriter, notify: Notify) -> Recorded:
    """Load a Paddle checkpoint and record it in every dtype.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    passes: list[TracedPass] = []
    weights: list[TracedWeights] = []
    absent: dict[str, str] = {}
    timings: dict[str, float] = {}
    for dtype in subject.dtypes:
        start = time.perf_counter()
        notify(f"{dtype}: loading the candidate")
        model = paddle_backend.load(folder, subject.architecture, dtype)
        digests, unmapped = weight_digests(subject.entries, paddle_backend.state_bits(model), "paddle")
        weights.append(TracedWeights(dtype=dtype, sha256=digests, unmapped=unmapped))
        places, absent = hooked(subject.probes, dict(model.named_sublayers()), "candidate")
        for mode in MODES:
            notify(f"{dtype}: {mode} pass over {len(subject.probes)} probes")
            keeper = Keeper(writer=writer, backend=paddle_backend, dtype=dtype, mode=mode)
            passes.append(_record_pass(model, subject, places, keeper))
        del model, places
        gc.collect()
        timings[dtype] = round(time.perf_counter() - start, 3)
    return Recorded(
        passes=tuple(passes),
        weights=tuple(weights),
        absent=absent,
        execution={dtype: paddle_backend.execution(dtype) for dtype in subject.dtypes},  # type: ignore[misc]
        machine=Machine(**runtime.describe(), paddle_device=paddle.get_device()),
        timings_s=timings,
    )


def _record_pass(model: Any, subject: Subject, modules: dict[str, Any], keeper: Keeper) -> TracedPass:
    """One forward pass; whatever happens in it is a finding."""
    by_name = {probe.name: probe for probe in subject.probes}
    one = Pass(lambda: _tensors(model(**paddle_backend.inputs(subject.batch))))
    places = {name: module.register_forward_post_hook for name, module in modules.items()}
    stops: list[str] = []
    found: dict[str, TracedProbe] = {}
    with paddle.no_grad(), stopping([one], places, _tensors):
        while (stop := one.next_stop()) is not None:
            stops.append(stop.probe)
            if stop.probe not in found:
                found[stop.probe] = TracedProbe(outputs=keeper.keep(by_name[stop.probe], stop.outputs))
            if keeper.mode == "isolated" and stop.outputs:
                shape = tuple(next(iter(stop.outputs.values())).shape)
                values = draw(subject.batch.sha256, stop.probe, shape, keeper.dtype)
                one.replace([paddle_backend.from_numpy(values)])
    if one.outputs is not None:
        for probe in subject.probes:
            if probe.key:
                found[probe.name] = TracedProbe(outputs=keeper.keep(probe, one.outputs))
    return TracedPass(dtype=keeper.dtype, mode=keeper.mode, stops=tuple(stops), error=one.error, probes=found)


def _tensors(output: Any) -> Outputs:
    return outputs_of(output, paddle.Tensor)
