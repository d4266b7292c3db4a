"""`convert`: one checkpoint from one framework's layout to the other's."""

import time
from pathlib import Path
from typing import Any

from modernbert_align.backends.sources import read_torch, resolve_model
from modernbert_align.commands import console
from modernbert_align.core.cast import SHORT_NAMES
from modernbert_align.core.convert import (
    PROOF_LEVELS,
    Conversion,
    ProofLevel,
    Request,
    Result,
    convert,
    plan_conversion,
)
from modernbert_align.core.digest import ALGORITHMS
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.output import parse_shard_size
from modernbert_align.core.plan import SIDE_NAMES, describe
from modernbert_align.core.rank_files import is_divided
from modernbert_align.core.table import load_table, table_for
from modernbert_align.errors import EXIT_ALIGNED, EXIT_USAGE, UsageError


def run(
    *,
    src: str,
    dst: str | None,
    model: str | None,
    out: Path | None,
    head: str | None,
    dtype: str,
    allow_overflow: bool,
    shard_size: str,
    tensor_parallel: int,
    merge: bool,
    digest: str,
    prove: str | None,
    table_name: str | None,
    dry_run: bool,
    resume: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Convert a checkpoint; returns the exit code."""
    dst = _check_direction(src, dst, tensor_parallel, merge)
    if tensor_parallel != 1 and shard_size != "keep":
        raise UsageError("--shard-size and --tensor-parallel exclude each other", hint="every rank has one file")
    if dtype != "keep" and dtype not in SHORT_NAMES:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"keep, {', '.join(SHORT_NAMES)}")
    if allow_overflow and dtype == "keep":
        raise UsageError("--allow-overflow needs a --dtype to cast to", hint="nothing is cast with --dtype keep")
    if digest not in ALGORITHMS:
        raise UsageError(f"unknown digest `{digest}`", hint=", ".join(ALGORITHMS))
    if model is None and src == "paddle":
        raise UsageError("--src paddle needs --model", hint="give the folder of the Paddle checkpoint")
    levels = _levels(prove, digest)
    table = load_table(table_name or "modernbert")
    if head is not None and model is None:
        table.check_head(head)
    source = resolve_model(model or "base", table, console.notify, head)
    if merge and not is_divided(source.folder):
        raise UsageError(f"there is nothing to --merge: `{source.folder}` is not divided among ranks")
    if table_name is None:
        table = table_for(read_config_file(source.folder), where=str(source.folder / "config.json"))
    if head is not None:
        table.check_head(head)
    request = Request(
        folder=source.folder,
        model=source.name,
        revision=source.revision,
        src=src,  # type: ignore[arg-type]
        dst=dst,  # type: ignore[arg-type]
        dtype=dtype,
        head=head,
        shard_size=parse_shard_size(shard_size),
        tensor_parallel=tensor_parallel,
        digest=digest,
        prove=levels,
        allow_overflow=allow_overflow,
        read_torch=read_torch,
    )
    suffix = (dst if head is None else f"{head}-{dst}") + (f"-tp{tensor_parallel}" if tensor_parallel > 1 else "")
    target = out if out is not None else Path("checkpoints") / f"{source.name}-{suffix}"
    if dry_run:
        plan = _plan_document(plan_conversion(request, table), source.folder, target)
        if as_json:
            console.print_json(plan)
        else:
            _show_plan(plan)
        return EXIT_USAGE if plan["problems"] else EXIT_ALIGNED
    start = time.perf_counter()
    with console.progress(f"converting {source.name}") as report:
        result = convert(request, table, target, force=force, resume=resume, progress=report, notify=console.notify)
    _show_result(result, time.perf_counter() - start, as_json)
    return EXIT_ALIGNED


def _check_direction(src: str, dst: str | None, tensor_parallel: int, merge: bool) -> str:
    """The framework of the output.

    Raises:
        UsageError: The options contradict each other.
    """
    if dst is None:
        if not merge:
            raise UsageError("--dst is missing", hint="hf or paddle; with --merge it is paddle by default")
        dst = "paddle"
    for option, value in (("--src", src), ("--dst", dst)):
        if value not in SIDE_NAMES:
            raise UsageError(f"unknown framework `{value}` for {option}", hint="hf or paddle")
    if merge and src != "paddle":
        raise UsageError("--merge joins the rank files of a Paddle checkpoint", hint="give it with --src paddle")
    if merge and tensor_parallel != 1:
        raise UsageError("--merge and --tensor-parallel exclude each other", hint="merge first, then divide")
    if tensor_parallel != 1 and dst != "paddle":
        raise UsageError("--tensor-parallel divides Paddle checkpoints only", hint="give it with --dst paddle")
    if src == dst and not (merge or tensor_parallel > 1):
        raise UsageError(
            f"--src and --dst are both `{src}`",
            hint="one of them is hf, the other paddle; of Paddle's own, --merge joins and --tensor-parallel divides",
        )
    return dst


def _levels(prove: str | None, digest: str) -> tuple[ProofLevel, ...]:
    if prove is None:
        return () if digest == "none" else ("tensors",)
    names = [name.strip() for name in prove.split(",")]
    if names == ["none"]:
        return ()
    for name in names:
        if name not in PROOF_LEVELS:
            raise UsageError(
                f"unknown proof `{name}`", hint=f"none, or one or more of {', '.join(PROOF_LEVELS)}, with commas"
            )
    return tuple(level for level in PROOF_LEVELS if level in names)


def _plan_document(conversion: Conversion, folder: Path, out: Path) -> dict[str, Any]:
    return {
        **describe(conversion.plan),
        "source": str(folder),
        "out": str(out),
        "needs_bytes": conversion.needs_bytes,
        "lossless": conversion.lossless,
        "files": [
            {"name": file.name, "tensors": len(file.items), "size_bytes": file.size_bytes}
            for file in conversion.outputs
        ],
        "carried": [path.name for path in conversion.carried],
    }


def _show_plan(plan: dict[str, Any]) -> None:
    line = console.line
    line(f"{plan['source']} -> {plan['out']}")
    agree, disagree = plan["layout"]["agree"], plan["layout"]["disagree"]
    line(f"layout   {SIDE_NAMES[plan['src']]}: {agree} of {agree + disagree} non-square Linear weights agree")
    line(f"model    head {plan['head']}, table {plan['table']}")
    if plan["ranks"] > 1:
        line(f"ranks    {plan['ranks']}, one file for each")
    line(f"dtype    {', '.join(plan['dtypes'])}{'' if plan['lossless'] else ' (loses bits)'}")
    for op, entry in plan["by_op"].items():
        line(f"rows     {op:<3} {entry['tensors']:>5} tensors {entry['size_bytes']:>16,} bytes")
    if plan["stacked"]:
        line(f"         {plan['stacked']} tensors are stacked from parts or parts of a stack")
    if plan["shape_blind"]:
        line(f"         {len(plan['shape_blind'])} transposed weights are square: only values can show a mistake")
    if plan["renamed"]:
        line(f"         {plan['renamed']} names are legacy spellings and are read as aliases")
    for repeated, original in plan["tied"]:
        line(f"tied     {repeated} repeats {original} and is left out")
    for name in plan["dropped"]:
        line(f"dropped  {name} belongs to another head")
    for file in plan["files"][:8]:
        line(f"file     {file['name']}  {file['tensors']} tensors {file['size_bytes']:>16,} bytes")
    if len(plan["files"]) > 8:
        line(f"         and {len(plan['files']) - 8} more files")
    line(f"disk     {plan['needs_bytes']:,} bytes are needed")
    for problem in plan["problems"]:
        line(f"problem  {problem['message']}")
        if problem["hint"]:
            line(f"         {problem['hint']}")
    line(f"nothing was written (dry run); {len(plan['problems'])} problems")


def _show_result(result: Result, wall_s: float, as_json: bool) -> None:
    manifest = result.manifest
    weights = [file for file in manifest.files if file.name.endswith(".safetensors")]
    if as_json:
        document = manifest.model_dump(mode="json")
        console.print_json({"out": str(result.out), "up_to_date": result.up_to_date, "manifest": document})
        return
    line = console.line
    if result.up_to_date:
        line(f"{result.out} is up to date ({len(manifest.tensors)} tensors)")
        return
    ranks = f" for {manifest.tensor_parallel} ranks" if manifest.tensor_parallel > 1 else ""
    line(
        f"{result.out}: {len(manifest.tensors)} tensors{ranks}, {sum(file.size_bytes for file in weights):,} bytes "
        f"in {wall_s:.1f} s, {'lossless' if manifest.lossless else f'rounded to {manifest.dtype}'}"
    )
    _show_casts(result)
    for proof in manifest.proofs:
        line(f"proved ({proof.level}): {proof.statement}")
    if not manifest.proofs:
        line("nothing was proved about it (--prove)")
    for file in weights:
        if file.digest is not None:
            line(f"{file.digest.replace(':', ' ')}  {file.name}")


def _show_casts(result: Result) -> None:
    casts = {name: record.cast for name, record in result.manifest.tensors.items() if record.cast is not None}
    if not casts:
        return
    worst = max(casts, key=lambda name: casts[name].max_abs)
    totals = {key: sum(getattr(cast, key) for cast in casts.values()) for key in ("overflow", "underflow", "nan")}
    console.line(
        f"cast of {len(casts)} tensors: largest error {casts[worst].max_abs:.3g} (`{worst}`), "
        f"{totals['overflow']} values overflowed, {totals['underflow']} became zero, {totals['nan']} are not a number"
    )
