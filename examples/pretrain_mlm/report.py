"""One page of a training: losses and schedule over its steps. Self-contained, without scripts."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from examples.pretrain_mlm.metrics import Evaluated, Step, read_metrics
from examples.pretrain_mlm.recipe import Recipe
from modernbert_align.core.files import write_atomically
from modernbert_align.report.page import content_policy
from modernbert_align.report.svg import END_TO_END, INK, OWN, SVG_CSS, path, svg, text

PAGE = "report.html"
LEFT, RIGHT, TOP, PLOT, BELOW = 74.0, 1000.0, 34.0, 190.0, 26.0
SMOOTHED = 0.9  # what remains of the mean before, per step
_CSS = (
    ":root { --own: #1d5fd1; --end-to-end: #b8560b; --pass: #17803d; color-scheme: light dark; }\n"
    "@media (prefers-color-scheme: dark) { :root { --own: #7fb0ff; --end-to-end: #ffa55c; } }\n"
    "body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }\n"
    "table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .2rem .8rem; text-align: right; }\n"
    "th:first-child, td:first-child { text-align: left; } tr + tr { border-top: 1px solid #8886; }\n" + SVG_CSS
)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """One curve: a line, or marks."""

    name: str
    points: Points
    colour: str
    opacity: float = 1.0
    marks: bool = False


def write_report(recipe: Recipe, metrics: Path, out: Path) -> Path:
    """Write the page and give its path.

    Raises:
        UsageError: The metrics cannot be read, or the page not be written.
    """
    lines = read_metrics(metrics)
    steps = [line for line in lines if isinstance(line, Step)]
    evaluations = [line for line in lines if isinstance(line, Evaluated)]
    page = out / PAGE
    write_atomically(page, _page(recipe, steps, evaluations))
    return page


def _page(recipe: Recipe, steps: Sequence[Step], evaluations: Sequence[Evaluated]) -> str:
    means = accumulate((step.loss for step in steps), lambda mean, loss: SMOOTHED * mean + (1 - SMOOTHED) * loss)
    losses = [
        _Curve(name="loss of the batch", points=[(s.step, s.loss) for s in steps], colour=OWN, opacity=0.3),
        _Curve(name="its moving average", points=list(zip([s.step for s in steps], means, strict=True)), colour=OWN),
        _Curve(
            name="held-out files",
            points=[(e.step, e.held_out_loss) for e in evaluations],
            colour=END_TO_END,
            marks=True,
        ),
    ]
    rates = [_Curve(name="learning rate", points=[(s.step, s.learning_rate) for s in steps], colour=OWN)]
    sizes = [_Curve(name="tokens per batch", points=[(s.step, s.batch_tokens) for s in steps], colour=OWN)]
    charts = "".join(
        _chart(name, title, curves, recipe, zero)
        for name, title, curves, zero in (
            ("loss", "Loss", losses, False),
            ("rate", "Learning rate", rates, True),
            ("batch", "Batch", sizes, True),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(content_policy(_CSS, None))}">'
        '<meta name="viewport" content="width=device-width"><title>Pretraining</title>'
        f"<style>{_CSS}</style></head><body><h1>Pretraining</h1>{_table(recipe, steps, evaluations)}{charts}"
        "</body></html>\n"
    )


def _table(recipe: Recipe, steps: Sequence[Step], evaluations: Sequence[Evaluated]) -> str:
    head = ("stage", "steps", "length", "RoPE base", "tokens", "packed", "tokens/s", "loss", "held-out loss")
    rows = []
    for stage in recipe.stages:
        own = [step for step in steps if step.stage == stage.name]
        held_out = [e.held_out_loss for e in evaluations if e.stage == stage.name]
        places = sum(step.batch_tokens / step.packing_efficiency for step in own)
        tokens = sum(step.batch_tokens for step in own)
        seconds = sum(step.batch_tokens / step.tokens_per_s for step in own)
        rows.append(
            (
                stage.name,
                f"{len(own)} of {stage.steps}",
                str(stage.length),
                f"{stage.theta:g}",
                f"{tokens:,}",
                f"{tokens / places:.1%}" if own else "",
                f"{tokens / seconds:,.0f}" if own else "",
                f"{own[0].loss:.3f} to {own[-1].loss:.3f}" if own else "",
                f"{held_out[0]:.3f} to {held_out[-1]:.3f}" if held_out else "",
            )
        )
    return "<table>" + _cells("th", head) + "".join(_cells("td", row) for row in rows) + "</table>"


def _cells(tag: str, row: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"


def _chart(name: str, title: str, curves: Sequence[_Curve], recipe: Recipe, zero: bool) -> str:
    """One panel over all steps of the recipe, with the stages' limits.

    Args:
        zero: Whether the y axis starts at zero.
    """
    values = [y for curve in curves for _, y in curve.points] or [0.0]
    ticks = _ticks(0.0 if zero else min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        return LEFT + (RIGHT - LEFT) * x / recipe.steps, TOP + PLOT * (high - y) / (high - low)

    parts = []
    for tick in ticks:
        _, y = at((0, tick))
        parts.append(path(f"M{LEFT} {y:.1f}H{RIGHT}", stroke=INK, opacity=0.15))
        parts.append(text(LEFT - 6, y + 3.5, f"{tick:g}", text_anchor="end"))
    ends = list(accumulate((stage.steps for stage in recipe.stages), initial=0))
    for stage, start, end in zip(recipe.stages, ends, ends[1:], strict=False):
        (left, _), (right, _) = at((start, low)), at((end, low))
        parts.append(path(f"M{right:.1f} {TOP}V{TOP + PLOT}", stroke=INK, stroke_dasharray="3 3", opacity=0.5))
        parts.append(text((left + right) / 2, TOP - 6, stage.name, text_anchor="middle"))
        parts.append(text(right, TOP + PLOT + 14, f"step {end}", text_anchor="end"))
    legend = LEFT
    for curve in curves:
        drawn = [at(point) for point in curve.points]
        parts.append(_marks(drawn, curve) if curve.marks else _line(drawn, curve))
        if len(curves) > 1:
            parts.append(text(legend, 12, curve.name, fill=curve.colour, opacity=max(curve.opacity, 0.6)))
            legend += 6 * len(curve.name) + 20
    body = f'<g font-size="11" fill="{INK}">{"".join(parts)}</g>'
    described = "; ".join(f"{c.name}: from {c.points[0][1]:.4g} to {c.points[-1][1]:.4g}" for c in curves if c.points)
    return f"<h2>{title}</h2>" + svg(name, title, described or "nothing yet", TOP + PLOT + BELOW, body)


def _line(drawn: Points, curve: _Curve) -> str:
    data = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(drawn))
    return path(data, fill="none", stroke=curve.colour, stroke_width=1.5, opacity=curve.opacity)


def _marks(drawn: Points, curve: _Curve) -> str:
    data = "".join(f"M{x - 4:.1f} {y:.1f}l4 -4 4 4-4 4z" for x, y in drawn)
    return path(data, fill=curve.colour, opacity=curve.opacity)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose a range."""
    width = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(width / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if width / (unit * factor) <= 6)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(step * number, 12) for number in range(first, last + 1)]
