"""The report as one HTML page: a view of the JSON, nothing judged anew, no network, readable without a script."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modernbert_align.core.rows import MODES, Dtype, Loss, Mode, Row
from modernbert_align.core.verdict import explain, only_by_own_limits
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, EXIT_NOT_COMPARED
from modernbert_align.report.chart import error_chart_svg
from modernbert_align.report.finding import caveats, excesses, next_commands, wrong_by_themselves
from modernbert_align.report.glossary import GROUPS
from modernbert_align.report.heat_map import heat_map_svg
from modernbert_align.report.page import plural, render_page
from modernbert_align.report.schema import Report
from modernbert_align.report.selftest_report import SelftestReport, kill_matrix
from modernbert_align.report.severity import severity
from modernbert_align.report.svg import MODE_NAME
from modernbert_align.report.terminal import CAUSE, cause_sentence, kind, worst_by_kind
from modernbert_align.report.ulp_chart import ulp_histogram_svg

if TYPE_CHECKING:
    from markupsafe import Markup

SYMBOLS = {"PASS": "✓", "EXPLAINED": "≈", "FAIL": "✗", "NOT_COMPARED": "?"}
EXIT_MEANING = {
    EXIT_ALIGNED: "CI may merge",
    EXIT_MISALIGNED: "CI must not merge: misaligned",
    EXIT_NOT_COMPARED: "CI must not merge: nothing, or too little, was compared",
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
OPERATIONS = {"id": "copied as they are", "T": "transposed", "tie": "tied to another weight"}

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
    worst: tuple[tuple[str, Row], ...]

    @property
    def title(self) -> str:
        return f"{self.dtype}, {MODE_NAME[self.mode]}" + (f", {self.loss} loss" if self.loss else "")

    @property
    def counts(self) -> str:
        return _counts([row for _, row in self.rows])

    @property
    def clean(self) -> bool:
        return all(row.status == "pass" for _, row in self.rows)


def render_html(report: Report, selftest: SelftestReport | None = None, selftest_notes: Sequence[str] = ()) -> str:
    """The page as text. Equal arguments give equal text.

    Args:
        selftest: A selftest of the comparison that made the report, to be shown beside it.
        selftest_notes: What else is to be said of selftests, in sentences.
    """
    from markupsafe import Markup

    dtypes = tuple(dict.fromkeys(row.dtype for row in report.rows))
    groups = _groups(report, dtypes)
    first_anchor = _anchor_of_first(report, groups)
    with_contract = any(row.contract for row in report.rows)
    with_noise = any(row.noise_limit is not None for row in report.rows)
    with_padiff = any(row.padiff_equal is not None for row in report.rows)
    return render_page(
        "report.html.j2",
        script="report.js",
        report=report,
        symbol=SYMBOLS[report.verdict],
        sentence=verdict_sentence(report),
        exit_meaning=EXIT_MEANING.get(report.exit_code, "not an exit code of a comparison"),
        counts=_counts(report.rows),
        groups=groups,
        first_anchor=first_anchor,
        first_row=_row_of(first_anchor, groups),
        excesses=excesses,
        wrong_by_themselves=wrong_by_themselves(report),
        next_commands=next_commands(report),
        caveats=caveats(report),
        dtypes=dtypes,
        closest=_closest(groups),
        charts=_by_title(report, dtypes, error_chart_svg),
        heat_maps=_by_title(report, dtypes, heat_map_svg),
        histogram=Markup(ulp_histogram_svg(report)),
        choices=_choices(report),
        unchecked=[dtype for dtype in dtypes if dtype not in {check.dtype for check in report.weights}],
        with_contract=with_contract,
        with_noise=with_noise,
        with_padiff=with_padiff,
        columns=9 + with_contract + with_noise + with_padiff,
        selftest=selftest,
        selftest_notes=selftest_notes,
        selftest_command=f"modernbert-align selftest --dtype {report.dtype} --phase {report.phase}",
        matrix=None if selftest is None else kill_matrix(selftest),
        explain=explain,
        cause_sentence=cause_sentence,
        kind=kind,
        CAUSE=CAUSE,
        GROUPS=GROUPS,
        MODE_NAME=MODE_NAME,
        NO_NUMBER=NO_NUMBER,
        OPERATIONS=OPERATIONS,
    )


def _by_title(
    report: Report, dtypes: Sequence[Dtype], draw: Callable[[Report, Dtype, Loss | None], str]
) -> dict[str, "Markup"]:
    """One chart per dtype and loss."""
    from markupsafe import Markup

    return {
        f"{dtype}, {loss} loss" if loss else dtype: Markup(draw(report, dtype, loss))
        for dtype, loss in itertools.product(dtypes, _losses(report))
    }


def _groups(report: Report, dtypes: Sequence[Dtype]) -> list[_Group]:
    worst = {id(row) for row in worst_by_kind(report)}
    anchors: set[str] = set()
    groups = []
    for dtype, loss in itertools.product(dtypes, _losses(report)):
        for mode in MODES:
            key = (dtype, loss, mode)
            rows = tuple(
                (_anchor(row, n, anchors), row)
                for n, row in enumerate(row for row in report.rows if (row.dtype, row.loss, row.mode) == key)
            )
            if rows:
                closest = tuple((anchor, row) for anchor, row in rows if id(row) in worst)
                groups.append(_Group(dtype=dtype, loss=loss, mode=mode, rows=rows, worst=closest))
    return groups


def _anchor(row: Row, n: int, taken: set[str]) -> str:
    """The id of a row: its probe by name, or its number where that name might be anything."""
    prefix = "-".join((row.dtype, *([row.loss] if row.loss else []), row.mode))
    anchor = f"{prefix}-{row.probe}"
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,120}", row.probe) or anchor in taken:
        anchor = f"{prefix}~{n}"
    taken.add(anchor)
    return anchor


def _losses(report: Report) -> tuple[Loss | None, ...]:
    return tuple(dict.fromkeys(row.loss for row in report.rows))


def _choices(report: Report) -> dict[str, dict[str, str]]:
    """What rows can be filtered by: name -> value -> its words. What all rows share is no choice."""
    choices: dict[str, dict[str, str]] = {
        "status": {row.status: row.status.replace("_", " ") for row in report.rows},
        "dtype": {row.dtype: row.dtype for row in report.rows},
        "mode": {row.mode: MODE_NAME[row.mode] for row in report.rows},
        "loss": {row.loss: row.loss for row in report.rows if row.loss},
    }
    return {name: values for name, values in choices.items() if len(values) > 1}


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


def _row_of(wanted: str, groups: Sequence[_Group]) -> Row | None:
    return next((row for group in groups for anchor, row in group.rows if anchor == wanted), None)


def _closest(groups: Sequence[_Group]) -> tuple[str, Row, float]:
    """The row that comes nearest to a limit of its, with its id and its part of the limit."""
    rows = ((anchor, row, severity(row)) for group in groups for anchor, row in group.worst)
    return max(rows, key=lambda found: found[2])


def verdict_sentence(report: Report) -> str:
    """What the verdict means, for someone who sees such a page for the first time."""
    coverage = report.coverage
    wrong = sum(row.status not in ("pass", "explained", "missing") for row in report.rows)
    weights = sum(len(check.differences) for check in report.weights)
    over = sum(row.status == "explained" for row in report.rows)
    if report.verdict == "PASS":
        own = only_by_own_limits(report.rows)
        if own:
            return f"Every weight is equal bit for bit, and every error is within its limits: {own}."
        return f"{_CLAIMS[report.phase][0]}: every weight is equal bit for bit and every error is within its limits."
    if report.verdict == "EXPLAINED":
        return (
            f"{plural(over, 'row')} over the contract, by no more than rounding explains; the policy "
            f"{report.policy} {'accepts' if report.exit_code == EXIT_ALIGNED else 'does not accept'} that."
        )
    if report.verdict == "FAIL":
        found = f"{plural(wrong, 'wrong row')} of {len(report.rows)}, {plural(weights, 'wrong weight')}"
        between = sum(len(check.wrong) for check in report.ranks)
        if between:
            found += f", {plural(between, 'disagreement')} between ranks"
        return f"{_CLAIMS[report.phase][1]}: {found}."
    seen = (
        "everything that was compared agrees, but not everything was compared"
        if coverage.compared and coverage.weights_compared
        else "too little was compared to say anything about the Paddle model"
    )
    return (
        f"This is not a pass: {seen}. {coverage.compared} of {plural(coverage.expected, 'row')} and "
        f"{coverage.weights_compared} of {plural(coverage.weights_expected, 'weight')} were compared; "
        f"{plural(len(coverage.missing), 'thing')} left out, listed under Coverage."
    )


def _counts(rows: Sequence[Row]) -> str:
    """`3 fail, 97 pass`: whatever is not a pass comes first."""
    counts = Counter(row.status.replace("_", " ") for row in rows)
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items(), key=lambda item: item[0] == "pass"))
