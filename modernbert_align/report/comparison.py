"""What changed between two reports of the same comparison: a trend, not a verdict.

Both reports are to be judged by the same rules first (`judged_as`), so that a status that differs comes from a
measurement that differs.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modernbert_align.core.fixtures import contract_fixture
from modernbert_align.core.rows import Attention, Dtype, Loss, Mode, Phase, Record, Row, Status
from modernbert_align.core.tolerance import Tolerance, load_tolerances
from modernbert_align.core.verdict import RUNS, Coverage, Judgement, Key, Policy, Verdict, default_policy, place
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, EXIT_NOT_COMPARED, UsageError
from modernbert_align.report.schema import Report

# Largest growth of an error that is noise, as a share of the limit of criterion 3 or 4; 0.5 is one null in the forward
# phase. Measured in all phases of the tiny fixtures: 0 between runs, numbers of threads and engines; between sets of
# instructions at most 0.22, but for a pooled head of 128 numbers, 0.41. See docs/baselines.md.
NOISE = 0.5
Reason = Literal["status", "direct", "oracle"]

_NOT_COMPARED = ("missing", "extra")
_RANK: dict[Status, int] = {
    "pass": 0,
    "explained": 1,
    "fail": 2,
    "shape_mismatch": 3,
    "dtype_mismatch": 3,
    "nonfinite": 3,
}
_MEASURED = tuple(name for name in Record.model_fields if name != "padiff_equal")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowChange(_Strict):
    """A row that both reports compared and that changed by more than noise.

    Attributes:
        reasons: What changed: the status, rel_l2 against the reference (direct), or the error against the float64
            oracle.
        direct_growth: Growth of rel_l2 over the most that criterion 4 allows; negative where it shrank.
        oracle_growth: Growth of the candidate's error against the oracle over the most that criterion 3 allows; null
            where both are too small to be judged.
    """

    probe: str
    dtype: Dtype
    mode: Mode
    loss: Loss | None
    reasons: tuple[Reason, ...]
    old_status: Status
    new_status: Status
    old_rel_l2: float | None
    new_rel_l2: float | None
    old_candidate_error: float | None
    new_candidate_error: float | None
    direct_growth: float | None
    oracle_growth: float | None

    @property
    def growth(self) -> float:
        """The larger change of the two, whatever its sign."""
        return max(abs(self.direct_growth or 0.0), abs(self.oracle_growth or 0.0))


class RowPresence(_Strict):
    """A row that one report compared and the other did not.

    Attributes:
        status: Where it was compared, or `extra`.
        reason: Why it was not compared in the other.
    """

    probe: str
    dtype: Dtype
    mode: Mode
    loss: Loss | None
    status: Status
    reason: str


class Setting(_Strict):
    """A value that is not a measurement and differs; null where a report has no such value."""

    name: str
    old: Any
    new: Any


class Side(_Strict):
    """One of the two reports.

    Attributes:
        verdict: Of its measurements, under the rules both were judged by.
        first_failing: Where and why; empty if nowhere.
    """

    created: str
    tool_version: str
    dtype: Dtype
    verdict: Verdict
    first_failing: str
    coverage: Coverage
    content_sha256: str


class Comparison(_Strict):
    """Everything that changed from one report to another.

    Attributes:
        exit_code: 1 if something got worse, 5 if something is no longer compared or nothing was, else 0.
        noise: Largest growth of an error that is not reported, as a share of the row's limit.
        rows_compared: Rows that both compared.
        rows_equal: Of these, how many have the same measurements to the last bit.
        largest_growth: Of all rows that both compared, noise included, as a share of the row's limit.
        regressions, improvements: Rows that changed by more than noise, the largest change first.
        added, removed: Rows that only the newer, or only the older, compared.
        lost: What else the older compared or exercised and the newer did not.
        weights_worse, weights_better: Weights that differ from the reference, and what is wrong between ranks, in the
            newer, or in the older, alone.
        tolerances: Thresholds as they were when the reports were written.
        environment: Versions, machine, execution, engine, model, inputs.
    """

    schema_version: Literal[1] = 1
    exit_code: int
    model: str
    head: str
    phase: Phase
    steps: int | None
    attention: Attention
    tensor_parallel: int
    noise: float = Field(gt=0)
    old: Side
    new: Side
    rows_compared: int
    rows_equal: int
    largest_growth: float
    regressions: tuple[RowChange, ...]
    improvements: tuple[RowChange, ...]
    added: tuple[RowPresence, ...]
    removed: tuple[RowPresence, ...]
    lost: tuple[str, ...]
    weights_worse: tuple[str, ...]
    weights_better: tuple[str, ...]
    tolerances: tuple[Setting, ...]
    environment: tuple[Setting, ...]

    @property
    def same_report(self) -> bool:
        """Whether a report was compared with itself, which shows nothing."""
        return bool(self.old.content_sha256) and self.old.content_sha256 == self.new.content_sha256

    @property
    def added_failing(self) -> tuple[RowPresence, ...]:
        """Rows that the older did not compare and that fail in the newer."""
        return tuple(row for row in self.added if row.status not in ("pass", "explained"))


def judged_as(report: Report, judgement: Judgement) -> Report:
    """The report with what a judgement says in place of what it says itself."""
    return report.model_copy(
        update={
            "rows": judgement.rows,
            "verdict": judgement.verdict,
            "exit_code": judgement.exit_code,
            "coverage": judgement.coverage,
            "first_failing": judgement.first_failing,
        }
    )


def subject(report: Report) -> dict[str, str | int | None]:
    """What a report is about: reports that differ in it cannot be compared."""
    return {
        "model": report.model.name,
        "head": report.model.head,
        "phase": report.phase,
        "steps": report.steps,
        "attention": report.attention,
        "ranks": report.tensor_parallel,
    }


def compare_reports(old: Report, new: Report) -> Comparison:
    """Compare two reports, judged by the same rules, of the same model, head, phase, steps, attention and ranks.

    Raises:
        UsageError: They are of different comparisons.
    """
    first, second = subject(old), subject(new)
    differing = [f"{name} {first[name]} and {second[name]}" for name in first if first[name] != second[name]]
    if differing:
        raise UsageError(
            f"the reports are not of the same comparison: {', '.join(differing)}",
            hint="compare reports of the same model, head, phase, steps, attention and number of ranks",
        )
    before, after = _rows(old), _rows(new)
    both = [(row, after[key]) for key, row in before.items() if _compared(row) and _compared(after.get(key))]
    tolerances = load_tolerances(RUNS["bf16"])
    rank = _RANK if "contract" in map(_policy, (old, new)) else _RANK | {"explained": _RANK["pass"]}
    changes = [(_change(a, b, tolerances[a.dtype], rank), _change(b, a, tolerances[a.dtype], rank)) for a, b in both]
    regressions = [worse for worse, _ in changes if worse.reasons]
    improvements = [worse.model_copy(update={"reasons": better.reasons}) for worse, better in changes if better.reasons]
    added = [_presence(row, before.get(key)) for key, row in after.items() if _new_in(row, before.get(key))]
    gone = [(row, after.get(key)) for key, row in before.items() if _compared(row) and not _compared(after.get(key))]
    removed = [_presence(row, other) for row, other in gone]
    lost = _lost(old, new)
    differ_before, differ_after = _weight_differences(old), _weight_differences(new)
    comparison = Comparison(
        exit_code=EXIT_ALIGNED,
        model=new.model.name,
        head=new.model.head,
        phase=new.phase,
        steps=new.steps,
        attention=new.attention,
        tensor_parallel=new.tensor_parallel,
        noise=NOISE,
        old=_side(old),
        new=_side(new),
        rows_compared=len(both),
        rows_equal=sum(_same(a, b) for a, b in both),
        largest_growth=max((worse.growth for worse, _ in changes), default=0.0),
        regressions=tuple(sorted(regressions, key=_severity)),
        improvements=tuple(sorted(improvements, key=_severity)),
        added=tuple(added),
        removed=tuple(removed),
        lost=lost,
        weights_worse=tuple(sorted(differ_after - differ_before)),
        weights_better=tuple(sorted(differ_before - differ_after)),
        tolerances=_changed(_thresholds(old), _thresholds(new)),
        environment=_changed(_environment(old), _environment(new)),
    )
    if regressions or comparison.weights_worse or comparison.added_failing:
        code = EXIT_MISALIGNED
    elif removed or lost or not both:
        code = EXIT_NOT_COMPARED
    else:
        code = EXIT_ALIGNED
    return comparison.model_copy(update={"exit_code": code})


def _rows(report: Report) -> dict[Key, Row]:
    return {(row.probe, row.dtype, row.mode, row.phase, row.loss): row for row in report.rows}


def _compared(row: Row | None) -> bool:
    return row is not None and row.status not in _NOT_COMPARED


def _new_in(row: Row, before: Row | None) -> bool:
    """Whether a row of the newer report says something where the older said nothing."""
    return row.status != "missing" and not _compared(before) and (before is None or before.status != row.status)


def _presence(row: Row, other: Row | None) -> RowPresence:
    reason = "there is no such row" if other is None else other.reason
    return RowPresence(probe=row.probe, dtype=row.dtype, mode=row.mode, loss=row.loss, status=row.status, reason=reason)


def _same(a: Row, b: Row) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in _MEASURED)


def _policy(report: Report) -> Policy:
    """Outside of the contract, rounding alone turns pass into explained and back."""
    return default_policy(contract_fixture(report.model.fixture))


def _change(old: Row, new: Row, tolerance: Tolerance, rank: Mapping[Status, int]) -> RowChange:
    """What changed from one row to the other; its reasons are those that make the other worse."""
    direct, oracle = _direct_growth(old, new, tolerance), _oracle_growth(old, new, tolerance)
    reasons: list[Reason] = []
    if rank[new.status] > rank[old.status]:
        reasons.append("status")
    if direct is not None and direct > NOISE:
        reasons.append("direct")
    if oracle is not None and oracle > NOISE:
        reasons.append("oracle")
    return RowChange(
        probe=new.probe,
        dtype=new.dtype,
        mode=new.mode,
        loss=new.loss,
        reasons=tuple(reasons),
        old_status=old.status,
        new_status=new.status,
        old_rel_l2=_finite(old.rel_l2),
        new_rel_l2=_finite(new.rel_l2),
        old_candidate_error=_finite(old.candidate_error),
        new_candidate_error=_finite(new.candidate_error),
        direct_growth=direct,
        oracle_growth=oracle,
    )


def _direct_growth(old: Row, new: Row, tolerance: Tolerance) -> float | None:
    """Growth of rel_l2 over the most that criterion 4 allows.

    The smaller null counts, so that a null that grew hides nothing; the limit is the installed one, so that a
    project's own limit hides nothing either.
    """
    before, after = _finite(old.rel_l2), _finite(new.rel_l2)
    if before is None or after is None:
        return None
    direct = tolerance.criteria(new.phase).direct
    nulls = [null for row in (old, new) for null in [_null(row, direct.factor_for(row.elements or 0))] if null]
    if not nulls:
        return 0.0
    return (after - before) / (direct.factor_for(max(old.elements or 0, new.elements or 0)) * min(nulls))


def _null(row: Row, factor: float) -> float | None:
    """The effective null of a judged row, also where nothing differs and the ratio is zero."""
    if row.rel_l2 and row.null_ratio:
        return row.rel_l2 / row.null_ratio
    if row.direct_limit is None or "direct" in row.overridden:
        return None
    return row.direct_limit / factor


def _oracle_growth(old: Row, new: Row, tolerance: Tolerance) -> float | None:
    """Growth of the candidate's error against the oracle, over the most that criterion 3 allows in either row.

    Errors are taken relative to the row's values, as rel_l2 is: other weights may give values of another size.
    """
    before, after = _relative_error(old), _relative_error(new)
    if before is None or after is None:
        return None
    own = [error / row.noise_ratio for error, row in ((before, old), (after, new)) if error and row.noise_ratio]
    if not own:
        return None
    factor = tolerance.criteria(new.phase).noise.factor_for(max(old.elements or 0, new.elements or 0))
    return (after - before) / (factor * min(own))


def _relative_error(row: Row) -> float | None:
    error, size = _finite(row.candidate_error), max(_finite(row.reference_rms) or 0.0, row.scale)
    return error / size if error is not None and size > 0 else error


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _severity(change: RowChange) -> tuple[int, float]:
    return -abs(_RANK[change.new_status] - _RANK[change.old_status]), -change.growth


def _lost(old: Report, new: Report) -> tuple[str, ...]:
    """What is not a row and was compared, or exercised, in the older report alone."""
    lost = []
    now = {check.dtype: check.compared for check in new.weights}
    for check in old.weights:
        if now.get(check.dtype, 0) < check.compared:
            lost.append(f"weights ({check.dtype}): {now.get(check.dtype, 0)} compared, {check.compared} before")
    of_rows = {f"{place(row)}: {row.reason}" for row in new.rows if row.status == "missing"}
    known = of_rows | set(old.coverage.missing)
    lost += [text for text in new.coverage.missing if text not in known and not text.startswith("weights (")]
    return tuple(lost)


def _weight_differences(report: Report) -> set[str]:
    """Weights that are not the reference's, and what ranks show that is not as it must be."""
    found = {f"{d.paddle or d.hf} ({d.dtype}): {d.problem}" for check in report.weights for d in check.differences}
    return found | {f"{name} ({check.dtype}): {check.what} of ranks" for check in report.ranks for name in check.wrong}


