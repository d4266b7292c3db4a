"""`baseline update` and `baseline show`: the reports that later ones are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modernbert_align.commands import console
from modernbert_align.commands.gate import check_policy, rejudge
from modernbert_align.core.files import kind_of, write_together
from modernbert_align.core.tolerance import Override
from modernbert_align.core.verdict import Judgement
from modernbert_align.errors import (
    EXIT_ALIGNED,
    EXIT_MISALIGNED,
    EXIT_NOT_COMPARED,
    EXIT_USAGE,
    ReportError,
    UsageError,
)
from modernbert_align.report.baselines import KEY_NAMES, Key, file_name, key_of, present, to_lines, words
from modernbert_align.report.comparison import Comparison, compare_reports, judged_as
from modernbert_align.report.comparison_terminal import print_comparison
from modernbert_align.report.json_report import read_report
from modernbert_align.report.schema import Report


@dataclass(frozen=True, kw_only=True)
class _Update:
    """One report that is to be a baseline.

    Attributes:
        before: What changes against the present baseline; None where there is none that can be compared with.
        unreadable: Why there is none although there is a file.
    """

    key: Key
    path: Path
    report: Report
    judgement: Judgement
    before: Comparison | None
    unreadable: str


def update(
    *,
    reports: list[Path],
    baseline_dir: Path,
    policy: str | None,
    as_json: bool,
    overrides: Sequence[Override] = (),
) -> int:
    """Make reports the baselines, all of them or none; returns the exit code."""
    used_policy = check_policy(policy)
    updates: dict[Key, _Update] = {}
    old = present(baseline_dir)
    for path in reports:
        report = read_report(path)
        judgement = rejudge(report, path, used_policy, overrides)
        key = key_of(report)
        if key in updates:
            raise UsageError(f"`{updates[key].path}` and `{path}` are both of {words(key)}", hint="give one of them")
        if key in old and old[key].name != file_name(key):
            raise UsageError(
                f"`{old[key]}` already is the baseline of {words(key)}, under a name of its own",
                hint=f"rename it to {file_name(key)}, or remove it",
            )
        before, unreadable = _against(baseline_dir / file_name(key), judged_as(report, judgement), overrides)
        updates[key] = _Update(
            key=key, path=path, report=report, judgement=judgement, before=before, unreadable=unreadable
        )
    refused = [one for one in updates.values() if one.judgement.exit_code != EXIT_ALIGNED]
    codes = {one.judgement.exit_code for one in refused}
    code = next((c for c in (EXIT_MISALIGNED, EXIT_NOT_COMPARED) if c in codes), EXIT_ALIGNED)
    if not refused:
        write_together(baseline_dir, {file_name(one.key): to_lines(one.report) for one in updates.values()})
    if as_json:
        console.print_json({"exit_code": code, "written": not refused, "reports": [*map(_document, updates.values())]})
        return code
    out = console.stdout()
    for one in updates.values():
        console.line(f"{one.judgement.verdict:<12} {words(one.key)}  {one.path}")
        if one in refused:
            first = one.judgement.first_failing
            console.line(f"  refused: {first.place}: {first.detail}" if first is not None else "  refused")
        if one.unreadable:
            console.line(f"  the present baseline cannot be compared with: {one.unreadable}")
        if one.before is not None:
            print_comparison(one.before, out)
        elif not one.unreadable:
            console.line("  there is no baseline of it yet")
    for one in updates.values():
        if not refused:
            console.line(f"written: {baseline_dir / file_name(one.key)}")
        for where, text in _machine_paths(one.report):
            console.notify(f"note: {one.path}: {where} holds a path of this machine: {text}")
    if refused:
        console.line("nothing was written: every baseline has to pass `gate`")
    return code


def show(*, baseline_dir: Path, as_json: bool, overrides: Sequence[Override] = ()) -> int:
    """List baselines, each judged again; returns the exit code, which is 0 only if all still pass."""
    if kind_of(baseline_dir) != "folder":
        raise UsageError(
            f"there is no folder `{baseline_dir}`", hint="`modernbert-align baseline update REPORT.json` makes it"
        )
    documents: list[dict[str, Any]] = []
    for path in sorted(baseline_dir.glob("*.json")):
        try:
            report = read_report(path)
            judgement = rejudge(report, path, None, overrides)
        except ReportError as error:
            documents.append({"path": str(path), "error": error.message})
            continue
        documents.append(
            _named(key_of(report))
            | {
                "path": str(path),
                "verdict": judgement.verdict,
                "exit_code": judgement.exit_code,
                "rows": judgement.coverage.compared,
                "created": report.created,
                "tool_version": report.tool_version,
                "cpu": report.environment.cpu,
                "versions": report.environment.versions,
            }
        )
    codes = {EXIT_USAGE if "error" in document else document["exit_code"] for document in documents}
    readable = [document for document in documents if "error" not in document]
    keys = [tuple(document[name] for name in KEY_NAMES) for document in readable]
    twice = sorted({words(key) for key in keys if keys.count(key) > 1})
    codes |= {EXIT_USAGE} if twice else set()
    code = next((c for c in (EXIT_USAGE, EXIT_MISALIGNED, EXIT_NOT_COMPARED) if c in codes), EXIT_ALIGNED)
    if not documents:
        code = EXIT_NOT_COMPARED
    if as_json:
        console.print_json({"exit_code": code, "twice": twice, "baselines": documents})
        return code
    for document in documents:
        if "error" in document:
            console.line(f"unreadable   {document['error']}")
            continue
        key = tuple(document[name] for name in KEY_NAMES)
        versions = document["versions"]
        frameworks = ", ".join(f"{name} {versions[name]}" for name in ("torch", "paddlepaddle") if name in versions)
        console.line(f"{document['verdict']:<12} {words(key)}: {document['rows']} rows  {document['path']}")
        console.line(f"  {document['created']}, modernbert-align {document['tool_version']}, {frameworks}")
    for comparison in twice:
        console.line(f"twice        {comparison}: `gate` needs one")
    console.line(f"{len(documents)} baselines in {baseline_dir}")
    return code


def _against(path: Path, report: Report, overrides: Sequence[Override]) -> tuple[Comparison | None, str]:
    """What a report changes against the baseline in a file, and why that cannot be said."""
    if kind_of(path) == "none":
        return None, ""
    try:
        old = read_report(path)
        return compare_reports(judged_as(old, rejudge(old, path, None, overrides)), report), ""
    except (ReportError, UsageError) as error:
        return None, error.message


def _named(key: Key) -> dict[str, Any]:
    return dict(zip(KEY_NAMES, key, strict=True))


def _document(one: _Update) -> dict[str, Any]:
    return _named(one.key) | {
        "path": str(one.path),
        "baseline": file_name(one.key),
        "verdict": one.judgement.verdict,
        "exit_code": one.judgement.exit_code,
        "comparison": one.before.model_dump(mode="json") if one.before is not None else None,
        "unreadable": one.unreadable or None,
    }


def _machine_paths(report: Report) -> list[tuple[str, str]]:
    """What a baseline would say of the machine it was made on: absolute paths, where a user can give them."""
    fields = {"command": report.command, "model.candidate": report.model.candidate}
    fields |= {f"engine.traces ({trace.side})": trace.file for trace in report.engine.traces}
    return [
        (name, word) for name, text in fields.items() for word in text.replace("=", " ").split() if word.startswith("/")
    ]
