"""Task heads of ModernBERT: sequence and token classification, question answering, multiple choice.

Axes in the shape comments are those of attention.py.

Source: transformers 5.23.0, models/modernbert/modeling_modernbert.py.
"""

from typing import Any

import paddle
from paddle import nn
from paddlenlp.transformers.model_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from modernbert_align.errors import UsageError
from modernbert_align.models.modernbert.blockwise import Indices
from modernbert_align.models.modernbert.boundaries import check_targets, packed_pooling, sequence_boundaries
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.layers import Linear, ModernBertPredictionHead
from modernbert_align.models.modernbert.losses import classification_loss, cross_entropy, span_loss
from modernbert_align.models.modernbert.modeling import ModernBertModel, ModernBertPretrainedModel
from modernbert_align.models.modernbert.precision import rounded

__all__ = [
    "ModernBertForMultipleChoice",
    "ModernBertForQuestionAnswering",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
]


class _ClassifierModel(ModernBertPretrainedModel):
    """The encoder, the prediction head, dropout and a linear classifier."""

    def __init__(self, config: ModernBertConfig, num_outputs: int) -> None:
        super().__init__(config)
        self.model = ModernBertModel(config)
        self.head = ModernBertPredictionHead(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(config.hidden_size, num_outputs, bias=True)

    def classify(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """[... hidden] -> [... num_outputs]."""
        return self.classifier(self.drop(self.head(hidden_states)))

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.use_return_dict if return_dict is None else return_dict)


def mean_pooling(hidden_states: paddle.Tensor, attention_mask: paddle.Tensor | None) -> paddle.Tensor:
    """Mean over the real tokens.

    Args:
        hidden_states: [batch seq hidden].
        attention_mask: [batch seq]; None counts every token.

    Returns:
        [batch hidden].
    """
    if attention_mask is None:
        attention_mask = paddle.ones(hidden_states.shape[:2], dtype="int64")
    dtype = hidden_states.dtype
    kept = rounded(paddle.multiply, hidden_states, attention_mask.astype("float32").astype(dtype).unsqueeze(-1))
    total = rounded(paddle.sum, kept, axis=1)  # [batch hidden]
    count = attention_mask.sum(axis=1, keepdim=True).astype("float32").astype(dtype)  # [batch 1]
    return rounded(paddle.divide, total, count)


class ModernBertForSequenceClassification(_ClassifierModel):
    """Classifies or scores whole sequences; `classifier_pooling` is the first token (`cls`) or the `mean`.

    Args:
        config: The model's configuration; `num_labels` and `problem_type` decide the loss.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config, config.num_labels)

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
        """Classify.

        Args:
            input_ids: As in `ModernBertModel`, like the other arguments not listed here.
            labels: See `losses.classification_loss`; if the input is packed, one for each of its sequences.

        Returns:
            `loss` (with labels), `logits` [batch num_labels], or [sequences num_labels] if the input is packed, then
            what was asked for.
        """
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
        boundaries = sequence_boundaries(hidden_states.shape, cu_seqlens, position_ids, attention_mask)
        if boundaries is not None:
            pooled = packed_pooling(hidden_states, boundaries, self.config.classifier_pooling)  # [sequences hidden]
        elif self.config.classifier_pooling == "cls":
            pooled = hidden_states[:, 0]  # [batch hidden]
        else:
            pooled = mean_pooling(hidden_states, attention_mask)  # [batch hidden]
        logits = self.classify(pooled)  # [batch num_labels] or [sequences num_labels]
        loss = None
        if labels is not None:
            if boundaries is not None:
                check_targets("labels", labels, boundaries)
            loss = classification_loss(logits, labels, self.config.num_labels, self.config.problem_type)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


class ModernBertForTokenClassification(_ClassifierModel):
    """Classifies every token.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config, config.num_labels)

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
        """Classify tokens.

        Args:
            input_ids: As in `ModernBertModel`, like the other arguments not listed here.
            labels: [batch seq], or [1 total] if the input is packed; -100 does not count.

        Returns:
            `loss` (with labels), `logits` [batch seq num_labels], then what was asked for.
        """
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
        logits = self.classify(outputs.last_hidden_state)  # [batch seq num_labels]
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.reshape([-1, self.config.num_labels]), labels.flatten())
        output = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


