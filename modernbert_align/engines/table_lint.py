"""Holds the name-mapping table against live models of both frameworks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import torch
import transformers

from modernbert_align.backends.paddle import quiet
from modernbert_align.core.model_config import parse_config
from modernbert_align.core.table import Entry, Side, Table
from modernbert_align.models import modernbert
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.layers import ModernBertDecoder

SWITCHES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings")

# kind of a row -> module types that may own it on each side; `decoder` is a Linear in the reference.
_OWNERS: dict[str, dict[str, tuple[type, ...]]] = {
    "embedding": {"hf": (torch.nn.Embedding,), "paddle": (paddle.nn.Embedding,)},
    "norm": {"hf": (torch.nn.LayerNorm,), "paddle": (paddle.nn.LayerNorm,)},
    "linear": {"hf": (torch.nn.Linear,), "paddle": (paddle.nn.Linear,)},
    "decoder": {"hf": (torch.nn.Linear,), "paddle": (ModernBertDecoder,)},
}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was looked at and what was wrong."""

    checked: list[str]
    problems: list[str]


def lint_table(table: Table, raw: dict[str, Any], notify: Callable[[str], None]) -> Findings:
    """Check coverage, shapes, operations against module types, and the inverse law.

    Args:
        raw: A config.json document; every head is built from it as it is, with every switch on, and with every one off.

    Returns:
        One line per thing checked, one per problem.
    """
    problems: list[str] = []
    checked: list[str] = []
    blind = 0
    for head in table.heads:
        for label, variant in _variants(raw):
            notify(f"{head}: {label}")
            config = parse_config(variant)
            entries = table.expand(config, head)
            blind = max(blind, sum(entry.shape_blind for entry in entries))
            live = _live(table.architecture(head), variant)
            for side in ("hf", "paddle"):
                problems += [f"{head} ({label}): {p}" for p in _against(entries, side, *live[side])]
            checked.append(f"{head} ({label}): {len(entries)} rows against both state dicts")
            problems += [f"{head} ({label}): {p}" for p in _inverse_law(entries)]
    checked.append(
        f"{blind} transposed rows are square at most: shapes cannot check them, conversion tests by value do"
    )
    return Findings(checked=checked, problems=sorted(set(problems)))


def _variants(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "as configured", raw
    yield "all switches on", raw | dict.fromkeys(SWITCHES, True)
    yield "all switches off", raw | dict.fromkeys(SWITCHES, False)


def _live(architecture: str, raw: dict[str, Any]) -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]]:
    """Side -> (state dict shapes, modules by path) of freshly built models; torch's without memory."""
    config = {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        reference = getattr(transformers, architecture)(transformers.ModernBertConfig(**config))
    with quiet():
        candidate = getattr(modernbert, architecture)(ModernBertConfig(**config))
    return {
        "hf": (
            {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()},
            dict(reference.named_modules()),
        ),
        "paddle": (
            {name: tuple(tensor.shape) for name, tensor in candidate.state_dict().items()},
            dict(candidate.named_sublayers()),
        ),
    }


def _against(
    entries: tuple[Entry, ...], side: Side, shapes: dict[str, tuple[int, ...]], modules: dict[str, Any]
) -> list[str]:
    problems = []
    named = {entry.name(side): entry for entry in entries}
    problems += [f"no row for {side} `{name}`" for name in shapes if name not in named]
    for name, entry in named.items():
        if name not in shapes:
            problems.append(f"row `{name}` has no weight in the {side} model")
            continue
        if shapes[name] != entry.shape(side):
            problems.append(f"row `{name}`: {side} shape {entry.shape(side)}, live {shapes[name]}")
        owner = modules[name.rpartition(".")[0]]
        if not isinstance(owner, _OWNERS[entry.kind][side]):
            problems.append(f"row `{name}` is of kind {entry.kind}, the {side} module is a {type(owner).__name__}")
        if entry.kind == "linear" and len(entry.hf_shape) == 2 and entry.op.name != "T":
            problems.append(f"row `{name}`: a Linear weight needs the op T, the row says {entry.op.name}")
        if entry.op.name == "T" and entry.kind != "linear":
            problems.append(f"row `{name}`: the op T on a {entry.kind}")
    return problems


def _inverse_law(entries: tuple[Entry, ...]) -> list[str]:
    """Applying an operation and its inverse to distinguishable values must give them back."""
    problems = []
    for op, inverse in {(entry.op, entry.inverse_op()) for entry in entries}:
        dye = np.arange(6, dtype=np.uint32).reshape(2, 3)
        if not np.array_equal(inverse.apply(op.apply(dye)), dye) or inverse.shape(op.shape((2, 3))) != (2, 3):
            problems.append(f"the op {inverse.name} does not undo {op.name}")
    return problems
