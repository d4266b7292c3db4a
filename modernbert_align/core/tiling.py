"""Which element of a small model every element of a larger one is copied from. Nothing here does arithmetic on weights.

The small model lies in the middle of the large one and is repeated around it: on an axis of `target` elements, element
`t` is the small axis' element `(t - (target - source) // 2) mod source`. All axes of one kind (hidden, intermediate)
have the same map, so what was multiplied with what in the small model still is in the copy. Weights that are several
stacked ones (query, key and value; input and gate) are tiled a part at a time. Large layer `i` of `n` is made from
small layer `round(i * m / n)` of `m`, halves rounded to even; attention kinds play no part in this.

Source: Warner et al. 2024, arXiv 2412.13663, on the initialisation of ModernBERT-large; AnswerDotAI/ModernBERT,
src/bert_layers/initialization.py (`tile_weight` with `tile_weights_from_middle`, `tile_fused_qkv`, `tile_fused_glu`)
and src/bert_layers/model.py (`init_model_from_pretrained`, `init_mlm_model_from_pretrained`). Depth after Rae et al.
2021 (Gopher), width after phi, as cited there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from modernbert_align.core.model_config import ModelConfig, RopeScaling
from modernbert_align.core.table import Entry, Table
from modernbert_align.core.table_check import switches
from modernbert_align.errors import UsageError

Indices = npt.NDArray[np.intp]
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")
# What makes no difference to what a model computes, or is said in terms of sizes.
_NO_SETTING = (
    *_SIZES, "num_attention_heads", "layer_types", "initializer_range", "initializer_cutoff_factor", "vocab_size",
    "pad_token_id", "num_labels", "problem_type",
)  # fmt: skip


def wraparound(source: int, target: int) -> Indices:
    """The element of a small axis that each element of a large one is copied from.

    Args:
        source, target: Elements of the two axes, `source` no more than `target`.

    Returns:
        [target], each in 0..source-1.
    """
    return (np.arange(target, dtype=np.intp) - (target - source) // 2) % source


def tile_axis(parts: int, source: int, target: int) -> Indices:
    """`wraparound` for an axis of stacked parts, each tiled on its own.

    Returns:
        [parts * target], each in 0..parts*source-1.
    """
    one = wraparound(source, target)
    return np.concatenate([part * source + one for part in range(parts)])


def tile_layers(source: int, target: int) -> tuple[int, ...]:
    """The small model's layer that each layer of the large one is made from.

    Raises:
        UsageError: The large model has twice as many layers or more. The rule would then give layers that the small
            model does not have, and make layer 1 from layer 0, which has no attention norm.
    """
    if target >= 2 * source and source != target:
        raise UsageError(
            f"{source} layers cannot become {target}: the depth rule reaches {2 * source - 1}",
            hint="tile in two steps, or choose a target with fewer layers",
        )
    return tuple(round(layer * source / target) for layer in range(target))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a weight of the large model comes from, in Hugging Face's layout.

    Attributes:
        entry: The small model's weight.
        axes: Per axis, the element of the small weight that each element is copied from.
    """

    entry: Entry
    axes: tuple[Indices, ...]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a small model becomes a large one.

    Attributes:
        layers: Per layer of the large model, the small model's layer it is made from.
        moved: Layers of the large model whose attention is of another kind than that of the layer they are made from.
        settings: Name -> (small, large) of settings that differ and change what the weights compute.
    """

    source: ModelConfig
    target: ModelConfig
    layers: tuple[int, ...]
    moved: tuple[int, ...]
    settings: Mapping[str, tuple[Any, Any]]

    def origins(self, table: Table, head: str, prefix: str) -> Iterator[tuple[Entry, Origin]]:
        """Every weight of the large model, in model order, with where it comes from; tied ones as well.

        Args:
            prefix: What body names start with in the small model.
        """
        small = {(entry.row, entry.layer): entry for entry in table.expand(self.source, head, prefix=prefix)}
        for entry in table.expand(self.target, head):
            layer = self.layers[entry.layer] if "{i}" in entry.row.hf else 0
            pairs = zip(table.axes(entry.row, self.source), table.axes(entry.row, self.target), strict=True)
            axes = tuple(tile_axis(parts, source, target) for (parts, source), (_, target) in pairs)
            yield entry, Origin(entry=small[entry.row, layer], axes=axes)


def plan_tiling(source: ModelConfig, target: ModelConfig, table: Table) -> Tiling:
    """Decide how a model of the sizes `source` becomes one of the sizes `target`.

    Raises:
        UsageError: The target is smaller somewhere, has another vocabulary, weights the source has not, heads of
            another width, heads that would be cut, or too many layers.
    """
    for key in _SIZES:
        small, large = getattr(source, key), getattr(target, key)
        if large < small:
            raise UsageError(f"the target's `{key}` {large} is smaller than the source's {small}")
    if source.vocab_size != target.vocab_size:
        raise UsageError(
            f"the target's `vocab_size` {target.vocab_size} is not the source's {source.vocab_size}",
            hint="tokens are not tiled: the target takes the source's tokenizer",
        )
    for key in switches(table):
        small, large = getattr(source, key), getattr(target, key)
        if small != large:
            raise UsageError(
                f"`{key}` is {str(small).lower()} in the source and {str(large).lower()} in the target",
                hint="both must have the same kinds of weights, since none is made up",
            )
    _check_heads(source, target)
    layers = tile_layers(source.num_hidden_layers, target.num_hidden_layers)
    kinds = zip(target.layer_types, (source.layer_types[layer] for layer in layers), strict=True)
    return Tiling(
        source=source,
        target=target,
        layers=layers,
        moved=tuple(layer for layer, (large, small) in enumerate(kinds) if large != small),
        settings=_settings(source, target, switches(table)),
    )


def _check_heads(source: ModelConfig, target: ModelConfig) -> None:
    """Attention heads stay whole, their rotary pairs with them, if a whole number of heads lies before the middle."""
    if source.head_dim != target.head_dim:
        raise UsageError(
            f"the heads are {source.head_dim} wide in the source and {target.head_dim} in the target",
            hint="set `num_attention_heads` so that hidden_size / num_attention_heads is the same",
        )
    if (target.num_attention_heads - source.num_attention_heads) % 2:
        raise UsageError(
            f"from {source.num_attention_heads} heads to {target.num_attention_heads}, the middle begins within a head",
            hint="choose a target whose `num_attention_heads` differs by an even number",
        )


def _settings(source: ModelConfig, target: ModelConfig, without: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    names = [field.name for field in fields(ModelConfig) if field.name not in (*_NO_SETTING, *without)]
    pairs = {name: (getattr(source, name), getattr(target, name)) for name in names}
    return {name: (_plain(pair[0]), _plain(pair[1])) for name, pair in pairs.items() if pair[0] != pair[1]}


def _plain(value: Any) -> Any:
    """A setting as config.json would say it."""
    if isinstance(value, RopeScaling):
        return {key: given for key, given in asdict(value).items() if given is not None}
    return value
