"""`diff` from the command line, on the tiny fixture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modernbert_align.core.tolerance import load_tolerance
from modernbert_align.report.json_report import read_report
from modernbert_align.report.schema import Report


def diff(cli, report_dir, *arguments):
    code, out, err = cli("diff", "--model", "tiny", "--report-dir", report_dir, "--json", *arguments)
    assert out, err
    return code, json.loads(out)


@pytest.fixture(scope="module")
def bf16_report(tmp_path_factory):
    """The JSON report of a tiny bf16 run, made once through the real console entry."""
    folder = tmp_path_factory.mktemp("reports")
    command = [sys.executable, "-m", "modernbert_align", "diff", "--model", "tiny", "--dtype", "bf16"]
    done = subprocess.run(
        [*command, "--report-dir", str(folder)], capture_output=True, text=True, check=False, cwd=Path(folder)
    )
    assert done.returncode == 0, done.stderr
    return read_report(folder / "diff-tiny-masked_lm-bf16.json"), folder, done


def test_tiny_is_aligned_in_both_precisions(bf16_report):
    report, _, _ = bf16_report
    assert report.verdict == "PASS"
    assert {row.dtype for row in report.rows} == {"fp32", "bf16"}
    assert {row.status for row in report.rows} == {"pass"}
    under = [row for row in report.rows if row.dtype == "fp32" or (row.mode == "isolated" and row.probe != "loss")]
    assert all(row.contract for row in under)


def test_every_probe_is_in_every_pass(bf16_report):
    report, _, _ = bf16_report
    parts = ("attn_norm", "attn", "mlp_norm", "mlp")
    layers = [name for i in range(4) for name in (*(f"layers.{i}.{part}" for part in parts), f"layers.{i}")]
    expected = ["embeddings", *layers, "final_norm", "head", "logits", "output", "loss"]
    for dtype in ("fp32", "bf16"):
        for mode in ("isolated", "accumulated"):
            assert [r.probe for r in report.rows if (r.dtype, r.mode) == (dtype, mode)] == expected
    assert report.coverage.compared == report.coverage.expected == 4 * len(expected)
    assert report.coverage.weights_compared == report.coverage.weights_expected == 60


def test_rounding_happens_where_the_reference_rounds(bf16_report):
    """Isolated bf16 rows are nearly bit-equal; a rounding in the wrong place would cost three orders of magnitude."""
    report, _, _ = bf16_report
    own = {row.probe: row for row in report.rows if row.dtype == "bf16" and row.mode == "isolated"}
    del own["loss"]  # one bfloat16 number
    for name, row in own.items():
        assert row.mean_abs <= (1e-5 if name.endswith("attn") else 2e-7), (name, row.mean_abs)


def test_inputs_have_a_padded_row_and_a_window_that_bites(bf16_report):
    report, _, _ = bf16_report
    assert len(report.inputs.lengths) >= 2
    assert max(report.inputs.lengths) >= 176
    assert report.inputs.padded
    assert report.inputs.window_bites


def test_report_says_what_is_emulated(bf16_report):
    report, _, done = bf16_report
    assert report.execution["fp32"].candidate == "native"
    assert report.execution["bf16"].candidate == "emulated"
    assert "emulated" in done.stdout


def test_progress_is_on_stderr_and_off_a_terminal_without_colour(bf16_report):
    _, _, done = bf16_report
    assert "isolated pass" in done.stderr
    assert "isolated pass" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr.replace("\x1b[0m", "")


def test_null_and_pins_are_recorded(bf16_report):
    report, _, _ = bf16_report
    assert any(row.null_rel_l2 for row in report.rows if row.probe == "layers.1.attn" and row.mode == "isolated")
    assert all(set(row.null_parts) == {"sdpa", "permuted"} for row in report.rows)
    assert all(row.null_rel_l2 == max(row.null_parts.values()) for row in report.rows)
    assert report.environment.pins["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"
    assert (report.engine.name, report.engine.version) == ("padiff", "0.2.0")


def test_both_sides_are_measured_against_the_oracle_in_every_row(bf16_report):
    report, _, _ = bf16_report
    assert all(row.candidate_error is not None and row.reference_error is not None for row in report.rows)
    assert all(row.noise_ratio is None or 0 < row.noise_ratio <= row.noise_limit for row in report.rows)
    with_ratio = [row for row in report.rows if row.noise_ratio is not None]
    assert len(with_ratio) > len(report.rows) / 2
    for row in with_ratio:
        tolerance = load_tolerance(row.dtype)
        size = max(row.reference_rms, 1.0 if row.probe == "loss" else 0.0)
        least = tolerance.forward.noise.floor * tolerance.unit_roundoff * size
        assert row.noise_ratio == row.candidate_error / max(row.reference_error, least)
    assert all((row.ulps is not None) == (row.dtype == "bf16") for row in report.rows)
    assert all(sum(row.ulps) == row.elements for row in report.rows if row.dtype == "bf16")


def test_the_streaming_engine_gives_the_same_report(bf16_report, cli, tmp_path):
    report, _, _ = bf16_report
    code, streamed = diff(cli, tmp_path, "--dtype", "bf16", "--engine", "stream")
    assert code == 0
    assert streamed["engine"] == {"name": "stream", "version": streamed["tool_version"], "passes": [], "traces": []}
    driven = json.loads(report.model_dump_json())
    for row in (*streamed["rows"], *driven["rows"]):
        row["padiff_equal"] = None
    for key in ("verdict", "policy", "model", "inputs", "thresholds", "coverage", "weights", "first_failing", "rows"):
        assert streamed[key] == driven[key], key
    path = tmp_path / "diff-tiny-masked_lm-bf16.json"
    assert cli("gate", path, "--require", "model=tiny,dtype=fp32,dtype=bf16")[0] == 0
    assert "PASS" in path.with_suffix(".html").read_text()


def test_an_unknown_engine_is_refused(cli, tmp_path):
    code, out, err = cli("diff", "--model", "tiny", "--engine", "guess", "--report-dir", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown engine `guess`")
    assert "one of padiff, stream" in err
    assert not list(tmp_path.iterdir())


def test_both_reports_are_written_and_html_can_be_made_again(bf16_report, cli, tmp_path):
    _, folder, _ = bf16_report
    html = folder / "diff-tiny-masked_lm-bf16.html"
    assert "PASS" in html.read_text()
    assert cli("report", folder / "diff-tiny-masked_lm-bf16.json", "--report-dir", tmp_path)[0] == 0
    assert (tmp_path / html.name).read_text() == html.read_text()


def test_two_runs_measure_the_same(bf16_report, cli, tmp_path):
    report, _, _ = bf16_report
    _, again = diff(cli, tmp_path, "--dtype", "bf16")
    changing = {"created", "timings_s", "content_sha256", "command", "environment"}
    one = {k: v for k, v in json.loads(report.model_dump_json()).items() if k not in changing}
    assert one == {k: v for k, v in again.items() if k not in changing}


def test_candidate_folder_is_compared_instead_of_a_fresh_conversion(cli, tmp_path, converted):
    code, report = diff(cli, tmp_path, "--candidate", str(converted("tiny")))
    assert code == 0
    assert report["model"]["candidate"] == str(converted("tiny"))


def test_candidate_with_other_weights_fails(cli, tmp_path):
    import shutil

    import torch
    import transformers

    torch.manual_seed(1)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    config = transformers.ModernBertConfig(**sizes, num_attention_heads=4, local_attention=32, pad_token_id=3)
    transformers.ModernBertForMaskedLM(config).save_pretrained(tmp_path / "other")
    assert (
        cli("convert", "--src", "hf", "--dst", "paddle", "--model", tmp_path / "other", "--out", tmp_path / "p")[0] == 0
    )
    code, report = diff(cli, tmp_path / "r", "--candidate", str(tmp_path / "p"))
    assert code == 1
    assert report["verdict"] == "FAIL"
    assert len(report["weights"][0]["differences"]) > 10
    shutil.rmtree(tmp_path / "p")


def test_candidate_with_another_config_is_named_in_the_hints(cli, tmp_path, converted):
    import shutil

    folder = tmp_path / "p"
    shutil.copytree(converted("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    code, report = diff(cli, tmp_path / "r", "--candidate", str(folder))
    assert code == 1
    assert any("norm_eps is 0.001" in hint for hint in report["hints"])
    assert report["first_failing"]["probe"] == "embeddings"


def test_base_head_compares_the_encoder_alone(cli, tmp_path):
    code, report = diff(cli, tmp_path, "--head", "base")
    assert code == 0
    assert report["model"]["architecture"] == "ModernBertModel"
    assert report["rows"][-1]["probe"] == "output"
    assert not any(row["probe"] in ("head", "logits") for row in report["rows"])
    assert (tmp_path / "diff-tiny-base-fp32.json").is_file()


def test_a_directory_is_judged_noise_aware_by_default(cli, tmp_path, fixture_folder):
    code, out, _ = cli("diff", "--model", fixture_folder("tiny"), "--report-dir", tmp_path, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["policy"] == "noise-aware"
    assert report["model"]["fixture"] is None


def test_rounding_beyond_the_contract_is_explained_not_passed(cli, tmp_path, monkeypatch):
    """A contract no implementation can meet: the row says so, and only the noise-aware policy lets it through."""
    from modernbert_align.core import tolerance
    from modernbert_align.core.verdict import RUNS

    real = tolerance.load_tolerance

    def strict(dtype):
        loaded = real(dtype)
        return loaded.model_copy(update={"contract": loaded.contract.model_copy(update={"mean_abs": 1e-12})})

    monkeypatch.setattr(tolerance, "load_tolerance", strict)
    assert RUNS["fp32"] == ("fp32",)
    code, report = diff(cli, tmp_path)
    assert (code, report["verdict"]) == (1, "EXPLAINED")
    assert any("rounding" in hint for hint in report["hints"])
    code, report = diff(cli, tmp_path, "--policy", "noise-aware")
    assert (code, report["verdict"]) == (0, "EXPLAINED")
    path = tmp_path / "diff-tiny-masked_lm-fp32.json"
    assert cli("gate", path)[0] == 1  # the gate does not take the policy from the file
    assert cli("gate", path, "--policy", "noise-aware")[0] == 0


def test_schema_describes_the_report(bf16_report):
    from modernbert_align.report.json_report import json_schema

    report, _, _ = bf16_report
    schema = json_schema()
    assert set(schema["required"]) <= set(Report.model_fields)
    assert set(json.loads(report.model_dump_json())) == set(schema["properties"])


@pytest.mark.parametrize("engine", ["padiff", "stream"])
@pytest.mark.parametrize("name", ["nan", "inf"])
def test_a_reference_that_is_not_finite_never_passes(cli, tmp_path, monkeypatch, name, engine):
    from modernbert_align.backends import hf

    load = hf.load

    def broken(*args):
        model = load(*args)
        model.model.final_norm.register_forward_hook(lambda _m, _i, out: out * float(name))
        return model

    monkeypatch.setattr(hf, "load", broken)
    code, report = diff(cli, tmp_path, "--engine", engine)
    assert code == 1
    assert (report["first_failing"]["probe"], report["first_failing"]["status"]) == ("final_norm", "nonfinite")


@pytest.mark.parametrize("engine", ["padiff", "stream"])
def test_an_oracle_that_is_not_finite_never_passes(cli, tmp_path, monkeypatch, engine):
    from modernbert_align.backends.oracle import Oracle

    exact = Oracle.mlp
    monkeypatch.setattr(Oracle, "mlp", lambda self, layer, x: exact(self, layer, x) * float("nan"))
    code, report = diff(cli, tmp_path, "--engine", engine)
    assert code == 1
    assert (report["first_failing"]["probe"], report["first_failing"]["status"]) == ("layers.0.mlp", "nonfinite")


def test_help_answers_without_importing_a_framework():
    code = (
        "import sys\nfrom modernbert_align.cli import main\nmain(['--help'])\n"
        "heavy = {'torch', 'paddle', 'transformers', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "shards"])
def test_other_ways_to_store_a_checkpoint_align_too(cli, tmp_path, fixture_folder, stored):
    import torch
    import transformers

    half = {} if stored == "shards" else {"dtype": getattr(torch, stored)}
    model = transformers.AutoModelForMaskedLM.from_pretrained(fixture_folder("tiny"), **half)
    model.save_pretrained(tmp_path / "source", max_shard_size="200KB" if stored == "shards" else "1GB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) == (4 if stored == "shards" else 1)
    code, out, _ = cli("diff", "--model", tmp_path / "source", "--dtype", "bf16", "--report-dir", tmp_path / "r")
    assert code == 0, out


def test_config_in_the_old_spelling_aligns_too(cli, tmp_path, fixture_folder):
    import shutil

    folder = tmp_path / "source"
    shutil.copytree(fixture_folder("tiny-sensitive"), folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "dtype", "transformers_version"):
        del config[key]
    config |= {
        "torch_dtype": "float32",
        "global_rope_theta": 70000.0,
        "local_rope_theta": 300.0,
        "global_attn_every_n_layers": 2,
        "reference_compile": False,
        "transformers_version": "4.48.0",
    }
    (folder / "config.json").write_text(json.dumps(config))
    code, out, _ = cli("diff", "--model", folder, "--report-dir", tmp_path / "r", "--json")
    assert code == 0, out
    resolved = json.loads(out)["model"]["config"]
    assert resolved["sliding_rope_theta"] == 300.0
    assert resolved["layer_types"][:2] == ["full_attention", "sliding_attention"]
    assert resolved["layer_types"][2] == "full_attention"


def test_every_deciding_number_is_in_the_report_with_its_origin(bf16_report):
    from modernbert_align.core.tolerance import load_tolerances

    report, _, _ = bf16_report
    shown = {(t.dtype, t.criterion, t.value) for t in report.thresholds if t.origin}
    for dtype, tolerance in load_tolerances(("fp32", "bf16")).items():
        direct = tolerance.forward.direct
        assert (dtype, "contract", tolerance.contract.mean_abs) in shown
        assert {(dtype, "direct", direct.factor), (dtype, "direct", direct.small_factor)} <= shown
        noise = tolerance.forward.noise
        assert {(dtype, "noise", noise.factor), (dtype, "noise", noise.small_factor)} <= shown


def test_stress_weights_are_judged_without_the_contract(cli, tmp_path):
    code, out, _ = cli(
        "diff", "--model", "tiny-stress", "--dtype", "bf16", "--engine", "stream", "--report-dir", tmp_path, "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert report["verdict"] in ("PASS", "EXPLAINED")
    assert report["policy"] == "noise-aware"
    assert report["engine"]["name"] == "stream"
    assert all(row["noise_limit"] is not None for row in report["rows"])
    assert cli("gate", next(tmp_path.glob("*.json")), "--require", "model=tiny-stress,dtype=fp32,dtype=bf16")[0] == 0


@pytest.mark.parametrize("engine", ["padiff", "stream"])
def test_two_runs_of_one_command_differ_in_their_times_only(cli, tmp_path, engine):
    reports = []
    for folder in ("one", "other"):
        code, report = diff(cli, tmp_path / folder, "--dtype", "fp32", "--engine", engine)
        assert code == 0
        reports.append(report)
    one, other = reports
    assert one["timings_s"].keys() == other["timings_s"].keys()
    differing = {key for key in one if one[key] != other[key]}
    assert {"timings_s"} <= differing <= {"created", "timings_s", "content_sha256"}
