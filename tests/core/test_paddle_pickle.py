"""Reading `.pdparams`: what Paddle and numpy write is read, and no other pickle does anything."""

import codecs
import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_align.core import paddle_pickle as module
from modernbert_align.core.paddle_pickle import read_pdparams
from modernbert_align.errors import CheckpointError

NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
MEGABYTE = 1 << 20
TABLE = "StructuredToParameterName@@"
SLICED = "UnpackBigParamInfor@@"


def array(dtype, shape, seed=0):
    """Random bits of any dtype."""
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    width = np.dtype(dtype).itemsize
    return generator.integers(0, 256, (*shape, width), np.uint8).view(dtype).reshape(shape)


def same(bits, expected):
    """Whether the bits are those of an array, in its shape and row by row."""
    return (
        bits.dtype == np.dtype(f"u{expected.dtype.itemsize}")
        and bits.shape == expected.shape
        and bits.flags.c_contiguous
        and bits.tobytes() == expected.tobytes()
    )


def assert_read(path, expected):
    found = read_pdparams(path)
    assert list(found) == list(expected)
    for name, (bits, dtype) in found.items():
        assert dtype == NAMES[expected[name].dtype.name], name
        assert same(bits, expected[name]), name


STATE = {
    "embeddings.tok_embeddings.weight": array("float32", (7, 5), 1),
    "layers.0.attn.Wqkv.weight": array("uint16", (32, 48), 2),  # more than is kept in memory while the pickle is read
    "layers.0.norm.weight": np.asfortranarray(array("float16", (3, 4), 3)),
    "steps": array("int64", (), 4),
}


@pytest.fixture
def file(tmp_path):
    """Gives a file with some content: bytes as they are, anything else pickled."""

    def written(content, protocol=4):
        path = tmp_path / "model_state.pdparams"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return written


def refusal(path):
    """The error, after checks that hold for every one."""
    with pytest.raises(CheckpointError) as caught:
        read_pdparams(path)
    error = caught.value
    for text in (error.message, error.hint):
        assert text.isprintable()  # one line, and nothing that moves the cursor
        assert len(text) < 600
    assert str(path) in error.message
    assert not error.message.endswith(".")
    return error.message.replace(str(path), "")


def tracked(function, *arguments):
    """A function's result and the most memory it had at a time."""
    tracemalloc.start()
    try:
        return function(*arguments), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# What is read


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_state_dict_that_paddle_saved_is_read(tmp_path, dtype, protocol):
    paddle = pytest.importorskip("paddle")
    layer = paddle.nn.Linear(40, 30)
    state = OrderedDict((name, value.cast(dtype)) for name, value in layer.state_dict().items())
    paddle.save(state, str(tmp_path / "model_state.pdparams"), protocol=protocol)
    found = read_pdparams(tmp_path / "model_state.pdparams")
    assert list(found) == ["weight", "bias"]
    for name, (bits, stored) in found.items():
        assert stored == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        assert same(bits, state[name].numpy())


def test_tensors_that_paddle_saved_with_their_names_are_read(tmp_path):
    paddle = pytest.importorskip("paddle")
    weight = paddle.nn.Linear(3, 2).weight
    path = tmp_path / "model_state.pdparams"
    paddle.save({"weight": weight, TABLE: {"nested": weight}}, str(path))  # nested: no plain state dict to Paddle
    assert b"tuple" in path.read_bytes()
    found = read_pdparams(path)
    assert list(found) == ["weight"]
    assert found["weight"][1] == "F32"
    assert same(found["weight"][0], weight.numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", sorted(NAMES))
def test_array_of_every_dtype_and_size_is_read(file, dtype, protocol):
    shapes = [(), (1,), (0, 3), (3, 4), (40, 50, 2)]
    content = {f"{shape} {seed}": array(dtype, shape, seed) for shape in shapes for seed in (1, 2)}
    assert_read(file(content, protocol), content)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (40, 50), (4, 30, 50)])
def test_column_major_array_becomes_row_major(file, shape, protocol):
    content = {"f": np.asfortranarray(array("float32", shape)), "t": array("float32", shape).T}
    assert_read(file(content, protocol), content)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_name_table_is_ignored(file, protocol):
    table = {name: f"linear_{i}.w_0" for i, name in enumerate(STATE)}
    assert_read(file(STATE | {TABLE: table}, protocol), STATE)


