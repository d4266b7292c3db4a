"""How close a row is to its limits; what the worst rows are sorted by and the heat map is coloured by."""

import math

from modernbert_align.core.rows import Row


def severity(row: Row) -> float:
    """How close a row is to its nearest limit: 1 is at it, more is beyond; infinite for what was not measured."""
    if row.mean_abs is None or not math.isfinite(row.mean_abs):
        return math.inf
    of_contract = row.mean_abs / row.contract_limit if row.contract_limit else 0.0
    of_direct = row.rel_l2 / row.direct_limit if row.rel_l2 is not None and row.direct_limit else 0.0
    of_noise = row.noise_ratio / row.noise_limit if row.noise_ratio is not None and row.noise_limit else 0.0
    if ("noise" in row.failed and row.noise_ratio is None) or ("direct" in row.failed and row.rel_l2 is None):
        return math.inf  # an error where the reference has none
    return max(of_contract, of_direct, of_noise)
