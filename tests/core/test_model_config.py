"""What a config.json means, in both spellings, and what is refused by name."""

import json
from dataclasses import asdict

import pytest

from modernbert_align.core.model_config import (
    FULL,
    RESOLVED_FIELDS,
    SLIDING,
    ModelConfig,
    RopeScaling,
    parse_config,
    read_config_file,
)
from modernbert_align.errors import ConfigError

ROPE = {
    FULL: {"rope_type": "default", "rope_theta": 170000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 11000.0},
}


def parsed(**keys):
    return parse_config({"model_type": "modernbert", **keys}, where="some/config.json")


def refused(**keys):
    with pytest.raises(ConfigError) as error:
        parsed(**keys)
    assert "some/config.json" in error.value.message
    return error.value


def test_an_empty_config_means_the_published_base():
    config = parsed()
    assert config == ModelConfig(
        layer_types=tuple(FULL if i in (0, 3, 6, 9, 12, 15, 18, 21) else SLIDING for i in range(22))
    )
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (768, 1152, 50368)
    assert (config.full_rope_theta, config.sliding_rope_theta) == (160_000.0, 10_000.0)
    assert (config.head_dim, config.half_window) == (64, 64)
    assert config.tie_word_embeddings
    assert config.decoder_bias
    biases = (config.norm_bias, config.attention_bias, config.mlp_bias, config.classifier_bias)
    assert biases == (False,) * 4


def test_every_plain_key_is_read():
    given = {
        "vocab_size": 101,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_activation": "silu",
        "max_position_embeddings": 77,
        "initializer_range": 0.3,
        "initializer_cutoff_factor": 1.5,
        "norm_eps": 1e-4,
        "norm_bias": True,
        "pad_token_id": 9,
        "attention_bias": True,
        "attention_dropout": 0.1,
        "local_attention": 10,
        "embedding_dropout": 0.2,
        "mlp_bias": True,
        "mlp_dropout": 0.25,
        "decoder_bias": False,
        "classifier_pooling": "mean",
        "classifier_dropout": 0.35,
        "classifier_bias": True,
        "classifier_activation": "silu",
        "num_labels": 5,
        "problem_type": "regression",
        "sparse_prediction": True,
        "sparse_pred_ignore_index": -7,
        "tie_word_embeddings": False,
    }
    config = parsed(**given)
    default = ModelConfig()
    for key, value in given.items():
        assert getattr(config, key) == value
        assert getattr(default, key) != value
    assert set(given) | set(RESOLVED_FIELDS) == set(ModelConfig.__dataclass_fields__)


def test_a_null_means_the_default_except_for_the_padding_id():
    config = parsed(norm_eps=None, hidden_size=None, pad_token_id=None, decoder_bias=None)
    assert (config.norm_eps, config.hidden_size, config.decoder_bias) == (1e-5, 768, True)
    assert config.pad_token_id is None
    assert parsed().pad_token_id == 50283


def test_v4_spelling_sets_layer_kinds_and_thetas():
    config = parsed(
        num_hidden_layers=5, global_attn_every_n_layers=2, global_rope_theta=170000, local_rope_theta=11000.0
    )
    assert config.layer_types == (FULL, SLIDING, FULL, SLIDING, FULL)
    assert config.rope_theta(FULL) == 170_000.0
    assert config.rope_theta(SLIDING) == 11_000.0
    assert isinstance(config.full_rope_theta, float)


def test_v5_spelling_sets_layer_kinds_and_thetas():
    config = parsed(num_hidden_layers=3, layer_types=[SLIDING, SLIDING, FULL], rope_parameters=ROPE)
    assert config.layer_types == (SLIDING, SLIDING, FULL)
    assert (config.full_rope_theta, config.sliding_rope_theta) == (170_000.0, 11_000.0)


