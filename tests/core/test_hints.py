"""What a failing comparison suggests to look at first."""

from dataclasses import replace

import pytest

from modernbert_align.core.cause import Cause, Tried
from modernbert_align.core.hints import hints
from modernbert_align.core.probes import load_probes
from modernbert_align.core.rows import WeightCheck, WeightDifference
from modernbert_align.core.verdict import Coverage, Failing, Judgement

NOTHING = Coverage(expected=0, compared=0, weights_expected=0, weights_compared=0, missing=())


def cause(level):
    return Cause(probe="layers.0.attn", dtype="fp32", level=level, statement="s")


def judgement(verdict="FAIL", probe=None):
    first = None
    if probe is not None:
        first = Failing(probe=probe, dtype="fp32", mode="isolated", status="fail", detail="d")
    return Judgement(rows=(), verdict=verdict, exit_code=1, coverage=NOTHING, first_failing=first)


def weight(name, **changes):
    values = {"paddle": name, "hf": name, "probe": "layers.0.attn", "dtype": "fp32", "problem": "values"}
    return WeightDifference(**(values | changes))


def checked(*differences, dtype="fp32"):
    return WeightCheck(dtype=dtype, expected=9, compared=9, differences=differences)


@pytest.mark.parametrize(
    ("probe", "word"),
    [
        ("embeddings", "token table"),
        ("layers.7.attn_norm", "layer 0 has no attention norm"),
        ("layers.11.attn", "local_attention // 2"),
        ("layers.0.mlp_norm", "residual after the attention"),
        ("layers.3.mlp", "which half of Wi"),
        ("layers.3", "residuals add them up"),
        ("final_norm", "order of the layers"),
        ("head", "norm(act(dense(x)))"),
        ("logits", "decoder's or classifier"),
        ("output", "what forward() returns"),
        ("loss", "which labels count and how the mean is taken"),
    ],
)
def test_each_probe_has_its_own_advice(probe, word):
    (text,) = hints(judgement(probe=probe), [], [])
    assert text.startswith(f"{probe}: ")
    assert word in text


@pytest.mark.parametrize(
    ("head", "patterns"),
    [
        ("base", 8),
        ("masked_lm", 11),
        ("sequence_classification", 11),
        ("token_classification", 11),
        ("question_answering", 12),
        ("multiple_choice", 11),
    ],
)
def test_every_probe_of_a_model_has_advice(tiny_config, head, patterns):
    found = {
        probe.pattern: hints(judgement(probe=probe.name), [], [])[0].removeprefix(probe.name)
        for probe in load_probes(tiny_config(), head, "model.")
    }
    assert len(found) == patterns
    # Whatever else the model returns is an output like `output`; everything else has advice of its own.
    outputs = {pattern: found.pop(pattern) for pattern in ("output", "start_logits", "end_logits") if pattern in found}
    assert len(set(outputs.values())) == 1
    assert "what forward() returns" in next(iter(outputs.values()))
    assert len({*found.values(), *outputs.values()}) == len(found) + 1


@pytest.mark.parametrize("probe", ["layers.0.rotary", "layers.2.attn_weights", "pooler", "layers.x"])
def test_a_probe_that_nobody_expected_still_gets_advice(probe):
    (text,) = hints(judgement(probe=probe), [], [])
    assert text.startswith(f"{probe}: ")


def test_a_pass_needs_no_advice():
    assert hints(judgement("PASS"), [checked()], []) == ()


def test_a_failure_without_a_place_gives_no_advice():
    assert hints(judgement("NOT_COMPARED", probe=""), [], []) == ()


@pytest.mark.parametrize(("exit_code", "mentioned"), [(1, True), (0, False)])
def test_an_explained_overrun_points_at_the_policy_that_accepts_it(exit_code, mentioned):
    explained = replace(judgement("EXPLAINED", probe="layers.1"), exit_code=exit_code)
    (text,) = hints(explained, [], [])
    assert "no more than rounding explains" in text
    assert ("--policy noise-aware" in text) is mentioned


def test_differing_weights_come_before_everything_else():
    looks = "it is the reference's weight without the transpose"
    found = hints(judgement(probe="layers.0.attn"), [checked(weight("a.weight", looks=looks))], ["norm_eps: 1 and 2"])
    assert found[0] == f"weight `a.weight` (fp32): {looks}"
    assert found[1] == "the candidate's config.json differs: norm_eps: 1 and 2"
    assert found[2].startswith("layers.0.attn: ")


def test_a_weight_without_an_obvious_mistake_is_described_in_figures():
    found = hints(judgement(probe="head"), [checked(weight("a.weight", differing=3, elements=64))], [])
    assert found[0] == "weight `a.weight` (fp32): 3 of 64 elements differ"


def test_a_weight_that_only_the_reference_has_is_named():
    found = hints(judgement(probe="head"), [checked(weight("", hf="b.weight", looks="only there"))], [])
    assert found[0] == "weight `b.weight` (fp32): only there"


def test_three_weights_are_named_and_the_rest_counted():
    many = [weight(f"w{i}", looks=f"looks {i}") for i in range(5)]
    found = hints(judgement(probe="head"), [checked(*many), checked(many[0], dtype="bf16")], [])
    assert found[:3] == tuple(f"weight `w{i}` (fp32): looks {i}" for i in range(3))
    assert found[3] == "2 more weights differ (fp32)"
    assert found[4] == "weight `w0` (bf16): looks 0"
    assert len(hints(judgement(probe="head"), [checked(*many[:3])], [])) == 4


def test_a_cause_that_was_found_takes_the_place_of_the_advice():
    checks = [checked(weight("a.weight", looks="transposed"))]
    found = hints(judgement(probe="layers.0.attn"), checks, [], cause("explained"))
    assert found == ("weight `a.weight` (fp32): transposed",)


@pytest.mark.parametrize("level", ["partial", "unexplained", "structural"])
def test_anything_less_than_a_cause_leaves_the_advice(level):
    failing = judgement(probe="layers.0.attn")
    assert hints(failing, [], [], cause(level)) == hints(failing, [], []) != ()


def test_an_error_that_only_the_whole_model_shows_is_said_to_be_in_the_wiring():
    failing = judgement(probe="layers.1")
    only_whole = replace(failing, first_failing=failing.first_failing.model_copy(update={"mode": "accumulated"}))
    (text,) = hints(only_whole, [], [])
    assert text.startswith("layers.1: every part is right on the reference's inputs")


def test_a_module_that_was_not_seen_gets_no_advice_about_its_arithmetic():
    first = Failing(probe="layers.2.mlp", dtype="fp32", mode="isolated", status="missing", detail="d")
    judged = Judgement(rows=(), verdict="NOT_COMPARED", exit_code=5, coverage=NOTHING, first_failing=first)
    (hint,) = hints(judged, (), ())
    assert "no call of it was seen" in hint
    assert "GELU" not in hint


def test_mistakes_that_were_tried_are_not_advised_again():
    tried = (Tried(name="scale", value="", ratio=1.0),)
    known = Cause(probe="layers.2.attn", dtype="fp32", level="unexplained", statement="none", tried=tried)
    (hint,) = hints(judgement(probe="layers.2.attn"), (), (), known)
    assert "were tried and are not it" in hint
    assert "head_dim ** -0.5" not in hint


def test_a_known_cause_of_a_wrong_gradient_needs_no_advice():
    known = Cause(probe="layers.0", dtype="fp32", level="explained", statement="it is cut off")
    assert hints(judgement(probe="layers.0"), (), (), known, "backward") == ()
