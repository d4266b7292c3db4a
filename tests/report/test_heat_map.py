import re
import xml.etree.ElementTree as ET

import pytest

from modernbert_align.core.verdict import Failing
from modernbert_align.report.heat_map import SHADES, heat_map_svg

SVG = "{http://www.w3.org/2000/svg}"
NONE = dict.fromkeys(("mean_abs", "max_abs", "rel_l2", "null_rel_l2"))


def cells(svg, mark):
    """How many cells are drawn as `beyond`, `explained` or `unseen`."""
    paths = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("data-mark") == mark]
    return sum(p.get("d").count("M") for p in paths)


def painted(svg):
    """How many cells have a shade of what is within the limits, the legend aside."""
    paths = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if "--heat" in p.get("fill", "")]
    return sum(p.get("d").count("M") for p in paths) - len(SHADES)


def tips(svg):
    return [rect.findtext(f"{SVG}title") for rect in ET.fromstring(svg).iter(f"{SVG}rect")]


def words(svg):
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_every_row_is_a_cell_that_can_be_pointed_at(make_report):
    report = make_report()
    rows = [row for row in report.rows if row.dtype == "fp32"]
    svg = heat_map_svg(report, "fp32")
    assert len(tips(svg)) == len(rows) == 40
    assert painted(svg) == 40
    assert sorted(tip.splitlines()[0] for tip in tips(svg)) == sorted(row.probe for row in rows)
    assert "head\nown error: pass, 0.83 of its nearest limit\nmean_abs " in "".join(tips(svg))


def test_rows_beyond_a_limit_have_a_colour_and_a_cross_of_their_own(make_report, broken_attention):
    report = make_report(changes=broken_attention)
    failing = sum(row.dtype == "fp32" and row.status == "fail" for row in report.rows)
    svg = heat_map_svg(report, "fp32")
    assert cells(svg, "beyond") == failing > 5
    crosses = [p.get("d") for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("stroke-linecap") == "round"]
    assert "".join(crosses).count("M") == failing
    assert painted(svg) == 40 - failing
    assert cells(heat_map_svg(make_report(), "fp32"), "beyond") == 0
    (first,) = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("data-mark") == "first"]
    assert first.get("d").startswith("M")
    assert "first failing" in words(svg)
    other = heat_map_svg(report, "bf16")
    assert cells(other, "first") == 0
    assert "first failing" not in words(other)


@pytest.mark.parametrize("absent", [None, {"observation": "empty", "reason": "never ran", **NONE}])
def test_what_was_not_compared_is_hatched_and_never_painted_as_good(make_report, absent):
    svg = heat_map_svg(make_report(changes={("layers.1.mlp", "fp32", "isolated"): absent}), "fp32")
    assert cells(svg, "unseen") == 1
    assert painted(svg) == 39
    assert words(svg).count("?") == 2, "in the cell and in the legend"
    assert {"not compared", "first gap"} <= set(words(svg))
    assert cells(svg, "first") == 1


def test_a_row_that_claims_to_pass_without_numbers_is_not_painted_as_good(make_report):
    report = make_report()
    rows = tuple(row.model_copy(update={"mean_abs": None}) for row in report.rows)
    svg = heat_map_svg(report.model_copy(update={"rows": rows}), "fp32")
    assert cells(svg, "unseen") == 40
    assert painted(svg) == 0


def test_a_row_that_is_not_finite_is_marked_as_failing(make_report):
    changes = {("head", "fp32", "isolated"): {"observation": "nonfinite", "reason": "NaN", **NONE}}
    svg = heat_map_svg(make_report(changes=changes), "fp32")
    assert cells(svg, "beyond") == 1
    assert any(tip == "head\nown error: nonfinite\nNaN" for tip in tips(svg))


def test_an_explained_row_has_a_mark_of_its_own(make_report):
    svg = heat_map_svg(make_report(changes={("final_norm", "bf16", "accumulated"): {"mean_abs": 1.5e-3}}), "bf16")
    assert cells(svg, "explained") == 1
    assert cells(svg, "beyond") == 0
    assert {"explained", "first over the contract"} <= set(words(svg))


def test_layers_run_across_and_kinds_down(make_report):
    found = words(heat_map_svg(make_report(layers=22), "fp32"))
    assert [word for word in found if word.isdigit() and word != "1"] == [str(n) for n in (0, *range(2, 22))]
    for kind in ("attn_norm", "attn", "mlp_norm", "mlp", "layer"):
        assert found.count(kind) == 2, "once per mode"
    assert {"embeddings", "final_norm", "head", "logits", "output"} <= set(found)


def test_gradients_and_weights_are_kinds_of_their_own(make_report):
    names = ("loss", "head", "layers.1", "layers.1.mlp", "layers.0.attn", "model.layers.0.attn.Wqkv.weight",
             "model.layers.1.mlp.Wi.weight", "model.final_norm.weight")  # fmt: skip
    report = make_report()
    rows = tuple(
        report.rows[0].model_copy(update={"probe": name, "phase": "backward", "loss": loss})
        for loss in ("projection", "head")
        for name in names
    )
    report = report.model_copy(update={"rows": rows, "phase": "backward"})
    svg = heat_map_svg(report, "fp32", "head")
    found = words(svg)
    assert len(tips(svg)) == len(names)
    assert "own error: gradients of weights" in found
    assert {"attn.Wqkv", "mlp.Wi", "final_norm", "loss", "head"} <= set(found)
    assert heat_map_svg(report, "fp32") == ""
    ids = [set(re.findall(r' id="([^"]+)"', heat_map_svg(report, "fp32", loss))) for loss in ("projection", "head")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_moments_have_a_map_of_their_own(make_report):
    report = make_report()
    rows = tuple(
        report.rows[0].model_copy(update={"probe": f"model.layers.0.mlp.Wi.weight{end}", "phase": "step"})
        for end in ("", ".moment1", ".moment2")
    )
    found = words(heat_map_svg(report.model_copy(update={"rows": rows, "phase": "step"}), "fp32"))
    assert found.count("mlp.Wi") == 3
    assert {"own error: weights", "own error: moment1", "own error: moment2"} <= set(found)


def test_it_can_be_inlined_under_a_strict_policy(make_report, broken_attention):
    report = make_report(changes=broken_attention)
    report = report.model_copy(update={"first_failing": Failing(
        probe="layers.1.attn", dtype="fp32", mode="isolated", status="fail", detail="")})  # fmt: skip
    svg = heat_map_svg(report, "fp32")
    assert svg == heat_map_svg(report, "fp32")
    assert not re.search(r"style|<script|\son\w+=", svg)
    assert not re.search(r"#[0-9a-f]{3,6}\b", re.sub(r"var\([^)]*\)", "", svg)), "the page decides the colours"
    root = ET.fromstring(svg)
    labels = root.get("aria-labelledby").split()
    assert root.get("role") == "img"
    assert [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == labels
    assert "layers.1.attn" in root.find(f"{SVG}desc").text


def test_hostile_names_are_text(make_report):
    name = "layers.1.<script>alert('1')</script> \"&--> ]]>"
    extra = make_report().rows[0].model_copy(update={"probe": name, "observation": "extra", "reason": "<b>no</b>"})
    svg = heat_map_svg(make_report(extra=[extra]), "fp32")
    assert any(tip.startswith(f"{name}\n") for tip in tips(svg))
    assert "<script" not in svg
    assert "<b>" not in svg


def test_a_large_model_stays_small(make_report):
    assert len(heat_map_svg(make_report(layers=22), "bf16")) < 70_000
