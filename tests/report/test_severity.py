import math

import pytest

from modernbert_align.report.severity import describe, not_compared, severity


@pytest.fixture
def row(make_report):
    (found,) = [
        row for row in make_report().rows if (row.probe, row.dtype, row.mode) == ("head", "fp32", "accumulated")
    ]
    return found.model_copy(
        update={
            "mean_abs": 2e-6, "contract_limit": 1e-5, "rel_l2": 3e-7, "direct_limit": 1e-6,
            "noise_ratio": 1.2, "noise_limit": 1.5,
        }
    )  # fmt: skip


def test_the_nearest_limit_decides(row):
    assert severity(row) == pytest.approx(0.8)
    assert severity(row.model_copy(update={"noise_ratio": None})) == pytest.approx(0.3)
    assert severity(row.model_copy(update={"mean_abs": 2e-3})) == pytest.approx(200)
    assert severity(row.model_copy(update={"contract_limit": None, "mean_abs": 2e-3})) == pytest.approx(0.8)


def test_a_row_without_any_difference_is_nowhere_near_a_limit(row):
    exact = row.model_copy(update={"mean_abs": 0.0, "rel_l2": 0.0, "noise_ratio": 1.0})
    assert severity(exact) == 0
    assert describe(exact).startswith("end to end: pass, exact\nmean_abs 0 (exact), ")
    assert severity(exact.model_copy(update={"failed": ("noise",), "noise_ratio": 3.0})) == pytest.approx(2)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean_abs": None},
        {"mean_abs": math.nan},
        {"noise_ratio": None, "failed": ("noise",)},
        {"rel_l2": None, "failed": ("direct",)},
    ],
)
def test_what_has_no_number_is_worst(row, changes):
    assert severity(row.model_copy(update=changes)) == math.inf


def test_a_row_without_numbers_counts_as_not_compared_even_if_it_says_pass(row):
    assert not not_compared(row)
    assert not_compared(row.model_copy(update={"status": "missing"}))
    assert not_compared(row.model_copy(update={"mean_abs": None}))
    assert not not_compared(row.model_copy(update={"mean_abs": None, "status": "nonfinite"})), "it fails"


def test_a_row_in_words(row):
    assert describe(row).splitlines() == [
        "end to end: pass, 0.8 of its nearest limit",
        "mean_abs 2.00e-06, limit 1e-05",
        "rel_l2 3.00e-07, limit 1e-06",
        "noise ratio 1.2, limit 1.5",
    ]
    own = row.model_copy(update={"overridden": ("contract", "noise")})
    assert describe(own).splitlines()[1:] == [
        "mean_abs 2.00e-06, limit 1e-05 of the project",
        "rel_l2 3.00e-07, limit 1e-06",
        "noise ratio 1.2, limit 1.5 of the project",
    ]
    missing = row.model_copy(
        update={"status": "shape_mismatch", "failed": ("hygiene",), "reason": "[1] and [2]", "mean_abs": None}
    )
    assert describe(missing) == "end to end: shape mismatch\n[1] and [2]"
