"""The command of both examples: data, start, conversion, both trainings, comparison, report."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.downstream import recipe as recipes
from examples.downstream.compare import SIDES, compare, read_runs
from examples.downstream.page import write_report
from examples.downstream.recipe import Data, Recipe
from modernbert_align.backends import runtime
from modernbert_align.cli import guarded
from modernbert_align.commands import console
from modernbert_align.errors import EXIT_BUG, UsageError

ROOT = Path(__file__).resolve().parents[2]
FEWEST_SEEDS = 2


def main(
    name: str, recipe: Recipe, readers: Mapping[str, Callable[[], Data]], argv: Sequence[str] | None = None
) -> int:
    """Run an example; returns the exit code of the comparison.

    Args:
        name: Of the example, for its folder and reports.
        recipe: How it is trained, without labels.
        readers: What `--data` chooses from; the first is the default.
        argv: The command line's words; by default those of this process.
    """
    program = f"python -m examples.{name}"
    parser = argparse.ArgumentParser(prog=program, description=f"{name} in Paddle and in PyTorch.")
    parser.add_argument("--out", type=Path, default=Path("reports") / name, help="folder for everything (%(default)s)")
    parser.add_argument("--seeds", type=int, default=len(recipe.seeds), help="trainings per framework (%(default)s)")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="steps of every training (%(default)s)")
    if len(readers) > 1:
        parser.add_argument("--data", choices=list(readers), default=next(iter(readers)), help="(%(default)s)")
    options = parser.parse_args(argv)
    runtime.pin()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a model this small more threads only wait for each other

    def call() -> int:
        if options.seeds < FEWEST_SEEDS or options.steps < 1:
            raise UsageError(
                f"{options.seeds} seeds and {options.steps} steps compare nothing",
                hint="give at least two seeds, whose spread is the noise, and one step",
            )
        chosen = recipe.model_copy(update={"seeds": tuple(range(options.seeds)), "steps": options.steps})
        return run(name, chosen, readers[getattr(options, "data", next(iter(readers)))](), options.out)

    return guarded(call, program)


def run(name: str, recipe: Recipe, data: Data, out: Path) -> int:
    """Everything, one process per framework; returns the exit code."""
    prepare(recipe, data, out)
    _step("start", "writing the checkpoints that both start from", out)
    for seed in recipe.seeds:
        convert(out, seed)
    _step("train_hf", "training in PyTorch, twice per seed", out)
    _step("train_paddle", "training in Paddle with PaddleNLP's Trainer", out)
    return judge(name, out)


def prepare(recipe: Recipe, data: Data, out: Path) -> None:
    """Write recipe and data, and remove what an earlier run recorded: it must not stand in for this one."""
    try:
        for seed in recipe.seeds:
            recipes.start_folder(out, seed, "hf").mkdir(parents=True, exist_ok=True)
        for side in SIDES:
            for record in out.glob(f"seed-*/{side}.json"):
                record.unlink()
        completed = recipe.model_copy(update={"labels": data.labels})
        (out / recipes.RECIPE).write_text(completed.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (out / recipes.DATA).write_text(data.model_dump_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to `{out}`: {error.strerror}", hint="choose another folder") from None


def convert(out: Path, seed: int) -> None:
    """`modernbert-align convert` on the checkpoint of a seed."""
    hf, paddle = (str(recipes.start_folder(out, seed, side)) for side in ("hf", "paddle"))
    arguments = ["convert", "--src", "hf", "--dst", "paddle", "--model", hf, "--out", paddle, "--force", "--quiet"]
    code = _run("modernbert_align", *arguments)
    if code:
        raise SystemExit(code)


def judge(name: str, out: Path) -> int:
    """Compare what was recorded, write the report and say the verdict; returns the exit code."""
    recipe = recipes.read_recipe(out)
    comparison = compare(recipe, read_runs(out, recipe))
    paths = write_report(name, comparison, recipes.read_data(out), out)
    sys.stdout.write(f"{comparison.verdict}: {comparison.sentence}\n" + "".join(f"{path}\n" for path in paths))
    return comparison.exit_code


def _step(module: str, message: str, out: Path) -> None:
    console.notify(message)
    if _run(f"examples.downstream.{module}", str(out.resolve())):
        raise SystemExit(EXIT_BUG)  # its traceback was shown


def _run(module: str, *arguments: str) -> int:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr, check=False).returncode
