"""The parts of PaDiff this project stands on, and the engine's promises."""

import inspect
from importlib.metadata import version

import numpy as np
import paddle
import pytest
import torch

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.fixtures import load_fixture, make_inputs
from modernbert_align.core.model_config import parse_config, read_config_file
from modernbert_align.core.probes import load_probes
from modernbert_align.engines import padiff_engine as engine


@pytest.fixture
def tiny(fixture_folder, converted):
    """Both tiny models, their inputs and probes."""

    def load(dtype="fp32"):
        folder = fixture_folder("tiny")
        config = parse_config(read_config_file(folder))
        return (
            paddle_backend.load(converted("tiny"), "ModernBertForMaskedLM", dtype),
            hf.load(folder, "ModernBertForMaskedLM", dtype),
            make_inputs(load_fixture("tiny")[0].inputs, config),
            load_probes(config, "masked_lm", "model."),
        )

    return load


def test_padiff_is_the_pinned_version():
    assert version("padiff") == engine.PINNED


def test_padiff_has_the_internals_the_engine_uses():
    assert list(inspect.signature(engine.padiff.auto_diff).parameters)[:3] == ["layer", "module", "example_inp"]
    for name in ("struct_hook_layers", "weight_init_layers", "ignore_class"):
        assert callable(getattr(engine.padiff.LayerMap, name))
    for name in ("extract_frame_summary", "_torch_tensor_to_paddle_tensor", "__in_torch_api_hook__"):
        assert hasattr(engine.padiff_hooks, name)
    from padiff.trainer.trainer_utils.report import ReportItem

    item = ReportItem("forward", 0, (), (), torch.nn.Identity(), 3, None, [])
    assert (item.type, item.net_id, item.output) == ("forward", 3, ())


def test_padiff_did_not_wrap_the_frameworks():
    assert not hasattr(torch.matmul, "padiff_wrapped")


@pytest.mark.parametrize("mode", ["isolated", "accumulated"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_probe_gets_a_record_with_numbers(tiny, mode, dtype):
    candidate, reference, batch, probes = tiny(dtype)
    result = engine.run(candidate, reference, batch, probes, dtype=dtype, mode=mode)
    assert result.error == ""
    assert [r.probe for r in result.records] == [p.name for p in probes]
    assert all(r.observation == "compared" and r.elements for r in result.records)
    real_tokens = int(batch.attention_mask.sum())
    assert {r.elements for r in result.records if r.probe == "embeddings"} == {real_tokens * 64}
    assert {r.elements for r in result.records if r.probe == "logits"} == {real_tokens * 512}


def test_isolated_errors_stay_in_their_probe(tiny):
    candidate, reference, batch, probes = tiny()
    paddle_norm = candidate.model.layers[1].mlp_norm
    paddle_norm.weight.set_value(paddle_norm.weight * 1.5)
    rows = {
        mode: {r.probe: r for r in engine.run(candidate, reference, batch, probes, dtype="fp32", mode=mode).records}
        for mode in ("isolated", "accumulated")
    }
    wrong = {name for name, row in rows["isolated"].items() if row.mean_abs > 1e-5}
    assert wrong == {"layers.1.mlp_norm"}
    assert rows["accumulated"]["logits"].mean_abs > 1e-5


def test_padiff_own_verdict_is_blind_where_ours_is_not(tiny):
    """Why its verdict never gates: single-step mode says success for a broken module."""
    candidate, reference, batch, probes = tiny()
    norm = candidate.model.layers[1].mlp_norm
    norm.weight.set_value(norm.weight * 1.5)
    result = engine.run(candidate, reference, batch, probes, dtype="fp32", mode="isolated")
    assert result.padiff_verdict is True
    assert max(r.mean_abs for r in result.records) > 1e-3


def test_values_at_padding_are_not_compared(tiny):
    candidate, reference, batch, probes = tiny()
    norm = candidate.model.final_norm
    original = norm.forward

    def broken_at_padding(x):
        return original(x) + (1 - paddle.to_tensor(batch.attention_mask)).astype("float32").unsqueeze(-1) * 100

    norm.forward = broken_at_padding
    records = engine.run(candidate, reference, batch, probes, dtype="fp32", mode="isolated").records
    row = next(r for r in records if r.probe == "final_norm")
    assert row.mean_abs < 1e-6


def test_a_candidate_that_raises_leaves_no_hooks_and_the_next_run_works(tiny):
    candidate, reference, batch, probes = tiny()
    layer = candidate.model.layers[2].mlp
    original = layer.forward

    def explode(_x):
        raise RuntimeError("no kernel today")

    layer.forward = explode
    with engine.clean_hooks(candidate, reference):
        result = engine.run(candidate, reference, batch, probes, dtype="fp32", mode="accumulated")
    assert "no kernel today" in result.error
    by_name = {r.probe: r for r in result.records}
    assert by_name["layers.1"].observation == "compared"
    assert by_name["layers.2.mlp"].observation == "missing"
    assert "no kernel today" in by_name["layers.2.mlp"].reason
    layer.forward = original
    for model in (candidate, reference):
        modules = model.sublayers(include_self=True) if hasattr(model, "sublayers") else model.modules()
        for module in modules:
            hooks = [*module._forward_pre_hooks.values()]
            assert not any(engine._is_padiffs(h) for h in hooks)
    again = engine.run(candidate, reference, batch, probes, dtype="fp32", mode="accumulated")
    assert again.error == ""
    assert all(r.observation == "compared" for r in again.records)


def test_padiff_prints_nothing_and_leaves_no_log_folder(tiny, capsys, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    candidate, reference, batch, probes = tiny()
    candidate.model.final_norm.weight.set_value(candidate.model.final_norm.weight * 2)
    result = engine.run(candidate, reference, batch, probes, dtype="fp32", mode="accumulated")
    assert result.padiff_verdict is False
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "diff_log").exists()


def test_injection_keeps_bfloat16_bits():
    values = torch.tensor([1.0, 2.5, -3.140625, 1e-30], dtype=torch.bfloat16)
    tensor = engine._to_paddle(values)
    assert tensor.dtype == paddle.bfloat16
    np.testing.assert_array_equal(tensor.astype("float32").numpy(), values.float().numpy())


def test_reference_against_itself_differs_in_attention_only_when_isolated(tiny):
    from modernbert_align.engines.alignment import _rel_l2

    _, reference, batch, probes = tiny()
    null = hf.null_error(reference, batch, probes, _rel_l2(batch))
    assert reference.config._attn_implementation == "eager"
    own = {name for name, error in null["isolated"].items() if error and error > 0}
    assert own == {f"layers.{i}.attn" for i in range(4)}
    assert null["accumulated"]["logits"] > 0
