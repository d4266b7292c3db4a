"""Proofs: each holds on what is right, and for each fault it is said which of them see it and which cannot."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from modernbert_align.core import checkpoint as checkpoint_module
from modernbert_align.core import convert as convert_module
from modernbert_align.core import output as output_module
from modernbert_align.core import stream, writer
from modernbert_align.core.checkpoint import Checkpoint
from modernbert_align.core.convert import PROOF_LEVELS, Request, convert
from modernbert_align.core.ops import OPS
from modernbert_align.core.plan import Plan
from modernbert_align.core.resources import configs_dir
from modernbert_align.core.table import Table, load_table
from modernbert_align.errors import ProofError

ALL = PROOF_LEVELS
NOT_BACK = ("tensors", "dye")
WEIGHTS = "model.safetensors"
# As in base, Wqkv and Wi have the same shape: 3 * 8 = 2 * 12.
SAME_SHAPE = {"intermediate_size": 12}
EMBEDDING = "model.embeddings.tok_embeddings.weight"


def fused(layer: int) -> str:
    return f"model.layers.{layer}.attn.Wqkv.weight"


def gated(layer: int) -> str:
    return f"model.layers.{layer}.mlp.Wi.weight"


def square(layer: int) -> str:
    return f"model.layers.{layer}.attn.Wo.weight"


@pytest.fixture
def source(build, tmp_path):
    return build(tmp_path / "source" / "hf", **SAME_SHAPE)


@pytest.fixture
def caught_by(tmp_path):
    """Gives the proofs that fail when a conversion is made with nothing but each of them."""

    def run(request: Request, levels: tuple[str, ...] = ALL, table=None) -> set[str]:
        caught = set()
        for level in levels:
            out = tmp_path / "out" / level
            with contextlib.suppress(ProofError):
                convert(replace(request, prove=(level,)), table or load_table(), out, force=False)
            if not out.exists():
                caught.add(level)
                assert list(out.parent.glob(f"{level}*")) == []
        return caught

    return run


@pytest.fixture
def planned(monkeypatch):
    """Gives a way to change the plan of a conversion after it was made, as a fault in planning would."""
    original = convert_module.draft_plan

    def change(edit: Callable[[Plan], Plan]) -> None:
        monkeypatch.setattr(convert_module, "draft_plan", lambda *a, **k: edit(original(*a, **k)))

    return change


def edit_items(plan: Plan, **changes: Callable) -> Plan:
    """The plan with `changes[target](item)` in place of some items."""
    unknown = set(changes) - {item.target for item in plan.items}
    assert not unknown
    return replace(plan, items=tuple(changes.get(item.target, lambda item: item)(item) for item in plan.items))


def swap_sources(plan: Plan, one: str, other: str) -> Plan:
    sources = {item.target: item.sources for item in plan.items}
    return edit_items(
        plan,
        **{
            one: lambda item: replace(item, sources=sources[other]),
            other: lambda item: replace(item, sources=sources[one]),
        },
    )


# --- what is right ----------------------------------------------------------------------------------------------------


def legacy_names(arrays: dict[str, np.ndarray]) -> None:
    for name in list(arrays):
        old = name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta")
        arrays[f"module.{old.replace('layers.', 'layers._orig_mod.')}"] = arrays.pop(name)


def without_prefix(arrays: dict[str, np.ndarray]) -> None:
    for name in list(arrays):
        arrays[name.removeprefix("model.")] = arrays.pop(name)


def widen(arrays: dict[str, np.ndarray]) -> None:
    """Give the norms another width than the rest."""
    for name, array in arrays.items():
        arrays[name] = array.astype(np.float32) if "norm" in name else array


GOOD = {
    "as it is": ({}, {}, ALL),
    "other side": ({"side": "paddle"}, {}, ALL),
    "matrices of several tiles": ({"hidden_size": 136, "intermediate_size": 70}, {}, ALL),
    "matrices of several tiles, other side": ({"side": "paddle", "hidden_size": 136, "intermediate_size": 70}, {}, ALL),
    "shards": ({"shards": 3}, {}, ALL),
    "shards made one": ({"shards": 3}, {"shard_size": "none"}, ALL),
    "split": ({}, {"shard_size": 700}, ALL),
    "more elements than two bytes can number": ({"dtype": "BF16", "vocab_size": 9000}, {}, ALL),
    "Paddle's bfloat16": ({"side": "paddle", "dtype": "U16"}, {}, ALL),
    "float64": ({"dtype": "F64"}, {}, ALL),
    "several dtypes": ({"dtype": "F16", "change": widen}, {}, ALL),
    "widened": ({"dtype": "BF16"}, {"dtype": "fp32"}, ALL),
    "rounded": ({}, {"dtype": "bf16"}, NOT_BACK),
    "rounded to fewer bytes, other side": ({"side": "paddle"}, {"dtype": "fp16"}, NOT_BACK),
    "without its head": ({}, {"head": "base"}, NOT_BACK),
    "no head": ({"architectures": ["ModernBertModel"]}, {}, ALL),
    "classifier": ({"architectures": ["ModernBertForSequenceClassification"], "num_labels": 5}, {}, ALL),
    "every bias": (dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True), {}, ALL),
    "decoder of its own": ({"tie_word_embeddings": False}, {}, ALL),
    "tied copy stored": ({"tied_copy": True}, {}, ALL),
    "tied copy stored in shards": ({"tied_copy": True, "shards": 2}, {}, ALL),
    "legacy names": ({"change": legacy_names, "norm_bias": True}, {}, ALL),
    "names without prefix": ({"change": without_prefix}, {}, ALL),
    "crc32": ({}, {"digest": "crc32"}, ALL),
    "copied by the system": ({}, {"digest": "none"}, ("dye", "roundtrip")),
}


@pytest.mark.parametrize("case", GOOD)
def test_every_proof_holds_on_a_right_conversion(build, asking, tmp_path, case):
    built_with, asked_with, levels = GOOD[case]
    built = build(tmp_path / "source" / "in", **built_with)
    request = asking(built.folder, built_with.get("side", "hf"), prove=levels, **asked_with)
    result = convert(request, load_table(), tmp_path / "out", force=False)
    assert tuple(proof.level for proof in result.manifest.proofs) == levels
    written = sum(np.prod(i.target_shape) for i in convert_module.plan_conversion(request, load_table()).plan.items)
    assert any(f"each of {written} elements" in proof.statement for proof in result.manifest.proofs)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("side", ["hf", "paddle"])
def test_every_proof_holds_where_weights_are_stacked(build_decoder, decoder_table, asking, tmp_path, side, biases):
    built = build_decoder(tmp_path / "source" / "in", side=side, hidden_size=72, attention_bias=biases, dtype="BF16")
    result = convert(asking(built.folder, side, prove=ALL), decoder_table, tmp_path / "out", force=False)
    assert tuple(proof.level for proof in result.manifest.proofs) == ALL


def pickle_of(built) -> Callable:
    """Put a pickle in the place of a checkpoint's file; gives what reads it."""
    weights = built.folder / WEIGHTS
    weights.rename(weights.with_name("pytorch_model.bin"))
    found = {name: (array.view(f"u{array.itemsize}"), "F32") for name, array in built.arrays.items()}
    return lambda path: found if path.name == "pytorch_model.bin" else {}


