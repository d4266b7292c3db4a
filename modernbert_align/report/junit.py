"""A report as JUnit XML: what Jenkins, GitLab and others make a list of tests from.

Source: the de-facto format of Ant's JUnit task as Jenkins reads it; `docs/junit.xsd` describes what is written here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from modernbert_align.core.rows import RankCheck, Row, WeightCheck
from modernbert_align.core.text import one_line
from modernbert_align.core.verdict import explain, place, rank_words
from modernbert_align.errors import EXIT_ALIGNED, EXIT_NOT_COMPARED
from modernbert_align.report.html_report import verdict_sentence
from modernbert_align.report.schema import Report
from modernbert_align.report.terminal import CAUSE, cause_sentence, override_line

Outcome = Literal["passed", "failure", "error"]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A test case.

    Attributes:
        outcome: failure (a wrong value) or error (nothing that could be compared).
        kind: Which criteria failed, or why nothing could be compared.
        message: In one sentence.
        details: What else a failure says, in lines.
        output: Lines that a passed case has as well.
    """

    name: str
    outcome: Outcome = "passed"
    kind: str = ""
    message: str = ""
    details: Sequence[str] = ()
    output: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class _Suite:
    name: str
    cases: Sequence[_Case]
    seconds: float = 0.0
    properties: Sequence[tuple[str, str]] = ()

    def count(self, outcome: Outcome) -> int:
        return sum(case.outcome == outcome for case in self.cases)


def render_junit(report: Report) -> str:
    """The report as JUnit XML.

    There are failures or errors in it exactly where the exit code is not 0; nothing is ever `skipped`, for what was not
    compared has not passed.
    """
    suites, taken = list(_suites(report)), set[tuple[str, str]]()
    root = ElementTree.Element("testsuites", name="modernbert-align")
    _count(root, suites, sum(map(_seconds, report.timings_s.values())))
    for suite in suites:
        element = ElementTree.SubElement(root, "testsuite", name=one_line(suite.name))
        _count(element, [suite], suite.seconds)
        element.set("timestamp", one_line(report.created))
        if suite.properties:
            properties = ElementTree.SubElement(element, "properties")
            for name, value in suite.properties:
                ElementTree.SubElement(properties, "property", name=one_line(name), value=one_line(value))
        for case in suite.cases:
            _add(element, _unique(one_line(suite.name), one_line(case.name), taken), case)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _count(element: ElementTree.Element, suites: Sequence[_Suite], seconds: float) -> None:
    element.set("tests", str(sum(len(suite.cases) for suite in suites)))
    element.set("failures", str(sum(suite.count("failure") for suite in suites)))
    element.set("errors", str(sum(suite.count("error") for suite in suites)))
    element.set("skipped", "0")
    element.set("time", f"{seconds:.3f}")


def _unique(class_name: str, name: str, taken: set[tuple[str, str]]) -> tuple[str, str]:
    """The case's names; two hostile names may look the same, and GitLab takes only the first case of a name."""
    free, n = name, 1
    while (class_name, free) in taken:
        n += 1
        free = f"{name} ({n})"
    taken.add((class_name, free))
    return class_name, free


def _add(suite: ElementTree.Element, names: tuple[str, str], case: _Case) -> None:
    element = ElementTree.SubElement(suite, "testcase", classname=names[0], name=names[1], time="0.000")
    if case.outcome != "passed":
        found = ElementTree.SubElement(element, case.outcome, type=one_line(case.kind), message=one_line(case.message))
        found.text = _lines([case.message, *case.details])
    if case.output:
        ElementTree.SubElement(element, "system-out").text = _lines(case.output)


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(map(one_line, lines))


def _suites(report: Report) -> Iterator[_Suite]:
    model = report.model
    of = f"{model.name}.{model.head}.{report.phase}" + ("" if report.attention == "eager" else f".{report.attention}")
    of += f".tp{report.tensor_parallel}" if report.tensor_parallel > 1 else ""
    yield _Suite(name=f"{of}.verdict", cases=[_verdict_case(report)], properties=tuple(_properties(report)))
    gaps = _gaps_without_a_row(report)
    if gaps:
        cases = [_Case(name=gap, outcome="error", kind="missing", message=gap) for gap in gaps]
        yield _Suite(name=f"{of}.coverage", cases=cases)
    checks = {check.dtype: check for check in report.weights}
    yield _Suite(
        name=f"{of}.weights",
        cases=[_weights_case(dtype, checks.get(dtype)) for dtype in dict.fromkeys((*report.execution, *checks))],
        seconds=sum(_seconds(report.timings_s.get(f"{dtype}_weights", 0.0)) for dtype in checks),
    )
    if report.tensor_parallel > 1:
        cases = [_ranks_case(check) for check in report.ranks]
        yield _Suite(name=f"{of}.ranks", cases=cases or [_Case(name="ranks", outcome="error", kind="missing")])
    groups: dict[str, list[_Case]] = {}
    seconds: dict[str, float] = {}
    for row in report.rows:
        name = ".".join((of, row.dtype, *([f"{row.loss}_loss"] if row.loss else []), row.mode))
        groups.setdefault(name, []).append(_row_case(row, report.exit_code))
        # Phases and engines that run both modes at once have no time of their own for a mode.
        seconds[name] = _seconds(report.timings_s.get(f"{row.dtype}_{row.mode}", 0.0))
    for name, cases in groups.items():
        yield _Suite(name=name, cases=cases, seconds=seconds[name])


