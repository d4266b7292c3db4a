"""The verdict: every criterion ANDed, nothing rescued, nothing unseen counted as passed.

1 hygiene   every probe seen once on each side, shapes and dtypes equal, values finite, weights equal bit for bit
2 contract  mean_abs within the contract, where it applies
3 noise     error against a float64 oracle within a multiple of the reference's own
4 direct    rel_l2 within a multiple of what the reference differs from itself

Judging needs records and installed tolerances only, so a saved report can be judged again.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import (
    MODES,
    Dtype,
    Loss,
    Mode,
    Phase,
    RankCheck,
    RankFact,
    Record,
    Row,
    Status,
    WeightCheck,
)
from modernbert_align.core.tolerance import AppliedOverride, Override, Overrides, Tolerance
from modernbert_align.core.training import MOMENTS
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, EXIT_NOT_COMPARED, ReportError

Policy = Literal["contract", "noise-aware"]
Key = tuple[str, Dtype, Mode, Phase, Loss | None]  # what makes a row itself; the first is the probe's name
Verdict = Literal["PASS", "EXPLAINED", "FAIL", "NOT_COMPARED"]
POLICIES: tuple[Policy, ...] = ("contract", "noise-aware")
# What a comparison in a dtype runs: a bf16 pass never covers an fp32 failure.
RUNS: Mapping[str, tuple[Dtype, ...]] = {"fp32": ("fp32",), "bf16": ("fp32", "bf16")}

_SEEN_BUT_WRONG: dict[str, Status] = {
    "extra": "extra",
    "shape_mismatch": "shape_mismatch",
    "dtype_mismatch": "dtype_mismatch",
    "nonfinite": "nonfinite",
}


class Failing(BaseModel):
    """The first place to look at."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    probe: str
    dtype: Dtype
    mode: Mode | None
    loss: Loss | None = None
    status: str
    detail: str

    @property
    def place(self) -> str:
        """Where, in words."""
        return f"{self.probe} ({self.dtype}, {self.loss} loss)" if self.loss else f"{self.probe} ({self.dtype})"