class ModernBertForQuestionAnswering(_ClassifierModel):
    """Finds the span that answers a question.

    Args:
        config: The model's configuration; `num_labels` must be 2.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config, config.num_labels)

    def forward(
        self,
        input_ids: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        inputs_embeds: paddle.Tensor | None = None,
        start_positions: paddle.Tensor | None = None,
        end_positions: paddle.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: paddle.Tensor | None = None,
    ) -> Any:
        """Score every token as start and as end of the span.

        Args:
            input_ids: As in `ModernBertModel`, like the other arguments not listed here.
            start_positions, end_positions: [batch]; positions beyond the sequence do not count. [sequences] if the
                input is packed, and counted from the start of each sequence, as if it were alone.

        Returns:
            `loss` (with both positions), `start_logits` and `end_logits` [batch seq], then what was asked for. Packed
            input gives the loss over sequences that were each alone; in a padded batch the logits of padding compete
            with those of the tokens, as in the reference; with `attn_implementation` not given they are computed.
        """
        loss_wanted = start_positions is not None and end_positions is not None
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
            padding_counts=loss_wanted and attention_mask is not None,
        )
        logits = self.classify(outputs.last_hidden_state)  # [batch seq 2]
        start_logits, end_logits = logits.unbind(-1)  # each [batch seq]
        loss = None
        if loss_wanted:
            boundaries = sequence_boundaries(logits.shape, cu_seqlens, position_ids, attention_mask)
            if boundaries is not None:
                check_targets("start_positions", start_positions, boundaries)
                check_targets("end_positions", end_positions, boundaries)
            loss = span_loss(start_logits, end_logits, start_positions, end_positions, boundaries)
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


class ModernBertForMultipleChoice(_ClassifierModel):
    """Scores the choices of a question; `cls` pooling takes the first token that is not padding.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config, 1)

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
        num_choices: int | None = None,
    ) -> Any:
        """Score choices.

        Args:
            input_ids: [batch choices seq], or [1 total] if packed; exactly one of this and `inputs_embeds`.
            attention_mask, position_ids: Like `input_ids`.
            inputs_embeds: [batch choices seq hidden], or [1 total hidden] if packed.
            labels: [batch], index of the right choice.
            cu_seqlens: As in `ModernBertModel`; every choice is a sequence, those of a question side by side.
            num_choices: How many choices a question has; packed input needs it, otherwise it follows from the shape.

        Returns:
            `loss` (with labels), `logits` [batch choices], then what was asked for.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds` were given.
            UsageError: As in `ModernBertModel`; or `num_choices` is not that of the input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1]  # type: ignore[union-attr]
        if len(shape) == 3:
            input_ids, attention_mask, position_ids, inputs_embeds = (
                None if x is None else x.flatten(0, 1)  # [batch*choices seq ...]
                for x in (input_ids, attention_mask, position_ids, inputs_embeds)
            )
        rows = [shape[0] * shape[1], shape[2]] if len(shape) == 3 else shape
        boundaries = sequence_boundaries(rows, cu_seqlens, position_ids, attention_mask)
        choices = _choices(shape, boundaries, num_choices)
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
        hidden_states = outputs.last_hidden_state  # [batch*choices seq hidden]
        if boundaries is not None:
            pooled = packed_pooling(hidden_states, boundaries, self.config.classifier_pooling)  # [sequences hidden]
        elif self.config.classifier_pooling == "mean":
            pooled = mean_pooling(hidden_states, attention_mask)  # [batch*choices hidden]
        elif attention_mask is None:
            pooled = hidden_states[:, 0]  # [batch*choices hidden]
        else:
            places = paddle.arange(hidden_states.shape[0])
            first = attention_mask.astype("int64").argmax(axis=-1)  # [batch*choices]
            pooled = rounded(
                paddle.gather_nd, hidden_states, paddle.stack([places, first], axis=-1)
            )  # [batch*choices hidden]
        logits = self.classify(pooled).reshape([-1, choices])  # [batch choices]
        loss = None if labels is None else cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


def _choices(shape: list[int], boundaries: Indices | None, num_choices: int | None) -> int:
    """How many choices a question has, in a padded batch or in a packed row.

    Raises:
        UsageError: That is not what the input looks like.
    """
    hint = "give [batch, choices, seq]; or one row [1, total] with cu_seqlens and num_choices, each choice a sequence"
    if len(shape) != (3 if boundaries is None else 2):
        kind = "padded" if boundaries is None else "packed"
        raise UsageError(f"{kind} choices cannot have the shape {list(shape)}", hint=hint)
    if boundaries is None:
        if num_choices not in (None, shape[1]):
            raise UsageError(f"num_choices is {num_choices}, but the input has {shape[1]} choices", hint=hint)
        return shape[1]
    sequences = len(boundaries) - 1
    if num_choices is None or num_choices < 1 or sequences % num_choices:
        raise UsageError(f"num_choices is {num_choices}, but the packed row has {sequences} sequences", hint=hint)
    return num_choices