def _seconds(value: float) -> float:
    return max(value, 0.0) if math.isfinite(value) else 0.0


def _verdict_case(report: Report) -> _Case:
    lines = []
    if report.first_failing is not None:
        lines.append(f"first failing: {report.first_failing.place}: {report.first_failing.detail}")
    if report.cause is not None and report.cause.level != "structural":
        lines.append(f"{CAUSE[report.cause.level]}: {cause_sentence(report.cause)}")
    lines += [f"hint: {hint}" for hint in report.hints]
    sentence = f"{report.verdict}: {verdict_sentence(report)}"
    if report.exit_code == EXIT_ALIGNED:
        return _Case(name="verdict", output=[sentence, *lines])
    return _Case(
        name="verdict",
        outcome="error" if report.exit_code == EXIT_NOT_COMPARED else "failure",
        kind=report.verdict,
        message=sentence,
        details=lines,
        output=[report.command],
    )


def _gaps_without_a_row(report: Report) -> list[str]:
    own = {f"{place(row)}: {row.reason}" for row in report.rows if row.status == "missing"}
    return [gap for gap in dict.fromkeys(report.coverage.missing) if gap not in own]


def _weights_case(dtype: str, check: WeightCheck | None) -> _Case:
    if check is None:
        return _Case(name=dtype, outcome="error", kind="missing", message="no weights were compared")
    counted = f"{check.compared} of {check.expected} weights were compared bit for bit"
    if check.differences:
        return _Case(
            name=dtype,
            outcome="failure",
            kind=",".join(sorted({difference.problem for difference in check.differences})),
            message=f"{len(check.differences)} of {check.expected} weights are not the reference's",
            details=[
                f"{d.paddle} (reference {d.hf}): {d.problem}"
                + ("" if d.differing is None else f", {d.differing} of {d.elements} elements")
                + ("" if d.max_abs is None else f", by {d.max_abs:.2e} at most")
                + (f", {d.looks}" if d.looks else "")
                for d in check.differences
            ],
            output=[counted],
        )
    if check.compared < check.expected:
        return _Case(name=dtype, outcome="error", kind="missing", message=counted)
    return _Case(name=dtype, output=[counted])


def _ranks_case(check: RankCheck) -> _Case:
    name, counted = f"{check.what} {check.dtype}", f"{check.compared} of {check.expected} were compared between ranks"
    if check.wrong:
        details = [rank_words(check.what, name) for name in check.wrong]
        message = f"{len(check.wrong)} of {check.expected} {check.what} are not as they must be on all ranks"
        return _Case(name=name, outcome="failure", kind="ranks", message=message, details=details, output=[counted])
    if check.compared < check.expected:
        return _Case(name=name, outcome="error", kind="missing", message=counted)
    return _Case(name=name, output=[counted])


def _row_case(row: Row, exit_code: int) -> _Case:
    outcome: Outcome = "error"
    if row.status == "fail" or (row.status == "explained" and exit_code != EXIT_ALIGNED):
        outcome = "failure"
    elif row.status in ("pass", "explained"):
        outcome = "passed"
    return _Case(
        name=row.probe,
        outcome=outcome,
        kind=",".join(row.failed) if outcome == "failure" else row.status,
        message=explain(row),
        details=[place(row)],
        output=[*([explain(row)] if row.status == "explained" or row.overridden else []), *_measures(row)],
    )


def _measures(row: Row) -> Iterator[str]:
    if row.shape is not None:
        yield f"shape {list(row.shape)}, {row.elements} elements compared"
    for name, value, limit in (
        ("mean_abs", row.mean_abs, row.contract_limit),
        ("max_abs", row.max_abs, None),
        ("rel_l2", row.rel_l2, row.direct_limit),
        ("null_ratio", row.null_ratio, None),
        ("noise_ratio", row.noise_ratio, row.noise_limit),
        ("candidate_error", row.candidate_error, None),
        ("reference_error", row.reference_error, None),
    ):
        if value is not None:
            yield f"{name} {value:.4e}" + ("" if limit is None else f", at most {limit:.4e}")
    if row.worst_index is not None:
        yield f"worst at {list(row.worst_index)}: {row.worst_candidate!r}, the reference has {row.worst_reference!r}"


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    model, environment = report.model, report.environment
    yield from (
        ("verdict", report.verdict),
        ("exit_code", str(report.exit_code)),
        ("policy", report.policy),
        ("model", model.name),
        ("head", model.head),
        ("dtype", report.dtype),
        ("phase", report.phase if report.steps is None else f"{report.phase} of {report.steps} steps"),
        ("attention", report.attention),
        ("tensor_parallel", str(report.tensor_parallel)),
        ("reference_sha256", model.reference_sha256),
        ("candidate_sha256", model.candidate_sha256),
        ("report_sha256", report.content_sha256),
        ("coverage", f"{report.coverage.compared} of {report.coverage.expected} rows"),
        ("tool_version", report.tool_version),
        ("cpu", environment.cpu),
        ("platform", environment.platform),
    )
    for dtype, execution in report.execution.items():
        yield f"execution.{dtype}", f"reference {execution.reference}, candidate {execution.candidate}"
    for package, version in environment.versions.items():
        yield f"version.{package}", version
    for n, override in enumerate(report.overrides):
        yield f"override.{n}", override_line(override)
