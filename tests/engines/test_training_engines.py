"""Gradients and AdamW steps: what is recorded is right, every row is there, and nothing is left behind."""

import copy

import numpy as np
import paddle
import pytest
import torch

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends import paddle_training, torch_training
from modernbert_align.backends.oracle import Oracle
from modernbert_align.backends.torch_training import OracleTrainee, Trainee
from modernbert_align.core.table import load_table
from modernbert_align.core.training import Optimizer, backward_probes, losses, projections, step_probes, taps
from modernbert_align.engines import backward_engine, step_engine

HEADS = load_table().heads


class Phases:
    """Both models and what the engines need beside them."""

    def __init__(self, models):
        self.models = models
        self.prefix = load_table().prefix(models.head)
        self.taps = taps(models.probes, self.prefix)
        self.losses = losses(models.batch)

    def oracle(self, model):
        return Oracle(self.models.config, self.models.head, model)

    def projected(self, trainee):
        return {
            name: torch.from_numpy(values)
            for name, values in projections(self.models.batch, self.models.probes, trainee.shapes()).items()
        }

    def trainee(self, model=None):
        m = self.models
        return Trainee(m.reference if model is None else model, m.batch, self.taps, m.probes, m.entries)

    def oracle_trainee(self):
        m = self.models
        return OracleTrainee(self.oracle, m.reference, m.batch, self.taps, m.probes, m.entries)

    def backward(self):
        m = self.models
        return backward_engine.run(
            paddle_training.Trainee(model=m.candidate, batch=m.batch),
            m.reference,
            self.oracle,
            m.batch,
            m.probes,
            m.entries,
            prefix=self.prefix,
            dtype=m.dtype,
        )

    def step(self, steps=2):
        m = self.models
        return step_engine.run(
            paddle_training.Trainee(model=m.candidate, batch=m.batch),
            m.reference,
            self.oracle,
            m.batch,
            m.probes,
            m.entries,
            dtype=m.dtype,
            steps=steps,
        )


@pytest.fixture(scope="module")
def phases(load_models):
    done = {}

    def build(name="tiny-sensitive", dtype="fp32", head="masked_lm"):
        key = name, dtype, head
        if key not in done:
            done[key] = Phases(load_models(name, dtype, head))
        return done[key]

    return build


def state(models):
    """All weights of both models."""
    ours = {name: bits.copy() for name, (bits, _) in paddle_backend.state_bits(models.candidate).items()}
    return ours, {name: tensor.clone() for name, tensor in models.reference.state_dict().items()}


def unchanged(models, before):
    ours, theirs = state(models)
    return all(np.array_equal(ours[n], before[0][n]) for n in ours) and all(
        torch.equal(theirs[n], before[1][n]) for n in theirs
    )


def hooks(models):
    """How many hooks both models have."""
    layers = models.candidate.sublayers(include_self=True)
    ours = sum(len(layer._forward_post_hooks) + len(layer._forward_pre_hooks) for layer in layers)
    return ours + sum(len(module._forward_hooks) for module in models.reference.modules())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_gradient_is_compared_with_oracle_and_null_in_both_modes(phases, head, dtype):
    case = phases(dtype=dtype, head=head)
    before, hooked = state(case.models), hooks(case.models)
    records = case.backward()
    rows = backward_probes(case.models.probes, case.models.entries, case.prefix)
    keys = {(r.probe, r.mode, r.loss) for r in records}
    assert keys == {(row.name, m, loss) for row in rows for m in ("isolated", "accumulated") for loss in case.losses}
    assert len(records) == len(keys)
    assert {r.phase for r in records} == {"backward"}
    assert {r.observation for r in records} == {"compared"}
    assert all(r.candidate_error is not None and r.null_rel_l2 is not None for r in records)
    weights = [r for r in records if r.probe.endswith(".weight")]
    assert all(r.reference_rms > 0 for r in weights)  # zero against zero would show nothing
    assert unchanged(case.models, before)
    assert hooks(case.models) == hooked


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_weight_and_moment_is_compared_and_both_models_keep_their_weights(phases, dtype):
    case = phases(dtype=dtype)
    before, hooked = state(case.models), hooks(case.models)
    records = case.step()
    rows = step_probes(case.models.probes, case.models.entries, 2)
    assert [(r.probe, r.mode) for r in records] == [(row.name, m) for m in ("isolated", "accumulated") for row in rows]
    assert {(r.phase, r.loss, r.observation) for r in records} == {("step", "head", "compared")}
    assert unchanged(case.models, before)
    assert hooks(case.models) == hooked


def test_the_recorded_gradients_are_those_of_plain_autograd(phases):
    case = phases()
    recording = case.trainee().run(None)
    model = copy.deepcopy(case.models.reference)
    from modernbert_align.backends import hf

    model(**hf.inputs(case.models.batch)).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert recording.weights.keys() == {e.hf for e in case.models.entries if e.op.stored}
    for name, gradient in recording.weights.items():
        assert torch.equal(gradient, plain[name]), name


