"""`diff`: run both models, judge, report."""

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from modernbert_align import __version__
from modernbert_align.backends import runtime
from modernbert_align.backends.ranks import DEFAULT_TIMEOUT_S
from modernbert_align.backends.sources import ModelSource, resolve_model
from modernbert_align.commands import console
from modernbert_align.core.checkpoint import open_checkpoint
from modernbert_align.core.convert import Request, check_head, convert
from modernbert_align.core.digest import file_sha256
from modernbert_align.core.files import kind_of
from modernbert_align.core.fixtures import Inputs, contract_fixture, default_inputs, make_inputs
from modernbert_align.core.hints import hints
from modernbert_align.core.manifest import read_manifest
from modernbert_align.core.model_config import ModelConfig, parse_config, read_config_file
from modernbert_align.core.plan import make_plan
from modernbert_align.core.probes import load_probes
from modernbert_align.core.rows import ATTENTIONS, ENGINES, MODES, PHASES, Dtype, Phase, RankCheck, Record, WeightCheck
from modernbert_align.core.table import Entry, Table, load_table
from modernbert_align.core.tensor_parallel import MOST_RANKS, check_degree, rank_expectation
from modernbert_align.core.text import command_line, name_text
from modernbert_align.core.tolerance import Override, Tolerance, load_tolerances
from modernbert_align.core.training import DEFAULT_STEPS, FEWEST_STEPS, MOST_STEPS, Run, phase_losses, phase_probes
from modernbert_align.core.verdict import POLICIES, RUNS, Expectation, Judgement, default_policy, judge
from modernbert_align.errors import MissingPackageError, UsageError
from modernbert_align.report.formats import parse_formats, publish, write_formats
from modernbert_align.report.schema import (
    ConversionInfo,
    Engine,
    EnginePass,
    Environment,
    Execution,
    InputInfo,
    ModelInfo,
    Report,
    Threshold,
)
from modernbert_align.report.terminal import print_report, verdict_line


