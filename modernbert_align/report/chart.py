"""The error of every probe, in execution order, as one SVG per dtype.

The axes are linear in log10(error) rather than matplotlib's log axes: exact zeros and values that could not
be measured then get a labelled lane of their own instead of disappearing.
"""

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from modernbert_align.core.rows import MODES, Dtype, Loss, Mode, Phase, Row
from modernbert_align.core.training import MOMENTS
from modernbert_align.core.verdict import Failing
from modernbert_align.report.schema import Report
from modernbert_align.report.svg import MODE_NAME, is_number, layer_of, number, shortened

WIDTH_IN, HEIGHT_IN = 14.0, 9.2
POINTS_PER_INCH = 72
LEFT, RIGHT, BOTTOM, TOP = 0.062, 0.994, 0.105, 0.92
MOST_LAYER_LABELS = 32
LONGEST_LABEL = 14

# Every colour is replaced by a CSS value after drawing: the page decides how it looks on light and dark.
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
# A circle still shows on a square of the same value.
MODE_SIZE: dict[Mode, float] = {"isolated": 3.8, "accumulated": 5.4}
FAILS: dict[str, Any] = {"marker": "X", "markersize": 10, "color": BAD, "markeredgewidth": 1}
IS_EXPLAINED: dict[str, Any] = {"marker": "^", "markersize": 9, "color": EXPLAINED, "markeredgewidth": 1}


_AXIS: dict[Phase, str] = {
    "forward": "layer, in execution order (within a layer: attention norm, attention, MLP norm, MLP, layer output)",
    "backward": "layer: gradients of the modules' outputs from the loss back to the inputs, then of the weights",
    "step": "layer of every weight, then the losses",
}


@dataclass(frozen=True)
class _Point:
    """One row on the x axis."""

    x: int
    row: Row


@dataclass(frozen=True)
class _Scale:
    """The y axis of a panel in log10: decades `low` to `high`, a lane below for zero, above for no number."""

    low: int
    high: int
    unmeasured: bool

    @classmethod
    def around(cls, errors: Sequence[float | None], lines: Iterable[float]) -> "_Scale":
        unmeasured = not all(is_number(error) for error in errors)
        logs = [math.log10(v) for v in (*errors, *lines) if is_number(v) and v > 0]
        if not logs:
            return cls(low=-9, high=-3, unmeasured=unmeasured)
        low = math.floor(min(logs))
        return cls(low=low, high=max(math.ceil(max(logs)), low + 1), unmeasured=unmeasured)

    @property
    def lane(self) -> float:
        """Distance of a lane from the decades, so that a lane looks the same whatever the range."""
        return 0.11 * (self.high - self.low)

    @property
    def bottom(self) -> float:
        return self.low - 2 * self.lane

    @property
    def top(self) -> float:
        return self.high + (2 if self.unmeasured else 1.4) * self.lane

    def y(self, value: float | None) -> float:
        if not is_number(value):
            return self.high + self.lane
        return math.log10(value) if value > 0 else self.low - self.lane


