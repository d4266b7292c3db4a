"""Annotations and the job summary, read as the runner reads them."""

import re

import pytest
from hostile import HOSTILE
from hypothesis import given
from hypothesis import strategies as st

from modernbert_align.core.cause import Cause
from modernbert_align.core.rows import Record
from modernbert_align.core.text import one_line
from modernbert_align.core.tolerance import Override
from modernbert_align.errors import UsageError
from modernbert_align.report.github import Annotation, add_to_summary, annotations, render_github
from modernbert_align.report.markdown import LARGEST, render_markdown

OVER = {"mean_abs": 2e-5}  # over the contract, within what rounding explains


def lines_of(log):
    """As the runner splits what a step prints."""
    return re.split(r"\r\n|\r|\n", log)


def unescape(text, *more):
    for token, escaped in (*more, ("\r", "%0D"), ("\n", "%0A"), ("%", "%25")):
        text = text.replace(escaped, token)
    return text


def parse(line):
    """A command as (name, properties, message), or None.

    Source: actions/runner, ActionCommand.TryParseV2 and its mappings; GitHub documents them as workflow commands.
    """
    line = line.lstrip()
    head, separator, data = line[2:].partition("::")
    if not line.startswith("::") or not separator:
        return None
    name, _, listed = head.partition(" ")
    pairs = (pair.split("=", 1) for pair in listed.strip().split(",") if pair)
    properties = {pair[0]: unescape(pair[1], (":", "%3A"), (",", "%2C")) for pair in pairs if len(pair) == 2}
    return name, properties, unescape(data)


def commands(log):
    *lines, last = lines_of(log)
    assert last == ""
    return [parse(line) for line in lines]


def test_a_failure_is_the_verdict_and_the_worst_ten_rows(make_report, broken_attention):
    cause = Cause(probe="layers.1.attn", dtype="fp32", level="explained", statement="the mask is swapped", ratio=None)
    report = make_report(changes=broken_attention, cause=cause, hints=("look at the mask",))
    verdict, *rows = commands(render_github(report))
    assert verdict[:2] == ("error", {"title": "FAIL: tiny masked_lm bf16 forward"})
    sentence, first, why, hint, more = verdict[2].split("\n")
    assert sentence.startswith("The Paddle model does not compute")
    assert first.startswith("first failing: layers.1.attn (fp32): mean_abs 4.0000e-03 exceeds")
    assert (why, hint) == ("cause: the mask is swapped", "hint: look at the mask")
    assert more == "4 more rows are not a pass, see the report"
    assert len(rows) == 10
    assert {row[0] for row in rows} == {"error"}
    assert rows[0][1] == {"title": "layers.1.attn (fp32, isolated)"}
    assert rows[0][2].startswith("fail: mean_abs 4.0000e-03 exceeds the contract's 1e-05, its error")


def test_what_was_not_compared_is_an_error(make_report):
    verdict, row = commands(render_github(make_report(changes={("logits", "fp32", "isolated"): None})))
    assert verdict[:2] == ("error", {"title": "NOT_COMPARED: tiny masked_lm bf16 forward"})
    assert row == ("error", {"title": "logits (fp32, isolated)"}, "missing: there is no record of this probe")
    (gap,) = commands(render_github(make_report(needs={"padding": False})))
    assert gap[0] == "error"
    assert "the inputs do not exercise: padding" in gap[2]


@pytest.mark.parametrize(("fixture", "level"), [(None, "warning"), ("tiny", "error")])
def test_an_explained_row_is_a_warning_and_its_verdict_what_the_exit_code_says(make_report, fixture, level):
    report = make_report(changes={("logits", "fp32", "accumulated"): OVER}, fixture=fixture)
    assert [annotation.level for annotation in annotations(report)] == [level, "warning"]


def test_a_pass_is_one_notice(make_report):
    ((level, properties, message),) = commands(render_github(make_report()))
    assert (level, properties) == ("notice", {"title": "PASS: tiny masked_lm bf16 forward"})
    assert "own limits" not in message


def test_the_projects_own_limits_are_mentioned(make_report):
    own = Override(probe="logits", dtype="bf16", criterion="direct", limit=4.0, reason="other kernels")
    assert "judged with 1 of the project's own limits" in annotations(make_report(overrides=[own]))[0].message


@given(title=st.text(), message=st.text())
def test_any_text_comes_back_from_one_line(title, message):
    title = title.strip() or "-"  # the runner trims
    command = Annotation(level="error", title=title, message=message).command()
    assert lines_of(command) == [command]
    assert parse(command) == ("error", {"title": title}, message)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_starts_a_command_of_its_own(make_report, text):
    record = Record(probe=text, dtype="fp32", mode="isolated", observation="extra", reason=text)
    report = make_report(extra=[record], hints=(text,))
    report = report.model_copy(update={"model": report.model.model_copy(update={"name": text})})
    found = commands(render_github(report))
    assert [command[0] for command in found] == ["error", "error"]
    assert found[1][1] == {"title": one_line(f"{text} (fp32, isolated)")}
    assert found[1][2] == one_line(f"extra: {text}")
    assert found[0][1] == {"title": one_line(f"FAIL: {text} masked_lm bf16 forward")}


def test_long_text_stays_short(make_report):
    record = Record(probe="x" * 10**5, dtype="fp32", mode="isolated", observation="extra", reason="y" * 10**5)
    assert len(render_github(make_report(extra=[record], hints=("z" * 10**5,) * 100))) < 2**16


def test_the_summary_is_made_where_there_is_none_and_appended_where_there_is(make_report, tmp_path):
    path, report = tmp_path / "summary.md", make_report()
    assert add_to_summary(report, path) == ""
    assert path.read_text() == render_markdown(report)
    path.write_text("before")
    add_to_summary(report, path)
    assert path.read_text() == "before\n" + render_markdown(report)
    add_to_summary(report, path)
    assert path.read_text() == "\n".join(["before", render_markdown(report), render_markdown(report)])


def test_the_summary_never_grows_beyond_what_github_takes(make_report, broken_attention, tmp_path):
    path, report = tmp_path / "summary.md", make_report(changes=broken_attention)
    size = len(render_markdown(report).encode())
    for room, expected in ((size + 3000, "</details>"), (size, "were left out"), (1000, "The rest was left out")):
        path.write_bytes(b"x" * (LARGEST - room))
        assert add_to_summary(report, path) == ""
        added = path.read_bytes()[LARGEST - room :].decode()
        assert len(added.encode()) <= room
        assert added.startswith("\n## ✗ FAIL: ")
        assert expected in added
        assert ("left out" in added) is (room < size + 3000)
    assert added.endswith("there is no room for it.\n")


def test_a_full_summary_is_said(make_report, tmp_path):
    path = tmp_path / "summary.md"
    for before in (LARGEST - 100, LARGEST, LARGEST + 1):
        path.write_bytes(b"x" * before)
        ((level, properties, _),) = commands(add_to_summary(make_report(), path))
        assert (level, properties["title"]) == ("warning", "the job summary is full")
        assert path.stat().st_size == before


def test_a_summary_that_cannot_be_written_is_one_error(make_report, tmp_path):
    for path in (tmp_path, tmp_path / "no folder" / "summary.md"):
        with pytest.raises(UsageError, match="cannot write the job summary"):
            add_to_summary(make_report(), path)
