"""The Markdown summary, rendered by a real renderer."""

import re

import pytest
from hostile import HOSTILE
from lxml import html
from markdown_it import MarkdownIt

from modernbert_align.core.cause import Cause
from modernbert_align.core.rows import Record, WeightDifference
from modernbert_align.core.text import one_line
from modernbert_align.core.tolerance import Override
from modernbert_align.report.markdown import LARGEST, code, prose, render_markdown
from modernbert_align.report.terminal import worst_by_kind

RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
ELEMENTS = {"html", "body", "div", "h2", "h3", "p", "ul", "li", "code", "pre", "strong", "details", "summary"}
ELEMENTS |= {"table", "thead", "tbody", "tr", "th", "td"}
PINGS = re.compile(r"[@#$]|https?:|www\.|GH-\d", re.IGNORECASE)


def render(text):
    """The page; nothing of it may be an element, or outside of code a reference, that the report did not write."""
    page = html.fromstring(f"<html><body>{RENDERER.render(text)}</body></html>")
    assert {element.tag for element in page.iter()} <= ELEMENTS
    assert all(set(element.attrib) <= {"style", "class"} for element in page.iter())
    assert not [text for text in outside_code(page) if PINGS.search(text)]
    return page


def outside_code(page):
    for element in page.iter():
        for text, inside in ((element.text, element), (element.tail, element.getparent())):
            if text and not {"code", "pre"} & {inside.tag, *(parent.tag for parent in inside.iterancestors())}:
                yield text


def shown(report):
    return render(render_markdown(report))


def words(element):
    return " ".join(element.text_content().split())


def items(page):
    return [words(item) for item in page.iter("li")]


def test_it_begins_with_the_verdict_and_says_what_was_compared_and_how(make_report):
    page = shown(make_report())
    assert words(page.find(".//h2")) == "✓ PASS: tiny masked_lm bf16 forward"
    assert items(page) == [
        "model tiny, head masked_lm, candidate converted, forward in bf16",
        "policy contract, exit code 0: CI may merge",
        "compared 80 of 80 rows and 12 of 12 weights",
        "fp32: the candidate ran native, the reference native",
        "bf16: the candidate ran float32 kernels, each result rounded (emulated), the reference native",
    ]
    assert page.find(".//pre").text_content() == "$ modernbert-align diff --dtype bf16\n"
    assert "Versions: torch 2.13.0, paddlepaddle 3.3.1; CPU a CPU; report " in words(page)


def test_the_table_has_the_worst_row_of_each_kind(make_report, broken_attention):
    report = make_report(changes=broken_attention)
    rows = [[words(cell) for cell in row] for row in shown(report).iter("tr")]
    assert rows[0] == ["dtype", "mode", "worst probe", "mean_abs", "limit", "max_abs", "null x", "status"]
    worst = worst_by_kind(report)
    assert [row[:3] for row in rows[1:]] == [[row.dtype, row.mode, row.probe] for row in worst]
    assert ["fp32", "isolated", "layers.1.attn", "4.0e-03", "1.0e-05", "3.0e-01", "1.49e+05", "fail"] in rows


def test_other_phases_have_losses_and_no_contract(make_report):
    report = make_report()
    rows = tuple(row.model_copy(update={"phase": "backward", "loss": "head"}) for row in report.rows)
    page = shown(report.model_copy(update={"rows": rows, "phase": "backward"}))
    header, first, *_ = [[words(cell) for cell in row] for row in page.iter("tr")]
    assert header == ["dtype", "loss", "mode", "worst probe", "rel_l2", "limit", "null x", "status"]
    assert first[:4] == ["fp32", "head", "isolated", "layers.0.attn_norm"] or first[1] == "head"


def test_a_failure_says_where_why_and_what_to_do(make_report, broken_attention):
    cause = Cause(probe="layers.1.attn", dtype="fp32", level="partial", statement="the mask is swapped", ratio=0.1)
    page = shown(make_report(changes=broken_attention, cause=cause, hints=("check `layers.1.attn` first",)))
    assert words(page.find(".//h2")).startswith("✗ FAIL: ")
    paragraphs = [words(p) for p in page.iter("p")]
    assert any(p.startswith("First failing: layers.1.attn (fp32): mean_abs 4.0000e-03 exceeds") for p in paragraphs)
    assert "Possible cause: the mask is swapped" in paragraphs
    assert "hint: check layers.1.attn first" in items(page)
    assert "Rows that are not a pass (14)" in [words(title) for title in page.iter("h3")]
    assert words(page.find(".//summary")) == "4 more"
    assert len([item for item in items(page) if "fail: mean_abs" in item]) == 14


