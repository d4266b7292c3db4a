"""The cause of wrong gradients and of wrong optimizer steps: named where the evidence is, and never wrongly."""

from contextlib import contextmanager

import numpy as np
import paddle
import pytest

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends import paddle_training
from modernbert_align.commands import selftest as command
from modernbert_align.core.table import load_table
from modernbert_align.core.training import Optimizer
from modernbert_align.engines import backward_cause, faults, training_cause
from modernbert_align.engines.faults import catalogue

BACKWARD = {name: fault for name, fault in catalogue().items() if fault.phase == "backward"}
STEP = {name: fault for name, fault in catalogue().items() if fault.phase == "step"}
AS_TRUE = {"no weight decay": {"weight decay"}}  # a very small one, where the right name is taken away


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Gives the loaded pair of a fixture for a head and a precision."""
    done = {}

    def subject(head="masked_lm", dtype="fp32", model="tiny-sensitive"):
        if (head, dtype, model) not in done:
            out = tmp_path_factory.mktemp("cause") / head
            done[head, dtype, model] = command._subject(model, head, dtype, load_table(), out)
        return done[head, dtype, model]

    return subject


def cause_of(subject, phase="step", judged=None):
    """What `diff` would report of the subject's candidate as it is."""
    judgement, _, weights = judged or subject.compare(phase=phase)
    return subject.cause(judgement, weights, phase)


@contextmanager
def without(monkeypatch, name):
    """The list of mistakes without one."""
    honest = training_cause.decide
    with monkeypatch.context() as patch:
        for module in (backward_cause, training_cause):
            patch.setattr(
                module,
                "decide",
                lambda rows, guesses, *rest: honest(rows, [guess for guess in guesses if guess.name != name], *rest),
            )
        yield


def masters_with(**methods):
    return faults._set([(paddle_training, "Masters", type("Masters", (paddle_training.Masters,), methods))])


@pytest.mark.parametrize("name", STEP)
def test_wrong_optimizer_is_named_and_never_another(subjects, monkeypatch, name):
    fault = STEP[name]
    subject = subjects(dtype=fault.dtypes[0])
    before = {name: bits.copy() for name, (bits, _) in paddle_backend.state_bits(subject.candidate).items()}
    with fault.inject(subject.candidate):
        judged = subject.compare(phase="step")
        found = cause_of(subject, judged=judged)
        with without(monkeypatch, fault.cause):
            other = cause_of(subject, judged=judged)
    after = {name: bits for name, (bits, _) in paddle_backend.state_bits(subject.candidate).items()}
    assert all(np.array_equal(bits, after[name]) for name, bits in before.items())
    assert (found.probe, found.level, found.names) == (judged[0].first_failing.probe, "explained", (fault.cause,))
    assert found.left <= found.rounding
    assert found.ratio < 0.1
    assert other.level != "explained" or set(other.names) <= AS_TRUE.get(fault.cause, set()), other.statement


@pytest.mark.parametrize("name", ["weight decay in the gradient", "learning rate 1 % off", "gradients not cleared"])
def test_wrong_optimizer_is_named_in_bf16_with_weights_like_trained_ones(subjects, name):
    subject = subjects(dtype="bf16", model="tiny-stress")
    with STEP[name].inject(subject.candidate):
        found = cause_of(subject)
    assert (found.dtype, found.level, found.names) == ("bf16", "explained", (STEP[name].cause,))


@pytest.mark.parametrize(
    ("key", "number", "words"),
    [
        ("learning_rate", 0.0031, "learning rate"),
        ("weight_decay", 0.037, "weight decay"),
        ("beta1", 0.77, "beta1"),
        ("beta2", 0.93, "beta2"),
        ("epsilon", 3.3e-4, "epsilon"),
    ],
)
def test_number_that_is_not_listed_is_found(subjects, key, number, words):
    subject = subjects()
    with faults._optimizer_with(**{key: number})(subject.candidate):
        found = cause_of(subject)
    assert (found.level, found.names) == ("explained", (words,))
    said = found.statement.split(" is ")[1]
    assert float(said.split(" instead of ")[0]) == pytest.approx(number, rel=1e-3)
    assert float(said.split(" instead of ")[1]) == pytest.approx(getattr(Optimizer(), key), rel=1e-5)


@pytest.mark.parametrize("size", [1e-6, 1e-4])
def test_noise_in_the_steps_is_not_explained(subjects, size):
    generator = np.random.default_rng(0)

    original = paddle_training.Masters.step

    def step(self, gradients):
        original(self, gradients)
        for weight in self._weights.values():
            noise = (size * generator.standard_normal(weight.shape)).astype("float32")
            weight.set_value(weight + paddle.to_tensor(noise))

    subject = subjects()
    with masters_with(step=step):
        found = cause_of(subject)
    assert (found.level, found.names) == ("unexplained", ())


def test_two_mistakes_are_not_called_one(subjects):
    subject = subjects()
    with faults._optimizer_with(beta2=0.999, learning_rate=1.3 * Optimizer.learning_rate)(subject.candidate):
        found = cause_of(subject)
    assert found.level in ("partial", "unexplained")


@pytest.mark.parametrize("factor", [1 + 1e-5, 1.01])
def test_gradients_not_cleared_do_not_explain_a_wrong_gradient_beside_them(subjects, factor):
    """That mistake is granted what its own rounding was measured to be, and no more."""
    subject = subjects()
    bias = dict(subject.candidate.named_parameters())["decoder.bias"]
    handle = bias.register_hook(lambda gradient: gradient * factor)
    try:
        with catalogue()["gradients not cleared"].inject(subject.candidate):
            found = cause_of(subject)
    finally:
        handle.remove()
    assert found.level == "partial", found.statement