def test_ordered_dict_and_named_arrays_are_read(file):
    assert_read(file(OrderedDict((name, ("linear_0.w_0", value)) for name, value in STATE.items())), STATE)


def test_array_with_two_names_is_read_once(file):
    found = read_pdparams(
        file({"encoder": STATE["layers.0.attn.Wqkv.weight"], "decoder": STATE["layers.0.attn.Wqkv.weight"]})
    )
    assert found["encoder"][0] is found["decoder"][0]


def test_modules_as_numpy_2_names_them_are_read(file):
    content = pickle.dumps(STATE, 2)
    assert content.count(b"cnumpy.core.multiarray\n") == 1
    assert_read(file(content.replace(b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")), STATE)


@pytest.mark.parametrize("protocol", [2, 3])
def test_sliced_parameter_is_put_together(file, protocol):
    whole = array("float32", (40, 50))
    parts = {f"w@@.{i}": whole.reshape(-1)[start : start + 900] for i, start in enumerate((0, 900, 1800))}
    other = {"b": array("float32", (3,))}
    info = {"w": {"OriginShape": whole.shape, "slices": list(parts)}}
    assert_read(file({**other, **parts, SLICED: info, TABLE: {}}, protocol), {**other, "w": whole})


def test_bytes_that_become_text_of_two_widths_across_a_chunk_are_read(file, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1001)
    content = {"a": np.full(3000, 0xE9, np.uint8), "b": array("uint8", (7001,))}
    assert_read(file(content, 2), content)


@pytest.mark.parametrize("protocol", [2, 4])
def test_reading_takes_no_more_memory_than_the_arrays(file, protocol):
    content = {f"w{i}": array("float32", (1024, 1024), i) for i in range(8)}
    path = file(content | {TABLE: {name: name for name in content}}, protocol)
    del content
    found, peak = tracked(read_pdparams, path)
    assert len(found) == 8
    assert peak < (8 * 4 + 4) * MEGABYTE


# What would run code


class Call:
    """Pickles as a call, and as what the result is told with BUILD."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def text(value):
    """The instruction that pushes some text."""
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


TOUCH = "touch ran"
PAYLOADS = {
    "reduce": ("posix.system", pickle.dumps({"w": Call(os.system, TOUCH)}, 4)),
    "reduce, protocol 2": ("posix.system", pickle.dumps({"w": Call(os.system, TOUCH)}, 2)),
    "eval": ("builtins.eval", pickle.dumps({"w": Call(eval, "open('ran', 'w')")}, 4)),
    "eval, protocol 2": ("__builtin__.eval", pickle.dumps({"w": Call(eval, "open('ran', 'w')")}, 2)),
    "as the top": ("posix.system", pickle.dumps(Call(os.system, TOUCH), 4)),
    "after good arrays": ("posix.system", pickle.dumps(STATE | {"w": Call(os.system, TOUCH)}, 4)),
    "in the name table": ("posix.system", pickle.dumps(STATE | {TABLE: {"w": Call(os.system, TOUCH)}}, 4)),
    "another function of numpy": ("numpy.memmap", pickle.dumps({"w": Call(np.memmap, "ran", "u1", "w+", 0, (1,))}, 4)),
    "below an allowed module": (
        "numpy.core.numeric.builtins.eval",
        b"\x80\x04" + text("numpy.core.numeric") + text("builtins.eval") + b"\x93" + text("open('ran','w')") + b"\x85R."
    ),
    "inst": ("posix.system", b"\x80\x02(" + text(TOUCH) + b"iposix\nsystem\n."),
    "obj": ("posix.system", b"\x80\x02(cposix\nsystem\n" + text(TOUCH) + b"o."),
    "extension registry": ("EXT1", b"\x80\x02\x82\xf0" + text(TOUCH) + b"\x85R."),
}  # fmt: skip


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that every payload creates when it runs."""
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("posix", "system", 0xF0)
    yield tmp_path / "ran"
    copyreg.remove_extension("posix", "system", 0xF0)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_in_a_pickle_is_not_run_and_named(file, marker, payload):
    named, content = PAYLOADS[payload]
    message = refusal(file(content))
    assert not marker.exists()
    assert f"`{named}`" in message
    assert "nothing was executed" in message
    pickle.loads(content)  # the payload is real
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\x80\x02Pid\n.", "PERSID"),
        (b"\x80\x02" + text("id") + b"Q.", "BINPERSID"),
        (b"\x80\x02\x83\x01\x00.", "EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"\x80\x04cnumpy\nndarray\n)}\x92.", "NEWOBJ_EX"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x020.", "POP"),
        (b"\x80\x02\xff.", "0xff"),
    ],
)
def test_instruction_that_no_checkpoint_needs_is_named(file, content, named):
    message = refusal(file(content))
    assert named in message
    assert "nothing was executed" in message


