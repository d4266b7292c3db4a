"""The Paddle model against transformers, by value, over configurations and lengths."""

import numpy as np
import paddle
import pytest
import torch
import transformers

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.table import load_table
from modernbert_align.errors import ConfigError

VERSION = int(transformers.__version__.split(".")[0])
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "pad_token_id": 5,
    "initializer_range": 0.2,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "default": {},
    "biases": dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
    "untied": {"tie_word_embeddings": False},
    "no decoder bias": {"decoder_bias": False},
    "silu": {"hidden_activation": "silu", "classifier_activation": "silu"},
    "v4 thetas": {"global_rope_theta": 80000.0, "local_rope_theta": 40000.0},
    "every second layer full": {"global_attn_every_n_layers": 2},
    "all sliding": {"layer_types": ["sliding_attention"] * 4},
    "wide window": {"local_attention": 128},
    "epsilon": {"norm_eps": 1e-3},
    "linear RoPE": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "YaRN": {"rope_scaling": YARN},
    "YaRN in full layers only": {
        "max_position_embeddings": 64,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 2.5,
                "rope_theta": 900.0,
                "beta_fast": 4,
                "beta_slow": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "YaRN with its own magnitudes": {
        "rope_scaling": {
            **YARN,
            "mscale": 2.0,
            "mscale_all_dim": 0.7,
        }
    },
    "YaRN with an attention factor": {
        "rope_scaling": {
            **YARN,
            "attention_factor": 1.3,
        }
    },
}


def pair(tmp_path, architecture="ModernBertForMaskedLM", **changes):
    """A seeded reference and the Paddle model made from its converted checkpoint."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.ModernBertConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "hf")
    request = Request(folder=tmp_path / "hf", model="pair", revision=None, src="hf", dst="paddle")
    folder = convert(request, load_table(), tmp_path / "paddle", force=False).out
    return hf.load(tmp_path / "hf", architecture, "fp32"), paddle_backend.load(folder, architecture, "fp32")


def run(reference, candidate, ids, mask):
    arguments = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    with torch.no_grad(), paddle.no_grad():
        theirs = reference(**{k: torch.from_numpy(v) for k, v in arguments.items()}, output_hidden_states=True)
        ours = candidate(
            **{k: paddle.to_tensor(v) for k, v in arguments.items()}, output_hidden_states=True, return_dict=True
        )
    return theirs, ours


def close(ours, theirs, keep):
    a, b = ours.numpy()[keep], theirs.numpy()[keep]
    assert np.abs(a - b).mean() <= 1e-5 * max(1.0, np.abs(b).mean())
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_gives_the_references_values(tmp_path, name):
    if VERSION < 5 and ("sliding" in name or "RoPE" in name or "YaRN" in name):  # 4 would silently run something else
        with pytest.raises(ConfigError, match=r"cannot express the `layer_types`|does not scale RoPE"):
            pair(tmp_path, **CONFIGS[name])
        return
    reference, candidate = pair(tmp_path, **CONFIGS[name])
    ids = np.random.default_rng(0).integers(6, 97, (2, 40))
    mask = np.ones_like(ids)
    mask[1, 30:] = 0
    theirs, ours = run(reference, candidate, ids, mask)
    close(ours.logits, theirs.logits, mask.astype(bool))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    inner = 5 if VERSION >= 5 else 4  # transformers 4 gives the last one before the final norm
    for a, b in zip(ours.hidden_states[:inner], theirs.hidden_states[:inner], strict=True):
        close(a, b, mask.astype(bool))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 8, 9, 63, 129])
def test_length_gives_the_references_values(tmp_path, length):
    reference, candidate = pair(tmp_path)
    ids = np.random.default_rng(length).integers(6, 97, (2, length))
    theirs, ours = run(reference, candidate, ids, None)
    close(ours.logits, theirs.logits, np.ones_like(ids, dtype=bool))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_references_values(tmp_path, side):
    reference, candidate = pair(tmp_path)
    ids = np.random.default_rng(0).integers(6, 97, (3, 30))
    mask = np.ones_like(ids)
    for row, padded in enumerate((0, 7, 21)):
        mask[row, : padded if side == "left" else 0] = 0
        mask[row, 30 - (padded if side == "right" else 0) :] = 0
    theirs, ours = run(reference, candidate, ids, mask)
    close(ours.logits, theirs.logits, mask.astype(bool))


def test_base_model_gives_the_references_values(tmp_path):
    reference, candidate = pair(tmp_path, architecture="ModernBertModel")
    ids = np.random.default_rng(0).integers(6, 97, (2, 20))
    theirs, ours = run(reference, candidate, ids, None)
    close(ours.last_hidden_state, theirs.last_hidden_state, np.ones_like(ids, dtype=bool))


def test_attention_probabilities_are_the_references(tmp_path):
    reference, candidate = pair(tmp_path)
    ids = np.random.default_rng(0).integers(6, 97, (2, 20))
    with torch.no_grad(), paddle.no_grad():
        theirs = reference(torch.from_numpy(ids), output_attentions=True).attentions
        ours = candidate(paddle.to_tensor(ids), output_attentions=True, return_dict=True).attentions
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5)


def test_loss_and_gradients_are_the_references(tmp_path):
    reference, candidate = pair(tmp_path)
    ids = np.random.default_rng(0).integers(6, 97, (2, 20))
    ids[1, 15:] = SIZES["pad_token_id"]
    mask = (ids != SIZES["pad_token_id"]).astype(np.int64)
    labels = np.where(mask == 1, ids, -100)
    theirs = reference(*map(torch.from_numpy, (ids, mask)), labels=torch.from_numpy(labels))
    theirs.loss.backward()
    ours = candidate(
        paddle.to_tensor(ids), attention_mask=paddle.to_tensor(mask), labels=paddle.to_tensor(labels), return_dict=True
    )
    ours.loss.backward()
    assert float(ours.loss) == pytest.approx(float(theirs.loss.detach()), abs=1e-5)
    gradients = {name: p.grad.numpy() for name, p in candidate.named_parameters()}
    for name, parameter in reference.named_parameters():
        expected = parameter.grad.numpy()
        found = gradients[name] if name in gradients else gradients["decoder.weight"]
        if expected.ndim == 2 and name.endswith("weight") and "embeddings" not in name:
            expected = expected.T
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected), name
