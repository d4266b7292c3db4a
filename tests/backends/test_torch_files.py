"""Reading torch's pickled checkpoints: what torch.save writes is read, lies and code are refused."""

import copy
import os
import pickle
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_align.backends.torch_files import read_torch_file
from modernbert_align.errors import CheckpointError, MissingPackageError

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NEWER = {torch.float8_e4m3fn, torch.float8_e5m2, torch.uint64, torch.uint32, torch.uint16}
MEGABYTE = 1 << 20


def tensor(dtype, shape, seed=0):
    """Random bits of any dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, width), generator=generator).to(torch.uint8).view(dtype).reshape(shape)


STATE = {
    "embeddings.tok_embeddings.weight": tensor(torch.float32, (7, 5), 1),
    "layers.0.attn.Wqkv.weight": tensor(torch.bfloat16, (6, 4), 2),
    "layers.0.norm.weight": tensor(torch.float16, (4,), 3),
    "steps": tensor(torch.int64, (), 4),
}
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture
def saved(tmp_path):
    """Gives a file that torch.save wrote."""

    def written(content, zipped=True):
        path = tmp_path / "pytorch_model.bin"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path

    return written


def raw(value):
    """A tensor's bytes, row by row."""
    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).untyped_storage())


def assert_read(path, expected):
    found = read_torch_file(path)
    assert list(found) == list(expected)
    for name, (bits, dtype) in found.items():
        value = expected[name]
        assert dtype == NAMES[value.dtype], name
        assert bits.dtype.kind == "u"
        assert bits.itemsize == value.element_size()
        assert bits.shape == tuple(value.shape)
        assert bits.flags.c_contiguous
        assert bits.tobytes() == raw(value.clone()), name


def refusal(path):
    """The error, after checks that hold for every one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError) as caught:
            read_torch_file(path)
    for text in (caught.value.message, caught.value.hint):
        assert text.isprintable()  # one line, and nothing that moves the cursor
        assert len(text) < 600
    assert str(path) in caught.value.message
    assert "weights_only" not in caught.value.message  # torch's advice how to run the code after all
    assert not caught.value.message.endswith(".")
    return caught.value.message.replace(str(path), "")


def rewrite(path, changes, *, compression=zipfile.ZIP_STORED):
    """Replace, add or (None) remove records of an archive."""
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    records |= changes
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            if content is not None:
                archive.writestr(f"archive/{name}", content)
    return path


def record(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{archive.namelist()[0].partition('/')[0]}/{name}")


def replaced(content, old, new):
    assert content.count(old) == 1
    return content.replace(old, new)


# What is read


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_tensor_of_every_dtype_and_size_is_read(saved, dtype, shape):
    content = {"a": tensor(dtype, shape, 1), "b": tensor(dtype, shape, 2)}
    assert_read(saved(content), content)
    path = saved(content, zipped=False)
    if dtype in NEWER:  # torch writes them in the older format, and cannot read them
        assert "AttributeError" in refusal(path)
    else:
        assert_read(path, content)


@FORMATS
def test_state_dict_of_a_module_is_read(saved, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    assert state._metadata
    assert_read(saved(state, zipped), state)
    assert_read(saved(dict(module.named_parameters()), zipped), dict(module.named_parameters()))


@FORMATS
def test_views_become_row_major_and_shared_memory_stays_shared(saved, zipped):
    base = tensor(torch.float32, (40, 6), 1)
    content = {
        "base": base,
        "again": base,
        "half": base[20:],
        "T": base.T,
        "step": base[::2, 1:3],
        "flat": base.view(-1),
    }
    path = saved(content, zipped)
    assert_read(path, content)
    found = read_torch_file(path)
    assert found["base"][0].ctypes.data == found["again"][0].ctypes.data == found["flat"][0].ctypes.data


@FORMATS
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_one_wrapper_is_taken_off(saved, wrapper, zipped):
    assert_read(saved({"epoch": 3, wrapper: STATE, "args": {"lr": [0.1, None]}}, zipped), STATE)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": STATE, "optimizer": {"state": [{"exp_avg": torch.zeros(2)}]}}, "state_dict"),
        ({"state_dict": STATE, "bias": torch.zeros(2)}, "state_dict"),
        ({"state_dict": STATE, "model": STATE}, "state_dict"),
        ({"weights": STATE}, "weights"),
        ({"model": {"state_dict": STATE}}, "state_dict"),
        ({"model": [torch.zeros(2)]}, "model"),
        ({"state_dict": {}}, "state_dict"),
        ({"model": STATE | {"epoch": 3}}, "epoch"),
    ],
)
def test_wrapper_that_is_not_the_only_place_with_tensors_stays_on(saved, content, named):
    assert f"`{named}` is of type" in refusal(saved(content))


def test_tensor_named_like_a_wrapper_is_a_tensor(saved):
    assert_read(saved({"model": STATE["steps"]}), {"model": STATE["steps"]})


def test_attributes_that_hide_methods_change_nothing(saved):
    names = ("detach", "numel", "view", "numpy", "contiguous", "untyped_storage", "is_contiguous")
    value = tensor(torch.float32, (3, 4)).clone()
    for name in names:
        setattr(value, name.upper(), 3)
    state = OrderedDict(w=value)
    state.ITEMS = 3
    path = saved(state)
    pickled = record(path, "data.pkl")
    for name in (*names, "items"):
        pickled = replaced(pickled, b"\0\0\0" + name.upper().encode(), b"\0\0\0" + name.encode())
    rewrite(path, {"data.pkl": pickled})
    with pytest.raises(TypeError):
        torch.load(path, weights_only=True).items()
    assert_read(path, {"w": value})


def test_negative_view_is_read_by_value(saved):
    lazy = {"a": torch._neg_view(torch.tensor([2.0, -4.0])), "b": torch.tensor([1 + 2j, 3 - 4j]).conj().imag}
    assert all(value.is_neg() for value in lazy.values())
    assert_read(saved(lazy), {name: torch.tensor([-2.0, 4.0]) for name in lazy})


def test_big_endian_archive_is_read(saved):
    path = saved({"w": torch.tensor([1.0, -2.0])})
    content = torch.tensor([1.0, -2.0]).numpy().astype(">f4").tobytes()
    assert_read(rewrite(path, {"byteorder": b"big", "data/0": content}), {"w": torch.tensor([1.0, -2.0])})


def test_archive_is_not_read_into_memory(saved):
    path = saved({f"w{i}": torch.ones(1 << 20) for i in range(8)})
    tracemalloc.start()
    before = resident()
    found = read_torch_file(path)
    assert len(found) == 8
    assert resident() - before < 4 * MEGABYTE
    assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    tracemalloc.stop()


def resident():
    """Bytes of memory of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


