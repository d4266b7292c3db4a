import xml.etree.ElementTree as ET

import pytest

from modernbert_align.report.svg import (
    BAD,
    DRAWN_BAD,
    DRAWN_INK,
    INK,
    box,
    chart_name,
    escaped,
    from_figure,
    hover,
    layer_of,
    svg,
    text,
)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def figure():
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1008 / 72, 100 / 72), dpi=72)
    axes = drawn.add_axes((0, 0, 1, 1), xlim=(0, 1008), ylim=(0, 100))
    axes.set_axis_off()
    axes.plot([10, 20.123456], [30, 40], color=DRAWN_INK, linewidth=2, alpha=0.5)
    axes.plot([100, 200, 300], [50, 60, 70.04], color=DRAWN_BAD, marker="o", linestyle="none")
    axes.plot([100, 200], [10, 10], color=DRAWN_INK, marker="s", linestyle="none", markerfacecolor="none")
    return drawn


def parsed(figure, name="a"):
    return ET.fromstring(svg(name, "title", "description", 100, from_figure(figure, name)))


def test_styles_become_attributes_with_the_pages_colours(figure):
    body = from_figure(figure, "a")
    assert "style" not in body
    assert "#0102" not in body
    assert "clip" not in body
    (line,) = [path for path in parsed(figure).iter(f"{SVG}path") if path.get("stroke-width") == "2"]
    assert (line.get("stroke"), line.get("stroke-opacity"), line.get("fill")) == (INK, "0.5", "none")
    assert line.get("d") == "M10 70L20.1 60"


def test_marks_of_one_look_are_one_group_that_refers_to_one_shape(figure):
    chart = parsed(figure)
    groups = [group for group in chart.iter(f"{SVG}g") if group.find(f"{SVG}use") is not None]
    assert [len(group.findall(f"{SVG}use")) for group in groups] == [3, 2]
    assert [(use.get("x"), use.get("y")) for use in groups[0]] == [("100", "50"), ("200", "40"), ("300", "30")]
    assert groups[0].get("fill") == BAD
    assert groups[1].get("fill-opacity") == "0"
    shapes = {path.get("id") for path in chart.iter(f"{SVG}path")}
    assert {use.get("href") for group in groups for use in group} == {"#a-0", "#a-1"} <= {f"#{one}" for one in shapes}


def test_ids_differ_between_charts_and_not_between_runs(figure):
    assert from_figure(figure, "a") == from_figure(figure, "a")
    assert 'id="b-0"' in from_figure(figure, "b")
    names = [
        chart_name(kind, dtype, loss)
        for kind in ("error", "heat")
        for dtype in ("fp32", "bf16")
        for loss in (None, "head", "projection")
    ]
    assert len(set(names)) == len(names)


def test_names_cannot_leave_their_element():
    name = "</title><script>&\"'\x00\x1b\ud800\u2028"
    words = ET.fromstring(f"<g>{text(0, 0, name)}{hover(0, 0, 1, 1, name)}</g>")
    assert ["".join(element.itertext()) for element in words] == ["</title><script>&\"'\\x00\\x1b\\ud800\\u2028"] * 2
    assert escaped("two\nlines") == "two\nlines"
    escaped(name).encode()


def test_coordinates_are_short():
    assert box(1 / 3, 2, 10, 2.25) == "M0.3 2h10v2.2h-10z"
    assert text(-0.01, 2 / 3, "x", font_size=8) == '<text x="0" y="0.7" font-size="8">x</text>'


@pytest.mark.parametrize(
    ("probe", "layer"),
    [
        ("layers.3", 3),
        ("layers.12.attn", 12),
        ("model.layers.0.mlp.Wi.weight", 0),
        ("layers.x", None),
        ("layers.3a", None),
        ("layers.9999999", None),
        ("head", None),
    ],
)
def test_layers_are_read_off_names(probe, layer):
    assert layer_of(probe) == layer
