"""`trace`: record one side of a comparison into a file, for a `diff` on any machine."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from modernbert_align import __version__
from modernbert_align.backends import runtime
from modernbert_align.backends.sources import ModelSource, name_model, resolve_model
from modernbert_align.commands import console
from modernbert_align.commands.diff import convert_now, weights_digest
from modernbert_align.core.checkpoint import open_checkpoint
from modernbert_align.core.convert import check_head
from modernbert_align.core.drawn import drawn_digest
from modernbert_align.core.files import kind_of
from modernbert_align.core.fixtures import Inputs, default_inputs, make_inputs
from modernbert_align.core.model_config import ModelConfig, parse_config, read_config_file
from modernbert_align.core.plan import make_plan
from modernbert_align.core.probes import Probe, load_probes
from modernbert_align.core.rows import Dtype
from modernbert_align.core.table import Side, Table, load_table
from modernbert_align.core.text import command_line
from modernbert_align.core.trace import (
    BACKENDS,
    Backend,
    Trace,
    TracedInputs,
    TracedModel,
    probes_digest,
)
from modernbert_align.core.trace_file import TraceWriter, header_room
from modernbert_align.core.verdict import RUNS
from modernbert_align.errors import EXIT_ALIGNED, MissingPackageError, UsageError

if TYPE_CHECKING:
    from modernbert_align.engines.trace_side import Recorded


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """One side, found and read but not loaded.

    Attributes:
        folder: What will be loaded.
        checkpoint: See `TracedModel`.
    """

    source: ModelSource
    folder: Path
    checkpoint: str
    config: ModelConfig
    head: str
    batch: Inputs
    probes: tuple[Probe, ...]


def run(
    *, backend: str, out: Path, model: str, candidate: Path | None, dtype: str, head: str | None, force: bool
) -> int:
    """Record one side; returns the exit code."""
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend `{backend}`", hint=f"one of {', '.join(BACKENDS)}")
    if dtype not in RUNS:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"one of {', '.join(RUNS)}")
    if candidate is not None and backend == "hf":
        raise UsageError("--candidate is a Paddle checkpoint, and --backend hf records the reference")
    if kind_of(out) == "folder":
        raise UsageError(f"`{out}` is a directory", hint="give the name of a file")
    if kind_of(out) == "file" and not force:
        raise UsageError(f"`{out}` exists", hint="choose another name, or replace it with --force")
    table = load_table()
    if head is not None:
        table.check_head(head)
    with ExitStack() as stack:
        subject = _subject(backend, model, candidate, head, table, stack)
        dtypes = RUNS[dtype]
        writer = stack.enter_context(TraceWriter(out, header_room(len(subject.probes), len(dtypes))))
        recorded = _record(backend, subject, dtypes, table, writer)
        document = _document(backend, subject, dtypes, table, recorded, writer.digests)
        writer.finish(document)
    for one in document.passes:
        if one.error:
            console.notify(f"{one.dtype}: the {one.mode} pass ended early: {one.error}")
    what = f"{backend} {subject.source.name} {subject.head} {dtype}"
    console.line(f"{out}: {what}, {len(subject.probes)} probes, {len(document.tensors)} tensors")
    return EXIT_ALIGNED


def _subject(
    backend: Backend, model: str, candidate: Path | None, head: str | None, table: Table, stack: ExitStack
) -> _Subject:
    if candidate is None:
        source = resolve_model(model, table, console.notify, head)
        folder = source.folder
    else:
        source = name_model(model, candidate)
        folder = candidate
    raw = read_config_file(folder)
    where = str(folder / "config.json")
    config = parse_config(raw, where=where)
    declared = table.head_of(raw.get("architectures"), where=where)
    layout: tuple[Side, Side] = ("hf", "paddle") if candidate is None else ("paddle", "hf")
    make_plan(open_checkpoint(folder), table, config, declared, *layout, None)  # refuses what is not of that side
    chosen = check_head(head or declared, declared, source.name)
    checkpoint = "" if backend == "hf" else "converted" if candidate is None else str(candidate)
    if backend == "paddle" and candidate is None:
        folder = convert_now(source, table, stack)
    return _Subject(
        source=source,
        folder=folder,
        checkpoint=checkpoint,
        config=config,
        head=chosen,
        batch=make_inputs(source.inputs or default_inputs(config), config, chosen),
        probes=load_probes(config, chosen, table.prefix(chosen)),
    )


def _record(
    backend: Backend, subject: _Subject, dtypes: tuple[Dtype, ...], table: Table, writer: TraceWriter
) -> "Recorded":
    runtime.pin()
    console.notify("importing " + ("torch and transformers" if backend == "hf" else "paddle"))
    try:
        from modernbert_align.engines.trace_side import Subject

        recorded = Subject(
            architecture=table.architecture(subject.head),
            head=subject.head,
            batch=subject.batch,
            probes=subject.probes,
            entries=table.expand(subject.config, subject.head),
            dtypes=dtypes,
        )
        if backend == "hf":
            from modernbert_align.engines import trace_hf
        else:
            from modernbert_align.engines import trace_paddle
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}", hint="run `modernbert-align doctor`") from None
    if backend == "hf":
        return trace_hf.record(subject.folder, subject.config, recorded, writer, console.notify)
    return trace_paddle.record(subject.folder, recorded, writer, console.notify)


def _document(
    backend: Backend,
    subject: _Subject,
    dtypes: tuple[Dtype, ...],
    table: Table,
    recorded: "Recorded",
    tensors: dict[str, str],
) -> Trace:
    source, batch = subject.source, subject.batch
    return Trace(
        tool_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        backend=backend,
        dtypes=dtypes,
        model=TracedModel(
            name=source.name,
            kind=source.kind,
            fixture=source.fixture.name if source.fixture else None,
            revision=source.revision,
            head=subject.head,
            architecture=table.architecture(subject.head),
            checkpoint=subject.checkpoint,
            files_sha256=weights_digest(subject.folder),
            table=table.id,
            table_sha256=table.digest,
            config=asdict(subject.config),
        ),
        inputs=TracedInputs(
            seed=batch.spec.seed,
            lengths=batch.spec.lengths,
            sha256=batch.sha256,
            padded=batch.padded,
            window_bites=batch.window_bites,
            drawn_sha256=drawn_digest(batch.sha256),
        ),
        probes_sha256=probes_digest(subject.probes),
        absent=recorded.absent,
        passes=recorded.passes,
        weights=recorded.weights,
        execution=recorded.execution,
        machine=recorded.machine,
        timings_s=recorded.timings_s,
        command=command_line(),
        tensors=tensors,
    ).sealed()