# What would run code


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@FORMATS
@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Call(os.system, "touch ran"), "posix.system"),
        (Call(eval, "open('ran', 'w')"), "eval"),
        (Call(tarfile.open, "ran", "w"), "tarfile.TarFile.open"),
    ],
)
def test_code_in_a_file_is_not_run_and_named(saved, tmp_path, monkeypatch, payload, named, zipped):
    monkeypatch.chdir(tmp_path)
    path = saved(STATE | {"w": payload}, zipped)
    message = refusal(path)
    assert not (tmp_path / "ran").exists()
    assert "not executed" in message
    assert f"`{named}`" in message or "getattr" in message
    torch.load(path, weights_only=False)  # the payload is real
    assert (tmp_path / "ran").exists()


def test_code_is_not_run_when_torch_is_told_to(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    refusal(saved({"w": Call(os.system, "touch ran")}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refusal(path)


# What is no tensor of a known dtype


class Named(torch.Tensor):
    """A tensor that is not quite one."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(2), "it holds a Tensor"),
        ([torch.zeros(2)], "it holds a list"),
        (3, "it holds a int"),
        ({1: torch.zeros(2)}, "of type int, not text"),
        ({"w": None}, "`w` is of type NoneType"),
        ({"w": 3}, "`w` is of type int"),
        ({"w": [torch.zeros(2)]}, "`w` is of type list"),
        ({"w": torch.Size([3])}, "`w` is of type Size"),
        ({"w": torch.zeros(2).untyped_storage()}, "`w` is of type TypedStorage"),
        (Counter("aab"), "`a` is of type int"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "`w` has the dtype complex64"),
        ({"w": torch.zeros(2, dtype=torch.float8_e4m3fnuz)}, "`w` has the dtype float8_e4m3fnuz"),
        ({"w": torch.eye(2).to_sparse()}, "not a dense tensor in memory but torch.sparse_coo"),
        ({"w": torch.zeros(2, device="meta")}, "not a dense tensor in memory but torch.strided on meta"),
        ({"w": torch.zeros(1).expand(1 << 40)}, "`w` repeats its elements"),
        ({"w": torch.zeros(4).expand(3, 4)}, "`w` repeats its elements"),
        ({"a\x1b[31m\n\u202eb": 3}, r"`a\x1b[31m\n\u202eb` is of type int"),
        ({"w": torch.zeros(2).as_subclass(Named)}, "Named"),
    ],
)
def test_content_that_is_no_dict_of_dense_tensors_is_refused(saved, content, said):
    assert said in refusal(saved(content))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_quantized_tensor_is_refused(saved):
    content = {"w": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}
    assert "`w` has the dtype qint8" in refusal(saved(content))


def test_views_that_would_take_more_memory_than_the_file_are_refused(saved):
    base = tensor(torch.float32, (100, 200))
    tied = base.T
    assert_read(saved({f"w{i}": tied for i in range(10)}), {f"w{i}": tied for i in range(10)})
    assert "more memory than the file" in refusal(saved({f"w{i}": base.T for i in range(10)}))


def test_dict_and_list_that_hold_themselves_are_refused(saved):
    content = {"model": [{}]}
    content["model"][0]["model"] = content["model"]
    content["state_dict"] = content
    assert "is of type" in refusal(saved(content))


def test_tensor_of_a_class_that_was_declared_safe_is_refused(saved):
    path = saved({"w": torch.zeros(2).as_subclass(Named)})
    with torch.serialization.safe_globals([Named]):
        assert "`w` is of type Named" in refusal(path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensor_is_refused(saved):
    assert "but nested" in refusal(saved({"w": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}))


def test_lazy_negative_of_a_bool_is_refused(saved):
    storage = torch.zeros(4, dtype=torch.bool).storage()
    rebuilt = Call(torch._utils._rebuild_tensor_v2, storage, 0, (4,), (1,), False, OrderedDict(), {"neg": True})
    assert "`w` cannot be used" in refusal(saved({"w": rebuilt}))


def test_pickle_protocol_that_torch_does_not_read_is_told(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(2)}, path, pickle_protocol=4)
    assert refusal(path).endswith(": Unsupported operand 149")


def test_memory_that_is_not_the_file_s_is_refused(saved):
    path = saved({"w": Call(torch.Tensor, 1000)})
    assert torch.load(path, weights_only=True)["w"].shape == (1000,)  # whatever was in memory
    assert "`w` does not lie in the file" in refusal(path)


# What a file may not claim


def six(value=0.0):
    """Six elements, of which there is nothing else in a small pickle."""
    return torch.full((6,), value)


CLAIM = b"K\x06"  # their number


def test_storage_larger_than_its_record_is_refused(saved):
    path = saved({"w": six()[:2]})
    pickled = replaced(record(path, "data.pkl"), b"K\x06tq", b"K\x08tq")
    rewrite(path, {"data.pkl": pickled, "data/1": bytes(64)})
    assert torch.load(path, weights_only=True, mmap=True)["w"].untyped_storage().nbytes() == 32
    assert "are not the records it has" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"data/0": bytes(8)},
        {"data/0": bytes(4000)},
        {"data/0": b""},
        {"data/0": None},
        {"data/2": bytes(24)},
        {"data.pkl": None},
        {"data.pkl": b""},
        {"byteorder": b"middle"},
        {"constants.pkl": b"\x80\x02)."},
    ],
)
def test_records_that_do_not_fit_are_refused(saved, changes):
    path = saved({"a": six(1), "b": six(2)})
    assert_read(rewrite(path, {}), {"a": six(1), "b": six(2)})
    refusal(rewrite(path, changes))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (CLAIM, b"K\x07"),
        (CLAIM, b"J\xff\xff\xff\x7f"),
        (CLAIM, b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"),
        (CLAIM, b"J\xff\xff\xff\xff"),
        (b"K\x00K\x06\x85", b"K\x01K\x06\x85"),
        (b"K\x00K\x06\x85", b"J\xff\xff\xff\xffK\x06\x85"),
        (b"K\x00K\x06\x85", b"K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85"),
        (b"K\x00K\x06\x85", b"K\x00J\xff\xff\xff\xff\x85"),
    ],
)
@FORMATS
def test_sizes_that_are_not_the_file_s_are_refused(saved, old, new, zipped):
    path = saved({"w": six()}, zipped)
    if old == CLAIM:
        old, new = (CLAIM + b"tq", new + b"tq") if zipped else (CLAIM + b"Ntq", new + b"Ntq")
    if zipped:
        rewrite(path, {"data.pkl": replaced(record(path, "data.pkl"), old, new)})
    else:
        path.write_bytes(replaced(path.read_bytes(), old, new))
    refusal(path)


def test_compressed_archive_is_refused(saved):
    path = rewrite(saved({"w": torch.zeros(1 << 20)}), {}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_records_on_top_of_each_other_are_refused(saved):
    path = rewrite(saved({"w": torch.zeros(1000)}), {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/more", b"")
        info = archive.getinfo("archive/data/0")
        for number in range(1, 100):
            other = copy.copy(info)
            other.filename = f"archive/data/{number}"
            archive.filelist.append(other)
    assert "overlap" in refusal(path)


@FORMATS
def test_too_many_instructions_are_refused(saved, zipped):
    path = saved({"w": six()}, zipped)
    bomb = b"\x80\x02" + b"]" * 600_000 + b"."
    if zipped:
        rewrite(path, {"data.pkl": bomb})
    else:
        path.write_bytes(path.read_bytes()[: 15 + 6] + bomb)
    assert "pickle instructions" in refusal(path)


def test_huge_storage_is_refused_before_it_is_touched(saved):
    path = saved({"w": six()}, zipped=False)
    path.write_bytes(replaced(path.read_bytes(), CLAIM + b"Ntq", b"J\xff\xff\xff\x1fNtq"))
    assert "claim more bytes" in refusal(path)


def test_legacy_storage_that_is_never_filled_does_not_show_memory(saved):
    ones, twos = torch.full((1000,), 1.0), torch.full((1000,), 2.0)
    path = saved({"a": ones, "b": twos}, zipped=False)
    content = path.read_bytes()
    keys = content[content.rindex(b"\x80\x02]") :]
    first, second = (keys[start : keys.index(b"q", start)] for start in (keys.index(b"X"), keys.rindex(b"X")))
    path.write_bytes(content.replace(keys, replaced(keys, second, first)))
    for _ in range(5):
        secrets = [torch.full((1000,), 7.0) for _ in range(50)]
        del secrets
        found = {bits.tobytes() for bits, _ in read_torch_file(path).values()}
        assert len(found & {raw(ones), raw(twos)}) == 1
        assert bytes(4000) in found


@pytest.mark.parametrize("change", [lambda c: c + b"\0", lambda c: c[:-1], lambda c: c + c, lambda c: c[:-32]])
def test_legacy_file_of_another_size_is_refused(saved, change):
    path = saved({"a": six(1), "b": six(2)}, zipped=False)
    path.write_bytes(change(path.read_bytes()))
    refusal(path)


# What is no such file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"P", "neither a zip archive nor a pickle"),
        (b"name,value\n1,2\n", "neither a zip archive nor a pickle"),
        (b"\x02\0\0\0\0\0\0\0{}", "neither a zip archive nor a pickle"),
        (b"PK\x03\x04" + bytes(100), "BadZipFile"),
        (b"PK\x05\x06" + bytes(18), "neither a zip archive nor a pickle"),
        (b"\x80", "not enough data"),
        (b"\x80\x02}.", "pickle"),
        (pickle.dumps(STATE, 4), "pickle"),
        (b"\x80\x02}." * 5, "magic number"),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    assert said in refusal(path)


def test_zip_of_something_else_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme\x1b.txt", "hello")
    assert r"a zip archive without `readme\x1b.txt/data.pkl`" in refusal(path)


def test_path_that_is_no_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent")
    assert "is not a file" in refusal(tmp_path)
    assert "cannot read" in refusal(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(tmp_path / "pipe")


def test_absent_torch_is_named(saved, monkeypatch):
    path = saved(STATE)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match="needs torch") as caught:
        read_torch_file(path)
    assert "pip install torch" in caught.value.hint


# Damage


@FORMATS
def test_file_cut_short_anywhere_is_refused(saved, zipped):
    path = saved({"a": six(1), "b": six(2)}, zipped)
    size = path.stat().st_size
    for end in sorted({0, 1, 2, 3, 4, 5, *range(0, size, 7), size - 1}, reverse=True):
        os.truncate(path, end)
        refusal(path)


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def undamaged(request, tmp_path_factory):
    """A file's content and where to put it damaged; saved once, since the older format writes addresses of memory."""
    path = tmp_path_factory.mktemp("damaged") / "pytorch_model.bin"
    state = {"a": six(1), "b": tensor(torch.bfloat16, (3, 2), 2).T}
    torch.save(state, path, _use_new_zipfile_serialization=request.param)
    return path.read_bytes(), path, request.param


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_file_is_read_as_torch_reads_it_or_refused(undamaged, data):
    whole, path, zipped = undamaged
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_torch_file(path)
    except CheckpointError:
        refusal(path)
        return
    expected = torch.load(path, weights_only=True, mmap=zipped)
    assert {name: (bits.tobytes(), bits.shape) for name, (bits, _) in found.items()} == {
        name: (raw(value), tuple(value.shape)) for name, value in expected.items()
    }
