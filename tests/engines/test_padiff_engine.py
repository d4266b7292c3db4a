"""The parts of PaDiff this project stands on, and the engine's promises."""

import inspect
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import torch

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.fixtures import load_fixture, make_inputs
from modernbert_align.core.model_config import parse_config, read_config_file
from modernbert_align.core.probes import Probe, load_probes
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
            make_inputs(load_fixture("tiny")[0].inputs, config, "masked_lm"),
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
    assert {r.elements for r in result.records if r.probe == "output"} == {real_tokens * 512}
    assert {(r.elements, r.shape) for r in result.records if r.probe == "loss"} == {(1, ())}


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


def test_the_null_is_measured_for_every_probe_by_its_own_rule(tiny):
    _, reference, batch, probes = tiny()
    seen = []

    def compare(probe, run, eager):
        assert run.shape == eager.shape
        seen.append((probe, eager.shape))
        return 0.25

    null = hf.null_error(reference, batch, probes, compare)
    assert null == {mode: {probe.name: 0.25 for probe in probes} for mode in ("accumulated", "isolated")}
    assert [probe for probe, _ in seen] == [*probes, *probes]
    shapes = {probe.name: shape for probe, shape in seen}
    assert (shapes["output"], shapes["loss"]) == ((2, 192, 512), ())


def test_the_null_leaves_padding_out_where_there_are_tokens_and_follows_the_scale(tiny):
    from modernbert_align.engines.alignment import _rel_l2

    *_, batch, _ = tiny()
    compare = _rel_l2(batch)
    tokens = Probe(name="a", pattern="a", hf="a", paddle="a", fan_in=8)
    whole = replace(tokens, tokens=False)
    ones = np.ones((2, 192, 3), np.float32)
    off = ones.copy()
    off[1, 150:] = 2.0  # padding
    assert compare(tokens, off, ones) == 0
    assert compare(whole, off, ones) == pytest.approx(np.sqrt(42 / 384))
    off[1, 150:] = np.nan
    assert compare(tokens, off, ones) == 0
    assert compare(whole, off, ones) is None
    loss = replace(whole, scale=1.0)
    assert compare(loss, np.float32(0.5), np.float32(0.25)) == 0.25
    assert compare(whole, np.float32(0.5), np.float32(0.25)) == 1.0


# --- what a module returns --------------------------------------------------------------------------------------------


def observed(ours, theirs, mask=None, **changes):
    """The record of one module that returned `ours` in Paddle and `theirs` in PyTorch."""
    probe = Probe(**({"name": "p", "pattern": "p", "hf": "p", "paddle": "p", "fan_in": 8} | changes))
    reports = [SimpleNamespace(items=[SimpleNamespace(type="forward", net_id=1, output=out)]) for out in (ours, theirs)]
    layer_map = SimpleNamespace(absent={}, net_ids={"p": 1}, reports=reports)
    return engine._record(probe, layer_map, mask, "bf16", "isolated", "")


def both(*shape, value=1.0):
    return paddle.full(shape, value), torch.full(shape, value)


@pytest.mark.parametrize("mode", ["alone", "in a tuple"])
def test_the_first_output_is_compared(mode):
    (ours, theirs), (other, another) = both(2, 3), both(4, value=7.0)
    row = observed(ours, theirs) if mode == "alone" else observed((ours, other), (theirs, another))
    assert (row.observation, row.elements, row.mean_abs, row.shape) == ("compared", 6, 0, (2, 3))


def test_the_reference_may_omit_as_many_outputs_as_the_probe_allows():
    (ours, theirs), (more, _) = both(2, 3), both(4)
    for theirs_alone in (theirs, (theirs,), (theirs, None)):
        assert observed((ours, more), theirs_alone, may_omit=1).observation == "compared"
        row = observed((ours, more), theirs_alone)
        assert (row.observation, row.reason) == ("extra", "the candidate returns 0, 1, the reference 0")
    assert observed((ours, more, more), theirs, may_omit=1).observation == "extra"
    assert observed((ours, more, more), theirs, may_omit=2).observation == "compared"


def test_the_candidate_may_omit_nothing():
    (ours, theirs), (_, more) = both(2, 3), both(4)
    row = observed(ours, (theirs, more), may_omit=1)
    assert (row.observation, row.reason) == ("extra", "the candidate returns 0, the reference 0, 1")


def test_every_output_has_its_shape_and_dtype_checked_also_beyond_the_first():
    ours, theirs = both(2, 3)
    row = observed((ours, paddle.ones([4])), (theirs, torch.ones(5)))
    assert (row.observation, row.reason) == ("shape_mismatch", "output 1 is [4], the reference's is [5]")
    row = observed((ours, paddle.ones([4])), (theirs, torch.ones(4, dtype=torch.float64)))
    assert row.observation == "dtype_mismatch"
    assert row.reason.startswith("output 1 is ")


def test_the_whole_model_is_compared_by_key_and_not_by_position():
    (loss, their_loss), (logits, their_logits) = both(value=3.0), both(2, 3)
    ours, theirs = {"logits": logits, "loss": loss}, {"loss": their_loss, "logits": their_logits}
    whole = {"hf": "", "paddle": ""}
    assert observed(ours, theirs, key="logits", **whole).elements == 6
    row = observed(ours, theirs, key="loss", tokens=False, scale=1.0, **whole)
    assert (row.elements, row.shape, row.worst_reference) == (1, (), 3.0)
    row = observed(ours, theirs, key="end_logits", **whole)
    assert (row.observation, row.reason) == ("missing", "the models return loss, logits, not end_logits")


@pytest.mark.parametrize("missing", ["ours", "theirs"])
def test_a_loss_that_only_one_model_returns_is_no_success(missing):
    (loss, their_loss), (logits, their_logits) = both(value=3.0), both(2, 3)
    ours, theirs = {"loss": loss, "logits": logits}, {"loss": their_loss, "logits": their_logits}
    del (ours if missing == "ours" else theirs)["loss"]
    for key in ("loss", "logits"):
        assert observed(ours, theirs, key=key, hf="", paddle="").observation != "compared"


def test_the_error_of_a_loss_is_absolute_below_the_scale():
    ours, theirs = paddle.to_tensor(0.5), torch.tensor(0.25)
    assert observed(ours, theirs, scale=1.0).rel_l2 == 0.25
    assert observed(ours, theirs).rel_l2 == 1.0


@pytest.mark.parametrize("shape", [(2, 5), (6,), ()])
def test_an_output_that_does_not_fit_the_mask_is_not_compared(shape):
    ours, theirs = both(*shape)
    row = observed(ours, theirs, np.ones((2, 3), bool))
    assert (row.observation, row.mean_abs) == ("empty", None)
    assert "[batch seq ...]" in row.reason
    assert observed(ours, theirs, None).observation == "compared"


def test_injection_replaces_what_the_reference_returns_and_keeps_the_rest():
    ours = (paddle.zeros([2]), paddle.ones([3]))
    for theirs, first in ((torch.full((2,), 5.0), 5.0), ((torch.full((2,), 6.0),), 6.0)):
        injected = engine._inject(engine._to_paddle, [theirs], ours)
        assert isinstance(injected, tuple)
        assert [tensor.tolist() for tensor in injected] == [[first] * 2, [1.0] * 3]
    injected = engine._inject(engine._to_paddle, [(torch.full((2,), 5.0), torch.full((3,), 6.0))], ours[0])
    assert injected.tolist() == [5.0, 5.0]
