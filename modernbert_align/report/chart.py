"""The error of every probe, in execution order, as one SVG per dtype.

The axes are linear in log10(error) rather than matplotlib's log axes: exact zeros and values that could not be measured
then get a labelled lane of their own instead of disappearing.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from modernbert_align.core.rows import MODES, Dtype, Mode, Row
from modernbert_align.report.schema import Report

WIDTH_IN, HEIGHT_IN = 14.0, 9.4
POINTS_PER_INCH = 72
LEFT, RIGHT, BOTTOM, TOP = 0.066, 0.994, 0.115, 0.905
MOST_LAYER_LABELS = 32
LONGEST_LABEL = 20

# Every colour is replaced by a CSS value after drawing, so that the page decides how the chart looks on light and dark.
INK, OWN, END_TO_END, BAD, EXPLAINED = "#010203", "#1d5fd1", "#b8560b", "#d1162f", "#a67c00"
CSS = {
    INK: "currentColor",
    OWN: f"var(--own, {OWN})",
    END_TO_END: f"var(--end-to-end, {END_TO_END})",
    BAD: f"var(--bad, {BAD})",
    EXPLAINED: f"var(--explained, {EXPLAINED})",
}
MODE_COLOUR: dict[Mode, str] = {"isolated": OWN, "accumulated": END_TO_END}
MODE_MARKER: dict[Mode, str] = {"isolated": "o", "accumulated": "s"}
MODE_NAME: dict[Mode, str] = {"isolated": "own error", "accumulated": "end to end"}


@dataclass(frozen=True)
class _Point:
    """One row on the x axis."""

    x: int
    row: Row


@dataclass(frozen=True)
class _Scale:
    """The y axis of a panel, in log10: decades `low` to `high`, a lane below for zero and one above for no number."""

    low: int
    high: int

    @classmethod
    def around(cls, values: Sequence[float | None]) -> "_Scale":
        logs = [math.log10(v) for v in values if v is not None and math.isfinite(v) and v > 0]
        if not logs:
            return cls(low=-9, high=-3)
        low = math.floor(min(logs))
        return cls(low=low, high=max(math.ceil(max(logs)), low + 1))

    @property
    def lane(self) -> float:
        """Distance of a lane from the decades, so that a lane looks the same whatever the range."""
        return 0.09 * (self.high - self.low)

    def y(self, value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return self.high + self.lane
        return math.log10(value) if value > 0 else self.low - self.lane


def error_chart_svg(report: Report, dtype: Dtype) -> str:
    """Draw the errors of one dtype: mean_abs of both modes, then rel_l2 of each mode against what rounding explains.

    Equal reports give equal bytes. The SVG is meant to be inlined: no prolog, no URL but its namespace, colours from
    the page's `currentColor`, `--own`, `--end-to-end`, `--bad` and `--explained`.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.dtype == dtype]
    probes = list(dict.fromkeys(row.probe for row in rows))
    place = {probe: x for x, probe in enumerate(probes)}
    points = {mode: [_Point(place[row.probe], row) for row in rows if row.mode == mode] for mode in MODES}
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"modernbert-align-{dtype}",  # ids must differ between the charts of one page
        "text.parse_math": False,
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.style.context(["default", settings]):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
        figure.subplots_adjust(left=LEFT, right=RIGHT, bottom=BOTTOM, top=TOP, hspace=0.19)
        panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.25, 1, 1))
        _draw_mean_abs(panels[0], points)
        for axes, mode in zip(panels[1:], MODES, strict=True):
            _draw_rel_l2(axes, mode, points[mode])
        for axes in panels:
            _draw_layers(axes, probes)
        _label_layers(panels[-1], probes)
        first = report.first_failing
        if first is not None and first.dtype == dtype and first.probe in place:
            _point_at(panels, place[first.probe], _short(first.probe))
        _draw_legend(figure, rows)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inlined(file.getvalue(), _summary(dtype, rows), _hover(probes, rows))


def _draw_mean_abs(axes: Any, points: dict[Mode, list[_Point]]) -> None:
    everything = [p for mode in MODES for p in points[mode]]
    limits = {p.x: p.row.contract_limit for p in everything if p.row.contract_limit is not None}
    scale = _Scale.around([*(p.row.mean_abs for p in everything), *limits.values()])
    unmeasured = any(scale.y(p.row.mean_abs) > scale.high for p in everything)
    _set_up(axes, scale, "Mean absolute error, both ways of running", "mean_abs", unmeasured)
    _draw_limit(axes, limits, scale, lambda value: f"contract limit {value:.0e}")
    for mode in MODES:
        _draw_marks(axes, mode, [(p, scale.y(p.row.mean_abs)) for p in points[mode]], hollow_without_contract=True)


