"""ModernBERT encoder and its masked-LM head in Paddle, in the order and with the names of the reference.

Axes in the shape comments are those of attention.py.

Source: transformers 5.23.0, models/modernbert/modeling_modernbert.py; paddlenlp 2.8.1, transformers/model_utils.py.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddlenlp.transformers.conversion_utils import StateDictNameMapping
from paddlenlp.transformers.model_outputs import BaseModelOutput, MaskedLMOutput
from paddlenlp.transformers.model_utils import PretrainedModel, register_base_model
from paddlenlp.utils import safetensors as paddlenlp_safetensors

from modernbert_align.core.model_config import FULL, SLIDING
from modernbert_align.core.table import load_table
from modernbert_align.errors import ConfigError
from modernbert_align.models.modernbert.attention import (
    ModernBertAttention,
    ModernBertRotaryEmbedding,
    attention_bias,
    same_sequence,
)
from modernbert_align.models.modernbert.blockwise import Packing, Span, packing, rotation
from modernbert_align.models.modernbert.boundaries import packed_positions, sequence_boundaries
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.flash import mask_rows
from modernbert_align.models.modernbert.layers import (
    LayerNorm,
    ModernBertDecoder,
    ModernBertMLP,
    ModernBertPredictionHead,
    token_embedding,
)
from modernbert_align.models.modernbert.losses import cross_entropy
from modernbert_align.models.modernbert.parallel import (
    CommonRandomness,
    check,
    convert_actions,
    degree_of,
    drawing_apart,
    gathered,
    is_divided,
    rank_group,
    replicate,
)
from modernbert_align.models.modernbert.precision import rounded

__all__ = ["ModernBertForMaskedLM", "ModernBertModel", "ModernBertPretrainedModel"]

if paddlenlp_safetensors.numpy_dtype.get("BF16") == 2:
    # paddlenlp 2.8.1 has a hole here and cannot read real bfloat16 files; Paddle takes uint16 bits for bfloat16.
    paddlenlp_safetensors.numpy_dtype["BF16"] = np.uint16


class ModernBertEmbeddings(nn.Layer):
    """Token embedding, normalised; positions come in by rotation, in the attention."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.tok_embeddings = token_embedding(config)
        self.norm = LayerNorm(config)
        self.drop = nn.Dropout(config.embedding_dropout)

    def forward(
        self, input_ids: paddle.Tensor | None = None, inputs_embeds: paddle.Tensor | None = None
    ) -> paddle.Tensor:
        """[batch seq] ids, or [batch seq hidden] embeddings -> [batch seq hidden]."""
        embedded = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self.drop(self.norm(embedded))


