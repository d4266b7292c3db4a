"""Converts a checkpoint: plan, stream into a partial folder, prove, rename.

Memory stays at one transposed tensor plus a few pieces, whatever the model's size. Either the whole folder appears
under its name or nothing does.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from modernbert_align.core.cast import CONFIG_NAMES, SHORT_NAMES, WIDENING
from modernbert_align.core.checkpoint import (
    INDEX,
    Checkpoint,
    TorchReader,
    check_inside,
    open_checkpoint,
    unsigned,
)
from modernbert_align.core.digest import Algorithm, file_sha256
from modernbert_align.core.hub_cache import in_hub_cache, published_sha256
from modernbert_align.core.manifest import (
    FileDigest,
    Manifest,
    Proof,
    Source,
    digest_file,
    read_manifest,
)
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.output import OutputFile, ShardSize, index_text, lay_out
from modernbert_align.core.partial import MANIFEST, open_partial, partial_path
from modernbert_align.core.plan import Plan, Problem, divide, draft_plan
from modernbert_align.core.proof import prove_dye, prove_roundtrip
from modernbert_align.core.rank_files import (
    DEGREE_KEY,
    RANK_KEY,
    check_digests,
    check_replicated,
    is_divided,
    join_ranks,
)
from modernbert_align.core.shares import Joined
from modernbert_align.core.stream import PIECE_BYTES
from modernbert_align.core.table import Side, Sizes, Table
from modernbert_align.core.tensor_parallel import check_degree, divisions
from modernbert_align.core.text import command_line, name_text
from modernbert_align.core.writer import Progress, TensorRecord, read_back, write_outputs
from modernbert_align.errors import CheckpointError, UsageError

ProofLevel = Literal["tensors", "dye", "roundtrip"]
PROOF_LEVELS: tuple[ProofLevel, ...] = ("tensors", "dye", "roundtrip")
Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert.

    Attributes:
        folder: The source checkpoint.
        model: What the user called it, for the manifest.
        revision: Hub commit, if it came from the hub.
        dtype: keep, fp32, bf16 or fp16.
        head: The head to write; None keeps that of the source, `base` drops it.
        shard_size: How to split the output; see `lay_out`.
        tensor_parallel: Among how many ranks to divide a Paddle output.
        digest: The algorithm for tensors and weight files.
        prove: What to prove before the output gets its name.
        allow_overflow: Let a cast turn finite values into infinite ones; they are counted.
        read_torch: Reads PyTorch's pickles; without it they are refused.
    """

    folder: Path
    model: str
    revision: str | None
    src: Side
    dst: Side
    dtype: str = "keep"
    head: str | None = None
    shard_size: ShardSize = "keep"
    tensor_parallel: int = 1
    digest: Algorithm = "sha256"
    prove: tuple[ProofLevel, ...] = ("tensors",)
    allow_overflow: bool = False
    read_torch: TorchReader | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a conversion did; `up_to_date` means that nothing had to be written."""

    out: Path
    manifest: Manifest
    up_to_date: bool


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything decided before the first byte is written.

    Attributes:
        target_config: The output's config.json document.
        carried: Files that are copied unchanged.
        needs_bytes: Room the output needs.
        source_stats: (size, time of change) of every source file when it was read.
    """

    plan: Plan
    sizes: Sizes
    outputs: tuple[OutputFile, ...]
    index: str | None
    target_config: dict[str, Any]
    carried: tuple[Path, ...]
    source_stats: dict[str, tuple[int, int]]

    @property
    def needs_bytes(self) -> int:
        """Room the output takes, a little for the manifest included."""
        weights = sum(output.size_bytes for output in self.outputs)
        return weights + sum(path.stat().st_size for path in self.carried) + (1 << 20)

    @property
    def lossless(self) -> bool:
        """Whether every bit of every tensor can be recovered."""
        pairs = {(item.source_dtype, item.target_dtype) for item in self.plan.items}
        return all(a == b or (a, b) in WIDENING for a, b in pairs)


