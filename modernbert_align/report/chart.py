"""The error of every probe, in execution order, as one SVG per dtype and loss.

matplotlib draws what is measured; whatever has words, probe names above all, is written as SVG beside it. The axes are
linear in log10(error) rather than matplotlib's log axes: exact zeros and values that could not be measured then get a
labelled lane of their own instead of disappearing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from modernbert_align.core.rows import MODES, Dtype, Loss, Mode, Phase, Row
from modernbert_align.core.training import MOMENTS
from modernbert_align.core.verdict import Failing
from modernbert_align.report.schema import Report
from modernbert_align.report.severity import FIRST, describe, not_compared
from modernbert_align.report.svg import (
    BAD,
    DRAWN_BAD,
    DRAWN_END_TO_END,
    DRAWN_EXPLAINED,
    DRAWN_INK,
    DRAWN_OWN,
    END_TO_END,
    EXPLAINED,
    INK,
    LABEL_STEP,
    MODE_NAME,
    OWN,
    PAPER,
    WIDTH,
    box,
    chart_name,
    from_figure,
    hover,
    hovers,
    is_number,
    layer_of,
    number,
    path,
    shortened,
    svg,
    text,
)

Measure = Literal["mean_abs", "rel_l2"]

LEFT, RIGHT = 62.0, 1004.0
LEGEND, TITLE, GAP = 22.0, 20.0, 12.0
LONGEST_LABEL, NAME_STEP, NAME_LETTER = 14, 7.5, 4.9  # of names under the x axis: letters, distance, width of a letter

MODE_COLOUR: dict[Mode, str] = {"isolated": DRAWN_OWN, "accumulated": DRAWN_END_TO_END}
MODE_MARKER: dict[Mode, str] = {"isolated": "o", "accumulated": "s"}
# A circle still shows on a square of the same value.
MODE_SIZE: dict[Mode, float] = {"isolated": 3.8, "accumulated": 5.4}
FAILS: dict[str, Any] = {"marker": "X", "markersize": 10, "color": DRAWN_BAD}
UNSEEN: dict[str, Any] = {"marker": "D", "markersize": 8, "color": DRAWN_BAD, "markerfacecolor": "none"}
IS_EXPLAINED: dict[str, Any] = {"marker": "^", "markersize": 9, "color": DRAWN_EXPLAINED}

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


@dataclass(frozen=True)
class _Panel:
    """Errors of one measure, with the limit they are held against.

    Attributes:
        limits, nulls, floors: By place on the x axis.
        limit_name: What `limits` are.
        top, height: Within the view box.
    """

    title: str
    measure: Measure
    points: dict[Mode, list[_Point]]
    limit_name: str
    limits: dict[int, float]
    nulls: dict[int, float]
    floors: dict[int, float]
    top: float
    height: float

    @cached_property
    def scale(self) -> _Scale:
        errors = [getattr(p.row, self.measure) for points in self.points.values() for p in points]
        return _Scale.around(errors, [*self.limits.values(), *self.nulls.values(), *self.floors.values()])

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def pixel(self, y: float) -> float:
        """Where a value of the scale is within the view box."""
        scale = self.scale
        return self.bottom - (y - scale.bottom) / (scale.top - scale.bottom) * self.height


def error_chart_svg(report: Report, dtype: Dtype, loss: Loss | None = None) -> str:
    """Draw the errors of one dtype and loss: mean_abs, then rel_l2 against what rounding explains, of both modes.

    Only the forward phase has a contract on mean_abs, other phases have the two panels of rel_l2. Equal reports give
    equal bytes. Empty without rows of `dtype` and `loss`.
    """
    rows = [
        row
        for row in report.rows
        if (row.dtype, row.loss) == (dtype, loss) and row.probe.rpartition(".")[2] not in MOMENTS
    ]
    if not rows:
        return ""
    name = chart_name("error", dtype, loss)
    probes = list(dict.fromkeys(row.probe for row in rows))
    place = {probe: x for x, probe in enumerate(probes)}
    points = {mode: [_Point(place[row.probe], row) for row in rows if row.mode == mode] for mode in MODES}
    panels = _panels(points, report.phase)
    first = report.first_failing
    at = place.get(first.probe) if first is not None and (first.dtype, first.loss) == (dtype, loss) else None
    bottom = panels[-1].bottom
    labels, label_height = _layer_labels(probes, bottom, _AXIS[report.phase])
    height = bottom + label_height
    below = "".join((_stripes(panels, probes), *_legend(rows, panels), *map(_frame, panels), labels))
    above = _pointer(panels, at, len(probes), first) if first is not None and at is not None else ""
    return svg(
        name,
        f"Error of every probe, {dtype}" + (f", {loss} loss" if loss else ""),
        _summary(rows),
        height,
        f'<g font-size="10" fill="{INK}">{below}{_drawn(panels, len(probes), height, name)}{above}</g>'
        + _hover(probes, rows, panels[0].top, bottom),
    )


def _panels(points: dict[Mode, list[_Point]], phase: Phase) -> list[_Panel]:
    panels: list[_Panel] = []
    top = LEGEND

    def add(title: str, measure: Measure, shown: dict[Mode, list[_Point]], height: float) -> None:
        nonlocal top
        some = [p for points in shown.values() for p in points]
        contract = measure == "mean_abs"
        limits = [(p.x, p.row.contract_limit if contract else p.row.direct_limit) for p in some]
        panels.append(
            _Panel(
                title=title,
                measure=measure,
                points=shown,
                limit_name="contract limit" if contract else "rounding limit",
                limits={x: limit for x, limit in limits if limit is not None},
                nulls={} if contract else {p.x: p.row.null_rel_l2 for p in some if p.row.null_rel_l2},
                floors={} if contract else {p.x: floor for p in some if (floor := _floor(p.row))},
                top=top + TITLE,
                height=height,
            )
        )
        top += TITLE + height + GAP

    if phase == "forward":
        add("mean_abs: mean absolute error, own and end to end", "mean_abs", points, 160)
    own, whole = ({mode: points[mode]} for mode in MODES)
    add("rel_l2: own error, each module alone", "rel_l2", own, 140)
    add("rel_l2: end to end, the whole model", "rel_l2", whole, 140)
    return panels


def _floor(row: Row) -> float | None:
    """The reference's distance from float64, relative as rel_l2 is."""
    size = max(row.reference_rms or 0.0, row.scale)
    return row.reference_error / size if is_number(row.reference_error) and size > 0 else None