def test_tensors_and_dye_hold_for_a_pickle(source, asking, tmp_path):
    request = asking(source.folder, prove=NOT_BACK, read_torch=pickle_of(source))
    result = convert(request, load_table(), tmp_path / "out", force=False)
    assert tuple(proof.level for proof in result.manifest.proofs) == NOT_BACK


def test_proofs_hold_whatever_the_size_of_a_piece(source, asking, tmp_path, monkeypatch):
    for size in (8, 100, 1024):
        monkeypatch.setattr(stream, "PIECE_BYTES", size)
        result = convert(asking(source.folder, prove=ALL), load_table(), tmp_path / f"out-{size}", force=False)
        assert len(result.manifest.proofs) == len(ALL)


def test_no_proof_is_recorded_that_was_not_asked_for(source, asking, tmp_path):
    assert convert(asking(source.folder, prove=()), load_table(), tmp_path / "out", force=False).manifest.proofs == ()


# --- faults of the plan -----------------------------------------------------------------------------------------------


def test_a_dropped_transpose_of_a_square_weight_is_seen_by_dye_and_roundtrip(source, asking, caught_by, planned):
    planned(lambda plan: edit_items(plan, **{square(1): lambda item: replace(item, op=OPS["id"])}))
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


def test_swapped_wqkv_and_wi_are_seen_by_dye_and_roundtrip(source, asking, caught_by, planned):
    assert source.arrays[fused(2)].shape == source.arrays[gated(2)].shape
    planned(lambda plan: swap_sources(plan, fused(2), gated(2)))
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


