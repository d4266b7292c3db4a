"""Holds the name-mapping table against live models of both frameworks: rules 3 and 4 of `table lint`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import paddle
import torch
import transformers

from modernbert_align.backends.paddle import quiet
from modernbert_align.core.table import Entry, Side, Sizes, Table
from modernbert_align.core.table_check import Finding, Sightings, row_name
from modernbert_align.errors import ConfigError
from modernbert_align.models import modernbert
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.layers import ModernBertDecoder

SWITCHES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "tie_word_embeddings")
# All different, none what a configuration has by default, so that no dimension is right by chance.
SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
# Which kind of row a module type owns; `decoder` is told apart by its place.
_KINDS: Mapping[type, str] = {
    torch.nn.Embedding: "embedding",
    torch.nn.LayerNorm: "norm",
    torch.nn.Linear: "linear",
    paddle.nn.Embedding: "embedding",
    paddle.nn.LayerNorm: "norm",
    paddle.nn.Linear: "linear",
    ModernBertDecoder: "decoder",
}


@dataclass(frozen=True, kw_only=True)
class _Live:
    """A freshly built model.

    Attributes:
        weights: Name -> parameter or buffer of its state dict; a shared one is the same object under every name.
        modules: Path -> module.
        output: The module that turns hidden states into scores over the vocabulary, if there is one.
    """

    weights: Mapping[str, Any]
    modules: Mapping[str, Any]
    output: Any = None

    def kind(self, name: str) -> str:
        """The kind of row the owner of a weight calls for; empty if the module's type is not known."""
        owner = self.modules[name.rpartition(".")[0]]
        if owner is self.output:
            return "decoder"
        return next((kind for module, kind in _KINDS.items() if isinstance(owner, module)), "")


def check_live(
    table: Table, raw: Mapping[str, Any], config: Sizes, notify: Callable[[str], None]
) -> tuple[Finding, Finding]:
    """Rules 3 and 4: the rows are the state dicts of both frameworks, and each operation is its module's.

    Every head is built as configured, and in small sizes with every switch off, on alone, and on. The reference needs
    no memory. A head whose model this package does not have in Paddle is held against the reference alone.

    Args:
        raw: A config.json document.
        config: The same, from `Table.sizes`.

    Raises:
        ConfigError: transformers builds no model from `raw`.
    """
    coverage, types = Sightings(), Sightings()
    alone: list[str] = []
    variants = tuple(_variants(raw))
    for head in table.heads:
        architecture = table.architecture(head)
        if not hasattr(transformers, architecture):
            version = transformers.__version__
            coverage.add("", f"transformers {version} has no class `{architecture}`", where=f"head {head}")
            continue
        in_paddle = architecture in modernbert.__all__
        alone += [] if in_paddle else [architecture]
        notify(f"{head}: {len(variants)} configurations")
        for label, variant in variants:
            sizes = config if variant is raw else table.sizes(variant, where=label)
            entries = table.expand(sizes, head)
            live: dict[Side, _Live] = {"hf": _reference(architecture, variant)}
            if in_paddle:
                live["paddle"] = _candidate(architecture, variant)
            for side, model in live.items():
                where = f"{head}, {label}"
                _cover(table, entries, side, model, where, coverage)
                _hold_types(table, entries, side, model, where, types)
    sides = "both frameworks" if not alone else "the reference"
    labels = ", ".join(label for label, _ in variants)
    return (
        Finding(
            rule=3,
            checked=f"{len(table.heads)} heads, {labels}: the rows are the state dict of {sides}, shapes included",
            faults=coverage.faults(),
            notes=(f"the Paddle side was not held against a model: this package has no {', '.join(alone)}",)
            if alone
            else (),
        ),
        Finding(
            rule=4,
            checked=f"modules of {sides}: a Linear is transposed and nothing else, a tied weight is one parameter",
            faults=types.faults(),
        ),
    )


