"""What changed between two reports, in a terminal."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modernbert_align.core.text import one_line
from modernbert_align.report.comparison import Comparison, RowChange, RowPresence
from modernbert_align.report.schema import run_words

if TYPE_CHECKING:
    from rich.console import Console

WORST = 10
_MODE = {"isolated": "own", "accumulated": "end"}
_DIGEST = re.compile("[0-9a-f]{64}")


def print_comparison(comparison: Comparison, console: "Console") -> None:
    """Print a summary that fits 80 columns: what got worse, what is gone, what else changed."""

    def say(text: str, style: str = "") -> None:
        console.print(one_line(text), style=style or None, soft_wrap=True, markup=False)

    _rows(comparison.regressions, "worse", "red", console)
    _names("worse: weight", comparison.weights_worse, say)
    _presences("no longer compared", comparison.removed, say)
    _names("no longer compared", comparison.lost, say)
    failing = comparison.added_failing
    _presences("fails, not compared before", failing, say)
    _rows(comparison.improvements, "better", "green", console)
    _names("better: weight", comparison.weights_better, say)
    _presences("newly compared", [row for row in comparison.added if row not in failing], say)
    old, new = comparison.old, comparison.new
    for name, before, after in (
        ("verdict", old.verdict, new.verdict),
        ("first failing", old.first_failing or "nothing", new.first_failing or "nothing"),
        ("rows compared", _of(old.coverage.compared, old.coverage.expected), _of(*_rows_of(comparison))),
        (
            "weights compared",
            _of(old.coverage.weights_compared, old.coverage.weights_expected),
            _of(new.coverage.weights_compared, new.coverage.weights_expected),
        ),
    ):
        if before != after:
            say(f"{name}: {before} -> {after}")
    for kind, settings in (("limit", comparison.tolerances), ("changed", comparison.environment)):
        for setting in settings:
            say(f"{kind}: {setting.name}: {_value(setting.old)} -> {_value(setting.new)}")
    say(movement(comparison))
    say(summary(comparison), "bold green" if comparison.exit_code == 0 else "bold red")


def headline(comparison: Comparison) -> str:
    """What changed, in a few words."""
    if comparison.same_report:
        return "nothing to compare"
    parts = [
        f"{len(things)} {name}"
        for things, name in (
            (comparison.regressions, "worse"),
            (comparison.weights_worse, "weights worse"),
            (comparison.added_failing, "newly compared and failing"),
            ((*comparison.removed, *comparison.lost), "no longer compared"),
            (comparison.improvements, "better"),
        )
        if things
    ]
    if not comparison.rows_compared:
        parts.append("no row was compared in both")
    return ", ".join(parts) or "nothing worse"


def movement(comparison: Comparison) -> str:
    """How far rows that both compared are apart, noise included."""
    if comparison.same_report:
        return "both files are the same report"
    moved = comparison.rows_compared - comparison.rows_equal
    return f"{comparison.rows_compared} rows in both, {comparison.rows_equal} equal to the last bit" + (
        f"; {moved} moved, by up to {comparison.largest_growth:.2g} of their limit" if moved else ""
    )


def summary(comparison: Comparison) -> str:
    """What changed, of what, and the exit code, in one line."""
    run = run_words(comparison.phase, comparison.steps, comparison.attention, comparison.tensor_parallel)
    return (
        f"{headline(comparison)}  {comparison.model} {comparison.head} {comparison.new.dtype} {run}, "
        f"exit {comparison.exit_code}"
    )


def _rows(changes: Sequence[RowChange], word: str, style: str, console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    if not changes:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name, justify in (
        (word, "left"), ("dtype", "left"), ("", "left"), ("status", "left"), ("rel_l2", "left"),
        ("growth", "right"), ("oracle", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name not in (word, "status"), overflow="fold")  # type: ignore[arg-type]
    for change in changes[:WORST]:
        same = change.old_status == change.new_status
        table.add_row(
            Text(one_line(change.probe.removeprefix("model.") + (f" ({change.loss})" if change.loss else ""))),
            change.dtype,
            _MODE[change.mode],
            Text(change.new_status if same else f"{change.old_status} -> {change.new_status}", style=style),
            f"{_number(change.old_rel_l2)} -> {_number(change.new_rel_l2)}",
            _signed(change.direct_growth),
            _signed(change.oracle_growth),
        )
    console.print(table)
    if len(changes) > WORST:
        console.print(f"and {len(changes) - WORST} more rows {word}")


def _presences(label: str, rows: Sequence[RowPresence], say: Any) -> None:
    for row in rows[:WORST]:
        loss = f", {row.loss} loss" if row.loss else ""
        say(f"{label}: {row.probe} ({row.dtype}{loss}, {row.mode}), {row.status}: {row.reason}")
    if len(rows) > WORST:
        say(f"and {len(rows) - WORST} more rows {label}")


def _names(label: str, names: Sequence[str], say: Any) -> None:
    for name in names[:WORST]:
        say(f"{label} {name}" if label.endswith("weight") else f"{label}: {name}")
    if len(names) > WORST:
        say(f"and {len(names) - WORST} more: {label}")


def _rows_of(comparison: Comparison) -> tuple[int, int]:
    return comparison.new.coverage.compared, comparison.new.coverage.expected


def _of(compared: int, expected: int) -> str:
    return f"{compared} of {expected}"


def _value(value: Any) -> str:
    if value is None:
        return "absent"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if _DIGEST.fullmatch(text) else text or "nothing"


def _number(value: float | None) -> str:
    return "-" if value is None else format(value, ".1e")


def _signed(value: float | None) -> str:
    return "-" if value is None else format(value, "+.2g")
