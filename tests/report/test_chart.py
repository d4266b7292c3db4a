import itertools
import re
import sys
import xml.etree.ElementTree as ET

from modernbert_align.report.chart import error_chart_svg
from modernbert_align.report.severity import describe

SVG = "{http://www.w3.org/2000/svg}"


def label_heights(svg):
    """y of every text by its words; of equal ones the first, which is the top panel's."""
    found = {}
    for text in ET.fromstring(svg).iter(f"{SVG}text"):
        y = text.get("y") or re.search(r"translate\([-\d.]+ ([-\d.]+)\)", text.get("transform", "")).group(1)
        found.setdefault("".join(text.itertext()), float(y))
    return found


def mark_heights(svg, **looks):
    """y of every mark whose group has these attributes, or attributes that start so."""
    groups = [
        group
        for group in ET.fromstring(svg).iter(f"{SVG}g")
        if all(group.get(name, "").startswith(value) for name, value in looks.items())
    ]
    return [float(use.get("y")) for group in groups for use in group.findall(f"{SVG}use")]


def words(svg):
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_equal_reports_give_equal_bytes(make_report):
    first = error_chart_svg(make_report(), "bf16")
    assert first == error_chart_svg(make_report(created="2031-12-31T00:00:00+00:00"), "bf16")
    assert first != error_chart_svg(make_report(layers=4), "bf16")


def test_without_rows_there_is_nothing_to_draw(make_report):
    assert error_chart_svg(make_report(), "fp32", "head") == ""


def test_the_users_matplotlib_settings_do_not_show(make_report):
    import matplotlib

    plain = error_chart_svg(make_report(), "fp32")
    with matplotlib.rc_context({"svg.fonttype": "path", "axes.linewidth": 9, "legend.fontsize": 31}):
        assert error_chart_svg(make_report(), "fp32") == plain


def test_it_is_well_formed_inlinable_and_refers_to_nothing_outside(make_report):
    svg = error_chart_svg(make_report(), "fp32")
    assert svg.startswith("<svg ")
    assert ET.fromstring(svg).get("role") == "img"
    assert re.findall(r"https?://[^\"' ]+", svg) == ["http://www.w3.org/2000/svg"]
    assert "style" not in svg, "a strict Content-Security-Policy forbids style attributes and elements"
    assert "<!DOCTYPE" not in svg
    assert "<script" not in svg
    assert "dc:date" not in svg
    targets = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    ids = set(re.findall(r' id="([^"]+)"', svg))
    assert {a or b for a, b in targets} <= ids