@pytest.mark.parametrize(
    ("module_name", "name"),
    [
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("_codecs", "lookup"),
        ("builtins", "getattr"),
        ("builtins", "bytearray"),
        ("ml_dtypes", "bfloat16"),
        ("evil\r", "\x1b[2J\u202e" * 50),
    ],
)
def test_other_globals_are_refused(file, module_name, name):
    message = refusal(file(b"\x80\x04" + text(module_name) + text(name) + b"\x93."))
    assert module_name.replace("\r", r"\r") + "." + name[:4].replace("\x1b", r"\x1b") in message


# What a pickle may not claim

RECONSTRUCT, NDARRAY = np.core.multiarray._reconstruct, np.ndarray
REST = (None, None, None, -1, -1, 0)


def dtype(code="f4", order="<", **changed):
    return Call(np.dtype, code, False, True, **{"state": (3, order, *REST)} | changed)


def described(shape=(2, 3), kind=None, data=bytes(24), *, state=None, of=NDARRAY):
    """An array as numpy pickles it, described freely."""
    return Call(RECONSTRUCT, of, (0,), b"b", state=state or (1, shape, kind or dtype(), False, data))


def test_free_description_is_that_of_numpy(file):
    assert_read(file({"w": described()}), {"w": np.zeros((2, 3), np.float32)})
    assert pickle.loads(pickle.dumps(described())).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([np.zeros(2)], "of type list, not a dict"),
        ("text", "text, not a dict"),
        (np.zeros(2), "not a dict of arrays"),
        (3, "of type int"),
        ({1: np.zeros(2)}, "a name in it is of type int"),
        ({b"w": np.zeros(2)}, "a name in it is bytes"),
        ({("a",): np.zeros(2)}, "a name in it is of type tuple"),
        ({"x" * 2000: np.zeros(2)}, "a name in it is text"),
        ({"w": 3}, "`w` is of type int"),
        ({"w": 0.5}, "`w` is of type float"),
        ({"w": None}, "`w` is None"),
        ({"w": "x" * 2000}, "`w` is text"),
        ({"w": b"x" * 2000}, "`w` is bytes"),
        ({"w": np.float32}, "numpy.float32"),
        ({"w": np.ndarray}, "`w` is a class or function"),
        ({"w": np.dtype("f4")}, "`w` is a class or function"),
        ({"model": STATE, "epoch": 3}, "`model` is of type dict"),
        ({"w": ("w_0", 3)}, "`w` is of type tuple"),
        ({"w": (3, np.zeros(2))}, "`w` is of type tuple"),
        ({"w": Call(RECONSTRUCT, NDARRAY, (0,), b"b")}, "an array without data"),
        (Call(OrderedDict, [("w", np.zeros(2))]), "makes no sense"),
        ({"a\x1b[31m\n\u202eb": 3}, r"`a\x1b[31m\n\u202eb` is of type int"),
    ],
)
def test_content_that_is_no_dict_of_arrays_is_refused(file, content, said):
    assert said in refusal(file(content))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([{}], object), "Python objects"),
        (np.array(["a"]), "dtype `U1`"),
        (np.array([b"a"]), "dtype `S1`"),
        (np.zeros(2, "c8"), "dtype `c8`"),
        (np.zeros(2, "u4"), "dtype `u4`"),
        (np.zeros(2, "M8[s]"), "dtype `M8`"),
        (np.zeros(2, [("a", "f4")]), "dtype `V4`"),
        (np.zeros(2, ml_dtypes.bfloat16), "ml_dtypes"),
        (np.zeros(2, ">f4"), "big-endian"),
        (np.zeros(2, np.dtype("f4", metadata={"a": 1})), "makes no sense"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_dtype_without_a_safetensors_name_is_refused(file, array, said, protocol):
    assert said in refusal(file({"w": array}, protocol))


@pytest.mark.parametrize(
    "array",
    [
        described(data=bytes(23)),
        described(data=bytes(25)),
        described(shape=(2, -3)),
        described(shape=(-2, -3)),
        described(shape=(2.0, 3)),
        described(shape=(True, 6)),
        described(shape=[2, 3]),
        described(shape=None),
        described(shape=(1,) * 33 + (6,)),
        described(shape=(1 << 40,)),
        described(shape=(1 << 40,), data=bytes(2400)),
        described(shape=(599,), data=bytes(2400)),
        described(shape=(601,), data=bytes(2400)),
        described(shape=(1 << 62,) * 32),
        described(shape=(0, 1 << 62, 1 << 62), data=b""),
        described(shape=(1 << 70,)),
        described(data=bytearray(24)),
        described(data="x" * 24),
        described(data="x" * 2400, shape=(600,)),
        described(data=[0] * 24),
        described(kind="f4"),
        described(kind=dtype(state=(4, "<", *REST, {}))),
        described(kind=dtype(state=(3, "<", ("f4", (2,)), None, None, -1, -1, 0))),
        described(kind=dtype(state=(3, "<", None, ("a",), {"a": ("f4", 0)}, -1, -1, 0))),
        described(kind=dtype(state=(3, "<", None, None, None, 8, -1, 0))),
        described(kind=dtype(state=(3, "<", None, None, None, -1, -1, 63))),
        described(kind=dtype(state={})),
        described(of=np.dtype),
        described(of=bytes),
        described(state={"shape": (6,)}),
        described(state=(2, (6,), dtype(), False, bytes(24))),
        described(state=(1, (6,), dtype(), False)),
        described(state=(1, (6,), dtype(), 7, bytes(24))),
        Call(NDARRAY, (6,)),
        Call(np.dtype, "f4"),
        Call(np.dtype, ("f4", (2,)), False, True),
        Call(RECONSTRUCT, NDARRAY),
        Call(RECONSTRUCT, NDARRAY, (0,), b"O", state=(1, (6,), dtype(), False, bytes(24))),
        Call(OrderedDict, [("a", 1)]),
        Call(tuple, "abc"),
        Call(tuple, np.zeros(2)),
        Call(np.core.numeric._frombuffer, bytes(24), dtype(), (2, 3), "A"),
        Call(np.core.numeric._frombuffer, "x" * 24, dtype(), (2, 3), "C"),
    ],
)
def test_array_described_as_numpy_never_does_is_refused(file, array):
    assert tracked(refusal, file({"w": array}))[1] < MEGABYTE


def test_array_with_more_dimensions_than_numpy_has_is_refused(file):
    assert "makes no sense" in refusal(file({"w": described(shape=(1,) * 33 + (6,))}))


def test_array_described_twice_is_refused(file):
    content = pickle.dumps({"w": described()}, 2)
    state = b"h" + content[-4:-3]
    assert content.endswith(b"bs.")
    assert "makes no sense" in refusal(file(content[:-2] + state + b"bs."))


@pytest.mark.parametrize(
    ("shape", "characters"),
    [
        ((1 << 40,), "x" * 2400),
        ((300,), "x" * 2400),
        ((599,), "x" * 2400),
        ((601,), "x" * 2400),
        ((700,), "\xe9" * 2400),
        ((599,), "\xe9" * 2400),
        ((601,), "\xe9" * 2400),
        ((600,), "x" * 2399 + "\u20ac"),
        ((600,), "x" * 2399 + "\udc80"),
    ],
)
def test_text_that_is_not_an_array_s_bytes_is_refused(file, shape, characters):
    encoded = Call(codecs.encode, characters, "latin1")
    assert_read(file({"w": described((600,), data=Call(codecs.encode, "x" * 2400, "latin1"))}), {"w": X})
    message, peak = tracked(refusal, file({"w": described(shape, data=encoded)}))
    assert "shape" in message or "Latin-1" in message
    assert peak < 4 * MEGABYTE


X = np.frombuffer(b"x" * 2400, np.float32)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"OriginShape": (4,), "slices": []},
        {"OriginShape": (4,), "slices": "ab"},
        {"OriginShape": (4,), "slices": ["a", 3]},
        {"OriginShape": (4,), "slices": ["a", "c"]},
        {"OriginShape": (4,), "slices": ["a", "a"]},
        {"OriginShape": (4,), "slices": ["a", "other dtype"]},
        {"OriginShape": (4,), "slices": ["a", "not flat"]},
        {"OriginShape": (5,), "slices": ["a", "b"]},
        {"OriginShape": (-4,), "slices": ["a", "b"]},
        {"OriginShape": [4], "slices": ["a", "b"]},
        {"OriginShape": (4,), "slices": ["a", "b"], "more": 1},
    ],
)
def test_slices_that_do_not_make_an_array_are_refused(file, entry):
    flat = np.zeros(2, np.float32)
    parts = {"a": flat, "b": flat + 1, "other dtype": np.zeros(4, np.float16), "not flat": flat.reshape(1, 2)}
    good = {"OriginShape": (4,), "slices": ["a", "b"]}
    assert read_pdparams(file(parts | {SLICED: {"w": good}}))["w"][0].shape == (4,)
    refusal(file(parts | {SLICED: {"w": entry}}))
    refusal(file(parts | {SLICED: [entry]}))
    refusal(file(parts | {"w": flat, SLICED: {"w": good}}))


