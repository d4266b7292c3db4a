"""What the HTML pages share: the templates, one style sheet, and the policy that lets nothing else into a page."""

import base64
import functools
import hashlib
import math
from importlib.resources import files
from typing import Any

from modernbert_align.report.glossary import GLOSSARY, Term, term_of
from modernbert_align.report.svg import SVG_CSS

# Characters that make the text after them run backwards, so that it can look like another.
_DIRECTIONS = {
    code: f"[U+{code:04X}]" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_TEMPLATES = files("modernbert_align.report") / "templates"


def render_page(template: str, *, script: str | None = None, **values: Any) -> str:
    """Render a template that extends `page.html.j2`, with the style sheet and the script inlined.

    Args:
        template: Its file name.
        script: File name of the page's script; None for a page without one.
        values: What the template speaks of; every string among them is escaped.
    """
    from markupsafe import Markup

    style = SVG_CSS + _text("page.css")
    code = None if script is None else _text(script)
    return str(
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),
            script=None if code is None else Markup(code),
            content_policy=content_policy(style, code),
            **values,
        )
    )


def content_policy(style: str, script: str | None) -> str:
    """A Content-Security-Policy under which exactly this style sheet and this script work, and no address is fetched.

    Whatever slips through the escaping of a hostile report is then still not run.
    """
    script_source = "'none'" if script is None else f"'sha256-{_hash(script)}'"
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_hash(style)}'",
            f"script-src {script_source}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def number(value: float, digits: int = 2) -> str:
    """`1.50e-05`; zero is `0`."""
    return "0" if value == 0 else f"{value:.{digits}e}" if math.isfinite(value) else "not finite"


def share(value: float) -> str:
    """A share in percent that says 0 % or 100 % only when it is exactly that."""
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    return f"{min(max(value * 100, 0.1), 99.9):.1f} %"


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _visible(value: Any) -> Any:
    """What the report says, with a name for what could not be seen; markup stays."""
    return value.translate(_DIRECTIONS) if type(value) is str and not value.isascii() else value


@functools.cache
def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("modernbert_align.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters.update(number=number, share=share, plural=plural)
    environment.globals.update(term_of=term_of, glossary=glossary)
    return environment


def glossary(*groups: str) -> tuple[Term, ...]:
    """The terms of some groups of the glossary, in its order."""
    return tuple(term for term in GLOSSARY if term.group in groups)
