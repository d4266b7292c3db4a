"""What two name-mapping tables do not have in common."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modernbert_align.core.table import Row, Table


@dataclass(frozen=True, kw_only=True)
class Change:
    """One value that differs.

    Attributes:
        place: The row (`group: name`) or the path of a setting (`heads.base.architecture`).
        field: The row's field; empty for a setting.
        a, b: The values; None where a table has no such setting.
    """

    place: str
    field: str
    a: Any
    b: Any


@dataclass(frozen=True, kw_only=True)
class TableDiff:
    """Everything two tables do not have in common.

    Attributes:
        only_a, only_b: Rows that one of them has, as `group: name`.
        changed: Fields of rows that both have, and groups whose common rows have another order.
        settings: Everything that is not a row: id, prefix, sides, symbols, heads, aliases, config.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[Change, ...]
    settings: tuple[Change, ...]

    @property
    def equal(self) -> bool:
        """Whether the tables say the same."""
        return not (self.only_a or self.only_b or self.changed or self.settings)


def diff_tables(a: Table, b: Table) -> TableDiff:
    """Compare two tables by what they say; comments and layout of the files do not count."""
    first, second = a.document, b.document
    only_a: list[str] = []
    only_b: list[str] = []
    changed: list[Change] = []
    for group in dict.fromkeys((*first.rows, *second.rows)):
        rows_a, rows_b = first.rows.get(group, ()), second.rows.get(group, ())
        pairs = _pair(rows_a, rows_b)
        only_a += [_place(group, row) for n, row in enumerate(rows_a) if n not in pairs]
        only_b += [_place(group, row) for n, row in enumerate(rows_b) if n not in pairs.values()]
        for here, there in pairs.items():
            changed += _changes(_place(group, rows_a[here]), rows_a[here], rows_b[there])
        if list(pairs.values()) != sorted(pairs.values()):
            orders = ([rows_a[n].hf for n in pairs], [rows_b[n].hf for n in sorted(pairs.values())])
            changed.append(Change(place=group, field="order", a=orders[0], b=orders[1]))
    settings_a = dict(_flat("", first.model_dump(exclude={"rows"})))
    settings_b = dict(_flat("", second.model_dump(exclude={"rows"})))
    return TableDiff(
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        changed=tuple(changed),
        settings=tuple(
            Change(place=key, field="", a=settings_a.get(key), b=settings_b.get(key))
            for key in dict.fromkeys((*settings_a, *settings_b))
            if settings_a.get(key) != settings_b.get(key)
        ),
    )


def _place(group: str, row: Row) -> str:
    return f"{group}: {row.hf}" + (f" when {row.when}" if row.when else "")


def _pair(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[int, int]:
    """Which row of the one is which of the other: by name and condition, then by either name, in the order of a."""
    pairs: dict[int, int] = {}
    for key in (lambda r: (r.hf, r.when), lambda r: r.hf, lambda r: (r.paddle, r.part)):
        for here, row in enumerate(rows_a):
            if here in pairs:
                continue
            taken = set(pairs.values())
            same = (n for n, other in enumerate(rows_b) if n not in taken and key(other) == key(row))
            there = next(same, None)
            if there is not None:
                pairs[here] = there
    return dict(sorted(pairs.items()))


def _changes(place: str, a: Row, b: Row) -> list[Change]:
    fields_a, fields_b = a.model_dump(), b.model_dump()
    return [
        Change(place=place, field=field, a=fields_a[field], b=fields_b[field])
        for field in fields_a
        if fields_a[field] != fields_b[field]
    ]


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Paths of all values that are not tables themselves."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), inner)
    else:
        yield path, list(value) if isinstance(value, tuple) else value
