"""The cause of wrong optimizer steps: named where the evidence is, and never wrongly."""

from contextlib import contextmanager

import numpy as np
import paddle
import pytest

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.backends import paddle_training
from modernbert_align.commands import selftest as command
from modernbert_align.core.table import load_table
from modernbert_align.core.training import Optimizer
from modernbert_align.engines import faults, training_cause
from modernbert_align.engines.faults import catalogue

STEP = {name: fault for name, fault in catalogue().items() if fault.phase == "step"}
# What decays as much on the weights there are, where the right name is taken away.
AS_TRUE = {"decay on norms": {"decay on everything"}, "no weight decay": {"weight decay"}}


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
        patch.setattr(
            training_cause,
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
