"""Measures the Paddle encoder with blockwise attention against the Hugging Face encoder with sdpa.

Linux. For every input each side is a process of its own with the same weights. The sides take turns, so that a busy
machine hurts all of them alike. Two threads each unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.table import load_table
from modernbert_align.errors import AlignError

HF, PADDLE = "HF sdpa", "Paddle blockwise"
MIXED = "8 x 16..512"


class Cost(NamedTuple):
    """One forward: processor time over all threads, elapsed time, and the process's peak memory so far."""

    cpu_s: float
    wall_s: float
    peak_mib: float


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="base", help="a fixture, a checkpoint folder or a hub id (default: base)")
    parser.add_argument("--lengths", default="512,2048,8192", help="tokens of the single sequences")
    parser.add_argument("--runs", type=int, default=3, help="forwards of each side, after one that is not counted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-attention-") as temp:
            source = resolve_model(options.model, load_table(), console.notify)
            request = Request(folder=source.folder, model=source.name, revision=source.revision, src="hf", dst="paddle")
            converted = convert(request, load_table(), Path(temp) / "candidate", force=False).out
            folders = {HF: source.folder, PADDLE: converted}
            result = bench(folders, [int(length) for length in options.lengths.split(",")], options.runs)
    except (AlignError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    result = {"model": options.model, "threads": os.environ["OMP_NUM_THREADS"], "runs": options.runs, "inputs": result}
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if options.json else table(result))
    return 0


def bench(folders: dict[str, Path], lengths: list[int], runs: int) -> dict[str, dict[str, Cost]]:
    """Input -> side -> median cost; peak memory is the highest above what the process had once its model was loaded."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, Cost]] = {}
    for name, batch in inputs(lengths).items():
        # New processes for every input: a peak never goes down again.
        console.notify(f"measuring {name}")
        sides: dict[str, Connection] = {}
        for side, folder in folders.items():
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, side, folder, batch), daemon=True).start()
            sides[side] = ours
        for connection in sides.values():
            connection.recv()  # loaded
        costs: dict[str, list[Cost]] = {side: [] for side in sides}
        for _ in range(runs + 1):
            for side, connection in sides.items():
                connection.send("run")
                costs[side].append(Cost(*connection.recv()))
        for connection in sides.values():
            connection.send("stop")
        found[name] = {
            side: Cost(
                statistics.median(cost.cpu_s for cost in measured[1:]),
                statistics.median(cost.wall_s for cost in measured[1:]),
                measured[-1].peak_mib,
            )
            for side, measured in costs.items()
        }
    return found


def inputs(lengths: list[int]) -> dict[str, dict[str, Any]]:
    """Name -> keyword arguments of both encoders, as arrays."""
    random = np.random.default_rng(0)
    found: dict[str, dict[str, Any]] = {
        f"1 x {length}": {"input_ids": random.integers(5, 500, (1, length))} for length in lengths
    }
    mask = (np.arange(512) < random.integers(16, 513, (8, 1))).astype(np.int64)
    found[MIXED] = {"input_ids": random.integers(5, 500, (8, 512)), "attention_mask": mask}
    return found


def serve(connection: Connection, side: str, folder: Path, batch: dict[str, Any]) -> None:
    """A side: load the encoder, then run a forward for every request."""
    warnings.simplefilter("ignore")  # said on import, no use to anyone here
    call = reference(folder, batch) if side == HF else candidate(folder, batch)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak from here on, not that of loading
    loaded_mib = memory_mib("VmRSS")
    connection.send("loaded")
    while connection.recv() == "run":
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        call()
        spent = time.process_time() - cpu_s, time.perf_counter() - wall_s
        connection.send((*spent, memory_mib("VmHWM") - loaded_mib))


def reference(folder: Path, batch: dict[str, Any]) -> Callable[[], Any]:
    """A forward of the Hugging Face encoder with sdpa."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.ModernBertModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    arguments = {name: torch.from_numpy(values) for name, values in batch.items()}

    def call() -> None:
        with torch.no_grad():
            model(**arguments)

    return call


def candidate(folder: Path, batch: dict[str, Any]) -> Callable[[], Any]:
    """A forward of the Paddle encoder with blockwise attention."""
    import paddle

    from modernbert_align.backends import paddle as paddle_backend

    model = paddle_backend.load(folder, "ModernBertModel", "fp32", "blockwise")
    arguments = {name: paddle.to_tensor(values) for name, values in batch.items()}

    def call() -> None:
        with paddle.no_grad():
            model(**arguments)

    return call


def memory_mib(field: str) -> float:
    """A field of this process's `/proc/self/status`: VmRSS is memory now, VmHWM its highest value so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['model']}, encoder, fp32, {result['threads']} threads, median of {result['runs']} forwards",
        "",
        f"{'tokens':<14}{'':<26}{'CPU s':>9}{'wall s':>9}{'MiB':>9}{'CPU / HF':>11}{'MiB / HF':>11}",
    ]
    for name, sides in result["inputs"].items():
        base = sides[HF]
        for side, cost in sides.items():
            ratios = f"{cost.cpu_s / base.cpu_s:>11.2f}{cost.peak_mib / base.peak_mib:>11.2f}"
            lines.append(f"{name:<14}{side:<26}{cost.cpu_s:>9.2f}{cost.wall_s:>9.2f}{cost.peak_mib:>9.0f}{ratios}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
