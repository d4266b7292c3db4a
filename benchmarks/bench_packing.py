"""Measures training on packed rows against training on padded batches, of Paddle and of Hugging Face.

Linux. The sequences are the same for every side, and so is the work: masked-LM loss and gradients of all weights, fp32.
Each side is a process of its own with the same weights. The sides take turns, so that a busy machine hurts all of them
alike. Two threads each unless OMP_NUM_THREADS says otherwise.
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
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_attention import Cost, memory_mib

from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.table import load_table
from modernbert_align.errors import AlignError
from modernbert_align.models.modernbert import Packer

HF = "HF sdpa, padded"
EAGER, BLOCKWISE, PACKED = "Paddle eager, padded", "Paddle blockwise, padded", "Paddle, packed"
HEAD = "ModernBertForMaskedLM"
IGNORED = -100
Batches = list[dict[str, npt.NDArray[Any]]]


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="base", help="a fixture, a checkpoint folder or a hub id (default: base)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens of a row, and of the longest sequence")
    parser.add_argument("--sequences", type=int, default=20, help="how many sequences to train on in a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, after one that is not counted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sequences = draw(options.sequences, options.max_tokens)
    batches = {PACKED: list(Packer(sequences, options.max_tokens))}
    batches[HF] = batches[EAGER] = batches[BLOCKWISE] = padded(sequences, options.max_tokens)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-packing-") as temp:
            source = resolve_model(options.model, load_table(), console.notify)
            request = Request(folder=source.folder, model=source.name, revision=source.revision, src="hf", dst="paddle")
            converted = convert(request, load_table(), Path(temp) / "candidate", force=False).out
            folders = {HF: source.folder, EAGER: converted, BLOCKWISE: converted, PACKED: converted}
            sides = bench({side: (folder, batches[side]) for side, folder in folders.items()}, options.runs)
    except (AlignError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    result = {
        "model": options.model,
        "threads": os.environ["OMP_NUM_THREADS"],
        "runs": options.runs,
        "tokens": sum(len(sequence["input_ids"]) for sequence in sequences),
        "efficiency": {str(rows): efficiency(rows) for rows in (1024, 8192)},
        "sides": {side: {**cost._asdict(), "places": places(batches[side])} for side, cost in sides.items()},
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if options.json else table(result))
    return 0


def draw(count: int, longest: int) -> Batches:
    """Sequences with lengths as of web text: log-normal, median 400, cut; 30 % of the tokens have labels."""
    random = np.random.default_rng(0)
    found = []
    for length in random.lognormal(6.0, 1.0, count).astype(int).clip(8, longest):
        ids = random.integers(5, 500, length)
        found.append({"input_ids": ids, "labels": np.where(random.random(length) < 0.3, ids, IGNORED)})
    return found


def padded(sequences: Batches, max_tokens: int) -> Batches:
    """Batches in the order of the stream, each with about `max_tokens` tokens, padded to its longest sequence."""
    mean = sum(len(sequence["input_ids"]) for sequence in sequences) / len(sequences)
    rows = max(1, round(max_tokens / mean))
    found = []
    for start in range(0, len(sequences), rows):
        batch = sequences[start : start + rows]
        shape = (len(batch), max(len(sequence["input_ids"]) for sequence in batch))
        filled = {
            "input_ids": np.zeros(shape, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORED),
        }
        for row, sequence in enumerate(batch):
            length = len(sequence["input_ids"])
            filled["input_ids"][row, :length] = sequence["input_ids"]
            filled["labels"][row, :length] = sequence["labels"]
            filled["attention_mask"][row, :length] = 1
        found.append(filled)
    return found


def efficiency(max_tokens: int) -> dict[str, float | None]:
    """Tokens per place of 20,000 sequences, packed and padded."""
    sequences = draw(20_000, max_tokens)
    packer = Packer(sequences, max_tokens)
    for _ in packer:
        pass
    return {"packed": packer.efficiency, "padded": packer.tokens / places(padded(sequences, max_tokens))}


def places(batches: Batches) -> int:
    """Tokens and padding."""
    return sum(batch["input_ids"].size for batch in batches)


def bench(sides: dict[str, tuple[Path, Batches]], runs: int) -> dict[str, Cost]:
    """Median cost of a run over all batches of a side; memory is the highest above that of the loaded model."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    for side, (folder, batches) in sides.items():
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side, folder, batches), daemon=True).start()
        connections[side] = ours
    for connection in connections.values():
        connection.recv()  # loaded
    costs: dict[str, list[Cost]] = {side: [] for side in sides}
    for number in range(runs + 1):
        console.notify(f"measuring, run {number} of {runs}")
        for side, connection in connections.items():
            connection.send("run")
            costs[side].append(Cost(*connection.recv()))
    for connection in connections.values():
        connection.send("stop")
    return {
        side: Cost(
            statistics.median(cost.cpu_s for cost in measured[1:]),
            statistics.median(cost.wall_s for cost in measured[1:]),
            measured[-1].peak_mib,
        )
        for side, measured in costs.items()
    }


