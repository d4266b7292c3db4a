"""The name-mapping table: which Hugging Face weight is which Paddle weight, and what happens on the way.

One TOML file serves both directions; the inverse is derived from the operations, never written.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import OPS, Op
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.errors import TableError, UsageError

Side = Literal["hf", "paddle"]
Kind = Literal["embedding", "norm", "linear", "decoder"]
_DIM = re.compile(r"^(\d*)([A-Z]?)$")


class Row(BaseModel):
    """One row as written in the table; names carry `{i}` and no prefix."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hf: str
    paddle: str
    op: Literal["id", "T", "tie"]
    shape: str
    kind: Kind
    probe: str
    when: str = ""
    layers: Literal["", "1:"] = ""
    to: str = ""


class _SideSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    linear: Literal["[out, in]", "[in, out]"]
    format: Literal["pt", "np"]


class _HeadSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    architecture: str
    rows: tuple[str, ...]


class _ConfigSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    paddle_only: tuple[str, ...]
    carried_files: tuple[str, ...]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    prefix: str
    sides: dict[Side, _SideSpec]
    symbols: dict[str, str]
    heads: dict[str, _HeadSpec]
    rows: dict[str, tuple[Row, ...]] = Field(min_length=1)
    config: _ConfigSpec


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row for one weight of one model: names complete, shape in numbers.

    Attributes:
        hf, paddle: Full names.
        hf_shape, paddle_shape: Shapes as stored on each side.
        to: Full Hugging Face name of the weight a tied one repeats.
        probe: Name of the probe that owns the weight.
    """

    hf: str
    paddle: str
    op: Op
    hf_shape: tuple[int, ...]
    kind: Kind
    probe: str
    to: str = ""
    to_paddle: str = ""

    @property
    def paddle_shape(self) -> tuple[int, ...]:
        """Shape as stored by Paddle."""
        return self.op.shape(self.hf_shape)

    @property
    def shape_blind(self) -> bool:
        """True if a forgotten transpose would pass every shape check."""
        return self.op.name == "T" and self.hf_shape == self.paddle_shape

    def name(self, side: Side) -> str:
        """Full name on one side."""
        return self.hf if side == "hf" else self.paddle

    def shape(self, side: Side) -> tuple[int, ...]:
        """Stored shape on one side."""
        return self.hf_shape if side == "hf" else self.paddle_shape

    def inverse_op(self) -> Op:
        """The operation of the other direction."""
        return OPS[self.op.inverse]


class Table:
    """A loaded table. Use `load_table`."""

    def __init__(self, document: _Document, digest: str) -> None:
        self._document = document
        self.id = document.id
        self.digest = digest
        self.carried_files = document.config.carried_files
        self.paddle_only_keys = document.config.paddle_only

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of all heads."""
        return tuple(self._document.heads)

    def architecture(self, head: str) -> str:
        """Class name of a head, the same in both frameworks."""
        return self._document.heads[head].architecture

    def format(self, side: Side) -> str:
        """The `format` entry of a safetensors file of that side."""
        return self._document.sides[side].format

    def head_of(self, architectures: Sequence[str] | None, *, where: str) -> str:
        """The head a config.json declares.

        Raises:
            UsageError: No architecture, or one the table does not have.
        """
        declared = (architectures or [""])[0]
        for head, spec in self._document.heads.items():
            if spec.architecture == declared:
                return head
        supported = ", ".join(spec.architecture for spec in self._document.heads.values())
        raise UsageError(
            f"the architecture `{declared or 'none'}` of `{where}` is not supported", hint=f"supported: {supported}"
        )

    def check_head(self, head: str) -> str:
        """Return `head` if the table has it.

        Raises:
            UsageError: It does not.
        """
        if head in self._document.heads:
            return head
        near = difflib.get_close_matches(head, self.heads, n=1)
        raise UsageError(
            f"unknown head `{head}`", hint=f"did you mean `{near[0]}`?" if near else f"heads: {', '.join(self.heads)}"
        )

    def rows(self, head: str) -> tuple[Row, ...]:
        """Rows of a head as written, body first."""
        groups = ("body", *self._document.heads[head].rows)
        return tuple(row for group in groups for row in self._document.rows[group])

    def prefix(self, head: str) -> str:
        """What body names start with in that head."""
        return "" if head == "base" else self._document.prefix

    def found_prefix(self, names: Iterable[str]) -> str:
        """What body names start with in a checkpoint: some are saved without the prefix, some with one too many."""
        prefix = self._document.prefix
        return prefix if any(name.startswith(prefix) for name in names) else ""

    def expand(self, config: ModelConfig, head: str, *, prefix: str | None = None) -> tuple[Entry, ...]:
        """Every weight of a model, in model order.

        Args:
            prefix: What body names start with, if not with what is usual for the head.

        Raises:
            TableError: A row is inconsistent, or two rows give the same name.
        """
        body = set(self._document.rows["body"])
        prefix = self.prefix(head) if prefix is None else prefix
        entries: list[Entry] = []
        layered: list[Row] = []
        for row in self.rows(head):
            if not _applies(row, config):
                continue
            if "{i}" in row.hf:
                layered.append(row)
                continue
            if layered:
                entries += self._layers(layered, config, prefix)
                layered = []
            entries.append(self._entry(row, config, prefix if row in body else "", prefix, 0))
        entries += self._layers(layered, config, prefix)
        for side in ("hf", "paddle"):
            twice = [name for name, n in Counter(e.name(side) for e in entries).items() if n > 1]
            if twice:
                raise TableError(f"two rows of table `{self.id}` give the {side} name `{twice[0]}`")
        return tuple(entries)

    def _layers(self, rows: Sequence[Row], config: ModelConfig, prefix: str) -> list[Entry]:
        return [
            self._entry(row, config, prefix, prefix, i)
            for i in range(config.num_hidden_layers)
            for row in rows
            if i or row.layers != "1:"
        ]

    def _entry(self, row: Row, config: ModelConfig, prefix: str, body_prefix: str, layer: int) -> Entry:
        return Entry(
            hf=prefix + row.hf.format(i=layer),
            paddle=prefix + row.paddle.format(i=layer),
            op=OPS[row.op],
            hf_shape=self.shape(row, config),
            kind=row.kind,
            probe=row.probe.format(i=layer),
            to=body_prefix + row.to if row.to else "",
            to_paddle=body_prefix + self._paddle_of(row.to) if row.to else "",
        )

    def _paddle_of(self, hf: str) -> str:
        return next(row.paddle for rows in self._document.rows.values() for row in rows if row.hf == hf)

    def shape(self, row: Row, config: ModelConfig) -> tuple[int, ...]:
        """The Hugging Face shape of a row for one config."""
        dims = []
        for token in row.shape.split():
            match = _DIM.match(token)
            if match is None or (match[2] and match[2] not in self._document.symbols):
                raise TableError(f"shape `{row.shape}` of row `{row.hf}` has the unknown dimension `{token}`")
            size = int(getattr(config, self._document.symbols[match[2]])) if match[2] else 1
            dims.append(int(match[1] or 1) * size)
        return tuple(dims)


