"""The report in a terminal: verdict, the first failing probe, the worst rows per kind."""

from collections import defaultdict
from typing import TYPE_CHECKING

from modernbert_align.core.cause import Cause
from modernbert_align.core.rows import Row
from modernbert_align.core.text import one_line
from modernbert_align.core.tolerance import AppliedOverride
from modernbert_align.core.training import MOMENTS
from modernbert_align.core.verdict import explain, only_by_own_limits, place
from modernbert_align.report.schema import Report, rank_line
from modernbert_align.report.severity import severity

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STYLES = {"PASS": "bold green", "EXPLAINED": "bold yellow", "FAIL": "bold red", "NOT_COMPARED": "bold red"}
CAUSE = {"explained": "cause", "partial": "possible cause", "unexplained": "cause not known"}
WORST = 5


def cause_sentence(cause: Cause) -> str:
    """What was found out, and how much of the difference that leaves."""
    if cause.ratio is None or cause.level != "explained":
        return cause.statement
    return f"{cause.statement} (explains all but {cause.ratio:.1e} of the difference)"


def kind(row: Row) -> str:
    """`layers.7.attn` -> `attn`, `layers.7` -> `layer`; other names stay. Weights and moments are one kind each."""
    parts = row.probe.split(".")
    if row.phase != "forward":
        for last in (*MOMENTS, "loss"):
            if last in (parts[-1], parts[0]):
                return last
        return "weight" if parts[-1] in ("weight", "bias") else "output"
    if parts[0] != "layers":
        return row.probe
    return parts[2] if len(parts) > 2 else "layer"


def worst_by_kind(report: Report) -> list[Row]:
    """For every kind of probe, dtype, loss and mode, the row closest to its limit, in first-seen order."""
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in report.rows:
        groups[row.dtype, row.loss or "", row.mode, kind(row)].append(row)
    return [max(rows, key=severity) for rows in groups.values()]


def worst_first(report: Report) -> list[Row]:
    """The rows that are not a pass, the one furthest beyond its limits first."""
    return sorted((row for row in report.rows if row.status != "pass"), key=severity, reverse=True)


def override_line(override: AppliedOverride) -> str:
    """An own limit of the project in one line."""
    return (
        f"own limit: {override.probe} ({override.dtype}, {override.mode or 'both modes'}): {override.criterion} "
        f"at most {override.limit:g}, {override.rows} rows: {override.reason}"
    )


def verdict_line(report: Report) -> "Text":
    """The verdict and what it is about."""
    from rich.text import Text

    own = only_by_own_limits(report.rows)
    return Text.assemble(
        (report.verdict, STYLES[report.verdict]),
        one_line(
            f"  {report.model.name} {report.model.head} {report.dtype} {report.run}, "
            f"policy {report.policy}, exit {report.exit_code}" + (f"; {own}" if own else "")
        ),
    )


def print_report(report: Report, console: "Console", *, timings: bool = False) -> None:
    """Print a summary that fits 80 columns.

    Args:
        timings: Whether to print what took how long.
    """
    from rich.table import Table
    from rich.text import Text

    forward = report.phase == "forward"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("dtype", "left"), *([] if forward else [("loss", "left")]), ("mode", "left"), ("worst probe", "left"),
        *([("mean_abs", "right"), ("limit", "right"), ("max_abs", "right")] if forward else [("rel_l2", "right")]),
        ("null x", "right"), ("status", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in worst_by_kind(report):
        errors = [_number(row.mean_abs), _number(row.contract_limit, ".0e"), _number(row.max_abs)]
        table.add_row(
            row.dtype,
            *([] if forward else [row.loss or ""]),
            "own" if row.mode == "isolated" else "end-to-end",
            Text(one_line(row.probe if forward else row.probe.removeprefix("model."))),
            *(errors if forward else [_number(row.rel_l2)]),
            "-" if row.null_ratio is None else f"{row.null_ratio:.2f}",
            Text(
                row.status, style="green" if row.status == "pass" else "yellow" if row.status == "explained" else "red"
            ),
        )
    console.print(table)
    for dtype, execution in report.execution.items():
        if execution.candidate == "emulated":
            console.print(f"{dtype}: Paddle emulated (float32 kernels, each result rounded), reference native")
    coverage = report.coverage
    console.print(
        f"compared {coverage.compared} of {coverage.expected} rows, "
        f"{coverage.weights_compared} of {coverage.weights_expected} weights"
    )
    if report.tensor_parallel > 1:
        console.print(rank_line(report))
    bad = worst_first(report)
    for row in bad[:WORST]:
        console.print(Text(one_line(f"{row.status}: {place(row)}: {explain(row)}")), soft_wrap=True)
    if len(bad) > WORST:
        console.print(f"and {len(bad) - WORST} more rows, see the report")
    if report.first_failing is not None:
        first = report.first_failing
        console.print(Text(one_line(f"first failing: {first.place}: {first.detail}"), style="bold"), soft_wrap=True)
    if report.cause is not None and report.cause.level != "structural":
        console.print(
            Text(one_line(f"{CAUSE[report.cause.level]}: {cause_sentence(report.cause)}"), style="bold"), soft_wrap=True
        )
    for hint in report.hints:
        console.print(Text(one_line(f"hint: {hint}")), soft_wrap=True)
    for override in report.overrides:
        console.print(Text(one_line(override_line(override)), style="yellow"), soft_wrap=True)
    if timings:
        for step, seconds in report.timings_s.items():
            console.print(f"{seconds:8.1f} s  {step}")
    console.print(verdict_line(report))


def _number(value: float | None, spec: str = ".1e") -> str:
    return "-" if value is None else format(value, spec)
