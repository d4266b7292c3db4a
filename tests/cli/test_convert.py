"""`convert` from the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modernbert_align.core.checkpoint import open_checkpoint
from modernbert_align.core.digest import file_sha256


def test_default_output_is_named_after_the_model(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("convert", "--src", "hf", "--dst", "paddle", "--model", "tiny")[0] == 0
    assert (tmp_path / "checkpoints" / "tiny-paddle" / "model.safetensors").is_file()


def test_round_trip_reproduces_the_file_and_the_config(cli, tmp_path, fixture_folder):
    source = fixture_folder("tiny-sensitive")
    cli("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--out", tmp_path / "p")
    code, _, _ = cli("convert", "--src", "paddle", "--dst", "hf", "--model", tmp_path / "p", "--out", tmp_path / "h")
    assert code == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert file_sha256(tmp_path / "h" / name) == file_sha256(source / name), name


def test_what_paddle_itself_saved_converts_to_the_reference(cli, tmp_path, fixture_folder, converted):
    """A checkpoint that went through Paddle's own save_pretrained, not only through this tool's files."""
    import torch
    import transformers

    from modernbert_align.backends import paddle as paddle_backend

    model = paddle_backend.load(converted("tiny"), "ModernBertForMaskedLM", "fp32")
    with paddle_backend.quiet():
        model.save_pretrained(str(tmp_path / "saved"), safe_serialization=True)
    code, _, err = cli(
        "convert", "--src", "paddle", "--dst", "hf", "--model", tmp_path / "saved", "--out", tmp_path / "hf"
    )
    assert code == 0, err
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").state_dict()
    original = transformers.AutoModelForMaskedLM.from_pretrained(fixture_folder("tiny")).state_dict()
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_second_run_says_up_to_date(cli, tmp_path):
    arguments = ("convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--out", tmp_path / "p")
    assert cli(*arguments)[0] == 0
    before = (tmp_path / "p" / "model.safetensors").stat().st_mtime_ns
    code, out, _ = cli(*arguments)
    assert code == 0
    assert "up to date" in out
    assert (tmp_path / "p" / "model.safetensors").stat().st_mtime_ns == before


def test_json_is_alone_on_stdout(cli, tmp_path):
    code, out, _ = cli(
        "convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--out", tmp_path / "p", "--json"
    )
    assert code == 0
    document = json.loads(out)
    assert document["manifest"]["lossless"] is True
    assert len(document["manifest"]["tensors"]) == 29


def test_dry_run_writes_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["by_op"]["T"]["tensors"] == 17
    assert plan["absent_ties"] == ["decoder.weight"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("fp16", "F16")])
def test_dtype_casts_every_weight_and_the_config(cli, tmp_path, dtype, stored):
    code, out, _ = cli(
        "convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--dtype", dtype, "--out", tmp_path / "p"
    )
    assert code == 0
    assert "lossless" not in out
    assert {t.dtype for t in open_checkpoint(tmp_path / "p").tensors.values()} == {stored}
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]


def test_cast_checkpoint_loads_and_predicts(cli, tmp_path):
    import paddle

    from modernbert_align.backends import paddle as paddle_backend

    cli("convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--dtype", "bf16", "--out", tmp_path / "p")
    model = paddle_backend.load(tmp_path / "p", "ModernBertForMaskedLM", "bf16")
    logits = model(paddle.to_tensor([[7, 8, 9]]))[0]
    assert logits.dtype == paddle.bfloat16
    assert np.isfinite(logits.astype("float32").numpy()).all()


def test_interruption_leaves_nothing_behind(cli, tmp_path, monkeypatch):
    from modernbert_align.core import writer

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "pieces", interrupt)
    code, _, err = cli("convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--out", tmp_path / "p")
    assert code == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_source_folder_is_never_written_to(cli, tmp_path, fixture_folder):
    source = tmp_path / "source"
    shutil.copytree(fixture_folder("tiny"), source)
    before = {p.name: file_sha256(p) for p in source.iterdir()}
    cli("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--out", tmp_path / "p")
    cli("diff", "--model", source, "--report-dir", tmp_path / "r")
    assert {p.name: file_sha256(p) for p in source.iterdir()} == before


_MEASURE = """
import sys
from modernbert_align.cli import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]  # KiB
heavy = [name for name in ("torch", "paddle", "transformers", "paddlenlp") if name in sys.modules]
print(code, int(peak) // 1024, ",".join(heavy) or "none", file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["base", "large"])
@pytest.mark.parametrize("options", [("--digest", "none"), ("--digest", "sha256"), ("--tensor-parallel", "4")])
def test_published_sizes_convert_within_110_mib_and_without_a_framework(tmp_path, fixture_folder, model, options):
    fixture_folder(model)  # written before, by a process of its own
    arguments = ["convert", "--src", "hf", "--dst", "paddle", "--model", model, *options]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments, "--out", str(tmp_path / "p")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(tmp_path),
    )
    code, peak_mib, heavy = done.stderr.strip().splitlines()[-1].split()
    assert code == "0"
    assert heavy == "none"
    assert int(peak_mib) <= 110
    shutil.rmtree(tmp_path / "p")


