"""The formats of a report by name, for every command that writes reports."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modernbert_align.core.files import write_atomically
from modernbert_align.errors import UsageError
from modernbert_align.report.github import SUMMARY, add_to_summary, render_github
from modernbert_align.report.html_report import render_html, write_html
from modernbert_align.report.json_report import to_json
from modernbert_align.report.junit import render_junit
from modernbert_align.report.markdown import render_markdown
from modernbert_align.report.schema import Report
from modernbert_align.report.selftest_report import find_selftest


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to show a report.

    Attributes:
        suffix: Of the file's name; None if it is no file but lines for the log.
        render: The report as text.
    """

    suffix: str | None
    render: Callable[[Report], str]


FORMATS: Mapping[str, Format] = {
    "json": Format(suffix=".json", render=to_json),
    "html": Format(suffix=".html", render=render_html),
    "junit": Format(suffix=".xml", render=render_junit),
    "markdown": Format(suffix=".md", render=render_markdown),
    "github": Format(suffix=None, render=render_github),
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
        suffix = FORMATS[name].suffix
        if suffix is not None:
            paths.append(folder / f"{stem}{suffix}")
            if name == "html":
                found = find_selftest(report, beside or folder)
                write_html(report, paths[-1], found.report, found.notes)
            else:
                write_atomically(paths[-1], FORMATS[name].render(report))
    return tuple(paths)


def publish(report: Report, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Say the formats that are lines for the log; `github` also adds to the job summary, where there is one.

    Args:
        say: Takes whole lines, safe to print as they are.

    Raises:
        UsageError: The summary cannot be written.
    """
    for name in names:
        if FORMATS[name].suffix is None:
            say(FORMATS[name].render(report))
    if "github" in names and os.environ.get(SUMMARY):
        say(add_to_summary(report, Path(os.environ[SUMMARY])))