def _side(report: Report) -> Side:
    failing = report.first_failing
    return Side(
        created=report.created,
        tool_version=report.tool_version,
        dtype=report.dtype,
        verdict=report.verdict,
        first_failing=f"{failing.place}: {failing.detail}" if failing is not None else "",
        coverage=report.coverage,
        content_sha256=report.content_sha256,
    )


def _thresholds(report: Report) -> dict[str, Any]:
    installed: dict[str, Any] = {
        f"{t.dtype} {t.criterion} {t.measure}": t.value if t.applied else f"{t.value:g}, not applied"
        for t in report.thresholds
    }
    own = {
        f"override {o.probe} ({o.dtype}, {o.mode or 'both modes'}) {o.criterion}": f"{o.limit:g}: {o.reason}"
        for o in report.overrides
    }
    return installed | own


def _environment(report: Report) -> dict[str, Any]:
    """Everything beside measurements and thresholds that may explain a change, by path."""
    document = report.model_dump(
        mode="json",
        include={"tool_version", "policy", "execution", "model", "conversion", "inputs", "engine", "environment"},
        exclude={"engine": {"passes": True, "traces": {"__all__": {"file", "content_sha256", "created"}}}},
    )
    return dict(_flat("", document))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if path == "engine.traces":
        value = {trace["side"]: trace for trace in value}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), inner)
    else:
        yield path, value


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Setting, ...]:
    return tuple(
        Setting(name=name, old=old.get(name), new=new.get(name))
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    )
