"""ModernBERT configuration for PaddleNLP.

Source: transformers 5.23.0, models/modernbert/configuration_modernbert.py; paddlenlp 2.8.1, configuration_utils.py.
"""

from dataclasses import fields
from typing import Any, ClassVar

from paddlenlp.transformers.configuration_utils import PretrainedConfig

from modernbert_align.core.model_config import RESOLVED_FIELDS, ModelConfig, parse_config

__all__ = ["ModernBertConfig"]

# Resolved into layer_types and rope_parameters; kept out of the attributes so that there is one truth.
_V4_KEYS = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "rope_scaling")
_RESOLVED = ("layer_types", "rope_parameters")


class ModernBertConfig(PretrainedConfig):
    """Configuration of a ModernBERT model.

    Takes Hugging Face's keys under Hugging Face's names, in the v4 spelling (`global_rope_theta`,
    `local_rope_theta`, `global_attn_every_n_layers`) and in the v5 spelling (`rope_parameters`, `layer_types`); v5
    wins where both are given. Attributes hold the v5 form.

    Args:
        **kwargs: Any key of a ModernBERT config.json. Missing ones take the reference's defaults, which are those of
            ModernBERT-base.

    Raises:
        ConfigError: A switch that changes the numbers is not supported; it is never ignored.
    """

    model_type = "modernbert"
    pretrained_init_configuration: ClassVar[dict[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        model = parse_config({**kwargs, "model_type": kwargs.get("model_type", self.model_type)})
        rest = {key: value for key, value in kwargs.items() if key not in (*_V4_KEYS, *_RESOLVED, "model_type")}
        super().__init__(**rest)
        for field in fields(ModelConfig):
            if field.name not in (*RESOLVED_FIELDS, "num_labels"):
                setattr(self, field.name, getattr(model, field.name))
        self.layer_types = list(model.layer_types)
        self.rope_parameters = model.rope_parameters()

    def resolved(self) -> ModelConfig:
        """The architecture as plain data, with changes made to the attributes taken in."""
        return parse_config(self.to_dict())
