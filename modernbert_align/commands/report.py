"""`report`: the HTML page from a JSON report, again; or the report's JSON Schema."""

from pathlib import Path

from modernbert_align.commands import console
from modernbert_align.errors import UsageError
from modernbert_align.report.html_report import write_html
from modernbert_align.report.json_report import json_schema, read_report


def run(*, path: Path | None, report_dir: Path | None, schema: bool) -> int:
    """Render `path`; returns the exit code, which is about rendering and not about the verdict."""
    if schema:
        console.print_json(json_schema())
        return 0
    if path is None:
        raise UsageError("no report given", hint="give a JSON report written by `diff`, or --schema")
    report = read_report(path)
    target = (report_dir or path.parent) / f"{path.stem}.html"
    write_html(report, target)
    console.stdout().print(f"{target} ({report.verdict})", soft_wrap=True, markup=False)
    return 0