def _draw_rel_l2(axes: Any, mode: Mode, points: list[_Point]) -> None:
    limits = {p.x: p.row.direct_limit for p in points if p.row.direct_limit is not None}
    nulls = {p.x: p.row.null_rel_l2 for p in points if p.row.null_rel_l2}
    scale = _Scale.around([*(p.row.rel_l2 for p in points), *limits.values(), *nulls.values()])
    title = {
        "isolated": "Relative error, own: each module alone, fed with the reference's inputs",
        "accumulated": "Relative error, end to end: the whole model runs by itself",
    }[mode]
    _set_up(axes, scale, title, "rel_l2", any(scale.y(p.row.rel_l2) > scale.high for p in points))
    for x, null in nulls.items():
        axes.fill_between(
            [x - 0.5, x + 0.5], scale.low - 2 * scale.lane, scale.y(null), color=INK, alpha=0.22, linewidth=0
        )
    _draw_limit(axes, limits, scale, lambda value: f"rounding limit, about {value:.0e}")
    _draw_marks(axes, mode, [(p, scale.y(p.row.rel_l2)) for p in points], hollow_without_contract=False)


def _set_up(axes: Any, scale: _Scale, title: str, measure: str, unmeasured: bool) -> None:
    top = scale.high + (2 if unmeasured else 1) * scale.lane
    axes.set_ylim(scale.low - 2 * scale.lane, top)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(measure)
    step = math.ceil((scale.high - scale.low) / 7)
    decades = list(range(scale.high, scale.low - 1, -step))
    ticks = [(scale.low - scale.lane, "0 (exact)"), *((float(d), f"1e{d:+03d}") for d in decades)]
    if unmeasured:
        ticks.append((scale.high + scale.lane, "no number"))
        axes.axhspan(scale.high + scale.lane / 2, top, color=BAD, alpha=0.08, linewidth=0)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axes.axhline(scale.low - scale.lane / 2, color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_limit(axes: Any, limits: dict[int, float], scale: _Scale, label: Any) -> None:
    """One horizontal stroke over each column the limit applies to."""
    if not limits:
        return
    xs = sorted(limits)
    edges = [edge for x in xs for edge in (x - 0.5, x + 0.5, math.nan)]
    heights = [height for x in xs for height in (scale.y(limits[x]), scale.y(limits[x]), math.nan)]
    axes.plot(edges, heights, color=INK, linewidth=1.6, solid_capstyle="butt")
    axes.annotate(
        label(limits[xs[0]]), (xs[0] - 0.5, scale.y(limits[xs[0]])), (3, -3), textcoords="offset points", va="top"
    )


def _draw_marks(axes: Any, mode: Mode, marks: list[tuple[_Point, float]], *, hollow_without_contract: bool) -> None:
    colour, marker = MODE_COLOUR[mode], MODE_MARKER[mode]
    if mode == "accumulated":
        # Sub-layers do not feed each other in a line; what runs through the model is the sum after every layer.
        stream = [(p.x, y) for p, y in marks if _layer(p.row.probe) is None or p.row.probe.count(".") == 1]
        axes.plot(*zip(*stream, strict=True), color=colour, linewidth=1, alpha=0.6) if stream else None
    for filled in (True, False):
        some = [(p.x, y) for p, y in marks if (p.row.contract or not hollow_without_contract) == filled]
        if some:
            axes.plot(
                *zip(*some, strict=True),
                color=colour,
                marker=marker,
                markersize=4.5,
                linestyle="none",
                markerfacecolor=colour if filled else "none",
            )
    for wrong, style in ((True, FAILS), (False, IS_EXPLAINED)):
        some = [(p.x, y) for p, y in marks if p.row.status != "pass" and (p.row.status != "explained") == wrong]
        if some:
            axes.plot(*zip(*some, strict=True), linestyle="none", zorder=5, **style)


FAILS = {"marker": "X", "markersize": 11, "color": BAD, "markeredgecolor": INK, "markeredgewidth": 0.8}
IS_EXPLAINED = {"marker": "^", "markersize": 9, "color": EXPLAINED, "markeredgecolor": INK, "markeredgewidth": 0.8}


def _layer(probe: str) -> int | None:
    found = re.match(r"layers\.(\d+)(\.|$)", probe, re.ASCII)
    return int(found[1]) if found else None


def _blocks(probes: Sequence[str]) -> list[tuple[int | None, list[int]]]:
    """Runs of columns that belong to one layer; any other probe is a block of its own."""
    keyed = [(x, _layer(probe)) for x, probe in enumerate(probes)]
    runs = groupby(keyed, key=lambda item: (item[1], item[0] if item[1] is None else None))
    return [(key[0], [x for x, _ in run]) for key, run in runs]


def _draw_layers(axes: Any, probes: Sequence[str]) -> None:
    """Shade every other layer, so that a point can be followed down to its number."""
    axes.set_xlim(-0.5, len(probes) - 0.5)
    for layer, xs in _blocks(probes):
        if layer is not None and layer % 2 == 0:
            axes.axvspan(xs[0] - 0.5, xs[-1] + 0.5, color=INK, alpha=0.05, linewidth=0)


def _label_layers(axes: Any, probes: Sequence[str]) -> None:
    blocks = _blocks(probes)
    every = math.ceil(sum(layer is not None for layer, _ in blocks) / MOST_LAYER_LABELS) or 1
    shown = [(layer, xs) for layer, xs in blocks if layer is None or layer % every == 0]
    labels = [_short(probes[xs[0]]) if layer is None else str(layer) for layer, xs in shown]
    axes.set_xticks([(xs[0] + xs[-1]) / 2 for _, xs in shown], labels)
    for label, (layer, _) in zip(axes.get_xticklabels(), shown, strict=True):
        label.set_rotation(90 if layer is None else 0)
    axes.set_xlabel("layer, in execution order (within a layer: attention norm, attention, MLP norm, MLP, layer output)")


def _point_at(panels: Sequence[Any], x: int, probe: str) -> None:
    for axes in panels:
        axes.axvline(x, color=BAD, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
    right_half = x > panels[0].get_xlim()[1] / 2
    panels[0].annotate(
        f"first failing: {probe}",
        (x, 1),
        (-5 if right_half else 5, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if right_half else "left",
        va="top",
        color=BAD,
        fontweight="bold",
    )


def _draw_legend(figure: Any, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for mode in MODES:
        line = {"linestyle": "-" if mode == "accumulated" else "none", "linewidth": 1}
        handles.append(Line2D([], [], color=MODE_COLOUR[mode], marker=MODE_MARKER[mode], label=MODE_NAME[mode], **line))
    if any(not row.contract for row in rows):
        hollow = {"marker": "s", "markerfacecolor": "none", "linestyle": "none", "color": INK}
        handles.append(Line2D([], [], label="hollow: contract does not apply", **hollow))
    handles.append(Line2D([], [], color=INK, linewidth=1.6, label="limit"))
    handles.append(Patch(color=INK, alpha=0.22, linewidth=0, label="how far the reference differs from itself"))
    if any(row.status not in ("pass", "explained") for row in rows):
        handles.append(Line2D([], [], linestyle="none", label="fails", **FAILS))
    if any(row.status == "explained" for row in rows):
        handles.append(Line2D([], [], linestyle="none", label="over the contract, explained", **IS_EXPLAINED))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles), frameon=False)


def _short(probe: str) -> str:
    return probe if len(probe) <= LONGEST_LABEL else probe[: LONGEST_LABEL - 1] + "…"


def _number(value: float | None) -> str:
    return "no number" if value is None or not math.isfinite(value) else "0 (exact)" if value == 0 else f"{value:.2e}"


def _summary(dtype: Dtype, rows: Sequence[Row]) -> str:
    """The chart in words, for those who do not see it."""
    parts = []
    for mode in MODES:
        measured = [row for row in rows if row.mode == mode and row.mean_abs is not None]
        if measured:
            worst = max(measured, key=lambda row: row.mean_abs or 0.0)
            parts.append(f"largest mean_abs, {MODE_NAME[mode]}: {_number(worst.mean_abs)} at {worst.probe}")
    failing = sum(row.status not in ("pass", "explained") for row in rows)
    parts.append(f"{failing} of {len(rows)} rows fail")
    return f"Error of every probe in {dtype}: " + "; ".join(parts)


def _hover(probes: Sequence[str], rows: Sequence[Row]) -> str:
    """Invisible columns over the chart whose titles name the probe and its numbers."""
    words: dict[str, list[str]] = {probe: [probe] for probe in probes}
    for row in rows:
        words[row.probe].append(f"{MODE_NAME[row.mode]}: mean_abs {_number(row.mean_abs)}, {row.status}")
    width, height = WIDTH_IN * POINTS_PER_INCH, HEIGHT_IN * POINTS_PER_INCH
    step = (RIGHT - LEFT) * width / len(probes)
    return "".join(
        f'<rect x="{LEFT * width + x * step:.2f}" y="{(1 - TOP) * height:.0f}" width="{step:.2f}" '
        f'height="{(TOP - BOTTOM) * height:.0f}" fill="none" pointer-events="all">'
        f"<title>{html.escape(chr(10).join(words[probe]))}</title></rect>"
        for x, probe in enumerate(probes)
    )


def _inlined(svg: str, summary: str, overlay: str) -> str:
    """Make a standalone SVG file part of a page."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the groups' ids repeat in every chart; only marks are referred to
    body = body.replace("xlink:href", "href").replace("*{stroke-linejoin", "svg{stroke-linejoin")
    for colour, css in CSS.items():
        body = body.replace(colour, css)
    size = f"{WIDTH_IN * POINTS_PER_INCH:.0f} {HEIGHT_IN * POINTS_PER_INCH:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {size}" '
        f'aria-label="{html.escape(summary)}">{body}{overlay}</svg>'
    )
