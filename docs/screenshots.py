"""Takes the pictures of the documentation: a report of base that passes, and one of a fault that fails.

Run it after `make align`: `.venv/bin/python docs/screenshots.py`. It needs Chromium, and writes docs/report*.png.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.cli import main
from modernbert_align.engines.faults import catalogue

DOCS = Path(__file__).resolve().parent
WIDTH, HEIGHT = 1200, 1000
FAULT = "thetas swapped"


def failing(folder: Path) -> Path:
    """A report of tiny-sensitive with a fault in the Paddle model."""
    load = paddle_backend.load
    with contextlib.ExitStack() as stack:

        def broken(*arguments: object) -> object:
            model = load(*arguments)  # type: ignore[arg-type]
            stack.enter_context(catalogue()[FAULT].inject(model))
            return model

        paddle_backend.load = broken  # type: ignore[assignment]
        command = ["diff", "--model", "tiny-sensitive", "--report-dir", str(folder), "--quiet"]
        sys.argv[:] = ["modernbert-align", *command[:3]]  # what the report shows; not the folder of this run
        main(command)
    return folder / "diff-tiny-sensitive-masked_lm-fp32.html"


def picture(page: Path, out: Path, scheme: str) -> None:
    """The first screen of a page, as a picture of few colours."""
    from PIL import Image

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)  # type: ignore[arg-type]
        shown = context.new_page()
        shown.goto(f"file://{page.resolve()}")
        shown.screenshot(path=out)
        browser.close()
    Image.open(out).quantize(64).save(out, optimize=True)


if __name__ == "__main__":
    passing = Path("reports/diff-base-masked_lm-bf16.html")
    if not passing.is_file():
        sys.exit(f"error: there is no {passing}\nhint: run `make align` first")
    picture(passing, DOCS / "report.png", "light")
    with tempfile.TemporaryDirectory() as temporary:
        picture(failing(Path(temporary)), DOCS / "report-fail.png", "dark")