def test_wrong_gradients_are_not_blamed_on_the_optimizer(subjects):
    subject = subjects()
    with catalogue()["gradient of the tanh GELU"].inject(subject.candidate):
        found = cause_of(subject)
    assert (found.level, found.names) == ("unexplained", ())
    assert "--phase backward" in found.statement


def test_wrong_forward_pass_is_not_blamed_on_the_optimizer(subjects):
    subject = subjects()
    with catalogue()["gate and value swapped"].inject(subject.candidate):
        found = cause_of(subject)
    assert (found.probe, found.level, found.names) == ("loss.1", "unexplained", ())
    assert "--phase forward" in found.statement


def test_weights_that_differ_are_said_to(subjects):
    subject = subjects()
    with catalogue()["attn.Wo untransposed"].inject(subject.candidate):
        found = cause_of(subject)
    assert (found.level, found.names) == ("structural", ())
    assert "layers.1.attn.Wo" in found.statement


def test_model_without_a_fault_has_no_cause(subjects):
    assert cause_of(subjects()) is None


@pytest.mark.parametrize("head", ["masked_lm", "base", "sequence_classification"])
@pytest.mark.parametrize("name", BACKWARD)
def test_wrong_gradient_is_named_and_never_another(subjects, monkeypatch, name, head):
    fault = BACKWARD[name]
    if head not in fault.heads:
        return
    subject = subjects(head)
    with fault.inject(subject.candidate):
        judged = subject.compare(phase="backward")
        found = cause_of(subject, "backward", judged)
        with without(monkeypatch, fault.cause):
            other = cause_of(subject, "backward", judged)
    assert (found.level, found.names) == ("explained", (fault.cause,))
    if head == fault.heads[0]:
        assert found.probe == fault.first
    assert found.left <= found.rounding
    assert other.level != "explained", other.statement
    assert subject.compare(phase="backward")[0].verdict == "PASS"


@pytest.mark.parametrize("name", ["decoder untied", "attention cut off", "residual cut off"])
def test_wrong_gradient_is_named_in_bf16_with_weights_like_trained_ones(subjects, name):
    subject = subjects(dtype="bf16", model="tiny-stress")
    with BACKWARD[name].inject(subject.candidate):
        found = cause_of(subject, "backward")
    assert (found.dtype, found.level, found.names) == ("bf16", "explained", (BACKWARD[name].cause,))


def test_block_that_is_cut_off_is_named(subjects):
    subject = subjects()
    with faults._detached("layers.2.mlp")(subject.candidate):
        found = cause_of(subject, "backward")
    assert (found.probe, found.level, found.names) == ("layers.2.attn", "explained", ("feed-forward block cut off",))


@pytest.mark.parametrize(("part", "name"), [(0, "queries cut off"), (1, "keys cut off"), (2, "values cut off")])
def test_part_of_attention_that_is_cut_off_is_named(subjects, part, name):
    def changed(q, k, v):
        return tuple(value.detach() if n == part else value for n, value in enumerate((q, k, v)))

    subject = subjects()
    with faults._eager_with(changed)(subject.candidate):
        found = cause_of(subject, "backward")
    assert (found.level, found.names) == ("explained", (name,))
    assert found.statement.endswith("in every layer")


def test_embedding_that_is_cut_off_is_named(subjects):
    subject = subjects()
    with faults._detached("embeddings.norm")(subject.candidate):
        found = cause_of(subject, "backward")
    assert (found.probe, found.level) == ("model.embeddings.tok_embeddings.weight", "explained")
    assert found.names == ("embedding cut off",)


def changed_gradient(subject, change):
    return subject.candidate.model.layers[1].attn.Wo.weight.register_hook(change)


@pytest.mark.parametrize("factor", [2.0, 0.99, -1.0])
def test_gradient_that_is_off_by_a_factor_is_named(subjects, factor):
    subject = subjects()
    handle = changed_gradient(subject, lambda gradient: gradient * factor)
    try:
        found = cause_of(subject, "backward")
    finally:
        handle.remove()
    assert (found.probe, found.level) == ("model.layers.1.attn.Wo.weight", "explained")
    assert found.names == ("gradient scaled",)
    assert float(found.tried[0].value) == pytest.approx(factor, rel=1e-4)


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_noise_in_a_gradient_is_not_explained(subjects, size):
    subject = subjects()
    generator = np.random.default_rng(0)

    def noisy(gradient):
        noise = generator.standard_normal(gradient.shape) * size * float(gradient.std())
        return gradient + paddle.to_tensor(noise.astype("float32"))

    handle = changed_gradient(subject, noisy)
    try:
        found = cause_of(subject, "backward")
    finally:
        handle.remove()
    assert (found.probe, found.level, found.names) == ("model.layers.1.attn.Wo.weight", "unexplained", ())


def test_wrong_loss_is_left_to_the_forward_phase(subjects):
    subject = subjects()
    with catalogue()["loss over every position"].inject(subject.candidate):
        found = cause_of(subject, "backward")
    assert (found.probe, found.level, found.names) == ("loss", "unexplained", ())


def test_nine_of_ten_faults_of_every_phase_have_a_name():
    for phase in ("backward", "step"):
        named = [bool(fault.cause) for fault in catalogue().values() if fault.phase == phase]
        assert sum(named) >= 0.9 * len(named)
