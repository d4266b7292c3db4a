"""How tensor parallelism divides weights among ranks: the one place that knows, for files and for models.

A weight's row in the table says along what it is divided (`tp`); this module turns that into an axis of the Paddle
weight and cuts and joins arrays. Layout of the shards as in PaddleNLP, so that its `from_pretrained` reads them.

Source: paddlenlp 2.8.1, transformers/conversion_utils.py, naive_fuse_split_tp, normal_fuse_split_tp.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import Bits, Op
from modernbert_align.core.rows import RankFact
from modernbert_align.core.table import Entry, load_table
from modernbert_align.errors import UsageError

MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a Paddle weight is divided.

    Attributes:
        axis: Of the Paddle weight.
        parts: Blocks along that axis, of each of which every rank has its share: 3 of a fused Wqkv.
        degree: Number of ranks.
    """

    axis: int
    parts: int
    degree: int

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of one rank's shard."""
        return (*whole[: self.axis], whole[self.axis] // self.degree, *whole[self.axis + 1 :])

    def whole_shape(self, shard: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole weight."""
        return (*shard[: self.axis], shard[self.axis] * self.degree, *shard[self.axis + 1 :])

    def cut(self, whole: Bits, rank: int) -> Bits:
        """One rank's shard of a weight, as memory of its own: of every block, the rank's share."""
        blocks = np.split(whole, self.parts * self.degree, axis=self.axis)
        return np.concatenate(blocks[rank :: self.degree], axis=self.axis)

    def join(self, shards: Sequence[Bits]) -> Bits:
        """The whole weight again, from the shards of all ranks in order."""
        shares = [np.split(shard, self.parts, axis=self.axis) for shard in shards]
        return np.concatenate([share[part] for part in range(self.parts) for share in shares], axis=self.axis)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank has of a weight.

    Attributes:
        division: None if every rank has the whole.
    """

    rank: int
    division: Division | None

    def of_source(self, op: Op) -> "Share":
        """The same share of what `op` makes the weight from."""
        if self.division is None or op.name != "T":
            return self
        return replace(self, division=replace(self.division, axis=1 - self.division.axis))

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of the share."""
        return tuple(whole) if self.division is None else self.division.shape(whole)


def division(entry: Entry, degree: int) -> Division | None:
    """How a weight is divided among `degree` ranks; None if every rank has the whole.

    A vocabulary that the degree does not divide stays whole, as in PaddleNLP's models.
    """
    kind, _, parts = entry.row.tp.partition(":")
    shape = entry.stacked or entry.hf_shape
    if degree == 1 or not kind or (kind == "vocab" and shape[0] % degree):
        return None
    axis = 1 if kind == "row" else 0  # of Hugging Face's layout
    if entry.op.name == "T":
        axis = 1 - axis
    return Division(axis=axis, parts=int(parts or 1), degree=degree)


def divisions(entries: Sequence[Entry], degree: int) -> dict[str, Division]:
    """Paddle name -> how it is divided, of every weight that is."""
    found = {entry.paddle: division(entry, degree) for entry in entries}
    return {name: one for name, one in found.items() if one is not None}


def check_degree(config: ModelConfig | Any, entries: Sequence[Entry], degree: int) -> None:
    """Whether a model can be divided among that many ranks.

    Raises:
        UsageError: Its attention heads, its feed-forward width or another weight cannot, or its table does not say how.
    """
    if not 1 <= degree <= MOST_RANKS:
        raise UsageError(f"a tensor parallel degree of {degree}", hint=f"give 1 to {MOST_RANKS}")
    if degree == 1:
        return
    if not any(entry.row.tp for entry in entries):
        raise UsageError("the table of this model does not say how its weights are divided among ranks")
    for words, key in (("attention heads", "num_attention_heads"), ("feed-forward units", "intermediate_size")):
        size = getattr(config, key)
        if size % degree:
            fitting = [str(n) for n in range(2, min(size, MOST_RANKS) + 1) if size % n == 0]
            raise UsageError(
                f"{size} {words} cannot be divided among {degree} ranks",
                hint=f"degrees that divide `{key}`: {', '.join(fitting)}",
            )
    for entry in entries:
        found = division(entry, degree)
        if found is not None and entry.paddle_shape[found.axis] % (found.parts * degree):
            raise UsageError(
                f"`{entry.paddle}` {list(entry.paddle_shape)} cannot be divided among {degree} ranks",
                hint=f"its row `{entry.row.hf}` says tp `{entry.row.tp}`",
            )


def dropout_sites(config: ModelConfig, head: str) -> dict[str, bool]:
    """Every place where a model drops values in training -> whether what is dropped there is divided among ranks."""
    prefix = load_table().prefix(head)
    sites = {f"{prefix}embeddings.drop": False}
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}layers.{i}"
        sites |= {f"{layer}.attn": True, f"{layer}.attn.out_drop": False, f"{layer}.mlp.drop": True}
    return sites | ({} if head in ("base", "masked_lm") else {"drop": False})


def rank_expectation(
    degree: int, config: ModelConfig, head: str, entries: Sequence[Entry], rows: int
) -> dict[RankFact, int]:
    """What ranks must show for every dtype: what (see `core.rows.RankCheck`) -> how many; nothing if there is one.

    Args:
        rows: How many rows a dtype has.
    """
    if degree == 1:
        return {}
    weights = len({entry.paddle for entry in entries})
    return {"weights": weights, "values": rows, "randomness": len(dropout_sites(config, head))}