def test_the_charts_of_one_page_share_no_id(make_report):
    report = make_report()
    ids = [set(re.findall(r' id="([^"]+)"', error_chart_svg(report, dtype))) for dtype in ("fp32", "bf16")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_the_page_decides_the_colours(make_report, broken_attention):
    svg = error_chart_svg(make_report(changes=broken_attention), "fp32")
    assert "currentColor" in svg
    for name in ("--own", "--end-to-end", "--bad"):
        assert f"var({name}, #" in svg
    outside = re.sub(r"var\([^)]*\)", "", svg)
    assert not re.search(r"#[0-9a-f]{3,6}\b", re.sub(r'href="#[^"]+"', "", outside))


def test_exact_zeros_stand_on_their_labelled_line_below_everything_else(make_report):
    svg = error_chart_svg(make_report(), "fp32")
    zero = label_heights(svg)["0 (exact)"]
    lowest_decade = max(y for label, y in label_heights(svg).items() if re.fullmatch(r"1e-\d+", label))
    assert zero > lowest_decade, "y grows downwards"
    # Text hangs from its baseline, marks from their centre: a few points apart.
    in_top_panel = [y for y in mark_heights(svg, fill="var(--own") if y < zero + 30]
    on_the_line = [y for y in in_top_panel if abs(y - zero) < 6]
    assert len(on_the_line) == 3, "one exact row per layer"
    assert all(y < zero - 8 for y in in_top_panel if y not in on_the_line)


def test_a_number_however_small_is_not_drawn_as_zero(make_report):
    changes = {("logits", "fp32", "isolated"): {"mean_abs": 1e-300}}
    svg = error_chart_svg(make_report(layers=0, changes=changes), "fp32")
    zero = label_heights(svg)["0 (exact)"]
    assert not [y for y in mark_heights(svg, fill="var(--own") if abs(y - zero) < 6]


def test_a_chart_of_nothing_but_zeros_is_drawn(make_report):
    report = make_report()
    rows = tuple(r.model_copy(update={"mean_abs": 0.0, "rel_l2": 0.0, "null_rel_l2": None}) for r in report.rows)
    assert "0 (exact)" in words(error_chart_svg(report.model_copy(update={"rows": rows}), "fp32"))


def test_a_row_without_a_number_has_a_lane_above(make_report):
    assert "no number" not in words(error_chart_svg(make_report(), "fp32"))
    none = dict.fromkeys(("mean_abs", "max_abs", "rel_l2", "null_rel_l2"))
    changes = {("head", "fp32", "isolated"): {"observation": "nonfinite", "reason": "NaN", **none}}
    svg = error_chart_svg(make_report(changes=changes), "fp32")
    heights = label_heights(svg)
    assert heights["no number"] < min(y for label, y in heights.items() if re.fullmatch(r"1e-\d+", label))
    assert any(abs(y - heights["no number"]) < 6 for y in mark_heights(svg, fill="var(--bad"))
    assert "own error: nonfinite\nNaN" in svg


def test_failing_rows_have_a_shape_of_their_own_and_the_first_is_named(make_report, broken_attention):
    good = error_chart_svg(make_report(), "fp32")
    assert "fails" not in words(good)
    assert not mark_heights(good, fill="var(--bad")
    report = make_report(changes=broken_attention)
    bad = error_chart_svg(report, "fp32")
    assert "fails" in words(bad)
    assert "first failing: layers.1.attn" in words(bad)
    failing = sum(row.dtype == "fp32" and row.status == "fail" for row in report.rows)
    assert failing > 5
    assert len(mark_heights(bad, fill="var(--bad")) == 2 * failing, "in two panels"
    assert "first failing: layers.1.attn" not in words(error_chart_svg(report, "bf16")), "another dtype's"


def test_a_row_that_was_not_compared_is_neither_good_nor_failing(make_report):
    svg = error_chart_svg(make_report(changes={("layers.1.mlp", "fp32", "isolated"): None}), "fp32")
    assert "not compared" in words(svg)
    assert "fails" not in words(svg)
    hollow = mark_heights(svg, **{"fill-opacity": "0", "stroke": "var(--bad"})
    assert len(hollow) == 2, "in two panels"
    assert abs(hollow[0] - label_heights(svg)["no number"]) < 6
    assert "not compared" not in words(error_chart_svg(make_report(), "fp32"))


def test_an_explained_row_is_marked_but_not_as_failing(make_report):
    changes = {("final_norm", "bf16", "accumulated"): {"mean_abs": 1.5e-3}}
    svg = error_chart_svg(make_report(changes=changes), "bf16")
    assert "over the contract, explained" in words(svg)
    assert "first over the contract: final_norm" in words(svg)
    assert "fails" not in words(svg)


def test_limits_are_named_and_marks_outside_the_contract_are_hollow(make_report):
    report = make_report()
    svg = error_chart_svg(report, "bf16")
    assert "contract limit 1e-3" in words(svg)
    assert any(text.startswith("rounding limit ") for text in words(svg))
    assert "hollow: not under contract" in words(svg)
    hollow = mark_heights(svg, **{"fill-opacity": "0", "stroke": "var(--end"})
    assert len(hollow) == sum(row.dtype == "bf16" and not row.contract for row in report.rows) == 15
    assert "hollow: not under contract" not in words(error_chart_svg(make_report(), "fp32"))


def test_layers_are_numbered_and_many_do_not_crowd(make_report):
    few = words(error_chart_svg(make_report(layers=4), "fp32"))
    assert [text for text in few if text.isdigit()] == ["0", "1", "2", "3"]
    assert {"embeddings", "final_norm", "head", "logits"} <= set(few)
    base = words(error_chart_svg(make_report(layers=22), "fp32"))
    assert [text for text in base if text.isdigit()] == [str(n) for n in range(22)]
    many = list(ET.fromstring(error_chart_svg(make_report(layers=70), "fp32")).iter(f"{SVG}text"))
    places = [float(text.get("x")) for text in many if (text.text or "").isdigit()]
    assert len(places) > 20
    assert min(b - a for a, b in itertools.pairwise(places)) > 15


def test_every_row_can_be_read_by_pointing_at_its_column(make_report, broken_attention):
    report = make_report(changes=broken_attention)
    titles = [
        rect.findtext(f"{SVG}title") for rect in ET.fromstring(error_chart_svg(report, "fp32")).iter(f"{SVG}rect")
    ]
    said = {title.splitlines()[0]: title for title in titles}
    rows = [row for row in report.rows if row.dtype == "fp32"]
    assert len(said) == len(titles) == len(rows) / 2
    for row in rows:
        assert describe(row) in said[row.probe]
    assert "own error: fail, 3e+06 times its nearest limit\nmean_abs 4.00e-03, limit 1e-05\n" in said["layers.1.attn"]


def test_a_limit_of_one_mode_is_drawn_although_the_other_has_none(make_report):
    svg = error_chart_svg(make_report(), "bf16")
    strokes = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("stroke-width") == "1.6"]
    # The first is the legend's. Only the loss, and here nothing, would be without a contract in both modes.
    assert re.fullmatch(r"M62 [\d.]+L1004 [\d.]+", strokes[1].get("d"))


