"""What a ModernBERT config.json means, whichever transformers version wrote it.

Both spellings are read: v4 (4.48 to 4.57: `global_rope_theta`, `local_rope_theta`, `global_attn_every_n_layers`)
and v5 (`rope_parameters`, `layer_types`). Where both are present v5 wins, as in the reference. A switch that
changes the numbers and is not implemented is refused by name, never ignored.

Source: transformers 5.23.0, models/modernbert/configuration_modernbert.py; 4.55.4, same file.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from modernbert_align.core.hub_cache import inside_source
from modernbert_align.core.json_input import read_json
from modernbert_align.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_THETA = {FULL: 160_000.0, SLIDING: 10_000.0}
MAX_NORM_EPS = 1e-3  # paddle 3.3, layer_norm kernel
MAX_LAYERS = 1000  # every layer is a few names in memory before the weights have been seen
ACTIVATIONS = ("gelu", "silu")
POOLINGS = ("cls", "mean")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched for longer sequences; names are Hugging Face's.

    Source: transformers 5.23.0, modeling_rope_utils.py.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture a config.json describes, every switch resolved. Names are Hugging Face's."""

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    attention_bias: bool = False
    attention_dropout: float = 0.0
    layer_types: tuple[str, ...] = ()
    full_rope_theta: float = DEFAULT_THETA[FULL]
    sliding_rope_theta: float = DEFAULT_THETA[SLIDING]
    full_rope_scaling: RopeScaling | None = None
    sliding_rope_scaling: RopeScaling | None = None
    local_attention: int = 128
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    num_labels: int = 2
    problem_type: str | None = None
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = -100
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def half_window(self) -> int:
        """Sliding layers keep |i - j| <= this many positions."""
        return self.local_attention // 2

    def rope_theta(self, layer_type: str) -> float:
        """RoPE base of a layer kind."""
        return self.full_rope_theta if layer_type == FULL else self.sliding_rope_theta

    def rope_scaling(self, layer_type: str) -> RopeScaling | None:
        """How the RoPE of a layer kind is scaled, if it is."""
        return self.full_rope_scaling if layer_type == FULL else self.sliding_rope_scaling

    def rope_parameters(self) -> dict[str, dict[str, Any]]:
        """The v5 spelling of the RoPE settings."""
        spelled: dict[str, dict[str, Any]] = {}
        for kind in (FULL, SLIDING):
            scaling = self.rope_scaling(kind)
            given = asdict(scaling) if scaling is not None else {"rope_type": "default"}
            spelled[kind] = {key: value for key, value in given.items() if value is not None}
            spelled[kind]["rope_theta"] = self.rope_theta(kind)
        return spelled

    @classmethod
    def from_dict(cls, fields_by_name: Mapping[str, Any]) -> "ModelConfig":
        """Undo `dataclasses.asdict`, also after a trip through JSON.

        Raises:
            TypeError: These are not the fields of a configuration.
        """
        values = dict(fields_by_name)
        values["layer_types"] = tuple(values.get("layer_types", ()))
        for key in ("full_rope_scaling", "sliding_rope_scaling"):
            if values.get(key) is not None:
                values[key] = RopeScaling(**values[key])
        return cls(**values)


# Fields that no key of config.json gives directly.
RESOLVED_FIELDS = (
    "layer_types",
    "full_rope_theta",
    "sliding_rope_theta",
    "full_rope_scaling",
    "sliding_rope_scaling",
)
# rope_type -> keys it takes beside rope_type and rope_theta. `dynamic` depends on what the model has seen before, and
# the others have never been used with ModernBERT: refused.
ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
    ),
}
_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "local_attention",
    "num_labels",
)
_FLAGS = tuple(f.name for f in fields(ModelConfig) if f.type in (bool, "bool"))
_FLOATS = (
    "norm_eps",
    "initializer_range",
    "initializer_cutoff_factor",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
)