@pytest.mark.parametrize("weight", [fused, square, gated])
def test_swapped_layers_are_seen_by_dye_and_roundtrip(source, asking, caught_by, planned, weight):
    planned(lambda plan: swap_sources(plan, weight(1), weight(2)))
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


def test_swapped_parts_of_a_stack_are_seen_by_dye_and_roundtrip(
    build_decoder, decoder_table, asking, caught_by, planned, tmp_path
):
    def swap(item):
        q, k, v = item.sources
        return replace(item, sources=(k, q, v))

    built = build_decoder(tmp_path / "source" / "hf")
    planned(lambda plan: edit_items(plan, **{fused(1): swap}))
    assert caught_by(asking(built.folder), table=decoder_table) == {"dye", "roundtrip"}


def test_swapped_parts_taken_from_a_stack_are_seen_by_dye_and_roundtrip(
    build_decoder, decoder_table, asking, caught_by, planned, tmp_path
):
    built = build_decoder(tmp_path / "source" / "paddle", side="paddle")
    q, k = (f"model.layers.1.attn.{name}_proj.weight" for name in "qk")
    size = built.config["hidden_size"]
    planned(
        lambda plan: edit_items(
            plan,
            **{
                q: lambda item: replace(item, rows=(size, 2 * size)),
                k: lambda item: replace(item, rows=(0, size)),
            },
        )
    )
    assert caught_by(asking(built.folder, "paddle"), table=decoder_table) == {"dye", "roundtrip"}


def test_a_forgotten_weight_is_seen_by_dye_and_roundtrip(source, asking, caught_by, planned):
    planned(lambda plan: replace(plan, items=tuple(item for item in plan.items if item.target != square(2))))
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


def test_a_weight_planned_twice_is_seen_by_dye_and_roundtrip(source, asking, caught_by, planned):
    """Both copies are written as they were meant to be, but the header knows of one."""
    planned(lambda plan: replace(plan, items=(*plan.items, *(item for item in plan.items if item.target == square(2)))))
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


def test_a_weight_that_is_wrongly_taken_for_one_of_another_head_is_seen_by_dye(source, asking, caught_by, planned):
    """The request drops no head, but with something dropped `roundtrip` is refused before it can look."""

    def drop(plan):
        items = tuple(item for item in plan.items if item.target != square(2))
        return replace(plan, items=items, dropped=(square(2),))

    planned(drop)
    assert caught_by(asking(source.folder), NOT_BACK) == {"dye"}


def test_a_shape_that_only_the_header_has_is_seen_by_dye_and_roundtrip(source, asking, caught_by, planned):
    """The bytes are right, so `tensors` holds; the matrix is not."""
    planned(
        lambda plan: edit_items(plan, **{EMBEDDING: lambda item: replace(item, target_shape=item.target_shape[::-1])})
    )
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


