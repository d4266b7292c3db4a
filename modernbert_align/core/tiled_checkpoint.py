"""Writes the checkpoint of a large model tiled from a small one, a piece at a time, all or nothing."""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from modernbert_align import __version__
from modernbert_align.core.checkpoint import (
    Checkpoint,
    TensorInfo,
    TorchReader,
    check_inside,
    open_checkpoint,
    unsigned,
)
from modernbert_align.core.convert import (
    Notify,
    check_head,
    check_places,
    check_readable,
    check_space,
    check_tied,
    copy_files,
    digest_source,
    explained,
    file_stat,
    refuse,
    translate_config,
    weight_files,
    write_json,
)
from modernbert_align.core.manifest import FileDigest, Proof, Source, digest_file
from modernbert_align.core.model_config import parse_config, read_config_file
from modernbert_align.core.ops import OPS, Bits, transpose
from modernbert_align.core.output import OutputFile, lay_out
from modernbert_align.core.partial import open_partial
from modernbert_align.core.plan import Layout, Plan, PlanItem, draft_plan, stored_dtype
from modernbert_align.core.table import Side, Table
from modernbert_align.core.text import command_line, name_text
from modernbert_align.core.tiling import Origin, Tiling, plan_tiling
from modernbert_align.core.writer import Progress, TensorRecord, read_back, write_outputs
from modernbert_align.errors import CheckpointError

TILING_MANIFEST = "tiling_manifest.json"
# The target takes these from the source, whose tokenizer, labels and number format it gets.
_FROM_SOURCE = re.compile(r"\w+_token_id|id2label|label2id|num_labels|problem_type|dtype|torch_dtype")


class TilingManifest(BaseModel):
    """The record of one tiling.

    Attributes:
        to: What the user called the target.
        layers: Per layer of the output, the layer of the source it was made from.
        moved: Layers of the output whose attention is of another kind than that of the layer they were made from.
        settings: Name -> (source's, output's) of settings that differ.
        tensors: Written name -> record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = 1
    tool: str = f"modernbert-align {__version__}"
    head: str
    to: str
    sizes: dict[str, tuple[int, int]]
    layers: tuple[int, ...]
    moved: tuple[int, ...]
    settings: dict[str, tuple[Any, Any]]
    table: str
    table_sha256: str
    source: Source
    files: tuple[FileDigest, ...]
    tensors: dict[str, TensorRecord]
    dropped: tuple[str, ...]
    proofs: tuple[Proof, ...]
    versions: dict[str, str]
    command: str


@dataclass(frozen=True, kw_only=True)
class TileRequest:
    """What to tile.

    Attributes:
        folder: The source checkpoint, of either framework.
        model, to: What the user called source and target, for the manifest.
        revision: Hub commit of the source, if any.
        target: The target's config.json document.
        target_where: Where that is from, for error messages.
        head: The head to write; None keeps that of the source, `base` drops it.
        read_torch: Reads PyTorch's pickles; without it they are refused.
    """

    folder: Path
    model: str
    to: str
    target: Mapping[str, Any]
    target_where: str
    revision: str | None = None
    head: str | None = None
    read_torch: TorchReader | None = None


@dataclass(frozen=True, kw_only=True)
class TiledCheckpoint(Checkpoint):
    """A checkpoint in Hugging Face's layout whose elements are looked up in a smaller one's when they are read.

    Attributes:
        small: The source.
        small_side: Whose layout that has.
        origins: Name -> where the weight comes from.
        stored: Name -> stored name of the small weight.
    """

    small: Checkpoint
    small_side: Side
    origins: Mapping[str, Origin]
    stored: Mapping[str, str]
    _last: dict[str, Bits] = field(default_factory=dict, init=False, repr=False)

    def fill(self, name: str, start: int, out: Bits) -> None:
        """Read consecutive elements of a tiled tensor; see `Checkpoint.fill`."""
        *leading, columns = self.origins[name].axes
        rows = leading[0] if leading else np.zeros(1, dtype=np.intp)  # a vector is a matrix of one row
        width = columns.size
        first, last = start // width, -(-(start + out.size) // width)
        block = self._rows(name, rows[first:last])  # [rows, columns of the small weight]
        skipped = start - first * width
        out[:] = np.take(block, columns, axis=1).reshape(-1)[skipped : skipped + out.size]

    def _rows(self, name: str, rows: np.ndarray[Any, Any]) -> Bits:
        """Rows of the small weight, in Hugging Face's layout."""
        origin, stored = self.origins[name], self.stored[name]
        if self.small_side == "paddle" and origin.entry.op.name == "T":
            if stored not in self._last:  # its rows are columns in the file: one matrix is kept whole
                self._last.clear()
                self._last[stored] = transpose(self.small.read(stored))
            return np.take(self._last[stored], rows, axis=0)
        width = origin.entry.hf_shape[-1]
        block = np.empty((rows.size, width), dtype=unsigned(self.tensors[name].dtype))
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for begin, end in zip((0, *breaks), (*breaks, rows.size), strict=True):
            self.small.fill(stored, int(rows[begin]) * width, block[begin:end].reshape(-1))
        return block


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """Everything decided before the first byte is written.

    Attributes:
        plan: What is written, from a `TiledCheckpoint`.
        small: The source's own plan, for its ties and dropped weights.
        stats: (size, time of change) of every source file when it was read.
    """

    tiling: Tiling
    plan: Plan
    small: Plan
    outputs: tuple[OutputFile, ...]
    config: dict[str, Any]
    carried: tuple[Path, ...]
    stats: Mapping[str, tuple[int, int]]

    @property
    def needs_bytes(self) -> int:
        """Room the output takes, a little for the manifest included."""
        return sum(o.size_bytes for o in self.outputs) + sum(p.stat().st_size for p in self.carried) + (1 << 20)


