"""Measures the Paddle model divided among processes against the same model in one process; or estimates it for GPUs.

Linux, CPU, gloo. The processes of one side share a model by tensor parallelism, one thread each; the other sides are
one process with one thread, and one with as many threads as there are processes. The sides take turns, so that a busy
machine hurts all of them alike. Forward pass and training step (loss, gradients, AdamW) of the masked LM in fp32.
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
from modernbert_align.core.memory import keep_freed_memory
from modernbert_align.core.model_config import SLIDING, ModelConfig, parse_config, read_config_file
from modernbert_align.core.ports import free_ports
from modernbert_align.core.processor import let_mkl_use_avx2
from modernbert_align.core.table import load_table
from modernbert_align.core.tensor_parallel import check_degree, divisions
from modernbert_align.errors import AlignError

HEAD = "ModernBertForMaskedLM"
FORWARD, STEP = "forward", "step"
GPUS = 8
ADAMW_BYTES = 16  # per weight: weight and gradient in bf16, a master copy and two moments in fp32
TRAINING = 3  # a backward pass computes twice what the forward pass does
LOGIT_PASSES = 12  # how often forward and backward of the loss read or write float32 logits
Batch = dict[str, Any]


class Side(NamedTuple):
    """One way to run the model."""

    processes: int
    threads: int

    def __str__(self) -> str:
        """As in the table."""
        many = "es" if self.processes > 1 else ""
        return f"{self.processes} process{many}, {self.threads} thread{'s' if self.threads > 1 else ''} each"


class Cost(NamedTuple):
    """What one rank spent, in all and in collectives: elapsed and processor time, bytes, number; and the loss."""

    wall_s: float
    cpu_s: float
    collective_s: float
    collective_bytes: int
    collectives: int
    loss: float


def main() -> int:
    """Measure or estimate, and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="base", help="a fixture, a checkpoint folder or a hub id (default: base)")
    parser.add_argument("--degree", type=int, default=2, help="processes that share a model (default: 2)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--runs", type=int, default=3, help="of each side, after one that is not counted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    estimated = parser.add_argument_group(f"an estimate for a training step on {GPUS} GPUs, with nothing run")
    estimated.add_argument("--estimate", action="store_true", help="only that; the batch is --batch x --length")
    estimated.add_argument("--flops", type=float, default=125e12, help="per second and GPU, as achieved (125e12)")
    estimated.add_argument("--bandwidth", type=float, default=200e9, help="bytes per second between GPUs (200e9)")
    estimated.add_argument("--latency", type=float, default=20e-6, help="seconds per collective (20e-6)")
    estimated.add_argument("--memory-bandwidth", type=float, default=1.5e12, help="bytes per second (1.5e12)")
    options = parser.parse_args()
    try:
        source = resolve_model(options.model, load_table(), console.notify)
        if options.estimate:
            found: Any = estimate(parse_config(read_config_file(source.folder)), options)
            text = estimate_table(found, options)
        else:
            with tempfile.TemporaryDirectory(prefix="bench-parallel-") as temp:
                request = Request(
                    folder=source.folder, model=source.name, revision=source.revision, src="hf", dst="paddle"
                )
                folder = convert(request, load_table(), Path(temp) / "candidate", force=False).out
                found = bench(folder, options)
            text = table(found, options)
    except (AlignError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else text)
    return 0


def bench(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Side -> forward and step -> medians over the runs."""
    context = multiprocessing.get_context("spawn")
    random = np.random.default_rng(0)
    ids = random.integers(5, 500, (options.batch, options.length))
    batch = {"input_ids": ids, "labels": random.integers(5, 500, ids.shape)}
    sides: dict[Side, list[Connection]] = {}
    started = []
    try:
        for side in (Side(1, 1), Side(1, options.degree), Side(options.degree, 1)):
            console.notify(f"starting {side}")
            os.environ["OMP_NUM_THREADS"] = str(side.threads)  # before the process starts, or nobody reads it
            endpoints = [f"127.0.0.1:{port}" for port in free_ports(side.processes)]
            sides[side] = []
            for rank in range(side.processes):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs, folder, batch, rank, endpoints), daemon=True)
                process.start()
                started.append(process)
                sides[side].append(ours)
            for connection in sides[side]:
                connection.recv()  # loaded
        costs: dict[tuple[Side, str], list[list[Cost]]] = {
            (side, what): [] for side in sides for what in (FORWARD, STEP)
        }
        for run in range(options.runs + 1):
            for (side, what), measured in costs.items():
                console.notify(f"run {run}: {what}, {side}")
                for connection in sides[side]:
                    connection.send(what)
                measured.append([Cost(*connection.recv()) for connection in sides[side]])
    finally:
        for process in started:
            process.kill()
            process.join()
    found: dict[str, dict[str, Any]] = {str(side): {} for side in sides}
    for (side, what), measured in costs.items():
        found[str(side)][what] = {
            "wall_s": statistics.median(max(cost.wall_s for cost in ranks) for ranks in measured[1:]),
            "cpu_s": statistics.median(sum(cost.cpu_s for cost in ranks) for ranks in measured[1:]),
            "collective_share": statistics.median(ranks[0].collective_s / ranks[0].wall_s for ranks in measured[1:]),
            "collective_bytes": measured[-1][0].collective_bytes,
            "collectives": measured[-1][0].collectives,
            "first_loss": measured[0][0].loss,
        }
    return found


def serve(connection: Connection, folder: Path, batch: Batch, rank: int, endpoints: list[str]) -> None:
    """A rank of a side: load its share, then run what is asked for."""
    warnings.simplefilter("ignore")  # said on import, no use to anyone here
    os.environ |= {
        "PADDLE_DISTRI_BACKEND": "gloo",
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(endpoints)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "GLOG_minloglevel": "2",
    }
    keep_freed_memory()
    let_mkl_use_avx2()
    import paddle

    from modernbert_align.backends.paddle import quiet
    from modernbert_align.models import modernbert

    spent = watch_collectives()
    with quiet():
        place, wrap = join(len(endpoints), rank)
        model = getattr(modernbert, HEAD).from_pretrained(str(folder), **place)
    optimizer = wrap(paddle.optimizer.AdamW(1e-4, parameters=model.parameters()))
    arguments = {name: paddle.to_tensor(values) for name, values in batch.items()}
    connection.send("loaded")
    while True:
        what = connection.recv()
        spent.update(seconds=0.0, bytes=0, calls=0)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        if what == FORWARD:
            model.eval()
            with paddle.no_grad():
                loss = model(**arguments, return_dict=True).loss
        else:
            model.train()
            loss = model(**arguments, return_dict=True).loss
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
        value = float(loss)
        times = time.perf_counter() - wall_s, time.process_time() - cpu_s
        connection.send((*times, spent["seconds"], spent["bytes"], spent["calls"], value))


def join(degree: int, rank: int) -> tuple[dict[str, int], Callable[[Any], Any]]:
    """What `from_pretrained` takes on this rank, and what wraps an optimizer; nothing if there is one process."""
    if degree == 1:
        return {}, lambda optimizer: optimizer
    from paddle.distributed import fleet

    from modernbert_align.backends.gloo import give_groups_own_stores

    give_groups_own_stores()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": degree, "pp_degree": 1, "sharding_degree": 1}
    strategy.tensor_parallel_configs = {"tensor_init_seed": 1}
    fleet.init(is_collective=True, strategy=strategy, log_level="WARNING")
    return {"tensor_parallel_degree": degree, "tensor_parallel_rank": rank}, fleet.distributed_optimizer


def watch_collectives() -> dict[str, Any]:
    """Seconds in, bytes given to, and number of collectives from now on. A rank waits for slower ones in them."""
    import paddle.distributed as dist

    spent: dict[str, Any] = {"seconds": 0.0, "bytes": 0, "calls": 0}

    def watched(collective: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = collective(*arguments, **named)
            spent["seconds"] += time.perf_counter() - start
            tensor = arguments[argument]
            spent["bytes"] += tensor.size * tensor.element_size()
            spent["calls"] += 1
            return result

        return call

    dist.all_reduce = watched(dist.all_reduce, 0)
    dist.all_gather = watched(dist.all_gather, 1)
    return spent


def table(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The measurement for people."""
    first = next(iter(found.values()))
    title = f"{options.model}, masked LM, fp32, {options.batch} x {options.length} tokens"
    lines = [f"{title}, median of {options.runs} runs, in turns"]
    losses = [sides[FORWARD]["first_loss"] for sides in found.values()]
    lines += [f"loss {losses[0]:.6f}; the sides differ by at most {max(losses) - min(losses):.1e}", ""]
    lines += [f"{'':<39}{'wall s':>9}{'/ first':>9}{'CPU s':>9}{'in collectives':>16}{'calls':>7}{'MB given':>10}"]
    for what in (FORWARD, STEP):
        for side, costs in found.items():
            cost = costs[what]
            ratio = cost["wall_s"] / first[what]["wall_s"]
            spent = f"{cost['wall_s']:>9.3f}{ratio:>9.2f}{cost['cpu_s']:>9.3f}{cost['collective_share']:>16.1%}"
            moved = f"{cost['collectives']:>7}{cost['collective_bytes'] / 1e6:>10.2f}"
            lines.append(f"{what:<10}{side:<29}{spent}{moved}")
    return "\n".join(lines) + "\n"


def estimate(config: ModelConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A training step in bf16 on `GPUS` GPUs for every way to split them; by arithmetic, with nothing run.

    Matrix products are those of the weights in the table and of attention, three times a forward pass; what is divided
    is done at the rate of all ranks. The loss reads whole logits on every rank. Collectives are rings and overlap with
    nothing: an all-reduce sends 2(n-1)/n of its bytes, an all-gather (n-1)/n.
    """
    entries = load_table().expand(config, "masked_lm")
    found = []
    for degree in (n for n in range(1, GPUS + 1) if GPUS % n == 0):
        try:
            check_degree(config, entries, degree)
        except AlignError:
            continue  # not a way to split this model
        replicas = GPUS // degree
        tokens = options.batch * options.length / replicas
        divided = divisions(entries, degree).keys()
        share = {entry.paddle: 1 / degree if entry.paddle in divided else 1.0 for entry in entries}
        products = sum(
            2 * float(np.prod(entry.paddle_shape)) * share[entry.paddle]
            for entry in entries
            if entry.row.kind in ("linear", "decoder") and len(entry.paddle_shape) == 2
        )
        for kind in config.layer_types:
            seen = min(options.length, config.local_attention + 1) if kind == SLIDING else options.length
            products += 4 * config.hidden_size * seen / degree
        weights = sum(float(np.prod(entry.paddle_shape)) * share[entry.paddle] for entry in entries if entry.op.stored)
        logits = tokens * config.vocab_size
        layers = len(config.layer_types)
        reductions = 4 * layers + 2 if degree > 1 else 0  # two a layer and direction; embedding; the decoder's input
        reduced = reductions * 2 * (degree - 1) / degree * tokens * config.hidden_size * 2
        gathered = (degree - 1) / degree * logits * 2
        averaged = 2 * (replicas - 1) / replicas * weights * 2
        times = {
            "products_s": TRAINING * tokens * products / options.flops,
            "loss_s": LOGIT_PASSES * 4 * logits / options.memory_bandwidth,
            "tensor_parallel_s": (reduced + gathered) / options.bandwidth
            + (reductions + 1) * options.latency * (degree > 1),
            "data_parallel_s": averaged / options.bandwidth + options.latency * (replicas > 1),
        }
        step_s = sum(times.values())
        found.append(
            {"tensor_parallel": degree, "data_parallel": replicas, **times, "step_s": step_s}
            | {"tokens_per_s": options.batch * options.length / step_s, "memory_gb": weights * ADAMW_BYTES / 1e9}
            | {"reductions": reductions, "tensor_parallel_bytes": reduced + gathered}
        )
    return found


def estimate_table(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The estimate for people."""
    lines = [
        f"ESTIMATE, nothing was run: {options.model}, masked LM, bf16, on {GPUS} GPUs, "
        f"{options.batch} x {options.length} tokens a step",
        f"assumed: {options.flops / 1e12:g} TFLOP/s and {options.memory_bandwidth / 1e12:g} TB/s of memory each, "
        f"{options.bandwidth / 1e9:g} GB/s between GPUs, {options.latency * 1e6:g} us a collective, no overlap",
        "",
        f"{'tensor x data':<15}{'products':>10}{'loss':>8}{'tensor p.':>11}{'data p.':>9}{'step ms':>9}"
        f"{'tokens/s':>11}{'weights, AdamW GB':>19}",
    ]
    for row in found:
        parts = "".join(
            f"{row[name] * 1e3:>{width}.1f}"
            for name, width in (
                ("products_s", 10),
                ("loss_s", 8),
                ("tensor_parallel_s", 11),
                ("data_parallel_s", 9),
                ("step_s", 9),
            )
        )
        split = f"{row['tensor_parallel']} x {row['data_parallel']}"
        lines.append(f"{split:<15}{parts}{row['tokens_per_s']:>11.0f}{row['memory_gb']:>19.2f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
