"""`convert`: one checkpoint from one framework's layout to the other's."""

import time
from pathlib import Path
from typing import Any

from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.cast import SHORT_NAMES
from modernbert_align.core.convert import Request, Result, convert, plan_conversion
from modernbert_align.core.plan import SIDE_NAMES, describe
from modernbert_align.core.table import load_table
from modernbert_align.errors import UsageError


def run(
    *,
    src: str,
    dst: str,
    model: str | None,
    out: Path | None,
    head: str | None,
    dtype: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Convert a checkpoint; returns the exit code."""
    for option, value in (("--src", src), ("--dst", dst)):
        if value not in SIDE_NAMES:
            raise UsageError(f"unknown framework `{value}` for {option}", hint="hf or paddle")
    if src == dst:
        raise UsageError(f"--src and --dst are both `{src}`", hint="one of them is hf, the other paddle")
    if dtype != "keep" and dtype not in SHORT_NAMES:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"keep, {', '.join(SHORT_NAMES)}")
    if model is None and src == "paddle":
        raise UsageError("--src paddle needs --model", hint="give the folder of the Paddle checkpoint")
    table = load_table()
    if head is not None:
        table.check_head(head)
    source = resolve_model(model or "base", table, console.notify, head)
    request = Request(
        folder=source.folder,
        model=source.name,
        revision=source.revision,
        src=src,  # type: ignore[arg-type]
        dst=dst,  # type: ignore[arg-type]
        dtype=dtype,
        head=head,
    )
    suffix = dst if head is None else f"{head}-{dst}"
    target = out if out is not None else Path("checkpoints") / f"{source.name}-{suffix}"
    if dry_run:
        plan, _ = plan_conversion(request, table)
        _show_plan({**describe(plan), "source": str(source.folder), "out": str(target)}, as_json)
        return 0
    start = time.perf_counter()
    with console.progress(f"converting {source.name}") as report:
        result = convert(request, table, target, force=force, progress=report)
    _show_result(result, time.perf_counter() - start, as_json)
    return 0


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(plan)
        return
    out = console.stdout()
    out.print(f"{plan['source']} -> {plan['out']}", soft_wrap=True, markup=False)
    out.print(f"head {plan['head']}, table {plan['table']}, {plan['tensors']} tensors, {plan['size_bytes']:,} bytes")
    for op, entry in plan["by_op"].items():
        out.print(f"  {op:<4} {entry['tensors']:>5} tensors {entry['size_bytes']:>16,} bytes")
    out.print(f"  {plan['shape_blind']} transposed weights are square: only values can show a forgotten transpose")
    for repeated, original in plan["tied"]:
        out.print(f"  {repeated} repeats {original} and is left out")
    for name in plan["dropped"]:
        out.print(f"  {name} belongs to another head and is dropped", soft_wrap=True, markup=False)
    out.print("nothing was written (dry run)")


def _show_result(result: Result, wall_s: float, as_json: bool) -> None:
    manifest = result.manifest
    weights = manifest.files[0]
    if as_json:
        document = manifest.model_dump(mode="json")
        console.print_json({"out": str(result.out), "up_to_date": result.up_to_date, "manifest": document})
        return
    out = console.stdout()
    if result.up_to_date:
        out.print(f"{result.out} is up to date ({manifest.tensors} tensors)", soft_wrap=True, markup=False)
        return
    out.print(
        f"{result.out}: {manifest.tensors} tensors, {weights.size_bytes:,} bytes in {wall_s:.1f} s, "
        f"{'lossless' if manifest.lossless else f'rounded to {manifest.dtype}'}, read back equal",
        soft_wrap=True,
        markup=False,
    )
    out.print(f"sha256 {weights.sha256}  {weights.name}", soft_wrap=True, markup=False)
