"""The rules a name-mapping table must keep, as far as no framework is needed to tell.

`table lint` holds a table against seven rules. Here are those about the table alone; coverage and module types need
live models and are in `modernbert_align.engines.table_lint`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

from modernbert_align.core.ops import Bits
from modernbert_align.core.table import Entry, Row, Sizes, Table
from modernbert_align.errors import TableError

RULES: Mapping[int, str] = {
    1: "placeholders",
    2: "expansion",
    3: "coverage",
    4: "module types",
    5: "shape-blind rows",
    6: "inverse law",
    7: "aliases",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that breaks a rule.

    Attributes:
        row: Hugging Face name of the row as the table writes it; empty if it is not about one row.
    """

    row: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one rule.

    Attributes:
        rule: Its number in `RULES`.
        checked: What was looked at, or why nothing was.
        notes: What to know beside; never a fault.
        skipped: Nothing was looked at.
    """

    rule: int
    checked: str
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: bool = False

    @property
    def name(self) -> str:
        """What the rule is called."""
        return RULES[self.rule]


class Sightings:
    """Collects faults that show in many models, and tells each once with how often it was seen."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], tuple[str, str]] = {}
        self._times: Counter[tuple[str, str]] = Counter()

    def add(self, row: str, message: str, *, where: str = "", kind: str = "") -> None:
        """Note a fault; of those of one row and kind (by default: one message) only the first message is kept."""
        key = (row, kind or message)
        self._first.setdefault(key, (message, where))
        self._times[key] += 1

    def faults(self) -> tuple[Fault, ...]:
        """One fault per row and kind, in the order they were first seen."""
        faults = []
        for key, (message, where) in self._first.items():
            more = f"and {self._times[key] - 1} more" if self._times[key] > 1 else ""
            places = ", ".join(text for text in (where, more) if text)
            faults.append(Fault(row=key[0], message=f"{message} ({places})" if places else message))
        return tuple(faults)


def check_table(table: Table, config: Sizes) -> tuple[Finding, ...]:
    """Rules 1, 2, 5, 6 and 7; a table that breaks one of the first two is not held against the others.

    Args:
        config: From `Table.sizes`; rule 5 tells what the shapes of this model hide.
    """
    first = (check_placeholders(all_rows(table)), check_expansion(table, config))
    if any(finding.faults for finding in first):
        return (*first, *(skip(rule) for rule in (5, 6, 7)))
    return (*first, list_shape_blind(table, config), check_inverse_law(table, config), check_aliases(table, config))


def skip(rule: int) -> Finding:
    """The finding of a rule that is not looked at because the table does not expand."""
    return Finding(rule=rule, checked="not checked, for rules 1 and 2 come first", skipped=True)


def all_rows(table: Table) -> tuple[Row, ...]:
    """Every row that some head has, once."""
    return tuple(dict.fromkeys(row for head in table.heads for row in table.rows(head)))


