"""SVG that a page can inline under a strict Content-Security-Policy: no style attribute, no <style>, no URL.

Colours are presentation attributes holding CSS variables (`fill="var(--own, #1d5fd1)"`), so the page decides how they
look in light, dark and print. A page that inlines charts includes `SVG_CSS` once in its own style sheet, after it has
defined `--own`, `--end-to-end`, `--bad`, `--explained`, `--pass` and `--paper`.

What can be pointed at is an invisible `<rect><title>…</title></rect>` above the drawing; a page's script may show
the title its own way.
"""

import html
import io
import math
import re
from typing import Any, TypeGuard
from xml.etree import ElementTree

from modernbert_align.core.rows import Dtype, Loss, Mode
from modernbert_align.core.text import one_line

WIDTH = 1008  # of every chart's view box; a page shows it at its own width
LABEL_STEP = 16.0  # least distance of two layers' numbers

INK = "currentColor"
PAPER = "var(--paper, #fff)"
OWN = "var(--own, #1d5fd1)"
END_TO_END = "var(--end-to-end, #b8560b)"
BAD = "var(--bad, #c4122a)"
EXPLAINED = "var(--explained, #8a6100)"
HEAT = "var(--heat, #196995)"

# What stands for the colours in matplotlib, which knows no variables.
DRAWN_INK, DRAWN_OWN, DRAWN_END_TO_END, DRAWN_BAD, DRAWN_EXPLAINED = (
    "#010203",
    "#010204",
    "#010205",
    "#010206",
    "#010207",
)
_DRAWN = {
    DRAWN_INK: INK,
    DRAWN_OWN: OWN,
    DRAWN_END_TO_END: END_TO_END,
    DRAWN_BAD: BAD,
    DRAWN_EXPLAINED: EXPLAINED,
}

SVG_CSS = """\
svg.chart { --heat: color-mix(in srgb, var(--own) 50%, var(--pass)); display: block; width: 100%; height: auto; }
svg.chart text { font-family: inherit; }
svg.chart .tips rect:hover { fill: currentColor; fill-opacity: .12; }
"""

MODE_NAME: dict[Mode, str] = {"isolated": "own error", "accumulated": "end to end"}


def svg(name: str, title: str, description: str, height: float, body: str) -> str:
    """One chart.

    Args:
        name: What its ids start with; differs between the charts of one page.
        title, description: In words, for those who do not see it.
        height: Of the view box.
        body: Elements, escaped.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {WIDTH} {short_float(height)}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escaped(title)}</title>'
        f'<desc id="{name}-desc">{escaped(description)}</desc>{body}</svg>'
    )


def chart_name(kind: str, *parts: Dtype | Loss | None) -> str:
    """What the ids of a chart start with."""
    return "-".join((kind, *(part for part in parts if part)))


def text(x: float, y: float, words: str, **attributes: str | float) -> str:
    """A text whose baseline is at `y`; an underscore in an attribute's name is a hyphen."""
    return f'<text x="{short_float(x)}" y="{short_float(y)}"{_attributes(attributes)}>{escaped(words)}</text>'


def box(x: float, y: float, width: float, height: float) -> str:
    """Path data of a rectangle."""
    x, y, width, height = (round(v, 1) for v in (x, y, width, height))
    return f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z"


def path(data: str, **attributes: str | float) -> str:
    """A path, or nothing if there is nothing to draw."""
    return f'<path d="{data}"{_attributes(attributes)}/>' if data else ""


def hover(x: float, y: float, width: float, height: float, words: str) -> str:
    """An invisible rectangle that can be pointed at."""
    place = f'x="{short_float(x)}" y="{short_float(y)}" width="{short_float(width)}" height="{short_float(height)}"'
    return f"<rect {place}><title>{escaped(words)}</title></rect>"


def hovers(rects: str) -> str:
    """The group that `hover` rectangles belong in."""
    return f'<g class="tips" fill="none" pointer-events="all">{rects}</g>'


def from_figure(figure: Any, name: str) -> str:
    """What matplotlib drew, as elements for the body of `svg`.

    Styles become presentation attributes, marks that look the same one group, and coordinates have one decimal.
    Clipping is dropped: what is drawn must lie within its axes. Words are `text`'s task: matplotlib must draw none.

    Args:
        figure: A matplotlib figure of 72 dots per inch whose size is that of the view box.
        name: What ids start with, as in `svg`.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    ids: dict[str, str] = {}
    # The first group is the whole figure.
    body = "".join(_converted(part, ids, name) for part in ElementTree.fromstring(file.getvalue()))
    return f'<g stroke-linejoin="round">{body}</g>'


def _converted(element: ElementTree.Element, ids: dict[str, str], name: str) -> str:
    tag = element.tag.rpartition("}")[2]
    if tag == "path":
        identity = element.get("id")
        own = {"id": ids.setdefault(identity, f"{name}-{len(ids)}")} if identity else {}
        return path(_shortened_path(element.get("d", "")), **own, **_presentation(element))
    if tag == "use":
        style = _attributes(_presentation(element))
        return f"<g{style}>{_use(element, ids)}</g>"
    children = list(element)
    looks = {(child.tag, child.get("style")) for child in children}
    if children and children[0].tag.endswith("}use") and len(looks) == 1:
        return f"<g{_attributes(_presentation(children[0]))}>{''.join(_use(child, ids) for child in children)}</g>"
    inside = "".join(_converted(child, ids, name) for child in children)
    return f"<defs>{inside}</defs>" if tag == "defs" and inside else inside


def _use(element: ElementTree.Element, ids: dict[str, str]) -> str:
    target = ids[element.get("{http://www.w3.org/1999/xlink}href", "")[1:]]
    x, y = (short_float(float(element.get(side, "0"))) for side in "xy")
    return f'<use href="#{target}" x="{x}" y="{y}"/>'


def _presentation(element: ElementTree.Element) -> dict[str, str | float]:
    """The properties of a style attribute, with numbers of two decimals and the page's colours."""
    pairs = (part.split(":", 1) for part in element.get("style", "").split(";") if part.strip())
    return {key.strip(): _DRAWN.get(value.strip(), _rounded_numbers(value.strip(), 2)) for key, value in pairs}


def _shortened_path(data: str) -> str:
    joined = " ".join(_rounded_numbers(data, 1).split())
    return re.sub(r" ?([A-Za-z]) ?", r"\1", joined)


def _rounded_numbers(words: str, digits: int) -> str:
    return re.sub(r"-?\d+\.\d+", lambda found: f"{round(float(found[0]), digits) + 0.0:g}", words)


def escaped(words: str) -> str:
    """Text of an element; well-formed XML whatever a report has as a name."""
    return html.escape("\n".join(map(one_line, words.split("\n"))), quote=False)


def short_float(value: float) -> str:
    """A coordinate with one decimal at most."""
    return f"{round(value, 1) + 0.0:g}" if abs(value) < 1e5 else f"{value:.0f}"


def layer_of(probe: str) -> int | None:
    """The number of the layer a probe is in or is; None outside the layers."""
    found = re.match(r"(?:model\.)?layers\.(\d{1,6})(\.|$)", probe, re.ASCII)
    return int(found[1]) if found else None


def shortened(words: str, longest: int) -> str:
    """Text cut to a length, with an ellipsis."""
    return words if len(words) <= longest else words[: longest - 1] + "…"


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether a value was measured and is finite."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """A measured value for a tooltip."""
    return "no number" if not is_number(value) else "0 (exact)" if value == 0 else f"{value:.2e}"


def _attributes(attributes: dict[str, str | float]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
