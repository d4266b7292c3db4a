"""Small checkpoints whose elements are all different, made from the table and written by the library."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

from modernbert_align.core.convert import Request
from modernbert_align.core.model_config import parse_config
from modernbert_align.core.table import Table, load_table

settings.register_profile("core", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("core")

# Every axis has another size, heads are even, layer 0 is full attention and layers 1 and 2 slide.
CONFIG: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "dtype": "float32",
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_size": 8,
    "intermediate_size": 6,
    "local_attention": 16,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "modernbert",
    "norm_bias": False,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "pad_token_id": 3,
    "tie_word_embeddings": True,
    "transformers_version": "4.55.4",
    "vocab_size": 23,
}
# What makes it a decoder's; its attention has q, k and v apart.
DECODER: dict[str, Any] = {"architectures": ["ModernBertDecoderForCausalLM"], "model_type": "modernbert-decoder"}
NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U16": np.dtype(np.uint16),
    "I64": np.dtype(np.int64),
}
# First bit pattern and step: distinct finite values of both signs, with low bits that a cast has to round.
_PATTERNS = {
    "F64": (0x3F00_0000_0000_0000, 0x0000_1234_5678_9ABD),
    "F32": (0x3C00_0000, 0x1235),
    "F16": (0x1400, 1),
    "BF16": (0x3C00, 1),
    "U16": (0x3C00, 1),
    "I64": (1, 1),
}


def distinct(start: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of values that no other `start` range has; every other one is negative."""
    width = NUMPY[dtype].itemsize
    first, step = _PATTERNS[dtype]
    number = np.arange(start, start + int(np.prod(shape, dtype=np.int64)), dtype=np.uint64)
    bits = np.uint64(first) + number * np.uint64(step) + (number % np.uint64(2) << np.uint64(8 * width - 1))
    return bits.astype(f"u{width}").view(NUMPY[dtype]).reshape(shape)


@dataclass(frozen=True)
class Built:
    """A checkpoint folder and what is in it."""

    folder: Path
    arrays: dict[str, np.ndarray]
    config: dict[str, Any]


def write_shards(folder: Path, arrays: Mapping[str, np.ndarray], shards: int, metadata: dict[str, str]) -> None:
    """Write `model-0000i-of-0000n.safetensors` and their index."""
    names = list(arrays)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: arrays[name] for name in part}, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    size = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def build_checkpoint(
    folder: Path,
    *,
    side: str = "hf",
    dtype: str = "F32",
    shards: int = 0,
    tied_copy: bool = False,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
    files: Mapping[str, str] | None = None,
    table: Table | None = None,
    **config: Any,
) -> Built:
    """Write a synthetic checkpoint.

    Args:
        side: hf or paddle: names, layout and file format.
        dtype: safetensors name of every tensor, or name -> dtype for some with F32 for the rest.
        shards: 0 writes one file.
        tied_copy: Store a tied decoder as well, equal to the embedding.
        change: Edits the arrays before they are written.
        files: Other files: name -> text.
        table: The model's; ModernBERT's by default.
        config: config.json keys that differ from `CONFIG`; None deletes a key.
    """
    document = {key: value for key, value in (CONFIG | config).items() if value is not None}
    table = table or load_table()
    sizes = table.sizes(document, where="test")
    entries = table.expand(sizes, table.head_of(document["architectures"], where="test"))
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for entry in entries:
        if entry.name(side) in arrays:  # parts of one stacked weight
            continue
        if entry.op.stored:
            arrays[entry.name(side)] = distinct(start, entry.shape(side), dtype)
            start += arrays[entry.name(side)].size
        elif tied_copy:
            arrays[entry.name(side)] = arrays[entry.to if side == "hf" else entry.to_paddle].copy()
    if change is not None:
        change(arrays)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt" if side == "hf" else "np"}
    if shards:
        write_shards(folder, arrays, shards, metadata)
    else:
        save_file(arrays, folder / "model.safetensors", metadata=metadata)
    # As transformers' save_pretrained writes it.
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return Built(folder=folder, arrays=arrays, config=document)


@pytest.fixture(scope="session")
def build():
    """Gives `build_checkpoint`."""
    return build_checkpoint


@pytest.fixture(scope="session")
def build_decoder():
    """Gives `build_checkpoint` for the decoder's table; `norm_bias` and the like as keywords."""

    def built(folder: Path, **options: Any) -> Built:
        return build_checkpoint(folder, table=load_table("modernbert-decoder"), **DECODER | options)

    return built


@pytest.fixture(scope="session")
def table():
    """The shipped table."""
    return load_table()


@pytest.fixture(scope="session")
def decoder_table():
    """The shipped table of the decoders, whose q, k and v are one weight on Paddle's side."""
    return load_table("modernbert-decoder")


@pytest.fixture(scope="session")
def tiny_config():
    """Gives a parsed config: the tiny one with some keys changed."""

    def parsed(**changes):
        return parse_config({key: value for key, value in (CONFIG | changes).items() if value is not None})

    return parsed


@pytest.fixture(scope="session")
def asking():
    """Gives a conversion request for a folder; other options of `Request` as keywords."""

    def request(folder: Path, src: str = "hf", dtype: str = "keep", **options: Any) -> Request:
        dst = "paddle" if src == "hf" else "hf"
        return Request(folder=folder, model="synthetic", revision=None, src=src, dst=dst, dtype=dtype, **options)

    return request


@pytest.fixture(scope="session")
def snapshot():
    """Gives everything below a folder: relative path -> bytes, or None for a folder."""

    def taken(folder: Path) -> dict[str, bytes | None]:
        return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}

    return taken
