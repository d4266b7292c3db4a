"""A report for GitHub Actions: annotations as workflow commands in the log, and the job summary.

Source: actions/toolkit, packages/core/src/command.ts (escapeData, escapeProperty), and actions/runner,
ActionCommand.TryParseV2 and CreateStepSummaryCommand (what is read back, and the largest summary that is taken).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modernbert_align.core.rows import Row
from modernbert_align.core.text import one_line
from modernbert_align.core.verdict import Verdict, explain, place
from modernbert_align.errors import EXIT_ALIGNED, UsageError
from modernbert_align.report.html_report import verdict_sentence
from modernbert_align.report.markdown import LARGEST, render_markdown
from modernbert_align.report.schema import Report
from modernbert_align.report.terminal import CAUSE, cause_sentence, worst_first

SUMMARY = "GITHUB_STEP_SUMMARY"
MOST_ROWS = 10  # GitHub shows ten annotations of a kind per step
_LONGEST_TITLE = 250

Level = Literal["error", "warning", "notice"]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """A message that GitHub shows on the run's page.

    Attributes:
        message: May have several lines.
    """

    level: Level
    title: str
    message: str

    def command(self) -> str:
        """The line to print. Whatever the texts hold, it is one line and one command."""
        return f"::{self.level} title={_escape_property(self.title)}::{_escape(self.message)}"


def render_github(report: Report) -> str:
    """Workflow commands, one a line: the verdict, then the worst rows."""
    return "".join(f"{annotation.command()}\n" for annotation in annotations(report))


def annotations(report: Report) -> list[Annotation]:
    """The verdict, then the worst rows that are not a pass, ten at most."""
    bad = worst_first(report)
    return [_of_verdict(report, len(bad) - MOST_ROWS), *(_of_row(row) for row in bad[:MOST_ROWS])]


def add_to_summary(report: Report, path: Path) -> str:
    """Append the Markdown summary to a job's, with as many rows as there is room for.

    Returns:
        A workflow command that says so where there is no room at all; else nothing.

    Raises:
        UsageError: The file cannot be written.
    """
    try:
        before = path.stat().st_size if path.exists() else 0
        gap = "\n" if before else ""
        text = render_markdown(report, LARGEST - before - len(gap))
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(gap + text if text else "")
    except OSError as error:
        raise UsageError(
            f"cannot write the job summary `{path}`: {error.strerror}", hint=f"{SUMMARY} names it; unset or correct it"
        ) from None
    if text:
        return ""
    full = Annotation(
        level="warning", title="the job summary is full", message="this report is not in it; give it a step of its own"
    )
    return f"{full.command()}\n"


def _of_verdict(report: Report, more: int) -> Annotation:
    model = report.model
    lines = [verdict_sentence(report)]
    if report.overrides:
        lines.append(f"judged with {len(report.overrides)} of the project's own limits")
    if report.first_failing is not None:
        lines.append(f"first failing: {report.first_failing.place}: {report.first_failing.detail}")
    if report.cause is not None and report.cause.level != "structural":
        lines.append(f"{CAUSE[report.cause.level]}: {cause_sentence(report.cause)}")
    lines += [f"hint: {hint}" for hint in report.hints[:MOST_ROWS]]
    if more > 0:
        lines.append(f"{more} more rows are not a pass, see the report")
    return Annotation(
        level=_level(report.verdict, report.exit_code),
        title=one_line(f"{report.verdict}: {model.name} {model.head} {report.dtype} {report.run}", _LONGEST_TITLE),
        message="\n".join(map(one_line, lines)),
    )


def _level(verdict: Verdict, exit_code: int) -> Level:
    if exit_code != EXIT_ALIGNED or verdict in ("FAIL", "NOT_COMPARED"):
        return "error"
    return "notice" if verdict == "PASS" else "warning"


def _of_row(row: Row) -> Annotation:
    return Annotation(
        level="warning" if row.status == "explained" else "error",
        title=one_line(place(row), _LONGEST_TITLE),
        message=one_line(f"{row.status}: {explain(row)}"),
    )


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")
