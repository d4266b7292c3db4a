"""`selftest`: proof that the comparison can fail, and that it does not fail without a reason."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from modernbert_align.backends import runtime
from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.fixtures import fixture_names
from modernbert_align.core.rows import Dtype, Mode
from modernbert_align.core.table import Table, load_table
from modernbert_align.core.verdict import RUNS
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, MissingPackageError, UsageError

if TYPE_CHECKING:
    from modernbert_align.engines.faults import Fault
    from modernbert_align.engines.selftest import Alarm, Outcome, Subject

_LETTERS = {"hygiene": "H", "contract": "C", "noise": "N", "direct": "D"}


def run(*, dtype: str, head: str | None, model: str, seeds: int, as_json: bool) -> int:
    """Inject every fault into a fixture's candidate; returns the exit code: 1 for a survivor or a false alarm."""
    if dtype not in RUNS:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"one of {', '.join(RUNS)}")
    if model not in fixture_names():
        raise UsageError(f"`{model}` is not a fixture", hint=f"one of {', '.join(fixture_names())}")
    if seeds < 0:
        raise UsageError(f"--seeds is {seeds}", hint="give 0 or more")
    table = load_table()
    if head is not None:
        table.check_head(head)
    runtime.pin()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only wait for each other on models this small
    console.notify("importing torch, transformers and paddle")
    try:
        from modernbert_align.engines.faults import catalogue
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}", hint="run `modernbert-align doctor`") from None
    by_head: dict[str, list[Fault]] = {head or "masked_lm": []}
    for fault in catalogue().values():
        if head is None or head in fault.heads:
            by_head.setdefault(head or fault.heads[0], []).append(fault)
    outcomes: list[Outcome] = []
    unbroken: list[Alarm | None] = []
    with tempfile.TemporaryDirectory(prefix="modernbert-align-") as temporary:
        for number, (chosen, faults) in enumerate(by_head.items()):
            subject = _subject(model, chosen, RUNS[dtype][-1], table, Path(temporary) / chosen)
            tried, compared = _try(subject, faults, seeds if number == 0 else 0)
            outcomes += tried
            unbroken += compared
    alarms = [alarm for alarm in unbroken if alarm is not None]
    survivors = [outcome.name for outcome in outcomes if outcome.survived]
    false_alarms = len(alarms) + sum(outcome.false_alarm for outcome in outcomes)
    if as_json:
        console.print_json(
            {
                "model": model,
                "dtype": dtype,
                "faults": [asdict(outcome) for outcome in outcomes],
                "false_alarms": false_alarms,
                "alarms": [asdict(alarm) for alarm in alarms],
                "runs": len(unbroken),
                "survivors": survivors,
            }
        )
    else:
        _print(outcomes, alarms, len(unbroken), survivors)
    return EXIT_MISALIGNED if survivors or false_alarms else EXIT_ALIGNED


def _subject(model: str, head: str, dtype: Dtype, table: Table, out: Path) -> "Subject":
    from modernbert_align.engines.selftest import Subject

    source = resolve_model(model, table, console.notify, head)
    assert source.fixture is not None  # its name is that of a fixture
    request = Request(
        folder=source.folder,
        model=source.name,
        revision=None,
        src="hf",
        dst="paddle",
        digest="none",  # the weights are compared in memory, bit for bit
        prove=(),
    )
    candidate = convert(request, table, out, force=False).out
    console.notify(f"loading {model} ({head}, {dtype}) in both frameworks")
    return Subject(source.fixture, source.folder, candidate, head, dtype, table)


def _try(subject: "Subject", faults: Sequence["Fault"], seeds: int) -> tuple[list["Outcome"], list["Alarm | None"]]:
    """All faults that the model can have in this precision, then models without one."""
    from modernbert_align.engines.selftest import unbroken

    applicable = [f for f in faults if subject.dtype in f.dtypes and f.applies(subject.config, subject.head)]
    outcomes = []
    for number, fault in enumerate(applicable, start=1):
        console.notify(f"{subject.head} {number}/{len(applicable)}: {fault.name}")
        outcomes.append(subject.try_fault(fault))
    alarms = []
    for number, alarm in enumerate(unbroken(subject, seeds)):
        console.notify(f"{subject.head}, no fault {number}/{seeds}: {alarm.verdict if alarm else 'no alarm'}")
        alarms.append(alarm)
    return outcomes, alarms


def _print(outcomes: Sequence["Outcome"], alarms: Sequence["Alarm"], runs: int, survivors: Sequence[str]) -> None:
    """The kill matrix, at most 100 columns wide."""
    from rich.table import Table as Grid
    from rich.text import Text

    def letters(outcome: "Outcome", mode: Mode) -> str:
        return "".join(letter if name in outcome.seen[mode] else "." for name, letter in _LETTERS.items())

    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in ("fault", "own", "end", "W", "effect", "found at", "outcome"):
        grid.add_column(name, no_wrap=True, justify="right" if name == "effect" else "left")
    for outcome in outcomes:
        said, style = _said(outcome)
        grid.add_row(
            Text(outcome.name),
            letters(outcome, "isolated"),
            letters(outcome, "accumulated"),
            "W" if "weights" in outcome.killed_by else ".",
            "-" if outcome.effect is None else f"{outcome.effect:.1e}",
            outcome.first_probe or "-",
            Text(said, style=style),
        )
    out = console.stdout()
    out.print(grid)
    out.print(
        "own, end: criteria that saw it in the module itself and end to end (Hygiene, Contract, Noise, Direct); "
        "W: weights; effect: times rounding, in the module itself",
        soft_wrap=True,
    )
    for alarm in alarms:
        seed = "the fixture itself" if alarm.seed is None else f"seed {alarm.seed}"
        out.print(
            Text(f"false alarm: {alarm.head}, {seed}: {alarm.verdict}: {alarm.detail}", style="red"), soft_wrap=True
        )
    expected = [outcome for outcome in outcomes if outcome.must_die]
    harmless = [outcome for outcome in outcomes if outcome.equivalent]
    out.print(
        f"{len(expected) - len(survivors)} of {len(expected)} faults found; "
        f"{sum(o.false_alarm for o in harmless)} alarms in {len(harmless)} harmless changes, "
        f"{len(alarms)} in {runs} comparisons without a fault"
    )


def _said(outcome: "Outcome") -> tuple[str, str]:
    """The last column, and its colour."""
    if outcome.equivalent:
        return ("false alarm", "red") if outcome.killed else ("equivalent", "dim")
    if outcome.survived:
        return "SURVIVED", "bold red"
    if not outcome.killed:
        return "within rounding", "dim"
    if outcome.first_probe != outcome.expected_probe:
        return f"killed, not at {outcome.expected_probe}", "yellow"
    return "killed", "green"