def run(
    *,
    dtype: str | None,
    model: str | None,
    reference: Path | None,
    candidate: Path | None,
    head: str | None,
    report_dir: Path,
    formats: str,
    policy: str | None,
    engine: str | None,
    phase: str,
    steps: int | None,
    attention: str,
    tensor_parallel: int,
    rank_timeout: float | None,
    as_json: bool,
    overrides: Sequence[Override] = (),
    typed: Collection[str] = (),
) -> int:
    """Compare a checkpoint in both frameworks, or two traces; returns the exit code.

    Args:
        typed: Which of these stand on the command line. Traces say themselves what they hold; defaults from elsewhere,
            which are meant for live comparisons, do not contradict them.
    """
    if dtype is not None and dtype not in RUNS:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"one of {', '.join(RUNS)}")
    if phase not in PHASES:
        raise UsageError(f"unknown phase `{phase}`", hint=f"one of {', '.join(PHASES)}")
    if engine is not None and phase != "forward":
        raise UsageError(f"--engine chooses what drives the forward phase, not {phase}", hint="leave it out")
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"unknown engine `{engine}`", hint=f"one of {', '.join(ENGINES)}")
    if attention not in ATTENTIONS:
        raise UsageError(f"unknown attention `{attention}`", hint=f"one of {', '.join(ATTENTIONS)}")
    if attention != "eager" and phase != "forward":
        raise UsageError(f"{attention} attention is compared in the forward phase, not {phase}", hint="leave one out")
    if attention != "eager" and engine == "padiff":
        raise UsageError(f"the engine padiff cannot look into {attention} attention", hint="choose --engine stream")
    if tensor_parallel > 1 and engine == "padiff":
        raise UsageError("the engine padiff cannot look into several processes", hint="choose --engine stream")
    if rank_timeout is not None and tensor_parallel == 1:
        raise UsageError("--rank-timeout is for --tensor-parallel 2 and more", hint="leave it out")
    if rank_timeout is not None and not 0 < rank_timeout < math.inf:
        raise UsageError(f"--rank-timeout is {rank_timeout:g}", hint="give a number of seconds above 0")
    if steps is not None and phase != "step":
        raise UsageError(f"--steps is for --phase step, not {phase}", hint="leave it out")
    if steps is not None and not FEWEST_STEPS <= steps <= MOST_STEPS:
        raise UsageError(f"--steps is {steps}", hint=f"give {FEWEST_STEPS} to {MOST_STEPS}")
    if policy is not None and policy not in POLICIES:
        raise UsageError(f"unknown policy `{policy}`", hint=f"one of {', '.join(POLICIES)}")
    names = parse_formats(formats)
    if not 1 <= tensor_parallel <= MOST_RANKS:
        raise UsageError(f"--tensor-parallel is {tensor_parallel}", hint=f"give 1 to {MOST_RANKS}")
    how = Run(
        phase=phase,
        forward_engine=engine or ("stream" if attention != "eager" or tensor_parallel > 1 else "padiff"),
        steps=(steps or DEFAULT_STEPS) if phase == "step" else None,
        attention=attention,
        tensor_parallel=tensor_parallel,
    )
    table = load_table()
    if reference is not None or (candidate is not None and kind_of(candidate) == "file"):
        from modernbert_align.commands import trace_diff

        chosen = {
            "model": model,
            "head": head,
            "engine": engine,
            "phase": None if phase == "forward" else phase,
            "attention": None if attention == "eager" else attention,
            "tensor-parallel": None if tensor_parallel == 1 else str(tensor_parallel),
        }
        given = {f"--{name}": value if name in typed else None for name, value in chosen.items()}
        paths = trace_diff.check_arguments(reference, candidate, given)
        report = trace_diff.compare(*paths, dtype if "dtype" in typed else None, policy, table, overrides)  # type: ignore[arg-type]
    else:
        if head is not None:
            table.check_head(head)
        source = resolve_model(model or "base", table, console.notify, head)
        with ExitStack() as stack:
            timeout_s = rank_timeout or DEFAULT_TIMEOUT_S
            dtypes = RUNS[dtype or "fp32"]
            report = _compare(source, candidate, head, dtypes, policy, table, how, timeout_s, overrides, stack)
    stem = f"diff-{report.model.name}-{report.model.head}-{report.dtype}"
    if phase != "forward":
        stem += f"-{phase}"
    if attention != "eager":
        stem += f"-{attention}"
    if tensor_parallel > 1:
        stem += f"-tp{tensor_parallel}"
    written = write_formats(report, names, report_dir, stem)
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    elif console.is_quiet():
        console.stdout().print(verdict_line(report), soft_wrap=True)
    else:
        print_report(report, console.stdout(), timings=console.is_verbose())
        if written:
            console.line(f"reports: {', '.join(map(str, written))}")
    publish(report, names, lambda text: console.verbatim(text, on_stderr=as_json))
    return report.exit_code


