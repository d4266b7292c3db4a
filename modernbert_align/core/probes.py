"""Which modules are compared, as declared in `configs/probes/`."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.errors import TableError

_SYMBOLS = {"H": "hidden_size", "I": "intermediate_size"}


class _ProbeRow(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    hf: str
    paddle: str
    fan_in: str
    key: str = ""
    tokens: bool = True
    scale: float = 0.0
    may_omit: int = 0


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    probes: dict[str, tuple[_ProbeRow, ...]]
    heads: dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One compared module of one model.

    Attributes:
        name: As it appears in reports; no prefix.
        pattern: The same with `{i}` for the layer index.
        hf, paddle: Module paths; empty for the whole model.
        fan_in: Number of terms of the widest sum in the module.
        key: Name of the compared output of the whole model.
        tokens: Whether the output is [batch seq ...], so that padding is left out.
        scale: Smallest magnitude that errors are relative to.
        may_omit: How many outputs after the first the reference may leave out.
        float32: Whether the values are kept in float32 whatever the dtype, as an optimizer's state is.
    """

    name: str
    pattern: str
    hf: str
    paddle: str
    fan_in: int
    key: str = ""
    tokens: bool = True
    scale: float = 0.0
    may_omit: int = 0
    float32: bool = False


def load_probes(config: ModelConfig, head: str, prefix: str) -> tuple[Probe, ...]:
    """Every probe of a model, in execution order.

    Args:
        prefix: What module paths of the encoder start with in this head, for example `model.`.

    Raises:
        TableError: The probe file is malformed or does not know the head.
    """
    path = configs_dir() / "probes" / "modernbert.toml"
    raw, _ = read_toml(path)
    return parse_probes(raw, config, head, prefix, where=path.name)


def parse_probes(raw: dict[str, Any], config: ModelConfig, head: str, prefix: str, *, where: str) -> tuple[Probe, ...]:
    """Expand a parsed probe document; see `load_probes`."""
    try:
        document = _Document.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise TableError(f"`{where}`: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if head not in document.heads:
        raise TableError(f"`{where}` lists no probes for the head `{head}`")
    probes: list[Probe] = []
    for group in document.heads[head]:
        rows = document.probes.get(group)
        if not rows:
            raise TableError(f"`{where}`: head `{head}` names the unknown or empty group `{group}`")
        start = prefix if group == "body" else ""
        first_layered = next((n for n, row in enumerate(rows) if "{i}" in row.name), len(rows))
        layered = [row for row in rows if "{i}" in row.name]
        for row in rows[:first_layered]:
            probes.append(_probe(row, config, start, 0, where))
        for layer in range(config.num_hidden_layers if layered else 0):
            probes += [_probe(row, config, start, layer, where) for row in layered]
        for row in rows[first_layered:]:
            if row not in layered:
                probes.append(_probe(row, config, start, 0, where))
    return tuple(probe for probe in probes if probe.key != "loss" or not config.sparse_prediction)


def _probe(row: _ProbeRow, config: ModelConfig, prefix: str, layer: int, where: str) -> Probe:
    if bool(row.key) != (row.hf == "") or bool(row.key) != (row.paddle == ""):
        raise TableError(f"`{where}`: probe `{row.name}`: `key` belongs to the whole model and only to it")
    if row.fan_in not in _SYMBOLS:
        raise TableError(f"`{where}`: probe `{row.name}` has the unknown fan_in `{row.fan_in}`")
    return Probe(
        name=row.name.format(i=layer),
        pattern=row.name,
        hf=prefix + row.hf.format(i=layer) if row.hf else "",
        paddle=prefix + row.paddle.format(i=layer) if row.paddle else "",
        fan_in=int(getattr(config, _SYMBOLS[row.fan_in])),
        key=row.key,
        tokens=row.tokens,
        scale=row.scale,
        may_omit=row.may_omit,
    )
