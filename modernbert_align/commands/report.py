"""`report`: the HTML page from a JSON report, again."""

from pathlib import Path

from modernbert_align.commands import console
from modernbert_align.report.html_report import write_html
from modernbert_align.report.json_report import read_report


def run(*, path: Path, report_dir: Path | None) -> int:
    """Render `path`; returns the exit code, which is about rendering and not about the verdict."""
    report = read_report(path)
    target = (report_dir or path.parent) / f"{path.stem}.html"
    write_html(report, target)
    console.stdout().print(f"{target} ({report.verdict})", soft_wrap=True, markup=False)
    return 0