def parse_config(raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Resolve a config.json document to one architecture.

    Args:
        raw: The parsed JSON object, v4 or v5 spelling, from either framework.
        where: Named in error messages.

    Raises:
        ConfigError: Another model type, a value of the wrong kind, or a switch that is not supported.
    """
    model_type = raw.get("model_type")
    if model_type != "modernbert":
        raise ConfigError(
            f"`model_type` is `{model_type}` in `{where}`, not `modernbert`",
            hint="only ModernBERT encoder checkpoints can be converted and compared",
        )
    known = {f.name for f in fields(ModelConfig)} - set(RESOLVED_FIELDS)
    values: dict[str, Any] = {key: raw[key] for key in known if raw.get(key) is not None}
    if raw.get("id2label") is not None:
        values["num_labels"] = _num_labels(raw["id2label"], where)
    if "pad_token_id" in raw:  # null is a value here: no padding row
        values["pad_token_id"] = raw["pad_token_id"]
    _check_kinds(values, where)
    values.update({key: int(values[key]) for key in _INTEGERS if key in values})
    for key in ("hidden_activation", "classifier_activation"):
        _one_of(values, key, ACTIVATIONS, where)
    _one_of(values, "classifier_pooling", POOLINGS, where)
    _one_of(values, "problem_type", PROBLEM_TYPES, where)
    check_layers(values.get("num_hidden_layers", 0), where)
    config = ModelConfig(**values)
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        raise ConfigError(
            f"`problem_type` is single_label_classification and `num_labels` is 1 in `{where}`",
            hint="one label is a regression; the reference refuses it as well",
        )
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"`hidden_size` {config.hidden_size} is not a multiple of `num_attention_heads` "
            f"{config.num_attention_heads} in `{where}`"
        )
    if config.head_dim % 2:
        raise ConfigError(f"the head width {config.head_dim} is odd in `{where}`; RoPE needs an even one")
    if config.norm_eps > MAX_NORM_EPS:
        raise ConfigError(
            f"`norm_eps` {config.norm_eps} in `{where}` is not supported",
            hint=f"Paddle's LayerNorm takes at most {MAX_NORM_EPS}",
        )
    ropes = _ropes(raw, config.max_position_embeddings, where)
    return ModelConfig(
        **values,
        layer_types=_layer_types(raw, config.num_hidden_layers, where),
        full_rope_theta=ropes[FULL][0],
        sliding_rope_theta=ropes[SLIDING][0],
        full_rope_scaling=ropes[FULL][1],
        sliding_rope_scaling=ropes[SLIDING][1],
    )


def check_layers(count: int, where: str) -> None:
    """Refuse a number of layers that no model has.

    Raises:
        ConfigError: There are more than `MAX_LAYERS`.
    """
    if count > MAX_LAYERS:
        raise ConfigError(f"`num_hidden_layers` is {count} in `{where}`, more than {MAX_LAYERS}")


def read_config_file(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder.

    Raises:
        ConfigError: The file is absent, a link out of the folder, unreadable or not a JSON object.
    """
    path = folder / "config.json"
    try:
        if not path.is_file():
            raise ConfigError(
                f"no `config.json` in `{folder}`", hint="point at the folder that holds config.json and the weights"
            )
        if not inside_source(path, folder):
            raise ConfigError(
                f"`{path}` is a link that leads out of `{folder}`", hint="replace the link by the file it points to"
            )
        document = read_json(path, strict=False)
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"`{path}` is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"`{path}` holds a JSON {type(document).__name__}, not an object")
    return document


def _check_kinds(values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _INTEGERS and not (number and 0 < value < math.inf and value == int(value)):
            raise ConfigError(f"`{key}` is `{value!r}` in `{where}`, not a positive integer")
        if key in _FLAGS and not isinstance(value, bool):
            raise ConfigError(f"`{key}` is `{value!r}` in `{where}`, not true or false")
        if key in _FLOATS and not (number and value >= 0):
            raise ConfigError(f"`{key}` is `{value!r}` in `{where}`, not a number >= 0")
        if key == "pad_token_id" and not (value is None or type(value) is int):
            raise ConfigError(f"`{key}` is `{value!r}` in `{where}`, not an integer or null")


def _num_labels(id2label: Any, where: str) -> int:
    if not isinstance(id2label, Mapping) or not id2label:
        raise ConfigError(f"`id2label` is `{id2label!r}` in `{where}`, not an object with a name per label")
    return len(id2label)


def _one_of(values: Mapping[str, Any], key: str, allowed: tuple[str, ...], where: str) -> None:
    if key in values and values[key] not in allowed:
        raise ConfigError(
            f"`{key}` = `{values[key]}` in `{where}` is not supported", hint=f"supported: {', '.join(allowed)}"
        )


def _layer_types(raw: Mapping[str, Any], num_layers: int, where: str) -> tuple[str, ...]:
    given = raw.get("layer_types")
    if given is None:
        every = raw.get("global_attn_every_n_layers", 3)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"`global_attn_every_n_layers` is `{every!r}` in `{where}`, not a positive integer")
        return tuple(SLIDING if i % every else FULL for i in range(num_layers))
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"`layer_types` is `{given!r}` in `{where}`, not a list")
    if len(given) != num_layers:
        raise ConfigError(f"`layer_types` has {len(given)} entries in `{where}`, `num_hidden_layers` is {num_layers}")
    for kind in given:
        if kind not in (FULL, SLIDING):
            raise ConfigError(f"`layer_types` entry `{kind}` in `{where}` is not supported")
    return tuple(given)


