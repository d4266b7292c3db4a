"""`python -m examples.pretrain_mlm --recipe FILE.toml --out DIR`; see the README beside this file."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modernbert_align.backends import runtime
from modernbert_align.cli import guarded
from modernbert_align.commands import console
from modernbert_align.core.text import one_line

if TYPE_CHECKING:
    from examples.pretrain_mlm.metrics import Step

PROGRAM = "python -m examples.pretrain_mlm"
HERE = Path(__file__).parent

app = typer.Typer(name=PROGRAM, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics, report and the model.")],
    recipe: Annotated[
        Path, typer.Option(help="What is trained, and how.", metavar="FILE.toml", show_default="tiny.toml, beside this")
    ] = HERE / "tiny.toml",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out; begin if there is none.")
    ] = False,
    stop_at: Annotated[
        int | None, typer.Option(min=1, help="Save and stop after this step of the whole recipe.", metavar="STEP")
    ] = None,
) -> None:
    """Pretrain ModernBERT by ModernBERT's recipe: masked tokens, packed rows, stages of growing context."""
    from examples.pretrain_mlm.recipe import read_recipe
    from examples.pretrain_mlm.report import write_report
    from examples.pretrain_mlm.state import held
    from examples.pretrain_mlm.training import METRICS, MODEL, Training

    declared = read_recipe(recipe)
    with held(out), _progress(declared.steps) as (notify, report):
        training = Training(declared, out, resume=resume, notify=notify)
        training.run(stop_at or declared.steps, report)
    console.line(str(write_report(declared, out / METRICS, out)))
    if training.step == declared.steps:
        console.line(str(out / MODEL))


@contextlib.contextmanager
def _progress(steps: int) -> "Iterator[tuple[Callable[[str], None], Callable[[Step], None]]]":
    """A progress bar on a terminal, with messages above it; elsewhere the messages alone.

    Yields:
        What to call with a message, and what to call after every step.
    """
    if not sys.stderr.isatty():
        yield console.notify, lambda _step: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console.stderr(), transient=True) as bar:
        task = bar.add_task("", total=steps)

        def report(step: "Step") -> None:
            words = f"loss {step.loss:.3f}  rate {step.learning_rate:.1e}  {step.tokens_per_s:,.0f} tokens/s"
            bar.update(task, completed=step.step, description=f"{step.stage}  {words}")

        yield lambda message: bar.console.print(one_line(message), style="dim", markup=False), report


def main(argv: list[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    runtime.pin()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a model this small more threads only wait for each other
    command = typer.main.get_command(app)
    return guarded(lambda: command(args=argv, prog_name=PROGRAM, standalone_mode=False), PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