def error_chart_svg(report: Report, dtype: Dtype, loss: Loss | None = None) -> str:
    """Draw the errors of one dtype and loss: mean_abs, then rel_l2 against what rounding explains, of both modes.

    Equal reports give equal bytes. The SVG is to be inlined: no prolog, no URL but its namespace, colours
    from the page's `currentColor`, `--own`, `--end-to-end`, `--bad` and `--explained`. The report must have rows
    of `dtype`.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    rows = [
        row
        for row in report.rows
        if (row.dtype, row.loss) == (dtype, loss) and row.probe.rpartition(".")[2] not in MOMENTS
    ]
    probes = list(dict.fromkeys(row.probe for row in rows))
    place = {probe: x for x, probe in enumerate(probes)}
    points = {mode: [_Point(place[row.probe], row) for row in rows if row.mode == mode] for mode in MODES}
    settings = {
        "svg.fonttype": "none",
        # The ids of marks must differ between the charts of one page.
        "svg.hashsalt": f"modernbert-align-{dtype}-{loss}",
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
        _label_layers(panels[-1], probes, _AXIS[report.phase])
        first = report.first_failing
        if first is not None and first.dtype == dtype and first.probe in place:
            _point_at(panels, place[first.probe], first)
        _draw_legend(figure, rows)
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    return _inlined(file.getvalue(), _summary(dtype, rows), _hover(probes, rows))


def _draw_mean_abs(axes: Any, points: dict[Mode, list[_Point]]) -> None:
    everything = [p for mode in MODES for p in points[mode]]
    limits = {p.x: p.row.contract_limit for p in everything if p.row.contract_limit is not None}
    scale = _Scale.around([p.row.mean_abs for p in everything], limits.values())
    _set_up(axes, scale, "mean_abs: mean absolute error, both ways of running")
    _draw_limit(axes, limits, scale, "contract limit")
    for mode in reversed(MODES):
        _draw_marks(axes, scale, mode, points[mode], "mean_abs")


def _draw_rel_l2(axes: Any, mode: Mode, points: list[_Point]) -> None:
    limits = {p.x: p.row.direct_limit for p in points if p.row.direct_limit is not None}
    nulls = {p.x: p.row.null_rel_l2 for p in points if p.row.null_rel_l2}
    scale = _Scale.around([p.row.rel_l2 for p in points], [*limits.values(), *nulls.values()])
    title = {
        "isolated": "rel_l2: relative error, own (each module alone, fed with the reference's inputs)",
        "accumulated": "rel_l2: relative error, end to end (the whole model runs by itself)",
    }[mode]
    _set_up(axes, scale, title)
    xs = sorted(p.x for p in points)
    band = [scale.y(nulls[x]) if x in nulls else scale.bottom for x in xs]
    axes.fill_between(
        [edge for x in xs for edge in (x - 0.5, x + 0.5)],
        scale.bottom,
        [height for height in band for _ in range(2)],
        color=INK,
        alpha=0.18,
        linewidth=0,
    )
    _draw_limit(axes, limits, scale, "rounding limit")
    _draw_marks(axes, scale, mode, points, "rel_l2")


def _set_up(axes: Any, scale: _Scale, title: str) -> None:
    axes.set_ylim(scale.bottom, scale.top)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    step = math.ceil((scale.high - scale.low) / 7)
    decades = list(range(scale.high, scale.low - 1, -step))
    ticks = [(scale.low - scale.lane, "0 (exact)"), *((float(d), f"1e{d}") for d in decades)]
    if scale.unmeasured:
        ticks.append((scale.high + scale.lane, "no number"))
        axes.axhspan(scale.high + scale.lane / 2, scale.top, color=BAD, alpha=0.08, linewidth=0)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axes.axhline(scale.low - scale.lane / 2, color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_limit(axes: Any, limits: dict[int, float], scale: _Scale, name: str) -> None:
    """One horizontal stroke over each column the limit applies to."""
    if not limits:
        return
    xs = sorted(limits)
    edges = [edge for x in xs for edge in (x - 0.5, x + 0.5, math.nan)]
    heights = [height for x in xs for height in (scale.y(limits[x]), scale.y(limits[x]), math.nan)]
    axes.plot(edges, heights, color=INK, linewidth=1.6, solid_capstyle="butt")
    least, most = _rounded(min(limits.values())), _rounded(max(limits.values()))
    axes.set_title(f"{name} {least}" if least == most else f"{name} {least} to {most}", loc="right", fontsize=10)


def _draw_marks(
    axes: Any, scale: _Scale, mode: Mode, points: list[_Point], measure: Literal["mean_abs", "rel_l2"]
) -> None:
    colour = MODE_COLOUR[mode]
    marks = [(p, scale.y(getattr(p.row, measure))) for p in points]
    if mode == "accumulated":
        # Sub-layers do not feed each other in a line; what runs through the model is the sum after every
        # layer. A row without a number breaks the line.
        stream = [
            (p.x, y if is_number(getattr(p.row, measure)) else math.nan)
            for p, y in marks
            if layer_of(p.row.probe) is None or p.row.probe.count(".") == 1
        ]
        if stream:
            axes.plot(*zip(*stream, strict=True), color=colour, linewidth=1, alpha=0.6)
    wrong = [(p.x, y) for p, y in marks if p.row.status not in ("pass", "explained")]
    over = [(p.x, y) for p, y in marks if p.row.status == "explained"]
    for some, style in ((wrong, FAILS), (over, IS_EXPLAINED)):
        if some:
            axes.plot(*zip(*some, strict=True), linestyle="none", zorder=7, markeredgecolor=colour, **style)
    for filled in (True, False):
        some = [(p.x, y) for p, y in marks if (p.row.contract or measure != "mean_abs") == filled]
        if some:
            axes.plot(
                *zip(*some, strict=True),
                color=colour,
                marker=MODE_MARKER[mode],
                markersize=MODE_SIZE[mode],
                linestyle="none",
                markerfacecolor=colour if filled else "none",
            )


def _blocks(probes: Sequence[str]) -> list[tuple[int | None, list[int]]]:
    """Runs of columns that belong to one layer; any other probe is a block of its own."""
    keyed = [(x, layer_of(probe)) for x, probe in enumerate(probes)]
    runs = groupby(keyed, key=lambda item: (item[1], item[0] if item[1] is None else None))
    return [(key[0], [x for x, _ in run]) for key, run in runs]


def _draw_layers(axes: Any, probes: Sequence[str]) -> None:
    """Shade every other layer, so that a point can be followed down to its number."""
    axes.set_xlim(-0.5, len(probes) - 0.5)
    for layer, xs in _blocks(probes):
        if layer is not None and layer % 2 == 0:
            axes.axvspan(xs[0] - 0.5, xs[-1] + 0.5, color=INK, alpha=0.05, linewidth=0)


def _label_layers(axes: Any, probes: Sequence[str], words: str) -> None:
    blocks = _blocks(probes)
    every = math.ceil(sum(layer is not None for layer, _ in blocks) / MOST_LAYER_LABELS) or 1
    shown = [(layer, xs) for layer, xs in blocks if layer is None or layer % every == 0]
    labels = [
        shortened(probes[xs[0]].removeprefix("model."), LONGEST_LABEL) if layer is None else str(layer)
        for layer, xs in shown
    ]
    axes.set_xticks([(xs[0] + xs[-1]) / 2 for _, xs in shown], labels)
    for label, (layer, _) in zip(axes.get_xticklabels(), shown, strict=True):
        if layer is None:
            label.set(rotation=90, fontsize=8)
    axes.set_xlabel(words)
    axes.xaxis.set_label_coords(0.5, -0.2)


def _point_at(panels: Sequence[Any], x: int, first: Failing) -> None:
    colour, words = (EXPLAINED, "first over the contract") if first.status == "explained" else (BAD, "first failing")
    for axes in panels:
        axes.axvline(x, color=colour, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
    right_half = x > panels[0].get_xlim()[1] / 2
    panels[0].annotate(
        f"{words}: {shortened(first.probe, 60)}",
        (x, 1),
        (-5 if right_half else 5, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if right_half else "left",
        va="top",
        color=colour,
        fontweight="bold",
    )


def _draw_legend(figure: Any, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for mode in MODES:
        line: dict[str, Any] = {"linestyle": "-" if mode == "accumulated" else "none", "linewidth": 1}
        handles.append(Line2D([], [], color=MODE_COLOUR[mode], marker=MODE_MARKER[mode], label=MODE_NAME[mode], **line))
    if any(not row.contract for row in rows):
        hollow: dict[str, Any] = {"marker": "s", "markerfacecolor": "none", "linestyle": "none", "color": INK}
        handles.append(Line2D([], [], label="hollow: contract does not apply", **hollow))
    handles.append(Line2D([], [], color=INK, linewidth=1.6, label="limit"))
    handles.append(Patch(color=INK, alpha=0.18, linewidth=0, label="how far the reference differs from itself"))
    if any(row.status not in ("pass", "explained") for row in rows):
        handles.append(Line2D([], [], linestyle="none", label="fails", **FAILS))
    if any(row.status == "explained" for row in rows):
        handles.append(Line2D([], [], linestyle="none", label="over the contract, explained", **IS_EXPLAINED))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles), frameon=False)


def _rounded(value: float) -> str:
    """0.00781 -> 8e-3."""
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def _summary(dtype: Dtype, rows: Sequence[Row]) -> str:
    """The chart in words, for those who do not see it."""
    parts = []
    for mode in MODES:
        measured = [row for row in rows if row.mode == mode and row.mean_abs is not None]
        if measured:
            worst = max(measured, key=lambda row: row.mean_abs or 0.0)
            parts.append(f"largest mean_abs, {MODE_NAME[mode]}: {number(worst.mean_abs)} at {worst.probe}")
    failing = sum(row.status not in ("pass", "explained") for row in rows)
    parts.append(f"{failing} of {len(rows)} rows fail")
    return f"Error of every probe in {dtype}: " + "; ".join(parts)


def _hover(probes: Sequence[str], rows: Sequence[Row]) -> str:
    """Invisible columns over the chart whose titles name the probe and its numbers."""
    words: dict[str, list[str]] = {probe: [probe] for probe in probes}
    for row in rows:
        words[row.probe].append(f"{MODE_NAME[row.mode]}: mean_abs {number(row.mean_abs)}, {row.status}")
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
    # The groups' ids repeat in every chart of a page, and nothing refers to them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r">\s+<", "><", body).replace("<g/>", "")
    body = body.replace("xlink:href", "href").replace("*{stroke-linejoin", "svg{stroke-linejoin")
    for colour, css in CSS.items():
        body = body.replace(colour, css)
    size = f"{WIDTH_IN * POINTS_PER_INCH:.0f} {HEIGHT_IN * POINTS_PER_INCH:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {size}" '
        f'aria-label="{html.escape(summary)}">{body}{overlay}</svg>'
    )