def plan_conversion(request: Request, table: Table) -> Conversion:
    """Read headers and config, and decide everything; the plan lists what stands in the way.

    Raises:
        CheckpointError, ConfigError, UsageError: The source cannot be read, or the request makes no sense.
    """
    divided = request.src == "paddle" and is_divided(request.folder)
    checkpoint = None if divided else open_checkpoint(request.folder, read_torch=request.read_torch)
    config_path = request.folder / "config.json"
    if config_path.exists():
        check_inside(config_path, request.folder)
    raw = read_config_file(request.folder)
    where = str(config_path)
    sizes = table.sizes(raw, where=where)
    declared = table.head_of(raw.get("architectures"), where=where)
    head = check_head(request.head or declared, declared, request.model)
    target_dtype = None if request.dtype == "keep" else SHORT_NAMES[request.dtype]
    if checkpoint is None:
        checkpoint = join_ranks(request.folder, raw, table, sizes, declared)
    plan = draft_plan(checkpoint, table, sizes, head, request.src, request.dst, target_dtype, declared=declared)
    if request.tensor_parallel != 1:
        entries = table.expand(sizes, head)
        check_degree(sizes, entries, request.tensor_parallel)
        plan = divide(plan, divisions(entries, request.tensor_parallel), request.tensor_parallel)
    target_config = translate_config(raw, table, request.dst, target_dtype, request.tensor_parallel)
    if head != declared:
        target_config["architectures"] = [table.architecture(head)]
    carried = tuple(request.folder / name for name in table.carried_files if (request.folder / name).is_file())
    for path in carried:
        check_inside(path, request.folder)
        check_readable(path)
    outputs = lay_out(plan, request.shard_size)
    conversion = Conversion(
        plan=plan,
        sizes=sizes,
        outputs=outputs,
        index=index_text(plan, outputs),
        target_config=target_config,
        carried=carried,
        source_stats={p.name: file_stat(p) for p in (config_path, *weight_files(checkpoint), *carried)},
    )
    _check_proofs(request, conversion)
    return conversion


def _check_proofs(request: Request, conversion: Conversion) -> None:
    """Refuse to promise what cannot be shown.

    Raises:
        UsageError: A proof that the request rules out.
    """
    if "tensors" in request.prove and request.digest == "none":
        raise UsageError(
            "--prove tensors compares digests, and --digest none makes none", hint="use --digest sha256 or crc32"
        )
    if "roundtrip" not in request.prove:
        return
    reason = ""
    if not conversion.lossless:
        reason = f"--dtype {request.dtype} loses bits"
    elif conversion.plan.dropped:
        reason = f"--head {conversion.plan.head} drops weights"
    elif conversion.plan.checkpoint.pickled:
        reason = "the source is a pickle, whose bytes are not the tensors' alone"
    if reason:
        raise UsageError(f"--prove roundtrip cannot hold: {reason}", hint="use --prove tensors,dye")


def weight_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files of a checkpoint that hold or place its tensors."""
    return checkpoint.files if checkpoint.index is None else (*checkpoint.files, checkpoint.index)


def file_stat(path: Path) -> tuple[int, int]:
    """Size and time of change, which tell whether a file is what it was."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


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


def translate_config(
    raw: dict[str, Any], table: Table, dst: Side, dtype: str | None, degree: int = 1
) -> dict[str, Any]:
    """The config.json of the other side.

    The Paddle model reads both of Hugging Face's spellings, so keys pass through unchanged; going to Hugging Face,
    what only Paddle's save_pretrained writes is left out. Among how many ranks it is divided is the output's own.

    Args:
        dtype: safetensors name of the float format all tensors are cast to, or None.
        degree: Among how many ranks the output is divided, as save_pretrained writes it.
    """
    dropped = table.paddle_only_keys if dst == "hf" else (RANK_KEY,)
    config = {key: value for key, value in raw.items() if key not in dropped}
    if degree > 1 or DEGREE_KEY in config:
        config[DEGREE_KEY] = degree
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = CONFIG_NAMES[dtype]
    return config


