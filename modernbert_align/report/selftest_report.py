"""The kill matrix: what the comparison made of every known fault, as JSON and as one HTML page."""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from modernbert_align.core.cause import Level
from modernbert_align.core.files import write_atomically
from modernbert_align.core.rows import MODES, Dtype, Mode, Phase
from modernbert_align.report.schema import Environment

SCHEMA_VERSION = 1
CRITERIA = ("hygiene", "contract", "noise", "direct", "weights")
_PLACE: dict[Mode, str] = {"isolated": "own", "accumulated": "end"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FaultOutcome(_Strict):
    """What the comparison made of one fault in one precision.

    Attributes:
        must_die: Whether the comparison has to fail.
        equivalent: Whether the change changes nothing but rounding, so that it must not fail.
        killed_by: All criteria that saw it.
        seen: Mode -> criteria that saw it there; weights have no mode.
        first_probe: Where the comparison places it; empty if nowhere.
        effect: Largest rel_l2 over what rounding explains, in the forward phase the largest isolated one; null where
            there is something else to see.
        cause_level, cause_names: What the comparison names as the cause; null and empty where there is nothing to look
            at.
        expected_cause: What it must name; empty where there is nothing to name.
    """

    name: str
    head: str
    dtype: Dtype
    phase: Phase
    must_die: bool
    equivalent: bool
    killed: bool
    killed_by: tuple[str, ...]
    seen: dict[Mode, tuple[str, ...]]
    verdict: str
    first_probe: str
    expected_probe: str
    effect: float | None
    cause_level: Level | None
    cause_names: tuple[str, ...]
    expected_cause: str

    @property
    def survived(self) -> bool:
        """Whether the comparison missed what it had to find."""
        return self.must_die and not self.killed

    @property
    def false_alarm(self) -> bool:
        """Whether the comparison failed for a change that changes nothing."""
        return self.equivalent and self.killed

    @property
    def said(self) -> str:
        """The outcome in words."""
        if self.equivalent:
            return "false alarm" if self.killed else "harmless, passed"
        if self.survived:
            return "SURVIVED"
        if not self.killed:
            return "within rounding"
        return "killed" if self.first_probe == self.expected_probe else f"killed, not at {self.expected_probe}"

    @property
    def cause_found(self) -> bool:
        """Whether the right cause is named as certain, alone or with others that cannot be told apart from it."""
        return self.cause_level == "explained" and self.expected_cause in self.cause_names

    @property
    def cause_wrong(self) -> bool:
        """Whether a wrong cause is named as certain."""
        return self.cause_level == "explained" and not self.cause_found

    @property
    def cause_said(self) -> str:
        """The cause in words; empty where there is nothing to look at."""
        names = " or ".join(self.cause_names)
        match self.cause_level:
            case "explained":
                return f"WRONG: {names}" if self.cause_wrong else names
            case "partial":
                return f"perhaps {names}"
            case "unexplained":
                return "not known"
            case "structural":
                return "the finding itself"
            case None:
                return ""

    def places(self, criterion: str) -> str:
        """Where a criterion saw it: `own`, `end`, both, or nothing."""
        if criterion == "weights":
            return "seen" if "weights" in self.killed_by else ""
        return " + ".join(_PLACE[mode] for mode in MODES if criterion in self.seen.get(mode, ()))


class AlarmInfo(_Strict):
    """An unbroken model that the comparison failed.

    Attributes:
        seed: Of weights and inputs; null for the fixture itself.
    """

    head: str
    dtype: Dtype
    phase: Phase
    seed: int | None
    verdict: str
    detail: str


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
    faults: tuple[FaultOutcome, ...]
    alarms: tuple[AlarmInfo, ...]
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


def render_selftest(report: SelftestReport) -> str:
    """The page as text. Equal reports give equal text."""
    from jinja2 import Environment as Templates
    from jinja2 import PackageLoader, StrictUndefined

    dtypes = tuple(dict.fromkeys(fault.dtype for fault in report.faults))
    matrix: dict[tuple[str, str, Phase], dict[str, FaultOutcome]] = {}
    for fault in report.faults:
        matrix.setdefault((fault.name, fault.head, fault.phase), {})[fault.dtype] = fault
    templates = Templates(
        loader=PackageLoader("modernbert_align.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("selftest.html.j2").render(
        report=report, dtypes=dtypes, matrix=matrix, criteria=CRITERIA
    )
