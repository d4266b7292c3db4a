"""Checkpoints that no converter may choke on: cut short, lying, hostile, or not a checkpoint at all.

Every entry damages a good checkpoint. The converter must answer with one line that names the file or the tensor,
whatever is wrong, without running anything, and within bounds of time and memory that do not depend on what a file
claims.
"""

import builtins
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from modernbert_align.core.model_config import parse_config
from modernbert_align.core.table import load_table

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, PDPARAMS = "pytorch_model.bin", "model_state.pdparams"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, MATRIX = "model.final_norm.weight", "model.layers.1.mlp.Wi.weight"
EMBEDDING = "model.embeddings.tok_embeddings.weight"
MARKER = "ran"
ESCAPES = "evil\x1b[31m\r\n\u202e\x9b"
TERABYTES = 4 << 40
CONFIG: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "max_position_embeddings": 64,
    "model_type": "modernbert",
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "pad_token_id": 3,
    "vocab_size": 23,
}

Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Malformed:
    """A damaged checkpoint.

    Attributes:
        damage: Changes a good checkpoint folder.
        says: What the error line must contain.
        src: The framework whose good checkpoint it was.
        headers_tell: Whether the headers alone give it away, so that a dry run, which reads no more, refuses it too.
    """

    damage: Damage
    says: str
    src: str = "hf"
    headers_tell: bool = True


def arrays(side: str = "hf") -> dict[str, np.ndarray]:
    """The tensors of the good checkpoint."""
    entries = load_table().expand(parse_config(CONFIG), "masked_lm")
    generator = np.random.default_rng(3)
    return {
        entry.name(side): generator.standard_normal(entry.shape(side)).astype(np.float32)
        for entry in entries
        if entry.op.stored
    }


