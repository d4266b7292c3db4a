"""Converts a checkpoint: plan, stream into a partial folder, read back, rename.

Memory stays at one transposed tensor plus a chunk, whatever the model's size. Either the whole folder appears under
its name or nothing does.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_align.core.cast import CONFIG_NAMES, SHORT_NAMES, cast_bits
from modernbert_align.core.checkpoint import WEIGHTS, SafetensorsWriter, file_sha256, open_checkpoint
from modernbert_align.core.manifest import (
    MANIFEST,
    FileDigest,
    Manifest,
    Source,
    digest_file,
    package_versions,
    read_manifest,
)
from modernbert_align.core.model_config import parse_config, read_config_file
from modernbert_align.core.ops import Bits
from modernbert_align.core.plan import Plan, PlanItem, make_plan
from modernbert_align.core.table import Side, Table
from modernbert_align.errors import CheckpointError, UsageError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert.

    Attributes:
        folder: The source checkpoint.
        model: What the user called it, for the manifest.
        revision: Hub commit, if it came from the hub.
        dtype: keep, fp32, bf16 or fp16.
        head: The head to write; None keeps that of the source, `base` drops it.
    """

    folder: Path
    model: str
    revision: str | None
    src: Side
    dst: Side
    dtype: str = "keep"
    head: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a conversion did; `up_to_date` means that nothing had to be written."""

    out: Path
    manifest: Manifest
    up_to_date: bool


def plan_conversion(request: Request, table: Table) -> tuple[Plan, dict[str, Any]]:
    """Read headers and config, and decide everything.

    Returns:
        The plan and the target's config.json document.

    Raises:
        CheckpointError, ConfigError, UsageError: Something in the source stands in the way.
    """
    checkpoint = open_checkpoint(request.folder)
    raw = read_config_file(request.folder)
    where = str(request.folder / "config.json")
    config = parse_config(raw, where=where)
    declared = table.head_of(raw.get("architectures"), where=where)
    head = check_head(request.head or declared, declared, request.model)
    target_dtype = None if request.dtype == "keep" else SHORT_NAMES[request.dtype]
    plan = make_plan(checkpoint, table, config, head, request.src, request.dst, target_dtype, declared=declared)
    target_config = translate_config(raw, table, request.dst, target_dtype)
    if head != declared:
        target_config["architectures"] = [table.architecture(head)]
    return plan, target_config


def check_head(head: str, declared: str, model: str) -> str:
    """Return `head` if a checkpoint with the head `declared` has its weights.

    Raises:
        UsageError: It has not; weights are never made up.
    """
    if head in ("base", declared):
        return head
    raise UsageError(
        f"`{model}` has the head {declared}, not {head}: its weights for {head} are missing",
        hint=f"use --head {declared} or --head base",
    )


def translate_config(raw: dict[str, Any], table: Table, dst: Side, dtype: str | None) -> dict[str, Any]:
    """The config.json of the other side.

    The Paddle model reads both of Hugging Face's spellings, so keys pass through unchanged; going to Hugging Face,
    what only Paddle's save_pretrained writes is left out.

    Args:
        dtype: safetensors name of the float format all tensors are cast to, or None.
    """
    dropped = table.paddle_only_keys if dst == "hf" else ()
    config = {key: value for key, value in raw.items() if key not in dropped}
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = CONFIG_NAMES[dtype]
    return config


def convert(request: Request, table: Table, out: Path, *, force: bool, progress: Progress | None = None) -> Result:
    """Convert `request` into the folder `out`.

    Args:
        force: Replace an earlier conversion at `out`.
        progress: Called with (bytes written, bytes to write).

    Raises:
        CheckpointError: The output exists, lies inside the source, cannot be written, or does not read back.
        ConfigError, UsageError: See `plan_conversion`.
    """
    plan, config = plan_conversion(request, table)
    _check_places(request.folder, out)
    manifest = _manifest(request, plan, table)
    existing = _existing(out, manifest, force)
    if existing is not None:
        return Result(out=out, manifest=existing, up_to_date=True)
    with _partial_folder(out) as partial:
        written = _write(plan, partial / WEIGHTS, progress)
        if file_sha256(partial / WEIGHTS) != written:
            raise CheckpointError(
                f"`{WEIGHTS}` does not read back as it was written to `{partial}`", hint="check the disk and try again"
            )
        _write_json(partial / "config.json", config)
        for name in table.carried_files:
            if (request.folder / name).is_file():
                shutil.copyfile(request.folder / name, partial / name)
        files = (
            FileDigest(name=WEIGHTS, size_bytes=(partial / WEIGHTS).stat().st_size, sha256=written),
            *(digest_file(p) for p in sorted(partial.iterdir()) if p.name != WEIGHTS),
        )
        manifest = manifest.model_copy(update={"files": files})
        _write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
    return Result(out=out, manifest=manifest, up_to_date=False)


def _manifest(request: Request, plan: Plan, table: Table) -> Manifest:
    widths = [(item.source_dtype, item.target_dtype) for item in plan.items]
    widening = {("F16", "F32"), ("BF16", "F32"), ("F32", "F64"), ("F16", "F64"), ("BF16", "F64")}
    carried = (request.folder / name for name in table.carried_files)
    sources = (request.folder / "config.json", *plan.checkpoint.files, *(path for path in carried if path.is_file()))
    return Manifest(
        src=request.src,
        dst=request.dst,
        head=plan.head,
        dtype=request.dtype,
        lossless=all(a == b or (a, b) in widening for a, b in widths),
        table=table.id,
        table_sha256=table.digest,
        source=Source(
            model=request.model, revision=request.revision, files=tuple(digest_file(path) for path in sources)
        ),
        files=(),
        tensors=len(plan.items),
        tied=plan.tied,
        versions=package_versions(("numpy", "safetensors")),
        command=" ".join(["modernbert-align", *sys.argv[1:]]),
    )


def _check_places(source: Path, out: Path) -> None:
    source_real, out_real = source.resolve(), out.resolve()
    if out_real == source_real or source_real in out_real.parents or out_real in source_real.parents:
        raise CheckpointError(
            f"the output `{out}` and the source `{source}` are in each other's way",
            hint="choose an --out outside the source folder",
        )


def _existing(out: Path, wanted: Manifest, force: bool) -> Manifest | None:
    """The manifest at `out` if it is up to date; None if `out` is free to be written."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise CheckpointError(f"the output `{out}` is a file", hint="choose another --out")
    if not any(out.iterdir()):
        return None
    if not (out / MANIFEST).is_file():
        raise CheckpointError(
            f"the output `{out}` exists and no conversion wrote it",
            hint="choose another --out; --force replaces earlier conversions only",
        )
    if force:
        return None
    found = read_manifest(out)
    if (
        found is not None
        and found.same_request(wanted)
        and all((out / file.name).is_file() and digest_file(out / file.name) == file for file in found.files)
    ):
        return found
    raise CheckpointError(
        f"the output `{out}` exists and is another or a changed conversion", hint="use --force to replace it"
    )


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` on success and disappears on any failure."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to `{out.parent}`: {error.strerror}", hint="choose another --out or free the path"
        ) from None
    try:
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        yield partial
        old = None
        try:
            if out.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
                out.rename(old / out.name)
            partial.rename(out)
        except BaseException:
            if old is not None:
                if not out.exists():
                    (old / out.name).rename(out)
                old.rmdir()
            raise
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(f"cannot make `{out}`: {error}", hint="check free space and permissions") from None
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _write(plan: Plan, path: Path, progress: Progress | None) -> str:
    """Write the weights; returns the SHA-256 of the bytes handed to the file."""
    specs = [(item.target, item.target_dtype, item.target_shape) for item in plan.items]
    by_name = {item.target: item for item in plan.items}
    for repeated, original in plan.tied:
        _check_tied(plan, repeated, original)
    done, total = 0, plan.size_bytes
    with SafetensorsWriter(path, specs, plan.table.format(plan.dst)) as writer:
        for name in writer.order:
            writer.write(name, _pieces(plan, by_name[name]))
            done += by_name[name].size_bytes
            if progress is not None:
                progress(done, total)
    return writer.sha256


def _pieces(plan: Plan, item: PlanItem) -> Iterator[Bits]:
    if item.op.name == "id":
        for piece in plan.checkpoint.chunks(item.source):
            yield cast_bits(piece, item.source_dtype, item.target_dtype, name=item.source)
    else:
        bits = item.op.apply(plan.checkpoint.read(item.source))
        yield cast_bits(bits, item.source_dtype, item.target_dtype, name=item.source)


def _check_tied(plan: Plan, repeated: str, original: str) -> None:
    """A tied weight is left out of the file only if it is bit for bit the weight it repeats."""
    pairs = zip(plan.checkpoint.chunks(repeated), plan.checkpoint.chunks(original), strict=True)
    if not all(np.array_equal(a, b) for a, b in pairs):
        raise CheckpointError(
            f"`{repeated}` is tied to `{original}` but their values differ",
            hint="if the decoder was trained on its own, set `tie_word_embeddings` to false in config.json",
        )


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
