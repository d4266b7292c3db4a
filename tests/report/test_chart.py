import re
import sys
import xml.etree.ElementTree as ET

from modernbert_align.report.chart import error_chart_svg

SVG = "{http://www.w3.org/2000/svg}"


def label_heights(svg):
    """y of every text by its words; of equal ones the first, which is the top panel's."""
    found = {}
    for text in ET.fromstring(svg).iter(f"{SVG}text"):
        y = text.get("y") or re.search(r"translate\([-\d.]+ ([-\d.]+)\)", text.get("transform", "")).group(1)
        found.setdefault("".join(text.itertext()), float(y))
    return found


def mark_heights(svg, colour):
    """y of every mark drawn in a colour."""
    uses = [use for use in ET.fromstring(svg).iter(f"{SVG}use") if colour in use.get("style", "")]
    return [float(use.get("y")) for use in uses]


def words(svg):
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_equal_reports_give_equal_bytes(make_report):
    first = error_chart_svg(make_report(), "bf16")
    assert first == error_chart_svg(make_report(created="2031-12-31T00:00:00+00:00"), "bf16")
    assert first != error_chart_svg(make_report(layers=4), "bf16")


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
    assert not re.search(r"(fill|stroke): #[0-9a-f]{6}", outside)


def test_exact_zeros_stand_on_their_labelled_line_below_everything_else(make_report):
    svg = error_chart_svg(make_report(), "fp32")
    zero = label_heights(svg)["0 (exact)"]
    lowest_decade = max(y for label, y in label_heights(svg).items() if re.fullmatch(r"1e-\d+", label))
    assert zero > lowest_decade, "y grows downwards"
    # Text hangs from its baseline, marks from their centre: a few points apart.
    in_top_panel = [y for y in mark_heights(svg, "var(--own") if y < zero + 30]
    on_the_line = [y for y in in_top_panel if abs(y - zero) < 6]
    assert len(on_the_line) == 3, "one exact row per layer"
    assert all(y < zero - 8 for y in in_top_panel if y not in on_the_line)


def test_a_number_however_small_is_not_drawn_as_zero(make_report):
    changes = {("logits", "fp32", "isolated"): {"mean_abs": 1e-300}}
    svg = error_chart_svg(make_report(layers=0, changes=changes), "fp32")
    zero = label_heights(svg)["0 (exact)"]
    assert not [y for y in mark_heights(svg, "var(--own") if abs(y - zero) < 6]


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
    assert any(abs(y - heights["no number"]) < 6 for y in mark_heights(svg, "var(--bad"))
    assert "mean_abs no number, nonfinite" in svg


def test_failing_rows_have_a_shape_of_their_own_and_the_first_is_named(make_report, broken_attention):
    good = error_chart_svg(make_report(), "fp32")
    assert "fails" not in words(good)
    assert not mark_heights(good, "var(--bad")
    report = make_report(changes=broken_attention)
    bad = error_chart_svg(report, "fp32")
    assert "fails" in words(bad)
    assert "first failing: layers.1.attn" in words(bad)
    failing = sum(row.dtype == "fp32" and row.status == "fail" for row in report.rows)
    assert failing > 5
    assert len(mark_heights(bad, "fill: var(--bad")) == 2 * failing + 1, "in two panels, and once in the legend"
    assert "first failing: layers.1.attn" not in words(error_chart_svg(report, "bf16")), "another dtype's"


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
    assert "hollow: contract does not apply" in words(svg)
    hollow = [
        use
        for use in ET.fromstring(svg).iter(f"{SVG}use")
        if "fill-opacity: 0; stroke: var(--end" in use.get("style", "")
    ]
    assert len(hollow) == sum(row.dtype == "bf16" and not row.contract for row in report.rows) == 15
    assert "hollow: contract does not apply" not in words(error_chart_svg(make_report(), "fp32"))


def test_layers_are_numbered_and_many_do_not_crowd(make_report):
    few = words(error_chart_svg(make_report(layers=4), "fp32"))
    assert [text for text in few if text.isdigit()] == ["0", "1", "2", "3"]
    assert {"embeddings", "final_norm", "head", "logits"} <= set(few)
    base = words(error_chart_svg(make_report(layers=22), "fp32"))
    assert [text for text in base if text.isdigit()] == [str(n) for n in range(22)]
    many = [text for text in words(error_chart_svg(make_report(layers=70), "fp32")) if text.isdigit()]
    assert 20 <= len(many) <= 32


def test_every_probe_can_be_read_by_pointing_at_its_column(make_report):
    report = make_report()
    titles = "\n".join(t.text for t in ET.fromstring(error_chart_svg(report, "fp32")).iter(f"{SVG}title"))
    for row in report.rows:
        assert row.probe in titles.splitlines()


def test_hostile_names_are_text(make_report):
    name = "<script>alert('1')</script> $\\frac{1}$ \"&--> ]]>"
    good = make_report()
    extra = good.rows[0].model_copy(update={"probe": name, "observation": "extra", "reason": "not in the table"})
    svg = error_chart_svg(make_report(extra=[extra]), "fp32")
    titles = [t.text or "" for t in ET.fromstring(svg).iter(f"{SVG}title")]
    assert any(title.startswith(name) for title in titles)
    assert "<script" not in svg


def test_the_words_for_those_who_do_not_see_it(make_report, broken_attention):
    label = ET.fromstring(error_chart_svg(make_report(changes=broken_attention), "fp32")).get("aria-label")
    assert "4.00e-03 at layers.1.attn" in label
    assert int(re.search(r"; (\d+) of 40 rows fail", label).group(1)) > 5


def test_drawing_does_without_pyplot_and_its_global_state(make_report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now raise
    assert error_chart_svg(make_report(), "fp32")
