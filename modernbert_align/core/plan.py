"""Decides a conversion from file headers alone: every tensor mapped, or a problem that names it."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modernbert_align.core.cast import FLOATS
from modernbert_align.core.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from modernbert_align.core.ops import OPS, Op
from modernbert_align.core.table import Entry, Side, Sizes, Table, nearest_row
from modernbert_align.core.tensor_parallel import Division, Share
from modernbert_align.errors import CheckpointError

_EXPLAINED = 8  # problems that get a look at what is near: a comparison with every missing name is slow
SIDE_NAMES = {"hf": "Hugging Face", "paddle": "Paddle"}


def share_key(name: str, rank: int) -> str:
    """What a rank's share of a weight is called where those of all ranks are listed."""
    return f"{name}@tp{rank:02d}"


@dataclass(frozen=True, kw_only=True)
class PlanItem:
    """One tensor that will be written.

    Attributes:
        sources: Stored names of what it is made of; several are stacked along their first axis.
        op: What happens to it in this direction.
        rows: The rows to take of the source, in Hugging Face's layout, if it is a stack of several weights.
        source_dtype, target_dtype: safetensors names.
        source_shape: Shape before the operation, sources stacked; of a rank's share only that.
        share: What of the weight is written, if it is divided among ranks.
    """

    sources: tuple[str, ...]
    target: str
    op: Op
    rows: tuple[int, int] | None
    source_dtype: str
    target_dtype: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    shape_blind: bool
    share: Share | None = None

    @property
    def key(self) -> str:
        """What tells it from all other items: its name, and of a rank's share the rank."""
        return self.target if self.share is None else share_key(self.target, self.share.rank)

    @property
    def size_bytes(self) -> int:
        """Bytes to write."""
        return math.prod(self.target_shape) * DTYPE_BYTES[self.target_dtype]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that stands in the way of a conversion, and what to do about it."""

    message: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many non-square Linear weights are stored as the source's framework does, and how many the other way."""

    agree: int
    disagree: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole conversion.

    Attributes:
        items: What will be written, in model order.
        prefix: What body names start with in the source.
        stored: Canonical name -> stored name of every tensor of the source.
        tied: (repeated name, name it repeats), as stored, of the source that are not written.
        absent_ties: Tied names that the source already leaves out.
        dropped: Weights of the source's head that are left out because another head was asked for.
        problems: What stands in the way, worst first; a plan with any is for showing only.
    """

    src: Side
    dst: Side
    head: str
    table: Table
    checkpoint: Checkpoint
    items: tuple[PlanItem, ...]
    prefix: str
    stored: Mapping[str, str]
    tied: tuple[tuple[str, str], ...]
    absent_ties: tuple[str, ...]
    dropped: tuple[str, ...]
    layout: Layout
    problems: tuple[Problem, ...]

    @property
    def ranks(self) -> int:
        """Among how many ranks the output is divided; 1 if it is whole."""
        return 1 + max((item.share.rank for item in self.items if item.share is not None), default=0)

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
    config: Sizes,
    head: str,
    src: Side,
    dst: Side,
    dtype: str | None,
    *,
    declared: str | None = None,
) -> Plan:
    """Map every tensor of `checkpoint`; the arguments are those of `draft_plan`.

    Raises:
        CheckpointError: The layout is not that of `src`, or a tensor is unmapped, missing or of another shape.
    """
    plan = draft_plan(checkpoint, table, config, head, src, dst, dtype, declared=declared)
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more problems)" if len(plan.problems) > 1 else ""
        raise CheckpointError(plan.problems[0].message + more, hint=plan.problems[0].hint)
    return plan


def draft_plan(
    checkpoint: Checkpoint,
    table: Table,
    config: Sizes,
    head: str,
    src: Side,
    dst: Side,
    dtype: str | None,
    *,
    declared: str | None = None,
) -> Plan:
    """Map what can be mapped and list what cannot.

    Args:
        config: From `Table.sizes`.
        head: The head to write; with `base`, the weights of the declared head are dropped.
        src, dst: The two sides; both Paddle if a checkpoint is only divided among ranks or joined.
        declared: The head the checkpoint has, if not `head`.
        dtype: safetensors name to cast to, or None to keep each tensor's own.
    """
    if src == dst == "hf":
        raise ValueError(f"a plan from {src} to {dst}")
    stored: dict[str, str] = {}
    problems: list[Problem] = []
    for name in checkpoint.tensors:
        canonical = table.canonical(name, src)
        if canonical in stored:
            problems.append(
                Problem(
                    message=f"`{name}` and `{stored[canonical]}` of `{checkpoint.folder}` are both `{canonical}`",
                    hint="the checkpoint holds two versions of a weight; remove one",
                )
            )
        stored[canonical] = name
    prefix = table.found_prefix(stored)
    entries = table.expand(config, head, prefix=prefix)
    targets = {entry.hf: target for entry, target in zip(entries, table.expand(config, head), strict=True)}
    infos = {canonical: checkpoint.tensors[name] for canonical, name in stored.items()}
    layout, wrong_layout = _layout(checkpoint, infos, entries, src)
    problems += wrong_layout
    kept = {entry.name(src) for entry in entries}
    whole = table.expand(config, declared or head, prefix=prefix)
    dropped = tuple(dict.fromkeys(e.name(src) for e in whole if e.name(src) not in kept and e.name(src) in infos))
    if not wrong_layout:
        problems += _problems(checkpoint, infos, table, head, src, entries, dropped)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.op.stored and entry.name(src) in infos:
            groups.setdefault(targets[entry.hf].name(dst), []).append(entry)
    items = [_item(target, parts, infos, src, dst, dtype) for target, parts in groups.items()]
    ties = [entry for entry in entries if not entry.op.stored]
    present = [entry for entry in ties if entry.name(src) in infos]
    originals = {entry.name(src): entry.to if src == "hf" else entry.to_paddle for entry in present}
    return Plan(
        src=src,
        dst=dst,
        head=head,
        table=table,
        checkpoint=checkpoint,
        items=tuple(items),
        prefix=prefix,
        stored=stored,
        tied=tuple((stored[name], stored[to]) for name, to in originals.items() if to in stored),
        absent_ties=tuple(e.name(src) for e in ties if e not in present),
        dropped=tuple(stored[name] for name in dropped),
        layout=layout,
        problems=tuple(problems),
    )


def _item(
    target: str, parts: Sequence[Entry], infos: Mapping[str, TensorInfo], src: Side, dst: Side, dtype: str | None
) -> PlanItem:
    """The item of one target: of one weight, of several stacked, or of a part of a stack."""
    first = parts[0]
    stacking = first.rows is not None and src == "hf"
    source_dtype = stored_dtype(infos[first.name(src)], src)
    op = first.op if src == "hf" else first.inverse_op()
    return PlanItem(
        sources=tuple(dict.fromkeys(infos[part.name(src)].name for part in parts)),
        target=target,
        op=op if src != dst else OPS["id"],
        rows=first.rows if src == "paddle" and dst == "hf" else None,
        source_dtype=source_dtype,
        target_dtype=dtype or source_dtype,
        source_shape=first.stacked if stacking else first.shape(src),
        target_shape=first.shape(dst),
        shape_blind=first.shape_blind,
    )


def divide(plan: Plan, divided: Mapping[str, Division], degree: int) -> Plan:
    """The same conversion, into one file for each of `degree` ranks.

    Args:
        divided: From `tensor_parallel.divisions`; the other weights are in the files of all ranks.
    """
    items = [divide_item(item, divided.get(item.target), rank) for rank in range(degree) for item in plan.items]
    return replace(plan, items=tuple(items))


def divide_item(item: PlanItem, how: Division | None, rank: int) -> PlanItem:
    """One rank's share of an item."""
    share = Share(rank=rank, division=how)
    source_shape = share.of_source(item.op).shape(item.source_shape)
    return replace(item, share=share, source_shape=source_shape, target_shape=share.shape(item.target_shape))