def _column(x: float, columns: int) -> float:
    """The middle of a column within the view box."""
    return LEFT + (x + 0.5) * (RIGHT - LEFT) / columns


def _drawn(panels: Sequence[_Panel], columns: int, height: float, name: str) -> str:
    """Bands, limits and marks."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        for panel in panels:
            place = (LEFT / WIDTH, 1 - panel.bottom / height, (RIGHT - LEFT) / WIDTH, panel.height / height)
            axes = figure.add_axes(place, xlim=(-0.5, columns - 0.5), ylim=(panel.scale.bottom, panel.scale.top))
            axes.set_axis_off()
            _draw_band(axes, panel)
            _draw_strokes(axes, panel.scale, panel.floors, linewidth=1, alpha=0.75, linestyle=(0, (1.5, 1.2)))
            _draw_strokes(axes, panel.scale, panel.limits, linewidth=1.6)
            for mode in reversed(panel.points):
                _draw_marks(axes, panel.scale, mode, panel.points[mode], panel.measure)
        return from_figure(figure, name)


def _draw_band(axes: Any, panel: _Panel) -> None:
    """How far the reference differs from itself: one polygon, of no height where it does not."""
    if not panel.nulls:
        return
    scale = panel.scale
    xs = sorted({p.x for points in panel.points.values() for p in points})
    edges = [edge for x in xs for edge in (x - 0.5, x + 0.5)]
    heights = [scale.y(panel.nulls[x]) if x in panel.nulls else scale.bottom for x in xs for _ in range(2)]
    axes.fill(
        [edges[0], *edges, edges[-1]], [scale.bottom, *heights, scale.bottom], color=DRAWN_INK, alpha=0.16, linewidth=0
    )


def _draw_strokes(axes: Any, scale: _Scale, values: Mapping[int, float], **style: Any) -> None:
    """One horizontal stroke over each column that has a value; strokes that meet are one."""
    xs: list[float] = []
    ys: list[float] = []
    for x in sorted(values):
        y = scale.y(values[x])
        if xs and xs[-1] == x - 0.5 and ys[-1] == y:
            xs[-1] = x + 0.5
        else:
            xs += [math.nan, x - 0.5, x + 0.5]
            ys += [math.nan, y, y]
    if xs:
        axes.plot(xs, ys, color=DRAWN_INK, solid_capstyle="butt", **style)


def _fails(row: Row) -> bool:
    return row.status not in ("pass", "explained", "missing")


def _draw_marks(axes: Any, scale: _Scale, mode: Mode, points: list[_Point], measure: Measure) -> None:
    colour = MODE_COLOUR[mode]
    marks = [(p, scale.y(getattr(p.row, measure))) for p in points]
    if mode == "accumulated" and points and points[0].row.phase != "step":
        # Sub-layers do not feed each other in a line; what runs through the model is the sum after every
        # layer. Weights have dots in their names. A row without a number breaks the line.
        stream = [
            (p.x, y if is_number(getattr(p.row, measure)) else math.nan)
            for p, y in marks
            if p.row.probe.count(".") == (0 if layer_of(p.row.probe) is None else 1)
        ]
        if stream:
            axes.plot(*zip(*stream, strict=True), color=colour, linewidth=1, alpha=0.6)
    edge = {"markeredgecolor": colour, "markeredgewidth": 1}
    for of_interest, style in (
        (_fails, FAILS | edge),
        (lambda row: row.status == "explained", IS_EXPLAINED | edge),
        (not_compared, UNSEEN),
    ):
        some = [(p.x, y) for p, y in marks if of_interest(p.row)]
        if some:
            axes.plot(*zip(*some, strict=True), linestyle="none", zorder=7, **style)
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


def _frame(panel: _Panel) -> str:
    """Title, limit, decades and lanes of a panel."""
    scale = panel.scale
    step = math.ceil((scale.high - scale.low) / 7)
    ticks = [(scale.low - scale.lane, "0 (exact)")]
    ticks += [(float(decade), f"1e{decade}") for decade in range(scale.high, scale.low - 1, -step)]
    parts = []
    if scale.unmeasured:
        ticks.append((scale.high + scale.lane, "no number"))
        lane = panel.pixel(scale.high + scale.lane / 2) - panel.top
        parts.append(path(box(LEFT, panel.top, RIGHT - LEFT, lane), fill=BAD, fill_opacity=0.08))
    lines = "".join(f"M{LEFT:g} {panel.pixel(y):.1f}H{RIGHT:g}" for y, _ in ticks)
    labels = "".join(text(LEFT - 5, panel.pixel(y) + 3.5, words) for y, words in ticks)
    exact = f"M{LEFT:g} {panel.pixel(scale.low - scale.lane / 2):.1f}H{RIGHT:g}"
    axes = f"M{LEFT:g} {panel.top:.1f}V{panel.bottom:.1f}H{RIGHT:g}"
    parts += [
        path(lines, stroke=INK, stroke_opacity=0.15, stroke_width=0.6),
        path(exact, stroke=INK, stroke_opacity=0.5, stroke_width=0.8, stroke_dasharray="1 3"),
        path(axes, fill="none", stroke=INK, stroke_width=0.8),
        f'<g text-anchor="end">{labels}</g>',
        text(LEFT, panel.top - 6, panel.title, font_weight="bold", font_size=11),
    ]
    if panel.limits:
        least, most = _rounded(min(panel.limits.values())), _rounded(max(panel.limits.values()))
        words = f"{panel.limit_name} {least}" if least == most else f"{panel.limit_name} {least} to {most}"
        parts.append(text(RIGHT, panel.top - 6, words, text_anchor="end"))
    return "".join(parts)


def _blocks(probes: Sequence[str]) -> list[tuple[int | None, list[int]]]:
    """Runs of columns that belong to one layer; any other probe is a block of its own."""
    keyed = [(x, layer_of(probe)) for x, probe in enumerate(probes)]
    runs = groupby(keyed, key=lambda item: (item[1], item[0] if item[1] is None else None))
    return [(key[0], [x for x, _ in run]) for key, run in runs]


def _stripes(panels: Sequence[_Panel], probes: Sequence[str]) -> str:
    """A line between layers, so that a point can be followed down to its number."""
    ends = {end for layer, xs in _blocks(probes) if layer is not None for end in (xs[0] - 0.5, xs[-1] + 0.5)}
    data = "".join(
        f"M{_column(edge, len(probes)):.1f} {panel.top:.1f}V{panel.bottom:.1f}"
        for panel in panels
        for edge in sorted(ends)
    )
    return path(data, stroke=INK, stroke_opacity=0.18, stroke_width=0.6)


def _layer_labels(probes: Sequence[str], bottom: float, words: str) -> tuple[str, float]:
    """Numbers of layers and names of other probes where they fit, then what they are; and the height of it all."""
    numbers, names = [], []
    last_number, last_name, longest = -math.inf, -math.inf, 3
    for layer, xs in _blocks(probes):
        x = _column((xs[0] + xs[-1]) / 2, len(probes))
        if layer is not None and x - last_number >= LABEL_STEP:
            numbers.append(text(x, bottom + 14, str(layer)))
            last_number = x
        elif layer is None and x - last_name >= NAME_STEP:
            label = shortened(probes[xs[0]].removeprefix("model."), LONGEST_LABEL)
            names.append(text(x + 3, bottom + 5, label, transform=f"rotate(-90 {x + 3:.1f} {bottom + 5:.1f})"))
            last_name, longest = x, max(longest, len(label))
    height = 5 + longest * NAME_LETTER + 12
    middle = text((LEFT + RIGHT) / 2, bottom + height, words)
    return (
        f'<g text-anchor="middle">{"".join(numbers)}{middle}</g>'
        f'<g text-anchor="end" font-size="8">{"".join(names)}</g>',
        height + 8,
    )


def _pointer(panels: Sequence[_Panel], at: int, columns: int, first: Failing) -> str:
    colour = EXPLAINED if first.status == "explained" else BAD
    words = FIRST.get(first.status, "first failing")
    x = _column(at, columns)
    right_half = at > columns / 2
    lines = "".join(f"M{x:.1f} {panel.top:.1f}V{panel.bottom:.1f}" for panel in panels)
    return path(lines, stroke=colour, stroke_width=1.4, stroke_dasharray="4 3") + text(
        x + (-8 if right_half else 8),
        panels[0].top + 12,
        f"{words}: {shortened(first.probe, 60)}",
        text_anchor="end" if right_half else "start",
        fill=colour,
        stroke=PAPER,
        stroke_width=3,
        paint_order="stroke",
        font_weight="bold",
    )


def _legend(rows: Sequence[Row], panels: Sequence[_Panel]) -> list[str]:
    parts: list[str] = []
    x, y = 4.0, 10.0

    def item(words: str, *drawn: str) -> None:
        nonlocal x
        parts.extend((*drawn, text(x + 18, y + 3.5, words)))
        x += 36 + len(words) * 5

    item(MODE_NAME["isolated"], f'<circle cx="{x + 7:g}" cy="{y:g}" r="2.4" fill="{OWN}"/>')
    square = box(x + 4, y - 3, 6, 6)
    item(
        MODE_NAME["accumulated"],
        path(f"M{x - 2:g} {y:g}h18", stroke=END_TO_END, stroke_opacity=0.6),
        path(square, fill=END_TO_END),
    )
    if any(panel.measure == "mean_abs" for panel in panels) and any(not row.contract for row in rows):
        item("hollow: not under contract", path(box(x + 4, y - 3, 6, 6), fill="none", stroke=INK))
    item("limit", path(f"M{x - 1:g} {y:g}h16", stroke=INK, stroke_width=1.6))
    item("the reference against itself", path(box(x - 1, y - 5, 16, 10), fill_opacity=0.16))
    if any(panel.floors for panel in panels):
        dots = path(f"M{x - 1:g} {y:g}h16", stroke=INK, stroke_opacity=0.75, stroke_dasharray="1.5 1.2")
        item("the reference against float64", dots)
    if any(_fails(row) for row in rows):
        item("fails", path(f"M{x + 2:g} {y - 4:g}l8 8m0 -8l-8 8", fill="none", stroke=BAD, stroke_width=3))
    if any(not_compared(row) for row in rows):
        item("not compared", path(f"M{x + 6:g} {y - 5:g}l5 5l-5 5l-5 -5z", fill="none", stroke=BAD))
    if any(row.status == "explained" for row in rows):
        item("over the contract, explained", path(f"M{x + 6:g} {y - 5:g}l5 9h-10z", fill=EXPLAINED))
    return parts


def _rounded(value: float) -> str:
    """0.00781 -> 8e-3."""
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def _summary(rows: Sequence[Row]) -> str:
    """The chart in words, for those who do not see it."""
    parts = []
    for mode in MODES:
        measured = [row for row in rows if row.mode == mode and row.mean_abs is not None]
        if measured:
            worst = max(measured, key=lambda row: row.mean_abs or 0.0)
            parts.append(f"largest mean_abs, {MODE_NAME[mode]}: {number(worst.mean_abs)} at {worst.probe}")
    failing, unseen = (sum(map(which, rows)) for which in (_fails, not_compared))
    parts.append(f"{failing} of {len(rows)} rows fail, {unseen} not compared")
    return "; ".join(parts)


def _hover(probes: Sequence[str], rows: Sequence[Row], top: float, bottom: float) -> str:
    """Invisible columns over the chart whose titles name the probe and its numbers."""
    words: dict[str, list[str]] = {probe: [probe] for probe in probes}
    for row in rows:
        words[row.probe].append(describe(row))
    step = (RIGHT - LEFT) / len(probes)
    return hovers(
        "".join(
            hover(LEFT + x * step, top, step, bottom - top, "\n".join(words[probe])) for x, probe in enumerate(probes)
        )
    )