@dataclass(frozen=True, kw_only=True)
class TileResult:
    """What was written."""

    out: Path
    manifest: TilingManifest


def plan_tile(request: TileRequest, table: Table) -> TilePlan:
    """Read headers and configs, and decide everything.

    Raises:
        CheckpointError, ConfigError, UsageError: The source cannot be read or mapped, or cannot become the target.
    """
    checkpoint = open_checkpoint(request.folder, read_torch=request.read_torch)
    raw = read_config_file(request.folder)
    where = str(request.folder / "config.json")
    source = parse_config(raw, where=where)
    declared = table.head_of(raw.get("architectures"), where=where)
    head = check_head(request.head or declared, declared, request.model)
    target = translate_config(dict(request.target), table, "hf", None)
    config = {key: value for key, value in target.items() if not _FROM_SOURCE.fullmatch(key)}
    config |= {key: value for key, value in raw.items() if _FROM_SOURCE.fullmatch(key)}
    config["architectures"] = [table.architecture(head)]
    tiling = plan_tiling(source, parse_config(config, where=request.target_where), table)
    small = draft_plan(checkpoint, table, source, head, "hf", "paddle", None, declared=declared)
    if small.layout.disagree and not small.layout.agree:
        small = draft_plan(checkpoint, table, source, head, "paddle", "hf", None, declared=declared)
    refuse(small.problems, "")
    carried = tuple(request.folder / name for name in table.carried_files if (request.folder / name).is_file())
    for path in carried:
        check_inside(path, request.folder)
        check_readable(path)
    plan = _large_plan(small, tiling, table, head)
    return TilePlan(
        tiling=tiling,
        plan=plan,
        small=small,
        outputs=lay_out(plan, "none"),
        config=config,
        carried=carried,
        stats={p.name: file_stat(p) for p in (request.folder / "config.json", *weight_files(checkpoint), *carried)},
    )


def _large_plan(small: Plan, tiling: Tiling, table: Table, head: str) -> Plan:
    checkpoint, side = small.checkpoint, small.src
    origins: dict[str, Origin] = {}
    infos: dict[str, TensorInfo] = {}
    stored: dict[str, str] = {}
    items = []
    for entry, origin in tiling.origins(table, head, small.prefix):
        if not entry.op.stored:
            continue
        name = entry.hf
        stored[name] = small.stored[origin.entry.name(side)]
        info = checkpoint.tensors[stored[name]]
        dtype = stored_dtype(info, side)
        origins[name] = origin
        infos[name] = TensorInfo(name=name, dtype=dtype, shape=entry.hf_shape, path=info.path, offset=0)
        items.append(
            PlanItem(
                sources=(name,), target=name, op=OPS["id"], rows=None, source_dtype=dtype, target_dtype=dtype,
                source_shape=entry.hf_shape, target_shape=entry.hf_shape, shape_blind=False,
            )
        )  # fmt: skip
    tiled = TiledCheckpoint(
        folder=checkpoint.folder,
        tensors=infos,
        files=checkpoint.files,
        small=checkpoint,
        small_side=side,
        origins=origins,
        stored=stored,
    )
    return Plan(
        src="hf", dst="hf", head=head, table=table, checkpoint=tiled, items=tuple(items), prefix=table.prefix(head),
        stored={name: name for name in infos}, tied=(), absent_ties=(), dropped=small.dropped,
        layout=Layout(agree=0, disagree=0), problems=(),
    )  # fmt: skip