def _ropes(raw: Mapping[str, Any], longest: int, where: str) -> dict[str, tuple[float, RopeScaling | None]]:
    """Base and scaling of every layer kind."""
    full = raw.get("global_rope_theta", DEFAULT_THETA[FULL])
    sliding = raw.get("local_rope_theta", DEFAULT_THETA[SLIDING])
    thetas = {FULL: full, SLIDING: full if sliding is None else sliding}  # v4: null means the global base
    given = raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"`rope_parameters` is `{given!r}` in `{where}`, not an object")
    unknown = sorted(set(given) - set(thetas))
    if unknown:
        raise ConfigError(f"`rope_parameters.{unknown[0]}` in `{where}` is not supported")
    legacy = raw.get("rope_scaling")
    if legacy is not None and not isinstance(legacy, Mapping):
        raise ConfigError(f"`rope_scaling` is `{legacy!r}` in `{where}`, not an object")
    ropes = {}
    for kind, theta in thetas.items():
        place = f"rope_parameters.{kind}"
        parameters = given.get(kind)
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ConfigError(f"`{place}` is `{parameters!r}` in `{where}`, not an object")
        merged = {**(parameters or {}), **(legacy or {})}  # v4's rope_scaling goes into both kinds
        base = merged.pop("rope_theta", theta)
        if isinstance(base, bool) or not isinstance(base, (int, float)) or not 0 < base <= sys.float_info.max:
            raise ConfigError(f"the RoPE base of {kind} layers is `{base!r}` in `{where}`, not a positive number")
        scaling = _rope_scaling(merged, longest, "rope_scaling" if legacy is not None else place, where)
        ropes[kind] = (float(base), scaling)
    return ropes


def _rope_scaling(given: dict[str, Any], longest: int, place: str, where: str) -> RopeScaling | None:
    rope_type = given.pop("rope_type", "default")
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise ConfigError(
            f"`{place}.rope_type` = `{rope_type}` in `{where}` is not supported",
            hint=f"supported: {', '.join(ROPE_KEYS)}; anything else would give wrong numbers",
        )
    extra = sorted(set(given) - set(ROPE_KEYS[rope_type]))
    if extra:
        raise ConfigError(f"`{place}.{extra[0]}` in `{where}` is not supported with the rope_type `{rope_type}`")
    for key, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        if not number and not (value is None and key != "factor"):
            raise ConfigError(f"`{place}.{key}` is `{value!r}` in `{where}`, not a positive number")
    if rope_type == "default":
        return None
    if "factor" not in given:
        raise ConfigError(f"`{place}.factor` is missing in `{where}`; the rope_type `{rope_type}` needs it")
    if rope_type == "yarn" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = longest
    return RopeScaling(rope_type=rope_type, **given)
