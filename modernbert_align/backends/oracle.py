"""What the reference would compute without rounding: ModernBERT in float64, from its configuration and its weights.

Casting the reference to float64 does not give this: transformers rotates in float32, takes frequencies, angles and the
softmax in float32, and losses from float32 logits. Nothing here is ever narrower than float64, except the one sum that
`Oracle.isolated` has to repeat as the reference rounded it.

Axes in the shape comments:
    batch, seq          sequences (for multiple choice: all choices), and tokens per sequence (padded)
    hidden              config.hidden_size
    heads, head_dim     heads * head_dim == hidden
    inter               config.intermediate_size

Source: transformers 5.23.0, models/modernbert/modeling_modernbert.py, modeling_rope_utils.py, loss/loss_utils.py.
"""

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.model_config import SLIDING, ModelConfig, RopeScaling
from modernbert_align.core.training import EMBEDDED

_BLOCK = 1 << 22  # float64 elements of a weight, of attention scores or of logits that are held at a time: 32 MB
# F.gelu is the exact one (erf)
_ACTIVATIONS: Mapping[str, Callable[..., torch.Tensor]] = {"gelu": F.gelu, "silu": F.silu}
_POOLED = ("sequence_classification", "multiple_choice")
_IGNORED = -100


class Oracle:
    """The reference's modules in float64.

    Weights are widened where they are used, a block at a time, and not kept. Returned tensors may share memory with
    arguments or with each other: read them only. The methods named after modules take what the module takes, in any
    float dtype, and return its output. Gradients of `accumulated` can be taken, if its weights are float64.

    Args:
        config: The architecture.
        head: As in `configs/probes/`, for example `masked_lm`; `base` is the encoder alone.
        reference: The transformers model; its parameters are used in the dtype they have.
    """

    def __init__(self, config: ModelConfig, head: str, reference: torch.nn.Module) -> None:
        self._config = config
        self._head = head
        self._model: Any = reference
        self._body: Any = reference if head == "base" else reference.model

    def accumulated(
        self, inputs: Inputs, sums: torch.dtype = torch.float64
    ) -> Generator[tuple[str, torch.Tensor], torch.Tensor | None, None]:
        """The whole forward pass, every module on the oracle's own values or on those sent instead of them.

        Args:
            inputs: What the models are run on.
            sums: What the input of a feed-forward norm is rounded to. It is a sum of two probes' values; where those
                are the reference's, sent, so must their sum be (see `isolated`).

        Yields:
            Probe name and value, float64, in execution order and shaped like the reference's; before them the embedded
            tokens, and the loss last, where the inputs have labels.
        """
        mask = torch.from_numpy(inputs.attention_mask)  # [batch seq]
        x = yield from _at(EMBEDDED, self.embedded(torch.from_numpy(inputs.input_ids)))  # [batch seq hidden]
        x = yield from _at("embeddings", self.norm(x, self._body.embeddings.norm))
        for i in range(self._config.num_hidden_layers):
            normed = yield from _at(f"layers.{i}.attn_norm", self.attn_norm(i, x))
            attended = yield from _at(f"layers.{i}.attn", self.attn(i, normed, mask))
            x = _rounded(x + attended, sums)
            normed = yield from _at(f"layers.{i}.mlp_norm", self.mlp_norm(i, x))
            transformed = yield from _at(f"layers.{i}.mlp", self.mlp(i, normed))
            x = yield from _at(f"layers.{i}", x + transformed)
        x = yield from _at("final_norm", self.final_norm(x))
        if self._head != "base":
            x = yield from _at("head", self.head(self.pooled(x, mask)))
            x = yield from _at("logits", self.logits(x))
        yield from self.outputs(x).items()
        if inputs.labels:
            yield "loss", self.loss(x, inputs.labels)

    @torch.no_grad()
    def isolated(self, probe: str, inputs: Inputs, recorded: Mapping[str, torch.Tensor | Floats]) -> torch.Tensor:
        """One probe from the values that the reference's modules before it returned.

        This is what a candidate is asked for when every module's output is replaced by the reference's: a layer is its
        input plus the reference's attention plus the reference's feed-forward block; a pooled head starts at the final
        norm, since pooling is no module; the loss starts at the logits. The feed-forward norm starts at the sum of two
        recorded values in the reference's dtype, which is what the reference gave it: one addition rounds alike
        everywhere, so it is no part of anyone's error.

        Args:
            probe: Name of the probe, as `accumulated` yields it.
            inputs: What the reference was run on.
            recorded: Probe name -> the reference's output, in its own dtype or wider. Needed are only those that the
                probe starts from.

        Returns:
            The value in float64, shaped like the reference's.

        Raises:
            KeyError: A value that the probe starts from is not among the recorded ones, or there is no such probe.
        """
        mask = torch.from_numpy(inputs.attention_mask)  # [batch seq]

        def given(name: str) -> torch.Tensor:
            return torch.as_tensor(recorded[name])

        def before(layer: int) -> torch.Tensor:
            return given(f"layers.{layer - 1}" if layer else "embeddings")

        match probe.split("."):
            case [str(name)] if name == EMBEDDED:
                return self.embedded(torch.from_numpy(inputs.input_ids))
            case ["embeddings"]:
                return self.embeddings(torch.from_numpy(inputs.input_ids))
            case ["layers", index]:
                x = _wide(before(int(index)))
                return x + _wide(given(f"{probe}.attn")) + _wide(given(f"{probe}.mlp"))
            case ["layers", index, "attn_norm"]:
                return self.attn_norm(int(index), before(int(index)))
            case ["layers", index, "attn"]:
                return self.attn(int(index), given(f"{probe}_norm"), mask)
            case ["layers", index, "mlp_norm"]:
                dtype = self._body.embeddings.tok_embeddings.weight.dtype
                attended = given(f"layers.{index}.attn").to(dtype)
                return self.mlp_norm(int(index), before(int(index)).to(dtype) + attended)
            case ["layers", index, "mlp"]:
                return self.mlp(int(index), given(f"{probe}_norm"))
            case ["final_norm"]:
                return self.final_norm(before(self._config.num_hidden_layers))
            case ["head"]:
                return self.head(self.pooled(given("final_norm"), mask))
            case ["logits"]:
                return self.logits(given("head"))
            case ["loss"]:
                return self.loss(given("logits"), inputs.labels)
            case _:
                return self.outputs(given("final_norm" if self._head == "base" else "logits"))[probe]

    def embedded(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch seq] ids -> [batch seq hidden], not normalised."""
        return _wide(F.embedding(input_ids, self._body.embeddings.tok_embeddings.weight))

    def embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch seq] ids -> [batch seq hidden]."""
        return self.norm(self.embedded(input_ids), self._body.embeddings.norm)

    def attn_norm(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """[batch seq hidden] -> same shape; the first layer has no norm here."""
        return self.norm(x, self._body.layers[layer].attn_norm) if layer else _wide(x)

    def attn(self, layer: int, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Self-attention with rotary positions, a block of queries at a time.

        A query that sees nothing (padding among padding) weighs all positions alike, as in the reference, where adding
        the lowest float to every score makes them equal.

        Args:
            layer: Index of the layer; decides between full and sliding attention.
            x: The normalised hidden states, [batch seq hidden].
            attention_mask: [batch seq], 1 at real tokens.

        Returns:
            [batch seq hidden].

        Source: transformers 5.23.0, modeling_modernbert.py, ModernBertAttention and eager_attention_forward.
        """
        module = self._body.layers[layer].attn
        batch, seq = x.shape[:2]
        q, k, v = self.positioned(
            layer, *self.split(self.linear(_wide(x), module.Wqkv))
        )  # each [batch heads seq head_dim]
        q, heads = q * self.scale(), q.shape[1]
        reach = self.reach(layer, seq)
        real = attention_mask.bool()[:, None, None, :]  # [batch 1 1 seq]
        everywhere = v.mean(dim=2, keepdim=True)  # [batch heads 1 head_dim]
        mixed = torch.empty(batch, seq, heads, v.shape[-1], dtype=torch.float64)
        positions = torch.arange(seq)
        rows = max(1, _BLOCK // (batch * heads * seq))
        for start in range(0, seq, rows):
            stop = min(start + rows, seq)
            near = slice(max(0, start - reach), min(seq, stop + reach))  # no query of the block sees further
            back = positions[start:stop, None] - positions[None, near]  # [rows keys]
            seen = real[..., near] & self.visible(layer, back)  # [batch 1 rows keys]
            weights = self.weights(q[:, :, start:stop] @ k[:, :, near].mT, seen)  # [batch heads rows keys]
            block = weights @ v[:, :, near]  # [batch heads rows head_dim]
            block = torch.where(seen.any(dim=-1, keepdim=True), block, everywhere)
            mixed[:, start:stop] = block.transpose(1, 2)
        return self.linear(self.merged(mixed), module.Wo)

    # What `attn`, `mlp` and `head` decide on their way, each by itself so that it can be decided otherwise; see
    # hypotheses.py.

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [batch heads seq head_dim], out of Wqkv's output [batch seq 3*hidden]."""
        config = self._config
        q, k, v = qkv.unflatten(-1, (3, config.num_attention_heads, config.head_dim)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def positioned(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values once they know their positions, same shapes."""
        cos, sin = self.tables(layer, np.arange(q.shape[2]))
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin), v

    def tables(self, layer: int, positions: npt.NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines of every position's angles, each [seq head_dim/2]."""
        angles = positions[:, None] * self.frequencies(layer)  # [seq head_dim/2]
        size = _rotation_size(self._config.rope_scaling(self._config.layer_types[layer]))
        return torch.from_numpy(np.cos(angles) * size), torch.from_numpy(np.sin(angles) * size)

    def frequencies(self, layer: int) -> npt.NDArray[np.float64]:
        """How far each pair of dimensions turns per position, in radians, [head_dim/2]."""
        config, kind = self._config, self._config.layer_types[layer]
        return _frequencies(config.head_dim, config.rope_theta(kind), config.rope_scaling(kind))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn the pairs made of the two halves of the last axis, [batch heads seq head_dim] -> same shape."""
        first, second = x.chunk(2, dim=-1)  # each [batch heads seq head_dim/2]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self._config.head_dim**-0.5)

    def reach(self, layer: int, seq: int) -> int:
        """How far no query of a layer sees beyond."""
        return self._config.half_window if self._config.layer_types[layer] == SLIDING else seq

    def visible(self, layer: int, back: torch.Tensor) -> torch.Tensor:
        """Whether a query sees a key so many positions back (negative: ahead), same shape, bool."""
        if self._config.layer_types[layer] == SLIDING:
            return back.abs() <= self._config.half_window
        return torch.ones_like(back, dtype=torch.bool)

    def weights(self, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Attention weights, [batch heads rows keys]; those of a query that sees nothing are not used.

        Args:
            scores: Same shape; may be overwritten.
            seen: [batch 1 rows keys].
        """
        blind = ~seen.any(dim=-1, keepdim=True)  # left unmasked, so that its gradient is a number
        return scores.masked_fill_(~(seen | blind), -math.inf).softmax(dim=-1)

    def merged(self, mixed: torch.Tensor) -> torch.Tensor:
        """[batch seq heads head_dim] -> [batch seq hidden]."""
        return mixed.flatten(-2)

    def gated(self, value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The feed-forward block between its two projections, [batch seq inter] -> same shape."""
        return self.activation(self._config.hidden_activation, value) * gate

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The activation function that the configuration calls `name`."""
        return _ACTIVATIONS[name](x)

    def mlp_norm(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """[batch seq hidden] -> same shape."""
        return self.norm(x, self._body.layers[layer].mlp_norm)

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """[batch seq hidden] -> same shape: Wo(act(value) * gate) for the two halves of Wi's output."""
        module = self._body.layers[layer].mlp
        value, gate = self.linear(_wide(x), module.Wi).chunk(2, dim=-1)  # each [batch seq inter]
        return self.linear(self.gated(value, gate), module.Wo)

    def layer(self, layer: int, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """A whole layer, [batch seq hidden] -> same shape: x + attn(norm(x)), then that + mlp(norm(that)).

        Args:
            layer: Index of the layer.
            x: [batch seq hidden].
            attention_mask: [batch seq], 1 at real tokens.
        """
        x = _wide(x)
        x = x + self.attn(layer, self.attn_norm(layer, x), attention_mask)
        return x + self.mlp(layer, self.mlp_norm(layer, x))

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """[batch seq hidden] -> same shape."""
        return self.norm(x, self._body.final_norm)

    def pooled(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What the head takes: one vector per sequence for heads that judge sequences, else the tokens unchanged.

        Args:
            x: The final norm's output, [batch seq hidden].
            attention_mask: [batch seq], 1 at real tokens.

        Returns:
            [batch hidden] or [batch seq hidden]. With `cls` pooling the first token, for multiple choice the first that
            is not padding.
        """
        x = _wide(x)
        if self._head not in _POOLED:
            return x
        if self._config.classifier_pooling == "mean":
            real = attention_mask.to(torch.float64).unsqueeze(-1)  # [batch seq 1]
            return (x * real).sum(dim=1) / real.sum(dim=1)
        if self._head == "multiple_choice":
            return x[torch.arange(len(x)), attention_mask.argmax(dim=-1)]
        return x[:, 0]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """[... hidden] -> same shape: norm(act(dense(x)))."""
        module = self._model.head
        return self.norm(
            self.activation(self._config.classifier_activation, self.linear(_wide(x), module.dense)), module.norm
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The head's output through the decoder or classifier, [... hidden] -> [... vocab] or [... labels]."""
        return self.linear(_wide(x), self._model.decoder if self._head == "masked_lm" else self._model.classifier)

    def outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the whole model returns beside the loss.

        Args:
            x: The logits; for `base` the final norm's output.

        Returns:
            Probe name -> value: `start_logits` and `end_logits` [batch seq] for question answering, else `output`,
            which for multiple choice is [1 choices].
        """
        x = _wide(x)
        if self._head == "question_answering":
            start, end = x.unbind(-1)
            return {"start_logits": start, "end_logits": end}
        return {"output": x.reshape(1, -1) if self._head == "multiple_choice" else x}

    def loss(self, logits: torch.Tensor, labels: Mapping[str, npt.NDArray[Any]]) -> torch.Tensor:
        """The loss of the model's head, a scalar.

        Args:
            logits: As `logits` returns them, for every position.
            labels: What the model takes, by argument name; see `Inputs.labels`.

        Source: transformers 5.23.0, loss/loss_utils.py, and the heads in modeling_modernbert.py.
        """
        config, logits = self._config, _wide(logits)
        if self._head == "question_answering":
            seq = logits.shape[1]  # positions beyond the sequence do not count
            start, end = (torch.from_numpy(labels[f"{edge}_positions"]).clamp(0, seq) for edge in ("start", "end"))
            return (_cross_entropy(logits[..., 0], start, seq) + _cross_entropy(logits[..., 1], end, seq)) / 2
        target = torch.from_numpy(labels["labels"])
        if self._head == "multiple_choice":
            return _cross_entropy(logits.reshape(len(target), -1), target)
        if self._head == "masked_lm" and config.sparse_prediction:
            target = target.masked_fill(target == config.sparse_pred_ignore_index, _IGNORED)
        if self._head == "sequence_classification":
            kind = config.problem_type
            if kind is None:
                whole = target.dtype in (torch.int64, torch.int32)
                kind = "single_label_classification" if whole else "multi_label_classification"
                kind = "regression" if config.num_labels == 1 else kind
            if kind == "regression":
                return F.mse_loss(logits.flatten(), _wide(target).flatten())
            if kind == "multi_label_classification":
                return F.binary_cross_entropy_with_logits(logits, _wide(target))
        return _cross_entropy(logits.flatten(0, -2), target.flatten())

    def linear(self, x: torch.Tensor, module: Any) -> torch.Tensor:
        """A Linear module's output, [... in] -> [... out]; `x` is float64."""
        return linear(x, module)

    def norm(self, x: torch.Tensor, module: Any) -> torch.Tensor:
        """LayerNorm over the last axis, same shape."""
        bias = None if module.bias is None else _wide(module.bias)
        return F.layer_norm(_wide(x), x.shape[-1:], _wide(module.weight), bias, self._config.norm_eps)


def _at(probe: str, value: torch.Tensor) -> Generator[tuple[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """Yield a probe's value; returns that or what was sent for it."""
    sent = yield probe, value
    return value if sent is None else sent


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `x` rounded to another dtype, with the gradient of `x`."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The same values in float64; a gradient is only taken through what is float64 already."""
    return x if x.dtype == torch.float64 else x.detach().to(torch.float64)


def linear(x: torch.Tensor, module: Any) -> torch.Tensor:
    """[... in] -> [... out], with a block of the output features' weights widened at a time."""
    weight, bias = module.weight, module.bias  # [out in], [out]
    rows = max(1, _BLOCK // weight.shape[1])

    def block(part: slice) -> torch.Tensor:
        return F.linear(x, _wide(weight[part]), None if bias is None else _wide(bias[part]))

    if rows >= len(weight):
        return block(slice(None))
    out = torch.empty(*x.shape[:-1], len(weight), dtype=torch.float64)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        out[..., part] = block(part)
    return out


def _frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> npt.NDArray[np.float64]:
    """How far each pair of dimensions turns per position, in radians, [head_dim/2].

    YaRN leaves alone what turns more than `beta_fast` times within the original length, divides by the factor what
    turns less than `beta_slow` times, and mixes the two linearly, by dimension, in between.

    Source: transformers 5.23.0, modeling_rope_utils.py, _compute_linear_scaling_rope_parameters and
        _compute_yarn_parameters; modeling_modernbert.py, compute_default_rope_parameters.
    """
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # [head_dim/2]
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    original = scaling.original_max_position_embeddings
    assert original is not None  # set when the configuration is read

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension(scaling.beta_fast or 32)), 0)
    last: float = min(math.ceil(dimension(scaling.beta_slow or 1)), head_dim - 1)
    if first == last:
        last += 0.001  # as in the reference
    share = np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)
    return slow * share + plain * (1 - share)


def _rotation_size(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by; other than 1 only with YaRN.

    Source: transformers 5.23.0, modeling_rope_utils.py, _compute_yarn_parameters.
    """
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(max(scaling.factor, 1.0))
    if scaling.mscale and scaling.mscale_all_dim:
        return (scaling.mscale * growth + 1.0) / (scaling.mscale_all_dim * growth + 1.0)
    return growth + 1.0


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignored: int = _IGNORED) -> torch.Tensor:
    """Mean over the labels that count, not a number if none does; [positions classes], [positions] -> scalar."""
    counted = (labels != ignored).nonzero().squeeze(-1)
    losses = [torch.zeros(0, dtype=torch.float64)]
    for part in counted.split(max(1, _BLOCK // logits.shape[-1])):
        block = logits[part]  # [part classes]
        losses.append(block.logsumexp(dim=-1) - block.gather(-1, labels[part, None]).squeeze(-1))
    return torch.cat(losses).mean()
