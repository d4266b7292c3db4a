"""The formats of a report by name, for every command that writes reports."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modernbert_align.core.files import write_atomically
from modernbert_align.errors import UsageError
from modernbert_align.report.github import SUMMARY, add_to_summary, render_github
from modernbert_align.report.html_report import render_html
from modernbert_align.report.json_report import to_json
from modernbert_align.report.junit import render_junit
from modernbert_align.report.markdown import render_markdown
from modernbert_align.report.schema import Report
from modernbert_align.report.selftest_report import find_selftest


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to show a report as a file.

    Attributes:
        suffix: Of the file's name.
        render: The report as text, given the folder with what may be shown beside it.
    """

    suffix: str
    render: Callable[[Report, Path], str]


def _alone(render: Callable[[Report], str]) -> Callable[[Report, Path], str]:
    return lambda report, _beside: render(report)


def _page(report: Report, beside: Path) -> str:
    found = find_selftest(report, beside)
    return render_html(report, found.report, found.notes)


GITHUB = "github"  # no file: lines for the log, and the job summary
FORMATS: Mapping[str, Format | None] = {
    "json": Format(suffix=".json", render=_alone(to_json)),
    "html": Format(suffix=".html", render=_page),
    "junit": Format(suffix=".xml", render=_alone(render_junit)),
    "markdown": Format(suffix=".md", render=_alone(render_markdown)),
    GITHUB: None,
}


def parse_formats(text: str) -> tuple[str, ...]:
    """Names out of `json,html`, each once, in the order given.

    Raises:
        UsageError: None is given, or one is not known.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FORMATS:
            near = difflib.get_close_matches(name.lower(), FORMATS, n=1)
            raise UsageError(
                f"unknown format `{name}`" if name else f"--format `{text}` leaves a name out",
                hint=f"did you mean `{near[0]}`?" if near else f"one or more of {','.join(FORMATS)}",
            )
    return names


def write_formats(
    report: Report, names: Sequence[str], folder: Path, stem: str, *, beside: Path | None = None
) -> tuple[Path, ...]:
    """Write the formats that are files; each appears whole or not at all.

    Args:
        beside: The folder with selftests, one of which the page shows if it speaks for the report; `folder` if None.

    Returns:
        Their paths.

    Raises:
        UsageError: The folder cannot be written.
    """
    paths = []
    for name in names:
        written = FORMATS[name]
        if written is not None:
            paths.append(folder / f"{stem}{written.suffix}")
            write_atomically(paths[-1], written.render(report, beside or folder))
    return tuple(paths)


def publish(report: Report, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Say `github`, if it is among the formats, and add to the job summary, where there is one.

    Args:
        say: Takes whole lines, safe to print as they are.

    Raises:
        UsageError: The summary cannot be written.
    """
    if GITHUB not in names:
        return
    say(render_github(report))
    if os.environ.get(SUMMARY):
        say(add_to_summary(report, Path(os.environ[SUMMARY])))
