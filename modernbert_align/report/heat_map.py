"""How close every row is to its nearest limit, as a map: layers across, kinds of probe down.

Written as SVG directly: a cell is a rectangle, and what takes the space are the words to point at.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modernbert_align.core.rows import MODES, Dtype, Loss, Row
from modernbert_align.core.training import MOMENTS
from modernbert_align.core.verdict import Failing
from modernbert_align.report.schema import Report
from modernbert_align.report.severity import FIRST, describe, not_compared, severity
from modernbert_align.report.svg import (
    BAD,
    EXPLAINED,
    HEAT,
    INK,
    LABEL_STEP,
    MODE_NAME,
    PAPER,
    WIDTH,
    box,
    chart_name,
    hover,
    hovers,
    layer_of,
    path,
    shortened,
    svg,
    text,
)

# Upper ends and opacities of the shades, in shares of the nearest limit. An error as large as the reference's own is
# two thirds of its limit, so the shades are close there.
SHADES = ((0.0, 0.05), (0.25, 0.16), (0.5, 0.28), (0.6, 0.4), (0.7, 0.54), (0.85, 0.76), (1.0, 1.0))
SHADE_NAMES = ("exact", "up to 0.25", "0.5", "0.6", "0.7", "0.85", "1")
EDGE: dict[str, str | float] = {"stroke": HEAT, "stroke_opacity": 0.45, "stroke_width": 0.5}  # zero is pale
BEYOND = ((10.0, 0.5), (1000.0, 0.75), (math.inf, 1.0))
BEYOND_NAMES = ("fails: up to 10 times", "1000 times", "more")
CELL, WIDEST_CELL, GAP, LEGEND = 17.0, 52.0, 1.0, 26.0
LONGEST_KIND, LONGEST_COLUMN = 24, 26
PER_LETTER = 6.0  # of labels

_Column = int | str  # a layer, or the name of a probe outside the layers


@dataclass(frozen=True)
class _Grid:
    """Rows that share columns: of the backward phase activations and weights are one each, of the step the moments."""

    title: str
    columns: tuple[_Column, ...]
    kinds: tuple[str, ...]
    rows: tuple[Row, ...]
    left: float

    @property
    def cell_width(self) -> float:
        return min(WIDEST_CELL, (WIDTH - self.left - 8) / len(self.columns))

    @property
    def height(self) -> float:
        return CELL * max(len(self.kinds), 3)

    @property
    def label_height(self) -> float:
        longest = max((min(len(c), LONGEST_COLUMN) for c in self.columns if isinstance(c, str)), default=0)
        return max(14.0, longest * PER_LETTER + 6)

    def place(self, row: Row) -> tuple[float, float, float, float]:
        """x, y, width, height of a cell, y from the top of the grid."""
        layer, kind = layer_of(row.probe), _kind(row)
        column = self.columns.index(_column(row))
        x = self.left + column * self.cell_width
        if layer is None:
            return x, 0.0, self.cell_width, self.height
        height = self.height / len(self.kinds)
        return x, self.kinds.index(kind) * height, self.cell_width, height


def heat_map_svg(report: Report, dtype: Dtype, loss: Loss | None = None) -> str:
    """Draw how close every row of one dtype and loss is to its nearest limit, for both modes.

    A cell is a probe: its layer across, its kind down; a probe outside the layers is a column of its own. Shades get
    deeper up to the limit; what is beyond it has another colour and a cross, what was not compared is hatched and has
    a question mark. Empty without rows of `dtype` and `loss`. Equal reports give equal bytes.
    """
    rows = [row for row in report.rows if (row.dtype, row.loss) == (dtype, loss)]
    if not rows:
        return ""
    name = chart_name("heat", dtype, loss)
    first = _first(report.first_failing, rows)
    body, overlay, y = [], [], LEGEND
    for grid in _grids(rows):
        for mode in MODES:
            here = [row for row in grid.rows if row.mode == mode]
            if not here:
                continue
            title = f"{MODE_NAME[mode]}: {grid.title}" if grid.title else MODE_NAME[mode]
            body.append(text(0, y + 12, title, font_weight="bold", font_size=11))
            y += 19
            body.append(_cells(grid, here, y, name))
            for row in here:
                x, top, width, height = grid.place(row)
                overlay.append(hover(x, y + top, width, height, f"{row.probe}\n{describe(row)}"))
                if row is first:
                    outline = box(x, y + top, width, height)
                    body.append(path(outline, fill="none", stroke=INK, stroke_width=2.5, data_mark="first"))
            body.append(_kind_labels(grid, y))
            y += grid.height + 6
        body.append(_column_labels(grid, y))
        y += grid.label_height + 8
    hatch = (
        f'<defs><pattern id="{name}-hatch" width="5" height="5" patternUnits="userSpaceOnUse">'
        f'<path d="M-1 6L6 -1M-1 1L1 -1M4 6L6 4" stroke="{INK}" stroke-opacity=".55" fill="none"/></pattern></defs>'
    )
    drawing = f'<g font-size="10" fill="{INK}">{_legend(rows, name, first)}{"".join(body)}</g>'
    return svg(
        name,
        f"How close every probe is to its nearest limit, {dtype}" + (f", {loss} loss" if loss else ""),
        _summary(rows),
        y,
        hatch + drawing + hovers("".join(overlay)),
    )


def _first(failing: Failing | None, rows: Sequence[Row]) -> Row | None:
    """The row that the report names first; None if it is another chart's, or a weight."""
    if failing is None:
        return None
    key = (failing.probe, failing.mode, failing.dtype, failing.loss)
    return next((row for row in rows if (row.probe, row.mode, row.dtype, row.loss) == key), None)


