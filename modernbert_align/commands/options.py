"""Options that several commands share, each declared once: wording, panel, completion."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from modernbert_align.commands import console

# Panels of the help.
SOURCE, WRITTEN, RUN = "Source and target", "What is written", "This run"
COMPARED, HOW, JUDGED, OUTPUT = "What is compared", "How it is run", "How it is judged", "Output"

MODEL = (
    "A checkpoint folder, a hub id (answerdotai/ModernBERT-base) or a fixture "
    "(tiny, tiny-sensitive, base or large; with -stress: tiny-stress, base-stress, large-stress)."
)
HEADS = "base, masked_lm, sequence_classification, token_classification, question_answering or multiple_choice."


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Shell completion of a choice."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Shell completion of a model: fixtures, and folders that hold a config.json."""
    from modernbert_align.core.fixtures import fixture_names

    start = Path(incomplete)
    parent = start if incomplete.endswith("/") else start.parent
    near = sorted(parent.iterdir()) if parent.is_dir() else []
    folders = [str(path) for path in near if (path / "config.json").is_file() and str(path).startswith(incomplete)]
    return [*(name for name in fixture_names() if name.startswith(incomplete)), *folders]


def complete_head(incomplete: str) -> list[str]:
    """Shell completion of a head."""
    return [head.rstrip(".") for head in HEADS.replace(",", "").split() if head != "or" and head.startswith(incomplete)]


def complete_table(incomplete: str) -> list[str]:
    """Shell completion of a shipped table."""
    from modernbert_align.core.resources import configs_dir

    return sorted(path.stem for path in (configs_dir() / "tables").glob(f"{incomplete}*.toml"))


def complete_formats(incomplete: str) -> list[str]:
    """Shell completion of formats of a report, the last of several."""
    from modernbert_align.report.formats import FORMATS

    *before, last = incomplete.split(",")
    return [",".join((*before, name)) for name in FORMATS if name.startswith(last) and name not in before]


complete_dtype: Callable[[str], Sequence[str]] = one_of("fp32", "bf16")

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=console.set_quiet, rich_help_panel=OUTPUT,
        help="No progress; of a comparison the verdict, of a gate what stops it.",
    ),
]  # fmt: skip
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=console.set_verbose, help="Seconds with every line of progress, and timings.",
        rich_help_panel=OUTPUT,
    ),
]  # fmt: skip
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.", rich_help_panel=OUTPUT)
]
ReportDir = Annotated[Path, typer.Option(help="Where the reports go.", rich_help_panel=OUTPUT)]
Format = Annotated[
    str,
    typer.Option(
        help="What the report is written as: json, html, junit, markdown, or github (annotations and the job "
        "summary); several with commas.",
        metavar="NAME,...",
        rich_help_panel=OUTPUT,
        autocompletion=complete_formats,
    ),
]