class ModernBertEncoderLayer(nn.Layer):
    """Pre-norm block: x + attn(norm(x)), then x + mlp(norm(x)). Layer 0 has no attention norm."""

    def __init__(self, config: ModernBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_type = config.layer_types[layer_idx]
        self.attn_norm = nn.Identity() if layer_idx == 0 else LayerNorm(config)
        self.attn = ModernBertAttention(config, layer_idx)
        self.mlp_norm = LayerNorm(config)
        self.mlp = ModernBertMLP(config)

    def forward(
        self,
        hidden_states: paddle.Tensor,
        position_embeddings: tuple[paddle.Tensor, paddle.Tensor],
        attention_bias: paddle.Tensor | None = None,
        output_attentions: bool = False,
        spans: tuple[Span, ...] | None = None,
        same: paddle.Tensor | None = None,
        rows: paddle.Tensor | None = None,
    ) -> Any:
        """[batch seq hidden] -> same shape; with `output_attentions` also the probabilities [batch heads seq seq].

        With `spans`, `same` or `rows` [1 total hidden] -> same shape; see `ModernBertAttention`.
        """
        attended, probabilities = self.attn(
            self.attn_norm(hidden_states), position_embeddings, attention_bias, spans, same, rows
        )
        hidden_states = rounded(paddle.add, hidden_states, attended)
        hidden_states = rounded(paddle.add, hidden_states, self.mlp(self.mlp_norm(hidden_states)))
        return (hidden_states, probabilities) if output_attentions else hidden_states


class ModernBertPretrainedModel(PretrainedModel):
    """Loading, saving, initialisation and name mapping, common to all heads."""

    config_class = ModernBertConfig
    base_model_prefix = "model"
    model_config_file = "config.json"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\."]

    @classmethod
    def _get_name_mappings(cls, config: ModernBertConfig) -> list[StateDictNameMapping]:
        """PaddleNLP's mapping rows, derived from `configs/tables/modernbert.toml`."""
        table = load_table()
        head = table.head_of([cls.__name__], where=cls.__name__)
        return [
            StateDictNameMapping(entry.hf, entry.paddle, "transpose" if entry.op.name == "T" else None, index=index)
            for index, entry in enumerate(table.expand(config.resolved(), head))
            if entry.op.stored
        ]

    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        """Cast what was read to the model's dtype first; PaddleNLP does not when encoder and file differ in prefix."""
        state, dtype = kwargs.get("state_dict"), kwargs.get("dtype")
        if state is not None and dtype is not None:
            for name, tensor in list(state.items()):  # in place, so that the wide values go one by one
                state[name] = tensor.astype(dtype)
        return super()._load_pretrained_model(*args, **kwargs)

    @classmethod
    def _get_tensor_parallel_mappings(
        cls, config: ModernBertConfig, is_split: bool = True
    ) -> dict[str, Callable[..., Any]]:
        """PaddleNLP's tensor-parallel mapping, derived from `configs/tables/modernbert.toml`."""
        return convert_actions(config, cls.__name__, is_split)

    def _init_weights(self, layer: nn.Layer) -> None:
        """Draw the weights of one layer from the reference's distribution: a truncated normal per role.

        Source: transformers 5.23.0, modeling_modernbert.py, ModernBertPreTrainedModel._init_weights.
        """
        config = self.config
        inner = config.initializer_range
        outer = config.initializer_range / math.sqrt(2.0 * config.num_hidden_layers)
        stds: list[tuple[nn.Layer, float]] = []
        if isinstance(layer, ModernBertEmbeddings):
            stds = [(layer.tok_embeddings, inner)]
        elif isinstance(layer, ModernBertMLP):
            stds = [(layer.Wi, inner), (layer.Wo, outer)]
        elif isinstance(layer, ModernBertAttention):
            stds = [(layer.Wqkv, inner), (layer.Wo, outer)]
        elif isinstance(layer, ModernBertPredictionHead):
            stds = [(layer.dense, outer)]
        elif isinstance(layer, ModernBertDecoder) and not config.tie_word_embeddings:
            stds = [(layer, outer)]
        elif isinstance(getattr(layer, "classifier", None), nn.Linear):
            stds = [(layer.classifier, config.hidden_size**-0.5)]
        for module, std in stds:
            cutoff = config.initializer_cutoff_factor * std
            draw = nn.initializer.TruncatedNormal(mean=0.0, std=std, a=-cutoff, b=cutoff)
            drawing_apart(is_divided(module.weight), draw, module.weight)  # ranks would all have the same share
            if degree_of(config) > 1 and not is_divided(module.weight):
                replicate(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.initializer.Constant(0.0)(module.bias)

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Change the size of the vocabulary: drop tokens at the end, or add freshly drawn ones.

        A decoder follows: a tied one shares the new table, an untied one is resized like it, and its bias gets zeros.

        Args:
            new_num_tokens: Size of the new vocabulary; None changes nothing.

        Returns:
            The token embedding.

        Raises:
            ConfigError: The model is divided among ranks.
        """
        old = self.get_input_embeddings()
        if new_num_tokens in (None, self.config.vocab_size):
            return old
        if degree_of(self.config) > 1:
            raise ConfigError(
                "the vocabulary of a model that is divided among ranks keeps its size",
                hint="resize it without tensor parallelism, save it, and load that",
            )
        self.config.vocab_size = new_num_tokens
        embedding = token_embedding(self.config)
        std = self.config.initializer_range
        _copy_rows(old.weight, embedding.weight, std, self.config.initializer_cutoff_factor * std)
        self.set_input_embeddings(embedding)
        decoder = self.get_output_embeddings()
        if decoder is not None:
            new = ModernBertDecoder(self.config, embedding if self.config.tie_word_embeddings else None)
            if not self.config.tie_word_embeddings:
                _copy_rows(decoder.weight, new.weight, std, self.config.initializer_cutoff_factor * std)
            if decoder.bias is not None:
                _copy_rows(decoder.bias, new.bias, 0.0, 0.0)
            self.set_output_embeddings(new)
        return embedding


def _copy_rows(old: paddle.Tensor, new: paddle.Tensor, std: float, cutoff: float) -> None:
    """Fill `new` with `old`'s rows; rows beyond those are drawn anew (zeros if std is 0)."""
    if std:
        nn.initializer.TruncatedNormal(mean=0.0, std=std, a=-cutoff, b=cutoff)(new)
    else:
        nn.initializer.Constant(0.0)(new)
    kept = min(old.shape[0], new.shape[0])
    with paddle.no_grad():
        new[:kept] = old[:kept].astype(new.dtype)


@register_base_model
class ModernBertModel(ModernBertPretrainedModel):
    """The encoder.

    Args:
        config: The model's configuration. With `tensor_parallel_degree` above 1 this process holds its share of the
            weights, and every process of fleet's model-parallel group takes part in every call.

    Raises:
        UsageError: The model cannot be divided by that degree.
        ConfigError: fleet does not run with it.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        check(config)
        self.embeddings = ModernBertEmbeddings(config)
        self.layers = nn.LayerList([ModernBertEncoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = LayerNorm(config)
        self.rotary_emb = nn.LayerDict({kind: ModernBertRotaryEmbedding(config, kind) for kind in (FULL, SLIDING)})
        self.enable_recompute = False  # `recompute_enable` and PaddleNLP's Trainer set it
        if degree_of(config) > 1:
            self.register_forward_pre_hook(CommonRandomness())

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embeddings.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embeddings.tok_embeddings = value

    def _run(self, layer: nn.Layer, *arguments: Any) -> Any:
        """Call a layer; with recompute on, keep its inputs only and run it again in the backward pass."""
        if self.enable_recompute and self.training:
            return recompute(layer, *arguments, use_reentrant=self.config.recompute_use_reentrant)
        return layer(*arguments)

    def forward(
        self,
        input_ids: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        inputs_embeds: paddle.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: paddle.Tensor | None = None,
        padding_counts: bool = False,
    ) -> Any:
        """Encode a batch, or the sequences of one packed row.

        Packed input has shape [1 total] and no padding, and says where its sequences are: by `cu_seqlens`, or by
        `position_ids` that start again at 0. No sequence sees another. Everything that has the shape [batch seq ...]
        then has the shape [1 total ...].

        Args:
            input_ids: [batch seq], integers; exactly one of this and `inputs_embeds`.
            attention_mask: [batch seq], 1 at real tokens and 0 at padding; None if there is no padding.
            position_ids: [batch_or_1 seq]; 0, 1, 2, ... if None, in every sequence of packed input.
            inputs_embeds: [batch seq hidden].
            output_attentions: Also return the probabilities of every layer, [batch heads seq seq] each.
            output_hidden_states: Also return the input of every layer and the final states, [batch seq hidden] each.
            return_dict: Return a `BaseModelOutput` instead of a tuple.
            cu_seqlens: [sequences+1], integers, of packed input: 0, and where each sequence ends.
            padding_counts: Whether the caller reads states at padding: attention is eager then, unless the
                configuration chooses another, which leaves zeros there.

        Returns:
            `last_hidden_state` [batch seq hidden], then what was asked for.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds` were given.
            UsageError: What says that the input is packed is malformed or contradicts itself.
            ConfigError: The configuration's attention implementation cannot do what is asked for, or not here. Or this
                trains with dropout, divided, and ranks have different random states.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.use_return_dict
        given = input_ids if inputs_embeds is None else inputs_embeds
        batch, seq = given.shape[:2]  # type: ignore[union-attr]
        boundaries = sequence_boundaries([batch, seq], cu_seqlens, position_ids, attention_mask)
        if position_ids is None:
            position_ids = paddle.arange(seq).unsqueeze(0) if boundaries is None else packed_positions(boundaries)
        attention = self.config.attention_for(
            training=self.training,
            output_attentions=output_attentions,
            tracing=not paddle.in_dynamic_mode(),
            packed=boundaries is not None,
            padding_counts=padding_counts and boundaries is None,  # packed input has no padding
        )
        packed: Packing | None = None
        if attention != "eager":
            if boundaries is None:
                packed = packing(batch, seq, attention_mask)
            else:
                packed = Packing([np.arange(length) for length in np.diff(boundaries)])
            position_ids = packed.pack(position_ids.expand([batch, seq]))  # [1 total]
            input_ids, inputs_embeds = (None if x is None else packed.pack(x) for x in (input_ids, inputs_embeds))
        hidden_states = self.embeddings(input_ids, inputs_embeds)  # [batch seq hidden], or [1 total hidden] if packed
        dtype = hidden_states.dtype
        kinds = sorted(set(self.config.layer_types))
        positions = {kind: self.rotary_emb[kind](position_ids, dtype) for kind in kinds}
        arguments: dict[str, tuple[Any, ...]]  # of a layer, after the hidden states
        windows = {FULL: None, SLIDING: self.config.local_attention // 2}
        if packed is None:
            padding = attention_mask if boundaries is None else None  # packed input has none
            rest = () if boundaries is None else (None, same_sequence(boundaries))
            biases = {kind: attention_bias(padding, seq, windows[kind], dtype) for kind in kinds}
            arguments = {kind: (positions[kind], biases[kind], output_attentions, *rest) for kind in kinds}
        elif attention == "flash":
            rows = {kind: paddle.to_tensor(mask_rows(packed.spans, windows[kind])) for kind in kinds}
            arguments = {kind: (rotation(*positions[kind]), None, False, None, None, rows[kind]) for kind in kinds}
        else:
            arguments = {kind: (rotation(*positions[kind]), None, False, packed.spans) for kind in kinds}

        def restored(states: paddle.Tensor) -> paddle.Tensor:
            return states if packed is None else packed.restore(states)  # [batch seq hidden]

        all_hidden_states: tuple[paddle.Tensor, ...] = ()
        all_attentions: tuple[paddle.Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states += (restored(hidden_states),)
            hidden_states = self._run(layer, hidden_states, *arguments[layer.attention_type])
            if output_attentions:
                hidden_states, probabilities = hidden_states
                if degree_of(self.config) > 1:
                    probabilities = gathered(probabilities, rank_group(), axis=1)
                all_attentions += (probabilities,)
        hidden_states = restored(self.final_norm(hidden_states))
        if output_hidden_states:
            all_hidden_states += (hidden_states,)
        output = BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class ModernBertForMaskedLM(ModernBertPretrainedModel):
    """The encoder with a language-modeling head.

    Args:
        config: The model's configuration. With `tie_word_embeddings` the decoder's weight is the token embedding.
    """

    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"^decoder\.weight$"]

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.model = ModernBertModel(config)
        self.head = ModernBertPredictionHead(config)
        tied = self.model.get_input_embeddings() if config.tie_word_embeddings else None
        self.decoder = ModernBertDecoder(config, tied)
        self._keys_to_ignore_on_save = ["decoder.weight"] if config.tie_word_embeddings else None

    def get_output_embeddings(self) -> ModernBertDecoder:
        """The decoder."""
        return self.decoder

    def set_output_embeddings(self, value: ModernBertDecoder) -> None:
        """Replace the decoder."""
        self.decoder = value

    def forward(
        self,
        input_ids: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        inputs_embeds: paddle.Tensor | None = None,
        labels: paddle.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: paddle.Tensor | None = None,
    ) -> Any:
        """Predict tokens.

        Args:
            input_ids: As in `ModernBertModel`, like the other arguments not listed here.
            labels: [batch seq], token ids; positions equal to -100 do not count. [1 total] if the input is packed.

        Returns:
            `loss` (scalar, mean over the positions that count; only with labels), `logits` [batch seq vocab], then
            what was asked for. With `config.sparse_prediction` and labels, logits only of the positions that count:
            [positions vocab].
        """
        if return_dict is None:
            return_dict = self.config.use_return_dict
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
        )
        hidden_states = outputs.last_hidden_state  # [batch seq hidden]
        if self.config.sparse_prediction and labels is not None:
            labels = labels.flatten()
            counted = (labels != self.config.sparse_pred_ignore_index).nonzero().flatten()
            hidden_states = hidden_states.flatten(0, 1).index_select(counted)  # [positions hidden]
            labels = labels.index_select(counted)  # [positions]
        logits = self.decoder(self.head(hidden_states))  # [batch seq vocab] or [positions vocab]
        loss = None
        if labels is not None:
            flat = logits.reshape([-1, self.config.vocab_size]).astype("float32")
            loss = cross_entropy(flat, labels.flatten())
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if return_dict else output.to_tuple()