def convert(cli, source, out, *options, src="hf", code=0):
    dst = "paddle" if src == "hf" else "hf"
    result = cli("convert", "--src", src, "--dst", dst, "--model", source, "--out", out, *options)
    assert result[0] == code, result[2]
    return result[1]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def test_pytorch_files_convert_like_safetensors(cli, tmp_path, fixture_folder):
    import torch
    from safetensors.torch import load_file

    convert(cli, fixture_folder("tiny"), tmp_path / "from-safetensors")
    state = load_file(fixture_folder("tiny") / "model.safetensors")
    state["decoder.weight"] = state["model.embeddings.tok_embeddings.weight"]  # pickles keep tied weights
    for name, shards in (("whole", 1), ("sharded", 3)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(fixture_folder("tiny") / "config.json", folder)
        if shards == 1:
            torch.save(state, folder / "pytorch_model.bin")
        else:
            files = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
            for n, file in enumerate(files):
                torch.save({key: state[key] for key in list(state)[n::shards]}, folder / file)
            places = {key: files[n % shards] for n, key in enumerate(state)}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        out = convert(cli, folder, tmp_path / f"from-{name}", "--shard-size", "none", "--prove", "tensors,dye")
        assert "proved (dye)" in out
        assert weights(tmp_path / f"from-{name}") == weights(tmp_path / "from-safetensors")
    convert(cli, tmp_path / "sharded", tmp_path / "kept")
    kept = sorted(path.name for path in (tmp_path / "kept").glob("*.safetensors"))
    assert kept == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickles_of_paddle_convert_back(cli, tmp_path, fixture_folder, converted, dtype):
    import paddle

    from modernbert_align.backends import paddle as paddle_backend

    model = paddle_backend.load(
        converted("tiny"), "ModernBertForMaskedLM", {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    )
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(converted("tiny") / "config.json", source)
    paddle.save(model.state_dict(), str(source / "model_state.pdparams"))
    convert(cli, source, tmp_path / "hf", src="paddle")
    cast = ("--dtype", "bf16") if dtype == "bfloat16" else ()
    convert(cli, fixture_folder("tiny"), tmp_path / "there", *cast)
    convert(cli, tmp_path / "there", tmp_path / "back", src="paddle")
    assert weights(tmp_path / "hf") == weights(tmp_path / "back")


def test_shards_are_written_and_load_in_both_frameworks(cli, tmp_path, fixture_folder):
    from modernbert_align.backends import hf
    from modernbert_align.backends import paddle as paddle_backend

    convert(cli, fixture_folder("tiny"), tmp_path / "p", "--shard-size", "200KB", "--prove", "tensors,dye,roundtrip")
    assert len(weights(tmp_path / "p")) > 3
    paddle_backend.load(tmp_path / "p", "ModernBertForMaskedLM", "fp32")
    convert(cli, tmp_path / "p", tmp_path / "h", "--prove", "roundtrip", src="paddle")
    assert set(weights(tmp_path / "h")) == set(weights(tmp_path / "p"))
    hf.load(tmp_path / "h", "ModernBertForMaskedLM", "fp32")


def test_what_was_proved_is_said_and_what_was_not_is_not(cli, tmp_path, fixture_folder):
    out = convert(cli, fixture_folder("tiny"), tmp_path / "a", "--prove", "roundtrip")
    assert "proved (roundtrip)" in out
    assert file_sha256(fixture_folder("tiny") / "model.safetensors") in out
    assert "proved (tensors)" not in out
    out = convert(cli, fixture_folder("tiny"), tmp_path / "b", "--prove", "none")
    assert "proved (" not in out
    assert "nothing was proved" in out
    assert json.loads((tmp_path / "b" / "conversion_manifest.json").read_text())["proofs"] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prove", "everything"), "unknown proof `everything`"),
        (("--prove", "tensors", "--digest", "none"), "--prove tensors"),
        (("--prove", "roundtrip", "--dtype", "bf16"), "loses bits"),
        (("--prove", "roundtrip", "--head", "base"), "drops weights"),
        (("--digest", "md5"), "unknown digest `md5`"),
        (("--shard-size", "0"), "no shard size"),
        (("--shard-size", "1TB"), "no shard size"),
        (("--allow-overflow",), "--allow-overflow needs"),
        (("--table", "nothing"), "no table `nothing`"),
    ],
)
def test_options_that_cannot_hold_are_refused(cli, tmp_path, fixture_folder, options, says):
    fixture_folder("tiny")  # written now, so that no notice of it stands before the error
    code, out, err = cli(
        "convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--out", tmp_path / "p", *options
    )
    assert code == 2
    assert out == ""
    assert says in err.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_a_cast_says_what_it_lost(cli, tmp_path, fixture_folder):
    out = convert(cli, fixture_folder("tiny"), tmp_path / "p", "--dtype", "bf16")
    assert "cast of 29 tensors: largest error" in out
    manifest = json.loads((tmp_path / "p" / "conversion_manifest.json").read_text())
    embedding = manifest["tensors"]["model.embeddings.tok_embeddings.weight"]["cast"]
    assert embedding["elements"] == 512 * 64
    assert 0 < embedding["max_rel"] <= 2**-8
    assert embedding["overflow"] == 0


