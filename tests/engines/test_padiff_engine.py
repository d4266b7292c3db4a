"""The parts of PaDiff this project stands on, and the engine's promises."""

import inspect
from importlib.metadata import version

import numpy as np
import paddle
import pytest
import torch

from modernbert_align.engines import padiff_engine as engine


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
def test_every_probe_gets_a_record_with_numbers(load_models, mode, dtype):
    models = load_models("tiny", dtype)
    nulls = models.nulls()
    result = models.padiff(mode, nulls)
    assert result.error == ""
    assert [r.probe for r in result.records] == [p.name for p in models.probes]
    assert all(r.observation == "compared" and r.elements for r in result.records)
    assert all(r.candidate_error is not None and r.reference_error is not None for r in result.records)
    assert all(r.null_parts == nulls[r.probe, mode] for r in result.records)
    assert all((r.ulps is not None) == (dtype == "bf16") for r in result.records)
    real_tokens = int(models.batch.attention_mask.sum())
    assert {r.elements for r in result.records if r.probe == "embeddings"} == {real_tokens * 64}
    assert {r.elements for r in result.records if r.probe == "logits"} == {real_tokens * 512}
    assert {r.elements for r in result.records if r.probe == "output"} == {real_tokens * 512}
    assert {(r.elements, r.shape) for r in result.records if r.probe == "loss"} == {(1, ())}


def test_isolated_errors_stay_in_their_probe(load_models):
    models = load_models()
    paddle_norm = models.candidate.model.layers[1].mlp_norm
    paddle_norm.weight.set_value(paddle_norm.weight * 1.5)
    rows = {mode: {r.probe: r for r in models.padiff(mode).records} for mode in ("isolated", "accumulated")}
    wrong = {name for name, row in rows["isolated"].items() if row.mean_abs > 1e-5}
    assert wrong == {"layers.1.mlp_norm"}
    far = {name for name, row in rows["isolated"].items() if row.candidate_error > 2 * row.reference_error + 1e-7}
    assert far == {"layers.1.mlp_norm"}
    assert rows["accumulated"]["logits"].mean_abs > 1e-5


def test_padiff_own_verdict_is_blind_where_ours_is_not(load_models):
    """Why its verdict never gates: single-step mode says success for a broken module."""
    models = load_models()
    norm = models.candidate.model.layers[1].mlp_norm
    norm.weight.set_value(norm.weight * 1.5)
    result = models.padiff("isolated")
    assert result.padiff_verdict is True
    assert max(r.mean_abs for r in result.records) > 1e-3


def test_values_at_padding_are_not_compared(load_models):
    models = load_models()
    norm = models.candidate.model.final_norm
    original = norm.forward

    def broken_at_padding(x):
        return original(x) + (1 - paddle.to_tensor(models.batch.attention_mask)).astype("float32").unsqueeze(-1) * 100

    norm.forward = broken_at_padding
    row = next(r for r in models.padiff("isolated").records if r.probe == "final_norm")
    assert row.mean_abs < 1e-6
    assert row.candidate_error < 1e-6


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError, KeyError, NotImplementedError, OSError])
def test_a_candidate_that_raises_leaves_no_hooks_and_the_next_run_works(load_models, kind):
    models = load_models()
    layer = models.candidate.model.layers[2].mlp
    original = layer.forward

    def explode(_x):
        raise kind("no kernel today")

    layer.forward = explode
    result = models.padiff("accumulated")
    assert "no kernel today" in result.error
    by_name = {r.probe: r for r in result.records}
    assert by_name["layers.1"].observation == "compared"
    assert by_name["layers.2.mlp"].observation == "missing"
    assert "no kernel today" in by_name["layers.2.mlp"].reason
    layer.forward = original
    for model in (models.candidate, models.reference):
        modules = model.sublayers(include_self=True) if hasattr(model, "sublayers") else model.modules()
        for module in modules:
            hooks = [*module._forward_pre_hooks.values()]
            assert not any(engine._is_padiffs(h) for h in hooks)
    again = models.padiff("accumulated")
    assert again.error == ""
    assert all(r.observation == "compared" for r in again.records)


def test_a_probe_that_the_candidate_never_ran_costs_no_other_row_its_oracle(load_models):
    models = load_models()
    layer = models.candidate.model.layers[2]
    code = layer.mlp.forward

    def forward(hidden_states, position_embeddings, attention_bias=None, output_attentions=False):
        attended, _ = layer.attn(layer.attn_norm(hidden_states), position_embeddings, attention_bias)
        hidden_states = hidden_states + attended
        return hidden_states + code(layer.mlp_norm(hidden_states))

    layer.forward = forward
    records = {r.probe: r for r in models.padiff("isolated").records}
    assert (records["layers.2.mlp"].observation, records["layers.2.mlp"].reason) == (
        "missing",
        "no call of this module was seen in the candidate",
    )
    del records["layers.2.mlp"]
    assert all(r.reference_error is not None for r in records.values())


def test_padiff_prints_nothing_and_leaves_no_log_folder(load_models, capsys, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    models = load_models()
    models.candidate.model.final_norm.weight.set_value(models.candidate.model.final_norm.weight * 2)
    capsys.readouterr()
    assert models.padiff("accumulated").padiff_verdict is False
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "diff_log").exists()


def test_injection_keeps_bfloat16_bits():
    values = torch.tensor([1.0, 2.5, -3.140625, 1e-30], dtype=torch.bfloat16)
    tensor = engine._to_paddle(values)
    assert tensor.dtype == paddle.bfloat16
    np.testing.assert_array_equal(tensor.astype("float32").numpy(), values.float().numpy())


def test_injection_replaces_what_the_reference_returns_and_keeps_the_rest():
    ours = (paddle.zeros([2]), paddle.ones([3]))
    for theirs, first in ((torch.full((2,), 5.0), 5.0), ((torch.full((2,), 6.0),), 6.0)):
        injected = engine._inject(engine._to_paddle, [theirs], ours)
        assert isinstance(injected, tuple)
        assert [tensor.tolist() for tensor in injected] == [[first] * 2, [1.0] * 3]
    injected = engine._inject(engine._to_paddle, [(torch.full((2,), 5.0), torch.full((3,), 6.0))], ours[0])
    assert injected.tolist() == [5.0, 5.0]