def _applies(row: Row, config: ModelConfig) -> bool:
    if not row.when:
        return True
    negated, switch = row.when.startswith("not "), row.when.removeprefix("not ")
    value = getattr(config, switch, None)
    if not isinstance(value, bool):
        raise TableError(f"row `{row.hf}` depends on `{switch}`, which is not a true-or-false config key")
    return value is not negated


def nearest_row(name: str, table: Table, head: str, side: Side) -> str:
    """The row whose pattern looks most like `name`, for error messages; empty if none is near."""
    flat = re.sub(r"\.\d+\.", ".{i}.", name).removeprefix(table.found_prefix([name]))
    patterns = [row.hf if side == "hf" else row.paddle for row in table.rows(head)]
    near = difflib.get_close_matches(flat, patterns, n=1, cutoff=0.5)
    return near[0] if near else ""


def load_table(name: str = "modernbert") -> Table:
    """Load a table from `configs/tables/`.

    Raises:
        TableError: The file is malformed: unknown key, wrong op, placeholder on one side only, dangling tie.
    """
    path = configs_dir() / "tables" / f"{name}.toml"
    raw, digest = read_toml(path)
    return parse_table(raw, digest, where=path.name)


def parse_table(raw: Mapping[str, Any], digest: str, *, where: str) -> Table:
    """Check a parsed table document and wrap it."""
    try:
        document = _Document.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TableError(f"`{where}`: {place}: {first['msg']}") from None
    names = {row.hf for rows in document.rows.values() for row in rows}
    for rows in document.rows.values():
        for row in rows:
            if len({"{i}" in text for text in (row.hf, row.paddle, row.probe)}) > 1:
                raise TableError(f"`{where}`: row `{row.hf}` has the placeholder {{i}} in some of its names only")
            if (row.op == "tie") != bool(row.to):
                raise TableError(f"`{where}`: row `{row.hf}`: `to` belongs to op `tie` and only to it")
            if row.to and row.to not in names:
                raise TableError(f"`{where}`: row `{row.hf}` is tied to `{row.to}`, which no row has")
            if row.op == "T" and len(row.shape.split()) != 2:
                raise TableError(f"`{where}`: row `{row.hf}` transposes a shape that is not a matrix")
    for head, spec in document.heads.items():
        missing = [group for group in spec.rows if group not in document.rows]
        if missing:
            raise TableError(f"`{where}`: head `{head}` names the unknown rows `{missing[0]}`")
    return Table(document, digest)