def test_gaps_weights_and_own_limits_are_listed(make_report):
    own = Override(probe="layers.*.mlp", dtype="bf16", mode="isolated", criterion="direct", limit=4.0, reason="kernels")
    wrong = WeightDifference(
        paddle="decoder.weight", hf="decoder.w", probe="logits", dtype="fp32", problem="values", differing=3, elements=9
    )
    page = shown(make_report(needs={"padding": False}, overrides=[own], differences=[wrong]))
    assert "not compared: the inputs do not exercise: padding" in items(page)
    assert "own limit: layers.*.mlp (bf16, isolated): direct at most 4, 3 rows: kernels" in items(page)
    assert "decoder.weight (fp32, reference decoder.w): values, 3 of 9 elements" in items(page)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup_a_mention_or_a_reference(make_report, text):
    record = Record(probe=text, dtype="fp32", mode="isolated", observation="extra", reason=text)
    wrong = WeightDifference(paddle=text, hf=text, probe=text, dtype="fp32", problem="values", looks=text)
    report = make_report(extra=[record], differences=[wrong], hints=(text,) * 30)
    update = {
        "model": report.model.model_copy(update={"name": text, "head": text, "candidate": text}),
        "environment": report.environment.model_copy(update={"cpu": text, "versions": {text: text}}),
        "coverage": report.coverage.model_copy(update={"missing": (text,) * 30}),
        "cause": Cause(probe=text, dtype="fp32", level="partial", statement=text),
        "command": text,
    }
    hostile = report.model_copy(update=update)
    page = shown(hostile)
    assert render_markdown(hostile).count("<script") == ("<script" in text), "in the fence alone, which has no escapes"
    assert len(list(page.iter("h2"))) == 1
    assert len(list(page.iter("pre"))) == 1
    plain, rows = shown(make_report()), list(page.iter("tr"))
    assert {len(row) for row in rows} == {8}, "no cell is cut in two"
    assert len(rows) == len(list(plain.iter("tr"))) + 1
    assert page.find(".//pre").text_content() == f"$ {one_line(text)}\n"
    (cell,) = [row[2] for row in rows if words(row[7]) == "extra"]
    assert words(cell) == " ".join(one_line(text).split())
    assert f"hint: {' '.join(one_line(text).replace('`one`', 'one').split())}" in items(page) or "``" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_code_shows_the_text_itself(text):
    page = render(f"| a |\n| --- |\n| {code(text)} |\n")
    (cell,) = page.iter("td")
    (span,) = cell
    assert " ".join(span.text_content().split()) == " ".join(one_line(text).split())


def test_prose_keeps_words_and_puts_the_rest_into_code():
    text = "mean_abs 4.0000e-03 exceeds the contract's 1e-05, see `a.b` (and @me): **no**"
    assert prose(text) == "`mean_abs` 4.0000e-03 exceeds the contract's 1e-05, see `a.b` (and `@me`): `**no**`"
    assert code("") == "-"


def test_a_large_report_fits_and_says_how_many_rows_it_left_out(make_report):
    report = make_report()
    row = report.rows[0].model_copy(update={"status": "extra", "failed": ("hygiene",), "reason": "new " * 60})
    many = tuple(row.model_copy(update={"probe": f"module_{n}.{'x' * 150}"}) for n in range(5000))
    text = render_markdown(report.model_copy(update={"rows": many, "verdict": "FAIL", "exit_code": 1}))
    assert LARGEST * 0.9 < len(text.encode()) < LARGEST
    page = render(text)
    listed = [item for item in items(page) if " extra: new" in item]
    kinds = len(list(page.iter("tr"))) - 1
    left_rows, left_kinds = map(int, re.findall(r"^(\d+) more were left out", text, re.MULTILINE))
    assert len(listed) + left_rows == kinds + left_kinds == 5000
    assert words(page.find(".//summary")) == f"{len(listed) - 10} more"
    assert "### Reproduce" in text


@pytest.mark.parametrize("largest", [0, 100, 300, 1000, 2000, 3000, 5000, 8000])
def test_it_never_takes_more_room_than_there_is(make_report, broken_attention, largest):
    text = render_markdown(make_report(changes=broken_attention), largest)
    assert len(text.encode()) <= largest
    assert not text or text.startswith("## ✗ FAIL: ")


def test_endless_names_leave_room_for_the_verdict(make_report):
    long = "`|" * 10**4
    records = [
        Record(probe=f"{n}{long}", dtype="fp32", mode="isolated", observation="extra", reason=long) for n in range(200)
    ]
    report = make_report(extra=records, hints=(long,) * 100, command=long)
    report = report.model_copy(update={"model": report.model.model_copy(update={"name": long})})
    text = render_markdown(report)
    assert len(text.encode()) < LARGEST
    assert text.startswith("## ✗ FAIL: ")
    assert "### Worst row per kind" in text
    render(text)
