"""Measures the Paddle encoder with blockwise attention against the Hugging Face encoder with sdpa, and other encoders.

Linux. For every input each side is a process of its own; both ModernBERTs have the same weights. The sides take turns,
so that a busy machine hurts all of them alike. Two threads each unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import ctypes
import json
import math
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
from modernbert_align.core.memory import keep_freed_memory
from modernbert_align.core.processor import let_mkl_use_avx2
from modernbert_align.core.table import load_table
from modernbert_align.errors import AlignError

HF, PADDLE, DEBERTA, BERT = "HF sdpa", "Paddle blockwise", "HF DeBERTa-v3-base", "PaddleNLP BERT-base"
PEERS_TAKE = 512  # tokens per sequence, of DeBERTa and BERT
KINDS = ("sliding_attention", "full_attention")
GROWTH = (1024, 2048, 4096, 8192)
GROWTH_LAYERS = 4
MIXED = "8 x 16..512"
Call = Callable[[dict[str, Any]], Any]


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
    parser.add_argument("--peers", action="store_true", help="also DeBERTa-v3-base and BERT-base, random weights")
    parser.add_argument("--growth", action="store_true", help="only how the time of each layer kind grows with length")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    if options.growth:
        found = growth(options.runs)
        sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else growth_table(found))
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="bench-attention-") as temp:
            source = resolve_model(options.model, load_table(), console.notify)
            request = Request(folder=source.folder, model=source.name, revision=source.revision, src="hf", dst="paddle")
            converted = convert(request, load_table(), Path(temp) / "candidate", force=False).out
            folders: dict[str, Path | None] = {HF: source.folder, PADDLE: converted}
            if options.peers:
                folders |= {DEBERTA: None, BERT: None}
            result = bench(folders, [int(length) for length in options.lengths.split(",")], options.runs)
    except (AlignError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    result = {"model": options.model, "threads": os.environ["OMP_NUM_THREADS"], "runs": options.runs, "inputs": result}
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if options.json else table(result))
    return 0


def bench(folders: dict[str, Path | None], lengths: list[int], runs: int) -> dict[str, dict[str, Any]]:
    """Input -> side -> median cost; peak memory is the highest above what the process had once its model was loaded."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, Any]] = {}
    for name, batch in inputs(lengths).items():
        short = batch["input_ids"].shape[1] <= PEERS_TAKE
        # New processes for every input: a peak never goes down again.
        console.notify(f"measuring {name}")
        sides: dict[str, Connection] = {}
        for side, folder in folders.items():
            if side in (DEBERTA, BERT) and not short:
                continue
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
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].size
        found[name] = {"tokens": int(tokens)} | {
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
    random = np.random.default_rng(0)  # the same rows whatever the lengths: 1930 tokens, the other half is padding
    ids = random.integers(5, 500, (8, 512))
    mask = (np.arange(512) < random.integers(16, 513, (8, 1))).astype(np.int64)
    found[MIXED] = {"input_ids": ids, "attention_mask": mask}
    return found


def serve(connection: Connection, side: str, folder: Path | None, batch: dict[str, Any]) -> None:
    """A side: load the encoder, then run a forward for every request."""
    warnings.simplefilter("ignore")  # said on import, no use to anyone here
    keep_freed_memory()  # on every side
    call = LOADERS[side](folder)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak from here on, not that of loading
    loaded_mib = memory_mib("VmRSS")
    connection.send("loaded")
    while connection.recv() == "run":
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        call(batch)
        spent = time.process_time() - cpu_s, time.perf_counter() - wall_s
        connection.send((*spent, memory_mib("VmHWM") - loaded_mib))


def reference(folder: Path) -> Call:
    """Forwards of the Hugging Face encoder with sdpa."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch_call(transformers.ModernBertModel.from_pretrained(folder, attn_implementation="sdpa"))


def deberta(_folder: None) -> Call:
    """Forwards of an encoder of DeBERTa-v3-base's shape, with random weights.

    Source: the config.json published as microsoft/deberta-v3-base.
    """
    import transformers

    config = transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        relative_attention=True, max_relative_positions=-1, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    return torch_call(transformers.DebertaV2Model(config))


def torch_call(model: Any) -> Call:
    """Forwards of a PyTorch encoder."""
    import torch

    model.eval()

    def call(batch: dict[str, Any]) -> None:
        with torch.no_grad():
            model(**{name: torch.from_numpy(values) for name, values in batch.items()})

    return call


def candidate(folder: Path) -> Call:
    """Forwards of the Paddle encoder with blockwise attention."""
    from modernbert_align.backends import paddle as paddle_backend

    return paddle_call(paddle_backend.load(folder, "ModernBertModel", "fp32", "blockwise"))


def bert(_folder: None) -> Call:
    """Forwards of PaddleNLP's encoder of BERT-base's shape, with random weights and the same setting of MKL."""
    let_mkl_use_avx2()
    from paddlenlp.transformers import BertConfig, BertModel

    return paddle_call(BertModel(BertConfig()))


def layers_of(kind: str) -> Call:
    """Forwards of base's encoder with a few layers of one kind, with random weights."""
    from modernbert_align.models.modernbert import ModernBertConfig, ModernBertModel

    layers = {"num_hidden_layers": GROWTH_LAYERS, "layer_types": [kind] * GROWTH_LAYERS}
    return paddle_call(ModernBertModel(ModernBertConfig(**layers, attn_implementation="blockwise")))


def paddle_call(model: Any) -> Call:
    """Forwards of a Paddle encoder."""
    import paddle

    model.eval()

    def call(batch: dict[str, Any]) -> None:
        with paddle.no_grad():
            model(**{name: paddle.to_tensor(values) for name, values in batch.items()})

    return call


LOADERS: dict[str, Callable[[Any], Call]] = {HF: reference, PADDLE: candidate, DEBERTA: deberta, BERT: bert}


def growth(runs: int) -> dict[str, Any]:
    """Layer kind -> seconds of processor time by length, and the exponent of the line through their logarithms."""
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for kind in KINDS:
        call, seconds = layers_of(kind), {}
        for length in GROWTH:
            console.notify(f"measuring {GROWTH_LAYERS} layers of {kind}, 1 x {length}")
            batch = {"input_ids": random.integers(5, 500, (1, length))}
            taken = []
            for _ in range(runs + 1):
                start = time.process_time()
                call(batch)
                taken.append(time.process_time() - start)
            seconds[length] = statistics.median(taken[1:])
        slope = np.polyfit([math.log(n) for n in GROWTH], [math.log(s) for s in seconds.values()], 1)[0]
        found[kind] = {"cpu_s": seconds, "exponent": float(slope)}
    return found


def growth_table(found: dict[str, Any]) -> str:
    """The growth for people."""
    lines = [f"CPU s of {GROWTH_LAYERS} layers of base, fp32", "", f"{'':<20}" + "".join(f"{n:>9}" for n in GROWTH)]
    lines[-1] += f"{'exponent':>11}"
    for kind, values in found.items():
        seconds = "".join(f"{value:>9.2f}" for value in values["cpu_s"].values())
        lines.append(f"{kind:<20}{seconds}{values['exponent']:>11.2f}")
    return "\n".join(lines) + "\n"


def memory_mib(field: str) -> float:
    """A field of this process's `/proc/self/status`: VmRSS is memory now, VmHWM its highest value so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['model']}, encoder, fp32, {result['threads']} threads, median of {result['runs']} forwards",
        "",
        f"{'tokens':<14}{'':<22}{'CPU s':>8}{'wall s':>8}{'tokens/s':>10}{'MiB':>7}{'CPU / HF':>10}{'MiB / HF':>10}",
    ]
    for name, sides in result["inputs"].items():
        base, tokens = sides[HF], sides["tokens"]
        for side in (side for side in sides if side in LOADERS):
            cost = sides[side]
            ratios = f"{cost.cpu_s / base.cpu_s:>10.2f}{cost.peak_mib / base.peak_mib:>10.2f}"
            spent = f"{cost.cpu_s:>8.2f}{cost.wall_s:>8.2f}{tokens / cost.wall_s:>10.0f}{cost.peak_mib:>7.0f}"
            lines.append(f"{name:<14}{side:<22}{spent}{ratios}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