def row_name(name: str, table: Table) -> str:
    """A weight's name as its row writes it: without the prefix, `{i}` for the layer."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1{i}", name.removeprefix(table.found_prefix([name])))


def with_changes(config: Sizes, changes: Mapping[str, Any]) -> SimpleNamespace:
    """The sizes and switches of a model with some of them changed."""
    values = vars(config) if isinstance(config, SimpleNamespace) else asdict(config)
    return SimpleNamespace(**{**values, **changes})


def switches(table: Table) -> tuple[str, ...]:
    """The config switches that rows depend on."""
    return tuple(dict.fromkeys(row.when.removeprefix("not ") for row in all_rows(table) if row.when))


def _small(config: Sizes) -> SimpleNamespace:
    """The same model in small sizes that all differ from one another."""
    keys = sorted(key for key, value in vars(with_changes(config, {})).items() if type(value) is int)
    return with_changes(config, {key: 5 + 2 * n for n, key in enumerate(keys)} | {"num_hidden_layers": 3})


def _variants(table: Table, config: Sizes) -> Iterator[tuple[str, SimpleNamespace]]:
    yield "as configured", with_changes(config, {})
    for value, label in ((False, "all switches off"), (True, "all switches on")):
        yield label, with_changes(config, dict.fromkeys(switches(table), value))
    yield "one layer", with_changes(config, {"num_hidden_layers": 1})
    yield "other sizes", _small(config)


# --- 1, 2: the table by itself ----------------------------------------------------------------------------------------


def check_placeholders(rows: Iterable[Row]) -> Finding:
    """Rule 1: `{i}` is in all names of a row or in none, and no other brace is anywhere."""
    faults = []
    looked_at = 0
    for row in rows:
        looked_at += 1
        texts = [row.hf, row.paddle, row.probe, *([row.to] if row.to else [])]
        if any(brace in text.replace("{i}", "") for text in texts for brace in "{}"):
            faults.append(Fault(row=row.hf, message="a name has a brace that is not the placeholder {i}"))
        if len({"{i}" in text for text in texts}) > 1:
            faults.append(Fault(row=row.hf, message="the placeholder {i} is in some of the names only"))
        if row.layers and "{i}" not in row.hf:
            faults.append(Fault(row=row.hf, message=f'`layers = "{row.layers}"` without the placeholder {{i}}'))
    return Finding(rule=1, checked=f"{looked_at} rows: {{i}} in all names or in none", faults=tuple(faults))


def check_expansion(table: Table, config: Sizes) -> Finding:
    """Rule 2: in every head and configuration the rows expand, and no two of them give one name.

    Parts of a stacked weight share its name; that they fit together is part of expanding. A checkpoint may be saved
    without the prefix, so names must differ without it too.
    """
    seen = Sightings()
    variants = tuple(_variants(table, config))
    for head in table.heads:
        for label, variant in variants:
            for prefix in dict.fromkeys((table.prefix(head), "")):
                without = " without the prefix" if table.prefix(head) and not prefix else ""
                try:
                    table.expand(variant, head, prefix=prefix)
                except TableError as error:
                    seen.add("", error.message, where=f"{head}{without}, {label}")
    labels = ", ".join(label for label, _ in variants)
    return Finding(
        rule=2,
        checked=f"{len(table.heads)} heads with and without the prefix, {labels}: no name is given twice",
        faults=seen.faults(),
    )


# --- 5: what shapes hide ----------------------------------------------------------------------------------------------


def list_shape_blind(table: Table, config: Sizes) -> Finding:
    """Rule 5: names the rows of a model with which a mistake would pass every shape check. Never a fault."""
    square: dict[str, tuple[int, ...]] = {}
    for head in table.heads:
        for entry in table.expand(config, head):
            if entry.shape_blind:
                square[row_name(entry.hf, table)] = entry.stacked or entry.hf_shape
    notes = [f"square, a forgotten transpose does not show: {name} {list(shape)}" for name, shape in square.items()]
    notes += [
        f"of one shape {list(shape)}, a swap does not show: {', '.join(names)}"
        for shape, names in same_shapes(table, config)
    ]
    return Finding(
        rule=5, checked=f"{len(square)} transposed rows are square; only values can show a mistake", notes=tuple(notes)
    )


def same_shapes(table: Table, config: Sizes) -> tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]:
    """Rows of one model that shapes cannot tell apart, inside one layer or outside the layers.

    Returns:
        (shape, names of the rows) of each group; with several heads, the largest groups.
    """
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for head in table.heads:
        groups: dict[tuple[bool, tuple[int, ...]], set[str]] = {}
        for entry in table.expand(config, head):
            if entry.op.stored:
                name = row_name(entry.hf, table)
                groups.setdefault(("{i}" in name, entry.hf_shape), set()).add(name)
        order = list(dict.fromkeys(row.hf for row in table.rows(head)))
        for (_, shape), names in groups.items():
            if len(names) > 1:
                found[tuple(sorted(names, key=order.index))] = shape
    return tuple((shape, names) for names, shape in found.items() if not any(set(names) < set(o) for o in found))


# --- 6: there and back ------------------------------------------------------------------------------------------------


def check_inverse_law(table: Table, config: Sizes) -> Finding:
    """Rule 6: a row's operation, then its inverse, gives every element back, and both shapes are those it claims.

    Every element has a number of its own, so a lost, doubled or misplaced one shows. A tied row moves nothing; it must
    have the shape of the weight it repeats.
    """
    seen = Sightings()
    moved: set[str] = set()
    small = _small(config)
    for head in table.heads:
        for value in (False, True):
            where = f"{head}, all switches {'on' if value else 'off'}"
            entries = table.expand(with_changes(small, dict.fromkeys(switches(table), value)), head)
            stacks: dict[str, list[Entry]] = {}
            for entry in entries:
                if entry.op.stored:
                    stacks.setdefault(entry.paddle, []).append(entry)
                elif entry.hf_shape != next(e.hf_shape for e in entries if e.hf == entry.to):
                    seen.add(row_name(entry.hf, table), f"has not the shape of `{entry.to}`", where=where)
            for parts in stacks.values():
                moved |= {row_name(part.hf, table) for part in parts}
                message = _there_and_back(parts)
                if message:
                    seen.add(", ".join(row_name(part.hf, table) for part in parts), message, where=where)
    return Finding(
        rule=6,
        checked=f"{len(moved)} rows, every element numbered: the operation and its inverse give each back",
        faults=seen.faults(),
    )


def _there_and_back(parts: list[Entry]) -> str:
    """Send numbered elements to Paddle's side and back; returns what is wrong, or nothing."""
    first = parts[0]
    dyes: list[Bits] = []
    start = 0
    for part in parts:
        size = int(np.prod(part.hf_shape, dtype=np.int64))
        dyes.append(np.arange(start, start + size, dtype=np.uint32).reshape(part.hf_shape))
        start += size
    whole = np.concatenate(dyes) if first.rows is not None else dyes[0]
    there = first.op.apply(whole)
    if there.shape != first.paddle_shape:
        return f"the op {first.op.name} gives the shape {there.shape}, not {first.paddle_shape}"
    inverse = first.inverse_op()
    back = inverse.apply(there)
    if back.shape != whole.shape or inverse.shape(there.shape) != whole.shape:
        return f"the op {inverse.name} gives the shape {back.shape} back, not {whole.shape}"
    for part, dye in zip(parts, dyes, strict=True):
        taken = back if part.rows is None else back[slice(*part.rows)]
        if not np.array_equal(taken, dye):
            return f"the op {inverse.name} does not undo {first.op.name}"
    return ""