def _layout(
    checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], entries: Sequence[Entry], src: Side
) -> tuple[Layout, list[Problem]]:
    """Tell Hugging Face's [out, in] from Paddle's [in, out] by every matrix that is not square."""
    here: list[str] = []
    there: list[str] = []
    other: Side = "paddle" if src == "hf" else "hf"
    for entry in {entry.name(src): entry for entry in entries if entry.op.name == "T"}.values():
        info = infos.get(entry.name(src))
        expected = entry.shape(src)
        if info is None or expected == expected[::-1]:
            continue
        if info.shape == expected:
            here.append(info.name)
        elif info.shape == expected[::-1]:
            there.append(info.name)
    layout = Layout(agree=len(here), disagree=len(there))
    if there and not here:
        return layout, [
            Problem(
                message=f"`{checkpoint.folder}` is already in {SIDE_NAMES[other]} layout: all {len(there)} non-square "
                f"Linear weights are stored that way",
                hint=f"give the {SIDE_NAMES[src]} checkpoint, or convert with --src {other} --dst {src}",
            )
        ]
    if there:
        return layout, [
            Problem(
                message=f"`{checkpoint.folder}` mixes both layouts: `{here[0]}` is {SIDE_NAMES[src]}'s, `{there[0]}` "
                f"is {SIDE_NAMES[other]}'s",
                hint="the checkpoint was converted wrongly; start from the original",
            )
        ]
    return layout, []


