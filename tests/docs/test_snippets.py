"""Every Python example of every page runs as it stands, where a small checkpoint lies at the path named."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}:{number}")
    for page in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
    for number, code in enumerate(FENCE.findall(page.read_text()))
]


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    """Where readers of a page are: with `tiny` converted, and as `base` a small model with the vocabulary of `base`."""
    from modernbert_align.backends.paddle import quiet
    from modernbert_align.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

    checkpoints = tmp_path_factory.mktemp("reader") / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "tiny-paddle").symlink_to(converted("tiny"))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with quiet():
        model = ModernBertForMaskedLM(ModernBertConfig(**small))
        model.save_pretrained(str(checkpoints / "base-paddle"), safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(converted("tiny") / name, checkpoints / "base-paddle")
    return checkpoints.parent


@pytest.mark.parametrize("code", SNIPPETS)
def test_example_runs(code, folder):
    # A process of its own: the imports and registrations of one example must not help the next.
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_examples_to_run():
    assert any("paddlenlp.md" in snippet.id for snippet in SNIPPETS)
