"""PaddleNLP's Auto classes after `modernbert_align.register()`: ModernBERT for ModernBERT, nothing else changed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import paddlenlp.transformers as paddlenlp_transformers
import pytest

import modernbert_align
from modernbert_align.backends.paddle import quiet
from modernbert_align.errors import ConfigError
from modernbert_align.models import modernbert
from modernbert_align.models.modernbert.configuration import ModernBertConfig

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "local_attention": 8,
    "pad_token_id": 5,
}
HEADS = [name.removeprefix("ModernBert") for name in modernbert.__all__ if name.startswith("ModernBertFor")]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    modernbert_align.register()


def auto_class(head):
    return getattr(paddlenlp_transformers, "AutoModel" if head == "Model" else f"AutoModel{head}")


@pytest.fixture
def saved(tmp_path):
    """Saves a small model with a head; gives the model and its folder."""

    def save(head, safe=True):
        model = getattr(modernbert, f"ModernBert{head}")(ModernBertConfig(**SMALL, num_labels=2))
        with quiet():
            model.save_pretrained(str(tmp_path / head), safe_serialization=safe)
        return model, tmp_path / head

    return save


@pytest.fixture
def bert(tmp_path):
    """The folder of a small BERT."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    folder = tmp_path / "modernbert" / "bert"
    with quiet():
        config = paddlenlp_transformers.BertConfig(vocab_size=20, **sizes)
        paddlenlp_transformers.BertForMaskedLM(config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("head", ["Model", *HEADS])
@pytest.mark.parametrize("safe", [True, False])
def test_every_head_comes_back_from_its_folder(saved, head, safe):
    model, folder = saved(head, safe)
    with quiet():
        loaded = auto_class(head).from_pretrained(str(folder))
    assert type(loaded) is type(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.numpy(), theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize("head", ["Model", *HEADS])
def test_configuration_comes_back_and_builds_the_same_class(saved, head):
    model, folder = saved(head)
    with quiet():
        config = paddlenlp_transformers.AutoConfig.from_pretrained(str(folder))
        built = auto_class(head).from_config(config)
    assert type(config) is ModernBertConfig
    assert config.resolved() == model.config.resolved()
    assert type(built) is type(model)


def test_encoder_comes_out_of_a_converted_checkpoint(converted):
    with quiet():
        masked_lm = paddlenlp_transformers.AutoModelForMaskedLM.from_pretrained(str(converted("tiny")))
        encoder = paddlenlp_transformers.AutoModel.from_pretrained(str(converted("tiny")))
    assert type(masked_lm) is modernbert.ModernBertForMaskedLM
    assert type(encoder) is modernbert.ModernBertModel
    for name, tensor in encoder.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), masked_lm.model.state_dict()[name].numpy(), err_msg=name)


def test_model_type_decides_and_not_the_name_of_the_architecture(saved):
    _, folder = saved("ForMaskedLM")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with quiet():
        loaded = paddlenlp_transformers.AutoModelForMaskedLM.from_pretrained(str(folder))
    assert type(loaded) is modernbert.ModernBertForMaskedLM


def test_head_that_does_not_exist_is_refused(saved):
    _, folder = saved("ForMaskedLM")
    with pytest.raises(ConfigError, match="ModernBertForCausalLM") as caught, quiet():
        paddlenlp_transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    assert "ModernBertForMaskedLM" in caught.value.hint


def test_decoder_is_refused_and_not_taken_for_a_bert(tmp_path):
    config = {"model_type": "modernbert-decoder", "architectures": ["ModernBertDecoderForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="decoder"), quiet():
        paddlenlp_transformers.AutoModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("where", ["modernbert/bert", "modernbert-base"])
def test_bert_still_loads_as_bert(bert, tmp_path, where):
    folder = tmp_path / where
    if folder != bert:
        shutil.copytree(bert, folder)
    with quiet():
        loaded = paddlenlp_transformers.AutoModelForMaskedLM.from_pretrained(str(folder))
        config = paddlenlp_transformers.AutoConfig.from_pretrained(str(folder))
    assert type(loaded) is paddlenlp_transformers.BertForMaskedLM
    assert type(config) is paddlenlp_transformers.BertConfig


def test_registering_again_changes_nothing(saved):
    choose = paddlenlp_transformers.AutoModel._get_model_class_from_config.__func__
    modernbert_align.register()
    assert paddlenlp_transformers.AutoModel._get_model_class_from_config.__func__ is choose


def test_importing_the_package_imports_no_framework():
    code = "import sys, modernbert_align; print(sorted({'paddle', 'paddlenlp', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_has_no_other_lazy_names():
    with pytest.raises(AttributeError, match="registr"):
        _ = modernbert_align.registr