def test_dry_run_lists_every_problem_and_exits_with_2(cli, tmp_path, fixture_folder):
    source = tmp_path / "source"
    shutil.copytree(fixture_folder("tiny"), source)
    header = (source / "model.safetensors").read_bytes()
    for name in (b"layers.1.attn.Wo.weight", b"layers.2.mlp.Wi.weight"):
        header = header.replace(name, name.replace(b".W", b".V"))
    (source / "model.safetensors").write_bytes(header)
    code, out, _ = cli("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--dry-run", "--json")
    assert code == 2
    problems = json.loads(out)["problems"]
    assert len(problems) == 4
    unmapped = next(p for p in problems if "attn.Vo" in p["message"])
    assert "nearest row: `layers.{i}.attn.Wo.weight`" in unmapped["hint"]
    assert "`model.layers.1.attn.Wo.weight` is missing and has the same shape" in unmapped["hint"]
    assert cli("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--dry-run")[0] == 2


def test_verify_looks_again(cli, tmp_path, fixture_folder):
    convert(cli, fixture_folder("tiny"), tmp_path / "p")
    code, out, _ = cli("verify", tmp_path / "p")
    assert code == 0
    assert "29 tensors against a new conversion of the source" in out
    with (tmp_path / "p" / "model.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        byte = file.read(1)
        file.seek(-9, 2)
        file.write(bytes([byte[0] ^ 1]))
    code, out, _ = cli("verify", tmp_path / "p", "--json")
    assert code == 1
    assert json.loads(out)["exit_code"] == 1
    assert any("changed" in problem for problem in json.loads(out)["problems"])
    assert cli("verify", fixture_folder("tiny"))[0] == 2
