"""`compare`: what changed between two reports of the same comparison."""

from collections.abc import Sequence
from pathlib import Path

from modernbert_align.commands import console
from modernbert_align.commands.gate import read_judged
from modernbert_align.core.tolerance import Override
from modernbert_align.errors import EXIT_ALIGNED, UsageError
from modernbert_align.report.comparison import Comparison, compare_reports
from modernbert_align.report.comparison_terminal import print_comparison, summary


def run(*, old: Path | None, new: Path | None, as_json: bool, schema: bool, overrides: Sequence[Override] = ()) -> int:
    """Compare two reports, both judged by the installed rules; returns the exit code."""
    if schema:
        if old is not None:
            raise UsageError("--schema prints the schema and compares nothing", hint="leave the reports out")
        console.print_json(Comparison.model_json_schema(mode="serialization"))
        return EXIT_ALIGNED
    if old is None or new is None:
        raise UsageError("two reports are needed", hint="modernbert-align compare OLD.json NEW.json")
    comparison = compare_reports(read_judged(old, overrides), read_judged(new, overrides))
    if as_json:
        console.print_json(comparison.model_dump(mode="json"))
    elif console.is_quiet():
        console.line(summary(comparison))
    else:
        print_comparison(comparison, console.stdout())
    return comparison.exit_code