# --- 7: legacy spellings ----------------------------------------------------------------------------------------------


def check_aliases(table: Table, config: Sizes) -> Finding:
    """Rule 7: a row's name and every legacy spelling of it are read as that name, and reading twice changes nothing."""
    seen = Sightings()
    names = _all_names(table, config)
    tried = 0
    for name in names:
        row = row_name(name, table)
        read = table.canonical(name, "hf")
        if read != name:
            meaning = "the name of another row" if read in names else "a name no row has"
            seen.add(row, f"an alias turns `{name}` into `{read}`, {meaning}", kind="itself")
            continue
        for spelling, meant in _spellings(table, name):
            tried += 1
            read = table.canonical(spelling, "hf")
            again = table.canonical(read, "hf")
            if again != read:
                seen.add(row, f"`{spelling}` is read as `{read}`, and that as `{again}`", kind="twice")
            elif meant and read != name:
                seen.add(row, f"`{spelling}` is read as `{read}`, not as `{name}`", kind="spelling")
    return Finding(
        rule=7,
        checked=f"{tried} legacy spellings of {len(names)} names are read as those names, once and twice",
        faults=seen.faults(),
    )


def _all_names(table: Table, config: Sizes) -> dict[str, None]:
    """Every Hugging Face name that some small model has, with and without the prefix, in order."""
    names: dict[str, None] = {}
    for head in table.heads:
        for value in (False, True):
            variant = with_changes(_small(config), dict.fromkeys(switches(table), value))
            for prefix in (table.prefix(head), ""):
                names |= dict.fromkeys(entry.hf for entry in table.expand(variant, head, prefix=prefix))
    return names


def _spellings(table: Table, name: str) -> Iterator[tuple[str, bool]]:
    """A name with every alias and every combination of them on it, and whether it must be read as `name`."""
    aliases = table.document.aliases
    endings = [(name, True)]
    for old, new in aliases.suffixes.items():
        endings += [(name.removesuffix(new) + old, True)] if name.endswith(new) else []
        endings.append((name.rpartition(".")[0] + old, False))  # a weight of that module under another row's suffix
    prefixes = ["", *aliases.prefixes, *(first + second for first, second in product(aliases.prefixes, repeat=2))]
    for prefix, (ending, meant) in product(prefixes, endings):
        parts = (prefix + ending).split(".")
        yield ".".join(parts), meant
        for component in aliases.components:
            yield ".".join(text for part in parts for text in (component, part)), meant
            for at in range(len(parts)):
                yield ".".join([*parts[:at], component, *parts[at:]]), meant