def _problems(
    checkpoint: Checkpoint,
    infos: Mapping[str, TensorInfo],
    table: Table,
    head: str,
    src: Side,
    entries: Sequence[Entry],
    dropped: Sequence[str],
) -> list[Problem]:
    """Everything that stands in the way apart from the layout, worst first."""
    found: list[Problem] = []
    wanted = {entry.name(src): entry for entry in entries}
    missing = {entry.name(src): entry for entry in entries if entry.op.stored and entry.name(src) not in infos}
    for canonical, info in infos.items():
        name = info.name
        entry = wanted.get(canonical)
        if canonical in dropped:
            continue
        if entry is None:
            message = f"no row of table `{table.id}` maps `{name}` {list(info.shape)} ({head} head)"
            hint = ""
            if len(found) < _EXPLAINED:
                near = nearest_row(canonical, table, head, src)
                hint = (
                    f"nearest row: `{near}`{_evidence(canonical, info, missing, src)}"
                    if near
                    else "nothing in the table looks like it; is it another model?"
                )
            found.append(Problem(message=message, hint=hint))
        elif info.shape != entry.shape(src):
            found.append(
                Problem(
                    message=f"`{name}` is {list(info.shape)}, the row and config.json say {list(entry.shape(src))}",
                    hint="config.json and the weights do not belong together",
                )
            )
        elif stored_dtype(info, src) not in FLOATS:
            found.append(Problem(message=f"`{name}` has the dtype {info.dtype}, which is not a float format", hint=""))
    for name in missing:
        near = nearest_row(name, table, head, src)
        found.append(
            Problem(
                message=f"`{name}` is missing from `{checkpoint.folder}` (row `{near}`, {head} head)",
                hint="the checkpoint is incomplete, or its config.json names another architecture",
            )
        )
    stacks: dict[str, set[str]] = {}
    for entry in entries:
        if entry.rows is not None and entry.name(src) in infos:
            stacks.setdefault(entry.paddle, set()).add(stored_dtype(infos[entry.name(src)], src))
    found += [
        Problem(
            message=f"the parts of `{name}` have different dtypes: {', '.join(sorted(dtypes))}",
            hint="save the checkpoint with one dtype",
        )
        for name, dtypes in stacks.items()
        if len(dtypes) > 1
    ]
    return found


def _evidence(name: str, info: TensorInfo, missing: Mapping[str, Entry], src: Side) -> str:
    """What speaks for an unknown name being the misspelt name of a missing weight."""
    near = difflib.get_close_matches(name, missing, n=1, cutoff=0.8)
    if not near:
        return ""
    same = "the same" if missing[near[0]].shape(src) == info.shape else "another"
    return f"; `{near[0]}` is missing and has {same} shape"


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
        "layout": {"agree": plan.layout.agree, "disagree": plan.layout.disagree},
        "tensors": len(plan.items),
        "ranks": plan.ranks,
        "size_bytes": plan.size_bytes,
        "by_op": by_op,
        "stacked": sum(len(item.sources) > 1 or item.rows is not None for item in plan.items),
        "shape_blind": list(dict.fromkeys(item.target for item in plan.items if item.shape_blind)),
        "renamed": sum(canonical != name for canonical, name in plan.stored.items()),
        "tied": [list(pair) for pair in plan.tied],
        "absent_ties": list(plan.absent_ties),
        "dropped": list(plan.dropped),
        "dtypes": sorted({f"{item.source_dtype}->{item.target_dtype}" for item in plan.items}),
        "problems": [{"message": problem.message, "hint": problem.hint} for problem in plan.problems],
    }