def tile(
    request: TileRequest,
    table: Table,
    out: Path,
    *,
    force: bool,
    progress: Progress | None = None,
    notify: Notify = lambda _: None,
) -> TileResult:
    """Write the tiled checkpoint into the folder `out`, in Hugging Face's layout, and read it back.

    Args:
        force: Replace what an earlier tiling wrote at `out`.
        progress: Called with (bytes written, bytes to write).
        notify: Told, in one line, what goes on beside the writing.

    Raises:
        CheckpointError: The output exists, lies inside the source or a hub cache, does not fit the disk or cannot be
            written, or the source changed meanwhile.
        ProofError: What was written does not read back.
        ConfigError, UsageError: See `plan_tile`.
    """
    planned = plan_tile(request, table)
    with explained(out):
        check_places(request.folder, out)
        _check_free(out, force)
        check_space(out, planned.needs_bytes)
        check_tied(planned.small)
        key = {"tiling": request.to, "source": str(request.folder.resolve())}
        with open_partial(out, key, resume=False, replace=force, notify=notify) as partial:
            records = write_outputs(
                planned.plan, planned.outputs, partial, "sha256", allow_overflow=False, progress=progress
            )
            write_json(partial.path / "config.json", planned.config)
            copy_files(planned.carried, partial.path)
            manifest = _manifest(request, planned, partial.path, records, notify)
            changed = [name for name, stat in planned.stats.items() if file_stat(request.folder / name) != stat]
            if changed:
                raise CheckpointError(
                    f"`{request.folder / changed[0]}` changed while it was tiled", hint="tile again when it is at rest"
                )
            write_json(partial.path / TILING_MANIFEST, manifest.model_dump(mode="json"))
    return TileResult(out=out, manifest=manifest)


def _manifest(
    request: TileRequest, planned: TilePlan, folder: Path, records: dict[str, TensorRecord], notify: Notify
) -> TilingManifest:
    notify("reading every tensor back from the disk")
    digests = read_back(folder, planned.outputs, records)
    statement = f"{len(records)} tensors read back from the disk with the sha256 they were written with"
    weights = [FileDigest(name=o.name, size_bytes=o.size_bytes, digest=digests[o.name]) for o in planned.outputs]
    others = sorted(("config.json", *(path.name for path in planned.carried)))
    tiling, table = planned.tiling, planned.plan.table
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return TilingManifest(
        head=planned.plan.head,
        to=name_text(request.to),
        sizes={name: (getattr(tiling.source, name), getattr(tiling.target, name)) for name in names},
        layers=tiling.layers,
        moved=tiling.moved,
        settings=dict(tiling.settings),
        table=table.id,
        table_sha256=table.digest,
        source=Source(
            model=name_text(request.model),
            location=name_text(str(request.folder.absolute())),
            revision=request.revision,
            files=digest_source(planned.small.checkpoint, planned.carried, "sha256"),
        ),
        files=(*weights, *(digest_file(folder / name) for name in others)),
        tensors=records,
        dropped=planned.small.dropped,
        proofs=(Proof(level="tensors", statement=statement),),
        versions={"python": platform.python_version(), "numpy": np.__version__},
        command=command_line(),
    )


def _check_free(out: Path, force: bool) -> None:
    """Refuse to write over anything but, with `force`, an earlier tiling."""
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir():
        raise CheckpointError(f"the output `{out}` is a file", hint="choose another --out")
    if not any(out.iterdir()):
        return
    if not (out / TILING_MANIFEST).is_file():
        raise CheckpointError(
            f"the output `{out}` exists and no tiling wrote it",
            hint="choose another --out; --force replaces earlier tilings only",
        )
    if not force:
        raise CheckpointError(f"the output `{out}` exists", hint="use --force to replace it")
