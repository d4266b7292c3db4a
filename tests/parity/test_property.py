"""Random configurations: valid ones give the reference's numbers, invalid ones are refused by name."""

import tempfile
from pathlib import Path

import numpy as np
import paddle
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.model_config import FULL, SLIDING, parse_config
from modernbert_align.core.table import load_table
from modernbert_align.errors import ConfigError
from modernbert_align.models.modernbert import ModernBertConfig

VERSION = int(transformers.__version__.split(".")[0])
DRAWS = 200
SWITCHES = (
    "norm_bias",
    "attention_bias",
    "mlp_bias",
    "classifier_bias",
    "decoder_bias",
    "tie_word_embeddings",
    "sparse_prediction",
)


@st.composite
def configs(draw):
    """A valid configuration and the head to try it with."""
    heads = draw(st.integers(1, 3))
    config = {
        "vocab_size": draw(st.integers(11, 60)),
        "hidden_size": heads * draw(st.sampled_from([2, 4, 6, 8])),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(3, 20)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "local_attention": draw(st.integers(2, 12)),
        "hidden_activation": draw(st.sampled_from(["gelu", "silu"])),
        "classifier_activation": draw(st.sampled_from(["gelu", "silu"])),
        "classifier_pooling": draw(st.sampled_from(["cls", "mean"])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
        "pad_token_id": draw(st.integers(0, 10)),
        "num_labels": draw(st.integers(1, 4)),
        "initializer_range": draw(st.sampled_from([0.02, 0.1, 0.3])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.3])),
        "mlp_dropout": draw(st.sampled_from([0.0, 0.3])),
        "embedding_dropout": draw(st.sampled_from([0.0, 0.3])),
        "classifier_dropout": draw(st.sampled_from([0.0, 0.3])),
        "global_rope_theta": draw(st.floats(100.0, 1e6)),
        "local_rope_theta": draw(st.floats(100.0, 1e6)),
        "global_attn_every_n_layers": draw(st.integers(1, 4)),
    }
    config |= {switch: draw(st.booleans()) for switch in SWITCHES}
    if VERSION >= 5 and draw(st.booleans()):
        kinds = st.lists(st.sampled_from([FULL, SLIDING]), min_size=config["num_hidden_layers"])
        config["layer_types"] = draw(kinds)[: config["num_hidden_layers"]]
    head = draw(st.sampled_from(["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]))
    return config, f"ModernBert{head}", draw(st.integers(0, 2**31 - 1)), draw(st.integers(1, 40))


@settings(max_examples=DRAWS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configs())
def test_random_valid_configuration_gives_the_references_logits(drawn):
    config, architecture, seed, length = drawn
    torch.manual_seed(seed)
    reference = getattr(transformers, architecture)(transformers.ModernBertConfig(**config))
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    reference.set_attn_implementation("eager")
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(Path(folder) / "hf")
        request = Request(folder=Path(folder) / "hf", model="drawn", revision=None, src="hf", dst="paddle")
        out = convert(request, load_table(), Path(folder) / "paddle", force=False).out
        candidate = paddle_backend.load(out, architecture, "fp32")
    ids = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, length))
    mask = np.ones_like(ids)
    mask[1, length - length // 3 :] = 0
    keep = mask.astype(bool)
    with torch.no_grad(), paddle.no_grad():
        theirs = reference.eval()(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[0].numpy()
        ours = candidate(paddle.to_tensor(ids), attention_mask=paddle.to_tensor(mask), return_dict=False)
    ours = (ours if isinstance(ours, paddle.Tensor) else ours[0]).numpy()
    assert ours.shape == theirs.shape
    if theirs.shape[:2] == keep.shape and "Sequence" not in architecture:
        ours, theirs = ours[keep], theirs[keep]
    # Logits of a classifier may cancel to nearly nothing: errors are relative to at least the size of its terms.
    assert np.linalg.norm(ours - theirs) <= 1e-5 * max(np.linalg.norm(theirs), np.sqrt(theirs.size))


VALID = {
    "model_type": "modernbert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
}
NOT_A_SIZE = st.one_of(
    st.integers(max_value=0), st.floats(0.1, 0.9), st.text(max_size=3), st.booleans(), st.lists(st.none())
)
NOT_A_FLAG = st.one_of(st.integers(), st.text(max_size=3), st.floats())
NOT_A_RATE = st.one_of(st.floats(max_value=-0.001), st.text(max_size=3), st.booleans())
OTHER_WORD = st.text(min_size=1, max_size=8).filter(lambda w: w not in ("gelu", "silu", "cls", "mean"))
OTHER_ROPE = st.sampled_from(["dynamic", "llama3", "longrope", "nonsense"])
INVALID = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"), NOT_A_SIZE
    ),
    **dict.fromkeys(("local_attention", "max_position_embeddings", "global_attn_every_n_layers"), NOT_A_SIZE),
    **dict.fromkeys(SWITCHES, NOT_A_FLAG),
    **dict.fromkeys(("attention_dropout", "mlp_dropout", "embedding_dropout", "norm_eps"), NOT_A_RATE),
    **dict.fromkeys(("hidden_activation", "classifier_activation", "classifier_pooling", "problem_type"), OTHER_WORD),
    "layer_types": st.one_of(
        st.lists(st.just(FULL), max_size=1), st.lists(OTHER_WORD, min_size=2, max_size=2), st.text(min_size=1)
    ),
    "rope_scaling": st.fixed_dictionaries({"rope_type": OTHER_ROPE, "factor": st.floats(1.0, 8.0)}),
    "rope_parameters": st.fixed_dictionaries({FULL: st.fixed_dictionaries({"rope_type": OTHER_ROPE})}),
    "global_rope_theta": st.one_of(st.floats(max_value=0.0), st.text(max_size=3), st.booleans()),
    "id2label": st.one_of(st.lists(st.text(), min_size=1), st.integers(1), st.text(min_size=1)),
}


@pytest.mark.parametrize("key", INVALID)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_random_invalid_value_is_refused_by_name(key, data):
    value = data.draw(INVALID[key])
    named = "RoPE base of full_attention" if key == "global_rope_theta" else key
    with pytest.raises(ConfigError, match=named):
        parse_config({**VALID, key: value})
    with pytest.raises(ConfigError, match=named):
        ModernBertConfig(**{k: v for k, v in {**VALID, key: value}.items() if k != "model_type"})
