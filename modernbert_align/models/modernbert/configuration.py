"""ModernBERT configuration for PaddleNLP.

Source: transformers 5.23.0, models/modernbert/configuration_modernbert.py; paddlenlp 2.8.1, configuration_utils.py.
"""

from dataclasses import fields
from typing import Any, ClassVar

from paddlenlp.transformers.configuration_utils import PretrainedConfig

from modernbert_align.core.model_config import RESOLVED_FIELDS, ModelConfig, parse_config
from modernbert_align.errors import ConfigError

__all__ = ["ModernBertConfig"]

# Resolved into layer_types and rope_parameters; kept out of the attributes so that there is one truth.
_V4_KEYS = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "rope_scaling")
_RESOLVED = ("layer_types", "rope_parameters")
_ATTENTION = "attn_implementation"
ATTENTIONS = ("eager", "blockwise", "flash")


class ModernBertConfig(PretrainedConfig):
    """Configuration of a ModernBERT model.

    Takes Hugging Face's keys under Hugging Face's names, in the v4 spelling (`global_rope_theta`,
    `local_rope_theta`, `global_attn_every_n_layers`) and in the v5 spelling (`rope_parameters`, `layer_types`); v5
    wins where both are given. Attributes hold the v5 form.

    Args:
        **kwargs: Any key of a ModernBERT config.json. Missing ones take the reference's defaults, which are those of
            ModernBERT-base. And `attn_implementation`, which says how attention is computed: `eager` (all pairs of
            tokens, the implementation that carries the alignment contract), `blockwise` (the same numbers but for
            rounding, without padding and without a matrix over all pairs) or `flash` (packed like blockwise, through
            Paddle's FlashMask kernel; a forward pass on anything but a CUDA device in half precision is refused);
            None, the default, takes blockwise in evaluation mode and for packed input, and eager otherwise in
            training, if attentions are asked for, and for export as a static graph.

    Raises:
        ConfigError: A switch that changes the numbers is not supported; it is never ignored. Or there is no such
            attention implementation, or it cannot return the attentions that are asked for.
    """

    model_type = "modernbert"
    pretrained_init_configuration: ClassVar[dict[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        model = parse_config({**kwargs, "model_type": kwargs.get("model_type", self.model_type)})
        rest = {
            key: value for key, value in kwargs.items() if key not in (*_V4_KEYS, *_RESOLVED, "model_type", _ATTENTION)
        }
        super().__init__(**rest)
        for field in fields(ModelConfig):
            if field.name not in (*RESOLVED_FIELDS, "num_labels"):
                setattr(self, field.name, getattr(model, field.name))
        self.layer_types = list(model.layer_types)
        self.rope_parameters = model.rope_parameters()
        self.attn_implementation = kwargs.get(_ATTENTION)

    @property
    def attn_implementation(self) -> str | None:
        """How attention is computed; can be changed at any time. Not saved, as in the reference.

        Source: transformers 5.23.0, configuration_utils.py, PreTrainedConfig._attn_implementation.
        """
        return self._attn_implementation

    @attn_implementation.setter
    def attn_implementation(self, value: str | None) -> None:
        if value is not None and value not in ATTENTIONS:
            raise ConfigError(f"unknown attention implementation `{value}`", hint=f"one of {', '.join(ATTENTIONS)}")
        self._attn_implementation = value

    def attention_for(
        self, *, training: bool, output_attentions: bool, tracing: bool, packed: bool, padding_counts: bool
    ) -> str:
        """The implementation of one forward pass.

        Args:
            tracing: Whether the pass is recorded as a static graph, which has no lengths yet.
            packed: Whether the input is packed. All pairs of a row are then mostly pairs that may not see each other,
                so that training goes block by block too.
            padding_counts: Whether a loss counts what is computed at padding, which only eager attention computes.

        Raises:
            ConfigError: Attentions are asked for and the chosen implementation has none to return (the reference
                warns and returns None in their place); or it cannot be traced.
        """
        chosen = self.attn_implementation
        if output_attentions and chosen not in (None, "eager"):
            raise ConfigError(
                f"attention implementation `{chosen}` cannot return attentions",
                hint="set `attn_implementation` to `eager` for `output_attentions`",
            )
        if tracing and chosen not in (None, "eager"):
            raise ConfigError(
                f"attention implementation `{chosen}` goes by the lengths of a batch, which a static graph has not",
                hint="set `attn_implementation` to `eager` for export",
            )
        if chosen is not None:
            return chosen
        all_pairs = (training and not packed) or output_attentions or tracing or padding_counts
        return "eager" if all_pairs else "blockwise"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As in PaddleNLP, without the attention implementation: it belongs to a process, not to a checkpoint.

        Args:
            **kwargs: What PaddleNLP's own takes: nothing in 2.8.1, `saving_file` in 3.
        """
        found: dict[str, Any] = super().to_dict(**kwargs)
        found.pop("_attn_implementation", None)
        return found

    def resolved(self) -> ModelConfig:
        """The architecture as plain data, with changes made to the attributes taken in."""
        return parse_config(self.to_dict())
