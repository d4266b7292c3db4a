"""`gate`: judge saved reports again and decide whether CI may merge.

Nothing in a report is believed but its measurements: the verdict is made anew with the installed tolerances, the probes
are those the installed probe list gives for the recorded architecture, and the inputs must be those their seed gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modernbert_align.commands import console
from modernbert_align.core.fixtures import InputSpec, contract_fixture, fixture_names, load_fixture, make_inputs
from modernbert_align.core.model_config import ModelConfig, parse_config
from modernbert_align.core.probes import load_probes
from modernbert_align.core.rows import ATTENTIONS, MODES, PHASES
from modernbert_align.core.table import load_table
from modernbert_align.core.tensor_parallel import rank_expectation
from modernbert_align.core.tolerance import Override, load_tolerances
from modernbert_align.core.training import Run, phase_losses, phase_probes
from modernbert_align.core.verdict import (
    POLICIES,
    RUNS,
    Expectation,
    Judgement,
    Policy,
    default_policy,
    judge,
    only_by_own_limits,
)
from modernbert_align.errors import (
    EXIT_ALIGNED,
    EXIT_MISALIGNED,
    EXIT_NOT_COMPARED,
    ReportError,
    UsageError,
)
from modernbert_align.report.baselines import KEY_NAMES, Key, key_of, read_baselines, words
from modernbert_align.report.comparison import Comparison, compare_reports, judged_as
from modernbert_align.report.comparison_terminal import headline, movement, print_comparison
from modernbert_align.report.json_report import read_report
from modernbert_align.report.schema import Report
from modernbert_align.report.terminal import override_line


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One `--require`: a model, optionally head, phase, attention and ranks, and the dtypes that must be compared."""

    text: str
    model: str
    head: str | None
    phase: str
    attention: str
    tensor_parallel: int
    dtypes: tuple[str, ...]


