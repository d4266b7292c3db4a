"""Bugs that ports of ModernBERT have had or could have, each as a change to a loaded Paddle model that can be undone.

An injection is a context manager: the bug is in the model inside it, and afterwards the model is what it was, weights
bit for bit. Every entry names the probe at which the bug enters; a comparison has to name the same one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Literal

import paddle
import paddle.nn.functional as F

from modernbert_align.backends import paddle_training
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.rows import Dtype, Phase
from modernbert_align.core.table import Entry
from modernbert_align.core.training import Optimizer
from modernbert_align.models.modernbert import attention, losses, modeling
from modernbert_align.models.modernbert.layers import LayerNorm, Linear
from modernbert_align.models.modernbert.precision import rounded

Weights = Literal["hf-init", "sensitive", "stress"]
Injection = Callable[[Any], AbstractContextManager[None]]

_BOTH: tuple[Dtype, ...] = ("fp32", "bf16")
_ANY: tuple[Weights, ...] = ("hf-init", "sensitive", "stress")
_WITH_HEAD = ("masked_lm", "sequence_classification", "token_classification", "question_answering", "multiple_choice")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A change to the candidate.

    Attributes:
        inject: Changes a loaded model until the context it returns is left.
        first: The probe a comparison must name first.
        status: What the named row must say, if not merely fail.
        verdict: What the comparison must conclude.
        heads: Heads whose models can have it; the first is where it is shown by default.
        needs: Config key -> value that a model must have.
        weights: Kinds of fixture weights that let it show.
        dtypes: Precisions in which it is one; in bf16 it has to be found only where it exceeds rounding.
        cause: The mistake that a comparison must name as the cause; empty where there is nothing to compute it from, or
            it is not known.
        equivalent: Why it changes nothing but rounding; empty for a bug.
    """

    name: str
    inject: Injection
    first: str
    status: str = ""
    verdict: Literal["FAIL", "NOT_COMPARED"] = "FAIL"
    phase: Phase = "forward"
    heads: tuple[str, ...] = ("masked_lm", "base", *_WITH_HEAD[1:])
    needs: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[Weights, ...] = _ANY
    dtypes: tuple[Dtype, ...] = _BOTH
    cause: str = ""
    equivalent: str = ""

    def applies(self, config: ModelConfig, head: str) -> bool:
        """Whether a model has what the fault changes."""
        return head in self.heads and all(getattr(config, key) == value for key, value in self.needs.items())


