"""The cause of a failing comparison: named where the evidence is, and never wrongly."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import paddle
import pytest

from modernbert_align.backends.hypotheses import Ground, Shared, hypotheses, other_layers
from modernbert_align.commands import selftest as command
from modernbert_align.core.table import load_table
from modernbert_align.core.verdict import Failing
from modernbert_align.engines import cause as causes
from modernbert_align.engines import faults
from modernbert_align.engines.faults import catalogue

BUGS = {
    name: fault
    for name, fault in catalogue().items()
    if fault.phase == "forward" and not fault.equivalent and "fp32" in fault.dtypes
}
STRUCTURAL = {name for name, fault in BUGS.items() if fault.status}
# Names that are as true of the first failing layer, where the expected one is taken away.
SAME_IN_ONE_LAYER = {
    "thetas swapped": {"RoPE theta"},
    "masks swapped": {"window in full layers"},
    "layer pattern shifted": {"layer kind"},
}


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


def cause_of(subject, judged=None):
    """What `diff` would report of the subject's candidate as it is."""
    judgement, _, weights = judged or subject.compare()
    ground = Ground(config=subject.config, head=subject.head, reference=subject.reference)
    return causes.examine(
        subject.candidate, ground, subject.batch, subject._probes, subject._entries, judgement, weights
    )


@contextmanager
def without(monkeypatch, name):
    """The list of mistakes without one."""
    with monkeypatch.context() as patch:
        for function in (hypotheses, other_layers):
            patch.setattr(
                causes,
                function.__name__,
                lambda probe, ground, listed=function: (h for h in listed(probe, ground) if h.name != name),
            )
        yield


@contextmanager
def forward_of(layer, change):
    """A module whose output is changed."""
    handle = layer.register_forward_post_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_named_and_never_another(subjects, monkeypatch, name):
    fault = BUGS[name]
    subject = subjects(fault.heads[0])
    with fault.inject(subject.candidate):
        judged = subject.compare()
        found = cause_of(subject, judged)
        if fault.verdict == "NOT_COMPARED":
            assert found is None
            return
        assert found.probe == fault.first
        if fault.status:
            assert found.level == "structural"
            assert found.statement == judged[0].first_failing.detail
        elif fault.cause:
            assert (found.level, found.names) == ("explained", (fault.cause,))
        else:
            assert (found.level, found.names) == ("unexplained", ())
        if fault.cause not in ("", "weights", "random"):
            assert found.left <= found.rounding
            assert found.ratio < 0.1
            with without(monkeypatch, fault.cause):
                other = cause_of(subject, judged)
            true_as_well = SAME_IN_ONE_LAYER.get(fault.cause, set())
            assert other.level != "explained" or set(other.names) <= true_as_well, other.statement


def test_nine_of_ten_bugs_have_a_name():
    numeric = set(BUGS) - STRUCTURAL
    assert len([name for name in numeric if BUGS[name].cause]) >= 0.9 * len(numeric)


@pytest.mark.parametrize(
    "name",
    ["gate and value swapped", "thetas swapped", "scale missing", "window one wider", "norm bias dropped"],
)
def test_bug_is_named_in_bf16_too(subjects, name):
    fault = catalogue()[name]
    subject = subjects(dtype="bf16")
    with fault.inject(subject.candidate):
        found = cause_of(subject)
    assert (found.dtype, found.level, found.names) == ("bf16", "explained", (fault.cause,))


def test_mistake_that_amplifies_rounding_is_named(subjects):
    """Without the scale large scores make the softmax pick one key, and rounding decides which."""
    fault = catalogue()["scale missing"]
    subject = subjects(model="tiny-stress")
    with fault.inject(subject.candidate):
        found = cause_of(subject)
    assert (found.level, found.names) == ("explained", (fault.cause,))


