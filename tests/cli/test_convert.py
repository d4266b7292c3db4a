"""`convert` from the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modernbert_align.core.checkpoint import file_sha256, open_checkpoint


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
    assert document["manifest"]["tensors"] == 29


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
    from modernbert_align.core import checkpoint

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.SafetensorsWriter, "write", interrupt)
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
def test_base_converts_within_250_mib_and_without_a_framework(tmp_path, fixture_folder):
    fixture_folder("base")  # written before, by a process of its own
    arguments = ["convert", "--src", "hf", "--dst", "paddle", "--out", str(tmp_path / "p")]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=True, cwd=Path(tmp_path)
    )
    code, peak_mib, heavy = done.stderr.strip().splitlines()[-1].split()
    assert code == "0"
    assert heavy == "none"
    assert int(peak_mib) < 250
