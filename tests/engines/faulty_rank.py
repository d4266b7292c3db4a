"""A rank that makes the mistake written in the file FAULTY_RANK names: run in place of `engines.rank_worker`."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paddle
import paddle.nn.functional as F

from modernbert_align.engines import rank_worker
from modernbert_align.models.modernbert import layers, modeling, parallel

RANK = int(os.environ["PADDLE_TRAINER_ID"])


@contextlib.contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def qkv_cut_naively() -> Any:
    """Wqkv is cut into two halves instead of each of q, k and v."""
    right = parallel.division

    def naive(entry: Any, degree: int) -> Any:
        found = right(entry, degree)
        if found is None or not entry.paddle.endswith("attn.Wqkv.weight"):
            return found
        return type(found)(axis=found.axis, parts=1, degree=degree)

    return instead(parallel, "division", naive)


def shards_swapped() -> Any:
    """Every rank loads the other one's shards of the MLP."""
    right = parallel.convert_actions

    def swapped(config: Any, architecture: str, is_split: bool) -> Any:
        own = right(config, architecture, is_split)
        rank, config.tensor_parallel_rank = config.tensor_parallel_rank, 1 - config.tensor_parallel_rank
        other = right(config, architecture, is_split)
        config.tensor_parallel_rank = rank
        return {name: other[name] if ".mlp.Wi." in name else action for name, action in own.items()}

    return instead(modeling, "convert_actions", swapped)


def _row_product(product: Callable[..., Any]) -> Any:
    return instead(parallel.RowLinear, "_product", product)


def bias_on_every_rank() -> Any:
    """The bias of Wo is added before the sum, so as often as there are ranks."""
    return _row_product(lambda self, x, weight, bias: parallel.summed(F.linear(x, weight, bias), parallel.rank_group()))


def sum_missing() -> Any:
    """Every rank goes on with its own part of Wo's output."""
    return _row_product(lambda self, x, weight, bias: F.linear(x, weight, bias))


def gradient_sum_missing() -> Any:
    """The gradient of what every rank has is only this rank's part."""
    return instead(parallel._Copied, "backward", staticmethod(lambda ctx, gradient: gradient.clone()))


@contextlib.contextmanager
def vocabulary_offset() -> Iterator[None]:
    """The first token of a rank's share is taken to be the one before."""
    right = layers.ParallelTokenEmbedding.forward

    def forward(self: Any, input_ids: Any) -> Any:
        with instead(self, "vocab_start_index", self.vocab_start_index + RANK):
            return right(self, input_ids)

    with instead(layers.ParallelTokenEmbedding, "forward", forward):
        yield


def same_randomness() -> Any:
    """What is divided is dropped by the random state that all ranks have in common."""
    return instead(parallel, "own_randomness", contextlib.nullcontext)


@contextlib.contextmanager
def own_randomness_everywhere() -> Iterator[None]:
    """What every rank has whole is dropped by the random state of its own."""
    right = paddle.nn.Dropout.forward

    def forward(self: Any, x: Any) -> Any:
        return parallel.drawing_apart(self.training, right, self, x)

    with instead(paddle.nn.Dropout, "forward", forward):
        yield


def nothing_dropped() -> Any:
    """Dropout is the identity, on all ranks."""
    return instead(paddle.nn.Dropout, "forward", lambda self, x: x)


def everything_dropped() -> Any:
    """Dropout keeps nothing, on all ranks."""
    return instead(paddle.nn.Dropout, "forward", lambda self, x: paddle.zeros_like(x))


@contextlib.contextmanager
def norms_differ() -> Iterator[None]:
    """Rank 1 has another weight where all must have the same."""
    right = rank_worker.backend.load

    def load(*arguments: Any, **named: Any) -> Any:
        model = right(*arguments, **named)
        if RANK == 1:
            weight = dict(model.named_parameters())["model.layers.1.mlp_norm.weight"]
            with paddle.no_grad():
                weight[3] = weight[3] * 2
        return model

    with instead(rank_worker.backend, "load", load):
        yield


def probe_not_seen() -> Any:
    """Rank 1 does not say what it has at one probe."""
    return contextlib.nullcontext()


def answers_nonsense() -> Any:
    """Rank 1 answers with what is no answer."""
    return contextlib.nullcontext()


def weight_of_its_own() -> Any:
    """Rank 1 has a weight that the others do not have."""
    return contextlib.nullcontext()


def _with_a_weight(notes: rank_worker.Notes, folder: Path, count: int, rank: int) -> None:
    if rank == 1:
        notes.rows["model.layers.0.extra"] = next(iter(notes.rows.values()))
    rank_worker.Notes.write(notes, folder, count, rank)


def order_of_its_own() -> Any:
    """Rank 1 came by the modules in another order."""
    return contextlib.nullcontext()


def _in_another_order(notes: rank_worker.Notes, folder: Path, count: int, rank: int) -> None:
    if rank == 1:
        notes.stops.reverse()
    rank_worker.Notes.write(notes, folder, count, rank)


def _without_a_probe(notes: rank_worker.Notes, folder: Path, count: int, rank: int) -> None:
    if rank == 1:
        notes.rows.pop("layers.2.attn", None)
    rank_worker.Notes.write(notes, folder, count, rank)


def _nonsense(_notes: rank_worker.Notes, folder: Path, count: int, rank: int) -> None:
    rank_worker.message_file(folder, count, rank).write_text("{}" if rank == 0 else "nothing")


NOTES = {
    "probe_not_seen": _without_a_probe,
    "answers_nonsense": _nonsense,
    "weight_of_its_own": _with_a_weight,
    "order_of_its_own": _in_another_order,
}


def dies() -> Any:
    """Rank 1 is killed."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return contextlib.nullcontext()


def raises() -> Any:
    """Rank 1 ends with an error."""
    if RANK == 1:
        raise RuntimeError("no room left in this rank")
    return contextlib.nullcontext()


def hangs() -> Any:
    """Rank 1 never answers."""
    while RANK == 1:
        time.sleep(60)
    return contextlib.nullcontext()


class FaultyWorker(rank_worker.Worker):
    """Makes a mistake while it answers."""

    def answer(self, request: Any, given: Any) -> Any:
        name, *kinds = Path(os.environ["FAULTY_RANK"]).read_text().split()
        if name == "none" or (kinds and request.kind not in kinds):
            return super().answer(request, given)
        with globals()[name]():
            found = super().answer(request, given)
        if name in NOTES:
            found.write = lambda *arguments: NOTES[name](found, *arguments)
        return found


if __name__ == "__main__":
    rank_worker.Worker = FaultyWorker  # type: ignore[misc]
    rank_worker.main(Path(sys.argv[1]))