def _compare(
    source: ModelSource,
    candidate: Path | None,
    head: str | None,
    dtypes: tuple[Dtype, ...],
    policy: str | None,
    table: Table,
    how: Run,
    rank_timeout_s: float,
    overrides: Sequence[Override],
    stack: ExitStack,
) -> Report:
    raw = read_config_file(source.folder)
    where = str(source.folder / "config.json")
    config = parse_config(raw, where=where)
    declared = table.head_of(raw.get("architectures"), where=where)
    make_plan(
        open_checkpoint(source.folder), table, config, declared, "hf", "paddle", None
    )  # refuses what is no HF model
    chosen = check_head(head or declared, declared, source.name)
    batch = make_inputs(source.inputs or default_inputs(config), config, chosen)
    if how.attention != "eager" and chosen == "question_answering" and batch.padded:
        raise UsageError(
            f"the reference's loss of {chosen} counts padding, which {how.attention} attention does not compute",
            hint="choose --attention eager, or another head: the encoder is the same",
        )
    entries = table.expand(config, chosen)
    check_degree(config, entries, how.tensor_parallel)
    folder, differences = _candidate(source, candidate, config, chosen, table, stack)
    runtime.pin()
    console.notify("importing torch, transformers, paddle and padiff")
    try:
        from modernbert_align.engines import alignment
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}", hint="run `modernbert-align doctor`") from None
    probes = load_probes(config, chosen, table.prefix(chosen))
    rows, losses = phase_probes(how, probes, entries, table.prefix(chosen)), phase_losses(how.phase, batch)
    tolerances = load_tolerances(dtypes)
    fixture = contract_fixture(source.fixture.name if source.fixture else None)
    used_policy = policy or default_policy(fixture)

    def judged(
        records: Sequence[Record],
        weights: Sequence[WeightCheck],
        of: tuple[Dtype, ...],
        ranks: Sequence[RankCheck] = (),
    ) -> Judgement:
        return judge(
            records,
            weights,
            Expectation(
                probes=rows,
                dtypes=of,
                weights=len(entries),
                fixture=fixture,
                needs={"padding": batch.padded, "the sliding window": batch.window_bites},
                phase=how.phase,
                losses=losses,
                ranks=rank_expectation(
                    how.tensor_parallel, config, chosen, entries, len(rows) * len(losses) * len(MODES)
                ),
            ),
            tolerances,
            used_policy,  # type: ignore[arg-type]
            overrides,
            ranks,
        )

    result = alignment.run_alignment(
        source.folder,
        folder,
        table.architecture(chosen),
        config,
        chosen,
        how,
        table.prefix(chosen),
        entries,
        probes,
        batch,
        dtypes,
        console.notify,
        lambda records, check: judged(records, [check], (check.dtype,)),
        rank_timeout_s,
    )
    judgement = judged(result.records, result.weights, dtypes, result.ranks)
    described = runtime.describe()
    return Report(
        tool_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        verdict=judgement.verdict,
        exit_code=judgement.exit_code,
        policy=used_policy,  # type: ignore[arg-type]
        dtype=dtypes[-1],
        phase=how.phase,
        steps=how.steps,
        attention=how.attention,
        tensor_parallel=how.tensor_parallel,
        execution={
            d: Execution(reference="native", candidate=result.execution[d])  # type: ignore[arg-type]
            for d in dtypes
        },
        model=_model_info(source, folder, candidate, config, chosen, differences, table),
        conversion=conversion_info(folder, table, entries),
        inputs=_input_info(batch),
        thresholds=thresholds(tolerances, judgement, how.phase),
        overrides=judgement.overrides,
        coverage=judgement.coverage,
        weights=result.weights,
        ranks=result.ranks,
        rows=judgement.rows,
        first_failing=judgement.first_failing,
        cause=result.cause,
        hints=hints(judgement, result.weights, differences, result.cause, how.phase)
        if judgement.verdict != "PASS"
        else (),
        engine=Engine(
            name=how.engine,
            version=described["versions"].get("padiff", "unknown") if how.engine == "padiff" else __version__,
            passes=tuple(EnginePass(**vars(note)) for note in result.passes),
        ),
        environment=Environment(**described, **alignment.environment()),  # type: ignore[arg-type]
        timings_s=result.timings_s,
        command=command_line(),
    ).sealed()


def _candidate(
    source: ModelSource, candidate: Path | None, config: ModelConfig, head: str, table: Table, stack: ExitStack
) -> tuple[Path, tuple[str, ...]]:
    """The Paddle folder to compare, and how its architecture differs from the reference's."""
    if candidate is None:
        return convert_now(source, table, stack), ()
    checkpoint = open_checkpoint(candidate)
    raw = read_config_file(candidate)
    where = str(candidate / "config.json")
    own = parse_config(raw, where=where)
    declared = table.head_of(raw.get("architectures"), where=where)
    make_plan(checkpoint, table, own, declared, "paddle", "hf", None)
    check_head(head, declared, str(candidate))
    theirs, ours = asdict(config), asdict(own)
    return candidate, tuple(
        f"{key} is {ours[key]}, the reference's is {theirs[key]}" for key in ours if ours[key] != theirs[key]
    )


