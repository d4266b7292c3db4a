"""The kill matrix: its page, and which selftest speaks for a report."""

import json

import pytest

from modernbert_align.core.outcomes import Outcome
from modernbert_align.report.formats import write_formats
from modernbert_align.report.html_report import render_html
from modernbert_align.report.selftest_report import SelftestReport, find_selftest, render_selftest, write_selftest


def outcome(name, dtype, **fields):
    values = {
        "head": "masked_lm", "phase": "forward", "must_die": True, "equivalent": False, "killed": True,
        "killed_by": ("noise", "direct"), "seen": {"isolated": ("noise", "direct")}, "verdict": "FAIL",
        "first_probe": "layers.0.attn", "expected_probe": "layers.0.attn", "effect": 2000.0,
        "cause_level": "explained", "cause_names": ("masks swapped",), "expected_cause": "masks swapped",
    }  # fmt: skip
    return Outcome(name=name, dtype=dtype, **(values | fields))


@pytest.fixture
def make_selftest(make_report):
    def make(**fields):
        report = make_report()
        values = {
            "tool_version": report.tool_version, "created": "2026-01-02T03:00:00+00:00", "exit_code": 0,
            "model": "tiny-sensitive", "dtype": "bf16", "heads": ("masked_lm",), "phases": ("forward",), "seeds": 1,
            "table": report.model.table, "table_sha256": report.model.table_sha256,
            "faults": (
                outcome("masks-swapped", "fp32"),
                outcome("masks-swapped", "bf16", killed=False, must_die=False, killed_by=(), seen={}),
                outcome("bf16-only", "bf16"),
            ),
            "alarms": (), "false_alarms": 0, "runs": 4, "survivors": (), "environment": report.environment,
            "command": "modernbert-align selftest --dtype bf16",
        }  # fmt: skip
        return SelftestReport.model_validate(values | fields).sealed()

    return make


def section(text):
    return text[text.index('<section id="selftest">') :].partition("</section>")[0]


def test_without_a_selftest_the_page_says_so_and_how_to_make_one(make_report):
    told = section(render_html(make_report()))
    assert "No selftest lies beside this report" in told
    assert "modernbert-align selftest --dtype bf16 --phase forward" in told
    assert "<table" not in told


def test_a_selftest_is_shown_with_every_fault_in_both_precisions(make_report, make_selftest):
    selftest = make_selftest()
    told = section(render_html(make_report(), selftest))
    assert f'<p class="good">✓ {selftest.summary}.' in told
    assert "<details>" in told
    assert told.count('<th scope="row">') == 2
    assert "not a fault in fp32" in told
    assert "within rounding" in told
    assert "No selftest lies" not in told


def test_a_selftest_that_missed_a_fault_is_not_shown_as_good(make_report, make_selftest):
    survivor = outcome("survivor", "fp32", killed=False, killed_by=(), seen={})
    told = section(render_html(make_report(), make_selftest(exit_code=1, faults=(survivor,), survivors=("survivor",))))
    assert '<p class="bad">✗' in told
    assert '<td class="bad">SURVIVED' in told
    assert 'class="good"' not in told


def test_the_newest_selftest_that_speaks_for_the_report_is_found(make_report, make_selftest, tmp_path):
    old, new = make_selftest(), make_selftest(created="2026-01-03T03:00:00+00:00", model="tiny-stress")
    for selftest in (new, old):
        write_selftest(selftest, tmp_path)
    found = find_selftest(make_report(), tmp_path)
    assert found.report == new
    assert found.notes == ()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_version": "0.0.9"}, "was made with another version, 0.0.9"),
        ({"table_sha256": "e" * 64}, "was made with another name table"),
        ({"phases": ("backward", "step")}, "did not test the forward phase"),
        ({"dtype": "fp32"}, "did not test bf16"),
    ],
)
def test_a_selftest_of_something_else_is_left_out_and_said(make_report, make_selftest, tmp_path, fields, words):
    selftest = make_selftest(**fields)
    write_selftest(selftest, tmp_path)
    name = f"selftest-tiny-sensitive-{selftest.dtype}.json"
    found = find_selftest(make_report(), tmp_path)
    assert found.report is None
    assert found.notes == (f"{name} {words}.",)
    told = section(render_html(make_report(), found.report, found.notes))
    assert f"{name} {words}." in told
    assert "No selftest lies beside this report" not in told
    assert "No selftest that speaks for this report" in told


def test_a_selftest_of_both_precisions_speaks_for_a_report_of_one(make_report, make_selftest, tmp_path):
    write_selftest(make_selftest(), tmp_path)
    assert find_selftest(make_report(dtype="fp32"), tmp_path).report is not None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 1}', "\x00"])
def test_what_is_no_selftest_is_left_out_and_said(make_report, tmp_path, text):
    (tmp_path / "selftest-x.json").write_text(text)
    found = find_selftest(make_report(), tmp_path)
    assert (found.report, found.notes) == (None, ("selftest-x.json is not a selftest report that this version reads.",))


def test_an_edited_selftest_is_left_out_and_said(make_report, make_selftest, tmp_path):
    path, _ = write_selftest(make_selftest(), tmp_path)
    document = json.loads(path.read_text())
    document["runs"] = 400
    path.write_text(json.dumps(document))
    found = find_selftest(make_report(), tmp_path)
    assert (found.report, found.notes) == (None, (f"{path.name} was changed after it was written.",))


def test_the_page_that_is_written_shows_the_selftest_beside_it(make_report, make_selftest, tmp_path):
    selftest, elsewhere = make_selftest(), tmp_path / "elsewhere"
    write_selftest(selftest, tmp_path)
    for folder, beside in ((tmp_path, None), (elsewhere, tmp_path)):
        (page,) = write_formats(make_report(), ("html",), folder, "page", beside=beside)
        assert selftest.summary in section(page.read_text(encoding="utf-8"))
    (page,) = write_formats(make_report(), ("html",), elsewhere, "alone")
    assert "No selftest lies beside this report" in section(page.read_text(encoding="utf-8"))


def test_a_folder_that_is_not_there_has_no_selftest(make_report, tmp_path):
    assert find_selftest(make_report(), tmp_path / "none").report is None


def test_the_page_says_what_its_columns_mean(make_selftest):
    page = render_selftest(make_selftest())
    for anchor in ("term-fault", "term-noise-ratio", "term-outcome"):
        assert f'href="#{anchor}"' in page
        assert f'id="{anchor}"' in page
