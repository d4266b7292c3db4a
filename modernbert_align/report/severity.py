"""How close a row is to its limits: what the worst rows are sorted by, and what charts colour and say."""

import math

from modernbert_align.core.rows import Row
from modernbert_align.report.svg import MODE_NAME, number

FIRST = {"explained": "first over the contract", "missing": "first gap"}  # any other status fails


def severity(row: Row) -> float:
    """How close a row is to its nearest limit: 1 is at it, more is beyond; infinite for what was not measured.

    A row without any difference is 0, although its noise ratio is 1: it cannot get closer to the reference.
    """
    if row.mean_abs is None or not math.isfinite(row.mean_abs):
        return math.inf
    if row.mean_abs == 0 and not row.failed:
        return 0.0
    of_contract = row.mean_abs / row.contract_limit if row.contract_limit else 0.0
    of_direct = row.rel_l2 / row.direct_limit if row.rel_l2 is not None and row.direct_limit else 0.0
    of_noise = row.noise_ratio / row.noise_limit if row.noise_ratio is not None and row.noise_limit else 0.0
    if ("noise" in row.failed and row.noise_ratio is None) or ("direct" in row.failed and row.rel_l2 is None):
        return math.inf  # an error where the reference has none
    return max(of_contract, of_direct, of_noise)


def not_compared(row: Row) -> bool:
    """Whether a row must not look good for want of anything that looked bad."""
    return row.status == "missing" or (row.status == "pass" and not math.isfinite(severity(row)))


def describe(row: Row) -> str:
    """A row's status and its values with their limits, a line each; for what can be pointed at."""
    lines = [f"{MODE_NAME[row.mode]}: {row.status.replace('_', ' ')}"]
    share = severity(row)
    if share == 0:
        lines[0] += ", exact"
    elif math.isfinite(share):
        lines[0] += f", {share:.2g} {'of' if share <= 1 else 'times'} its nearest limit"
    if "hygiene" in row.failed:
        return "\n".join((*lines, row.reason))
    contract, direct, noise = (
        " of the project" if criterion in row.overridden else "" for criterion in ("contract", "direct", "noise")
    )
    for name, value, limit, whose in (
        ("mean_abs", row.mean_abs, row.contract_limit, contract),
        ("rel_l2", row.rel_l2, row.direct_limit, direct),
    ):
        lines.append(f"{name} {number(value)}" + (f", limit {limit:.2g}{whose}" if limit is not None else ""))
    if row.noise_ratio is not None:
        lines.append(f"noise ratio {row.noise_ratio:.3g}, limit {row.noise_limit:g}{noise}")
    elif "noise" in row.failed:
        lines.append("noise ratio without end: the reference is exact")
    return "\n".join(lines)