def test_the_reference_is_shown_against_float64(make_report):
    def dotted(report):
        found = ET.fromstring(error_chart_svg(report, "fp32")).iter(f"{SVG}path")
        return [path for path in found if path.get("stroke-opacity") == "0.75"]

    report = make_report()
    assert len(dotted(report)) == 3, "once per mode and in the legend"
    rows = tuple(row.model_copy(update={"reference_error": None}) for row in report.rows)
    assert not dotted(report.model_copy(update={"rows": rows}))


def test_only_the_forward_phase_has_a_panel_of_the_contract(make_report):
    report = make_report()
    rows = tuple(row.model_copy(update={"phase": "backward", "loss": "head"}) for row in report.rows)
    other = words(error_chart_svg(report.model_copy(update={"phase": "backward", "rows": rows}), "fp32", "head"))
    assert not [text for text in other if text.startswith("mean_abs")]
    assert len([text for text in other if text.startswith("rel_l2")]) == 2
    assert [text for text in words(error_chart_svg(report, "fp32")) if text.startswith("mean_abs")]


def test_a_line_runs_through_the_model_but_not_through_weights(make_report):
    def lines(report, loss):
        found = ET.fromstring(error_chart_svg(report, "fp32", loss)).iter(f"{SVG}path")
        return [p.get("d").count("L") for p in found if p.get("stroke-opacity") == "0.6" and "L" in p.get("d")]

    forward = make_report()
    assert lines(forward, None) == [7, 7], "embeddings, three layers, final_norm, head, logits, output"
    rows = tuple(row.model_copy(update={"phase": "step", "loss": "head"}) for row in forward.rows)
    assert lines(forward.model_copy(update={"phase": "step", "rows": rows}), "head") == []


def test_a_large_model_stays_small(make_report):
    assert len(error_chart_svg(make_report(layers=22), "bf16")) < 100_000


def test_hostile_names_are_text(make_report):
    name = "<script>alert('1')</script> $\\frac{1}$ \"&--> ]]>\x00\ud800"
    good = make_report()
    extra = good.rows[0].model_copy(update={"probe": name, "observation": "extra", "reason": "not in the table"})
    svg = error_chart_svg(make_report(extra=[extra]), "fp32")
    titles = [t.text or "" for t in ET.fromstring(svg).iter(f"{SVG}title")]
    assert any(title.startswith(name[:-2] + "\\x00\\ud800\n") for title in titles), "no XML can hold the last two"
    assert "<script" not in svg


def test_the_words_for_those_who_do_not_see_it(make_report, broken_attention):
    chart = ET.fromstring(error_chart_svg(make_report(changes=broken_attention), "fp32"))
    title, description = (chart.find(f"{SVG}{tag}") for tag in ("title", "desc"))
    assert [title.get("id"), description.get("id")] == chart.get("aria-labelledby").split()
    assert title.text == "Error of every probe, fp32"
    label = description.text
    assert "4.00e-03 at layers.1.attn" in label
    assert int(re.search(r"; (\d+) of 40 rows fail", label).group(1)) > 5


def test_drawing_does_without_pyplot_and_its_global_state(make_report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now raise
    assert error_chart_svg(make_report(), "fp32")