def test_the_gradient_of_an_activation_is_a_finite_difference(phases):
    case = phases()
    oracle = case.oracle_trainee()
    weights = case.projected(case.trainee())
    gradients = oracle.run(weights).gradients["layers.2.mlp"]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(gradients.shape, generator=generator, dtype=torch.float64)

    def loss(step):
        passing = oracle._oracle.accumulated(case.models.batch)
        sent, found = None, {}
        while True:
            try:
                name, value = passing.send(sent)
            except StopIteration:
                return sum((found[name] * w).sum() for name, w in weights.items())
            found[name] = value.detach()
            sent = value + step * direction if name == "layers.2.mlp" else None

    with torch.no_grad():
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float((gradients * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_isolated_gradients_start_from_the_references_on_both_ways(phases):
    case = phases()
    trainee = case.trainee()
    weights = case.projected(trainee)
    expected = trainee.run(weights)
    shifted = copy.copy(expected)
    shifted.gradients = {name: 2 * g for name, g in expected.gradients.items()}
    again = trainee.run(weights, shifted)
    torch.testing.assert_close(again.gradients["logits"], expected.gradients["logits"])  # comes from the loss itself
    for name in ("head", "layers.3.mlp", "layers.0", "embeddings"):
        torch.testing.assert_close(again.gradients[name], 2 * expected.gradients[name], rtol=1e-4, atol=1e-8)
    name = "model.layers.1.mlp.Wi.weight"
    torch.testing.assert_close(again.weights[name], 2 * expected.weights[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["sdpa", "permuted"])
def test_a_variation_changes_gradients_by_rounding_alone_and_is_gone_afterwards(phases, name):
    case = phases()
    trainee = case.trainee()
    before = trainee.run(None).weights
    with torch_training.variation(case.models.reference, name):
        varied = trainee.run(None).weights
    distances = [float((varied[n] - before[n]).norm() / before[n].norm()) for n in before]
    assert 0 < max(distances) < 1e-4
    after = trainee.run(None).weights
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_the_oracle_is_nearer_to_the_reference_the_more_precise_that_is(phases):
    errors = {}
    for dtype in ("fp32", "bf16"):
        case = phases(dtype=dtype)
        theirs, exact = case.trainee().run(None).weights, case.oracle_trainee().run(None).weights
        errors[dtype] = max(float((theirs[n].double() - exact[n]).norm() / exact[n].norm()) for n in theirs)
    assert errors["fp32"] < 1e-5
    assert 1e-3 < errors["bf16"] < 0.5


def test_both_optimizers_follow_the_formula(phases):
    """AdamW by hand: decayed weights shrink by lr * decay, then step by the corrected mean over the corrected root."""
    settings = Optimizer()
    entries = [e for e in phases().models.entries if e.paddle in ("model.final_norm.weight", "head.dense.weight")]
    generator = np.random.default_rng(0)
    start = {e.hf: generator.standard_normal(e.hf_shape) for e in entries}
    gradients = [{e.hf: generator.standard_normal(e.hf_shape) for e in entries} for _ in range(3)]
    theirs = torch_training.Masters({n: torch.from_numpy(v.copy()) for n, v in start.items()}, entries, settings)
    ours = paddle_training.Masters({n: paddle.to_tensor(v) for n, v in start.items()}, entries, settings)
    for step in gradients:
        theirs.step({n: torch.from_numpy(g) for n, g in step.items()})
        ours.step({n: paddle.to_tensor(g) for n, g in step.items()})
    for entry in entries:
        name = entry.hf
        weight, mean, square = start[name], 0.0, 0.0
        for n, step in enumerate(gradients, start=1):
            mean = settings.beta1 * mean + (1 - settings.beta1) * step[name]
            square = settings.beta2 * square + (1 - settings.beta2) * step[name] ** 2
            if entry.kind != "norm":
                weight = weight * (1 - settings.learning_rate * settings.weight_decay)
            root = np.sqrt(square / (1 - settings.beta2**n)) + settings.epsilon
            weight = weight - settings.learning_rate * mean / (1 - settings.beta1**n) / root
        for suffix, values in (("", weight), (".moment1", mean), (".moment2", square)):
            np.testing.assert_allclose(theirs.state()[name + suffix].numpy(), values, rtol=1e-12)
            np.testing.assert_allclose(ours.state()[name + suffix].numpy(), values, rtol=2e-6, atol=1e-7)


def test_a_tied_weight_is_trained_once(phases):
    names = paddle_training.parameters(phases().models.candidate)
    assert "model.embeddings.tok_embeddings.weight" in names
    assert "decoder.weight" not in names


@pytest.mark.parametrize("phase", ["backward", "step"])
def test_a_candidate_that_raises_is_missing_in_every_row_and_keeps_its_weights(phases, monkeypatch, phase):
    case = phases()
    before = state(case.models)

    def broken(*_arguments, **_more):
        raise ValueError("no kernel\nfor this")

    monkeypatch.setattr(case.models.candidate.head, "forward", broken)
    records = getattr(case, phase)()
    monkeypatch.undo()
    assert {r.observation for r in records} == {"missing"}
    assert {r.reason for r in records} == {"ValueError: no kernel for this"}
    assert unchanged(case.models, before)


def test_a_module_cut_off_from_the_gradient_is_missing_and_its_weight_has_none(phases):
    case = phases()
    norm = case.models.candidate.model.layers[2].mlp_norm
    original = norm.forward
    norm.forward = lambda x: original(x).detach()
    try:
        found = {(r.probe, r.mode, r.loss): r for r in case.backward()}
    finally:
        del norm.forward
    cut = found["layers.2.mlp_norm", "isolated", "head"]
    assert (cut.observation, cut.reason) == ("missing", "the candidate computes no gradient here")
    weight = found["model.layers.2.mlp_norm.weight", "isolated", "head"]
    assert (weight.observation, weight.rel_l2) == ("compared", 1.0)


def test_a_weight_not_trained_is_wrong_by_all_of_its_gradient(phases):
    case = phases()
    weight = case.models.candidate.model.layers[1].mlp.Wo.weight
    weight.stop_gradient = True
    try:
        found = {(r.probe, r.mode, r.loss): r for r in case.backward()}
    finally:
        weight.stop_gradient = False
    assert found["model.layers.1.mlp.Wo.weight", "isolated", "head"].rel_l2 == 1.0
    assert found["model.layers.1.mlp.Wi.weight", "isolated", "head"].rel_l2 < 1e-5