def write_good(folder: Path, side: str = "hf") -> None:
    """Write a checkpoint that converts."""
    folder.mkdir()
    save_file(arrays(side), folder / WEIGHTS, metadata={"format": "pt" if side == "hf" else "np"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "tokenizer.json").write_text('{"model": {"unk_id": NaN}}')  # not JSON, and not the converter's business


# Files that are no files


def as_fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def as_socket(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    here = Path.cwd()
    os.chdir(folder)  # a socket's path may have no more than 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(WEIGHTS)
    finally:
        os.chdir(here)


def as_link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def outside(name: str) -> Damage:
    """A good file that lies elsewhere and is linked to."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.rename(folder.parent / name)
        path.symlink_to(Path("..") / name)

    return damage


def through_a_folder(name: str) -> Damage:
    """The link out is not in the last part of the path."""

    def damage(folder: Path) -> None:
        (folder.parent / "elsewhere").mkdir()
        (folder / name).rename(folder.parent / "elsewhere" / name)
        (folder / "here").symlink_to("../elsewhere")
        (folder / name).symlink_to(f"here/{name}")

    return damage


def sparse(name: str, size: int) -> Damage:
    """A file of zeros, or the file it is with zeros behind it; it takes no room on the disk."""

    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return damage


def content(name: str, text: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


# safetensors


def header_length(folder: Path) -> int:
    """Where the first tensor begins."""
    with (folder / WEIGHTS).open("rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


def cut(place: Callable[[int, int], int]) -> Damage:
    """Keep as many bytes as `place` says, given where the header ends and the file does."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS
        os.truncate(path, place(header_length(folder), path.stat().st_size))

    return damage


def appended(more: bytes) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / WEIGHTS).open("ab") as file:
            file.write(more)

    return damage


def length(number: int) -> Damage:
    """Claim another length of the header."""

    def damage(folder: Path) -> None:
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(struct.pack("<Q", number))

    return damage


def write_header(path: Path, text: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def raw_header(text: bytes | str) -> Damage:
    """Another header before the same data."""

    def damage(folder: Path) -> None:
        body = (folder / WEIGHTS).read_bytes()[header_length(folder) :]
        write_header(folder / WEIGHTS, text if isinstance(text, bytes) else text.encode(), body)

    return damage


def header(change: Callable[[dict[str, Any]], Any], more: bytes = b"") -> Damage:
    """Change the header as JSON, and maybe put more data behind that of the good file."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        end = header_length(folder)
        document = json.loads(raw[8:end])
        change(document)
        write_header(folder / WEIGHTS, json.dumps(document).encode(), raw[end:] + more)

    return damage


def entry(name: str = NORM, **changes: Any) -> Damage:
    """Change what the header says about a tensor; None deletes."""

    def change(document: dict[str, Any]) -> None:
        document[name] = {k: v for k, v in (document[name] | changes).items() if v is not None}

    return header(change)


def moved(start: float, end: float) -> Damage:
    """Move both ends of a tensor."""

    def change(document: dict[str, Any]) -> None:
        first, last = document[NORM]["data_offsets"]
        document[NORM]["data_offsets"] = [first + start, last + end]

    return header(change)


def offsets(make: Callable[[int, int], Any]) -> Damage:
    def change(document: dict[str, Any]) -> None:
        document[NORM]["data_offsets"] = make(*document[NORM]["data_offsets"])

    return header(change)


def added(name: str, shape: list[Any], size: int = 0, **more: Any) -> Damage:
    """One more tensor of bytes at the end of the file."""

    def change(document: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in document.items() if n != "__metadata__")
        document[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size], **more}

    return header(change, bytes(size))


def overlapping(document: dict[str, Any]) -> None:
    document["model.layers.0.mlp_norm.weight"]["data_offsets"] = document[NORM]["data_offsets"]


def twice_in_the_header(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    end = header_length(folder)
    text = raw[8:end].rstrip()
    again = json.dumps({NORM: json.loads(text)[NORM]}).encode()
    write_header(folder / WEIGHTS, text[:-1] + b"," + again[1:], raw[end:])


def many_names(count: int, last: str) -> str:
    """A header with many tensors without elements, and one more."""
    one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return "{" + ",".join(f'"{i}":{one}' for i in range(count)) + f',"{last}":{one}}}'


def huge_and_true(folder: Path) -> None:
    """Terabytes that are really there, as zeros that take no room on the disk."""
    rows = TERABYTES // 4 // CONFIG["hidden_size"]
    config(vocab_size=rows, decoder_bias=False)(folder)
    weights = arrays()
    del weights["decoder.bias"], weights[EMBEDDING]
    save_file(weights, folder / WEIGHTS)
    end = max(start + array.nbytes for start, array in _placed(folder, weights))

    def change(document: dict[str, Any]) -> None:
        document[EMBEDDING] = {
            "dtype": "F32",
            "shape": [rows, CONFIG["hidden_size"]],
            "data_offsets": [end, end + TERABYTES],
        }

    header(change)(folder)
    os.truncate(folder / WEIGHTS, header_length(folder) + end + TERABYTES)


def _placed(folder: Path, weights: dict[str, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    document = json.loads((folder / WEIGHTS).read_bytes()[8 : header_length(folder)])
    return [(document[name]["data_offsets"][0], array) for name, array in weights.items()]


def huge_header_of_zeros(folder: Path) -> None:
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000))
        file.truncate(99_000_008)


# The tensors themselves


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    """Change the tensors and write them again."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def another_model(folder: Path) -> None:
    """BERT's names."""
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    names = [f"bert.encoder.layer.{i}.{part}" for i in range(24) for part in (*parts, *norms, "intermediate.dense")]
    shapes = {".weight": (8, 8), ".bias": (8,)}
    save_file(
        {name + end: np.zeros(shape, np.float32) for name in names for end, shape in shapes.items()}, folder / WEIGHTS
    )


def many_unknown_tensors(folder: Path) -> None:
    """Every name is near to some that are missing, and comparing all with all would take minutes."""
    config(num_hidden_layers=200)(folder)
    names = [f"model.layers.{i}.attn.Wqvk{j}.weight" for i in range(200) for j in range(20)]
    save_file({name: np.zeros(1, np.float32) for name in names}, folder / WEIGHTS)


def swapped_layout(weights: dict[str, np.ndarray]) -> None:
    weights[MATRIX] = np.ascontiguousarray(weights[MATRIX].T)


def converted_already(folder: Path) -> None:
    save_file(arrays("paddle"), folder / WEIGHTS)


# config.json


def config(**changes: Any) -> Damage:
    """Change config.json; `...` deletes a key."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        document = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
        path.write_text(json.dumps(document))

    return damage


def config_key(key: str, text: str) -> Damage:
    """Put JSON text in config.json that `json.dumps` would not write."""

    def damage(folder: Path) -> None:
        document = {k: v for k, v in CONFIG.items() if k != key}
        (folder / "config.json").write_text(f'{json.dumps(document)[:-1]}, "{key}": {text}}}')

    return damage


def decoder(**changes: Any) -> Damage:
    return config(model_type="modernbert-decoder", architectures=["ModernBertDecoderForCausalLM"], **changes)


# Shards


def shard(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for part, file in enumerate((FIRST, SECOND)):
        names = sorted(weights)[part::2]
        save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Shard the checkpoint and change its index."""

    def damage(folder: Path) -> None:
        shard(folder)
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))

    return damage


def placed_in(where: Any) -> Damage:
    """Place one tensor elsewhere."""
    return index(lambda document: document["weight_map"].update({NORM: where}))


def sharded_with(*damages: Damage) -> Damage:
    return both(shard, *damages)


def in_two_shards(folder: Path) -> None:
    shard(folder)
    here, there = load_file(folder / FIRST), load_file(folder / SECOND)
    name = next(iter(here))
    save_file(there | {name: here[name]}, folder / SECOND)


def twice_in_the_index(folder: Path) -> None:
    shard(folder)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{FIRST}", ', 1))


def absent_from_its_shard(folder: Path) -> None:
    shard(folder)
    place = json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    weights = load_file(folder / place)
    del weights[NORM]
    save_file(weights, folder / place)


# Pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


TOUCH = f"touch {MARKER}"
# Each creates the marker when it is unpickled.
HOSTILE = {
    "os.system": pickle.dumps({"w": Call(os.system, TOUCH)}, 4),
    "os.system, protocol 2": pickle.dumps({"w": Call(os.system, TOUCH)}, 2),
    "eval": pickle.dumps({"w": Call(builtins.eval, f"open('{MARKER}', 'w')")}, 2),
    "nested": pickle.dumps({"w": Call(tuple, [Call(Call, Call(os.system, TOUCH))])}, 4),
    "object array": pickle.dumps({"w": np.array([Call(os.system, TOUCH)], dtype=object)}, 4),
}