def test_a_wrong_format_of_the_same_width_is_seen_by_roundtrip(build, asking, caught_by, planned, tmp_path):
    """`dye` leaves casts out, and with them the format in the header."""
    built = build(tmp_path / "source" / "hf", dtype="BF16")
    planned(
        lambda plan: edit_items(plan, **{square(0): lambda item: replace(item, source_dtype="F16", target_dtype="F16")})
    )
    assert caught_by(asking(built.folder)) == {"roundtrip"}


# --- faults of the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["hf", "paddle"])
def test_a_wrong_table_is_seen_by_no_proof_of_the_conversion(source, asking, caught_by, tmp_path, side):
    """All of them take the table's word: the expectation of `dye` is the table, and `roundtrip` makes the fault twice.

    A wrong table is found by `table lint`, which holds it against live models whose sizes all differ, and by `diff`,
    which compares what both models compute; the latter alone finds two norms of one size with their names swapped.
    """
    text = (configs_dir() / "tables" / "modernbert.toml").read_text()
    one, other = (f'{side} = "layers.{{i}}.{name}.weight"' for name in ("attn.Wqkv", "mlp.Wi"))
    assert text.count(one) == text.count(other) == 1
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace(one, "@").replace(other, one).replace("@", other))
    assert caught_by(asking(source.folder), table=load_table(str(wrong))) == set()


def test_a_wrong_alias_is_seen_by_no_proof_of_the_conversion(build, asking, caught_by, tmp_path, monkeypatch):
    """Which stored name is which weight is the table's word as well, on the way there and back."""
    original = Table.canonical
    wrong = {"final_norm.gamma": "final_norm.beta", "final_norm.beta": "final_norm.gamma"}

    def canonical(self, name, side):
        body = name.removeprefix("model.")
        return original(self, name.removesuffix(body) + wrong.get(body, body), side)

    monkeypatch.setattr(Table, "canonical", canonical)

    def legacy(arrays):
        for new, old in (("weight", "gamma"), ("bias", "beta")):
            arrays[f"model.final_norm.{old}"] = arrays.pop(f"model.final_norm.{new}")

    built = build(tmp_path / "source" / "hf", norm_bias=True, change=legacy)
    assert caught_by(asking(built.folder)) == set()


# --- faults of the code that reads ------------------------------------------------------------------------------------


def test_a_read_one_element_too_far_is_seen_by_dye_and_roundtrip(source, asking, caught_by, monkeypatch):
    original = Checkpoint.fill

    def off_by_one(self, name, start, out):
        original(self, name, start + (name == square(1)), out)

    monkeypatch.setattr(Checkpoint, "fill", off_by_one)
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


def test_a_system_call_one_element_too_far_is_seen_by_roundtrip(source, asking, caught_by, monkeypatch):
    """`dye` puts its own bytes in the place of the system call."""
    original = Checkpoint._read_at
    offset = {i.name: i.offset for i in checkpoint_module.open_checkpoint(source.folder).tensors.values()}[square(1)]

    def off_by_one(self, path, position, out):
        original(self, path, position + 4 * (path.parent == source.folder and position == offset), out)

    monkeypatch.setattr(Checkpoint, "_read_at", off_by_one)
    assert caught_by(asking(source.folder)) == {"roundtrip"}


def test_a_bit_that_flips_while_the_source_is_read_is_seen_by_roundtrip(source, asking, caught_by, monkeypatch):
    """What was read is what was written, so `tensors` holds; `dye` looks at places, not at this run's values."""
    original, write = Checkpoint._read_at, convert_module.write_outputs
    converting = []

    def flaky(self, path, position, out):
        original(self, path, position, out)
        if converting and path.parent == source.folder:
            out[0] ^= 1
            converting.clear()

    def written(*arguments, **options):
        converting.append(True)
        return write(*arguments, **options)

    monkeypatch.setattr(Checkpoint, "_read_at", flaky)
    monkeypatch.setattr(convert_module, "write_outputs", written)
    assert caught_by(asking(source.folder)) == {"roundtrip"}