def convert_now(source: ModelSource, table: Table, stack: ExitStack) -> Path:
    """The source's Paddle conversion, gone when the stack unwinds."""
    console.notify(f"converting {source.name}")
    temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modernbert-align-")))
    request = Request(
        folder=source.folder,
        model=source.name,
        revision=source.revision,
        src="hf",
        dst="paddle",
        digest="none",  # the weights are compared in memory, bit for bit
        prove=(),
    )
    return convert(request, table, temporary / "candidate", force=False).out


def weights_digest(folder: Path) -> str:
    """SHA-256 over the SHA-256 of every weight file of a checkpoint."""
    digest = hashlib.sha256()
    for path in open_checkpoint(folder).files:
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def _model_info(
    source: ModelSource,
    folder: Path,
    candidate: Path | None,
    config: ModelConfig,
    head: str,
    differences: tuple[str, ...],
    table: Table,
) -> ModelInfo:
    return ModelInfo(
        name=name_text(source.name),
        kind=source.kind,
        fixture=source.fixture.name if source.fixture else None,
        revision=source.revision,
        head=head,
        architecture=table.architecture(head),
        candidate="converted" if candidate is None else name_text(str(candidate)),
        reference_sha256=weights_digest(source.folder),
        candidate_sha256=weights_digest(folder),
        table=table.id,
        table_sha256=table.digest,
        config=asdict(config),
        candidate_config_differences=differences,
    )


def conversion_info(folder: Path, table: Table, entries: Sequence[Entry]) -> ConversionInfo | None:
    """What a candidate's conversion manifest says of how it was made, in short.

    Args:
        entries: The table for the model; its operations are counted if the folder was made by this very table.

    Raises:
        CheckpointError: The manifest cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    same_table = manifest.table_sha256 == table.digest
    return ConversionInfo(
        dtype=manifest.dtype,
        lossless=manifest.lossless,
        table=manifest.table,
        table_sha256=manifest.table_sha256,
        tensors=len(manifest.tensors),
        files=len(manifest.files),
        size_bytes=sum(file.size_bytes for file in manifest.files),
        operations=dict(Counter(entry.op.name for entry in entries)) if same_table else {},
        tied=manifest.tied,
        dropped=manifest.dropped,
        proofs=tuple(proof.statement for proof in manifest.proofs),
    )


def _input_info(batch: Inputs) -> InputInfo:
    return InputInfo(
        seed=batch.spec.seed,
        lengths=batch.spec.lengths,
        sha256=batch.sha256,
        padded=batch.padded,
        window_bites=batch.window_bites,
    )


def thresholds(
    tolerances: Mapping[Dtype, Tolerance], judgement: Judgement, phase: Phase = "forward"
) -> tuple[Threshold, ...]:
    """The numbers that decide in a phase."""
    found = []
    for dtype, t in tolerances.items():
        under_contract = any(row.contract for row in judgement.rows if row.dtype == dtype)
        noise, direct = t.criteria(phase).noise, t.criteria(phase).direct
        small = f"null_ratio, at most {direct.small_elements} elements"
        small_noise = f"noise_ratio, at most {noise.small_elements} elements"
        numbers: tuple[tuple[Literal["contract", "noise", "direct"], str, float, str, bool], ...] = (
            ("contract", "mean_abs", t.contract.mean_abs, t.contract.origin, under_contract),
            ("noise", "noise_ratio", noise.factor, noise.origin, True),
            ("noise", small_noise, noise.small_factor, noise.small_origin, True),
            ("direct", "null_ratio", direct.factor, direct.origin, True),
            ("direct", small, direct.small_factor, direct.small_origin, True),
        )
        found += [
            Threshold(dtype=dtype, criterion=criterion, measure=measure, value=value, origin=origin, applied=applied)
            for criterion, measure, value, origin, applied in numbers
        ]
    return tuple(found)
