"""The Paddle model as PaddleNLP users meet it: outputs, pattern, gradients, saving, initialisation."""

import inspect

import numpy as np
import paddle
import pytest

from modernbert_align.backends.paddle import quiet
from modernbert_align.core.model_config import FULL, SLIDING
from modernbert_align.errors import ConfigError
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.modeling import ModernBertForMaskedLM, ModernBertModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "pad_token_id": 5,
}


@pytest.fixture
def batch():
    ids = np.random.default_rng(0).integers(6, 97, (2, 13))
    mask = np.ones((2, 13), dtype=np.int64)
    mask[1, 9:] = 0
    return {"input_ids": paddle.to_tensor(ids), "attention_mask": paddle.to_tensor(mask)}


def build(cls=ModernBertForMaskedLM, **changes):
    paddle.seed(0)
    model = cls(ModernBertConfig(**{**SMALL, **changes}))
    model.eval()
    return model


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_every_nth_layer_is_full_attention(every):
    model = build(ModernBertModel, num_hidden_layers=7, global_attn_every_n_layers=every)
    assert [layer.attention_type for layer in model.layers] == [FULL if i % every == 0 else SLIDING for i in range(7)]


def test_layer_types_win_over_the_pattern():
    kinds = [SLIDING, FULL, FULL, SLIDING]
    model = build(ModernBertModel, layer_types=kinds, global_attn_every_n_layers=3)
    assert [layer.attention_type for layer in model.layers] == kinds
    assert [layer.attn.is_sliding for layer in model.layers] == [True, False, False, True]


def test_only_layer_0_has_no_attention_norm():
    model = build(ModernBertModel)
    assert isinstance(model.layers[0].attn_norm, paddle.nn.Identity)
    assert all(isinstance(layer.attn_norm, paddle.nn.LayerNorm) for layer in model.layers[1:])


def test_sliding_layers_do_not_see_beyond_the_window():
    model = build(ModernBertModel, layer_types=[SLIDING] * 2, num_hidden_layers=2, initializer_range=0.5)
    ids = paddle.to_tensor(np.random.default_rng(1).integers(6, 97, (1, 40)))
    changed = ids.clone()
    changed[0, 39] = (int(ids[0, 39]) - 5) % 90 + 6
    difference = (model(ids, return_dict=True)[0] - model(changed, return_dict=True)[0]).abs().max(-1).numpy()[0]
    reach = 2 * 4  # two layers, half a window of four each
    assert (difference[: 39 - reach] == 0).all()
    assert difference[39 - reach] > 0


def test_padding_does_not_reach_real_tokens(batch):
    model = build(ModernBertModel)
    other = batch["input_ids"].clone()
    other[1, 9:] = 50
    a = model(**batch, return_dict=True).last_hidden_state
    b = model(other, attention_mask=batch["attention_mask"], return_dict=True).last_hidden_state
    np.testing.assert_array_equal(a[1, :9].numpy(), b[1, :9].numpy())


def test_outputs_have_the_references_shapes(batch):
    out = build()(**batch, output_hidden_states=True, output_attentions=True, return_dict=True)
    assert out.logits.shape == [2, 13, 97]
    assert [list(h.shape) for h in out.hidden_states] == [[2, 13, 24]] * 5
    assert [list(a.shape) for a in out.attentions] == [[2, 3, 13, 13]] * 4
    np.testing.assert_allclose(out.attentions[1].sum(-1).numpy(), 1.0, atol=1e-5)


def test_last_hidden_state_is_the_last_of_the_hidden_states(batch):
    out = build(ModernBertModel)(**batch, output_hidden_states=True, return_dict=True)
    np.testing.assert_array_equal(out.last_hidden_state.numpy(), out.hidden_states[-1].numpy())


def test_tuple_and_dict_hold_the_same(batch):
    model = build()
    as_tuple = model(**batch, output_hidden_states=True)
    as_dict = model(**batch, output_hidden_states=True, return_dict=True)
    np.testing.assert_array_equal(as_tuple[0].numpy(), as_dict.logits.numpy())
    assert len(as_tuple[1]) == len(as_dict.hidden_states)


def test_config_decides_what_is_not_asked_for(batch):
    model = build(output_attentions=True, output_hidden_states=True, return_dict=True)
    out = model(**batch)
    assert len(out.attentions) == 4
    assert len(out.hidden_states) == 5


def test_inputs_embeds_replace_the_lookup(batch):
    model = build()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    a = model(**batch)[0]
    b = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
    np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_position_ids_are_used(batch):
    model = build(ModernBertModel, initializer_range=0.5)
    plain = model(**batch)[0].numpy()
    same = model(**batch, position_ids=paddle.arange(13).unsqueeze(0))[0].numpy()
    spread = model(**batch, position_ids=paddle.arange(13).unsqueeze(0) * 3)[0].numpy()
    np.testing.assert_array_equal(plain, same)
    assert np.abs(plain - spread).max() > 1e-4


def test_exactly_one_input_is_needed(batch):
    model = build(ModernBertModel)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(batch["input_ids"], inputs_embeds=paddle.zeros([2, 13, 24]))