def test_swapped_names_in_the_header_reader_are_seen_by_no_proof(source, asking, caught_by, monkeypatch):
    """All proofs believe it; its own tests hold it against the safetensors library."""
    original = checkpoint_module.read_header

    def swapped(path):
        tensors, metadata = original(path)
        if path.parent == source.folder:
            one, other = tensors[square(1)], tensors[square(2)]
            tensors |= {one.name: replace(one, offset=other.offset), other.name: replace(other, offset=one.offset)}
        return tensors, metadata

    monkeypatch.setattr(checkpoint_module, "read_header", swapped)
    assert caught_by(asking(source.folder)) == set()


def test_a_wrong_read_of_a_pickles_array_is_seen_by_dye(source, asking, caught_by, monkeypatch):
    original = Checkpoint.fill

    def from_the_start(self, name, start, out):
        original(self, name, 0 if name in self.arrays else start, out)

    monkeypatch.setattr(stream, "PIECE_BYTES", 64)
    monkeypatch.setattr(Checkpoint, "fill", from_the_start)
    assert caught_by(asking(source.folder, read_torch=pickle_of(source)), NOT_BACK) == {"dye"}


# --- faults of the code that moves ------------------------------------------------------------------------------------


def test_a_transpose_that_skips_squares_is_seen_by_dye_alone(source, asking, caught_by, monkeypatch):
    """Undone by itself on the way back; a conversion that nobody followed would look right."""
    original = stream.transpose_into

    def lazy(out, bits):
        if out.shape == bits.shape:
            out[:] = bits
        else:
            original(out, bits)

    monkeypatch.setattr(stream, "transpose_into", lazy)
    assert caught_by(asking(source.folder)) == {"dye"}


def tiles(rows: int, cols: int, size: int) -> Iterator[tuple[int, int]]:
    return ((top, left) for top in range(0, rows, size) for left in range(0, cols, size))


def test_tiles_turned_in_their_place_are_seen_by_dye_alone(build, asking, caught_by, tmp_path, monkeypatch):
    """The tiles of a square weight are transposed, but not their order."""
    size = 64
    original = stream.transpose_into

    def in_place(out, bits):
        if out.shape != bits.shape:
            original(out, bits)
            return
        for top, left in tiles(*bits.shape, size):
            out[top : top + size, left : left + size] = bits[top : top + size, left : left + size].T

    monkeypatch.setattr(stream, "transpose_into", in_place)
    built = build(tmp_path / "source" / "hf", hidden_size=2 * size, intermediate_size=10)
    assert caught_by(asking(built.folder)) == {"dye"}


@pytest.mark.parametrize("fault", ["last tile not written", "two tiles swapped"])
def test_a_wrong_tile_is_seen_by_dye_and_roundtrip(build, asking, caught_by, tmp_path, monkeypatch, fault):
    size = 64
    original = stream.transpose_into

    def wrong(out, bits):
        original(out, bits)
        if out.shape[0] < 2 * size:
            return
        if fault == "last tile not written":
            out[size:, size:] = 0
        else:
            out[:size, :8], out[size : 2 * size, :8] = out[size : 2 * size, :8].copy(), out[:size, :8].copy()

    monkeypatch.setattr(stream, "transpose_into", wrong)
    built = build(tmp_path / "source" / "hf", hidden_size=136, intermediate_size=50)
    assert caught_by(asking(built.folder)) == {"dye", "roundtrip"}


