"""placeholder"""
from pathlib import Path
from modernbert_align.report.schema import Report
def write_html(report: Report, path: Path) -> None:
    path.write_text("placeholder")
