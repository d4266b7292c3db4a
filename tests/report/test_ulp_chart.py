import re
import xml.etree.ElementTree as ET

import pytest

from modernbert_align.core.metrics import ULP_BINS
from modernbert_align.report.ulp_chart import BAR_WIDTH, OPACITY, ulp_histogram_svg

SVG = "{http://www.w3.org/2000/svg}"


def with_counts(report, counts):
    rows = tuple(row.model_copy(update={"ulps": counts.get(row.probe)}) for row in report.rows if row.dtype == "bf16")
    return report.model_copy(update={"rows": rows})


def words(svg):
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def tips(svg):
    return [rect.findtext(f"{SVG}title") for rect in ET.fromstring(svg).iter(f"{SVG}rect")]


def segments(svg):
    """Widths of the segments of all bars, the legend aside."""
    paths = list(ET.fromstring(svg).iter(f"{SVG}path"))[len(ULP_BINS) :]
    return [float(re.search(r"h([\d.]+)v", path.get("d")).group(1)) for path in paths]


def test_every_bin_has_words_and_every_counted_bin_a_shade():
    assert len(OPACITY) == len(ULP_BINS) - 1


def test_without_counts_there_is_nothing_to_draw(make_report):
    report = make_report()
    assert ulp_histogram_svg(with_counts(report, {})) == ""
    assert ulp_histogram_svg(with_counts(report, {"head": (0,) * 9})) == ""


def test_kinds_are_summed_up_over_layers(make_report):
    counts = {"layers.0.attn": (900, 80, 0, 0, 0, 0, 0, 0, 20), "layers.1.attn": (1000, 0, 0, 0, 0, 0, 0, 0, 0)}
    svg = ulp_histogram_svg(with_counts(make_report(), counts))
    assert words(svg).count("attn") == 2, "once per mode"
    assert "95.00 % equal, furthest 1 step" in words(svg)
    assert "attn, own error\nequal: 1900 (95.00 %)\n1 step: 80 (4.00 %)\n" in tips(svg)[0]
    assert "too near zero to count steps: 20 (1.00 %)" in tips(svg)[0]
    assert "own error: 95.00 % equal, furthest 1 step" in ET.fromstring(svg).find(f"{SVG}desc").text


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((10**9, 0, 0, 0, 0, 0, 0, 1, 0), "99.99 % equal, furthest 65+"),
        ((5, 0, 0, 0, 0, 0, 0, 0, 0), "100 % equal, none further"),
        ((0, 0, 0, 0, 0, 0, 0, 0, 7), "0 % equal, all near zero"),
    ],
)
def test_one_element_shows_and_a_share_is_never_rounded_up_to_all(make_report, counts, said):
    svg = ulp_histogram_svg(with_counts(make_report(), {"head": counts}))
    assert said in words(svg)
    drawn = segments(svg)
    assert len(drawn) == 2 * sum(n > 0 for n in counts)
    assert min(drawn) >= 1.5
    assert sum(drawn) == pytest.approx(2 * BAR_WIDTH, abs=0.5)


def test_it_can_be_inlined_under_a_strict_policy(make_report):
    svg = ulp_histogram_svg(make_report())
    assert svg == ulp_histogram_svg(make_report())
    assert not re.search(r"style|<script|\son\w+=", svg)
    assert not re.search(r"#[0-9a-f]{3,6}\b", re.sub(r"var\([^)]*\)", "", svg)), "the page decides the colours"
    assert len(svg) < 40_000


def test_hostile_names_are_text(make_report):
    name = "<script>alert('1')</script>\"&"
    report = make_report()
    row = report.rows[-1].model_copy(update={"probe": name})
    svg = ulp_histogram_svg(report.model_copy(update={"rows": (row,)}))
    assert name in tips(svg)[0]
    assert "<script" not in svg
