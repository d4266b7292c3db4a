"""The kill matrix: what the comparison made of every known fault, as JSON and as one HTML page."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from modernbert_align.core.files import write_atomically
from modernbert_align.core.outcomes import CRITERIA, Alarm, Outcome
from modernbert_align.core.rows import Dtype, Phase
from modernbert_align.core.verdict import RUNS
from modernbert_align.report.page import render_page
from modernbert_align.report.schema import Environment, Report

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SelftestReport(_Strict):
    """A whole selftest.

    Attributes:
        faults: The matrix, one entry per fault, head and precision.
        alarms: Unbroken models that failed.
        false_alarms: Those, and harmless changes that failed.
        runs: Comparisons of unbroken models.
        survivors: Names of faults that the comparison missed.
        table_sha256: Of the name-mapping table.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    created: str
    exit_code: int
    model: str
    dtype: Dtype
    heads: tuple[str, ...]
    phases: tuple[Phase, ...]
    seeds: int
    table: str
    table_sha256: str
    faults: tuple[Outcome, ...]
    alarms: tuple[Alarm, ...]
    false_alarms: int
    runs: int
    survivors: tuple[str, ...]
    environment: Environment
    command: str
    content_sha256: str = ""

    def sealed(self) -> "SelftestReport":
        """This report with its digest filled in."""
        return self.model_copy(update={"content_sha256": self.digest()})

    def digest(self) -> str:
        """SHA-256 over everything but the digest itself."""
        document = self.model_dump(mode="json", exclude={"content_sha256"})
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @property
    def summary(self) -> str:
        """The outcome in one sentence without a period."""
        expected = [fault for fault in self.faults if fault.must_die]
        harmless = [fault for fault in self.faults if fault.equivalent]
        nameable = [fault for fault in self.faults if fault.killed and fault.expected_cause]
        return (
            f"{sum(fault.killed for fault in expected)} of {len(expected)} faults found; "
            f"{sum(fault.false_alarm for fault in harmless)} alarms in {len(harmless)} harmless changes, "
            f"{len(self.alarms)} in {self.runs} comparisons without a fault; "
            f"{sum(fault.cause_found for fault in nameable)} of {len(nameable)} causes named, "
            f"{sum(fault.cause_wrong for fault in self.faults)} wrong"
        )


def write_selftest(report: SelftestReport, folder: Path) -> tuple[Path, Path]:
    """Write `selftest-<model>-<dtype>.json` and `.html`; each appears whole or not at all.

    Returns:
        Their paths.

    Raises:
        UsageError: The folder cannot be written.
    """
    stem = f"selftest-{report.model}-{report.dtype}"
    json_path, html_path = folder / f"{stem}.json", folder / f"{stem}.html"
    write_atomically(json_path, json.dumps(report.model_dump(mode="json"), indent=2, allow_nan=False) + "\n")
    write_atomically(html_path, render_selftest(report))
    return json_path, html_path


@dataclass(frozen=True)
class KillMatrix:
    """The faults of a selftest by line: (fault, head, phase) -> dtype -> what became of it."""

    dtypes: tuple[Dtype, ...]
    lines: dict[tuple[str, str, Phase], dict[Dtype, Outcome]]


def kill_matrix(report: SelftestReport) -> KillMatrix:
    """One line per fault, both precisions in it."""
    lines: dict[tuple[str, str, Phase], dict[Dtype, Outcome]] = {}
    for fault in report.faults:
        lines.setdefault((fault.name, fault.head, fault.phase), {})[fault.dtype] = fault
    return KillMatrix(dtypes=tuple(dict.fromkeys(fault.dtype for fault in report.faults)), lines=lines)


def render_selftest(report: SelftestReport) -> str:
    """The page as text. Equal reports give equal text."""
    return render_page("selftest.html.j2", report=report, matrix=kill_matrix(report), criteria=CRITERIA)


@dataclass(frozen=True)
class FoundSelftest:
    """What lies in a folder.

    Attributes:
        report: The newest selftest that speaks for a comparison; None without one.
        notes: Why others do not, in sentences.
    """

    report: SelftestReport | None
    notes: tuple[str, ...]


def find_selftest(report: Report, folder: Path) -> FoundSelftest:
    """The newest selftest in a folder that speaks for a report: of the same version, name table, phase and precisions.

    What cannot be read, was edited, or speaks for something else is left out and said.
    """
    found: list[SelftestReport] = []
    notes = []
    for path in sorted(folder.glob("selftest-*.json")):
        try:
            selftest = SelftestReport.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            notes.append(f"{path.name} is not a selftest report that this version reads.")
            continue
        why_not = _why_not(selftest, report)
        if why_not:
            notes.append(f"{path.name} {why_not}.")
        else:
            found.append(selftest)
    return FoundSelftest(max(found, key=lambda selftest: selftest.created, default=None), tuple(notes))


def _why_not(selftest: SelftestReport, report: Report) -> str:
    """Why a selftest says nothing about a report; empty if it does."""
    if selftest.content_sha256 != selftest.digest():
        return "was changed after it was written"
    if selftest.tool_version != report.tool_version:
        return f"was made with another version, {selftest.tool_version}"
    if selftest.table_sha256 != report.model.table_sha256:
        return "was made with another name table"
    if report.phase not in selftest.phases:
        return f"did not test the {report.phase} phase"
    if not set(RUNS[report.dtype]) <= set(RUNS[selftest.dtype]):
        return f"did not test {report.dtype}"
    if report.model.head not in selftest.heads:
        return f"did not test the head {report.model.head}"
    if any(override.rows for override in report.overrides):
        return "was judged with the installed limits, and this report with its project's own"
    return ""