def test_name_given_twice_is_refused(file):
    twice = pickle.dumps({"aa": STATE["steps"], "ab": STATE["steps"]}, 2).replace(text("ab"), text("aa"))
    assert "`aa` is in it twice" in refusal(file(twice))


def test_bytes_after_the_end_are_refused(file):
    content = pickle.dumps(STATE, 4)
    assert "1 bytes follow its end" in refusal(file(content + b"\0"))
    assert "follow its end" in refusal(file(content + content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"\x80", "does not begin like a pickle"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"name,value\n1,2\n", "does not begin like a pickle"),
        (struct.pack("<Q", 2) + b"{}", "does not begin like a pickle"),
        (pickle.dumps(STATE, 1), "does not begin like a pickle"),
        (b"\x80\x06}.", "does not begin like a pickle"),
    ],
)
def test_other_files_are_refused(file, content, said):
    assert said in refusal(file(content))


def test_path_that_is_no_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent")
    assert "is not a file" in refusal(tmp_path)
    assert "cannot read" in refusal(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_file_cut_short_anywhere_is_refused(file, protocol):
    content = pickle.dumps(STATE | {TABLE: {"steps": "x"}}, protocol)
    path = file(content)
    for size in sorted({*range(0, len(content), 5), *range(100), len(content) - 1}, reverse=True):
        os.truncate(path, size)
        message = refusal(path)
        assert any(said in message for said in ("it ends early", "it is empty", "does not begin like")), size


# Bombs

NESTED = b"\x80\x02}" + text("w")
BOMBS = {
    "memo index": b"\x80\x02Nr\xff\xff\xff\xff.",
    "text of 4 EB": b"\x80\x04\x8d" + bytes(7) + b"\x40.",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 4 EB": b"\x80\x04\x8e" + bytes(7) + b"\x40.",
    "bytes of 4 GB": b"\x80\x03B\xff\xff\xff\xff.",
    "bytearray of 1 TB": b"\x80\x05\x96" + bytes(5) + b"\x01\0\0.",
    "negative length": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "frame of 4 EB": b"\x80\x04\x95" + bytes(7) + b"\x40}.",
    "number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "number of 255 bytes": b"\x80\x02}q\x00" + text(TABLE) + b"}" + text("w") + b"\x8a\xff" + b"\xff" * 255 + b"ss.",
    "endless line": b"\x80\x02c" + b"x" * 8 * MEGABYTE + b"\n\n",
    "lists of lists": NESTED + b"]q\0" + b"".join(b"](" + b"h\0" * 100 + b"eq\0" for _ in range(200)) + b"s.",
    "pairs of pairs": NESTED + b")q\0" + b"h\0h\0\x86q\0" * 2000 + b"s.",
    "dict in itself": NESTED + b"}q\0" + text("w") + b"h\0ss.",
    "names": b"\x80\x02" + text("\U0001f600" + "x" * 996) * 20_000 + b".",
    "one array's bytes in many": b"\x80\x02}(" + b"".join(
        text(f"w{i}") + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n)N\x87R(NJ\0\0\x10\0\x85"
        b"cnumpy\ndtype\nX\x02\0\0\0u1NN\x87R\x89" + (b"B\0\0\x10\0" + bytes(MEGABYTE) + b"q\0" if not i else b"h\0")
        + b"tb" for i in range(1000)
    ) + b"u.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_is_refused_in_little_memory(file, bomb):
    _, peak = tracked(refusal, file(BOMBS[bomb]))
    assert peak < 2 * len(BOMBS[bomb]) + MEGABYTE