def parse_requirement(text: str) -> Requirement:
    """Parse `model=base,dtype=fp32,dtype=bf16`.

    Raises:
        UsageError: It is not of that form.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    keys = ("model", "head", "phase", "attention", "tensor_parallel", "dtype")
    values: dict[str, list[str]] = {key: [] for key in keys}
    for key, sign, value in pairs:
        if key not in values or not sign or not value:
            raise UsageError(
                f"--require `{text}`: `{key}{sign}{value}` is not understood",
                hint="write model=NAME,dtype=fp32,dtype=bf16 and, if needed, head=NAME, phase=NAME, attention=NAME "
                "or tensor_parallel=RANKS",
            )
        values[key].append(value)
    known = {"dtype": tuple(RUNS), "phase": PHASES, "attention": ATTENTIONS}
    unknown = any(set(values[key]) - set(names) for key, names in known.items())
    several = any(len(values[key]) > 1 for key in ("head", "phase", "attention", "tensor_parallel"))
    unknown |= not all(value.isascii() and value.isdigit() and int(value) for value in values["tensor_parallel"])
    if len(values["model"]) != 1 or several or not values["dtype"] or unknown:
        raise UsageError(
            f"--require `{text}` needs one model, at most one head, one phase (of {', '.join(PHASES)}), one "
            f"attention (of {', '.join(ATTENTIONS)}) and one tensor_parallel, and dtypes out of {', '.join(RUNS)}",
            hint="for example --require model=base,dtype=fp32,dtype=bf16",
        )
    return Requirement(
        text=text,
        model=values["model"][0],
        head=values["head"][0] if values["head"] else None,
        phase=values["phase"][0] if values["phase"] else "forward",
        attention=values["attention"][0] if values["attention"] else "eager",
        tensor_parallel=int(values["tensor_parallel"][0]) if values["tensor_parallel"] else 1,
        dtypes=tuple(values["dtype"]),
    )


def check_policy(policy: str | None) -> Policy | None:
    """`policy` if it is one.

    Raises:
        UsageError: It is none.
    """
    if policy is not None and policy not in POLICIES:
        raise UsageError(f"unknown policy `{policy}`", hint=f"one of {', '.join(POLICIES)}")
    return policy


def run(
    *,
    reports: list[Path],
    baselines: list[str],
    require: list[str],
    policy: str | None,
    as_json: bool,
    overrides: Sequence[Override] = (),
) -> int:
    """Judge reports; returns the exit code.

    Args:
        baselines: Files, folders and patterns; none to compare with no baseline.
    """
    used_policy = check_policy(policy)
    if not reports:
        hint = (
            "every path after --baseline is a baseline: give the reports before it, or after `--`" if baselines else ""
        )
        raise UsageError("there is no report to judge", hint=hint or "modernbert-align gate REPORT.json...")
    requirements = [parse_requirement(text) for text in require]
    old = read_baselines(baselines)
    outcomes = [
        (path, report, rejudge(report, path, used_policy, overrides))
        for path in reports
        for report in [read_report(path)]
    ]
    trends = _trends(old, outcomes, overrides)
    unmet = [
        requirement.text
        for requirement in requirements
        if not all(any(_meets(report, requirement, dtype) for _, report, _ in outcomes) for dtype in requirement.dtypes)
    ]
    codes = {judgement.exit_code for _, _, judgement in outcomes} | ({EXIT_NOT_COMPARED} if unmet else set())
    codes |= {trend.exit_code for trend in trends}
    code = next((c for c in (EXIT_MISALIGNED, EXIT_NOT_COMPARED) if c in codes), EXIT_ALIGNED)
    if as_json:
        console.print_json(
            {
                "exit_code": code,
                "unmet": unmet,
                "reports": [
                    {
                        "path": str(path),
                        "model": report.model.name,
                        "head": report.model.head,
                        "dtype": report.dtype,
                        "phase": report.phase,
                        "steps": report.steps,
                        "attention": report.attention,
                        "tensor_parallel": report.tensor_parallel,
                        "verdict": judgement.verdict,
                        "exit_code": judgement.exit_code,
                        "overrides": [override.model_dump(mode="json") for override in judgement.overrides],
                        "coverage": judgement.coverage.model_dump(mode="json"),
                    }
                    for path, report, judgement in outcomes
                ],
                "baselines": [trend.document() for trend in trends if trend.baseline is not None],
                "without_baseline": [str(trend.path) for trend in trends if baselines and trend.baseline is None],
            }
        )
        return code
    out = console.stdout()
    quiet = console.is_quiet()
    for path, report, judgement in outcomes:
        own = only_by_own_limits(judgement.rows)
        if quiet and judgement.exit_code == EXIT_ALIGNED and not own:
            continue
        coverage = judgement.coverage
        out.print(
            f"{judgement.verdict:<12} {report.model.name} {report.model.head} {report.dtype} {report.run}: "
            f"{coverage.compared} of {coverage.expected} rows, {coverage.weights_compared} of "
            f"{coverage.weights_expected} weights{f', {own}' if own else ''}  {path}",
            soft_wrap=True,
            markup=False,
        )
        for override in judgement.overrides:
            out.print(f"  {override_line(override)}", soft_wrap=True, markup=False)
        if judgement.verdict != report.verdict:
            out.print(f"  the report says {report.verdict}; the limits that hold here decide", markup=False)
        if judgement.first_failing is not None:
            first = judgement.first_failing
            out.print(f"  first failing: {first.place}: {first.detail}", soft_wrap=True, markup=False)
    for trend in trends if baselines else ():
        if not quiet or trend.exit_code != EXIT_ALIGNED:
            trend.show()
    for text in unmet:
        out.print(f"NOT_COMPARED required {text}: no report covers it", soft_wrap=True, markup=False)
    out.print(f"gate: exit {code}")
    return code


@dataclass(frozen=True, kw_only=True)
class _Trend:
    """A judged report beside its baseline; one of the two may be absent."""

    key: Key
    path: Path | None
    baseline: Path | None
    comparison: Comparison | None

    @property
    def exit_code(self) -> int:
        """A baseline that nothing was compared with is a comparison that is no longer made."""
        if self.comparison is not None:
            return self.comparison.exit_code
        return EXIT_ALIGNED if self.baseline is None else EXIT_NOT_COMPARED

    def document(self) -> dict[str, Any]:
        """The outcome for machines."""
        return {
            "path": str(self.baseline),
            **dict(zip(KEY_NAMES, self.key, strict=True)),
            "report": str(self.path) if self.path is not None else None,
            "exit_code": self.exit_code,
            "comparison": self.comparison.model_dump(mode="json") if self.comparison is not None else None,
        }

    def show(self) -> None:
        """The outcome for people."""
        if self.baseline is None:
            console.line(f"no baseline  {words(self.key)}  {self.path}")
        elif self.comparison is None:
            console.line(f"NOT_COMPARED {words(self.key)}: no report for the baseline {self.baseline}")
        elif self.comparison.exit_code == EXIT_ALIGNED:
            console.line(f"{'baseline':<12} {words(self.key)}: {headline(self.comparison)}  {self.baseline}")
            console.line(f"  {movement(self.comparison)}")
            if self.comparison.environment:
                console.line(f"  changed since: {', '.join(setting.name for setting in self.comparison.environment)}")
        else:
            console.line(f"{'baseline':<12} {words(self.key)}  {self.baseline}")
            print_comparison(self.comparison, console.stdout())


def _trends(
    baselines: Mapping[Key, tuple[Path, Report]],
    outcomes: Sequence[tuple[Path, Report, Judgement]],
    overrides: Sequence[Override],
) -> list[_Trend]:
    trends = []
    for path, report, judgement in outcomes:
        key = key_of(report)
        known, comparison = baselines.get(key), None
        if known is not None:
            old = judged_as(known[1], rejudge(known[1], known[0], None, overrides))
            comparison = compare_reports(old, judged_as(report, judgement))
        baseline = known[0] if known is not None else None
        trends.append(_Trend(key=key, path=path, baseline=baseline, comparison=comparison))
    seen = {trend.key for trend in trends}
    return trends + [
        _Trend(key=key, path=None, baseline=path, comparison=None)
        for key, (path, _) in baselines.items()
        if key not in seen
    ]


def read_judged(path: Path, overrides: Sequence[Override] = ()) -> Report:
    """Read a report and judge it by the installed rules.

    Raises:
        ReportError: It cannot be read, or contradicts itself or what is installed.
    """
    report = read_report(path)
    judgement = rejudge(report, path, None, overrides)
    if judgement.verdict != report.verdict:
        console.notify(f"{path} says {report.verdict}; the installed tolerances say {judgement.verdict}")
    return judged_as(report, judgement)


def rejudge(report: Report, path: Path, policy: Policy | None, overrides: Sequence[Override] = ()) -> Judgement:
    """The verdict of a report's measurements under the installed rules.

    Args:
        overrides: Of the project that judges; those the report was made with count for nothing.

    Raises:
        ReportError: The report contradicts itself or what is installed.
    """
    config = _config(report, path)
    table = load_table()
    if report.model.head not in table.heads:
        raise ReportError(f"`{path}` is about the head `{report.model.head}`, which is not known here")
    try:
        spec = InputSpec(seed=report.inputs.seed, lengths=report.inputs.lengths)
        batch = make_inputs(spec, config, report.model.head)
    except ValueError as error:
        raise ReportError(f"`{path}` has inputs or a model that cannot be: {error}", hint="run `diff` again") from None
    if batch.sha256 != report.inputs.sha256:
        raise ReportError(f"the inputs of `{path}` are not those its seed and lengths give", hint="run `diff` again")
    try:
        run = Run(
            phase=report.phase,
            steps=report.steps,
            forward_engine="stream" if report.engine.name == "stream" else "padiff",
            attention=report.attention,
            tensor_parallel=report.tensor_parallel,
        )
    except ValueError as mixture:
        raise ReportError(f"`{path}` says {mixture}", hint="run `diff` again") from None
    prefix, entries = table.prefix(report.model.head), table.expand(config, report.model.head)
    rows = phase_probes(run, load_probes(config, report.model.head, prefix), entries, prefix)
    losses = phase_losses(report.phase, batch)
    dtypes = RUNS[report.dtype]
    fixture = contract_fixture(report.model.fixture)
    return judge(
        report.rows,
        report.weights,
        Expectation(
            probes=rows,
            dtypes=dtypes,
            weights=len(entries),
            fixture=fixture,
            needs={"padding": batch.padded, "the sliding window": batch.window_bites},
            phase=report.phase,
            losses=losses,
            ranks=rank_expectation(
                run.tensor_parallel, config, report.model.head, entries, len(rows) * len(losses) * len(MODES)
            ),
        ),
        load_tolerances(dtypes),
        policy or default_policy(fixture),
        overrides,
        report.ranks,
    )


def _config(report: Report, path: Path) -> ModelConfig:
    recorded = dict(report.model.config)
    try:
        config = ModelConfig.from_dict(recorded)
        whole = len(config.layer_types) == config.num_hidden_layers
    except TypeError:
        whole = False
    if not whole:
        raise ReportError(f"`{path}` records an architecture that is not one", hint="run `diff` again")
    if report.model.fixture is None:
        return config
    fixture, _ = load_fixture(report.model.fixture)
    ids = {"pad_token_id": fixture.tokenizer.pad_token_id}
    if (
        parse_config({"model_type": "modernbert", **fixture.config, **ids}) != config
        or report.model.name != fixture.name
    ):
        raise ReportError(
            f"`{path}` claims to be the fixture `{fixture.name}` and has another architecture", hint="run `diff` again"
        )
    if report.inputs.lengths != fixture.inputs.lengths or report.inputs.seed != fixture.inputs.seed:
        raise ReportError(f"`{path}` did not use the inputs of the fixture `{fixture.name}`", hint="run `diff` again")
    return config


def _meets(report: Report, requirement: Requirement, dtype: str) -> bool:
    return (
        report.model.name == requirement.model
        and (report.model.kind == "fixture" or requirement.model not in fixture_names())
        and requirement.head in (None, report.model.head)
        and requirement.phase == report.phase
        and requirement.attention == report.attention
        and requirement.tensor_parallel == report.tensor_parallel
        and dtype in RUNS[report.dtype]
    )
