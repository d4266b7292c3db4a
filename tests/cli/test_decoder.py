"""A variant of the model is a TOML file and no code: the decoders of the family, which Paddle has no model for."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from modernbert_align.core.manifest import read_manifest
from modernbert_align.core.resources import configs_dir

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "local_attention": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "num_labels": 3,
}
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias")
BASE, CAUSAL_LM, CLASSIFIER = (
    f"ModernBertDecoder{name}" for name in ("Model", "ForCausalLM", "ForSequenceClassification")
)
CASES = [
    (CAUSAL_LM, False, True),
    (CAUSAL_LM, True, True),
    (CAUSAL_LM, False, False),
    (CAUSAL_LM, True, False),
    (CLASSIFIER, False, True),
    (CLASSIFIER, True, False),
    (BASE, False, True),
    (BASE, True, False),
]
WEIGHTS = ("model.safetensors", "config.json")


@pytest.fixture
def saved(tmp_path):
    """Saves a small seeded decoder, no two of whose values agree by construction; gives the model and its folder."""

    def save(architecture, biases, tied):
        model_class = getattr(transformers, architecture)
        switches = dict.fromkeys(BIASES, biases) | {"tie_word_embeddings": tied}
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**SIZES, **switches)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
        folder = tmp_path / "source"
        model.save_pretrained(folder)
        return model, folder

    return save


@pytest.fixture
def there_and_back(cli, tmp_path):
    """Converts to Paddle and back with every proof; gives both folders."""

    def run(folder, *options):
        paddle, back = tmp_path / "paddle", tmp_path / "back"
        for src, dst, model, out in (("hf", "paddle", folder, paddle), ("paddle", "hf", paddle, back)):
            proofs = ("--prove", "tensors,dye,roundtrip")
            arguments = ("--src", src, "--dst", dst, "--model", model, "--out", out, *proofs, *options)
            code, _, err = cli("convert", *arguments)
            assert code == 0, err
            assert {proof.level for proof in read_manifest(out).proofs} == {"tensors", "dye", "roundtrip"}
        return paddle, back

    return run


def outputs_of(model):
    ids = torch.arange(3, 23).reshape(2, 10)  # [batch seq], longer than the window
    with torch.no_grad():
        outputs = model(input_ids=ids)
    return outputs[0]


@pytest.mark.parametrize(("architecture", "biases", "tied"), CASES)
def test_a_decoder_survives_the_way_to_paddle_and_back_bit_for_bit(saved, there_and_back, architecture, biases, tied):
    model, source = saved(architecture, biases, tied)
    paddle, back = there_and_back(source)
    for name in WEIGHTS:
        assert (back / name).read_bytes() == (source / name).read_bytes()
    again, info = type(model).from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # not with the model in memory: transformers 4.55 does not write a decoder's `local_attention` into its config.json
    assert torch.equal(outputs_of(again.eval()), outputs_of(type(model).from_pretrained(source).eval()))

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    stored = load_file(paddle / "model.safetensors")
    prefix = "" if architecture == BASE else "model."
    for i in range(SIZES["num_hidden_layers"]):
        attention = f"{prefix}layers.{i}.attn."
        parts = [state[f"{attention}{name}_proj.weight"] for name in "qkv"]
        assert np.array_equal(stored[f"{attention}Wqkv.weight"], np.concatenate(parts).T)
        assert np.array_equal(stored[f"{attention}Wo.weight"], state[f"{attention}Wo.weight"].T)
        assert (f"{attention}Wqkv.bias" in stored) is biases
        if biases:
            parts = [state[f"{attention}{name}_proj.bias"] for name in "qkv"]
            assert np.array_equal(stored[f"{attention}Wqkv.bias"], np.concatenate(parts))
    embedding = f"{prefix}embeddings.tok_embeddings.weight"
    assert np.array_equal(stored[embedding], state[embedding])
    assert not any("_proj" in name for name in stored)
    assert ("decoder.weight" in stored) is (architecture == CAUSAL_LM and not tied)
    if architecture == CLASSIFIER:
        assert np.array_equal(stored["classifier.weight"], state["classifier.weight"].T)


def test_a_decoder_of_which_a_part_is_wrong_does_not_come_back(saved, there_and_back):
    """The comparison above would see a single element of a single part."""
    model, source = saved(CAUSAL_LM, False, True)
    _, back = there_and_back(source)
    before = outputs_of(type(model).from_pretrained(source).eval())
    again = type(model).from_pretrained(back).eval()
    with torch.no_grad():
        again.model.layers[1].attn.k_proj.weight[3, 5] += 0.5
    assert not torch.equal(outputs_of(again), before)


def test_the_base_model_of_a_decoder_can_be_taken_out(saved, cli, tmp_path):
    model, source = saved(CAUSAL_LM, False, True)
    out = tmp_path / "base"
    code, _, err = cli("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--out", out, "--head", "base")
    assert code == 0, err
    assert json.loads((out / "config.json").read_text())["architectures"] == [BASE]
    stored = load_file(out / "model.safetensors")
    assert "layers.2.attn.Wqkv.weight" in stored
    assert not any(name.startswith(("model.", "lm_head", "decoder")) for name in stored)
    assert len(stored) == len(model.model.state_dict()) - 2 * SIZES["num_hidden_layers"]  # three become one


@pytest.fixture
def mine(tmp_path):
    """A table of the user's own, for a model type that no shipped table is for."""
    text = (configs_dir() / "tables" / "modernbert-decoder.toml").read_text()
    edited = text.replace('id = "modernbert-decoder/1"', 'id = "mine/7"')
    edited = edited.replace('model_type = "modernbert-decoder"', 'model_type = "mine"')
    assert edited.count("mine") == 2
    path = tmp_path / "tables" / "mine.toml"
    path.parent.mkdir()
    path.write_text(edited)
    return path


def test_a_table_of_the_users_own_serves_a_model_type_of_its_own(saved, there_and_back, cli, mine, tmp_path):
    _, source = saved(CAUSAL_LM, True, True)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"model_type": "modernbert-decoder"', '"model_type": "mine"'))
    assert (source / "config.json").read_text() != config

    code, _, err = cli("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--out", tmp_path / "none")
    assert code == 2
    assert "`model_type` of" in err
    assert "--table FILE.toml" in err

    paddle, back = there_and_back(source, "--table", mine)
    for name in WEIGHTS:
        assert (back / name).read_bytes() == (source / name).read_bytes()
    manifest = json.loads((paddle / "conversion_manifest.json").read_text())
    assert "mine/7" in json.dumps(manifest["table"])
    code, out, err = cli("verify", paddle, "--table", mine)
    assert code == 0, out + err


def test_a_table_of_the_users_own_is_linted_shown_and_explained(cli, mine):
    code, out, err = cli("table", "lint", "--table", mine)
    assert code == 0, out + err
    assert "this package has no ModernBertDecoderModel" in out
    assert out.endswith("mine/7: 0 problems\n")
    code, out, _ = cli("table", "show", "--table", mine)
    assert code == 0
    assert "182 rows of mine/7" in out
    code, out, _ = cli("table", "explain", "model.layers.0.attn.Wqkv.weight", "--table", mine)
    assert code == 0
    assert out.count("T, transposed") == 3


def test_the_table_of_the_decoder_fits_the_live_decoder(cli):
    code, out, err = cli("table", "lint", "--table", "modernbert-decoder")
    assert code == 0, out + err
    assert out.endswith("modernbert-decoder/1: 0 problems\n")
