"""What the backward and the step phase compare: names, losses, projections, and the optimizer's numbers."""

import dataclasses

import numpy as np
import pytest

from modernbert_align.core.fixtures import InputSpec, make_inputs
from modernbert_align.core.probes import load_probes
from modernbert_align.core.table import load_table
from modernbert_align.core.training import (
    EMBEDDED,
    Optimizer,
    Run,
    backward_probes,
    losses,
    phase_losses,
    phase_probes,
    projections,
    step_probes,
    taps,
)

SPEC = InputSpec(seed=3, lengths=(9, 6))


@pytest.fixture
def model(tiny_config):
    """Probes, weights, prefix and inputs of a small model with a head."""

    def build(head="masked_lm", **changes):
        config, table = tiny_config(**changes), load_table()
        prefix = table.prefix(head)
        return load_probes(config, head, prefix), table.expand(config, head), prefix, make_inputs(SPEC, config, head)

    return build


def test_the_backward_phase_has_the_loss_every_module_the_inputs_and_every_weight(model):
    probes, entries, prefix, _ = model()
    rows = [row.name for row in backward_probes(probes, entries, prefix)]
    modules = [probe.name for probe in probes if not probe.key]
    stored = [entry.hf for entry in entries if entry.op.stored]
    assert rows == ["loss", *reversed(modules), EMBEDDED, *stored]
    assert "decoder.weight" not in rows  # tied: its gradient is the embedding's
    assert len(set(rows)) == len(rows)


def test_an_untied_decoder_has_a_gradient_of_its_own(model):
    probes, entries, prefix, _ = model(tie_word_embeddings=False)
    assert "decoder.weight" in {row.name for row in backward_probes(probes, entries, prefix)}


def test_the_step_phase_has_every_weight_both_its_moments_and_every_loss(model):
    probes, entries, _, _ = model()
    rows = [row.name for row in step_probes(probes, entries, 2)]
    stored = [entry.hf for entry in entries if entry.op.stored]
    states = [f"{name}{kind}" for name in stored for kind in ("", ".moment1", ".moment2")]
    assert rows == [*states, "loss.1", "loss.2"]


def test_optimizer_state_is_judged_in_float32_and_losses_are_not(model):
    probes, entries, _, _ = model()
    assert {row.float32 for row in step_probes(probes, entries, 1) if not row.name.startswith("loss")} == {True}
    assert not step_probes(probes, entries, 1)[-1].float32


def test_tapped_modules_are_addressed_in_both_frameworks(model):
    probes, _, prefix, _ = model()
    first, *rest = taps(probes, prefix)
    assert first.hf == first.paddle == "model.embeddings.tok_embeddings"
    assert [tap.hf for tap in rest] == [probe.hf for probe in probes if probe.hf]


@pytest.mark.parametrize(
    ("head", "expected"),
    [("base", ("projection",)), ("masked_lm", ("projection", "head")), ("question_answering", ("projection", "head"))],
)
def test_a_head_with_labels_is_differentiated_by_its_own_loss_too(model, head, expected):
    batch = model(head)[3]
    assert losses(batch) == expected
    assert phase_losses("backward", batch) == expected
    assert phase_losses("step", batch) == expected[-1:]
    assert phase_losses("forward", batch) == (None,)


def test_projections_reach_every_real_position_of_every_output_and_no_padding(model):
    probes, _, _, batch = model("question_answering")
    found = projections(batch, probes, {"start_logits": (2, 9), "end_logits": (2, 9)})
    assert list(found) == ["start_logits", "end_logits"]
    for weights in found.values():
        assert weights.dtype == np.float32
        np.testing.assert_array_equal(weights != 0, batch.attention_mask == 1)
        assert np.linalg.norm(weights) == pytest.approx(1)
    assert not np.array_equal(*found.values())


def test_projections_are_the_same_each_time_and_others_for_another_seed(model):
    probes, _, _, batch = model("base")
    shapes = {"output": (2, 9, 4)}
    one = projections(batch, probes, shapes)["output"]
    np.testing.assert_array_equal(one, projections(batch, probes, shapes)["output"])
    other = dataclasses.replace(batch, spec=SPEC.model_copy(update={"seed": 4}))
    assert not np.array_equal(one, projections(other, probes, shapes)["output"])


def test_norms_and_biases_are_not_decayed_and_every_matrix_is(model):
    _, entries, _, _ = model(attention_bias=True, mlp_bias=True, norm_bias=True)
    decayed = {entry.hf for entry in entries if Optimizer().decays(entry)}
    assert decayed == {entry.hf for entry in entries if len(entry.hf_shape) == 2}


def test_the_optimizers_numbers_are_exact_in_float32():
    settings = Optimizer()
    for number in (*dataclasses.asdict(settings).values(), 1 - settings.beta1, 1 - settings.beta2):
        assert float(np.float32(number)) == number


def test_the_rows_of_a_phase_are_those_of_its_engine(model):
    probes, entries, prefix, _ = model()
    assert phase_probes(Run(), probes, entries, prefix) == probes
    backward = phase_probes(Run(phase="backward"), probes, entries, prefix)
    assert backward == backward_probes(probes, entries, prefix)
    stepped = phase_probes(Run(phase="step", steps=2), probes, entries, prefix)
    assert stepped == step_probes(probes, entries, 2)


@pytest.mark.parametrize(
    ("phase", "steps"),
    [
        ("step", None),
        ("step", 0),
        ("step", 1),
        ("step", 11),
        ("step", -3),
        ("backward", 2),
        ("forward", 0),
        ("forward", 3),
    ],
)
def test_steps_belong_to_the_step_phase_and_are_two_to_ten(phase, steps):
    with pytest.raises(ValueError, match=f"phase {phase} and {steps} steps"):
        Run(phase=phase, steps=steps)


def test_only_the_forward_phase_has_a_choice_of_engines():
    assert Run(forward_engine="stream").engine == "stream"
    assert Run(phase="backward", forward_engine="stream").engine == "autograd"
    assert Run(phase="step", steps=2).engine == "autograd"
