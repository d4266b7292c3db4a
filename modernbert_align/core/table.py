"""The name-mapping table: which Hugging Face weight is which Paddle weight, and what happens on the way.

One TOML file serves both directions; the inverse is derived from the operations, never written. A model variant is
a file more, not code: sizes and switches come from its config.json by the names the file gives.
"""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modernbert_align.core.model_config import ModelConfig, check_layers, parse_config
from modernbert_align.core.ops import OPS, Op
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.errors import ConfigError, TableError, UsageError

Side = Literal["hf", "paddle"]
Kind = Literal["embedding", "norm", "linear", "decoder"]
Sizes = ModelConfig | SimpleNamespace
_WRITTEN = (
    "config.json",
    "conversion_manifest.json",
    "conversion_journal.jsonl",
    "tiling_manifest.json",
    "model.safetensors.index.json",
)
_DIM = re.compile(r"^(\d*)([A-Z]?)$")
_TP = re.compile(r"^(col(:[2-9])?|row|vocab)?$")


class Row(BaseModel):
    """One row as written in the table; names carry `{i}` and no prefix.

    Rows marked `part` share a Paddle name: their Hugging Face weights, stacked along the first axis in table order,
    are that one weight. `tp` says how the weight is divided among tensor-parallel ranks, see `core.tensor_parallel`.
    """

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
    part: bool = False
    tp: str = ""


class _SideSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    linear: Literal["[out, in]", "[in, out]"]
    format: Literal["pt", "np"]


class _HeadSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    architecture: str
    rows: tuple[str, ...]