def convert(
    request: Request,
    table: Table,
    out: Path,
    *,
    force: bool,
    resume: bool = False,
    progress: Progress | None = None,
    notify: Notify = lambda _: None,
) -> Result:
    """Convert `request` into the folder `out`.

    Args:
        force: Replace an earlier conversion at `out`.
        resume: Continue an attempt whose process died; without it such an attempt is started over.
        progress: Called with (bytes written, bytes to write).
        notify: Told, in one line, what goes on beside the writing.

    Raises:
        CheckpointError: Something stands in the way, the output exists, lies inside the source or a hub cache, does
            not fit the disk or cannot be written, or the source changed meanwhile.
        ProofError: What was written is not what was asked for.
        ConfigError, UsageError: See `plan_conversion`.
    """
    conversion = plan_conversion(request, table)
    refuse(conversion.plan.problems, "; --dry-run lists them")
    with explained(out):
        check_places(request.folder, out)
        present = out.exists() or out.is_symlink()
        if not present:  # now, for the pool below ends only when all of the source has been read
            check_space(out, conversion.needs_bytes)
    with explained(out), ThreadPoolExecutor(max_workers=1, thread_name_prefix="source-digest") as pool:
        plan = conversion.plan
        source_files = pool.submit(digest_source, plan.checkpoint, conversion.carried, request.digest)
        if present:
            existing = _existing(out, request, _manifest(request, conversion, source_files.result()), force)
            if existing is not None:
                return Result(out=out, manifest=existing, up_to_date=True)
            check_space(out, conversion.needs_bytes)
        check_tied(plan)
        if isinstance(plan.checkpoint, Joined):
            check_digests(plan.checkpoint)
            check_replicated(plan.checkpoint)
        proofs: list[Proof] = []
        if "dye" in request.prove:
            notify("following every element from its place in the source to its place in the output")
            proofs.append(prove_dye(conversion.plan, conversion.sizes, request.shard_size))
        with open_partial(
            out, _journal_key(request, conversion), resume=resume, replace=force, notify=notify
        ) as partial:
            records = write_outputs(
                conversion.plan,
                conversion.outputs,
                partial,
                request.digest,
                allow_overflow=request.allow_overflow,
                progress=progress,
            )
            _write_small_files(request, conversion, partial.path)
            manifest = _manifest(request, conversion, source_files.result())
            _check_unchanged(request, conversion)
            manifest = _prove(request, conversion, partial.path, manifest, records, proofs, notify)
            write_json(partial.path / MANIFEST, manifest.model_dump(mode="json"))
    return Result(out=out, manifest=manifest, up_to_date=False)


def _prove(
    request: Request,
    conversion: Conversion,
    folder: Path,
    manifest: Manifest,
    records: dict[str, TensorRecord],
    proofs: list[Proof],
    notify: Notify,
) -> Manifest:
    """Prove what was asked for about the written files, and complete the manifest with it."""
    names = [output.name for output in conversion.outputs]
    if "tensors" in request.prove:
        notify("reading every tensor back from the disk")
        digests = read_back(folder, conversion.outputs, records)
        statement = f"{len(records)} tensors read back from the disk with the {request.digest} they were written with"
        proofs = [Proof(level="tensors", statement=statement), *proofs]
        weights = [FileDigest(name=n, size_bytes=(folder / n).stat().st_size, digest=digests[n]) for n in names]
    else:
        weights = [digest_file(folder / name, request.digest) for name in names]
    if "roundtrip" in request.prove:
        notify("converting back and comparing with the source's SHA-256")
        proofs = [*proofs, prove_roundtrip(conversion.plan, conversion.sizes, folder, _sha256_of_source(conversion))]
    others = (digest_file(p) for p in sorted(folder.iterdir()) if p.name in _small_names(conversion))
    return manifest.model_copy(
        update={"files": (*weights, *others), "tensors": records, "proofs": tuple(proofs)},
    )