@pytest.mark.parametrize("fault", ["doubled", "lost", "swapped with the next"])
def test_an_element_at_the_edge_of_a_piece_is_seen_by_dye_and_roundtrip(source, asking, caught_by, monkeypatch, fault):
    original = stream._copied

    def edgy(checkpoint, item, scratch):
        last = None
        for piece in original(checkpoint, item, scratch):
            if fault == "doubled" and last is not None:
                piece[1:] = piece[:-1].copy()
                piece[0] = last
            elif fault == "swapped with the next" and piece.size > 1:
                piece[-2:] = piece[:-3:-1].copy()
            last = piece[-1]
            yield piece[:-1] if fault == "lost" and piece.nbytes == 64 else piece

    monkeypatch.setattr(stream, "PIECE_BYTES", 64)
    monkeypatch.setattr(stream, "_copied", edgy)
    # Too few bytes leave a file that does not fit its header, which reading it back sees as well.
    expected = {"lost": {"tensors", "dye", "roundtrip"}, "doubled": {"dye", "roundtrip"}}
    assert caught_by(asking(source.folder)) == expected.get(fault, {"dye"})


def test_elements_whose_numbers_end_alike_are_told_apart_by_dye(build, asking, caught_by, tmp_path, monkeypatch):
    """Two bytes hold 65,536 numbers: the rest of a number is looked at in a second pass."""
    distance = 1 << 16
    original = stream._copied

    def far(checkpoint, item, scratch):
        if item.target != EMBEDDING:
            yield from original(checkpoint, item, scratch)
            return
        whole = np.concatenate([piece.copy() for piece in original(checkpoint, item, scratch)])
        whole[0], whole[distance] = whole[distance], whole[0]
        yield whole

    monkeypatch.setattr(stream, "_copied", far)
    built = build(tmp_path / "source" / "hf", dtype="BF16", vocab_size=9000)
    # An exchange undoes itself, so the way back does not show it.
    assert caught_by(asking(built.folder)) == {"dye"}


def test_a_wrong_rounding_is_seen_by_no_proof(source, asking, caught_by, monkeypatch):
    """`dye` leaves casts out, `tensors` compares with what the cast gave, and `roundtrip` is refused."""
    original = stream.cast_bits

    def wrong(bits, source, target, loss):
        cast = original(bits, source, target, loss)
        return cast if source == target else cast ^ 1

    monkeypatch.setattr(stream, "cast_bits", wrong)
    assert caught_by(asking(source.folder, dtype="bf16"), NOT_BACK) == set()


def test_a_wrong_widening_is_seen_by_roundtrip(build, asking, caught_by, tmp_path, monkeypatch):
    original = stream.cast_bits

    def wrong(bits, source, target, loss):
        cast = original(bits, source, target, loss)
        return cast ^ 0x10000 if (source, target) == ("BF16", "F32") else cast

    monkeypatch.setattr(stream, "cast_bits", wrong)
    built = build(tmp_path / "source" / "hf", dtype="BF16")
    assert caught_by(asking(built.folder, dtype="fp32")) == {"roundtrip"}


# --- faults of the code that writes -----------------------------------------------------------------------------------


def test_a_bias_zeroed_while_it_is_written_is_seen_by_roundtrip(source, asking, caught_by, monkeypatch):
    """The digest is of the zeros, so `tensors` holds; `dye` follows numbers, not the run that writes."""
    original = stream.pieces

    def zeroed(checkpoint, item, *rest):
        for piece in original(checkpoint, item, *rest):
            yield piece * (item.target != "decoder.bias")

    monkeypatch.setattr(writer, "pieces", zeroed)
    assert caught_by(asking(source.folder)) == {"roundtrip"}


def test_a_bias_zeroed_by_the_code_that_moves_is_seen_by_dye_and_roundtrip(source, asking, caught_by, monkeypatch):
    original = stream._copied

    def zeroed(checkpoint, item, scratch):
        for piece in original(checkpoint, item, scratch):
            yield piece * (item.target != "decoder.bias")

    monkeypatch.setattr(stream, "_copied", zeroed)
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_bit_that_flips_on_the_disk_is_seen_by_tensors_and_roundtrip(source, asking, caught_by, monkeypatch, place):
    original = convert_module._write_small_files

    def flip(request, conversion, folder):
        original(request, conversion, folder)
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[len(conversion.outputs[0].header) if place == "first" else -1] ^= 0x40
        (folder / WEIGHTS).write_bytes(data)

    monkeypatch.setattr(convert_module, "_write_small_files", flip)
    assert caught_by(asking(source.folder)) == {"tensors", "roundtrip"}


