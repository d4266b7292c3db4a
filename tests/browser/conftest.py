"""Pages of every kind in a real browser: Chromium, driven by Playwright, from a file and with no network."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from modernbert_align.core.cause import Cause, Tried
from modernbert_align.core.outcomes import Alarm, Outcome
from modernbert_align.core.tolerance import Override
from modernbert_align.report.html_report import render_html
from modernbert_align.report.selftest_report import SelftestReport, render_selftest

# The makers of small reports belong to the tests of the report.
_spec = importlib.util.spec_from_file_location("small_reports", Path(__file__).parents[1] / "report" / "conftest.py")
_small_reports = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_small_reports)
make_report, broken_attention = _small_reports.make_report, _small_reports.broken_attention

HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(2) onmouseover="alert(3)"></style>\u202e{{ 7 * 7 }}'
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"none of {', '.join(CHROMIUM)} is installed, so the report was not seen in a browser")
        pytest.skip("there is no Chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Pages that were written before: kind -> file."""
    return {"folder": tmp_path_factory.mktemp("pages")}


@pytest.fixture
def page_file(written, make_report, broken_attention):
    """Gives the file of a page of some kind."""

    def report_of(kind):
        if kind == "pass":
            return make_report()
        if kind == "explained":
            return make_report(changes={("final_norm", "bf16", "accumulated"): {"mean_abs": 1.5e-3}}, fixture=None)
        if kind == "not_compared":
            return make_report(changes={("head", "bf16", "accumulated"): None})
        if kind == "backward":
            good = make_report()
            losses = ("projection", "head")
            rows = [row.model_copy(update={"phase": "backward", "loss": loss}) for loss in losses for row in good.rows]
            return good.model_copy(update={"phase": "backward", "rows": tuple(rows)})
        if kind == "hostile":
            record = make_report().rows[0].model_copy(update={"probe": HOSTILE, "observation": "extra"})
            report = make_report(extra=[record], command=HOSTILE, hints=(HOSTILE,))
            return report.model_copy(update={"model": report.model.model_copy(update={"name": HOSTILE})})
        tried = (Tried(name="masks swapped", value="", ratio=3e-6), Tried(name="window width", value="17", ratio=0.75))
        return make_report(
            changes=broken_attention,
            hints=("compare the sliding window of layers.1",),
            overrides=(
                Override(probe="layers.*.mlp", dtype="bf16", criterion="direct", limit=3.0, reason="another kernel"),
            ),
            cause=Cause(
                probe="layers.1.attn", dtype="fp32", level="explained", names=("masks swapped",),
                statement="the masks of full and sliding attention are swapped", residual=0.25, ratio=3e-6,
                rounding=1e-7, tried=tried,
            ),
        )  # fmt: skip

    def selftest():
        report = make_report()
        killed = Outcome(
            name=HOSTILE, head="masked_lm", dtype="fp32", phase="forward", must_die=True, equivalent=False, killed=True,
            killed_by=("noise",), seen={"isolated": ("noise",)}, verdict="FAIL", first_probe="layers.0.attn",
            expected_probe="layers.0.attn", effect=2000.0, cause_level="explained", cause_names=("masks swapped",),
            expected_cause="masks swapped",
        )  # fmt: skip
        survived = killed.model_copy(update={"name": "survivor", "killed": False, "effect": None, "cause_level": None})
        return SelftestReport(
            tool_version="0.1.0", created=report.created, exit_code=1, model="tiny-sensitive", dtype="fp32",
            heads=("masked_lm",), phases=("forward",), seeds=1, table=report.model.table,
            table_sha256=report.model.table_sha256, faults=(killed, survived),
            alarms=(Alarm(head="base", dtype="fp32", phase="forward", seed=3, verdict="FAIL", detail=HOSTILE),),
            false_alarms=1, runs=2, survivors=("survivor",), environment=report.environment, command=HOSTILE,
        )  # fmt: skip

    def text_of(kind):
        if kind == "selftest":
            return render_selftest(selftest())
        return render_html(report_of(kind), selftest() if kind == "fail" else None)

    def file(kind):
        if kind not in written:
            written[kind] = written["folder"] / f"{kind}.html"
            written[kind].write_text(text_of(kind), encoding="utf-8")
        return written[kind]

    return file


@pytest.fixture
def open_page(browser, page_file):
    """Opens a page of some kind; everything that should never happen is collected in its `seen`."""
    contexts = []

    def opened(kind, *, fragment="", width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        address = page_file(kind).as_uri()
        seen = []

        def request(route):
            if route.request.url.partition("#")[0] == address:
                route.continue_()
            else:
                seen.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", request)
        context.add_init_script(
            "document.addEventListener('securitypolicyviolation',"
            " event => console.error('violates ' + event.violatedDirective))"
        )
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(f"{address}{fragment}")
        page.seen = seen
        return page

    yield opened
    for context in contexts:
        context.close()