def _sha256_of_source(conversion: Conversion) -> dict[str, str]:
    """SHA-256 of every weight file of the source: as the hub publishes it, else computed."""
    files = conversion.plan.checkpoint.files
    return {p.name: published_sha256(p) or file_sha256(p) for p in files}


def _small_names(conversion: Conversion) -> set[str]:
    return {"config.json", *([INDEX] if conversion.index else []), *(path.name for path in conversion.carried)}


def _write_small_files(request: Request, conversion: Conversion, folder: Path) -> None:
    write_json(folder / "config.json", conversion.target_config)
    if conversion.index is not None:
        _write_text(folder / INDEX, conversion.index)
    copy_files(conversion.carried, folder)


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copy files into a folder under their own names."""
    for path in files:
        shutil.copyfile(path, folder / path.name)


def digest_source(checkpoint: Checkpoint, carried: Sequence[Path], algorithm: Algorithm) -> tuple[FileDigest, ...]:
    """Digests of everything an output is made from; those the hub publishes are taken from the cache's layout."""
    found = []
    for path in (checkpoint.folder / "config.json", *weight_files(checkpoint), *carried):
        published = published_sha256(path)
        if published is not None and path in checkpoint.files:
            digest = FileDigest(
                name=path.name, size_bytes=path.stat().st_size, digest=f"sha256:{published}", published=True
            )
        else:
            digest = digest_file(path, algorithm if path in checkpoint.files else "sha256")
        found.append(digest)
    return tuple(found)


def _manifest(request: Request, conversion: Conversion, source_files: tuple[FileDigest, ...]) -> Manifest:
    plan = conversion.plan
    return Manifest(
        src=request.src,
        dst=request.dst,
        head=plan.head,
        dtype=request.dtype,
        shard_size=request.shard_size,
        tensor_parallel=request.tensor_parallel,
        lossless=conversion.lossless,
        table=plan.table.id,
        table_sha256=plan.table.digest,
        source=Source(
            model=name_text(request.model),
            location=name_text(str(request.folder.absolute())),
            revision=request.revision,
            files=source_files,
        ),
        files=(),
        tensors={},
        tied=plan.tied,
        dropped=plan.dropped,
        proofs=(),
        versions={
            "python": platform.python_version(),
            "numpy": np.__version__,
            "ml_dtypes": ml_dtypes.__version__,
        },
        command=command_line(),
    )


def _journal_key(request: Request, conversion: Conversion) -> dict[str, Any]:
    """What has to be equal for an abandoned attempt to be continued."""
    outputs = [[o.name, o.size_bytes, hashlib.sha256(o.header).hexdigest()] for o in conversion.outputs]
    manifest = _manifest(request, conversion, ())
    keys = {"tool", "src", "dst", "head", "dtype", "table", "table_sha256"}
    return {
        **manifest.model_dump(mode="json", include=keys),
        "digest": request.digest,
        "allow_overflow": request.allow_overflow,
        "source": str(request.folder.resolve()),
        "source_stats": {name: list(stat) for name, stat in conversion.source_stats.items()},
        "outputs": outputs,
    }


def refuse(problems: Sequence[Problem], where_listed: str) -> None:
    """Raise the worst problem of a plan, if it has any.

    Args:
        where_listed: Appended to the number of the others.

    Raises:
        CheckpointError: There is one.
    """
    if problems:
        more = f" (and {len(problems) - 1} more problems{where_listed})" if len(problems) > 1 else ""
        raise CheckpointError(problems[0].message + more, hint=problems[0].hint)


@contextlib.contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn what the system refuses into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"`{error.filename or out}` cannot be read or written: {error.strerror}",
            hint="check its permissions or choose another --out",
        ) from None


