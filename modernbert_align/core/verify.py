"""Checks a finished conversion again: against its manifest, and against its source if that can be reached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modernbert_align.core.cast import CastLoss
from modernbert_align.core.checkpoint import (
    WEIGHTS,
    Checkpoint,
    TorchReader,
    open_checkpoint,
    open_rank_file,
    rank_files,
)
from modernbert_align.core.convert import Request, plan_conversion
from modernbert_align.core.digest import Algorithm, Background, Hasher, file_digest, new_hasher
from modernbert_align.core.manifest import FileDigest, Manifest, read_manifest
from modernbert_align.core.partial import JOURNAL, MANIFEST
from modernbert_align.core.plan import share_key
from modernbert_align.core.stream import PIECE_BYTES, Scratch, pieces
from modernbert_align.core.table import Table
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, EXIT_NOT_COMPARED, AlignError, CheckpointError

Notify = Callable[[str], None]
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pdparams")


@dataclass(kw_only=True)
class Verification:
    """What was looked at and what was wrong.

    Attributes:
        checked: One sentence per thing looked at.
        problems: One sentence per difference.
        not_checked: One sentence per thing that could not be looked at, with the reason.
    """

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if something was looked at and nothing was wrong."""
        if self.problems:
            return EXIT_MISALIGNED
        return EXIT_ALIGNED if self.checked else EXIT_NOT_COMPARED