class Coverage(BaseModel):
    """How much of what had to be looked at was looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    expected: int
    compared: int
    weights_expected: int
    weights_compared: int
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What must have been compared.

    Attributes:
        probes: Every probe of the model, in execution order.
        weights: Number of weights of the model.
        fixture: Name of the contract fixture, or None for any other weights.
        phase: What was run; each has probes of its own.
        losses: What must have been differentiated; (None,) in the forward phase.
        needs: What the inputs must have exercised: feature -> whether they did.
        ranks: What the ranks of a divided candidate must have shown for every dtype: what -> how many; empty if it is
            not divided.
    """

    probes: Sequence[Probe]
    dtypes: tuple[Dtype, ...]
    weights: int
    fixture: str | None
    needs: Mapping[str, bool]
    phase: Phase = "forward"
    losses: tuple[Loss | None, ...] = (None,)
    ranks: Mapping[RankFact, int] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Probe, Key]]:
        """Every row there must be, in order."""
        for dtype in self.dtypes:
            for loss in self.losses:
                for mode in MODES:
                    for probe in self.probes:
                        yield probe, (probe.name, dtype, mode, self.phase, loss)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The outcome of `judge`.

    Attributes:
        overrides: The project's own limits, with the number of rows each decided about.
    """

    rows: tuple[Row, ...]
    verdict: Verdict
    exit_code: int
    coverage: Coverage
    first_failing: Failing | None
    overrides: tuple[AppliedOverride, ...] = ()


def default_policy(fixture: str | None) -> Policy:
    """Contract for contract fixtures; for any other weights rounding may exceed the contract in torch too."""
    return "contract" if fixture is not None else "noise-aware"


def judge(
    records: Sequence[Record],
    weights: Sequence[WeightCheck],
    expectation: Expectation,
    tolerances: Mapping[Dtype, Tolerance],
    policy: Policy,
    overrides: Sequence[Override] = (),
    ranks: Sequence[RankCheck] = (),
) -> Judgement:
    """Judge a comparison.

    Args:
        records: What an engine saw; judged fields of rows are ignored and made anew.
        weights: One check per dtype.
        overrides: Limits in place of the tolerances'. Nothing else can be overridden: not hygiene, not coverage.
        ranks: What the ranks of a divided candidate showed.

    Raises:
        ReportError: Two records claim to be the same probe, dtype and mode.
        UsageError: Two overrides contradict each other.
    """
    own = Overrides(overrides)
    found = _index(records)
    expected = {key: probe for probe, key in expectation.rows()}
    rows = [
        _judge_row(found.get(key), probe, key, tolerances[key[1]], expectation.fixture, own)
        for key, probe in expected.items()
    ]
    rows += [
        _row(
            record.model_copy(update={"reason": record.reason or "nothing of this name was expected"}),
            status="extra",
            contract=False,
            failed=("hygiene",),
        )
        for key, record in found.items()
        if key not in expected
    ]
    rows = _explain_only_with_clean_parts(_nothing_against_nothing(rows))
    coverage = _coverage(rows, weights, ranks, expectation)
    verdict = _verdict(rows, weights, ranks, coverage)
    return Judgement(
        rows=tuple(rows),
        verdict=verdict,
        exit_code=exit_code(verdict, policy),
        coverage=coverage,
        first_failing=_first_failing(rows, weights, ranks, expectation, coverage),
        overrides=own.applied,
    )


def exit_code(verdict: Verdict, policy: Policy) -> int:
    """The process exit code of a verdict."""
    if verdict == "FAIL" or (verdict == "EXPLAINED" and policy == "contract"):
        return EXIT_MISALIGNED
    return EXIT_NOT_COMPARED if verdict == "NOT_COMPARED" else EXIT_ALIGNED


def _index(records: Sequence[Record]) -> dict[Key, Record]:
    keys: list[Key] = [(r.probe, r.dtype, r.mode, r.phase, r.loss) for r in records]
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        record = next(r for r, key in zip(records, keys, strict=True) if key == twice[0])
        raise ReportError(f"two rows claim to be {place(record)}")
    return dict(zip(keys, records, strict=True))


def place(record: Record) -> str:
    """Where a row is: `layers.3.mlp (fp32, isolated)`, with the loss where one was differentiated."""
    loss = f", {record.loss} loss" if record.loss else ""
    return f"{record.probe} ({record.dtype}{loss}, {record.mode})"


def _row(record: Record, **judged: Any) -> Row:
    measured = {name: getattr(record, name) for name in Record.model_fields}
    return Row(**measured, **judged)


def _judge_row(
    record: Record | None, probe: Probe, key: Key, tolerance: Tolerance, fixture: str | None, overrides: Overrides
) -> Row:
    name, dtype, mode, phase, loss = key
    scope, criteria = tolerance.contract.scope(mode), tolerance.criteria(phase)
    contract = phase == "forward" and scope.covers(probe.pattern) and (fixture is None or fixture in scope.fixtures)
    installed = limit = tolerance.contract.mean_abs if contract else None
    own_limits = overrides.limits(name, dtype, mode, phase)
    if "contract" in own_limits:
        contract, limit = True, own_limits["contract"]
    if record is None:
        record = Record(
            probe=name,
            dtype=dtype,
            mode=mode,
            phase=phase,
            loss=loss,
            observation="missing",
            reason="there is no record of this probe",
        )
    if record.observation in _SEEN_BUT_WRONG:
        status = _SEEN_BUT_WRONG[record.observation]
        return _row(record, status=status, contract=contract, contract_limit=limit, failed=("hygiene",))
    if record.observation != "compared":
        return _row(record, status="missing", contract=contract, contract_limit=limit, failed=("hygiene",))
    if (
        record.mean_abs is None
        or not record.elements
        or record.candidate_error is None
        or record.reference_error is None
    ):
        measured_at_all = record.mean_abs is not None and bool(record.elements)
        reason = "there is no oracle value" if measured_at_all else "nothing was measured"
        unmeasured = record.model_copy(update={"observation": "missing", "reason": reason})
        return _row(unmeasured, status="missing", contract=contract, contract_limit=limit, failed=("hygiene",))
    measured = (
        record.mean_abs,
        record.max_abs,
        record.rel_l2,
        record.reference_rms,
        record.null_rel_l2,
        record.candidate_error,
        record.reference_error,
        record.scale,
    )
    if any(number is not None and not math.isfinite(number) for number in measured):
        unusable = record.model_copy(update={"reason": "a measured number is not finite"})
        return _row(unusable, status="nonfinite", contract=contract, contract_limit=limit, failed=("hygiene",))
    null = max(record.null_rel_l2 or 0.0, tolerance.floor(probe))
    failed: list[str] = []
    waived: list[str] = []
    if limit is not None and not record.mean_abs <= limit:
        failed.append("contract")
    elif installed is not None and not record.mean_abs <= installed:
        waived.append("contract")
    noise, noise_limit = None, own_limits.get("noise", criteria.noise.factor_for(record.elements))
    size = max(record.reference_rms or 0.0, probe.scale, record.scale)
    least = criteria.noise.floor * tolerance.roundoff(probe) * size
    if record.candidate_error > least:
        own = max(record.reference_error, least)  # the reference may be exact
        if record.elements <= criteria.noise.small_elements:  # or right by luck
            own = max(own, criteria.noise.small_floor * tolerance.roundoff(probe) * size)
            own = max(own, (record.null_rel_l2 or 0.0) * size)
        noise = record.candidate_error / own if own else None
        if noise is None or not noise <= noise_limit:
            failed.append("noise")
        elif not noise <= criteria.noise.factor_for(record.elements):
            waived.append("noise")
    ratio = None if record.rel_l2 is None else record.rel_l2 / null
    factor = own_limits.get("direct", criteria.direct.factor_for(record.elements))
    if ratio is None or not ratio <= factor:
        failed.append("direct")
    elif not ratio <= criteria.direct.factor_for(record.elements):
        waived.append("direct")
    return _row(
        record,
        status="pass" if not failed else "explained" if failed == ["contract"] else "fail",
        contract=contract,
        contract_limit=limit,
        direct_limit=factor * null,
        null_ratio=ratio,
        noise_ratio=noise,
        noise_limit=noise_limit,
        failed=tuple(failed),
        overridden=tuple(own_limits),
        waived=tuple(waived),
    )


def _nothing_against_nothing(rows: list[Row]) -> list[Row]:
    """Gradients that are zero on both sides show nothing, since nothing reached them: such rows are not compared.

    A gradient that is a sum which cancels may be zero (`scale` is what its terms are); a moment may be, where others
    of the same run are not.
    """

    def zero(row: Row) -> bool:
        return row.status == "pass" and not row.max_abs and not row.reference_rms

    def moment(row: Row) -> bool:
        return row.phase == "step" and row.probe.rpartition(".")[2] in MOMENTS

    alive = {(row.dtype, row.mode, row.loss) for row in rows if moment(row) and not zero(row)}
    unseen = {"status": "missing", "observation": "missing", "reason": "nothing reached it: zero on both sides"}
    return [
        row.model_copy(update=unseen)
        if zero(row)
        and (
            (row.phase == "backward" and row.probe != "loss" and not row.scale)
            or (moment(row) and (row.dtype, row.mode, row.loss) not in alive)
        )
        else row
        for row in rows
    ]


def _explain_only_with_clean_parts(rows: list[Row]) -> list[Row]:
    """Rounding explains an accumulated overrun only if no part of the model is wrong by itself."""
    broken = {row.dtype for row in rows if row.mode == "isolated" and row.status not in ("pass", "explained")}
    return [
        row.model_copy(update={"status": "fail"})
        if row.status == "explained" and row.mode == "accumulated" and row.dtype in broken
        else row
        for row in rows
    ]


def _coverage(
    rows: Sequence[Row], weights: Sequence[WeightCheck], ranks: Sequence[RankCheck], expectation: Expectation
) -> Coverage:
    expected = sum(1 for _ in expectation.rows())
    missing = [f"{place(row)}: {row.reason}" for row in rows if row.status == "missing"]
    missing += [f"the inputs do not exercise: {feature}" for feature, done in expectation.needs.items() if not done]
    by_dtype = {check.dtype: check for check in weights}
    if len(by_dtype) != len(weights):
        raise ReportError("two weight checks claim the same dtype")
    compared = 0
    for dtype in expectation.dtypes:
        check = by_dtype.get(dtype)
        compared += check.compared if check is not None else 0
        if check is None or check.compared < expectation.weights or check.expected != expectation.weights:
            missing.append(f"weights ({dtype}): {check.compared if check else 0} of {expectation.weights} compared")
    checks = {(check.dtype, check.what): check for check in ranks}
    if len(checks) != len(ranks):
        raise ReportError("two rank checks claim the same dtype")
    for dtype in expectation.dtypes:
        for what, count in expectation.ranks.items():
            shown = checks.get((dtype, what))
            if shown is None or shown.compared < count or shown.expected != count:
                missing.append(f"{what} of all ranks ({dtype}): {shown.compared if shown else 0} of {count} compared")
    return Coverage(
        expected=expected,
        compared=sum(row.status not in ("missing", "extra") for row in rows),
        weights_expected=expectation.weights * len(expectation.dtypes),
        weights_compared=compared,
        missing=tuple(missing),
    )


def _verdict(
    rows: Sequence[Row], weights: Sequence[WeightCheck], ranks: Sequence[RankCheck], coverage: Coverage
) -> Verdict:
    statuses = {row.status for row in rows}
    if statuses - {"pass", "explained", "missing"} or any(check.differences for check in weights):
        return "FAIL"
    if any(check.wrong for check in ranks):
        return "FAIL"
    if coverage.missing or not rows or coverage.compared != coverage.expected:
        return "NOT_COMPARED"
    return "EXPLAINED" if "explained" in statuses else "PASS"


def _first_failing(
    rows: Sequence[Row],
    weights: Sequence[WeightCheck],
    ranks: Sequence[RankCheck],
    expectation: Expectation,
    coverage: Coverage,
) -> Failing | None:
    """Where the error enters: the earliest probe wrong by itself; failing that, the earliest wrong end to end."""
    order = {probe.name: n for n, probe in enumerate(expectation.probes)}
    last = len(order)
    dtypes = (*expectation.dtypes, *sorted({row.dtype for row in rows} - set(expectation.dtypes)))
    bad = [row for row in rows if row.status != "pass"]
    failed = [row for row in bad if row.status not in ("explained", "missing")]
    differing = [
        Failing(
            probe=d.probe, dtype=d.dtype, mode=None, status="weights", detail=f"`{d.paddle}`: {d.problem} {d.looks}"
        )
        for check in weights
        for d in check.differences
    ]
    differing += [
        Failing(probe=name, dtype=check.dtype, mode=None, status="ranks", detail=rank_words(check.what, name))
        for check in ranks
        for name in check.wrong
    ]
    own = [_failing(row) for row in failed if row.mode == "isolated"] + differing
    for groups in (
        (own, [_failing(row) for row in failed]),
        ([_failing(row) for row in bad if row.status == "missing"],),
        ([_failing(row) for row in bad],),
    ):
        for dtype in dtypes:
            for group in groups:
                here = [failing for failing in group if failing.dtype == dtype]
                if here:
                    return min(here, key=lambda f: order.get(f.probe, last))
    if coverage.missing:
        return Failing(probe="", dtype=expectation.dtypes[0], mode=None, status="missing", detail=coverage.missing[0])
    return None


def rank_words(what: RankFact, name: str) -> str:
    """What is wrong with something that ranks showed, in one sentence without a period."""
    if what == "randomness":
        return f"`{name}` drops the same values on ranks that have different ones, or different values of the same"
    return f"`{name}` is not the same on all ranks"


def _failing(row: Row) -> Failing:
    return Failing(
        probe=row.probe, dtype=row.dtype, mode=row.mode, loss=row.loss, status=row.status, detail=explain(row)
    )


def _limit(limit: float | None) -> str:
    """`1e-05`, or all digits where there are more."""
    return "nothing" if limit is None else f"{limit:.0e}" if float(f"{limit:.0e}") == limit else f"{limit:g}"


def only_by_own_limits(rows: Sequence[Row]) -> str:
    """How many rows pass only because of the project's own limits, in words; empty if none does."""
    waived = sum(bool(row.waived) and row.status == "pass" for row in rows)
    return f"{waived} of {len(rows)} rows only by this project's own limits" if waived else ""


def explain(row: Row) -> str:
    """Why a row has its status, in one sentence without a period."""
    if row.status == "pass":
        if row.waived:
            return f"beyond the installed limit of {' and '.join(row.waived)}, within this project's own"
        own = f", with this project's own limit of {' and '.join(row.overridden)}" if row.overridden else ""
        return f"within every criterion{own}"
    if "hygiene" in row.failed:
        return row.reason
    parts = []
    if "contract" in row.failed:
        whose = "this project's own" if "contract" in row.overridden else "the contract's"
        parts.append(f"mean_abs {row.mean_abs:.4e} exceeds {whose} {_limit(row.contract_limit)}")
    if "noise" in row.failed:
        shown = "without end" if row.noise_ratio is None else f"{row.noise_ratio:.2f} times"
        parts.append(f"its error against the float64 oracle is the reference's {shown}, more than {row.noise_limit:g}")
    if "direct" in row.failed:
        shown = "cannot be computed" if row.rel_l2 is None else f"{row.rel_l2:.4e}"
        parts.append(f"rel_l2 {shown} exceeds {row.direct_limit:.4e}, the most rounding explains")
    if row.status == "explained":
        parts.append("but is within what rounding explains")
    return ", ".join(parts)