@contextmanager
def _set(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes (owner, name, value) for the time of the context."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            if name in vars(owner) or not hasattr(type(owner), name):
                stack.callback(setattr, owner, name, getattr(owner, name))
            else:  # a method of the class
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield


@contextmanager
def _weight(parameter: paddle.Tensor, change: Callable[[paddle.Tensor], paddle.Tensor]) -> Iterator[None]:
    """Give a parameter other values, computed in float32, for the time of the context."""
    before = parameter.detach().clone()
    try:
        with paddle.no_grad():
            parameter.set_value(change(before.astype("float32")).astype(parameter.dtype))
        yield
    finally:
        with paddle.no_grad():
            parameter.set_value(before)


def _encoder(model: Any) -> Any:
    return getattr(model, "model", model)


def _layers(model: Any) -> list[Any]:
    return list(_encoder(model).layers)


def _method(owner: Any, function: Callable[..., Any]) -> tuple[Any, str, Any]:
    """`function` as the forward() of `owner`."""
    return owner, "forward", MethodType(function, owner)


def _called_with(model: Any, arguments: Callable[[paddle.Tensor], Mapping[str, Any]]) -> AbstractContextManager[None]:
    """The encoder or the whole model with other arguments: `arguments` gives them for the input ids.

    PaddleNLP looks for three of the parameters by name when forward() is replaced, and drops what it does not find.
    """
    original = model.forward

    def forward(
        _: Any,
        input_ids: paddle.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> Any:
        given = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return original(input_ids, **given | rest | dict(arguments(input_ids)))

    return _set([_method(model, forward)])


def _each(part: str) -> Callable[[Any], list[Any]]:
    """Selects that part of every layer, for example `mlp.Wo`."""
    return lambda model: [_walk(layer, part) for layer in _layers(model)]


def _walk(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name)
    return owner


# Activations, norms and feed-forward blocks


def _activation(path: str, activation: Callable[[paddle.Tensor], paddle.Tensor]) -> Injection:
    """Another activation function in one module."""
    return lambda model: _set([(_walk(_of(model, path), path), "act", activation)])


def _of(model: Any, path: str) -> Any:
    """What a path starts at: `head` and `decoder` are the model's, everything else the encoder's."""
    return model if path.split(".", maxsplit=1)[0] in ("head", "decoder") else _encoder(model)


def _tanh_gelu(model: Any) -> AbstractContextManager[None]:
    return _set((layer.mlp, "act", lambda x: F.gelu(x, approximate=True)) for layer in _layers(model))


def _norms(model: Any) -> list[Any]:
    return [layer for layer in model.sublayers() if isinstance(layer, LayerNorm)]


def _epsilon(model: Any) -> AbstractContextManager[None]:
    return _set((norm, "_epsilon", 1e-12) for norm in _norms(model))


def _epsilon_in_one_norm(model: Any) -> AbstractContextManager[None]:
    return _set([(_layers(model)[2].mlp_norm, "_epsilon", 1e-6)])


def _norm_bias_dropped(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, x: paddle.Tensor) -> paddle.Tensor:
        return rounded(lambda x, w: F.layer_norm(x, x.shape[-1:], w, None, self._epsilon), x, self.weight)

    return _set(_method(norm, forward) for norm in _norms(model))


def _norm_in_bf16(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, x: paddle.Tensor) -> paddle.Tensor:
        centred = rounded(lambda x: x - x.mean(axis=-1, keepdim=True), x)
        variance = rounded(lambda c: (c * c).mean(axis=-1, keepdim=True) + self._epsilon, centred)
        normed = rounded(paddle.multiply, centred, rounded(paddle.rsqrt, variance))
        scaled = rounded(paddle.multiply, normed, self.weight)
        return scaled if self.bias is None else rounded(paddle.add, scaled, self.bias)

    return _set(_method(norm, forward) for norm in _norms(model))


def _skipped(path: str) -> Injection:
    """A module that returns its input."""
    return lambda model: _set([_method(_walk(_encoder(model), path), lambda _, x: x)])


class _PlainNorm(paddle.nn.Layer):
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return rounded(lambda x: F.layer_norm(x, x.shape[-1:]), x)


def _norm_in_layer_0(model: Any) -> AbstractContextManager[None]:
    return _set([(_layers(model)[0], "attn_norm", _PlainNorm())])


def _gate_and_value_swapped(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: paddle.Tensor) -> paddle.Tensor:
        gate, value = self.Wi(hidden_states).chunk(2, axis=-1)
        return self.Wo(rounded(paddle.multiply, rounded(self.act, value), gate))

    return _set(_method(layer.mlp, forward) for layer in _layers(model))


def _bias_dropped(select: Callable[[Any], Iterable[Any]]) -> Injection:
    """Linear modules that ignore their bias."""

    def forward(self: Any, x: paddle.Tensor) -> paddle.Tensor:
        return rounded(F.linear, x, self.weight)

    return lambda model: _set(_method(linear, forward) for linear in select(model))


def _bias_after_rounding(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, x: paddle.Tensor) -> paddle.Tensor:
        return rounded(paddle.add, rounded(F.linear, x, self.weight), self.bias)

    linears = [one for one in model.sublayers() if isinstance(one, Linear) and one.bias is not None]
    return _set(_method(linear, forward) for linear in linears)


def _decoder_bias_dropped(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: paddle.Tensor) -> paddle.Tensor:
        return rounded(lambda x, w: paddle.matmul(x, w, transpose_y=True), hidden_states, self.weight)

    return _set([_method(model.decoder, forward)])


# Positions


def _tables(change: Callable[[paddle.Tensor], paddle.Tensor]) -> Injection:
    """Other tables of cos and sin: `change` is applied to both, as they are computed."""

    def inject(model: Any) -> AbstractContextManager[None]:
        def changed(rotary: Any) -> Callable[..., Any]:
            original = rotary.forward

            def forward(_: Any, position_ids: paddle.Tensor, dtype: Any) -> tuple[paddle.Tensor, ...]:
                return tuple(change(table).astype(dtype) for table in original(position_ids, paddle.float32))

            return forward

        return _set(_method(rotary, changed(rotary)) for rotary in _encoder(model).rotary_emb.values())

    return inject


def _frequencies_in_bf16(model: Any) -> AbstractContextManager[None]:
    def narrow(values: Any) -> Any:
        return paddle.to_tensor(values).astype("bfloat16").astype("float32").numpy()

    return _set((rotary, "inv_freq", narrow(rotary.inv_freq)) for rotary in _encoder(model).rotary_emb.values())


def _thetas_swapped(model: Any) -> AbstractContextManager[None]:
    full, sliding = (_encoder(model).rotary_emb[kind] for kind in ("full_attention", "sliding_attention"))
    return _set([(full, "inv_freq", sliding.inv_freq), (sliding, "inv_freq", full.inv_freq)])


def _theta_80000(model: Any) -> AbstractContextManager[None]:
    rotary = _encoder(model).rotary_emb["full_attention"]
    return _set([(rotary, "inv_freq", attention.inverse_frequencies(2 * len(rotary.inv_freq), 80000.0))])


def _rope_interleaved(_: Any) -> AbstractContextManager[None]:
    def rotate(x: paddle.Tensor) -> paddle.Tensor:
        pairs = x.reshape([*x.shape[:-1], -1, 2])
        return paddle.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)

    return _set([(attention, "rotate_half", rotate)])


def _rope_backwards(_: Any) -> AbstractContextManager[None]:
    original = attention.rotate_half
    return _set([(attention, "rotate_half", lambda x: -original(x))])


def _keys_one_position_ahead(_: Any) -> AbstractContextManager[None]:
    original = attention.apply_rotary_pos_emb

    def apply(
        q: paddle.Tensor, k: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        ahead = [table.astype("float32").roll(-1, axis=1).astype(table.dtype) for table in (cos, sin)]
        return original(q, k, cos, sin)[0], original(q, k, *ahead)[1]

    return _set([(attention, "apply_rotary_pos_emb", apply)])


def _positions(positions: Callable[[int, int], paddle.Tensor]) -> Injection:
    """Other position ids: `positions` gives [batch_or_1 seq] for a batch and a length."""
    return lambda model: _called_with(_encoder(model), lambda input_ids: {"position_ids": positions(*input_ids.shape)})


def _shifted_by_row(batch: int, seq: int) -> paddle.Tensor:
    return paddle.arange(seq).unsqueeze(0) + paddle.arange(1, batch + 1).unsqueeze(1)  # [batch seq]


def _one_left_out(_: int, seq: int) -> paddle.Tensor:
    positions = paddle.arange(seq)
    return (positions + (positions >= seq // 2).astype(positions.dtype)).unsqueeze(0)  # [1 seq]


# Masks


def _window(change: int) -> Injection:
    def inject(model: Any) -> AbstractContextManager[None]:
        config = model.config
        return _set([(config, "local_attention", config.local_attention + 2 * change)])

    return inject


def _window_one_sided(_: Any) -> AbstractContextManager[None]:
    original = attention.sliding_window_keep

    def keep(query_positions: int, half_window: int) -> paddle.Tensor:
        positions = paddle.arange(query_positions)
        past = positions.unsqueeze(0) <= positions.unsqueeze(1)  # [query key]
        return paddle.logical_and(original(query_positions, half_window), past)

    return _set([(attention, "sliding_window_keep", keep)])


def _masks_swapped(model: Any) -> AbstractContextManager[None]:
    original, half_window = attention.attention_bias, model.config.local_attention // 2

    def bias(mask: Any, seq: int, window: int | None, dtype: Any) -> Any:
        return original(mask, seq, half_window if window is None else None, dtype)

    return _set([(modeling, "attention_bias", bias)])


def _bias_as(change: Callable[[paddle.Tensor], paddle.Tensor]) -> Injection:
    """Other values added to the scores: `change` is applied to the mask, in float32."""

    def inject(_: Any) -> AbstractContextManager[None]:
        original = attention.attention_bias

        def bias(*arguments: Any) -> Any:
            right = original(*arguments)
            return None if right is None else change(right.astype("float32")).astype(right.dtype)

        return _set([(modeling, "attention_bias", bias)])

    return inject


def _padding_mask_dropped(model: Any) -> AbstractContextManager[None]:
    return _called_with(_encoder(model), lambda _: {"attention_mask": None})


# Attention


def _eager_with(change: Callable[..., tuple[paddle.Tensor, ...]]) -> Injection:
    """Other queries, keys and values, after their rotation."""

    def inject(_: Any) -> AbstractContextManager[None]:
        original = attention.eager_attention

        def changed(
            q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, *rest: Any
        ) -> tuple[paddle.Tensor, paddle.Tensor]:
            return original(*change(q, k, v), *rest)

        return _set([(attention, "eager_attention", changed)])

    return inject


def _scaled(x: paddle.Tensor, factor: float) -> paddle.Tensor:
    return rounded(paddle.scale, x, scale=factor)


def _values_rotated(_: Any) -> AbstractContextManager[None]:
    original_rotation, original_attention = attention.apply_rotary_pos_emb, attention.eager_attention
    tables: list[paddle.Tensor] = []

    def rotate(q: paddle.Tensor, k: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> Any:
        tables[:] = [cos, sin]
        return original_rotation(q, k, cos, sin)

    def attend(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, *rest: Any) -> Any:
        return original_attention(q, k, original_rotation(v, v, *tables)[0], *rest)

    return _set([(attention, "apply_rotary_pos_emb", rotate), (attention, "eager_attention", attend)])


def _qkv_read_as(layout: str) -> Injection:
    """Wqkv's output split in another order of its axes.

    Args:
        layout: The axes `part`, `head` and `dim` in the order they are read in; `part head dim` is right.
    """
    axes = layout.split()
    order = [axes.index(axis) for axis in ("part", "head", "dim")]

    def inject(model: Any) -> AbstractContextManager[None]:
        def changed(module: Any) -> tuple[Any, str, Any]:
            original = module.Wqkv.forward
            sizes = {"part": 3, "head": module.num_heads, "dim": module.head_dim}

            def forward(_: Any, x: paddle.Tensor) -> paddle.Tensor:
                out = original(x)
                split = out.reshape([*out.shape[:2], *(sizes[axis] for axis in axes)])
                return split.transpose([0, 1, *(2 + axis for axis in order)]).reshape(out.shape)

            return _method(module.Wqkv, forward)

        return _set(changed(layer.attn) for layer in _layers(model))

    return inject


@contextmanager
def _attention_dropout(model: Any) -> Iterator[None]:
    state = paddle.get_rng_state()
    paddle.seed(0)
    original = attention.eager_attention

    def attend(q: Any, k: Any, v: Any, bias: Any, _dropout: float, _training: bool, *rest: Any) -> Any:
        with _set([(F, "softmax", softmax)]):
            return original(q, k, v, bias, 0.0, False, *rest)

    right = F.softmax

    def softmax(scores: paddle.Tensor, axis: int) -> paddle.Tensor:
        return F.dropout(right(scores, axis=axis), p=0.1, training=True)  # in float32: bfloat16 has no kernel

    try:
        with _set([(attention, "eager_attention", attend)]):
            yield
    finally:
        paddle.set_rng_state(state)


# Weights and the order of modules


def _untransposed(path: str) -> Injection:
    return lambda model: _weight(_walk(_of(model, path), path).weight, lambda values: values.t())


def _one_element(model: Any) -> AbstractContextManager[None]:
    def change(values: paddle.Tensor) -> paddle.Tensor:
        changed = values.numpy().copy()
        changed[7, 11] += 1e-3
        return paddle.to_tensor(changed)

    return _weight(_layers(model)[3].mlp.Wi.weight, change)


def _stale_weight(model: Any) -> AbstractContextManager[None]:
    stale = _layers(model)[1].mlp.Wi.weight.astype("float32")
    return _weight(_layers(model)[2].mlp.Wi.weight, lambda _: stale)


@contextmanager
def _layers_swapped(model: Any) -> Iterator[None]:
    layers = _encoder(model).layers
    one, two = layers[1], layers[2]
    layers[1], layers[2] = two, one
    try:
        yield
    finally:
        layers[1], layers[2] = one, two


def _layer_pattern_shifted(model: Any) -> AbstractContextManager[None]:
    layers = _layers(model)
    kinds = [layer.attention_type for layer in layers]
    return _set((layer, "attention_type", kind) for layer, kind in zip(layers, kinds[1:] + kinds[:1], strict=True))


def _residual_missing(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: paddle.Tensor, positions: Any, bias: Any = None, _: bool = False) -> Any:
        attended = self.attn(self.attn_norm(hidden_states), positions, bias)[0]
        transformed = self.mlp(self.mlp_norm(rounded(paddle.add, hidden_states, attended)))
        return rounded(paddle.add, attended, transformed)

    return _set([_method(_layers(model)[1], forward)])


def _residual_after_norm(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: paddle.Tensor, positions: Any, bias: Any = None, _: bool = False) -> Any:
        normed = self.attn_norm(hidden_states)
        normed = self.mlp_norm(rounded(paddle.add, normed, self.attn(normed, positions, bias)[0]))
        return rounded(paddle.add, normed, self.mlp(normed))

    return _set(_method(layer, forward) for layer in _layers(model))


# What is returned, and how often


def _probe_never_ran(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: paddle.Tensor, positions: Any, bias: Any = None, _: bool = False) -> Any:
        attended = self.attn(self.attn_norm(hidden_states), positions, bias)[0]
        hidden_states = rounded(paddle.add, hidden_states, attended)
        transformed = self.mlp.forward(self.mlp_norm(hidden_states))  # the module's code, not the module
        return rounded(paddle.add, hidden_states, transformed)

    return _set([_method(_layers(model)[2], forward)])


def _extra_output_of_the_model(model: Any) -> AbstractContextManager[None]:
    return _called_with(model, lambda _: {"output_hidden_states": True})


def _extra_output_of_a_probe(model: Any) -> AbstractContextManager[None]:
    layer = _layers(model)[1]
    attend = layer.attn.forward

    def forward(self: Any, hidden_states: paddle.Tensor, positions: Any, bias: Any = None, _: bool = False) -> Any:
        attended = self.attn(self.attn_norm(hidden_states), positions, bias)[0]
        hidden_states = rounded(paddle.add, hidden_states, attended)
        return rounded(paddle.add, hidden_states, self.mlp(self.mlp_norm(hidden_states)))

    return _set(
        [
            (layer.attn, "forward", lambda *arguments: (*attend(*arguments), paddle.zeros([1]))),
            _method(layer, forward),
        ]
    )


@contextmanager
def _probe_ran_twice(model: Any) -> Iterator[None]:
    def run_the_norm_once_more(layer: Any, inputs: Any) -> None:
        layer.mlp_norm(inputs[0])

    handle = _layers(model)[1].register_forward_pre_hook(run_the_norm_once_more)
    try:
        yield
    finally:
        handle.remove()


# Heads and losses


def _other_pooling(model: Any) -> AbstractContextManager[None]:
    other = "cls" if model.config.classifier_pooling == "mean" else "mean"
    return _set([(model.config, "classifier_pooling", other)])


def _pooling_counts_padding(_: Any) -> AbstractContextManager[None]:
    from modernbert_align.models.modernbert import heads

    original = heads.mean_pooling
    return _set([(heads, "mean_pooling", lambda hidden_states, _mask: original(hidden_states, None))])


def _loss_over_every_position(_: Any) -> AbstractContextManager[None]:
    original = losses.cross_entropy
    return _set([(modeling, "cross_entropy", lambda logits, labels: original(logits, labels.clip(0)))])


# What only gradients see


@contextmanager
def _decoder_untied(model: Any) -> Iterator[None]:
    tied = model.decoder.weight
    own = paddle.create_parameter(tied.shape, tied.dtype, default_initializer=paddle.nn.initializer.Constant(0.0))
    own.set_value(tied)
    model.decoder.weight = own
    try:
        yield
    finally:
        model.decoder.weight = tied


@contextmanager
def _gradient_zeroed(model: Any) -> Iterator[None]:
    handle = _layers(model)[2].mlp.Wi.weight.register_hook(paddle.zeros_like)
    try:
        yield
    finally:
        handle.remove()


def _detached(path: str) -> Injection:
    """A module whose input is cut off from the gradient."""

    def inject(model: Any) -> AbstractContextManager[None]:
        module = _walk(_encoder(model), path)
        original = module.forward
        return _set([_method(module, lambda _, x, *rest: original(x.detach(), *rest))])

    return inject


def _residual_detached(model: Any) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: paddle.Tensor, positions: Any, bias: Any = None, _: bool = False) -> Any:
        attended = self.attn(self.attn_norm(hidden_states), positions, bias)[0]
        hidden_states = rounded(paddle.add, hidden_states.detach(), attended)
        return rounded(paddle.add, hidden_states, self.mlp(self.mlp_norm(hidden_states)))

    return _set([_method(_layers(model)[2], forward)])


class _GeluOfAnotherGradient(paddle.autograd.PyLayer):
    """The exact GELU with the gradient of its tanh approximation."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        (x,) = ctx.saved_tensor()
        with paddle.enable_grad():
            x = x.detach()
            x.stop_gradient = False
            return paddle.grad(F.gelu(x, approximate=True), x, gradient)[0]


def _tanh_gelu_backward(model: Any) -> AbstractContextManager[None]:
    return _set((layer.mlp, "act", _GeluOfAnotherGradient.apply) for layer in _layers(model))


# What only training sees


def _decayed(chosen: Callable[[Entry, Optimizer], bool]) -> Injection:
    """Another choice of the weights that are decayed."""
    return lambda _: _set(
        [
            (
                paddle_training,
                "decayed_weights",
                lambda entries, settings: {entry.paddle for entry in entries if chosen(entry, settings)},
            )
        ]
    )


def _optimizer_with(**changes: float) -> Injection:
    """AdamW with other numbers."""

    class Masters(paddle_training.Masters):
        def __init__(self, weights: Any, entries: Any, settings: Optimizer) -> None:
            super().__init__(weights, entries, replace(settings, **changes))

    return lambda _: _set([(paddle_training, "Masters", Masters)])


def _decay_in_the_gradient(_: Any) -> AbstractContextManager[None]:
    class Masters(paddle_training.Masters):
        def __init__(self, weights: Any, entries: Any, settings: Optimizer) -> None:
            super().__init__(weights, entries, replace(settings, weight_decay=0.0))
            self._chosen, self._decay = paddle_training.decayed_weights(entries, settings), settings.weight_decay

        def step(self, gradients: Mapping[str, Any]) -> None:
            decayed = {name: self._weights[name].detach() * self._decay for name in self._chosen & set(gradients)}
            super().step({name: g.astype("float32") + decayed.get(name, 0.0) for name, g in gradients.items()})

    return _set([(paddle_training, "Masters", Masters)])


def _masters_in_bf16(_: Any) -> AbstractContextManager[None]:
    class Masters(paddle_training.Masters):
        def copy_to(self, parameters: Mapping[str, Any]) -> None:
            super().copy_to(parameters)
            paddle_training.restore(self._weights, parameters)

    return _set([(paddle_training, "Masters", Masters)])


@contextmanager
def _gradients_not_cleared(model: Any) -> Iterator[None]:
    try:
        with _set([(model, "clear_gradients", lambda set_to_zero=True: None)]):
            yield
    finally:
        model.clear_gradients(set_to_zero=False)


_CATALOGUE = (
    Fault(name="tanh GELU", inject=_tanh_gelu, first="layers.0.mlp", cause="activation"),
    Fault(
        name="SiLU for GELU in one layer",
        inject=_activation("layers.2.mlp", F.silu),
        first="layers.2.mlp",
        cause="activation",
    ),
    Fault(name="epsilon 1e-12", inject=_epsilon, first="embeddings", cause="norm epsilon"),
    Fault(
        name="epsilon 1e-6 in one norm", inject=_epsilon_in_one_norm, first="layers.2.mlp_norm", cause="norm epsilon"
    ),
    Fault(
        name="gate and value swapped",
        inject=_gate_and_value_swapped,
        first="layers.0.mlp",
        cause="gate and value swapped",
    ),
    Fault(name="thetas swapped", inject=_thetas_swapped, first="layers.0.attn", cause="thetas swapped"),
    Fault(name="theta 80000", inject=_theta_80000, first="layers.0.attn", cause="RoPE theta"),
    Fault(name="RoPE interleaved", inject=_rope_interleaved, first="layers.0.attn", cause="RoPE interleaved"),
    Fault(name="window one wider", inject=_window(+1), first="layers.1.attn", cause="window width"),
    Fault(name="window one narrower", inject=_window(-1), first="layers.1.attn", cause="window width"),
    Fault(
        name="padding mask dropped", inject=_padding_mask_dropped, first="layers.0.attn", cause="padding mask missing"
    ),
    Fault(
        name="scale missing",
        inject=_eager_with(lambda q, k, v: (_scaled(q, q.shape[-1] ** 0.5), k, v)),
        first="layers.0.attn",
        cause="attention scale",
    ),
    Fault(
        name="scale 1 % off",
        inject=_eager_with(lambda q, k, v: (_scaled(q, 1.01), k, v)),
        first="layers.0.attn",
        cause="attention scale",
    ),
    Fault(
        name="keys and values swapped",
        inject=_eager_with(lambda q, k, v: (q, v, k)),
        first="layers.0.attn",
        cause="q, k, v order",
    ),
    Fault(
        name="attn.Wo untransposed", inject=_untransposed("layers.1.attn.Wo"), first="layers.1.attn", cause="weights"
    ),
    Fault(
        name="head.dense untransposed",
        inject=_untransposed("head.dense"),
        first="head",
        heads=_WITH_HEAD,
        cause="weights",
    ),
    Fault(name="two layers swapped", inject=_layers_swapped, first="layers.1.attn_norm", cause="weights"),
    Fault(
        name="layer pattern shifted",
        inject=_layer_pattern_shifted,
        first="layers.0.attn",
        cause="layer pattern shifted",
    ),
    Fault(name="norm in layer 0", inject=_norm_in_layer_0, first="layers.0.attn_norm", cause="norm in layer 0"),
    Fault(name="residual missing", inject=_residual_missing, first="layers.1", cause="residual missing"),
    Fault(
        name="NaN output",
        inject=_activation("layers.2.mlp", lambda x: x * float("nan")),
        first="layers.2.mlp",
        status="nonfinite",
    ),
    Fault(
        name="probe never ran",
        inject=_probe_never_ran,
        first="layers.2.mlp",
        status="missing",
        verdict="NOT_COMPARED",
    ),
    Fault(name="probe ran twice", inject=_probe_ran_twice, first="layers.1.mlp_norm", status="extra"),
    Fault(
        name="extra output of the model",
        inject=_extra_output_of_the_model,
        first="output",
        status="extra",
        heads=("masked_lm", "base", "sequence_classification", "token_classification", "multiple_choice"),
    ),
    Fault(name="extra output of a probe", inject=_extra_output_of_a_probe, first="layers.1.attn", status="extra"),
    Fault(name="one weight element off by 1e-3", inject=_one_element, first="layers.3.mlp", cause="weights"),
    Fault(
        name="RoPE tables in bf16",
        inject=_tables(lambda table: table.astype("bfloat16").astype("float32")),
        first="layers.0.attn",
        dtypes=("fp32",),  # in bf16 the reference rounds them as well
        cause="RoPE tables rounded",
    ),
    Fault(
        name="RoPE frequencies in bf16",
        inject=_frequencies_in_bf16,
        first="layers.0.attn",
        cause="RoPE frequencies rounded",
    ),
    Fault(name="RoPE turns the other way", inject=_rope_backwards, first="layers.0.attn", cause="RoPE backwards"),
    Fault(
        name="keys rotated one position ahead",
        inject=_keys_one_position_ahead,
        first="layers.0.attn",
        cause="keys rotated elsewhere",
    ),
    Fault(name="values rotated too", inject=_values_rotated, first="layers.0.attn", cause="values rotated"),
    Fault(name="one position left out", inject=_positions(_one_left_out), first="layers.0.attn"),
    Fault(name="window one-sided", inject=_window_one_sided, first="layers.1.attn", cause="window one-sided"),
    Fault(name="local and global masks swapped", inject=_masks_swapped, first="layers.0.attn", cause="masks swapped"),
    Fault(
        name="mask added as 0 and 1",
        inject=_bias_as(lambda bias: (bias == 0).astype("float32")),
        first="layers.0.attn",
        cause="mask added as 0 and 1",
    ),
    Fault(
        name="norm bias dropped",
        inject=_norm_bias_dropped,
        first="embeddings",
        needs={"norm_bias": True},
        weights=("sensitive", "stress"),
        cause="norm bias missing",
    ),
    Fault(
        name="attention bias dropped",
        inject=_bias_dropped(_each("attn.Wqkv")),
        first="layers.0.attn",
        needs={"attention_bias": True},
        weights=("sensitive", "stress"),
        cause="bias missing",
    ),
    Fault(
        name="MLP bias dropped",
        inject=_bias_dropped(_each("mlp.Wo")),
        first="layers.0.mlp",
        needs={"mlp_bias": True},
        weights=("sensitive", "stress"),
        cause="bias missing",
    ),
    Fault(
        name="decoder bias dropped",
        inject=_decoder_bias_dropped,
        first="logits",
        heads=("masked_lm",),
        needs={"decoder_bias": True},
        weights=("sensitive", "stress"),  # transformers draws it as zeros
        cause="bias missing",
    ),
    Fault(
        name="residual taken after the norm",
        inject=_residual_after_norm,
        first="layers.0",
        cause="residual taken after the norm",
    ),
    Fault(name="embedding norm skipped", inject=_skipped("embeddings.norm"), first="embeddings", cause="norm missing"),
    Fault(name="final norm skipped", inject=_skipped("final_norm"), first="final_norm", cause="norm missing"),
    Fault(
        name="Wqkv read as k, q, v",
        inject=_eager_with(lambda q, k, v: (k, q, v)),
        first="layers.0.attn",
        cause="q, k, v order",
    ),
    Fault(
        name="Wqkv read head by head",
        inject=_qkv_read_as("head part dim"),
        first="layers.0.attn",
        cause="Wqkv read head by head",
    ),
    Fault(
        name="heads interleaved", inject=_qkv_read_as("part dim head"), first="layers.0.attn", cause="heads interleaved"
    ),
    Fault(name="attention dropout left on", inject=_attention_dropout, first="layers.0.attn", cause="random"),
    Fault(name="stale weight in one layer", inject=_stale_weight, first="layers.2.mlp", cause="weights"),
    Fault(
        name="SiLU in the head", inject=_activation("head", F.silu), first="head", heads=_WITH_HEAD, cause="activation"
    ),
    Fault(
        name="cls for mean pooling or reverse",
        inject=_other_pooling,
        first="head",
        heads=_WITH_HEAD[1:2],
        cause="pooling",
    ),
    Fault(
        name="mean pooling counts padding",
        inject=_pooling_counts_padding,
        first="head",
        heads=("sequence_classification", "multiple_choice"),
        needs={"classifier_pooling": "mean"},
        cause="pooling counts padding",
    ),
    Fault(
        name="loss over every position",
        inject=_loss_over_every_position,
        first="loss",
        heads=("masked_lm",),
        needs={"sparse_prediction": False},
        cause="loss over every position",
    ),
    Fault(
        name="bias added after rounding",
        inject=_bias_after_rounding,
        first="layers.0.attn",
        needs={"attention_bias": True},
        dtypes=("bf16",),
    ),
    Fault(name="LayerNorm in bf16 steps", inject=_norm_in_bf16, first="embeddings", dtypes=("bf16",)),
    Fault(
        name="decoder untied",
        inject=_decoder_untied,
        phase="backward",
        first="model.embeddings.tok_embeddings.weight",
        heads=("masked_lm",),
        needs={"tie_word_embeddings": True},
        cause="decoder untied",
    ),
    Fault(
        name="gradient of one weight zeroed",
        inject=_gradient_zeroed,
        phase="backward",
        first="model.layers.2.mlp.Wi.weight",
        cause="gradient zero",
    ),
    Fault(
        name="attention cut off",
        inject=_detached("layers.1.attn"),
        phase="backward",
        first="layers.0",
        cause="attention cut off",
    ),
    Fault(
        name="residual cut off", inject=_residual_detached, phase="backward", first="layers.1", cause="residual cut off"
    ),
    Fault(
        name="gradient of the tanh GELU",
        inject=_tanh_gelu_backward,
        phase="backward",
        first="layers.3.mlp_norm",
        cause="activation gradient",
    ),
    Fault(
        name="weight decay on norms",
        inject=_decayed(lambda entry, settings: settings.decays(entry) or entry.kind == "norm"),
        phase="step",
        first="model.embeddings.norm.weight",
        cause="decay on norms",
    ),
    Fault(
        name="no weight decay",
        inject=_decayed(lambda _entry, _settings: False),
        phase="step",
        first="model.embeddings.tok_embeddings.weight",
        cause="no weight decay",
    ),
    Fault(
        name="weight decay in the gradient",
        inject=_decay_in_the_gradient,
        phase="step",
        first="model.embeddings.tok_embeddings.weight",
        cause="decay in the gradient",
    ),
    Fault(
        name="beta2 0.999",
        inject=_optimizer_with(beta2=0.999),
        phase="step",
        first="model.embeddings.tok_embeddings.weight",
        cause="beta2",
    ),
    Fault(
        name="learning rate 1 % off",
        inject=_optimizer_with(learning_rate=1.01 * Optimizer.learning_rate),
        phase="step",
        first="model.embeddings.tok_embeddings.weight",
        cause="learning rate",
    ),
    Fault(
        name="gradients not cleared",
        inject=_gradients_not_cleared,
        phase="step",
        first="model.embeddings.tok_embeddings.weight",
        cause="gradients not cleared",
    ),
    Fault(
        name="weights kept in bf16",
        inject=_masters_in_bf16,
        phase="step",
        first="model.embeddings.tok_embeddings.weight",
        dtypes=("bf16",),
        cause="weights kept narrow",
    ),
    Fault(
        name="positions shifted by row",
        inject=_positions(_shifted_by_row),
        first="",
        equivalent="RoPE makes scores depend on differences of positions only",
    ),
    Fault(
        name="mask filled with fp16's lowest",
        inject=_bias_as(lambda bias: bias.clip(min=-65504.0)),
        first="",
        heads=tuple(head for head in Fault.heads if head != "question_answering"),  # its loss counts padding as well
        equivalent="exp(-65504 - max) is zero in every format; only padding that sees nothing could tell",
    ),
)


def catalogue() -> Mapping[str, Fault]:
    """Every fault by name."""
    return {fault.name: fault for fault in _CATALOGUE}
