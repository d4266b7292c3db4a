"""Reads a checkpoint that PaddleNLP stores divided among tensor-parallel ranks, as one whole checkpoint.

What cannot be seen from the files: whether two ranks' files were exchanged, or cut in another way into the same shapes.
A conversion manifest in the folder tells; `join_ranks` holds the files against it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_align.core.checkpoint import (
    Checkpoint,
    TensorInfo,
    has_whole_weights,
    open_rank_file,
    rank_file,
    rank_files,
    unsigned,
)
from modernbert_align.core.digest import Algorithm, file_digest
from modernbert_align.core.manifest import read_manifest
from modernbert_align.core.partial import MANIFEST
from modernbert_align.core.shares import Joined
from modernbert_align.core.table import Entry, Sizes, Table
from modernbert_align.core.tensor_parallel import check_degree, divisions
from modernbert_align.errors import CheckpointError

DEGREE_KEY, RANK_KEY = "tensor_parallel_degree", "tensor_parallel_rank"
_PIECE_BYTES = 1 << 19


def is_divided(folder: Path) -> bool:
    """Whether a folder holds rank files.

    Raises:
        CheckpointError: It holds the whole weights as well.
    """
    try:
        files = rank_files(folder) if folder.is_dir() else {}
    except OSError as error:
        raise CheckpointError(f"`{folder}` cannot be read: {error.strerror}") from None
    if files and has_whole_weights(folder):
        raise CheckpointError(
            f"`{folder}` has the whole weights and those of ranks (`{files[min(files)].name}`)",
            hint="they may be of different models; remove the ones that are not meant",
        )
    return bool(files)


def join_ranks(folder: Path, raw: Mapping[str, Any], table: Table, sizes: Sizes, head: str) -> Joined:
    """Open the files of all ranks as one checkpoint.

    Args:
        raw: The config.json document.
        sizes: From `Table.sizes`.
        head: The head the checkpoint has.

    Raises:
        CheckpointError: A rank is missing or one too many, a file is damaged, or the files do not fit together.
        UsageError: No such model can be divided among that many ranks.
    """
    files = rank_files(folder)
    degree = _degree(folder, files, raw)
    ranks = tuple(open_rank_file(files[rank]) for rank in range(degree))
    entries = table.expand(sizes, head, prefix=table.found_prefix(ranks[0].tensors))
    check_degree(sizes, entries, degree)
    divided = divisions(entries, degree)
    whole = {entry.paddle: entry for entry in entries}
    for name in {name: None for rank in ranks for name in rank.tensors}:
        _check_weight(name, ranks, whole.get(name), name in divided)
    infos = {
        name: TensorInfo(
            name=name,
            dtype=info.dtype,
            shape=divided[name].whole_shape(info.shape) if name in divided else info.shape,
            path=info.path,
            offset=info.offset,
        )
        for name, info in ranks[0].tensors.items()
    }
    return Joined(
        folder=folder,
        tensors=infos,
        files=tuple(files[rank] for rank in range(degree)),
        ranks=ranks,
        divided={name: how for name, how in divided.items() if name in infos},
    )


def _degree(folder: Path, files: Mapping[int, Path], raw: Mapping[str, Any]) -> int:
    """Among how many ranks the checkpoint is divided: as config.json says, else as many as there are files."""
    said = raw.get(DEGREE_KEY)
    declared = said if type(said) is int and said > 1 else None
    degree = declared or max(files) + 1
    according = f" (config.json: `{DEGREE_KEY}` {declared})" if declared else ""
    missing = next((rank for rank in range(degree) if rank not in files), None)
    if missing is not None:
        pickled = files[min(files)].suffix == ".pdparams"
        name = f"model_state.tp{missing:02d}.pdparams" if pickled else rank_file(missing)
        raise CheckpointError(
            f"`{folder}` lacks `{name}`: rank {missing} of {degree}{according}",
            hint="the files of all ranks are needed in one folder",
        )
    extra = [rank for rank in files if rank >= degree]
    if extra:
        raise CheckpointError(
            f"`{files[extra[0]]}` is one too many: there are {degree} ranks{according}",
            hint="remove what an earlier run left, or correct config.json",
        )
    if degree == 1:
        raise CheckpointError(
            f"`{folder}` has the file of rank 0 alone, and config.json does not say among how many it is divided",
            hint="the files of all ranks are needed in one folder",
        )
    return degree


def _check_weight(name: str, ranks: tuple[Checkpoint, ...], entry: Entry | None, is_cut: bool) -> None:
    """A weight is in the file of every rank, in one format and in the shape that is a rank's."""
    having = [rank for rank in ranks if name in rank.tensors]
    if len(having) < len(ranks):
        without = next(rank for rank in ranks if name not in rank.tensors)
        raise CheckpointError(
            f"`{name}` is in `{having[0].files[0]}` and not in `{without.files[0].name}`",
            hint="the files are of different models, or one is damaged",
        )
    first = ranks[0].tensors[name]
    expected = first.shape
    if is_cut and entry is not None:
        expected = divisions([entry], len(ranks))[name].shape(entry.paddle_shape)
    for rank in ranks:
        info = rank.tensors[name]
        if info.dtype != first.dtype:
            raise CheckpointError(
                f"`{name}` is {first.dtype} in `{first.path}` and {info.dtype} in `{info.path.name}`",
                hint="the files are of different saves",
            )
        if info.shape != expected:
            wanted = (
                f"a share of {list(entry.paddle_shape)} among {len(ranks)} ranks" if is_cut and entry else "rank 0's"
            )
            raise CheckpointError(
                f"`{name}` is {list(info.shape)} in `{info.path}`, {wanted} is {list(expected)}",
                hint="the file is of another model or degree, or config.json is",
            )


def check_replicated(joined: Joined) -> None:
    """A weight that is not divided is bit for bit the same in the files of all ranks.

    Raises:
        CheckpointError: It is not, so none of them is the weight.
    """
    for name, info in joined.tensors.items():
        if name in joined.divided:
            continue
        step = _PIECE_BYTES // unsigned(info.dtype).itemsize
        for start in range(0, info.elements, step):
            pair = [np.empty(min(step, info.elements - start), dtype=unsigned(info.dtype)) for _ in range(2)]
            joined.ranks[0].fill(name, start, pair[0])
            for rank in joined.ranks[1:]:
                rank.fill(name, start, pair[1])
                if not np.array_equal(pair[0], pair[1]):
                    raise CheckpointError(
                        f"`{name}` is not divided, but differs between `{joined.files[0]}` and `{rank.files[0].name}`",
                        hint="the files are of different saves, or the ranks drifted apart in training",
                    )


def check_digests(joined: Joined) -> None:
    """The rank files are those that the folder's conversion manifest lists, if it has one that lists them.

    Raises:
        CheckpointError: A file changed since, or was exchanged for another rank's; or the manifest cannot be read.
    """
    try:
        manifest = read_manifest(joined.folder)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint="remove it to join the files without looking at it") from None
    listed = {file.name: file.digest for file in manifest.files} if manifest is not None else {}
    for path in joined.files:
        digest = listed.get(path.name)
        if digest is None:
            continue
        algorithm: Algorithm = digest.partition(":")[0]  # type: ignore[assignment]
        if file_digest(path, algorithm) != digest:
            raise CheckpointError(
                f"`{path}` is not the file that `{MANIFEST}` beside it lists",
                hint=f"restore it; if the weights were changed on purpose, remove `{MANIFEST}`",
            )
