"""The report in a terminal."""

import io

import pytest
from rich.console import Console

from modernbert_align.core.cause import Cause
from modernbert_align.report.terminal import print_report


def shown(report):
    out = io.StringIO()
    print_report(report, Console(file=out, width=80))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("level", "ratio", "line"),
    [
        ("explained", 2e-6, "cause: the mask is swapped (explains all but 2.0e-06 of the difference)"),
        ("explained", None, "cause: the mask is swapped"),
        ("partial", 0.05, "possible cause: the mask is swapped"),
        ("unexplained", 0.9, "cause not known: the mask is swapped"),
        ("structural", None, None),
    ],
)
def test_the_cause_is_one_line_that_says_how_sure_it_is(make_report, broken_attention, level, ratio, line):
    cause = Cause(probe="layers.1.attn", dtype="fp32", level=level, statement="the mask is swapped", ratio=ratio)
    lines = shown(make_report(changes=broken_attention, cause=cause))
    found = [text for text in lines if "the mask is swapped" in text]
    assert found == ([line] if line else [])
