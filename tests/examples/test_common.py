"""What the examples share: the corpus of the standard library, and the tokenizer trained on it."""

import sysconfig
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from examples.common.corpus import docstrings, source_files
from examples.common.tokenizer import train_tokenizer
from modernbert_align.core.fixtures import TokenizerSpec
from modernbert_align.errors import UsageError

SPEC = TokenizerSpec(vocab_size=512, pad_token_id=3, cls_token_id=1, sep_token_id=2)


def test_standard_library_is_found_in_the_order_of_its_paths():
    files = source_files(include=("json/*.py", "textwrap.py", "test/test_json/*.py"))
    names = [file.name for file in files]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not any(name.startswith("test/") for name in names)
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
    assert files[names.index("textwrap.py")].text == text


def test_files_that_python_cannot_read_are_left_out(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "null.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1\n")
    assert [file.name for file in source_files(tmp_path)] == ["good.py"]


def test_a_folder_without_python_files_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no Python file matches"):
        source_files(tmp_path)


def test_docstrings_carry_the_name_of_what_they_are_of(tmp_path):
    method = '    def b(self):\n        """Method.\n\n        More.\n        """\n'
    (tmp_path / "m.py").write_text(f'"""Module."""\nclass A:\n    """Class."""\n{method}')
    found = [(document.name, document.text) for document in docstrings(source_files(tmp_path))]
    assert found == [("m.py:", "Module."), ("m.py:A", "Class."), ("m.py:A.b", "Method.\n\nMore.")]


def test_trained_tokenizer_fits_the_model_and_reads_the_same_in_transformers(tmp_path):
    texts = [file.text for file in source_files(include=("json/*.py",))]
    ours = train_tokenizer(SPEC, texts, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(ours) == len(theirs) == 512
    assert (ours.cls_token_id, ours.sep_token_id, ours.pad_token_id, ours.mask_token_id) == (1, 2, 3, 4)
    assert ours.all_special_ids == theirs.all_special_ids
    for text in (texts[0], "a [MASK] b", "naïve é"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == theirs.decode(
            theirs(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
        )
    assert ours("a [MASK] b")["input_ids"] == ours("a[MASK] b")["input_ids"]
    assert len(ours(texts[0])["input_ids"]) < 0.6 * len(texts[0].encode())