def check_readable(path: Path) -> None:
    """Refuse a carried file that cannot be read, before anything is written.

    Raises:
        CheckpointError: It cannot.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(
            f"`{path}` cannot be read: {error.strerror}", hint="it is carried along with the weights"
        ) from None


def check_places(source: Path, out: Path) -> None:
    """Refuse an output that would lie in, on or around its source, or in a hub cache.

    Raises:
        CheckpointError: It would.
    """
    if out.name in ("", ".."):
        raise CheckpointError(f"the output `{out}` has no name of its own", hint="choose another --out")
    source_real = _real(source)
    for place in (out, partial_path(out)):
        place_real = _real(place)
        if place_real == source_real or source_real in place_real.parents or place_real in source_real.parents:
            raise CheckpointError(
                f"the output `{out}` and the source `{source}` are in each other's way",
                hint="choose an --out outside the source folder",
            )
    if in_hub_cache(out):
        raise CheckpointError(f"the output `{out}` is in the hub cache", hint="choose an --out outside of it")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a loop of links


def check_space(out: Path, needs_bytes: int) -> None:
    """Raise before the first byte if the disk is too full; what an abandoned attempt takes counts as free."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    abandoned = partial_path(out)
    if abandoned.is_dir():
        free += sum(path.stat().st_size for path in abandoned.iterdir() if path.is_file())
    if free < needs_bytes:
        raise CheckpointError(
            f"`{out}` needs {needs_bytes:,} bytes and its disk has {free:,} free",
            hint="free space or choose an --out on another disk",
        )


def _check_unchanged(request: Request, conversion: Conversion) -> None:
    changed = [name for name, stat in conversion.source_stats.items() if file_stat(request.folder / name) != stat]
    if changed:
        raise CheckpointError(
            f"`{request.folder / changed[0]}` changed while it was converted", hint="convert again when it is at rest"
        )


def _existing(out: Path, request: Request, wanted: Manifest, force: bool) -> Manifest | None:
    """The manifest at `out` if it is up to date; None if `out` is free to be written."""
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
    overflown = found is not None and any(t.cast is not None and t.cast.overflow for t in found.tensors.values())
    if (
        found is not None
        and found.same_request(wanted)
        and (request.allow_overflow or not overflown)
        and all(_same_file(out, file) for file in found.files)
    ):
        # `tensors` is not asked for again: every file was just read and is what it was.
        unproved = [level for level in request.prove if level not in ("tensors", *(p.level for p in found.proofs))]
        if not unproved:
            return found
        raise CheckpointError(
            f"the output `{out}` is up to date, but was converted without --prove {','.join(unproved)}",
            hint="use --force to convert it again and prove it",
        )
    raise CheckpointError(
        f"the output `{out}` exists and is another or a changed conversion", hint="use --force to replace it"
    )


def _same_file(folder: Path, file: FileDigest) -> bool:
    path = folder / file.name
    if file.digest is None or not path.is_file():
        return False
    algorithm: Algorithm = file.digest.partition(":")[0]  # type: ignore[assignment]
    return digest_file(path, algorithm) == file


def check_tied(plan: Plan) -> None:
    """A tied weight is left out of the file only if it is bit for bit the weight it repeats.

    Raises:
        CheckpointError: It is another.
    """
    for repeated, original in plan.tied:
        one, other = plan.checkpoint.tensors[repeated], plan.checkpoint.tensors[original]
        same = one.dtype == other.dtype and one.shape == other.shape
        step = PIECE_BYTES // unsigned(one.dtype).itemsize
        for start in range(0, one.elements if same else 0, step):
            count = min(step, one.elements - start)
            pair = [np.empty(count, dtype=unsigned(one.dtype)) for _ in range(2)]
            plan.checkpoint.fill(repeated, start, pair[0])
            plan.checkpoint.fill(original, start, pair[1])
            same = same and bool(np.array_equal(pair[0], pair[1]))
        if not same:
            raise CheckpointError(
                f"`{repeated}` is tied to `{original}` but their values differ",
                hint="if the decoder was trained on its own, set `tie_word_embeddings` to false in config.json",
            )


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document with sorted keys, on the disk when this returns."""
    _write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
