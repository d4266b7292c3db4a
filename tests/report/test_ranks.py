"""What ranks showed is judged, and every format says it."""

import pytest
from junitparser import JUnitXml

from modernbert_align.report.comparison import compare_reports
from modernbert_align.report.html_report import render_html, verdict_sentence
from modernbert_align.report.junit import render_junit
from modernbert_align.report.markdown import render_markdown


def test_ranks_that_agree_pass_and_are_shown(make_report, rank_checks):
    report = make_report(ranks=rank_checks())
    assert report.verdict == "PASS"
    assert report.run == "forward on 2 ranks"
    assert 'id="ranks"' in render_html(report)
    assert "2 ranks: fp32 weights 6 of 6" in render_markdown(report)
    assert "none wrong" in render_markdown(report)


def test_one_process_has_no_ranks_to_show(make_report):
    assert 'id="ranks"' not in render_html(make_report())
    assert "ranks" not in render_markdown(make_report())


def test_ranks_that_disagree_fail_and_every_format_names_what(make_report, rank_checks):
    report = make_report(ranks=rank_checks(wrong=["layers.1.mlp_norm"]))
    assert (report.verdict, report.exit_code) == ("FAIL", 1)
    assert report.first_failing.probe == "layers.1.mlp_norm"
    assert "not the same on all ranks" in report.first_failing.detail
    for text in (render_html(report), render_markdown(report), render_junit(report)):
        assert "layers.1.mlp_norm" in text
    cases = {case.name: case for suite in JUnitXml.fromstring(render_junit(report).encode()) for case in suite}
    assert cases["values fp32"].result[0].type == "ranks"
    assert not cases["values bf16"].result


@pytest.mark.parametrize("compared", [0, 5])
def test_ranks_that_were_not_all_looked_at_are_not_compared(make_report, rank_checks, compared):
    report = make_report(ranks=rank_checks(compared=compared))
    assert (report.verdict, report.exit_code) == ("NOT_COMPARED", 5)
    assert f"values of all ranks (fp32): {compared} of 6 compared" in report.coverage.missing
    assert "not all compared" in render_html(report)


def test_ranks_that_come_to_disagree_are_worse_than_before(make_report, rank_checks):
    before, after = make_report(ranks=rank_checks()), make_report(ranks=rank_checks(wrong=["layers.1"]))
    worse = compare_reports(before, after)
    assert worse.weights_worse == ("layers.1 (fp32): values of ranks",)
    assert worse.exit_code == 1
    assert compare_reports(after, before).exit_code == 0
    assert "1 disagreement between ranks" in verdict_sentence(after)


def test_report_without_any_check_of_its_ranks_is_not_compared(make_report):
    report = make_report(ranks=[])
    assert report.verdict == "NOT_COMPARED"
    assert "nothing was compared" in render_markdown(report)
    assert "no check was made" in render_html(report)
    assert 'type="missing"' in render_junit(report)
