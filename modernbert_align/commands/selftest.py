"""`selftest`: proof that the comparison can fail, and that it does not fail without a reason."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from modernbert_align import __version__
from modernbert_align.backends import runtime
from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.fixtures import fixture_names
from modernbert_align.core.outcomes import Alarm, Outcome
from modernbert_align.core.rows import PHASES, Dtype, Mode, Phase
from modernbert_align.core.table import Table, load_table
from modernbert_align.core.text import command_line
from modernbert_align.core.verdict import RUNS
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, MissingPackageError, UsageError
from modernbert_align.report.schema import Environment
from modernbert_align.report.selftest_report import SelftestReport, write_selftest

if TYPE_CHECKING:
    from modernbert_align.engines.faults import Fault
    from modernbert_align.engines.selftest import Subject

ALL_HEADS = "all"
_LETTERS = {"hygiene": "H", "contract": "C", "noise": "N", "direct": "D"}


def run(
    *, dtype: str, head: str | None, model: str, phase: str | None, seeds: int, report_dir: Path, as_json: bool
) -> int:
    """Inject every fault into a fixture's candidate; returns the exit code: 1 for a survivor or a false alarm."""
    if dtype not in RUNS:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"one of {', '.join(RUNS)}")
    if model not in fixture_names():
        raise UsageError(f"`{model}` is not a fixture", hint=f"one of {', '.join(fixture_names())}")
    if phase not in (None, *PHASES):
        raise UsageError(f"unknown phase `{phase}`", hint=f"one of {', '.join(PHASES)}")
    phases: Sequence[Phase] = PHASES if phase is None else (phase,)
    if seeds < 0:
        raise UsageError(f"--seeds is {seeds}", hint="give 0 or more")
    table = load_table()
    if head not in (None, ALL_HEADS):
        table.check_head(head)
    runtime.pin()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only wait for each other on models this small
    console.notify("importing torch, transformers and paddle")
    try:
        from modernbert_align.engines.alignment import environment
        from modernbert_align.engines.faults import catalogue
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}", hint="run `modernbert-align doctor`") from None
    by_head = _by_head([fault for fault in catalogue().values() if fault.phase in phases], head)
    outcomes: list[Outcome] = []
    unbroken: list[Alarm | None] = []
    with tempfile.TemporaryDirectory(prefix="modernbert-align-") as temporary:
        for one in RUNS[dtype]:
            for chosen, faults in by_head.items():
                subject = _subject(model, chosen, one, table, Path(temporary) / f"{chosen}-{one}")
                tried, compared = _try(subject, faults, phases, seeds)
                outcomes += tried
                unbroken += compared
    alarms = [alarm for alarm in unbroken if alarm is not None]
    survivors = tuple(dict.fromkeys(outcome.name for outcome in outcomes if outcome.survived))
    false_alarms = len(alarms) + sum(outcome.false_alarm for outcome in outcomes)
    report = SelftestReport(
        tool_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        exit_code=EXIT_MISALIGNED if survivors or false_alarms else EXIT_ALIGNED,
        model=model,
        dtype=RUNS[dtype][-1],
        heads=tuple(by_head),
        phases=tuple(phases),
        seeds=seeds,
        table=table.id,
        table_sha256=table.digest,
        faults=tuple(outcomes),
        alarms=tuple(alarms),
        false_alarms=false_alarms,
        runs=len(unbroken),
        survivors=survivors,
        environment=Environment(**runtime.describe(), **environment()),  # type: ignore[arg-type]
        command=command_line(),
    ).sealed()
    json_path, html_path = write_selftest(report, report_dir)
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        _print(report)
        console.stdout().print(f"reports: {json_path}, {html_path}", soft_wrap=True, markup=False)
    return report.exit_code


def _by_head(faults: "Iterable[Fault]", head: str | None) -> "dict[str, list[Fault]]":
    """Which faults are tried on which head: without a choice each on its first, with `all` each on all it has."""
    found: dict[str, list[Fault]] = {"masked_lm" if head in (None, ALL_HEADS) else str(head): []}
    for fault in faults:
        for chosen in fault.heads[:1] if head is None else fault.heads:
            if head in (None, ALL_HEADS, chosen):
                found.setdefault(chosen, []).append(fault)
    return found


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


def _try(
    subject: "Subject", faults: Sequence["Fault"], phases: Sequence[Phase], seeds: int
) -> tuple[list[Outcome], list[Alarm | None]]:
    """All faults that the model can have in this precision, then models without one."""
    from modernbert_align.engines.selftest import unbroken

    applicable = [f for f in faults if subject.dtype in f.dtypes and f.applies(subject.config, subject.head)]
    outcomes = []
    for number, fault in enumerate(applicable, start=1):
        console.notify(f"{subject.head} {number}/{len(applicable)}: {fault.name}")
        outcomes.append(subject.try_fault(fault))
    alarms = []
    for number, alarm in enumerate(unbroken(subject, seeds, phases), start=1):
        said = alarm.verdict if alarm else "no alarm"
        console.notify(f"{subject.head}, no fault {number}/{(seeds + 1) * len(phases)}: {said}")
        alarms.append(alarm)
    return outcomes, alarms


def _print(report: SelftestReport) -> None:
    """The kill matrix, at most 100 columns wide, and the summary."""
    from rich.table import Table as Grid
    from rich.text import Text

    def letters(fault: Outcome, mode: Mode) -> str:
        return "".join(letter if name in fault.seen[mode] else "." for name, letter in _LETTERS.items())

    out = console.stdout()
    repeated = len(report.faults) > len({(fault.name, fault.dtype) for fault in report.faults})
    blocks: dict[str, list[Outcome]] = {}
    for fault in report.faults:
        blocks.setdefault(f"{fault.dtype}, {fault.head}" if repeated else fault.dtype, []).append(fault)
    for title, faults in blocks.items():
        if len(blocks) > 1:
            out.print(Text(title, style="bold"))
        grid = Grid(box=None, pad_edge=False, header_style="bold")
        for name in ("fault", "own", "end", "W", "effect", "found at", "outcome"):
            grid.add_column(name, no_wrap=True, justify="right" if name == "effect" else "left")
        for fault in faults:
            grid.add_row(
                Text(fault.name),
                letters(fault, "isolated"),
                letters(fault, "accumulated"),
                "W" if "weights" in fault.killed_by else ".",
                "-" if fault.effect is None else f"{fault.effect:.1e}",
                fault.first_probe or "-",
                Text(fault.said, style=_style(fault)),
            )
        out.print(grid)
    out.print(
        "own, end: criteria that saw it in the module itself and end to end (Hygiene, Contract, Noise, Direct); "
        "W: weights; effect: times rounding, in the module itself",
        soft_wrap=True,
    )
    for alarm in report.alarms:
        seed = "the fixture itself" if alarm.seed is None else f"seed {alarm.seed}"
        said = f"false alarm: {alarm.head}, {alarm.dtype}, {alarm.phase}, {seed}: {alarm.verdict}: {alarm.detail}"
        out.print(Text(said, style="red"), soft_wrap=True)
    for fault in report.faults:
        if fault.cause_wrong:
            said = f"wrong cause: {fault.name}, {fault.head}, {fault.dtype}: {' or '.join(fault.cause_names)}"
            out.print(Text(f"{said}; expected: {fault.expected_cause or 'none'}", style="red"), soft_wrap=True)
    out.print(report.summary, soft_wrap=True)


def _style(fault: Outcome) -> str:
    if fault.survived or fault.false_alarm:
        return "bold red"
    if not fault.killed:
        return "dim"
    return "green" if fault.first_probe == fault.expected_probe else "yellow"
