"""`report`: the HTML page, or another format, from a JSON report; or the report's JSON Schema."""

from pathlib import Path

from modernbert_align.commands import console
from modernbert_align.errors import UsageError
from modernbert_align.report.formats import parse_formats, publish, write_formats
from modernbert_align.report.json_report import json_schema, read_report


def run(*, path: Path | None, report_dir: Path | None, formats: str, schema: bool) -> int:
    """Render `path`; returns the exit code, which is about rendering and not about the verdict."""
    if schema:
        console.print_json(json_schema())
        return 0
    if path is None:
        raise UsageError("no report given", hint="give a JSON report written by `diff`, or --schema")
    names = parse_formats(formats)
    report = read_report(path)
    for target in write_formats(report, names, report_dir or path.parent, path.stem, beside=path.parent):
        console.line(f"{target} ({report.verdict})")
    publish(report, names, console.verbatim)
    return 0