def verify(
    folder: Path,
    table: Table,
    *,
    source: Path | None = None,
    read_torch: TorchReader | None = None,
    notify: Notify = lambda _: None,
) -> Verification:
    """Check a converted folder.

    Args:
        table: The installed table of the model's type.
        source: The source checkpoint; the folder the manifest names by default.

    Raises:
        CheckpointError: The folder has no manifest, or its weights cannot be read at all.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no such directory: `{folder}`", hint="give a folder that `convert` wrote")
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"`{folder}` has no `{MANIFEST}`", hint="only a folder that `convert` wrote can be verified"
        )
    found = Verification()
    _check_files(folder, manifest, found, notify)
    _check_tensors(folder, manifest, found, notify)
    place = source if source is not None else Path(manifest.source.location)
    if not place.is_dir():
        found.not_checked.append(f"the source `{place}` is not there: give it with --source")
    else:
        _check_source(place, manifest, table, found, read_torch, notify)
    return found


def _algorithm(digest: str) -> Algorithm:
    return digest.partition(":")[0]  # type: ignore[return-value]


def _check_files(folder: Path, manifest: Manifest, found: Verification, notify: Notify) -> None:
    """Every listed file by size and digest; and nothing beside them that a framework would load instead."""
    notify(f"checking {len(manifest.files)} files")
    _check_digests(folder, manifest.files, found, "")
    listed = {file.name for file in manifest.files} | {MANIFEST}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name in listed:
            continue
        if path.name == JOURNAL:
            found.problems.append(f"`{path}` is left of a stopped conversion; delete it if nothing else is wrong")
        elif path.suffix in _WEIGHT_SUFFIXES or path.name == f"{WEIGHTS}.index.json":
            found.problems.append(f"`{path}` is not part of the conversion, and a framework may load it instead")
        else:
            others.append(path.name)
    if others:
        found.not_checked.append(f"not part of the conversion: {', '.join(others)}")


def _check_digests(folder: Path, files: Sequence[FileDigest], found: Verification, whose: str) -> None:
    """Files by size and digest; only those whose bytes were read count as checked."""
    compared = 0
    by_size = []
    for file in files:
        problem, looked = _against(folder / file.name, file)
        compared += looked
        if problem:
            found.problems.append(f"{whose and 'source: '}{problem}")
        elif not looked:
            by_size.append(file.name)
    if compared:
        found.checked.append(f"{compared} {whose}files against the digests of the manifest")
    if by_size:
        found.not_checked.append(f"{whose}files without a digest in the manifest, but for size: {', '.join(by_size)}")


def _against(path: Path, file: FileDigest) -> tuple[str, bool]:
    """What is wrong with a file, and whether its bytes were compared."""
    if not path.is_file():
        return f"`{path}` is missing", False
    if path.stat().st_size != file.size_bytes:
        return f"`{path}` has {path.stat().st_size} bytes, the manifest says {file.size_bytes}", False
    if file.digest is None:
        return "", False
    if file_digest(path, _algorithm(file.digest)) != file.digest:
        return f"`{path}` changed: its {_algorithm(file.digest)} is another than the manifest's", True
    return "", True


def _check_tensors(folder: Path, manifest: Manifest, found: Verification, notify: Notify) -> None:
    """Every tensor, read through the header, against the digest it was written with."""
    try:
        written = _open_written(folder, manifest)
    except CheckpointError as error:
        found.problems.append(error.message)
        return
    names, recorded = set(written), set(manifest.tensors)
    found.problems += [f"`{name}` is missing from `{folder}`" for name in sorted(recorded - names)]
    found.problems += [f"`{name}` in `{folder}` is not in the manifest" for name in sorted(names - recorded)]
    digested = [name for name, record in manifest.tensors.items() if record.digest and name in names]
    if not digested:
        return
    notify(f"checking {len(digested)} tensors")
    scratch = Scratch()
    with Background() as background:
        for name in digested:
            digest = str(manifest.tensors[name].digest)
            hasher = new_hasher(_algorithm(digest))
            checkpoint, stored = written[name]
            _add_tensor(checkpoint, stored, scratch, hasher, background)
            if f"{_algorithm(digest)}:{hasher.hexdigest()}" != digest:
                found.problems.append(f"`{name}` in `{folder}` changed")
    found.checked.append(f"{len(digested)} tensors against the digests they were written with")


def _open_written(folder: Path, manifest: Manifest) -> dict[str, tuple[Checkpoint, str]]:
    """Key in the manifest -> the checkpoint and the name under which the tensor is stored there."""
    if manifest.tensor_parallel == 1:
        checkpoint = open_checkpoint(folder)
        return {name: (checkpoint, name) for name in checkpoint.tensors}
    files = rank_files(folder)
    ranks = {rank: open_rank_file(path) for rank, path in files.items()}
    return {share_key(name, rank): (one, name) for rank, one in ranks.items() for name in one.tensors}


def _add_tensor(checkpoint: Checkpoint, name: str, scratch: Scratch, hasher: Hasher, background: Background) -> None:
    info = checkpoint.tensors[name]
    step = PIECE_BYTES // max(1, info.size_bytes // max(1, info.elements))
    for start in range(0, info.elements, step):
        piece = scratch.piece(min(step, info.elements - start), info.dtype)
        checkpoint.fill(name, start, piece)
        background.add(hasher, piece)
    background.wait()


def _check_source(
    place: Path,
    manifest: Manifest,
    table: Table,
    found: Verification,
    read_torch: TorchReader | None,
    notify: Notify,
) -> None:
    """The source is what it was, and converting it again gives the same tensors."""
    notify(f"checking the source {place}")
    _check_digests(place, manifest.source.files, found, "source ")
    if table.digest != manifest.table_sha256:
        found.not_checked.append(
            f"the table `{table.id}` changed since: the source is converted with the installed one"
        )
    request = Request(
        folder=place,
        model=manifest.source.model,
        revision=manifest.source.revision,
        src=manifest.src,
        dst=manifest.dst,
        dtype=manifest.dtype,
        head=manifest.head,
        tensor_parallel=manifest.tensor_parallel,
        read_torch=read_torch,
        prove=(),
    )
    try:
        plan = plan_conversion(request, table).plan
    except AlignError as error:
        found.problems.append(f"source: {error.message}")
        return
    found.problems += [f"source: {problem.message}" for problem in plan.problems]
    items = {item.key: item for item in plan.items}
    digested = [name for name, record in manifest.tensors.items() if record.digest and name in items]
    different = sorted(set(items) ^ set(manifest.tensors))
    found.problems += [f"`{name}` is on one side only: in the source or in the manifest" for name in different]
    if plan.problems:
        return
    if not digested:
        found.not_checked.append("no tensor has a digest in the manifest: none is held against the source's")
        return
    notify(f"converting {len(digested)} tensors again, into a hash")
    scratch = Scratch()
    with Background() as background:
        for name in digested:
            digest = str(manifest.tensors[name].digest)
            hasher = new_hasher(_algorithm(digest))
            for piece in pieces(plan.checkpoint, items[name], scratch, CastLoss()):
                background.add(hasher, piece)
            background.wait()
            if f"{_algorithm(digest)}:{hasher.hexdigest()}" != digest:
                found.problems.append(f"`{name}` is not what converting the source gives")
    found.checked.append(f"{len(digested)} tensors against a new conversion of the source")
