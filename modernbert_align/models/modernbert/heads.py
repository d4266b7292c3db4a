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
    ) -> Any:
        """Classify.

        Args:
            input_ids: As in `ModernBertModel`, like the other arguments not listed here.
            labels: See `losses.classification_loss`.

        Returns:
            `loss` (with labels), `logits` [batch num_labels], then what was asked for.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state  # [batch seq hidden]
        if self.config.classifier_pooling == "cls":
            pooled = hidden_states[:, 0]  # [batch hidden]
        else:
            pooled = mean_pooling(hidden_states, attention_mask)  # [batch hidden]
        logits = self.classify(pooled)  # [batch num_labels]
        loss = None
        if labels is not None:
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
    ) -> Any:
        """Classify tokens.

        Args:
            input_ids: As in `ModernBertModel`, like the other arguments not listed here.
            labels: [batch seq]; -100 does not count.

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
    ) -> Any:
        """Score every token as start and as end of the span.

        Args:
            input_ids: As in `ModernBertModel`, like the other arguments not listed here.
            start_positions, end_positions: [batch]; positions beyond the sequence do not count.

        Returns:
            `loss` (with both positions), `start_logits` and `end_logits` [batch seq], then what was asked for.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classify(outputs.last_hidden_state)  # [batch seq 2]
        start_logits, end_logits = logits.unbind(-1)  # each [batch seq]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start_logits, end_logits, start_positions, end_positions)
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
    ) -> Any:
        """Score choices.

        Args:
            input_ids: [batch choices seq]; exactly one of this and `inputs_embeds`.
            attention_mask, position_ids: [batch choices seq].
            inputs_embeds: [batch choices seq hidden].
            labels: [batch], index of the right choice.

        Returns:
            `loss` (with labels), `logits` [batch choices], then what was asked for.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds` were given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        choices = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
        if attention_mask is not None:
            attention_mask = attention_mask.flatten(0, 1)  # [batch*choices seq]
        outputs = self.model(
            None if input_ids is None else input_ids.flatten(0, 1),
            attention_mask=attention_mask,
            position_ids=None if position_ids is None else position_ids.flatten(0, 1),
            inputs_embeds=None if inputs_embeds is None else inputs_embeds.flatten(0, 1),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state  # [batch*choices seq hidden]
        if self.config.classifier_pooling == "mean":
            pooled = mean_pooling(hidden_states, attention_mask)  # [batch*choices hidden]
        elif attention_mask is None:
            pooled = hidden_states[:, 0]  # [batch*choices hidden]
        else:
            rows = paddle.arange(hidden_states.shape[0])
            first = attention_mask.astype("int64").argmax(axis=-1)  # [batch*choices]
            pooled = rounded(
                paddle.gather_nd, hidden_states, paddle.stack([rows, first], axis=-1)
            )  # [batch*choices hidden]
        logits = self.classify(pooled).reshape([-1, choices])  # [batch choices]
        loss = None if labels is None else cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()
