"""The report of a comparison: JSON with everything that was recorded, and one self-contained HTML page."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from examples.downstream.compare import Comparison, Curves, rounding_limit, seed_distance
from examples.downstream.recipe import Data, Side
from modernbert_align.core.files import write_together
from modernbert_align.core.processor import cpu_model
from modernbert_align.report.page import content_policy
from modernbert_align.report.svg import (
    DRAWN_BAD,
    DRAWN_END_TO_END,
    DRAWN_INK,
    DRAWN_OWN,
    INK,
    SVG_CSS,
    WIDTH,
    from_figure,
    path,
    svg,
    text,
)

LEFT, RIGHT, TOP, HEIGHT = 62.0, 992.0, 40.0, 240.0
BELOW = 34.0  # for the numbers of steps
FLOOR = 1e-9  # what an exact zero is drawn as on the logarithmic axis
LOSS_LEGEND = ((DRAWN_END_TO_END, "PyTorch"), (DRAWN_OWN, "Paddle, dashed"))
DIFFERENCE_LEGEND = (
    (DRAWN_INK, "two closest seeds of PyTorch"),
    (DRAWN_BAD, "limit"),
    (DRAWN_OWN, "Paddle from PyTorch"),
    (DRAWN_END_TO_END, "PyTorch from PyTorch with other rounding"),
)
Legend = tuple[tuple[str, str], ...]
Line = tuple[Curves, dict[str, Any]]


def write_report(name: str, comparison: Comparison, data: Data, folder: Path) -> tuple[Path, Path]:
    """Write `NAME.json` and `NAME.html`; returns their paths."""
    document = comparison.model_dump(mode="json") | {"example": name, "data": data.source, "processor": cpu_model()}
    texts = {
        f"{name}.json": json.dumps(document, indent=1, allow_nan=False) + "\n",
        f"{name}.html": render(name, comparison, data),
    }
    write_together(folder, texts)
    return folder / f"{name}.json", folder / f"{name}.html"


def render(name: str, comparison: Comparison, data: Data) -> str:
    """The page, in the style of the tool's own reports; equal comparisons give equal text."""
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
    from markupsafe import Markup

    own, shared = FileSystemLoader(Path(__file__).parent), PackageLoader("modernbert_align.report", "templates")
    environment = Environment(
        loader=ChoiceLoader([own, shared]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = SVG_CSS + (files("modernbert_align.report") / "templates" / "page.css").read_text(encoding="utf-8")
    charts = [Markup(chart) for chart in (loss_chart(comparison), difference_chart(comparison))]
    return environment.get_template("comparison.html.j2").render(
        name=name.replace("_", " "),
        comparison=comparison,
        data=data,
        charts=charts if comparison.results else [],
        cpu=cpu_model(),
        versions={key: value for run in comparison.runs for key, value in run.versions.items()},
        style=Markup(style),
        script=None,
        content_policy=content_policy(style, None),
    )


def loss_chart(comparison: Comparison) -> str:
    """The loss at every step, of every seed, of both frameworks."""
    if not comparison.results:
        return ""
    curves = _curves(comparison)
    top = float(max(values.max() for values in curves.values()) * 1.05)
    lines: list[Line] = [(curves["reference"], {"color": DRAWN_END_TO_END, "linewidth": 1.8, "alpha": 0.75})]
    lines.append((curves["candidate"], {"color": DRAWN_OWN, "linewidth": 1, "linestyle": (0, (3, 3))}))
    step = 10.0 ** np.floor(np.log10(top))
    ticks = {f"{tick:g}": float(tick) for tick in np.arange(0, top, step if top / step >= 3 else step / 2)}
    description = f"{len(comparison.results)} seeds; the dashed curves of Paddle lie on those of PyTorch or beside them"
    return _chart("loss", "Loss of every step", description, lines, (0.0, top), ticks, LOSS_LEGEND)


def difference_chart(comparison: Comparison) -> str:
    """How far the losses are apart at most over the seeds, on a logarithmic axis."""
    if not comparison.results:
        return ""
    curves = _curves(comparison)
    reference = curves["reference"]
    closest = min(
        (abs(a - b) for index, a in enumerate(reference) for b in reference[index + 1 :]),
        key=lambda apart: float(np.mean(apart**2)),
    )

    def farthest(side: Side) -> Curves:
        return np.asarray(np.abs(curves[side] - reference).max(axis=0))  # [steps]

    drawn: list[Line] = [
        (closest[None], {"color": DRAWN_INK, "linewidth": 0.9, "alpha": 0.6}),
        (rounding_limit(curves)[None], {"color": DRAWN_BAD, "linewidth": 1.6}),
        (farthest("null")[None], {"color": DRAWN_END_TO_END, "linewidth": 1}),
        (farthest("candidate")[None], {"color": DRAWN_OWN, "linewidth": 1}),
    ]
    lines = [(np.log10(np.maximum(values, FLOOR)), style) for values, style in drawn]
    low, high = float(np.log10(FLOOR)), float(np.ceil(max(values.max() for values, _ in lines)))
    ticks = {"0" if tick == low else f"1e{tick}": float(tick) for tick in range(int(low), int(high) + 1)}
    description = (
        f"largest: {max(result.loss_difference for result in comparison.results):.1e} between frameworks; "
        f"root mean square between the two closest seeds: {seed_distance(reference):.1e}"
    )
    title = "Difference of the losses at every step"
    return _chart("difference", title, description, lines, (low, high), ticks, DIFFERENCE_LEGEND)


def _curves(comparison: Comparison) -> dict[Side, Curves]:
    """Side -> losses, [seeds steps]."""
    found: dict[Side, list[Any]] = {}
    for run in comparison.runs:
        found.setdefault(run.side, []).append(run.losses)
    return {side: np.array(losses, dtype=np.float64) for side, losses in found.items()}


def _chart(
    name: str,
    title: str,
    description: str,
    lines: list[Line],
    limits: tuple[float, float],
    ticks: Mapping[str, float],
    legend: Legend,
) -> str:
    """One panel over the steps: lines drawn by matplotlib, words beside them as SVG."""
    import matplotlib.style
    from matplotlib.figure import Figure

    low, high = limits
    height, bottom, steps = TOP + HEIGHT + BELOW, TOP + HEIGHT, lines[0][0].shape[1]
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        place = (LEFT / WIDTH, 1 - bottom / height, (RIGHT - LEFT) / WIDTH, HEIGHT / height)
        axes = figure.add_axes(place, xlim=(0, max(steps, 2)), ylim=limits)
        axes.set_axis_off()
        for curves, style in lines:
            for values in curves:
                axes.plot(np.arange(1, steps + 1), values, **style)
        for place_of_entry, (colour, _) in enumerate(legend):
            x = (_legend_x(place_of_entry, legend) - LEFT) / (RIGHT - LEFT)
            axes.plot([x, x + 0.02], [1 + 14 / HEIGHT] * 2, color=colour, transform=axes.transAxes, clip_on=False)
        drawn = from_figure(figure, name)
    words = [text(LEFT, 13, title, font_weight="bold", font_size=11)]
    words += [text(_legend_x(index, legend) + 24, TOP - 10, said) for index, (_, said) in enumerate(legend)]
    grid = ""
    for said, value in ticks.items():
        y = bottom - (value - low) / (high - low) * HEIGHT
        grid += f"M{LEFT:g} {y:.1f}H{RIGHT:g}"
        words.append(text(LEFT - 5, y + 3.5, said, text_anchor="end"))
    for step in sorted({1, steps, *range(0, steps, max(1, round(steps / 8)))} - {0}):
        words.append(text(LEFT + step / max(steps, 2) * (RIGHT - LEFT), bottom + 14, str(step), text_anchor="middle"))
    words.append(text((LEFT + RIGHT) / 2, bottom + 28, "step", text_anchor="middle"))
    lattice = path(grid, stroke=INK, stroke_opacity=0.15, stroke_width=0.6)
    axis = path(f"M{LEFT:g} {TOP:g}V{bottom:g}H{RIGHT:g}", fill="none", stroke=INK, stroke_width=0.8)
    body = f'<g font-size="10" fill="{INK}">{lattice}{axis}{drawn}{"".join(words)}</g>'
    return svg(name, title, description, height, body)


def _legend_x(place: int, legend: Legend) -> float:
    """Where an entry of the legend begins; a letter is about 5 wide."""
    return LEFT + sum(40 + 5.4 * len(words) for _, words in legend[:place])