def test_probe_behind_one_that_was_not_seen_is_not_explained_by_itself(subjects):
    def forward(layer, hidden_states, positions, bias=None, _=False):
        hidden_states = hidden_states + layer.attn(layer.attn_norm(hidden_states), positions, bias)[0]
        return hidden_states + 2 * layer.mlp.forward(layer.mlp_norm(hidden_states))  # not the module: never seen

    subject = subjects()
    layer = subject.candidate.model.layers[2]
    with faults._set([faults._method(layer, forward)]):
        judged = subject.compare()
        found = cause_of(subject, judged)
    assert {row.probe for row in judged[0].rows if row.observation != "compared"} == {"layers.2.mlp"}
    assert (found.probe, found.level) == ("layers.2", "structural")
    assert "it starts from layers.2.mlp" in found.statement


def test_model_without_a_fault_has_no_cause(subjects):
    assert cause_of(subjects()) is None


@pytest.mark.parametrize("part", ["attn_norm", "attn", "mlp_norm", "mlp"])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
def test_noise_is_not_explained(subjects, part, size):
    subject = subjects()
    noise = np.random.default_rng(0).standard_normal((*subject.batch.input_ids.shape, subject.config.hidden_size))
    added = paddle.to_tensor((size * noise).astype("float32"))

    def noisy(output):
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    with forward_of(getattr(subject.candidate.model.layers[2], part), noisy):
        found = cause_of(subject)
    assert found.probe == f"layers.2.{part}"
    assert (found.level, found.names) == ("unexplained", ())
    assert "none of" in found.statement


@pytest.mark.parametrize("factor", [1.01, 0.5])
def test_module_that_is_off_by_a_factor_is_not_explained(subjects, factor):
    subject = subjects()
    with forward_of(subject.candidate.model.layers[1].mlp, lambda output: output * factor):
        found = cause_of(subject)
    assert (found.probe, found.level) == ("layers.1.mlp", "unexplained")


@pytest.mark.parametrize("epsilon", [3e-6, 2.5e-5])
def test_epsilon_that_is_not_listed_is_found(subjects, epsilon):
    subject = subjects()
    norm = subject.candidate.model.layers[2].mlp_norm
    norm._epsilon, before = epsilon, norm._epsilon
    try:
        found = cause_of(subject)
    finally:
        norm._epsilon = before
    assert (found.probe, found.level, found.names) == ("layers.2.mlp_norm", "explained", ("norm epsilon",))
    assert float(found.tried[0].value) == pytest.approx(epsilon, rel=0.05)
    assert found.statement.endswith("in this layer only")


def test_theta_that_is_not_listed_is_found(subjects):
    from modernbert_align.models.modernbert.attention import inverse_frequencies

    subject = subjects()
    rotary = subject.candidate.model.rotary_emb["sliding_attention"]
    before = rotary.inv_freq
    rotary.inv_freq = inverse_frequencies(subject.config.head_dim, 12345.0)
    try:
        found = cause_of(subject)
    finally:
        rotary.inv_freq = before
    assert (found.probe, found.level, found.names) == ("layers.1.attn", "explained", ("RoPE theta",))
    assert "12345" in found.statement
    assert found.statement.endswith("in every sliding_attention layer")


def test_another_failure_elsewhere_is_said_to_have_another_reason(subjects):
    subject = subjects()
    with (
        catalogue()["window one wider"].inject(subject.candidate),
        forward_of(subject.candidate.model.layers[3].attn, lambda output: (output[0] * 1.1, *output[1:])),
    ):
        found = cause_of(subject)
    assert (found.probe, found.level, found.names) == ("layers.1.attn", "explained", ("window width",))
    assert found.statement.endswith("instead of 16; layers.3.attn fails for another reason")


def test_two_mistakes_in_one_module_are_not_called_one(subjects):
    subject = subjects()
    with catalogue()["theta 80000"].inject(subject.candidate), catalogue()["scale 1 % off"].inject(subject.candidate):
        found = cause_of(subject)
    assert found.level in ("partial", "unexplained")


def test_most_but_not_all_is_said_to_be_not_certain(subjects):
    subject = subjects()
    with (
        catalogue()["scale missing"].inject(subject.candidate),
        forward_of(subject.candidate.model.layers[0].attn, lambda output: (output[0] * 1.001, *output[1:])),
    ):
        found = cause_of(subject)
    assert (found.level, found.names) == ("partial", ("attention scale",))
    assert found.statement.startswith("not certain: ")


