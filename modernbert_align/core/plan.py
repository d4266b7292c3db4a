"""Decides a conversion from file headers alone: every tensor mapped, or an error that names it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modernbert_align.core.cast import FLOATS
from modernbert_align.core.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import OPS, Op
from modernbert_align.core.table import Entry, Side, Table, nearest_row
from modernbert_align.errors import CheckpointError

SIDE_NAMES = {"hf": "Hugging Face", "paddle": "Paddle"}


@dataclass(frozen=True, kw_only=True)
class PlanItem:
    """One tensor that will be written.

    Attributes:
        op: What happens to it in this direction.
        source_dtype, target_dtype: safetensors names.
    """

    source: str
    target: str
    op: Op
    source_dtype: str
    target_dtype: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    shape_blind: bool

    @property
    def size_bytes(self) -> int:
        """Bytes to write."""
        return math.prod(self.target_shape) * DTYPE_BYTES[self.target_dtype]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole conversion, checked.

    Attributes:
        items: What will be written.
        tied: (repeated name, name it repeats) pairs of the source that are not written.
        absent_ties: Tied names that the source already leaves out.
        dropped: Weights of the source's head that are left out because another head was asked for.
    """

    src: Side
    dst: Side
    head: str
    table: Table
    checkpoint: Checkpoint
    items: tuple[PlanItem, ...]
    tied: tuple[tuple[str, str], ...]
    absent_ties: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes to write, headers apart."""
        return sum(item.size_bytes for item in self.items)


def stored_dtype(info: TensorInfo, side: Side) -> str:
    """The float format of a stored tensor; Paddle writes bfloat16 as U16."""
    return "BF16" if side == "paddle" and info.dtype == "U16" else info.dtype


def make_plan(
    checkpoint: Checkpoint,
    table: Table,
    config: ModelConfig,
    head: str,
    src: Side,
    dst: Side,
    dtype: str | None,
    *,
    declared: str | None = None,
) -> Plan:
    """Map every tensor of `checkpoint`.

    Args:
        head: The head to write; with `base`, the weights of the declared head are dropped.
        declared: The head the checkpoint has, if not `head`.
        dtype: safetensors name to cast to, or None to keep each tensor's own.

    Raises:
        CheckpointError: The layout is not that of `src`, or a tensor is unmapped, missing or of another shape.
    """
    prefix = table.found_prefix(checkpoint.tensors)
    entries = table.expand(config, head, prefix=prefix)
    targets = {id(entry): target for entry, target in zip(entries, table.expand(config, head), strict=True)}
    check_layout(checkpoint, entries, src)
    stored = [entry for entry in entries if entry.op.stored]
    ties = [entry for entry in entries if not entry.op.stored]
    kept = {entry.name(src) for entry in entries}
    whole = table.expand(config, declared or head, prefix=prefix)
    dropped = [e.name(src) for e in whole if e.name(src) not in kept and e.name(src) in checkpoint.tensors]
    problems = _problems(checkpoint, table, head, src, stored, ties, dropped)
    if problems:
        message, hint = problems[0]
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise CheckpointError(message + more, hint=hint)
    items = tuple(
        PlanItem(
            source=entry.name(src),
            target=targets[id(entry)].name(dst),
            op=entry.op if src == "hf" else OPS[entry.op.inverse],
            source_dtype=stored_dtype(checkpoint.tensors[entry.name(src)], src),
            target_dtype=dtype or stored_dtype(checkpoint.tensors[entry.name(src)], src),
            source_shape=entry.shape(src),
            target_shape=entry.shape(dst),
            shape_blind=entry.shape_blind,
        )
        for entry in stored
    )
    present = [entry for entry in ties if entry.name(src) in checkpoint.tensors]
    return Plan(
        src=src,
        dst=dst,
        head=head,
        table=table,
        checkpoint=checkpoint,
        items=items,
        tied=tuple((e.name(src), e.to if src == "hf" else e.to_paddle) for e in present),
        absent_ties=tuple(e.name(src) for e in ties if e not in present),
        dropped=tuple(dropped),
    )


def check_layout(checkpoint: Checkpoint, entries: Sequence[Entry], src: Side) -> None:
    """Tell Hugging Face's [out, in] from Paddle's [in, out] by every matrix that is not square.

    Raises:
        CheckpointError: The files are in the other side's layout, or in a mixture of both.
    """
    here: list[str] = []
    there: list[str] = []
    other: Side = "paddle" if src == "hf" else "hf"
    for entry in entries:
        info = checkpoint.tensors.get(entry.name(src))
        if info is None or entry.op.name != "T" or entry.shape_blind:
            continue
        if info.shape == entry.shape(src):
            here.append(info.name)
        elif info.shape == entry.shape(other):
            there.append(info.name)
    if there and not here:
        raise CheckpointError(
            f"`{checkpoint.folder}` is already in {SIDE_NAMES[other]} layout: all {len(there)} non-square Linear "
            f"weights are stored that way",
            hint=f"give the {SIDE_NAMES[src]} checkpoint, or convert with --src {other} --dst {src}",
        )
    if there:
        raise CheckpointError(
            f"`{checkpoint.folder}` mixes both layouts: `{here[0]}` is {SIDE_NAMES[src]}'s, `{there[0]}` is "
            f"{SIDE_NAMES[other]}'s",
            hint="the checkpoint was converted wrongly; start from the original",
        )


def _problems(
    checkpoint: Checkpoint,
    table: Table,
    head: str,
    src: Side,
    stored: Sequence[Entry],
    ties: Sequence[Entry],
    dropped: Sequence[str],
) -> list[tuple[str, str]]:
    """(message, hint) of everything that stands in the way, worst first."""
    found: list[tuple[str, str]] = []
    wanted = {entry.name(src): entry for entry in (*stored, *ties)}
    missing = [entry.name(src) for entry in stored if entry.name(src) not in checkpoint.tensors]
    for name, info in checkpoint.tensors.items():
        entry = wanted.get(name)
        if name in dropped:
            continue
        if entry is None:
            near = nearest_row(name, table, head, src)
            found.append(
                (
                    f"no row of table `{table.id}` maps `{name}` {list(info.shape)} ({head} head)",
                    f"nearest row: `{near}`" if near else "nothing in the table looks like it; is it another model?",
                )
            )
        elif info.shape != entry.shape(src):
            found.append(
                (
                    f"`{name}` is {list(info.shape)}, the row and config.json say {list(entry.shape(src))}",
                    "config.json and the weights do not belong together",
                )
            )
        elif stored_dtype(info, src) not in FLOATS:
            found.append((f"`{name}` has the dtype {info.dtype}, which is not a float format", ""))
    for name in missing:
        near = nearest_row(name, table, head, src)
        found.append(
            (
                f"`{name}` is missing from `{checkpoint.folder}` (row `{near}`, {head} head)",
                "the checkpoint is incomplete, or its config.json names another architecture",
            )
        )
    return found


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for `--dry-run`."""
    by_op: dict[str, dict[str, int]] = {}
    for item in plan.items:
        entry = by_op.setdefault(item.op.name, {"tensors": 0, "size_bytes": 0})
        entry["tensors"] += 1
        entry["size_bytes"] += item.size_bytes
    return {
        "src": plan.src,
        "dst": plan.dst,
        "head": plan.head,
        "table": plan.table.id,
        "tensors": len(plan.items),
        "size_bytes": plan.size_bytes,
        "by_op": by_op,
        "shape_blind": sum(item.shape_blind for item in plan.items),
        "tied": [list(pair) for pair in plan.tied],
        "absent_ties": list(plan.absent_ties),
        "dropped": list(plan.dropped),
        "dtypes": sorted({f"{item.source_dtype}->{item.target_dtype}" for item in plan.items}),
    }