def test_v5_wins_where_both_spellings_are_present():
    config = parsed(
        num_hidden_layers=2,
        layer_types=[SLIDING, FULL],
        global_attn_every_n_layers=1,
        rope_parameters=ROPE,
        global_rope_theta=1.0,
        local_rope_theta=2.0,
    )
    assert config.layer_types == (SLIDING, FULL)
    assert (config.full_rope_theta, config.sliding_rope_theta) == (170_000.0, 11_000.0)


def test_rope_parameters_of_one_kind_leave_the_other_as_it_was():
    config = parsed(rope_parameters={FULL: ROPE[FULL]}, local_rope_theta=12000.0)
    assert (config.full_rope_theta, config.sliding_rope_theta) == (170_000.0, 12_000.0)


def test_rope_parameters_without_a_theta_keep_the_other_spelling():
    config = parsed(rope_parameters={SLIDING: {"rope_type": "default"}, FULL: None}, local_rope_theta=12000.0)
    assert (config.full_rope_theta, config.sliding_rope_theta) == (160_000.0, 12_000.0)


def test_a_null_local_theta_means_the_global_one():
    config = parsed(global_rope_theta=170000.0, local_rope_theta=None)
    assert config.sliding_rope_theta == 170_000.0
    assert parsed(global_rope_theta=170000.0).sliding_rope_theta == 10_000.0  # absent is not null


def test_the_v5_spelling_written_from_a_config_reads_back():
    config = parsed(num_hidden_layers=3, global_rope_theta=170000.0, local_rope_theta=11000.0)
    assert config.rope_parameters() == ROPE
    again = parsed(num_hidden_layers=3, layer_types=list(config.layer_types), rope_parameters=config.rope_parameters())
    assert again == config


@pytest.mark.parametrize("window", [(128, 64), (16, 8), (7, 3), (1, 0)])
def test_the_window_reaches_half_of_local_attention_to_either_side(window):
    assert parsed(local_attention=window[0]).half_window == window[1]


@pytest.mark.parametrize("model_type", ["bert", None, "modernbert-decoder"])
def test_another_model_type_is_refused(model_type):
    with pytest.raises(ConfigError, match=f"`model_type` is `{model_type}` in `c.json`"):
        parse_config({"model_type": model_type}, where="c.json")


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "local_attention",
        "num_labels",
    ],
)
@pytest.mark.parametrize("value", [0, -8, 2.5, "8", True, [8]])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(key, value):
    assert refused(**{key: value}).message.startswith(f"`{key}` is `{value!r}`")


@pytest.mark.parametrize("text", ["1e999", "NaN"])
def test_a_size_that_is_no_finite_number_is_refused_by_name(text):
    assert refused(**json.loads(f'{{"hidden_size": {text}}}')).message.startswith("`hidden_size` is ")


def test_a_whole_number_written_with_a_point_is_the_integer():
    assert parsed(num_hidden_layers=4.0, hidden_size=48.0) == parsed(num_hidden_layers=4, hidden_size=48)


@pytest.mark.parametrize(
    "key",
    [
        "norm_bias",
        "attention_bias",
        "mlp_bias",
        "decoder_bias",
        "classifier_bias",
        "sparse_prediction",
        "tie_word_embeddings",
    ],
)
@pytest.mark.parametrize("value", [1, "true", 0])
def test_a_switch_that_is_no_boolean_is_refused_by_name(key, value):
    assert parsed(**{key: True}) != parsed(**{key: False})
    assert refused(**{key: value}).message.startswith(f"`{key}` is `{value!r}`")


@pytest.mark.parametrize("key", ["norm_eps", "initializer_range", "attention_dropout", "mlp_dropout"])
@pytest.mark.parametrize("value", [-1e-5, "1e-5", True, float("nan")])
def test_a_number_that_is_none_is_refused_by_name(key, value):
    assert refused(**{key: value}).message.startswith(f"`{key}` is ")