MANY_INSTRUCTIONS = {
    "deep": NESTED + b")" + b"\x85" * 400_000 + b"s.",
    "deeper": NESTED + b")" + b"\x85" * 4_000_000 + b"s.",
    "lists": b"\x80\x02" + b"]" * 4_000_000 + b".",
    "dicts": b"\x80\x02" + b"}" * 4_000_000 + b".",
    "marks": b"\x80\x02" + b"(" * 4_000_000 + b".",
    "memo": b"\x80\x04N" + b"\x94" * 4_000_000 + b".",
}
LIMITED = """
import resource, sys
from pathlib import Path
from modernbert_align.core.paddle_pickle import read_pdparams
from modernbert_align.errors import CheckpointError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    read_pdparams(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("bomb", MANY_INSTRUCTIONS)
def test_number_of_instructions_is_bounded(file, bomb):
    # A process with 64 MB to spare: tracing this many allocations takes longer than the rest of these tests.
    command = [sys.executable, "-c", LIMITED, str(file(MANY_INSTRUCTIONS[bomb]))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert ("500000 pickle instructions" if bomb != "deep" else "`w` is of type tuple") in done.stdout


# Damage


class Reference(pickle._Unpickler):
    """What Python itself reads; not in C, which takes gigabytes for a high memo index."""

    dispatch = {**pickle._Unpickler.dispatch}  # noqa: RUF012 - pickle's own name

    def find_class(self, module_name, name):
        if (module_name, name) not in module._GLOBALS:
            raise pickle.UnpicklingError(name)
        return super().find_class(module_name, name)

    def skip_frame(self):
        """As in C, where a frame has to be in the file and means nothing else."""
        if struct.unpack("<Q", self.read(8))[0] > len(self.rest()):
            raise pickle.UnpicklingError("frame")

    dispatch[pickle.FRAME[0]] = skip_frame


def reference(content):
    """What Python makes of a pickle: name -> bits, or None."""
    try:
        stream = io.BytesIO(content)
        unpickler = Reference(stream)
        unpickler.rest = lambda: stream.getbuffer()[stream.tell() :]
        state = unpickler.load()
        return {name: (value.tobytes(), value.shape) for name, value in state.items() if name != TABLE}
    except Exception:  # noqa: BLE001 - whatever a damaged pickle makes of itself
        return None


SMALL = {"a": array("float32", (2, 3), 1), "b": np.asfortranarray(array("uint16", (3, 2), 2)), "c": array("bool", ())}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@settings(max_examples=200)
@given(st.data())
def test_damaged_file_is_read_as_python_reads_it_or_refused(tmp_path_factory, protocol, data):
    content = bytearray(pickle.dumps(SMALL | {TABLE: {"a": "linear_0.w_0"}}, protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pdparams"
    path.write_bytes(content)
    try:
        found = read_pdparams(path)
    except CheckpointError:
        refusal(path)
        return
    assert {name: (bits.tobytes(), bits.shape) for name, (bits, _) in found.items()} == reference(bytes(content))