def test_mistake_beside_wrong_weights_is_found(subjects):
    subject = subjects()
    with (
        catalogue()["stale weight in one layer"].inject(subject.candidate),
        catalogue()["SiLU for GELU in one layer"].inject(subject.candidate),
    ):
        found = cause_of(subject)
    assert (found.probe, found.level, found.names) == ("layers.2.mlp", "explained", ("activation",))
    assert found.statement.startswith("its weights differ, and besides, ")


def test_error_in_the_wiring_alone_has_no_cause(subjects):
    """The parts are right, the model hands on something else than they return: only accumulated rows fail."""
    subject = subjects()
    judgement, records, weights = subject.compare()
    first = Failing(probe="layers.1", dtype="fp32", mode="accumulated", status="fail", detail="d")
    failing = replace(judgement, verdict="FAIL", first_failing=first)
    assert cause_of(subject, (failing, records, weights)) is None


def shown_at(subject, probe):
    """Which mistakes can be told from none at a probe: name -> how far they move it, over its size."""
    ground = Ground(config=subject.config, head=subject.head, reference=subject.reference)
    by_name = {one.name: one for one in subject._probes}
    captured = causes.capture(subject.candidate, subject.reference, subject.batch, subject._probes, [by_name[probe]])
    mask = subject.batch.attention_mask.astype(bool)
    truth = ground.oracle.isolated(probe, subject.batch, captured.recorded).numpy()
    found = {}
    for one in hypotheses(probe, ground):
        oracle = one.oracle
        effect = oracle.isolated(probe, subject.batch, captured.recorded).numpy() - truth
        effect = effect[mask] if by_name[probe].tokens else effect
        found[one.name, one.value] = float(np.abs(effect).max() / np.abs(truth).max())
    return found


@pytest.mark.parametrize(
    ("head", "probe"),
    [
        ("masked_lm", "embeddings"),
        ("masked_lm", "layers.0.attn_norm"),
        ("masked_lm", "layers.1.attn_norm"),
        ("masked_lm", "layers.0.attn"),
        ("masked_lm", "layers.1.attn"),
        ("masked_lm", "layers.1.mlp_norm"),
        ("masked_lm", "layers.1.mlp"),
        ("masked_lm", "layers.1"),
        ("masked_lm", "final_norm"),
        ("masked_lm", "head"),
        ("masked_lm", "logits"),
        ("masked_lm", "loss"),
        ("sequence_classification", "head"),
        ("base", "embeddings"),
        ("base", "layers.1.attn"),
        ("base", "layers.1.mlp"),
        ("token_classification", "loss"),
        ("question_answering", "loss"),
        ("multiple_choice", "head"),
    ],
)
def test_every_mistake_shows_on_the_fixture(subjects, head, probe):
    found = shown_at(subjects(head), probe)
    assert found
    vacuous = [key for key, effect in found.items() if not effect > 1e-7]
    assert vacuous == []


@pytest.mark.parametrize("probe", ["layers.1.attn", "layers.1.mlp"])
def test_what_is_shared_between_mistakes_changes_none_of_them(subjects, probe):
    subject = subjects()
    ground = Ground(config=subject.config, head=subject.head, reference=subject.reference)
    target = next(one for one in subject._probes if one.name == probe)
    captured = causes.capture(subject.candidate, subject.reference, subject.batch, subject._probes, [target])
    recorded = {name: values.double() for name, values in captured.recorded.items()}
    shared = replace(ground, shared=Shared(recorded.values()))
    for one, other in zip(hypotheses(probe, ground), hypotheses(probe, shared), strict=True):
        alone, together = (oracle.isolated(probe, subject.batch, recorded) for oracle in (one.oracle, other.oracle))
        assert (alone == together).all(), (one.name, one.value)


def test_capture_leaves_both_models_as_they_were(subjects):
    subject = subjects()
    probes = {probe.name: probe for probe in subject._probes}
    causes.capture(subject.candidate, subject.reference, subject.batch, subject._probes, [probes["layers.2.mlp"]])
    assert not any(module._forward_hooks for module in subject.reference.modules())
    assert not any(layer._forward_post_hooks for layer in subject.candidate.sublayers())
    assert subject.compare()[0].verdict == "PASS"
