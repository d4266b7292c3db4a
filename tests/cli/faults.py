"""Bugs that ports of ModernBERT have had, each as a change to a loaded Paddle model.

Every entry names the probe at which the bug enters; a comparison has to name the same one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import paddle
import paddle.nn.functional as F

from modernbert_align.models.modernbert import attention
from modernbert_align.models.modernbert.layers import LayerNorm


@dataclass(frozen=True)
class Fault:
    """A change to the candidate.

    Attributes:
        inject: Changes the model; also gets pytest's monkeypatch.
        first: The probe the comparison must name first.
        exit_code: What `diff` must return.
        status: What the named row must say, if not merely fail.
    """

    inject: Callable[[Any, Any], None]
    first: str
    exit_code: int = 1
    status: str = ""


def tanh_gelu(model, _):
    for layer in model.model.layers:
        layer.mlp.act = lambda x: F.gelu(x, approximate=True)


def silu(model, _):
    model.model.layers[2].mlp.act = F.silu


def epsilon(model, _):
    for layer in model.sublayers():
        if isinstance(layer, LayerNorm):
            layer._epsilon = 1e-12


def epsilon_in_one_norm(model, _):
    model.model.layers[2].mlp_norm._epsilon = 1e-6


def gate_and_value_swapped(model, _):
    def forward(self, hidden_states):
        gate, value = self.Wi(hidden_states).chunk(2, axis=-1)
        return self.Wo(self.act(value) * gate)

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(forward, layer.mlp)


def thetas_swapped(model, _):
    rotary = model.model.rotary_emb
    a, b = rotary["full_attention"], rotary["sliding_attention"]
    a.inv_freq, b.inv_freq = b.inv_freq, a.inv_freq


def theta_80000(model, _):
    model.model.rotary_emb["full_attention"].inv_freq = attention.inverse_frequencies(16, 80000.0)


def rope_interleaved(model, monkeypatch):
    def rotate(x):
        pairs = x.reshape([*x.shape[:-1], -1, 2])
        return paddle.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)

    monkeypatch.setattr(attention, "rotate_half", rotate)


def window(change):
    def inject(model, _):
        model.config.local_attention += 2 * change

    return inject


def padding_mask_dropped(model, _):
    encode = model.model.forward

    def forward(self, input_ids, attention_mask, **rest):
        return encode(input_ids, **rest)

    model.model.forward = MethodType(forward, model.model)


def eager_with(change):
    def inject(model, monkeypatch):
        original = attention.eager_attention

        def changed(q, k, v, *rest, **named):
            return original(*change(q, k, v), *rest, **named)

        monkeypatch.setattr(attention, "eager_attention", changed)

    return inject


def untransposed(path):
    def inject(model, _):
        weight = dict(model.named_parameters())[f"{path}.weight"]
        weight.set_value(weight.numpy().T.copy())

    return inject


def layers_swapped(model, _):
    layers = model.model.layers
    one, two = layers[1], layers[2]
    layers[1], layers[2] = two, one


def layer_pattern_shifted(model, _):
    kinds = [layer.attention_type for layer in model.model.layers]
    for layer, kind in zip(model.model.layers, kinds[1:] + kinds[:1], strict=True):
        layer.attention_type = kind


def norm_in_layer_0(model, _):
    class Norm(paddle.nn.Layer):
        def forward(self, x):
            return F.layer_norm(x, x.shape[-1:])

    model.model.layers[0].attn_norm = Norm()


def residual_missing(model, _):
    layer = model.model.layers[1]

    def forward(self, hidden_states, position_embeddings, attention_bias=None, output_attentions=False):
        attended, _probabilities = self.attn(self.attn_norm(hidden_states), position_embeddings, attention_bias)
        return attended + self.mlp(self.mlp_norm(hidden_states + attended))

    layer.forward = MethodType(forward, layer)


def nan_output(model, _):
    model.model.layers[2].mlp.act = lambda x: x * float("nan")


def probe_never_ran(model, _):
    mlp = model.model.layers[2].mlp
    inner = mlp.forward

    layer = model.model.layers[2]

    def forward(self, hidden_states, position_embeddings, attention_bias=None, output_attentions=False):
        attended, _probabilities = self.attn(self.attn_norm(hidden_states), position_embeddings, attention_bias)
        hidden_states = hidden_states + attended
        return hidden_states + inner(self.mlp_norm(hidden_states))  # the module's code, not the module

    layer.forward = MethodType(forward, layer)


def extra_output_of_the_model(model, _):
    predict = model.forward

    def forward(self, input_ids, **rest):
        return predict(input_ids, output_hidden_states=True, **rest)

    model.forward = MethodType(forward, model)


def extra_output_of_a_probe(model, _):
    layer = model.model.layers[1]
    attend = layer.attn.forward
    layer.attn.forward = lambda *args: (*attend(*args), paddle.zeros([1]))

    def forward(self, hidden_states, position_embeddings, attention_bias=None, output_attentions=False):
        attended = self.attn(self.attn_norm(hidden_states), position_embeddings, attention_bias)[0]
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))

    layer.forward = MethodType(forward, layer)


def probe_ran_twice(model, _):
    def run_the_norm_once_more(layer, inputs):
        layer.mlp_norm(inputs[0])

    model.model.layers[1].register_forward_pre_hook(run_the_norm_once_more)


def one_element(model, _):
    weight = model.model.layers[3].mlp.Wi.weight
    values = weight.numpy()
    values[7, 11] += 1e-3
    weight.set_value(values)


FAULTS = {
    "tanh GELU": Fault(tanh_gelu, "layers.0.mlp"),
    "SiLU for GELU in one layer": Fault(silu, "layers.2.mlp"),
    "epsilon 1e-12": Fault(epsilon, "embeddings"),
    "epsilon 1e-6 in one norm": Fault(epsilon_in_one_norm, "layers.2.mlp_norm"),
    "gate and value swapped": Fault(gate_and_value_swapped, "layers.0.mlp"),
    "thetas swapped": Fault(thetas_swapped, "layers.0.attn"),
    "theta 80000": Fault(theta_80000, "layers.0.attn"),
    "RoPE interleaved": Fault(rope_interleaved, "layers.0.attn"),
    "window one wider": Fault(window(+1), "layers.1.attn"),
    "window one narrower": Fault(window(-1), "layers.1.attn"),
    "padding mask dropped": Fault(padding_mask_dropped, "layers.0.attn"),
    "scale missing": Fault(eager_with(lambda q, k, v: (q * q.shape[-1] ** 0.5, k, v)), "layers.0.attn"),
    "scale 1 % off": Fault(eager_with(lambda q, k, v: (q * 1.01, k, v)), "layers.0.attn"),
    "keys and values swapped": Fault(eager_with(lambda q, k, v: (q, v, k)), "layers.0.attn"),
    "attn.Wo untransposed": Fault(untransposed("model.layers.1.attn.Wo"), "layers.1.attn"),
    "head.dense untransposed": Fault(untransposed("head.dense"), "head"),
    "two layers swapped": Fault(layers_swapped, "layers.1.attn_norm"),
    "layer pattern shifted": Fault(layer_pattern_shifted, "layers.0.attn"),
    "norm in layer 0": Fault(norm_in_layer_0, "layers.0.attn_norm"),
    "residual missing": Fault(residual_missing, "layers.1"),
    "NaN output": Fault(nan_output, "layers.2.mlp", status="nonfinite"),
    "probe never ran": Fault(probe_never_ran, "layers.2.mlp", exit_code=5, status="missing"),
    "probe ran twice": Fault(probe_ran_twice, "layers.1.mlp_norm", status="extra"),
    "extra output of the model": Fault(extra_output_of_the_model, "output", status="extra"),
    "extra output of a probe": Fault(extra_output_of_a_probe, "layers.1.attn", status="extra"),
    "one weight element off by 1e-3": Fault(one_element, "layers.3.mlp"),
}