class _Aliases(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    prefixes: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    suffixes: dict[str, str] = {}


class _ConfigSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    model_type: str
    defaults: dict[str, int | bool] = {}
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
    aliases: _Aliases = _Aliases()
    config: _ConfigSpec


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row for one weight of one model: names complete, shape in numbers.

    Attributes:
        hf, paddle: Full names.
        hf_shape, paddle_shape: Shapes as stored on each side.
        to: Full Hugging Face name of the weight a tied one repeats.
        probe: Name of the probe that owns the weight.
        row, layer: Where in the table the weight comes from; layer 0 also outside of the layers.
        rows: For a part of a stacked Paddle weight, the rows it takes of it in Hugging Face's layout.
        stacked: Shape of the whole stacked weight in Hugging Face's layout.
    """

    hf: str
    paddle: str
    op: Op
    hf_shape: tuple[int, ...]
    kind: Kind
    probe: str
    row: Row
    layer: int
    to: str = ""
    to_paddle: str = ""
    rows: tuple[int, int] | None = None
    stacked: tuple[int, ...] = ()

    @property
    def paddle_shape(self) -> tuple[int, ...]:
        """Shape as stored by Paddle; of the whole stacked weight if this is a part of one."""
        return self.op.shape(self.stacked or self.hf_shape)

    @property
    def shape_blind(self) -> bool:
        """True if a forgotten transpose would pass every shape check."""
        whole = self.stacked or self.hf_shape
        return self.op.name == "T" and whole == self.op.shape(whole)

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
    """A loaded table. Use `load_table`.

    Attributes:
        document: The parsed file.
    """

    def __init__(self, document: _Document, digest: str) -> None:
        self.document = document
        self.id = document.id
        self.digest = digest
        self.model_type = document.config.model_type
        self.carried_files = document.config.carried_files
        self.paddle_only_keys = document.config.paddle_only

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of all heads."""
        return tuple(self.document.heads)

    def architecture(self, head: str) -> str:
        """Class name of a head, the same in both frameworks."""
        return self.document.heads[head].architecture

    def format(self, side: Side) -> str:
        """The `format` entry of a safetensors file of that side."""
        return self.document.sides[side].format

    def head_of(self, architectures: Sequence[str] | None, *, where: str) -> str:
        """The head a config.json declares.

        Raises:
            UsageError: No architecture, or one the table does not have.
        """
        if architectures is not None and not isinstance(architectures, (list, tuple)):
            raise UsageError(f"`architectures` is `{architectures!r}` in `{where}`, not a list of names")
        declared = architectures[0] if architectures else ""
        for head, spec in self.document.heads.items():
            if spec.architecture == declared:
                return head
        supported = ", ".join(spec.architecture for spec in self.document.heads.values())
        raise UsageError(
            f"the architecture `{declared or 'none'}` of `{where}` is not supported", hint=f"supported: {supported}"
        )

    def check_head(self, head: str) -> str:
        """Return `head` if the table has it.

        Raises:
            UsageError: It does not.
        """
        if head in self.document.heads:
            return head
        near = difflib.get_close_matches(head, self.heads, n=1)
        raise UsageError(
            f"unknown head `{head}`", hint=f"did you mean `{near[0]}`?" if near else f"heads: {', '.join(self.heads)}"
        )

    def rows(self, head: str) -> tuple[Row, ...]:
        """Rows of a head as written, body first."""
        groups = ("body", *self.document.heads[head].rows)
        return tuple(row for group in groups for row in self.document.rows[group])

    def prefix(self, head: str) -> str:
        """What body names start with in that head."""
        return "" if head == "base" else self.document.prefix

    def sizes(self, raw: Mapping[str, Any], *, where: str) -> Sizes:
        """The sizes and switches that decide which rows a model has and of what shape.

        For ModernBERT itself the whole config.json is checked; for a variant that this package only converts,
        the keys the table names.

        Raises:
            ConfigError: A key is absent, of the wrong kind or asks for something unsupported.
        """
        if self.model_type == "modernbert":
            return parse_config(raw, where=where)
        spec, found = self.document.config, dict(raw)
        if "num_labels" not in found and isinstance(found.get("id2label"), dict):
            found["num_labels"] = len(found["id2label"])
        rows = [row for group in self.document.rows.values() for row in group]
        switches = {row.when.removeprefix("not ") for row in rows if row.when}
        values: dict[str, int | bool] = {}
        for key in sorted({*self.document.symbols.values(), *switches, "num_hidden_layers"}):
            value = found.get(key, spec.defaults.get(key))
            wanted = bool if key in switches else int
            if type(value) is not wanted or (wanted is int and value < 1):
                raise ConfigError(
                    f"`{key}` of `{where}` is {'missing' if value is None else repr(value)}, table `{self.id}` "
                    f"needs {'true or false' if wanted is bool else 'a positive number'}"
                )
            values[key] = value
        check_layers(values["num_hidden_layers"], where)
        return SimpleNamespace(**values)

    def canonical(self, name: str, side: Side) -> str:
        """A stored name without what wrappers and older versions of the reference added; reading only.

        Applying it twice is applying it once. Paddle's files have no such history.
        """
        aliases = self.document.aliases
        if side == "paddle":
            return name
        parts = [part for part in name.split(".") if part not in aliases.components]
        name = ".".join(parts)
        start = 0  # removing one prefix after the other would copy a hostile name of a megabyte as often as it has them
        while prefix := next((p for p in aliases.prefixes if name.startswith(p, start)), ""):
            start += len(prefix)
        name = name[start:]
        suffix = next((s for s in aliases.suffixes if name.endswith(s)), "")
        return name.removesuffix(suffix) + aliases.suffixes[suffix] if suffix else name

    def found_prefix(self, names: Iterable[str]) -> str:
        """What body names start with in a checkpoint: some are saved without the prefix, some with one too many."""
        prefix = self.document.prefix
        return prefix if any(name.startswith(prefix) for name in names) else ""

    def expand(self, config: Sizes, head: str, *, prefix: str | None = None) -> tuple[Entry, ...]:
        """Every weight of a model, in model order.

        Args:
            config: From `sizes`.
            prefix: What body names start with, if not with what is usual for the head.

        Raises:
            TableError: A row is inconsistent, or two rows give the same name.
        """
        body = set(self.document.rows["body"])
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
            single = [e.name(side) for e in entries if side == "hf" or e.rows is None]
            single += {e.paddle for e in entries if side == "paddle" and e.rows is not None}
            twice = [name for name, n in Counter(single).items() if n > 1]
            if twice:
                raise TableError(f"two rows of table `{self.id}` give the {side} name `{twice[0]}`")
        written = {entry.hf for entry in entries if entry.op.stored}
        for entry in entries:
            if entry.to and entry.to not in written:
                raise TableError(f"`{entry.hf}` is tied to `{entry.to}`, which table `{self.id}` does not store")
        return self._stack(entries)

    def _stack(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """Give every part of a stacked weight its rows."""
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.rows is not None:
                groups.setdefault(entry.paddle, []).append(entry)
        placed: dict[str, Entry] = {}
        for name, parts in groups.items():
            if len({(part.op.name, part.hf_shape[1:]) for part in parts}) > 1:
                raise TableError(f"the parts of `{name}` in table `{self.id}` do not fit together")
            total = sum(part.hf_shape[0] for part in parts)
            start = 0
            for part in parts:
                stop = start + part.hf_shape[0]
                placed[part.hf] = replace(part, rows=(start, stop), stacked=(total, *part.hf_shape[1:]))
                start = stop
        return tuple(placed.get(entry.hf, entry) for entry in entries)

    def _layers(self, rows: Sequence[Row], config: Sizes, prefix: str) -> list[Entry]:
        return [
            self._entry(row, config, prefix, prefix, i)
            for i in range(config.num_hidden_layers)
            for row in rows
            if i or row.layers != "1:"
        ]

    def _entry(self, row: Row, config: Sizes, prefix: str, body_prefix: str, layer: int) -> Entry:
        return Entry(
            hf=prefix + row.hf.format(i=layer),
            paddle=prefix + row.paddle.format(i=layer),
            op=OPS[row.op],
            hf_shape=self.shape(row, config),
            kind=row.kind,
            probe=row.probe.format(i=layer),
            row=row,
            layer=layer,
            to=body_prefix + row.to.format(i=layer) if row.to else "",
            to_paddle=body_prefix + self._paddle_of(row.to).format(i=layer) if row.to else "",
            rows=(0, 0) if row.part else None,
        )

    def _paddle_of(self, hf: str) -> str:
        return next(row.paddle for rows in self.document.rows.values() for row in rows if row.hf == hf)

    def shape(self, row: Row, config: Sizes) -> tuple[int, ...]:
        """The Hugging Face shape of a row for one config."""
        return tuple(parts * size for parts, size in self.axes(row, config))

    def axes(self, row: Row, config: Sizes) -> tuple[tuple[int, int], ...]:
        """Every axis of a row's Hugging Face shape as (parts, size of a part); `3H` is three of the hidden size."""
        dims = []
        for token in row.shape.split():
            match = _DIM.match(token)
            if match is None or (match[2] and match[2] not in self.document.symbols):
                raise TableError(f"shape `{row.shape}` of row `{row.hf}` has the unknown dimension `{token}`")
            key = self.document.symbols.get(match[2], "")
            size = getattr(config, key, None) if key else 1
            if type(size) is not int:
                raise TableError(f"the dimension `{match[2]}` of table `{self.id}` is `{key}`, which is not a size")
            dims.append((int(match[1] or 1), size))
        return tuple(dims)


def _applies(row: Row, config: Sizes) -> bool:
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
    return _nearest(flat, tuple(row.hf if side == "hf" else row.paddle for row in table.rows(head)))


@functools.lru_cache(maxsize=256)  # a missing layer asks the same of every row
def _nearest(flat: str, patterns: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(flat, patterns, n=1, cutoff=0.5)
    return near[0] if near else ""


def table_names() -> tuple[str, ...]:
    """Names of the shipped tables."""
    return tuple(sorted(path.stem for path in (configs_dir() / "tables").glob("*.toml")))


def load_table(name: str = "modernbert") -> Table:
    """Load a table.

    Args:
        name: One of `configs/tables/`, or the path of a `.toml` file.

    Raises:
        UsageError: There is no such table.
        TableError: The file is malformed: unknown key, wrong op, placeholder on one side only, dangling tie.
    """
    path = Path(name) if name.endswith(".toml") else configs_dir() / "tables" / f"{name}.toml"
    if not path.is_file():
        raise UsageError(f"no table `{name}`", hint=f"{', '.join(table_names())}, or the path of a .toml file")
    raw, digest = read_toml(path)
    return parse_table(raw, digest, where=path.name)


def table_for(raw: Mapping[str, Any], *, where: str) -> Table:
    """The shipped table for the `model_type` of a config.json.

    Raises:
        ConfigError: No table is for it.
    """
    declared = raw.get("model_type")
    tables = [load_table(name) for name in table_names()]
    for table in tables:
        if table.model_type == declared:
            return table
    raise ConfigError(
        f"`model_type` of `{where}` is {declared!r}, which no table is for",
        hint=f"supported: {', '.join(table.model_type for table in tables)}; another one needs --table FILE.toml",
    )


def parse_table(raw: Mapping[str, Any], digest: str, *, where: str) -> Table:
    """Check a parsed table document and wrap it."""
    try:
        document = _Document.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TableError(f"`{where}`: {place}: {first['msg']}") from None
    if "body" not in document.rows:
        raise TableError(f"`{where}`: there are no rows `body`")
    names = {row.hf for rows in document.rows.values() for row in rows}
    for name in document.config.carried_files:
        if not name or Path(name).name != name or name in _WRITTEN or name.endswith(".safetensors"):
            raise TableError(
                f"`{where}`: `{name}` cannot be a carried file: a conversion writes its own, or it is a path"
            )
    for rows in document.rows.values():
        for row in rows:
            texts = (row.hf, row.paddle, row.probe, row.to or row.hf)
            if any(brace in text.replace("{i}", "") for text in texts for brace in "{}"):
                raise TableError(f"`{where}`: row `{row.hf}` has a placeholder that is not {{i}}")
            if len({"{i}" in text for text in texts}) > 1:
                raise TableError(f"`{where}`: row `{row.hf}` has the placeholder {{i}} in some of its names only")
            if (row.op == "tie") != bool(row.to):
                raise TableError(f"`{where}`: row `{row.hf}`: `to` belongs to op `tie` and only to it")
            if row.to and row.to not in names:
                raise TableError(f"`{where}`: row `{row.hf}` is tied to `{row.to}`, which no row has")
            if row.op == "T" and len(row.shape.split()) != 2:
                raise TableError(f"`{where}`: row `{row.hf}` transposes a shape that is not a matrix")
            if row.op == "tie" and row.part:
                raise TableError(f"`{where}`: row `{row.hf}` is a part, which op `tie` cannot be")
            if row.part and not row.shape.split():
                raise TableError(f"`{where}`: row `{row.hf}` is a part and has no axis to be stacked along")
            _check_division(row, where)
    for head, spec in document.heads.items():
        missing = [group for group in spec.rows if group not in document.rows]
        if missing:
            raise TableError(f"`{where}`: head `{head}` names the unknown rows `{missing[0]}`")
    return Table(document, digest)


def _check_division(row: Row, where: str) -> None:
    """Hold `tp` against the shape: a fused weight that is cut as if it were one block computes something else.

    Raises:
        TableError: They contradict each other.
    """
    if not _TP.match(row.tp):
        raise TableError(f"`{where}`: row `{row.hf}` has the unknown tp `{row.tp}`: col, col:2, col:3, row or vocab")
    if not row.tp:
        return
    dims = row.shape.split()
    kind, _, parts = row.tp.partition(":")
    if row.part or len(dims) < (2 if kind == "row" else 1):
        raise TableError(f"`{where}`: row `{row.hf}` cannot be divided by `{row.tp}`")
    match = _DIM.match(dims[1 if kind == "row" else 0])
    blocks = match[1] if match is not None else ""
    if (blocks or "1") != (parts or "1"):
        raise TableError(
            f"`{where}`: row `{row.hf}` is {blocks or '1'} blocks along what is divided by its shape `{row.shape}` and "
            f"{parts or '1'} by its tp `{row.tp}`"
        )
