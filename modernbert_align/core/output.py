"""Lays out the files a conversion writes: which tensor goes into which shard, and each shard's header.

The header is canonical (order, compact JSON, padding to eight bytes), so equal content gives equal bytes: a checkpoint
converted there and back has the digest of the original file.
"""

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modernbert_align.core.checkpoint import DTYPE_BYTES, DTYPE_RANK, WEIGHTS, rank_file
from modernbert_align.core.plan import Plan, PlanItem
from modernbert_align.errors import UsageError

ShardSize = int | Literal["keep", "none"]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One safetensors file to write.

    Attributes:
        header: Everything before the first tensor.
        items: The tensors in file order.
    """

    name: str
    header: bytes
    items: tuple[PlanItem, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(item.size_bytes for item in self.items)

    def offset(self, count: int) -> int:
        """Where tensor number `count` begins."""
        return len(self.header) + sum(item.size_bytes for item in self.items[:count])


def parse_shard_size(text: str) -> ShardSize:
    """Read `keep`, `none` or a size such as `500MB` or `2GiB`, in bytes.

    Raises:
        UsageError: It is none of these.
    """
    if text in ("keep", "none"):
        return text  # type: ignore[return-value]
    match = re.fullmatch(r"(\d+)\s*([KMG]i?B|B?)", text, re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"`{text}` is no shard size", hint="keep, none, or a size such as 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def header_bytes(specs: Sequence[tuple[str, str, tuple[int, ...]]], file_format: str) -> tuple[bytes, list[str]]:
    """The canonical safetensors header: widest dtype first, then by name.

    Args:
        specs: (name, dtype, shape) of every tensor.
        file_format: The `format` entry of the metadata.

    Returns:
        Length, JSON and padding; and the names in file order.
    """
    header: dict[str, object] = {"__metadata__": {"format": file_format}}
    position = 0
    order = []
    for name, dtype, shape in sorted(specs, key=lambda spec: (-DTYPE_RANK[spec[1]], spec[0])):
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
        order.append(name)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def lay_out(plan: Plan, shard_size: ShardSize) -> tuple[OutputFile, ...]:
    """Assign every tensor to a file.

    Args:
        shard_size: `none` writes one file, `keep` the source's shards under their names, a number fills shards in
            model order up to that many bytes; a larger tensor has a shard of its own. A checkpoint divided among
            ranks has a file for each of them, whatever this says.
    """
    groups: dict[str, list[PlanItem]] = {}
    if plan.ranks > 1:
        for item in plan.items:
            groups.setdefault(rank_file(item.share.rank if item.share else 0), []).append(item)
    elif shard_size == "keep" and plan.checkpoint.index is not None:
        # A stack is kept where its first part is. Pickled shards get the names safetensors shards have.
        homes = [plan.checkpoint.tensors[item.sources[0]].path.name for item in plan.items]
        found = sorted(set(homes))
        names = {file: shard_name(number, len(found)) for number, file in enumerate(found)}
        if len(found) == len(plan.checkpoint.files) and all(file.endswith(".safetensors") for file in found):
            names = {file: file for file in found}
        for item, home in zip(plan.items, homes, strict=True):
            groups.setdefault(names[home], []).append(item)
    elif isinstance(shard_size, int):
        shards: list[list[PlanItem]] = []
        room = -1
        for item in plan.items:
            if item.size_bytes > room:
                shards.append([])
                room = shard_size
            shards[-1].append(item)
            room -= item.size_bytes
        single = len(shards) == 1
        groups = {WEIGHTS if single else shard_name(n, len(shards)): shard for n, shard in enumerate(shards)}
    else:
        groups = {WEIGHTS: list(plan.items)}
    file_format = plan.table.format(plan.dst)
    outputs = []
    for name in sorted(groups):
        by_target = {item.target: item for item in groups[name]}
        header, order = header_bytes([(i.target, i.target_dtype, i.target_shape) for i in groups[name]], file_format)
        outputs.append(OutputFile(name=name, header=header, items=tuple(by_target[target] for target in order)))
    return tuple(outputs)


def shard_name(number: int, count: int) -> str:
    """File name of shard `number`, counted from 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def index_text(plan: Plan, outputs: Sequence[OutputFile]) -> str | None:
    """`model.safetensors.index.json` as transformers writes it; None for a single file and for those of ranks.

    What the source's index says beside the total size (transformers counts parameters) stays true and is kept.
    """
    if plan.ranks > 1 or [output.name for output in outputs] == [WEIGHTS]:
        return None
    metadata: dict[str, Any] = {}
    if plan.checkpoint.index is not None and not plan.dropped:
        stored = json.loads(plan.checkpoint.index.read_text(encoding="utf-8")).get("metadata")
        metadata = dict(stored) if isinstance(stored, dict) else {}
    metadata["total_size"] = plan.size_bytes
    weight_map = {item.target: output.name for output in outputs for item in output.items}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