def _grids(rows: Sequence[Row]) -> Iterator[_Grid]:
    blocks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        blocks[_block(row)].append(row)
    longest = max((len(_kind(row)) for row in rows if layer_of(row.probe) is not None), default=0)
    left = 12 + PER_LETTER * min(longest, LONGEST_KIND)
    for title, some in blocks.items():
        kinds: dict[int, dict[str, None]] = defaultdict(dict)
        for row in some:
            layer = layer_of(row.probe)
            if layer is not None:
                kinds[layer][_kind(row)] = None
        # A layer may lack a kind; the one that has most says the order.
        ordered = sorted(kinds.values(), key=len, reverse=True)
        yield _Grid(
            title=title,
            columns=tuple(dict.fromkeys(_column(row) for row in some)),
            kinds=tuple(dict.fromkeys(kind for layer_kinds in ordered for kind in layer_kinds)),
            rows=tuple(some),
            left=left,
        )


def _block(row: Row) -> str:
    last = row.probe.rpartition(".")[2]
    if row.phase == "forward":
        return ""
    if row.phase == "step":
        return last if last in MOMENTS else "weights"
    return "gradients of weights" if last in ("weight", "bias") else "gradients of outputs"


def _kind(row: Row) -> str:
    """What stands below the layer in a probe's name: `attn`, `mlp.Wi`; `layer` for the layer itself."""
    below = _bare(row).split(".", 2)[2:]
    return below[0] if below else "layer"


def _column(row: Row) -> _Column:
    layer = layer_of(row.probe)
    return _bare(row) if layer is None else layer


def _bare(row: Row) -> str:
    """A probe's name without what its grid has in common."""
    name = row.probe.removeprefix("model.")
    return name if row.phase == "forward" else name.removesuffix(f".{_block(row)}").removesuffix(".weight")


def _shade(row: Row) -> float:
    """Opacity of a row within its limits."""
    value = severity(row)
    return next((opacity for most, opacity in SHADES if value <= most), SHADES[-1][1])


def _distance(row: Row) -> float:
    """Opacity of a row beyond its limits."""
    value = math.inf if "hygiene" in row.failed else severity(row)
    return next(opacity for most, opacity in BEYOND if value <= most)


def _cells(grid: _Grid, rows: Sequence[Row], y: float, name: str) -> str:
    shades: dict[float, str] = defaultdict(str)
    beyond: dict[float, str] = defaultdict(str)
    crosses, explained, triangles, unseen = "", "", "", ""
    marks = []
    for row in rows:
        x, top, width, height = grid.place(row)
        cell = box(x + GAP / 2, y + top + GAP / 2, width - GAP, height - GAP)
        middle_x, middle_y = x + width / 2, y + top + height / 2
        if not_compared(row):
            unseen += cell
            marks.append(text(middle_x, middle_y + 4, "?"))
        elif row.status == "pass":
            shades[_shade(row)] += cell
        elif row.status == "explained":
            explained += cell
            triangles += _triangle(middle_x, middle_y)
        else:
            beyond[_distance(row)] += cell
            crosses += _cross(middle_x, middle_y)
    return "".join(
        (
            *(path(data, fill=HEAT, fill_opacity=o, **EDGE) for o, data in sorted(shades.items())),
            path(explained, fill=EXPLAINED, data_mark="explained"),
            path(triangles, fill=PAPER),
            *(path(data, fill=BAD, fill_opacity=o, data_mark="beyond") for o, data in sorted(beyond.items())),
            path(crosses, fill="none", stroke=PAPER, stroke_width=1.8, stroke_linecap="round"),
            path(unseen, fill=f"url(#{name}-hatch)", stroke=INK, stroke_width=0.6, data_mark="unseen"),
            f'<g text-anchor="middle" font-weight="bold" font-size="11" stroke="{PAPER}" stroke-width="3" '
            f'paint-order="stroke">{"".join(marks)}</g>'
            if marks
            else "",
        )
    )