def pdparams(payload: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / PDPARAMS).write_bytes(payload)

    return damage


def pdparams_cut(folder: Path) -> None:
    payload = pickle.dumps(arrays("paddle"), 4)
    pdparams(payload[: len(payload) // 2])(folder)


def array_that_claims(*shape: int) -> bytes:
    """A pickled array of a few bytes that says it has another shape."""
    good = pickle.dumps({"w": np.zeros((3, 7), np.float32)}, 2)
    assert good.count(b"K\x03K\x07\x86") == 1
    numbers = b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape)
    return good.replace(b"K\x03K\x07\x86", b"(" + numbers + b"t")


def torch_file(make: Callable[[Any], Any], *, zipped: bool = True) -> Damage:
    """What `make`, given torch, returns, as torch.save writes it."""

    def damage(folder: Path) -> None:
        import torch

        (folder / WEIGHTS).unlink()
        torch.save(make(torch), folder / BIN, _use_new_zipfile_serialization=zipped)

    return damage


def torch_pickle(payload: bytes) -> Damage:
    """A zip archive as torch.save writes it, with any pickle in it."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3\n")

    return damage


def torch_cut(folder: Path) -> None:
    torch_file(lambda torch: {name: torch.from_numpy(array) for name, array in arrays().items()})(folder)
    os.truncate(folder / BIN, (folder / BIN).stat().st_size // 2)


def torch_storage_of_terabytes(folder: Path) -> None:
    """The number of elements in the pickle is another, both the storage's and the tensor's."""
    torch_file(lambda torch: {"w": torch.zeros(70_000)})(folder)
    with zipfile.ZipFile(folder / BIN) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    name = next(name for name in records if name.endswith("/data.pkl"))
    true, false = b"J" + struct.pack("<i", 70_000), b"\x8a\x08" + struct.pack("<q", TERABYTES // 4)
    assert records[name].count(true) == 2
    records[name] = records[name].replace(true, false)
    with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_STORED) as archive:
        for record, stored in records.items():
            archive.writestr(record, stored)


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
NESTED = 100_000

# One thing is wrong with each.
MALFORMED: dict[str, Malformed] = {
    # Cut short, or with more behind it
    "no byte": Malformed(cut(lambda _header, _end: 0), WEIGHTS),
    "one byte": Malformed(cut(lambda _header, _end: 1), WEIGHTS),
    "seven bytes": Malformed(cut(lambda _header, _end: 7), WEIGHTS),
    "length alone": Malformed(cut(lambda _header, _end: 8), WEIGHTS),
    "one byte of the header": Malformed(cut(lambda _header, _end: 9), WEIGHTS),
    "half the header": Malformed(cut(lambda header, _end: header // 2), WEIGHTS),
    "header without its last byte": Malformed(cut(lambda header, _end: header - 1), WEIGHTS),
    "header alone": Malformed(cut(lambda header, _end: header), "truncated"),
    "one byte of data": Malformed(cut(lambda header, _end: header + 1), "truncated"),
    "half the data": Malformed(cut(lambda header, end: (header + end) // 2), "truncated"),
    "all but the last byte": Malformed(cut(lambda _header, end: end - 1), "truncated"),
    "one byte more": Malformed(appended(b"\0"), "trailing bytes"),
    "twice the file": Malformed(lambda f: appended((f / WEIGHTS).read_bytes())(f), "trailing bytes"),
    "terabytes of zeros behind the data": Malformed(sparse(WEIGHTS, TERABYTES), "trailing bytes"),
    "terabytes of zeros": Malformed(both(cut(lambda _header, _end: 0), sparse(WEIGHTS, TERABYTES)), WEIGHTS),
    # A length that is not the header's
    "header of no bytes": Malformed(length(0), WEIGHTS),
    "header of one byte": Malformed(length(1), WEIGHTS),
    "header of 2^63 bytes": Malformed(length(2**63), WEIGHTS),
    "header of 2^64 - 1 bytes": Malformed(length(2**64 - 1), WEIGHTS),
    "header of 100 MB in a small file": Malformed(length(100_000_000), WEIGHTS),
    "header into the data": Malformed(lambda f: length(header_length(f) + 4)(f), WEIGHTS),
    "header a byte short": Malformed(
        lambda f: length(len((f / WEIGHTS).read_bytes()[8:].partition(b"}}")[0]))(f), WEIGHTS
    ),
    "header of 99 MB of zeros": Malformed(huge_header_of_zeros, WEIGHTS),
    "header of 9 MB of lists": Malformed(raw_header(b"[" + b"[]," * 3_000_000 + b"[]]"), WEIGHTS),
    "header of 11 MB of lists": Malformed(raw_header(b"[" + b"[]," * 3_700_000 + b"[]]"), WEIGHTS),
    # A header that is not one
    "header of noise": Malformed(raw_header(bytes(range(256))), WEIGHTS),
    "header not JSON": Malformed(raw_header("{'a': 1}"), WEIGHTS),
    "header a list": Malformed(raw_header("[1, 2]"), WEIGHTS),
    "header a number": Malformed(raw_header("12"), WEIGHTS),
    "header null": Malformed(raw_header("null"), WEIGHTS),
    "header without tensors": Malformed(both(raw_header("{}"), cut(lambda header, _end: header)), "is missing"),
    "header not UTF-8": Malformed(raw_header(b'{"a\xff": ' + ONE.encode() + b"}"), WEIGHTS),
    "header in UTF-16": Malformed(lambda f: raw_header(json.dumps(_header(f)).encode("utf-16"))(f), "UTF-8|utf-8"),
    "header with a byte order mark": Malformed(
        lambda f: raw_header(b"\xef\xbb\xbf" + json.dumps(_header(f)).encode())(f), WEIGHTS
    ),
    "header with NaN": Malformed(raw_header(f'{{"a": {ONE[:-1]},"note": NaN}}}}'), WEIGHTS),
    "NaN as an offset": Malformed(offsets(lambda start, _end: [start, float("nan")]), WEIGHTS),
    "infinite offset": Malformed(offsets(lambda start, _end: [start, float("inf")]), WEIGHTS),
    "header of lists in lists": Malformed(raw_header("[" * NESTED), WEIGHTS),
    "header of objects in objects": Malformed(raw_header('{"a":' * NESTED), WEIGHTS),
    "lists in lists as a shape": Malformed(
        raw_header(f'{{"a":{{"dtype":"F32","shape":{"[" * 500 + "]" * 500},"data_offsets":[0,4]}}}}'), WEIGHTS
    ),
    "tensor twice": Malformed(twice_in_the_header, NORM),
    "key of a tensor twice": Malformed(raw_header(f'{{"a": {ONE[:-1]},"shape":[1]}}}}'), WEIGHTS),
    "key of the metadata twice": Malformed(
        raw_header(f'{{"__metadata__": {{"a": "b", "a": "c"}}, "a": {ONE}}}'), WEIGHTS
    ),
    "two of 60,000 tensors have one name": Malformed(raw_header(many_names(60_000, "59999")), "59999"),
    "metadata a list": Malformed(header(lambda d: d.update(__metadata__=["pt"])), WEIGHTS),
    "metadata an empty list": Malformed(header(lambda d: d.update(__metadata__=[])), WEIGHTS),
    "metadata false": Malformed(header(lambda d: d.update(__metadata__=False)), WEIGHTS),
    "number in the metadata": Malformed(header(lambda d: d.update(__metadata__={"format": 1})), WEIGHTS),
    "object in the metadata": Malformed(header(lambda d: d.update(__metadata__={"format": {}})), WEIGHTS),
    # Tensors that are not where they are said to be
    "overlapping tensors": Malformed(header(overlapping), WEIGHTS),
    "hole before a tensor": Malformed(moved(4, 4), WEIGHTS),
    "tensor begins early": Malformed(moved(-4, 0), WEIGHTS),
    "tensor ends late": Malformed(moved(0, 4), WEIGHTS),
    "tensor beyond the file": Malformed(moved(2**40, 2**40), WEIGHTS),
    "negative offsets": Malformed(offsets(lambda start, end: [start - end, 0]), WEIGHTS),
    "end before start": Malformed(offsets(lambda start, end: [end, start]), WEIGHTS),
    "offsets of 2^64": Malformed(moved(2**64, 2**64), WEIGHTS),
    "offset of 4,000 digits": Malformed(moved(0, int("9" * 4000)), WEIGHTS),
    "offset of 100,000 digits": Malformed(
        raw_header('{"a": ' + ONE.replace("[0,4]", f"[0,{'9' * 100_000}]") + "}"), WEIGHTS
    ),
    "offsets as floats": Malformed(offsets(lambda start, end: [float(start), float(end)]), NORM),
    "offsets as booleans": Malformed(
        both(raw_header(f'{{"{NORM}": {ONE.replace("0,4", "false,4")}}}'), cut(lambda header, _end: header + 4)), NORM
    ),
    "offsets as text": Malformed(offsets(lambda start, end: [str(start), str(end)]), WEIGHTS),
    "offsets as one text": Malformed(offsets(lambda _start, _end: "04"), WEIGHTS),
    "offsets as an object": Malformed(offsets(lambda start, end: {"0": start, "1": end}), WEIGHTS),
    "one offset": Malformed(offsets(lambda start, _end: [start]), WEIGHTS),
    "three offsets": Malformed(offsets(lambda start, end: [start, end, end]), WEIGHTS),
    # Tensors that are not what they are said to be
    "shape with more bytes": Malformed(entry(shape=[9]), NORM),
    "shape with fewer bytes": Malformed(entry(shape=[7]), NORM),
    "shape without elements": Malformed(entry(shape=[0, 8]), NORM),
    "shape of 2^62": Malformed(entry(shape=[2**62]), NORM),
    "shape whose product overflows": Malformed(entry(shape=[2**62, 2**62, 8]), NORM),
    "shape whose product overflows to the right size": Malformed(entry(shape=[2**63, 2, 1]), NORM),
    "huge shape without elements": Malformed(added("extra", [0, 2**62, 2**62]), "extra"),
    "shape of 300,000 dimensions": Malformed(entry(shape=[9] * 300_000), NORM),
    "shape of numbers of 4,000 digits": Malformed(entry(shape=[int("9" * 4000)] * 2000), WEIGHTS),
    "negative shape": Malformed(entry(shape=[-8]), NORM),
    "shape of two negatives": Malformed(entry(shape=[-2, -4]), NORM),
    "shape as floats": Malformed(entry(shape=[8.0]), NORM),
    "shape as booleans": Malformed(entry(shape=[True, 8]), NORM),
    "shape as text": Malformed(entry(shape="8"), NORM),
    "shape a number": Malformed(entry(shape=8), NORM),
    "dtype of half the width": Malformed(entry(dtype="F16"), NORM),
    "dtype of twice the width": Malformed(entry(dtype="F64"), NORM),
    "integers": Malformed(entry(dtype="I32"), NORM),
    "unknown dtype": Malformed(entry(dtype="F31"), "F31"),
    "dtype in small letters": Malformed(entry(dtype="f32"), "f32"),
    "dtype a number": Malformed(entry(dtype=32), NORM),
    "dtype a list": Malformed(entry(dtype=["F32"]), NORM),
    "dtype with escapes": Malformed(entry(dtype=ESCAPES), NORM),
    "dtype of a megabyte": Malformed(entry(dtype="F" * 1_000_000), NORM),
    "tensor without dtype": Malformed(entry(dtype=None), NORM),
    "tensor without shape": Malformed(entry(shape=None), NORM),
    "tensor without offsets": Malformed(entry(data_offsets=None), WEIGHTS),
    "tensor with an unknown key": Malformed(entry(quantized=4), NORM),
    "tensor a number": Malformed(header(lambda d: d.update({NORM: 8})), WEIGHTS),
    "tensor null": Malformed(header(lambda d: d.update({NORM: None})), WEIGHTS),
    # Names
    "tensor without a name": Malformed(added("", [0]), "``"),
    "name with escapes": Malformed(added(ESCAPES, [0]), r"evil\\x1b\[31m"),
    "name with half a surrogate pair": Malformed(added("\ud800", [0]), "ud800"),
    "name of a megabyte": Malformed(added("a" * 1_000_000, [0]), "aaaa"),
    "name of a megabyte of prefixes": Malformed(added("module." * 150_000, [0]), "module"),
    "name of a megabyte of dots": Malformed(added("." * 1_000_000, [0]), r"\.\."),
    "name of a megabyte of layers": Malformed(added("layers" + ".0" * 500_000, [0]), r"layers\.0"),
    # Tensors that do not make the model
    "tensor missing": Malformed(tensors(lambda w: w.pop(NORM)), NORM),
    "tensor misspelt": Malformed(tensors(lambda w: w.update({"model.final_nrom.weight": w.pop(NORM)})), "final_nrom"),
    "tensor of another shape": Malformed(tensors(lambda w: w.update({NORM: np.zeros(9, np.float32)})), NORM),
    "tensor with a dimension more": Malformed(tensors(lambda w: w.update({NORM: np.zeros((8, 1), np.float32)})), NORM),
    "tensor of another layout": Malformed(tensors(swapped_layout), MATRIX),
    "tensor under two spellings": Malformed(tensors(lambda w: w.update({f"module.{NORM}": w[NORM]})), NORM),
    "tied weight that differs": Malformed(
        tensors(lambda w: w.update({"decoder.weight": w[EMBEDDING] + 1})), "decoder.weight", headers_tell=False
    ),
    "weights of another model": Malformed(another_model, "bert.encoder"),
    "4,000 unknown tensors": Malformed(many_unknown_tensors, "Wqvk"),
    "10,000 unknown tensors": Malformed(
        both(raw_header(many_names(10_000, "x")), cut(lambda header, _end: header)), "no row"
    ),
    "already converted": Malformed(converted_already, "already in Paddle layout"),
    "not converted yet": Malformed(
        lambda f: save_file(arrays(), f / WEIGHTS), "already in Hugging Face layout", src="paddle"
    ),
    "terabytes that are there": Malformed(huge_and_true, "needs .* bytes", headers_tell=False),
    "truncated Paddle weights": Malformed(cut(lambda _header, end: end - 1), "truncated", src="paddle"),
    "Paddle weights that overlap": Malformed(header(overlapping), WEIGHTS, src="paddle"),
    # No file
    "weights missing": Malformed(lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "weights a folder": Malformed(as_folder(WEIGHTS), WEIGHTS),
    "weights a pipe": Malformed(as_fifo(WEIGHTS), WEIGHTS),
    "weights a socket": Malformed(as_socket, WEIGHTS),
    "weights a link to themselves": Malformed(as_link(WEIGHTS, WEIGHTS), WEIGHTS),
    "weights a link to nothing": Malformed(as_link(WEIGHTS, "nothing"), WEIGHTS),
    "weights a link to /dev/zero": Malformed(as_link(WEIGHTS, "/dev/zero"), WEIGHTS),
    "weights a link to /dev/random": Malformed(as_link(WEIGHTS, "/dev/random"), WEIGHTS),
    "weights a link to /proc/self/mem": Malformed(as_link(WEIGHTS, "/proc/self/mem"), "leads out"),
    "weights a link out of the folder": Malformed(outside(WEIGHTS), "leads out"),
    "weights a link through a folder's link": Malformed(through_a_folder(WEIGHTS), "leads out"),
    "config.json a link out of the folder": Malformed(outside("config.json"), "config.json.*leads out"),
    "config.json a link to /proc/kmsg": Malformed(as_link("config.json", "/proc/kmsg"), "config.json"),
    "config.json a link to itself": Malformed(as_link("config.json", "config.json"), "config.json"),
    "config.json a link to /dev/zero": Malformed(as_link("config.json", "/dev/zero"), "config.json"),
    "config.json a folder": Malformed(as_folder("config.json"), "config.json"),
    "config.json a pipe": Malformed(as_fifo("config.json"), "config.json"),
    "tokenizer.json a link out of the folder": Malformed(outside("tokenizer.json"), "tokenizer.json.*leads out"),
    "tokenizer.json a link to /proc/self/mem": Malformed(
        as_link("tokenizer.json", "/proc/self/mem"), "tokenizer.json.*leads out"
    ),
    "tokenizer.json of terabytes": Malformed(sparse("tokenizer.json", TERABYTES), "needs .* bytes", headers_tell=False),
    # Shards
    "shard missing": Malformed(sharded_with(lambda f: (f / SECOND).unlink()), SECOND),
    "shard truncated": Malformed(
        sharded_with(lambda f: os.truncate(f / SECOND, (f / SECOND).stat().st_size - 1)), SECOND
    ),
    "shard a folder": Malformed(sharded_with(as_folder(SECOND)), SECOND),
    "shard a pipe": Malformed(sharded_with(as_fifo(SECOND)), SECOND),
    "shard a link to /dev/zero": Malformed(sharded_with(as_link(SECOND, "/dev/zero")), SECOND),
    "shard a link to the other": Malformed(sharded_with(as_link(SECOND, FIRST)), "two shards"),
    "shard a link out of the folder": Malformed(sharded_with(outside(SECOND)), f"{SECOND}.*leads out"),
    "shard above the folder": Malformed(
        both(shard, lambda f: (f / SECOND).rename(f.parent / SECOND), lambda f: _place_all(f, f"../{SECOND}")),
        "outside its folder",
    ),
    "shard by its absolute path": Malformed(
        both(shard, lambda f: _place_all(f, str(f / SECOND))), "outside its folder"
    ),
    "shard in a folder": Malformed(placed_in(f"sub/{SECOND}"), "outside its folder"),
    "shard `..`": Malformed(placed_in(".."), r"`\.\.`"),
    "shard `.`": Malformed(placed_in("."), r"`\.`"),
    "shard without a name": Malformed(placed_in(""), INDEX),
    "shard with NUL in its name": Malformed(placed_in("a\0b.safetensors"), r"a\\x00b"),
    "shard with escapes in its name": Malformed(placed_in(ESCAPES), r"evil\\x1b"),
    "shard with a name of a megabyte": Malformed(placed_in("a" * 1_000_000), "aaaa|File name too long"),
    "shard with half a surrogate pair in its name": Malformed(placed_in("\ud800"), "ud800"),
    "shard a number": Malformed(placed_in(5), INDEX),
    "shards all numbers": Malformed(index(lambda d: d.update(weight_map=dict.fromkeys(d["weight_map"], 5))), INDEX),
    "shard null": Malformed(placed_in(None), INDEX),
    "shard a list": Malformed(placed_in([FIRST]), INDEX),
    "tensor in two shards": Malformed(in_two_shards, "two shards"),
    "tensor in another shard": Malformed(
        index(lambda d: d["weight_map"].update(dict.fromkeys(d["weight_map"], FIRST))), FIRST
    ),
    "tensor that only the index has": Malformed(index(lambda d: d["weight_map"].update(ghost=FIRST)), "ghost"),
    "tensor that the index does not have": Malformed(index(lambda d: d["weight_map"].pop(NORM)), NORM),
    "tensor absent from its shard": Malformed(absent_from_its_shard, NORM),
    "tensor twice in the index": Malformed(twice_in_the_index, NORM),
    "index without a map": Malformed(index(lambda d: d.pop("weight_map")), f"{INDEX}.*weight_map"),
    "map a list": Malformed(index(lambda d: d.update(weight_map=list(d["weight_map"]))), INDEX),
    "map null": Malformed(index(lambda d: d.update(weight_map=None)), INDEX),
    "map empty": Malformed(index(lambda d: d.update(weight_map={})), "is missing|no tensors"),
    "index a list": Malformed(sharded_with(content(INDEX, "[]")), INDEX),
    "index not JSON": Malformed(sharded_with(content(INDEX, "{")), INDEX),
    "index of no bytes": Malformed(sharded_with(content(INDEX, "")), INDEX),
    "index not UTF-8": Malformed(sharded_with(content(INDEX, b'{"\xff": 1}')), INDEX),
    "index of lists in lists": Malformed(sharded_with(content(INDEX, "[" * NESTED)), INDEX),
    "lists in lists in the index's metadata": Malformed(
        both(
            shard,
            lambda f: content(
                INDEX,
                (f / INDEX).read_text().replace('"metadata": {}', f'"metadata": {{"a": {"[" * 500 + "]" * 500}}}'),
            )(f),
        ),
        INDEX,
    ),
    "index of terabytes": Malformed(sharded_with(sparse(INDEX, TERABYTES)), INDEX),
    "index a link out of the folder": Malformed(sharded_with(outside(INDEX)), f"{INDEX}.*leads out"),
    "index a pipe": Malformed(sharded_with(as_fifo(INDEX)), WEIGHTS),
    # config.json
    "config.json missing": Malformed(lambda f: (f / "config.json").unlink(), "config.json"),
    "config.json of no bytes": Malformed(content("config.json", ""), "config.json"),
    "config.json not JSON": Malformed(content("config.json", "{'a': 1}"), "config.json"),
    "config.json not UTF-8": Malformed(content("config.json", b'{"\xff": 1}'), "config.json"),
    "config.json a list": Malformed(content("config.json", "[]"), "config.json"),
    "config.json null": Malformed(content("config.json", "null"), "config.json"),
    "config.json of lists in lists": Malformed(content("config.json", "[" * NESTED), "config.json"),
    "lists in lists in config.json": Malformed(config_key("x", "[" * 500 + "]" * 500), "config.json"),
    "config.json of terabytes": Malformed(sparse("config.json", TERABYTES), "config.json"),
    "config.json of 11 MB of lists": Malformed(config_key("x", "[" + "[]," * 3_700_000 + "[]]"), "config.json"),
    "number of 5,000 digits": Malformed(config_key("hidden_size", "9" * 5000), "config.json"),
    "hidden_size of 400 digits": Malformed(config(hidden_size=int("8" * 400)), "config.json.*400 digits"),
    "hidden_size NaN": Malformed(config(hidden_size=float("nan")), "hidden_size"),
    "hidden_size infinite": Malformed(config(hidden_size=float("inf")), "hidden_size"),
    "hidden_size negative": Malformed(config(hidden_size=-8), "hidden_size"),
    "hidden_size 0": Malformed(config(hidden_size=0), "hidden_size"),
    "hidden_size a fraction": Malformed(config(hidden_size=8.5), "hidden_size"),
    "hidden_size text": Malformed(config(hidden_size="8"), "hidden_size"),
    "hidden_size true": Malformed(config(hidden_size=True), "hidden_size"),
    "hidden_size a list": Malformed(config(hidden_size=[8]), "hidden_size"),
    "hidden_size 10^18": Malformed(config(hidden_size=10**18), r"`\S*\.weight` is \["),
    "vocab_size 2^62": Malformed(config(vocab_size=2**62), "decoder.bias|tok_embeddings"),
    "intermediate_size 10^30": Malformed(config(intermediate_size=10**30), "mlp.*weight"),
    "num_attention_heads 10^18": Malformed(config(num_attention_heads=10**18), "num_attention_heads"),
    "num_hidden_layers 10^9": Malformed(config(num_hidden_layers=10**9), "num_hidden_layers"),
    "num_hidden_layers 10^18": Malformed(config(num_hidden_layers=10**18), "num_hidden_layers"),
    "num_hidden_layers 0": Malformed(config(num_hidden_layers=0), "num_hidden_layers"),
    "num_hidden_layers one too many": Malformed(config(num_hidden_layers=4), r"layers\.3"),
    "num_hidden_layers one too few": Malformed(config(num_hidden_layers=2), r"layers\.2"),
    "num_hidden_layers 10^9 of a decoder": Malformed(decoder(num_hidden_layers=10**9), "num_hidden_layers"),
    "num_hidden_layers NaN of a decoder": Malformed(decoder(num_hidden_layers=float("nan")), "num_hidden_layers"),
    "hidden_size 10^18 of a decoder": Malformed(decoder(hidden_size=10**18), "weight"),
    "config.json of a decoder": Malformed(decoder(), "weight"),
    "norm_eps of 400 digits": Malformed(config(norm_eps=int("9" * 400)), "config.json.*400 digits"),
    "norm_eps NaN": Malformed(config(norm_eps=float("nan")), "norm_eps"),
    "attention_bias text": Malformed(config(attention_bias="no"), "attention_bias"),
    "pad_token_id text": Malformed(config(pad_token_id="3"), "pad_token_id"),
    "RoPE base of 400 digits": Malformed(config(global_rope_theta=int("9" * 400)), "config.json.*400 digits"),
    "RoPE type a list": Malformed(config(rope_scaling={"rope_type": ["linear"]}), "rope_type"),
    "RoPE parameters a list": Malformed(config(rope_parameters=["default"]), "rope_parameters"),
    "layer_types a number": Malformed(config(layer_types=3), "layer_types"),
    "layer_types of lists": Malformed(config(layer_types=[[], {}, []]), "layer_types"),
    "id2label a list": Malformed(config(id2label=["a"]), "id2label"),
    "hidden_activation a list": Malformed(config(hidden_activation=["gelu"]), "hidden_activation"),
    "architectures missing": Malformed(config(architectures=...), "config.json"),
    "architectures null": Malformed(config(architectures=None), "config.json"),
    "architectures unknown": Malformed(config(architectures=["BertModel"]), "BertModel"),
    "architectures text": Malformed(config(architectures="ModernBertForMaskedLM"), "config.json"),
    "architectures a number": Malformed(config(architectures=5), "config.json"),
    "architectures an object": Malformed(config(architectures={"0": "ModernBertForMaskedLM"}), "config.json"),
    "architectures of lists": Malformed(config(architectures=[["ModernBertForMaskedLM"]]), "config.json"),
    "architectures with escapes": Malformed(config(architectures=[ESCAPES]), r"evil\\x1b"),
    "architecture of another head": Malformed(
        config(architectures=["ModernBertForSequenceClassification"]), "decoder|classifier"
    ),
    "model_type missing": Malformed(config(model_type=...), "model_type"),
    "model_type unknown": Malformed(config(model_type="bert"), "bert"),
    "model_type a list": Malformed(config(model_type=["modernbert"]), "model_type"),
    "model_type with escapes": Malformed(config(model_type=ESCAPES), r"evil\\+x1b"),
    # Pickles. Where they would run something they would create the marker.
    **{f"pdparams: {name}": Malformed(pdparams(payload), PDPARAMS, src="paddle") for name, payload in HOSTILE.items()},
    "pdparams: extension": Malformed(pdparams(b"\x80\x02}X\x01\x00\x00\x00w\x82\x01s."), "EXT1", src="paddle"),
    "pdparams: persistent id": Malformed(
        pdparams(b"\x80\x02}X\x01\x00\x00\x00wX\x01\x00\x00\x00xQs."), "BINPERSID", src="paddle"
    ),
    "pdparams: text of 2^62 bytes": Malformed(
        pdparams(b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"w."), PDPARAMS, src="paddle"
    ),
    "pdparams: frame of 2^62 bytes": Malformed(
        pdparams(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."), PDPARAMS, src="paddle"
    ),
    "pdparams: memo of 2^32 places": Malformed(pdparams(b"\x80\x02}r\xff\xff\xff\xff\x71."), PDPARAMS, src="paddle"),
    "pdparams: lists in lists": Malformed(
        pdparams(b"\x80\x02" + b"]" * NESTED + b"a" * (NESTED - 1) + b"."), PDPARAMS, src="paddle"
    ),
    "pdparams: array of exabytes": Malformed(pdparams(array_that_claims(2**40, 2**20)), PDPARAMS, src="paddle"),
    "pdparams: array of negative size": Malformed(pdparams(array_that_claims(-3, -7)), PDPARAMS, src="paddle"),
    "pdparams: cut short": Malformed(pdparams_cut, PDPARAMS, src="paddle"),
    "pdparams: a list": Malformed(pdparams(pickle.dumps([1, 2], 4)), PDPARAMS, src="paddle"),
    "pdparams: numbers": Malformed(pdparams(pickle.dumps({"w": 1}, 4)), PDPARAMS, src="paddle"),
    "pdparams: name with escapes": Malformed(
        pdparams(pickle.dumps({ESCAPES: np.zeros(3, np.float32)}, 4)), r"evil\\x1b", src="paddle"
    ),
    "pdparams: no bytes": Malformed(pdparams(b""), PDPARAMS, src="paddle"),
    "pdparams: terabytes of zeros": Malformed(both(pdparams(b""), sparse(PDPARAMS, TERABYTES)), PDPARAMS, src="paddle"),
    "pdparams: a link to /dev/zero": Malformed(
        both(pdparams(b""), as_link(PDPARAMS, "/dev/zero")), WEIGHTS, src="paddle"
    ),
    "pdparams: a link out of the folder": Malformed(
        both(pdparams(HOSTILE["eval"]), outside(PDPARAMS)), "leads out", src="paddle"
    ),
    **{f"torch: {name}": Malformed(torch_pickle(payload), BIN) for name, payload in HOSTILE.items()},
    "torch: hostile, older format": Malformed(
        torch_file(lambda _torch: {"w": Call(os.system, TOUCH)}, zipped=False), BIN
    ),
    "torch: extension": Malformed(torch_pickle(b"\x80\x02}X\x01\x00\x00\x00w\x82\x01s."), BIN),
    "torch: text of 2^62 bytes": Malformed(torch_pickle(b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"w."), BIN),
    "torch: memo of 2^32 places": Malformed(torch_pickle(b"\x80\x02}r\xff\xff\xff\xff."), "is missing"),
    "torch: cut short": Malformed(torch_cut, BIN),
    "torch: storage of terabytes": Malformed(torch_storage_of_terabytes, BIN),
    "torch: a list": Malformed(torch_file(lambda torch: [torch.zeros(3)]), BIN),
    "torch: numbers": Malformed(torch_file(lambda _torch: {"w": 1}), BIN),
    "torch: name with escapes": Malformed(torch_file(lambda torch: {ESCAPES: torch.zeros(3)}), r"evil\\x1b"),
    "torch: name of a megabyte of prefixes": Malformed(
        torch_file(lambda torch: {"module." * 150_000: torch.zeros(3)}), "module"
    ),
    "torch: terabytes of zeros": Malformed(
        both(lambda f: (f / WEIGHTS).rename(f / BIN), lambda f: os.truncate(f / BIN, 0), sparse(BIN, TERABYTES)), BIN
    ),
}


def _header(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / WEIGHTS).read_bytes()[8 : header_length(folder)])
    return found


def _place_all(folder: Path, where: str) -> None:
    """Place everything that was in the second shard elsewhere."""
    document = json.loads((folder / INDEX).read_text())
    document["weight_map"] = {n: where if file == SECOND else file for n, file in document["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(document))