def serve(connection: Connection, side: str, folder: Path, batches: Batches) -> None:
    """A side: load the model, then take the gradients of every batch for every request."""
    warnings.simplefilter("ignore")  # said on import, no use to anyone here
    step = reference(folder) if side == HF else candidate(folder, side)
    loaded_mib = memory_mib("VmRSS")
    connection.send("loaded")
    while connection.recv() == "run":
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for batch in batches:
            step(batch)
        spent = time.process_time() - cpu_s, time.perf_counter() - wall_s
        connection.send((*spent, memory_mib("VmHWM") - loaded_mib))


def reference(folder: Path) -> Callable[[dict[str, npt.NDArray[Any]]], None]:
    """Loss and gradients of the Hugging Face model with sdpa."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.ModernBertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").train()

    def step(batch: dict[str, npt.NDArray[Any]]) -> None:
        model.zero_grad()
        model(**{name: torch.from_numpy(values) for name, values in batch.items()}).loss.backward()

    return step


def candidate(folder: Path, side: str) -> Callable[[dict[str, npt.NDArray[Any]]], None]:
    """Loss and gradients of the Paddle model; packed rows with the attention it chooses by itself."""
    import paddle

    from modernbert_align.backends import paddle as paddle_backend

    model = paddle_backend.load(folder, HEAD, "fp32")
    model.config.attn_implementation = {EAGER: "eager", BLOCKWISE: "blockwise"}.get(side)
    model.train()

    def step(batch: dict[str, npt.NDArray[Any]]) -> None:
        model.clear_gradients()
        tensors = {name: paddle.to_tensor(values) for name, values in batch.items()}
        model(**tensors, return_dict=True).loss.backward()

    return step


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = ["tokens per place, 20,000 sequences, log-normal lengths of median 400:"]
    for rows, found in result["efficiency"].items():
        lines.append(f"  rows of {rows:>5}: packed {found['packed']:.2%}, padded batches {found['padded']:.2%}")
    lines += [
        "",
        f"{result['model']}, masked LM, forward and backward, fp32, {result['threads']} threads, "
        f"{result['tokens']} tokens, median of {result['runs']} runs",
        "",
        f"{'':<26}{'places':>8}{'CPU s':>9}{'wall s':>9}{'MiB':>9}{'CPU / HF':>11}{'MiB / HF':>11}",
    ]
    base = result["sides"][HF]
    for side, cost in result["sides"].items():
        ratios = f"{cost['cpu_s'] / base['cpu_s']:>11.2f}{cost['peak_mib'] / base['peak_mib']:>11.2f}"
        lines.append(
            f"{side:<26}{cost['places']:>8}{cost['cpu_s']:>9.2f}{cost['wall_s']:>9.2f}{cost['peak_mib']:>9.0f}{ratios}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