@pytest.mark.parametrize("value", [1.01e-3, 1.0, float("inf")])
def test_a_norm_epsilon_that_paddle_cannot_take_is_refused_by_name(value):
    assert parsed(norm_eps=1e-3).norm_eps == 1e-3
    assert refused(norm_eps=value).message.startswith(f"`norm_eps` {value} in ")


@pytest.mark.parametrize("value", ["3", 3.5, [3], True])
def test_a_padding_id_of_the_wrong_kind_is_refused_by_name(value):
    assert parsed(pad_token_id=3).pad_token_id == 3
    assert refused(pad_token_id=value).message.startswith("`pad_token_id` is ")


@pytest.mark.parametrize("key", ["hidden_activation", "classifier_activation"])
def test_an_activation_that_is_not_implemented_is_refused_by_name(key):
    error = refused(**{key: "gelu_new"})
    assert error.message.startswith(f"`{key}` = `gelu_new`")
    assert error.hint == "supported: gelu, silu"


def test_a_pooling_that_is_not_implemented_is_refused_by_name():
    error = refused(classifier_pooling="max")
    assert error.message.startswith("`classifier_pooling` = `max`")
    assert error.hint == "supported: cls, mean"


@pytest.mark.parametrize("kind", ["regression", "single_label_classification", "multi_label_classification"])
def test_every_problem_type_of_the_reference_is_read(kind):
    assert parsed(problem_type=kind).problem_type == kind


@pytest.mark.parametrize("value", ["ranking", "Regression", "", 1, True, ["regression"]])
def test_an_unknown_problem_type_is_refused_by_name(value):
    assert parsed(problem_type=None).problem_type is None
    error = refused(problem_type=value)
    assert error.message.startswith(f"`problem_type` = `{value}`")
    assert error.hint == "supported: regression, single_label_classification, multi_label_classification"


def test_the_number_of_labels_is_that_of_their_names():
    assert parsed().num_labels == 2
    assert parsed(num_labels=7).num_labels == 7
    assert parsed(num_labels=7.0) == parsed(num_labels=7)
    assert parsed(id2label={"0": "bad", "1": "fair", "2": "good"}).num_labels == 3
    assert parsed(id2label={"0": "value"}).num_labels == 1
    assert parsed(id2label=None, num_labels=4).num_labels == 4
    assert parsed(id2label=None).num_labels == 2


def test_names_of_labels_win_over_their_number():
    assert parsed(id2label={"0": "a", "1": "b", "2": "c"}, num_labels=9).num_labels == 3


@pytest.mark.parametrize("value", [{}, [], ["a", "b"], "ab", 2, True, False, 0])
def test_names_of_labels_that_are_none_are_refused_by_name(value):
    error = refused(id2label=value)
    assert error.message.startswith(f"`id2label` is `{value!r}`")
    assert "an object with a name per label" in error.message
    refused(id2label=value, num_labels=3)  # a number beside them does not help


def test_heads_that_do_not_divide_the_hidden_size_are_refused():
    assert parsed(hidden_size=24, num_attention_heads=4).head_dim == 6
    assert (
        "`hidden_size` 24 is not a multiple of `num_attention_heads` 5"
        in refused(hidden_size=24, num_attention_heads=5).message
    )


def test_an_odd_head_width_is_refused():
    assert "the head width 3 is odd" in refused(hidden_size=24, num_attention_heads=8).message


@pytest.mark.parametrize("every", [0, -1, 1.5, "3", True, None])
def test_a_layer_period_that_is_no_positive_integer_is_refused(every):
    assert parsed(global_attn_every_n_layers=1, num_hidden_layers=2).layer_types == (FULL, FULL)
    assert f"`global_attn_every_n_layers` is `{every!r}`" in refused(global_attn_every_n_layers=every).message


def test_layer_types_of_another_length_are_refused():
    assert "`layer_types` has 2 entries" in refused(num_hidden_layers=3, layer_types=[FULL, SLIDING]).message


def test_an_unknown_layer_type_is_refused_by_name():
    error = refused(num_hidden_layers=2, layer_types=[FULL, "chunked_attention"])
    assert "`layer_types` entry `chunked_attention`" in error.message


