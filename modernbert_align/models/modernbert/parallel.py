"""Tensor parallelism: the layers whose weights are divided among ranks, chosen by `tensor_parallel_degree`.

Layers, groups and random states are those of Paddle's fleet. A layer divided by its output features (Wqkv, Wi, the
vocabulary of the decoder) takes what every rank has and gives every rank its share; one divided by its input features
(Wo) takes the shares and sums up what the ranks make of them. Norms, the prediction head and the classifiers are on
every rank. Which weight is divided how is said by the table (`tp`), see `core.tensor_parallel`.

fleet's own forward passes need kernels that only GPU and XPU have (paddle 3.3.1: ProcessGroupGloo lacks all_reduce on
the calculation stream). The three collectives below are `paddle.distributed`'s, which every backend has.

Source: paddlepaddle 3.3.1, distributed/fleet/layers/mpu/mp_layers.py and mp_ops.py; Shoeybi et al. 2019, Megatron-LM.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu.random import MODEL_PARALLEL_RNG, get_rng_state_tracker
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from paddlenlp.transformers.conversion_utils import split_or_merge_func

from modernbert_align.core.table import load_table
from modernbert_align.core.tensor_parallel import check_degree, division
from modernbert_align.errors import ConfigError
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.precision import rounded

_TRAINER_RNG = "local_seed"  # what PaddleNLP's Trainer calls the random state that differs between ranks


def degree_of(config: ModernBertConfig) -> int:
    """Number of ranks that share the weights; PaddleNLP writes -1 or 1 for a model that is not divided."""
    return max(1, config.tensor_parallel_degree)


def check(config: ModernBertConfig) -> None:
    """Whether a model of this configuration can be built in this process.

    Raises:
        UsageError: Heads or feed-forward units cannot be divided by the degree.
        ConfigError: fleet does not run with that degree, or this process has another rank.
    """
    degree = degree_of(config)
    if degree == 1:
        return
    check_degree(config, load_table().expand(config.resolved(), "base"), degree)
    groups = getattr(fleet.fleet, "_hcg", None)
    if groups is None or groups.get_model_parallel_world_size() != degree:
        running = 1 if groups is None else groups.get_model_parallel_world_size()
        raise ConfigError(
            f"tensor_parallel_degree is {degree}, fleet runs with {running}",
            hint="call fleet.init(is_collective=True, strategy=...) with that `mp_degree` first, in every process",
        )
    rank = groups.get_model_parallel_rank()
    if rank != config.tensor_parallel_rank:
        raise ConfigError(
            f"tensor_parallel_rank is {config.tensor_parallel_rank} and fleet's is {rank}, so this process would load "
            "another rank's weights",
            hint="pass fleet.get_hybrid_communicate_group().get_model_parallel_rank()",
        )


def divides_vocabulary(config: ModernBertConfig) -> bool:
    """Whether embedding and decoder are divided by tokens; each rank has the whole vocabulary otherwise."""
    return degree_of(config) > 1 and config.vocab_size % degree_of(config) == 0


class _Copied(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any) -> paddle.Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total


class _Summed(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any) -> paddle.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return gradient.clone()


class _Gathered(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any, axis: int) -> paddle.Tensor:
        ctx.group, ctx.axis = group, axis
        shares: list[paddle.Tensor] = []
        dist.all_gather(shares, x.contiguous(), group=group)
        return paddle.concat(shares, axis=axis)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return paddle.split(gradient, ctx.group.nranks, axis=ctx.axis)[ctx.group.rank].contiguous()


def copied(x: paddle.Tensor, group: Any) -> paddle.Tensor:
    """What every rank has, about to be used by each in its own way: gradients are summed on the way back."""
    return _Copied.apply(x, group)


def summed(x: paddle.Tensor, group: Any) -> paddle.Tensor:
    """The sum of what the ranks have, on every rank."""
    return _Summed.apply(x, group)


def gathered(x: paddle.Tensor, group: Any, axis: int = -1) -> paddle.Tensor:
    """The shares of all ranks, one after the other along an axis, on every rank."""
    return _Gathered.apply(x, group, axis)


def rank_group() -> Any:
    """The processes that share this process's model."""
    return fleet.get_hybrid_communicate_group().get_model_parallel_group()


