"""Token embedding, Linear, LayerNorm, the GeGLU block and the decoder, each rounding where the reference rounds."""

import paddle
import paddle.nn.functional as F
from paddle import nn

from modernbert_align.core.processor import let_mkl_use_avx2
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.parallel import (
    ColumnLinear,
    RowLinear,
    VocabularyEmbedding,
    copied,
    degree_of,
    divides_vocabulary,
    drawing_apart,
    gathered,
    rank_group,
)
from modernbert_align.models.modernbert.precision import rounded

let_mkl_use_avx2()

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}  # F.gelu is the exact one (erf)


class Linear(nn.Linear):
    """`paddle.nn.Linear` (weight [in, out]) with the reference's single rounding after the bias."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias_attr=None if bias else False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[... in] -> [... out]."""
        return rounded(F.linear, x, self.weight, self.bias)


def column_linear(config: ModernBertConfig, in_features: int, out_features: int, *, bias: bool) -> nn.Layer:
    """A Linear whose output features are divided among ranks, if there are any."""
    return (Linear if degree_of(config) == 1 else ColumnLinear)(in_features, out_features, bias=bias)


def row_linear(config: ModernBertConfig, in_features: int, out_features: int, *, bias: bool) -> nn.Layer:
    """A Linear whose input features are divided among ranks, if there are any."""
    return (Linear if degree_of(config) == 1 else RowLinear)(in_features, out_features, bias=bias)


class TokenEmbedding(nn.Embedding):
    """Embedding whose padding row is read like any other and gets no gradient from the lookup.

    `paddle.nn.Embedding` with `padding_idx` returns zeros for padding instead of the row; the reference does not.

    Source: torch.nn.Embedding, `padding_idx`.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.pad_token_id = config.pad_token_id

    def forward(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """[batch seq] -> [batch seq hidden]."""
        return _without_gradient_at(self.pad_token_id, input_ids, F.embedding(input_ids, self.weight))


class ParallelTokenEmbedding(VocabularyEmbedding):
    """`TokenEmbedding`, divided by tokens among ranks."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.pad_token_id = config.pad_token_id

    def forward(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """[batch seq] -> [batch seq hidden]."""
        return _without_gradient_at(self.pad_token_id, input_ids, super().forward(input_ids))


def _without_gradient_at(token: int | None, input_ids: paddle.Tensor, embedded: paddle.Tensor) -> paddle.Tensor:
    """[batch seq], [batch seq hidden] -> the same embeddings; none flows back at `token`."""
    if token is None or embedded.stop_gradient:
        return embedded
    there = (input_ids == token).unsqueeze(-1)  # [batch seq 1]
    return rounded(lambda live: paddle.where(there, live.detach(), live), embedded)


def token_embedding(config: ModernBertConfig) -> TokenEmbedding | ParallelTokenEmbedding:
    """The embedding of tokens, divided among ranks if there are any and their number divides the vocabulary."""
    return (ParallelTokenEmbedding if divides_vocabulary(config) else TokenEmbedding)(config)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis; its bias is optional."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config.hidden_size, epsilon=config.norm_eps, bias_attr=None if config.norm_bias else False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[... hidden] -> same shape."""
        return rounded(_layer_norm, x, self.weight, self.bias, self._epsilon)


def _layer_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None, epsilon: float) -> paddle.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


class ModernBertMLP(nn.Layer):
    """Gated feed-forward block: Wo(act(input) * gate), input and gate being the two halves of Wi's output.

    Source: transformers 5.23.0, modeling_modernbert.py, ModernBertMLP.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.Wi = column_linear(config, config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = row_linear(config, config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.divided = degree_of(config) > 1
        self.drop = nn.Dropout(config.mlp_dropout)
        self.act = ACTIVATIONS[config.hidden_activation]

    def forward(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """[batch seq hidden] -> same shape."""
        value, gate = self.Wi(hidden_states).chunk(2, axis=-1)  # each [batch seq inter], or a rank's share of it
        gated = rounded(paddle.multiply, rounded(self.act, value), gate)
        apart = self.divided and self.training and self.drop.p > 0
        return self.Wo(drawing_apart(apart, self.drop, gated))


class ModernBertPredictionHead(nn.Layer):
    """norm(act(dense(x))), in front of every task's last projection.

    Source: transformers 5.23.0, modeling_modernbert.py, ModernBertPredictionHead.
    """

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = ACTIVATIONS[config.classifier_activation]
        self.norm = LayerNorm(config)

    def forward(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """[... hidden] -> same shape."""
        return self.norm(rounded(self.act, self.dense(hidden_states)))


class ModernBertDecoder(nn.Layer):
    """Projection onto the vocabulary. Its weight has the embedding's layout, so that a tied one is the embedding.

    Divided among ranks like the embedding; the logits are whole on every rank.

    Args:
        config: The model's configuration.
        embedding: The token embedding whose weight to share, or None for a weight of its own.
    """

    def __init__(self, config: ModernBertConfig, embedding: nn.Layer | None) -> None:
        super().__init__()
        self.group = rank_group() if divides_vocabulary(config) else None
        rows = config.vocab_size if self.group is None else config.vocab_size // degree_of(config)
        self.weight = embedding.weight if embedding is not None else self.create_parameter([rows, config.hidden_size])
        self.bias = self.create_parameter([rows], is_bias=True) if config.decoder_bias else None
        if self.group is not None:
            for parameter in self.parameters():
                parameter.is_distributed, parameter.split_axis = True, 0

    def forward(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """[... hidden] -> [... vocab]."""
        return rounded(self._logits, hidden_states, self.weight, self.bias)

    def _logits(self, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
        x = x if self.group is None else copied(x, self.group)
        logits = paddle.matmul(x, weight, transpose_y=True)  # [... vocab], or a rank's share of it
        logits = logits if bias is None else logits + bias
        return logits if self.group is None else gathered(logits, self.group)
