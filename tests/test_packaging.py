"""What users install: the wheel carries `configs/`, and the files people read are current."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_carries_every_config(wheel):
    shipped = {str(p.relative_to(wheel / "modernbert_align" / "_configs")) for p in (wheel).rglob("_configs/**/*")}
    expected = {str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*")}
    assert shipped == expected


def test_installed_package_finds_its_configs_and_templates(wheel, tmp_path):
    code = (
        "import modernbert_align, sys\n"
        f"assert modernbert_align.__file__.startswith({str(wheel)!r})\n"
        "from modernbert_align.core.resources import configs_dir\n"
        "assert configs_dir().name == '_configs'\n"
        "from modernbert_align.cli import main\n"
        "sys.exit(main(['table', 'show', '--model', 'tiny']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list((wheel / "modernbert_align" / "report" / "templates").iterdir())


def test_published_schema_is_the_models():
    from modernbert_align.report.json_report import json_schema

    published = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert published == json_schema(), "run: modernbert-align report --schema > docs/report.schema.json"


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
