"""How many bfloat16 steps the two sides are apart, as stacked bars, one per kind of probe.

Written as SVG directly, like the heat map.
"""

from collections import defaultdict
from collections.abc import Sequence

from modernbert_align.core.metrics import ULP_BINS
from modernbert_align.core.rows import MODES, Dtype, Loss, Mode
from modernbert_align.report.schema import Report
from modernbert_align.report.svg import (
    HEAT,
    INK,
    MODE_NAME,
    WIDTH,
    box,
    chart_name,
    hover,
    hovers,
    path,
    shortened,
    svg,
    text,
)
from modernbert_align.report.terminal import kind

# One shade per bin: equal is palest; elements too near zero to count steps of stand apart, in ink.
OPACITY = (0.12, 0.34, 0.46, 0.58, 0.68, 0.78, 0.89, 1.0)
NEAR_ZERO_OPACITY = 0.35
BIN_WORDS = ("equal", "1 step", "2", "3-4", "5-8", "9-16", "17-64", "65+", "too near zero to count steps")
LABELS, NUMBERS, GUTTER = 66.0, 172.0, 20.0
PANEL = (WIDTH - GUTTER) / 2
BAR_WIDTH = PANEL - LABELS - NUMBERS
ROW, BAR, LEGEND = 16.0, 11.0, 26.0
LEAST = 1.5  # width of a bin that is not empty, so that a single element shows

_Key = tuple[Dtype, Loss | None, Mode]


def ulp_histogram_svg(report: Report) -> str:
    """Draw, for every kind of probe and both modes, the share of elements that are equal, one step apart, and so on.

    Empty if no row has counts, as in fp32. Equal reports give equal bytes.
    """
    groups: dict[_Key, dict[str, list[int]]] = defaultdict(dict)
    for row in report.rows:
        if row.ulps is not None and any(row.ulps):
            so_far = groups[row.dtype, row.loss, row.mode].setdefault(kind(row), [0] * len(ULP_BINS))
            groups[row.dtype, row.loss, row.mode][kind(row)] = [a + b for a, b in zip(so_far, row.ulps, strict=True)]
    if not groups:
        return ""
    drawn, overlay, y, summary = [_legend()], [], LEGEND, []
    for dtype, loss in dict.fromkeys((dtype, loss) for dtype, loss, _ in groups):
        tallest = 0
        for mode in MODES:
            kinds = groups.get((dtype, loss, mode), {})
            if not kinds:
                continue
            left = MODES.index(mode) * (PANEL + GUTTER)
            title = ", ".join((MODE_NAME[mode], *([f"{loss} loss"] if loss else [])))
            drawn.append(text(left, y + 12, title, font_weight="bold", font_size=11))
            for n, (name, counts) in enumerate(kinds.items()):
                top = y + 19 + n * ROW
                drawn.append(_bar(left, top, name, counts))
                overlay.append(hover(left, top, PANEL, ROW, f"{name}, {title}\n{_words(counts)}"))
            tallest = max(tallest, len(kinds))
            total = [sum(counts) for counts in zip(*kinds.values(), strict=True)]
            summary.append(f"{title}: {_share(total[0] / sum(total))} equal, {_furthest(total)}")
        y += 19 + tallest * ROW + 10
    return svg(
        chart_name("ulps"),
        "Distance from the reference in bfloat16 steps",
        "; ".join(summary),
        y,
        f'<g font-size="10" fill="{INK}">{"".join(drawn)}</g>{hovers("".join(overlay))}',
    )


def _bar(left: float, top: float, name: str, counts: Sequence[int]) -> str:
    widths = _widths(counts)
    x, segments = left + LABELS, []
    for index, width in enumerate(widths):
        segments.append(path(box(x, top + 2, width, BAR), **_fill(index)) if width else "")
        x += width
    right = f"{_share(counts[0] / sum(counts))} equal, {_furthest(counts)}"
    return "".join(
        (
            text(left + LABELS - 6, top + 11, shortened(name, 14), text_anchor="end"),
            *segments,
            text(left + LABELS + BAR_WIDTH + 6, top + 11, right),
        )
    )


def _widths(counts: Sequence[int]) -> list[float]:
    """Of a bar's segments; what exists is never too thin to be seen, and the widest pays for it."""
    widths = [max(BAR_WIDTH * n / sum(counts), LEAST) if n else 0.0 for n in counts]
    widest = widths.index(max(widths))
    widths[widest] -= sum(widths) - BAR_WIDTH
    return widths


def _fill(index: int) -> dict[str, str | float]:
    if index == len(OPACITY):
        return {"fill": INK, "fill_opacity": NEAR_ZERO_OPACITY}
    return {"fill": HEAT, "fill_opacity": OPACITY[index]}


def _legend() -> str:
    x, parts = 0.0, []
    for index, words in enumerate(BIN_WORDS):
        parts += [path(box(x, 4, 12, 12), **_fill(index)), text(x + 16, 14, words)]
        x += 30 + len(words) * 5.4
    return "".join(parts)


def _furthest(counts: Sequence[int]) -> str:
    steps = counts[: len(OPACITY)]
    last = max((index for index, n in enumerate(steps) if n), default=None)
    return "all near zero" if last is None else f"furthest {BIN_WORDS[last]}" if last else "none further"


def _words(counts: Sequence[int]) -> str:
    return "\n".join(
        f"{words}: {n} ({_share(n / sum(counts))})" for words, n in zip(BIN_WORDS, counts, strict=True) if n
    )


def _share(value: float) -> str:
    """A share in percent that says 0 % or 100 % only when it is exactly that."""
    if value in (0, 1):
        return f"{value * 100:.0f} %"
    return f"{min(max(value * 100, 0.01), 99.99):.2f} %"
