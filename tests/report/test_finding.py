"""What a report found, in words: the pattern of what is wrong by itself, and what to run next."""

import pytest

from modernbert_align.core.rows import WeightDifference
from modernbert_align.core.tolerance import Override
from modernbert_align.report.finding import caveats, excesses, next_commands, wrong_by_themselves

WRONG = {"mean_abs": 4e-3, "rel_l2": 0.08, "candidate_error": 0.0784}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def broken(*probes, dtypes=("fp32",), mode="isolated"):
    return {(probe, dtype, mode): WRONG for probe in probes for dtype in dtypes}


@pytest.fixture
def found(make_report):
    def text(changes, types=TYPES):
        report = make_report(layers=4, changes=changes)
        config = report.model.config | {"layer_types": types}
        return wrong_by_themselves(
            report.model_copy(update={"model": report.model.model_copy(update={"config": config})})
        )

    return text


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((0, 1, 2, 3), "attn of every layer"),
        ((1, 2), "attn of every sliding layer (1, 2) and of no other"),
        ((0, 3), "attn of every full layer (0, 3) and of no other"),
        ((2,), "attn of layer 2 alone; 1, of the same kind (sliding), passes"),
        ((0,), "attn of layer 0 alone; 3, of the same kind (full), passes"),
        ((1, 3), "attn of layers 1, 3 alone"),
    ],
)
def test_the_pattern_over_layers_is_said(found, layers, said):
    assert found(broken(*(f"layers.{n}.attn" for n in layers))) == (f"fp32: {said}",)


def test_equal_patterns_of_both_dtypes_are_one_sentence(found):
    assert found(broken("layers.1.mlp", dtypes=("fp32", "bf16"))) == ("fp32 and bf16: mlp of layer 1 alone",)
    assert found(broken("layers.1.mlp") | broken("head", dtypes=("bf16",))) == (
        "fp32: mlp of layer 1 alone",
        "bf16: head",
    )


def test_what_only_follows_is_not_wrong_by_itself(found):
    assert found({}) == ()
    assert found(broken("layers.1.mlp", mode="accumulated")) == ()
    assert found({("layers.1.mlp", "fp32", "isolated"): None}) == (), "not seen is not wrong"


def test_a_config_without_layer_types_makes_no_claim_about_them(found):
    assert found(broken("layers.1.attn"), types=[]) == ("fp32: attn of layer 1 alone",)


def test_every_limit_that_is_exceeded_is_listed_with_its_multiple(make_report):
    report = make_report(changes=broken("layers.1.attn"))
    row = next(row for row in report.rows if row.status == "fail")
    measures = {one.measure: one for one in excesses(row)}
    assert set(measures) == {"mean_abs", "noise ratio", "rel_l2"}
    assert measures["mean_abs"].times == pytest.approx(400)
    assert excesses(report.rows[0]) == ()


@pytest.mark.parametrize(
    ("fields", "command", "expected"),
    [
        ({}, "modernbert-align diff --dtype bf16", ["modernbert-align diff --dtype fp32"]),
        ({}, "modernbert-align diff", ["modernbert-align diff --dtype fp32"]),
        (
            {"phase": "step", "steps": 3, "dtype": "fp32"},
            "modernbert-align diff --phase step --steps 3 --model tiny",
            ["modernbert-align diff --phase forward --model tiny"],
        ),
        ({}, "modernbert-align selftest", []),
    ],
)
def test_the_next_command_changes_the_one_that_was_run(make_report, fields, command, expected):
    report = make_report(changes=broken("layers.1.attn"), command=command, **fields)
    assert [shown for _, shown in next_commands(report)] == expected


def test_a_pass_needs_no_next_command_and_a_folder_with_wrong_weights_is_verified(make_report):
    assert next_commands(make_report()) == ()
    difference = WeightDifference(paddle="a", hf="a", probe="head", dtype="fp32", problem="values")
    report = make_report(differences=[difference])
    report = report.model_copy(update={"model": report.model.model_copy(update={"candidate": "my folder"})})
    assert next_commands(report)[-1][1] == "modernbert-align verify 'my folder'"


def test_a_pass_says_what_its_reader_would_not_expect(make_report):
    assert [text for text in caveats(make_report()) if "emulated" in text]
    beyond = {("logits", "bf16", "accumulated"): {"mean_abs": 2e-3}}
    thresholds = make_report().thresholds
    bf16 = (*thresholds, thresholds[0].model_copy(update={"dtype": "bf16", "value": 1e-3}))
    report = make_report(changes=beyond, thresholds=bf16)
    assert report.verdict == "PASS"
    assert any(
        "In bf16, 1 rows that are not under the contract" in text and "(logits)" in text for text in caveats(report)
    )
    assert caveats(make_report(changes=broken("head"))) == ()


def test_own_limits_are_in_the_banner(make_report):
    from modernbert_align.report.html_report import render_html

    own = Override(probe="logits", dtype="fp32", criterion="direct", limit=9, reason="because")
    page = render_html(make_report(overrides=[own]))
    assert "of this project's own in place of the installed ones" in page
    assert "because" in page


def test_a_pass_that_own_limits_made_does_not_say_that_the_models_are_equal(make_report):
    from modernbert_align.report.html_report import verdict_sentence

    wrong = broken("layers.1.attn") | broken("layers.1.attn", mode="accumulated")
    assert make_report(changes=wrong).verdict == "FAIL"
    numbers = {"contract": 1.0, "noise": 1e9, "direct": 1e9}
    own = [
        Override(probe="layers.1.attn", dtype="fp32", criterion=criterion, limit=limit, reason="because")
        for criterion, limit in numbers.items()
    ]
    report = make_report(changes=wrong, overrides=own)
    assert report.verdict == "PASS"
    assert "2 of 80 rows only by this project's own limits" in verdict_sentence(report)
    assert "computes what the Hugging Face model computes" not in verdict_sentence(report)