@pytest.mark.parametrize("fault", ["a name", "cut off", "bytes added"])
def test_a_file_damaged_on_the_disk_is_seen_by_tensors_and_roundtrip(source, asking, caught_by, monkeypatch, fault):
    original = convert_module._write_small_files

    def damage(request, conversion, folder):
        original(request, conversion, folder)
        data = (folder / WEIGHTS).read_bytes()
        changed = {"a name": data.replace(b"layers.1.attn.Wo", b"layers.1.attn.Wp"), "cut off": data[:-1]}
        (folder / WEIGHTS).write_bytes(changed.get(fault, data + b"\0"))

    monkeypatch.setattr(convert_module, "_write_small_files", damage)
    assert caught_by(asking(source.folder)) == {"tensors", "roundtrip"}


def test_an_order_that_is_not_the_headers_is_seen_by_dye_and_roundtrip(source, asking, caught_by, monkeypatch):
    """`tensors` reads back in the order of writing and does not ask the header which tensor that is."""
    original = output_module.header_bytes

    def swapped(specs, file_format):
        header, order = original(specs, file_format)
        one, other = order.index(square(1)), order.index(square(2))
        order[one], order[other] = order[other], order[one]
        return header, order

    monkeypatch.setattr(output_module, "header_bytes", swapped)
    assert caught_by(asking(source.folder)) == {"dye", "roundtrip"}


def test_a_wrong_copy_by_the_system_is_seen_by_roundtrip(source, asking, caught_by, monkeypatch):
    """With --digest none the bytes of an unchanged weight do not pass the code that `dye` follows."""
    original = writer._copy_range
    monkeypatch.setattr(
        writer, "_copy_range", lambda one, other, count, position: original(one, other, count, position - 4)
    )
    assert caught_by(asking(source.folder, digest="none"), ("dye", "roundtrip")) == {"roundtrip"}


# --- what a failed proof leaves ---------------------------------------------------------------------------------------


def test_a_failed_proof_keeps_the_earlier_conversion(source, asking, tmp_path, snapshot, planned):
    out = tmp_path / "out"
    convert(asking(source.folder), load_table(), out, force=False)
    before = snapshot(tmp_path)
    planned(lambda plan: swap_sources(plan, fused(1), fused(2)))
    for level in ("dye", "roundtrip"):
        with pytest.raises(ProofError):
            convert(asking(source.folder, prove=(level,)), load_table(), out, force=True)
        assert snapshot(tmp_path) == before


def test_dye_fails_before_anything_is_written(source, asking, tmp_path, planned, monkeypatch):
    planned(lambda plan: swap_sources(plan, fused(1), fused(2)))
    monkeypatch.setattr(convert_module, "open_partial", lambda *_, **__: pytest.fail("opened a folder"))
    with pytest.raises(ProofError, match=r"element 0 of `model.layers.1.attn.Wqkv.weight` does not come from where"):
        convert(asking(source.folder, prove=("dye",)), load_table(), tmp_path / "out", force=False)


def test_the_failed_proof_is_one_line_and_exit_code_1(source, cli_main, tmp_path, planned):
    planned(lambda plan: edit_items(plan, **{square(1): lambda item: replace(item, op=OPS["id"])}))
    code, err = cli_main("--model", source.folder, "--out", tmp_path / "out", "--prove", "tensors,roundtrip")
    assert code == 1
    assert err.count("error:") == 1
    assert "`model.safetensors` does not come back" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.fixture
def cli_main(capsys):
    from modernbert_align.cli import main

    def run(*arguments):
        code = main(["convert", "--src", "hf", "--dst", "paddle", *map(str, arguments)])
        return code, capsys.readouterr().err

    return run