def test_first_argument_is_input_ids():
    assert list(inspect.signature(ModernBertForMaskedLM.forward).parameters)[1] == "input_ids"


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_every_parameter(batch, biases, tied):
    switches = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), biases)
    model = build(tie_word_embeddings=tied, **switches)
    labels = batch["input_ids"].clone()
    labels[1, 9:] = -100
    model(**batch, labels=labels)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_bf16_trains_on_this_device(batch):
    model = build()
    model.to(dtype="bfloat16")
    loss = model(**batch, labels=batch["input_ids"])[0]
    loss.backward()
    assert np.isfinite(float(loss.astype("float32")))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert np.isfinite(parameter.grad.astype("float32").numpy()).all(), name


def test_ignored_labels_do_not_count(batch):
    model = build()
    labels = paddle.full_like(batch["input_ids"], -100)
    labels[0, 2] = 7
    loss, logits = model(**batch, labels=labels)[:2]
    row = logits[0, 2].numpy().astype(np.float64)
    assert float(loss) == pytest.approx(np.log(np.exp(row).sum()) - row[7], abs=1e-5)


def test_sparse_prediction_gives_logits_of_labelled_positions_only(batch):
    labels = paddle.full_like(batch["input_ids"], -100)
    labels[0, 2], labels[1, 4] = 7, 9
    dense = build()(**batch, labels=labels, return_dict=True)
    sparse = build(sparse_prediction=True)(**batch, labels=labels, return_dict=True)
    assert sparse.logits.shape == [2, 97]
    np.testing.assert_allclose(sparse.logits[1].numpy(), dense.logits[1, 4].numpy(), atol=1e-6)
    assert float(sparse.loss) == pytest.approx(float(dense.loss), abs=1e-6)


def test_dropout_acts_in_training_only(batch):
    model = build(embedding_dropout=0.5, mlp_dropout=0.5, attention_dropout=0.5)
    np.testing.assert_array_equal(model(**batch)[0].numpy(), model(**batch)[0].numpy())
    model.train()
    assert np.abs(model(**batch)[0].numpy() - model(**batch)[0].numpy()).max() > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_save_and_load_give_the_same_model(tmp_path, batch, tied, safe):
    model = build(tie_word_embeddings=tied)
    with quiet():
        model.save_pretrained(str(tmp_path), safe_serialization=safe)
        loaded = ModernBertForMaskedLM.from_pretrained(str(tmp_path))
    loaded.eval()
    np.testing.assert_array_equal(model(**batch)[0].numpy(), loaded(**batch)[0].numpy())
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.decoder.weight is loaded.get_input_embeddings().weight) == tied


def test_base_model_loads_from_a_checkpoint_with_a_head(tmp_path, batch):
    model = build()
    with quiet():
        model.save_pretrained(str(tmp_path), safe_serialization=True)
        encoder = ModernBertModel.from_pretrained(str(tmp_path))
    encoder.eval()
    np.testing.assert_array_equal(model.model(**batch)[0].numpy(), encoder(**batch)[0].numpy())


def test_config_survives_saving(tmp_path):
    config = ModernBertConfig(
        **SMALL, global_rope_theta=5000.0, local_rope_theta=None, global_attn_every_n_layers=2, norm_bias=True
    )
    config.save_pretrained(str(tmp_path))
    loaded = ModernBertConfig.from_pretrained(str(tmp_path))
    assert loaded.resolved() == config.resolved()
    assert loaded.resolved().sliding_rope_theta == 5000.0


def test_unsupported_switch_is_refused_by_name():
    with pytest.raises(ConfigError, match="hidden_activation"):
        ModernBertConfig(**SMALL, hidden_activation="relu")
    with pytest.raises(ConfigError, match="rope_scaling"):
        ModernBertConfig(**SMALL, rope_scaling={"rope_type": "dynamic", "factor": 4.0})


def test_name_mappings_are_the_tables():
    config = ModernBertConfig(**SMALL)
    mappings = {m.source_name: m for m in ModernBertForMaskedLM._get_name_mappings(config)}
    assert mappings["model.layers.2.attn.Wo.weight"].action == "transpose"
    assert mappings["model.embeddings.tok_embeddings.weight"].action is None
    assert "decoder.weight" not in mappings
    assert {m.target_name for m in mappings.values()} == set(build().state_dict()) - {"decoder.weight"}


def test_initialisation_follows_the_reference():
    import torch
    from transformers import ModernBertConfig as HfConfig
    from transformers import ModernBertForMaskedLM as HfModel

    sizes = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "pad_token_id": 5,
    }
    torch.manual_seed(0)
    theirs = HfModel(HfConfig(**sizes, num_hidden_layers=3)).state_dict()
    paddle.seed(0)
    ours = ModernBertForMaskedLM(ModernBertConfig(**sizes, num_hidden_layers=3)).state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        a, b = ours[name].numpy(), tensor.numpy()
        assert a.std() == pytest.approx(b.std(), rel=0.05, abs=1e-7), name
        assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.05, abs=1e-7), name  # the cutoff