def _variants(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Configurations to build, each with a name; the first is `raw` itself."""
    yield "as configured", raw
    small = {key: value for key, value in raw.items() if key not in ("id2label", "label2id")} | SMALL
    if raw.get("layer_types"):
        small["layer_types"] = [*raw["layer_types"], *raw["layer_types"]][: SMALL["num_hidden_layers"]]
    off = small | dict.fromkeys(SWITCHES, False)
    yield "all switches off", off
    for switch in SWITCHES:
        yield f"{switch} alone", off | {switch: True}
    yield "all switches on", small | dict.fromkeys(SWITCHES, True)


def _reference(architecture: str, raw: Mapping[str, Any]) -> _Live:
    """The model of transformers, on the meta device."""
    model_class = getattr(transformers, architecture)
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class(**_arguments(raw)))
    except Exception as error:  # noqa: BLE001 - transformers raises what it likes on a configuration it cannot use
        raise ConfigError(f"transformers does not build {architecture}: {str(error).strip() or repr(error)}") from None
    return _Live(
        weights=model.state_dict(keep_vars=True),
        modules=dict(model.named_modules()),
        output=model.get_output_embeddings(),
    )


def _candidate(architecture: str, raw: Mapping[str, Any]) -> _Live:
    """This package's model in Paddle."""
    with quiet():
        model = getattr(modernbert, architecture)(ModernBertConfig(**_arguments(raw)))
    return _Live(weights=model.state_dict(), modules=dict(model.named_sublayers(include_self=True)))


def _arguments(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}


def _cover(table: Table, entries: Sequence[Entry], side: Side, live: _Live, where: str, seen: Sightings) -> None:
    """Rule 3 for one model."""
    named = {entry.name(side): entry for entry in entries}
    for name in live.weights:
        if name not in named:
            seen.add(row_name(name, table), f"no row is for {side} `{name}`", where=where, kind=f"missing {side}")
    for name, entry in named.items():
        row = row_name(entry.hf, table)
        if name not in live.weights:
            seen.add(row, f"the {side} model has no `{name}`", where=where, kind=f"invented {side}")
            continue
        found, said = list(live.weights[name].shape), list(entry.shape(side))
        if found != said:
            message = f"the {side} shape is {said}, that of the live `{name}` {found}"
            seen.add(row, message, where=where, kind=f"shape {side}")


def _hold_types(table: Table, entries: Sequence[Entry], side: Side, live: _Live, where: str, seen: Sightings) -> None:
    """Rule 4 for one model."""
    owners: dict[int, str] = {}
    for entry in entries:
        name = entry.name(side)
        if name not in live.weights:
            continue
        for about, message in (*_wrong_kind(entry, name, side, live), *_wrong_tie(entry, name, side, live, owners)):
            seen.add(row_name(entry.hf, table), message, where=where, kind=about)


def _wrong_kind(entry: Entry, name: str, side: Side, live: _Live) -> Iterator[tuple[str, str]]:
    """What speaks against the kind and the operation of a row: (what about, message)."""
    kind, axes = live.kind(name), len(live.weights[name].shape)
    if kind != entry.kind:
        module = type(live.modules[name.rpartition(".")[0]]).__name__
        yield f"kind {side}", f"the row says kind {entry.kind}, the {side} module is a {module} ({kind or 'no kind'})"
    matrix = kind == "linear" and axes == 2
    if matrix and entry.op.name != "T":
        yield "op", f"a Linear weight needs the op T, the row says {entry.op.name}"
    if not matrix and entry.op.name == "T":
        yield "op", f"the op T on a weight with {axes} axes of a module of kind {kind or 'unknown'}"


def _wrong_tie(entry: Entry, name: str, side: Side, live: _Live, owners: dict[int, str]) -> Iterator[tuple[str, str]]:
    """What speaks against a row's being tied or not: (what about, message).

    Args:
        owners: Parameter -> name of the untied row it was first seen under.
    """
    weight = live.weights[name]
    if entry.op.name == "tie":
        to = entry.to if side == "hf" else entry.to_paddle
        if weight is not live.weights.get(to):
            yield f"tie {side}", f"the row says tie, but `{name}` and `{to}` are two parameters of the {side} model"
    elif (other := owners.setdefault(id(weight), name)) != name:
        yield f"shared {side}", f"the row does not say tie, but `{name}` and `{other}` are one {side} parameter"