def _cross(x: float, y: float) -> str:
    return f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7"


def _triangle(x: float, y: float) -> str:
    return f"M{x:.1f} {y - 4:.1f}l4.5 8h-9z"


def _kind_labels(grid: _Grid, y: float) -> str:
    if not grid.kinds:
        return ""
    step = grid.height / len(grid.kinds)
    labels = (
        text(grid.left - 6, y + (n + 0.5) * step + 3.5, shortened(kind, LONGEST_KIND))
        for n, kind in enumerate(grid.kinds)
    )
    return f'<g text-anchor="end">{"".join(labels)}</g>'


def _column_labels(grid: _Grid, y: float) -> str:
    every = math.ceil(LABEL_STEP / grid.cell_width)
    numbers, names = [], []
    for n, column in enumerate(grid.columns):
        x = grid.left + (n + 0.5) * grid.cell_width
        if isinstance(column, str):
            turned = f"rotate(-90 {x + 3.5:.1f} {y:.1f})"
            names.append(text(x + 3.5, y, shortened(column, LONGEST_COLUMN), transform=turned))
        elif column % every == 0:
            numbers.append(text(x, y + 9, str(column)))
    return f'<g text-anchor="middle">{"".join(numbers)}</g><g text-anchor="end">{"".join(names)}</g>'


def _legend(rows: Sequence[Row], name: str, first: Row | None) -> str:
    y, size, x = 4.0, 12.0, 0.0
    parts: list[str] = []

    def item(words: str, *drawn: str) -> None:
        nonlocal x
        parts.extend((*drawn, text(x + size + 4, y + 10, words)))
        x += size + 14 + len(words) * 5.4

    parts.append(text(x, y + 10, "share of the nearest limit:"))
    x += 140
    for (_, opacity), words in zip(SHADES, SHADE_NAMES, strict=True):
        item(words, path(box(x, y, size, size), fill=HEAT, fill_opacity=opacity, **EDGE))
    if any(row.status not in ("pass", "explained", "missing") for row in rows):
        for (_, opacity), words in zip(BEYOND, BEYOND_NAMES, strict=True):
            cross = path(_cross(x + 6, y + 6), fill="none", stroke=PAPER, stroke_width=1.8)
            item(words, path(box(x, y, size, size), fill=BAD, fill_opacity=opacity), cross)
    if any(row.status == "explained" for row in rows):
        mark = path(_triangle(x + 6, y + 6), fill=PAPER)
        item("explained", path(box(x, y, size, size), fill=EXPLAINED), mark)
    if any(not_compared(row) for row in rows):
        question = text(x + 3, y + 10, "?", font_weight="bold")
        hatched = path(box(x, y, size, size), fill=f"url(#{name}-hatch)", stroke=INK, stroke_width=0.6)
        item("not compared", hatched, question)
    if first is not None:
        words = FIRST.get(first.status, "first failing")
        item(words, path(box(x, y, size, size), fill="none", stroke=INK, stroke_width=2.5))
    return "".join(parts)


def _summary(rows: Sequence[Row]) -> str:
    parts = []
    for mode in MODES:
        some = [row for row in rows if row.mode == mode]
        seen = [row for row in some if not not_compared(row)]
        unseen, failing = len(some) - len(seen), sum(row.status not in ("pass", "explained") for row in seen)
        if some:
            parts.append(f"{MODE_NAME[mode]}: {failing} of {len(some)} fail, {unseen} not compared")
        if seen:
            worst = max(seen, key=severity)
            parts[-1] += f", closest to its limit or furthest beyond it {worst.probe}"
    return "; ".join(parts)
