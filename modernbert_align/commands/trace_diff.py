"""`diff` of two traces: reads both files and judges them; no framework is imported."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from modernbert_align import __version__
from modernbert_align.backends import runtime
from modernbert_align.commands import console
from modernbert_align.commands.diff import thresholds
from modernbert_align.core.files import kind_of
from modernbert_align.core.fixtures import contract_fixture
from modernbert_align.core.hints import hints
from modernbert_align.core.rows import Dtype
from modernbert_align.core.table import Table
from modernbert_align.core.text import command_line
from modernbert_align.core.tolerance import Override, load_tolerances
from modernbert_align.core.trace_compare import TracePair, compare_traces, pair_traces, weight_checks
from modernbert_align.core.trace_file import TraceFile, open_trace
from modernbert_align.core.verdict import Expectation, Policy, default_policy, judge
from modernbert_align.errors import UsageError
from modernbert_align.report.schema import Engine, Environment, Execution, InputInfo, ModelInfo, Report, TraceInfo


def check_arguments(
    reference: Path | None, candidate: Path | None, given: Mapping[str, str | None]
) -> tuple[Path, Path]:
    """The two files, if that is what the command line names and nothing contradicts them.

    Args:
        given: Options that traces leave no choice about.

    Raises:
        UsageError: Only one side is a trace, or one of those options was given.
    """
    if reference is None:
        raise UsageError(
            f"`{candidate}` is a file and no checkpoint folder",
            hint="if it is a trace, name the reference's with --reference",
        )
    for path in (reference, *([candidate] if candidate is not None else [])):
        if kind_of(path) == "folder":
            raise UsageError(
                f"`{path}` is a folder: either both sides are traces or neither is",
                hint="a reference's folder is named with --model",
            )
    if candidate is None:
        raise UsageError("--reference is a trace and needs the candidate's", hint="name it with --candidate")
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} cannot be chosen for traces", hint="leave it out: the traces say it")
    return reference, candidate


def compare(
    reference: Path,
    candidate: Path,
    dtype: Dtype | None,
    policy: Policy | None,
    table: Table,
    overrides: Sequence[Override] = (),
) -> Report:
    """Judge two traces with the installed tolerances and probe list.

    Args:
        dtype: What the traces must be of; None for whatever they are.

    Raises:
        TraceError: A file is no whole trace, or they do not belong together.
    """
    start = time.perf_counter()
    pair = pair_traces(open_trace(reference), open_trace(candidate), table)
    if dtype not in (None, pair.dtypes[-1]):
        raise UsageError(
            f"--dtype is {dtype}, and the traces are of {pair.dtypes[-1]}", hint="leave it out: the traces say it"
        )
    console.notify(f"comparing two traces of {len(pair.probes)} probes in {', '.join(pair.dtypes)}")
    records, weights = compare_traces(pair), weight_checks(pair)
    theirs, ours = pair.reference.document, pair.candidate.document
    tolerances = load_tolerances(pair.dtypes)
    fixture = contract_fixture(theirs.model.fixture)
    used_policy = policy or default_policy(fixture)
    judgement = judge(
        records,
        weights,
        Expectation(
            probes=pair.probes,
            dtypes=pair.dtypes,
            weights=len(pair.entries),
            fixture=fixture,
            needs={"padding": pair.batch.padded, "the sliding window": pair.batch.window_bites},
        ),
        tolerances,
        used_policy,
        overrides,
    )
    return Report(
        tool_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        verdict=judgement.verdict,
        exit_code=judgement.exit_code,
        policy=used_policy,
        dtype=pair.dtypes[-1],
        phase="forward",
        steps=None,
        attention="eager",
        tensor_parallel=1,
        ranks=(),
        execution={name: Execution(reference="native", candidate=ours.execution[name]) for name in pair.dtypes},
        model=_model_info(pair),
        conversion=None,
        inputs=InputInfo(
            seed=theirs.inputs.seed,
            lengths=theirs.inputs.lengths,
            sha256=pair.batch.sha256,
            padded=pair.batch.padded,
            window_bites=pair.batch.window_bites,
        ),
        thresholds=thresholds(tolerances, judgement),
        overrides=judgement.overrides,
        coverage=judgement.coverage,
        weights=weights,
        rows=judgement.rows,
        first_failing=judgement.first_failing,
        hints=hints(judgement, weights, ()) if judgement.verdict != "PASS" else (),
        engine=Engine(
            name="trace",
            version=__version__,
            passes=(),
            traces=(_trace_info("reference", pair.reference), _trace_info("candidate", pair.candidate)),
        ),
        environment=Environment(
            **runtime.describe(),
            torch_cpu_capability=theirs.machine.torch_cpu_capability,
            torch_threads=theirs.machine.torch_threads,
            paddle_device=ours.machine.paddle_device,
        ),
        timings_s={"trace": round(time.perf_counter() - start, 3)},
        command=command_line(),
    ).sealed()


def _model_info(pair: TracePair) -> ModelInfo:
    theirs, ours = pair.reference.document.model, pair.candidate.document.model
    return ModelInfo(
        name=theirs.name,
        kind=theirs.kind,
        fixture=theirs.fixture,
        revision=theirs.revision,
        head=theirs.head,
        architecture=theirs.architecture,
        candidate=ours.checkpoint,
        reference_sha256=theirs.files_sha256,
        candidate_sha256=ours.files_sha256,
        table=theirs.table,
        table_sha256=theirs.table_sha256,
        config=theirs.config,
        candidate_config_differences=(),
    )


def _trace_info(side: Literal["reference", "candidate"], file: TraceFile) -> TraceInfo:
    document = file.document
    return TraceInfo(
        side=side,
        file=str(file.path),
        content_sha256=document.content_sha256,
        created=document.created,
        tool_version=document.tool_version,
        machine=document.machine,
    )
