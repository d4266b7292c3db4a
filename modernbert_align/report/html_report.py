"""The report as one HTML page: a view of the JSON, nothing judged anew, no script, no network."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modernbert_align.core.files import write_atomically
from modernbert_align.core.rows import MODES, Dtype, Loss, Mode, Row
from modernbert_align.core.verdict import explain
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, EXIT_NOT_COMPARED
from modernbert_align.report.chart import error_chart_svg
from modernbert_align.report.schema import Report
from modernbert_align.report.svg import MODE_NAME
from modernbert_align.report.terminal import CAUSE, cause_sentence, kind, worst_by_kind

if TYPE_CHECKING:
    from jinja2 import Environment

SYMBOLS = {"PASS": "✓", "EXPLAINED": "≈", "FAIL": "✗", "NOT_COMPARED": "?"}
EXIT_MEANING = {
    EXIT_ALIGNED: "a gate lets this through",
    EXIT_MISALIGNED: "a gate stops here: misaligned",
    EXIT_NOT_COMPARED: "a gate stops here: nothing, or too little, was compared",
}
NO_NUMBER = {
    "compared": "not computable",
    "missing": "not seen",
    "extra": "nothing to compare with",
    "shape_mismatch": "shapes differ",
    "dtype_mismatch": "dtypes differ",
    "nonfinite": "not finite",
    "empty": "empty",
}


_CLAIMS = {
    "forward": (
        "The Paddle model computes what the Hugging Face model computes",
        "The Paddle model does not compute what the Hugging Face model computes",
    ),
    "backward": (
        "The Paddle model has the Hugging Face model's gradients",
        "The Paddle model does not have the Hugging Face model's gradients",
    ),
    "step": (
        "The Paddle model trains as the Hugging Face model does",
        "The Paddle model does not train as the Hugging Face model does",
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The rows of one dtype, loss and mode, each with the id its table row has."""

    dtype: Dtype
    loss: Loss | None
    mode: Mode
    rows: tuple[tuple[str, Row], ...]
    worst: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.dtype}, {MODE_NAME[self.mode]}" + (f", {self.loss} loss" if self.loss else "")

    @property
    def counts(self) -> str:
        return _counts([row for _, row in self.rows])

    @property
    def clean(self) -> bool:
        return all(row.status == "pass" for _, row in self.rows)


def write_html(report: Report, path: Path) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        UsageError: The folder cannot be written.
    """
    write_atomically(path, render_html(report))


def render_html(report: Report) -> str:
    """The page as text. Equal reports give equal text."""
    from markupsafe import Markup

    dtypes = tuple(dict.fromkeys(row.dtype for row in report.rows))
    groups = _groups(report, dtypes)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            symbol=SYMBOLS[report.verdict],
            sentence=verdict_sentence(report),
            exit_meaning=EXIT_MEANING.get(report.exit_code, "not an exit code of a comparison"),
            counts=_counts(report.rows),
            groups=groups,
            first_anchor=_anchor_of_first(report, groups),
            charts={
                f"{dtype}, {loss} loss" if loss else dtype: Markup(error_chart_svg(report, dtype, loss))
                for dtype in dtypes
                for loss in _losses(report)
            },
            unchecked=[dtype for dtype in dtypes if dtype not in {check.dtype for check in report.weights}],
            noise_measured=any(row.noise_limit is not None for row in report.rows),
        )
    )


def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("modernbert_align.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cause_sentence=cause_sentence)
    environment.globals["CAUSE"] = CAUSE
    environment.filters.update(number=_number, share=_share, explain=explain, kind=kind, mode_name=MODE_NAME.get)
    environment.globals["NO_NUMBER"] = NO_NUMBER
    return environment


def _groups(report: Report, dtypes: Sequence[Dtype]) -> list[_Group]:
    worst = worst_by_kind(report)
    groups = []
    for dtype, loss in itertools.product(dtypes, _losses(report)):
        for mode in MODES:
            key = (dtype, loss, mode)
            rows = [row for row in report.rows if (row.dtype, row.loss, row.mode) == key]
            if rows:
                groups.append(
                    _Group(
                        dtype=dtype,
                        loss=loss,
                        mode=mode,
                        # Numbered, not named: a probe's name may hold anything.
                        rows=tuple(
                            ("-".join((dtype, *([loss] if loss else []), mode, str(n))), row)
                            for n, row in enumerate(rows)
                        ),
                        worst=tuple(row for row in worst if (row.dtype, row.loss, row.mode) == key),
                    )
                )
    return groups


def _losses(report: Report) -> tuple[Loss | None, ...]:
    return tuple(dict.fromkeys(row.loss for row in report.rows))


def _anchor_of_first(report: Report, groups: Sequence[_Group]) -> str:
    """The id of the row that `first_failing` speaks of; empty if it has none, as a weight has."""
    first = report.first_failing
    found = (
        anchor
        for group in groups
        for anchor, row in group.rows
        if first is not None
        and (row.probe, row.dtype, row.loss, row.mode) == (first.probe, first.dtype, first.loss, first.mode)
    )
    return next(found, "")


def verdict_sentence(report: Report) -> str:
    """What the verdict means, for someone who sees such a page for the first time."""
    coverage = report.coverage
    wrong = sum(row.status not in ("pass", "explained", "missing") for row in report.rows)
    weights = sum(len(check.differences) for check in report.weights)
    over = sum(row.status == "explained" for row in report.rows)
    if report.verdict == "PASS":
        return f"{_CLAIMS[report.phase][0]}: every weight is equal bit for bit and every error is within its limits."
    if report.verdict == "EXPLAINED":
        return (
            f"{_plural(over, 'row')} over the contract, by no more than rounding explains; the policy "
            f"{report.policy} {'accepts' if report.exit_code == EXIT_ALIGNED else 'does not accept'} that."
        )
    if report.verdict == "FAIL":
        found = f"{_plural(wrong, 'wrong row')} of {len(report.rows)}, {_plural(weights, 'wrong weight')}"
        return f"{_CLAIMS[report.phase][1]}: {found}."
    return (
        "This is not a pass: too little was compared to say anything about the Paddle model. "
        f"{coverage.compared} of {_plural(coverage.expected, 'row')} and {coverage.weights_compared} of "
        f"{_plural(coverage.weights_expected, 'weight')} were compared; "
        f"{_plural(len(coverage.missing), 'thing')} left out, listed under Coverage."
    )


def _counts(rows: Sequence[Row]) -> str:
    """`3 fail, 97 pass`: whatever is not a pass comes first."""
    counts = Counter(row.status.replace("_", " ") for row in rows)
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items(), key=lambda item: item[0] == "pass"))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _number(value: float, digits: int = 2) -> str:
    return "0" if value == 0 else f"{value:.{digits}e}" if math.isfinite(value) else "not finite"


def _share(value: float) -> str:
    """A share in percent that says 0 % or 100 % only when it is exactly that."""
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    return f"{min(max(value * 100, 0.1), 99.9):.1f} %"