@pytest.mark.parametrize("value", [3, True])
def test_layer_types_that_are_no_list_are_refused(value):
    assert "`layer_types`" in refused(layer_types=value).message


def test_legacy_rope_scaling_goes_into_both_layer_kinds():
    assert parsed(rope_scaling=None) == parsed()
    config = parsed(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert config.full_rope_scaling == config.sliding_rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


def test_legacy_scaling_that_the_reference_would_not_see_is_refused():
    """With the old key `type` transformers 5 silently keeps unscaled RoPE."""
    assert "`rope_scaling." in refused(rope_scaling={"type": "linear", "factor": 2.0}).message


def test_each_layer_kind_has_its_own_scaling():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 16}
    config = parsed(rope_parameters={FULL: yarn}, max_position_embeddings=300)
    expected = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=300, beta_fast=16)
    assert config.rope_scaling(FULL) == expected
    assert config.rope_scaling(SLIDING) is None
    assert parsed(rope_parameters=config.rope_parameters()).full_rope_scaling == expected
    assert ModelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("rope_type", ["dynamic", "llama3", "longrope"])
def test_an_unsupported_rope_type_is_refused_by_name(rope_type):
    error = refused(rope_parameters={SLIDING: {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}})
    assert error.message.startswith(f"`rope_parameters.{SLIDING}.rope_type` = `{rope_type}`")
    assert "wrong numbers" in error.hint


@pytest.mark.parametrize("factor", [0, -1.0, "2", True, float("inf"), None])
def test_a_scaling_factor_that_is_none_is_refused(factor):
    given = {"rope_type": "linear", "rope_theta": 1e4} | ({} if factor is None else {"factor": factor})
    assert f"`rope_parameters.{FULL}.factor`" in refused(rope_parameters={FULL: given}).message


@pytest.mark.parametrize("key", ["factor", "partial_rotary_factor", "type"])
def test_an_unknown_rope_parameter_is_refused_by_name(key):
    error = refused(rope_parameters={FULL: {"rope_type": "default", "rope_theta": 1e4, key: 2}})
    assert error.message.startswith(f"`rope_parameters.{FULL}.{key}`")


def test_rope_parameters_of_an_unknown_layer_kind_are_refused():
    assert "`rope_parameters.rope_theta`" in refused(rope_parameters={"rope_theta": 1e4}).message


@pytest.mark.parametrize("parameters", [[1], "x", {FULL: 5}])
def test_rope_parameters_of_the_wrong_kind_are_refused(parameters):
    assert "`rope_parameters" in refused(rope_parameters=parameters).message


@pytest.mark.parametrize("theta", [0, -1.0, "10000", True, None, float("nan"), float("inf")])
@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_a_rope_base_that_is_no_positive_number_is_refused(theta, spelling):
    keys = {"global_rope_theta": theta} if spelling == "v4" else {"rope_parameters": {FULL: {"rope_theta": theta}}}
    error = refused(**keys)
    assert error.message.startswith(f"the RoPE base of {FULL} layers is `{theta!r}`")


def test_keys_that_do_not_touch_the_numbers_are_let_through():
    assert parsed(reference_compile=False, transformers_version="4.48.0", repad_logits_with_grad=False) == parsed()


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no `config.json` in") as error:
        read_config_file(tmp_path)
    assert str(tmp_path) in error.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_config_file(tmp_path)
    assert "config.json" in error.value.message


def test_a_config_file_is_read_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "modernbert", "name": "ü"}', encoding="utf-8")
    assert read_config_file(tmp_path) == {"model_type": "modernbert", "name": "ü"}


def test_one_label_cannot_be_classified():
    raw = {"model_type": "modernbert", "num_labels": 1, "problem_type": "single_label_classification"}
    with pytest.raises(ConfigError, match="num_labels` is 1"):
        parse_config(raw, where="config.json")