class ColumnLinear(ColumnParallelLinear):
    """Linear divided by output features: [... in] on every rank -> each rank's share, [... out/degree]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, has_bias=bias, gather_output=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[... in] -> [... out/degree]."""
        return rounded(self._product, x, self.weight, self.bias)

    def _product(self, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
        return F.linear(copied(x, self.model_parallel_group), weight, bias)


class RowLinear(RowParallelLinear):
    """Linear divided by input features: each rank's share [... in/degree] -> [... out] on every rank.

    The bias is on every rank and is added once, to the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, has_bias=bias, input_is_parallel=True)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[... in/degree] -> [... out]."""
        return rounded(self._product, x, self.weight, self.bias)

    def _product(self, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
        total = summed(F.linear(x, weight), self.model_parallel_group)
        return total if bias is None else total + bias


class VocabularyEmbedding(VocabParallelEmbedding):
    """Embedding divided by tokens: every rank looks up its own ones, and the sum is the embedding."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def forward(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """[batch seq] -> [batch seq hidden]."""
        own = input_ids - self.vocab_start_index  # [batch seq]
        held = paddle.logical_and(own >= 0, own < self.weight.shape[0])
        rows = F.embedding(paddle.where(held, own, paddle.zeros_like(own)), self.weight)  # [batch seq hidden]
        return rounded(self._total, rows, held.unsqueeze(-1))

    def _total(self, rows: paddle.Tensor, held: paddle.Tensor) -> paddle.Tensor:
        return summed(paddle.where(held, rows, paddle.zeros([], dtype=rows.dtype)), self.model_parallel_group)


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Draw from the random state that differs between ranks, for what only this rank has.

    Raises:
        ConfigError: There is no such state; ranks would drop the same share of different heads.
    """
    tracker = get_rng_state_tracker()
    name = _TRAINER_RNG if _TRAINER_RNG in tracker.states_ else MODEL_PARALLEL_RNG
    if name not in tracker.states_:
        raise ConfigError(
            "ranks have no random state of their own, and would drop the same share of different heads",
            hint="call fleet.meta_parallel.model_parallel_random_seed(seed) in every process",
        )
    with tracker.rng_state(name):
        yield


def drawing_apart(apart: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that draws random numbers: `apart` from other ranks, or with the state they have in common."""
    if not apart:  # a static graph cannot record the context manager
        return function(*arguments)
    with own_randomness():
        return function(*arguments)


class CommonRandomness:
    """A hook before a forward pass: whether dropout takes the same on all ranks of what all of them have.

    Asks the other ranks once, in the first pass in training mode.
    """

    def __init__(self) -> None:
        self._checked = False

    def __call__(self, model: Any, _inputs: Any) -> None:
        """Check.

        Raises:
            ConfigError: Ranks were seeded differently; their hidden states would differ from the first dropout on.
        """
        config = model.config
        dropouts = (config.embedding_dropout, config.attention_dropout, config.classifier_dropout)
        if self._checked or not model.training or not any(dropouts):
            return
        state = paddle.get_rng_state()
        drawn = paddle.rand([8])
        paddle.set_rng_state(state)
        found: list[paddle.Tensor] = []
        dist.all_gather(found, drawn, group=rank_group())
        if any(bool((other != drawn).any()) for other in found):
            raise ConfigError(
                "ranks were seeded differently, and would drop different shares of what all of them have",
                hint="call fleet.meta_parallel.model_parallel_random_seed(seed) with one seed in every process",
            )
        self._checked = True


def replicate(parameter: paddle.Tensor) -> None:
    """Give all ranks the first one's values of a weight that is not divided: ranks without a seed draw differently."""
    group = rank_group()
    with paddle.no_grad():
        values = parameter.astype("float32")
        dist.broadcast(values, src=group.ranks[0], group=group)
        parameter.set_value(values.astype(parameter.dtype))


def is_divided(parameter: paddle.Tensor) -> bool:
    """Whether this process has only its share of a weight."""
    return bool(getattr(parameter, "is_distributed", False))


def convert_actions(config: ModernBertConfig, architecture: str, is_split: bool) -> dict[str, Callable[..., Any]]:
    """PaddleNLP's tensor-parallel mapping: Paddle name -> cuts a whole weight, or joins the shards of all ranks.

    Source: paddlenlp 2.8.1, transformers/conversion_utils.py, ConversionMixin._get_tensor_parallel_mappings.
    """
    degree = degree_of(config)
    function = split_or_merge_func(is_split, degree, config.tensor_parallel_rank, config.num_attention_heads)
    table = load_table()
    found: dict[str, Callable[..., Any]] = {}
    for entry in table.expand(config.resolved(), table.head_of([architecture], where=architecture)):
        divided = division(entry, degree)
        if divided is None or not entry.op.stored:
            continue
        last = divided.axis == len(entry.paddle_shape) - 1
        found[entry.paddle] = _action(function, last, divided.parts)
    return found


def _action(function: Callable[..., Any], last: bool, parts: int) -> Callable[..., Any]:
    """Bind PaddleNLP's switches; `last` is whether the last axis is divided, not the first."""
    fused = {f"is_naive_{parts}fuse": True} if parts > 1 else {}
    return lambda weight: function(weight, is_column=last, **fused)
