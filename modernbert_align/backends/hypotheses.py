"""What wrong ports of ModernBERT would compute: for every known mistake, the oracle with one decision made otherwise.

A hypothesis is not tried on the candidate, whose code is unknown, but on the float64 oracle. If the candidate makes
that mistake, both differ from the reference by the same, up to rounding.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from modernbert_align.backends.oracle import Oracle, linear
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.model_config import FULL, SLIDING, ModelConfig

_THETAS = (10_000.0, 20_000.0, 40_000.0, 80_000.0, 100_000.0, 160_000.0, 320_000.0, 500_000.0, 1_000_000.0)
_EPSILONS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh GELU": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid GELU": lambda x: x * torch.sigmoid(1.702 * x),
    "erf GELU": F.gelu,
    "SiLU": F.silu,
    "ReLU": F.relu,
    "squared ReLU": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "no activation": lambda x: x,
}
OWN_NAME = {"gelu": "erf GELU", "silu": "SiLU"}
_IGNORED = -100
_REMEMBERED = 8  # outputs of Linear modules

Recorded = Mapping[str, torch.Tensor | Floats]
_Labels = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A mistake and the oracle that makes it.

    Attributes:
        name: The mistake; several hypotheses share it if they differ in a number only.
        value: Which of those, in words; may be empty.
        statement: What the candidate does, as the end of a sentence.
        oracle: Computes what a candidate with this mistake would without rounding.
        number: Where the mistake is a wrong positive number: that number.
        at: The same mistake with another number.
    """

    name: str
    value: str = ""
    statement: str
    oracle: Oracle
    number: float = 0.0
    at: Callable[[float], "Hypothesis"] | None = None


class WithWeights:
    """A reference model of which some weights are others; only the oracle can use it.

    Args:
        module: The reference model.
        changed: Full name of a weight -> its values in the reference's layout, or None for a bias that is not there.
    """

    def __init__(self, module: Any, changed: Mapping[str, torch.Tensor | None], path: str = "") -> None:
        self._module, self._changed, self._path = module, changed, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}{name}"
        if path in self._changed:
            return self._changed[path]
        value = getattr(self._module, name)
        return (
            WithWeights(value, self._changed, f"{path}.")
            if isinstance(value, (torch.nn.Module, WithWeights))
            else value
        )

    def __getitem__(self, index: int) -> "WithWeights":
        return WithWeights(self._module[index], self._changed, f"{self._path}{index}.")


class Shared:
    """Outputs of Linear modules on inputs that many mistakes have in common, each computed once.

    Args:
        inputs: Float64 tensors. They are kept, so that their memory tells them from any other tensor.
    """

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        self._inputs = {tensor.data_ptr(): tensor for tensor in inputs}
        self._outputs: dict[tuple[Any, ...], tuple[Any, torch.Tensor]] = {}

    def linear(self, x: torch.Tensor, module: Any) -> torch.Tensor:
        """See `Oracle.linear`."""
        kept = self._inputs.get(x.data_ptr())
        if kept is None or kept.shape != x.shape:
            return linear(x, module)
        weight, bias = module.weight, module.bias
        key = (x.data_ptr(), weight.data_ptr(), weight.stride(), None if bias is None else bias.data_ptr())
        if key not in self._outputs and len(self._outputs) < _REMEMBERED:
            self._outputs[key] = ((weight, bias), linear(x, module))  # the weights are kept like the inputs
        return self._outputs[key][1] if key in self._outputs else linear(x, module)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the hypotheses are variations of.

    Attributes:
        reference: The transformers model, or one with the candidate's weights.
        shared: Remembers what many variations have in common; None computes everything anew.
    """

    config: ModelConfig
    head: str
    reference: Any
    shared: "Shared | None" = None

    def _oracle(self, config: ModelConfig, reference: Any) -> Oracle:
        oracle = Oracle(config, self.head, reference)
        if self.shared is not None:
            vars(oracle)["linear"] = self.shared.linear
        return oracle

    @property
    def oracle(self) -> Oracle:
        """Without a mistake."""
        return self._oracle(self.config, self.reference)

    @property
    def prefix(self) -> str:
        """What names of the encoder's weights start with."""
        return "" if self.head == "base" else "model."

    def configured(self, **changes: Any) -> Oracle:
        """With another configuration."""
        return self._oracle(replace(self.config, **changes), self.reference)

    def weighted(self, changed: Mapping[str, torch.Tensor | None]) -> Oracle:
        """With other weights."""
        return self._oracle(self.config, WithWeights(self.reference, changed))

    def weight(self, name: str) -> torch.Tensor | None:
        """A weight of the reference; None for a bias it does not have."""
        value: Any = self.reference
        for part in name.split("."):
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        return None if value is None else value.detach()

    def but(self, **methods: Callable[..., Any]) -> Oracle:
        """With some of the oracle's methods replaced."""
        variant = copy.copy(self.oracle)
        vars(variant).update(methods)
        return variant


def hypotheses(probe: str, ground: Ground) -> Iterator[Hypothesis]:
    """Every mistake that could show at a probe."""
    match probe.split("."):
        case ["embeddings"]:
            yield from _norm(ground, "embeddings.norm")
        case ["layers", index, "attn_norm"] if index == "0":
            yield from _norm_in_layer_0(ground)
        case ["layers", _, ("attn_norm" | "mlp_norm") as name]:
            yield from _norm(ground, name)
            if name == "mlp_norm":
                yield from _input_of_mlp_norm(ground)
        case ["layers", index, "attn"]:
            yield from _positions(ground, int(index))
            yield from _masks(ground, int(index))
            yield from _attention(ground)
        case ["layers", _, "mlp"]:
            yield from _mlp(ground)
        case ["layers", _]:
            yield from _layer(ground)
        case ["final_norm"]:
            yield from _norm(ground, "final_norm")
        case ["head"]:
            yield from _head(ground)
        case ["logits"]:
            yield from _biases(ground, "", ("decoder" if ground.head == "masked_lm" else "classifier",))
        case ["loss"]:
            yield from _loss(ground)


def other_layers(probe: str, ground: Ground) -> Iterator[Hypothesis]:
    """The weights of other layers: the neighbours, the first and the last."""
    parts = probe.split(".")
    if len(parts) != 3:
        return
    layer, part = int(parts[1]), parts[2]
    path = f"{ground.prefix}layers.{layer}.{part}."
    count = ground.config.num_hidden_layers
    layers = sorted({0, layer - 1, layer + 1, count - 1} & set(range(count)) - {layer})
    names = {"attn": ("Wqkv", "Wo"), "mlp": ("Wi", "Wo")}.get(part, ("",))
    for other in layers:
        if part == "attn_norm" and 0 in (layer, other):
            continue
        whole: dict[str, torch.Tensor | None] = {}
        for name in names:
            changed = {
                f"{path}{name}{'.' * bool(name)}{kind}": ground.weight(
                    f"{ground.prefix}layers.{other}.{part}.{name}{'.' * bool(name)}{kind}"
                )
                for kind in ("weight", "bias")
            }
            whole |= changed
            if len(names) > 1:
                yield Hypothesis(
                    name="weight of another layer",
                    value=f"{name} of layer {other}",
                    statement=f"{name} is that of layer {other}",
                    oracle=ground.weighted(changed),
                )
        yield Hypothesis(
            name="weight of another layer",
            value=f"layer {other}",
            statement=f"the weights are those of layer {other}",
            oracle=ground.weighted(whole),
        )


def _narrowed(values: torch.Tensor, name: str) -> torch.Tensor:
    """Through float32, as a framework computes them, to a narrower format, and back."""
    return values.float().to(_NARROW[name]).double()


# Positions


def _positions(ground: Ground, layer: int) -> Iterator[Hypothesis]:
    config, right = ground.config, ground.oracle
    kind = config.layer_types[layer]
    field = {FULL: "full_rope_theta", SLIDING: "sliding_rope_theta"}[kind]
    yield Hypothesis(
        name="thetas swapped",
        statement=f"the RoPE bases of full and sliding layers are swapped ({config.rope_theta(kind):g} belongs here)",
        oracle=ground.configured(full_rope_theta=config.sliding_rope_theta, sliding_rope_theta=config.full_rope_theta),
    )
    right_theta = config.rope_theta(kind)

    def based(theta: float) -> Hypothesis:
        return Hypothesis(
            name="RoPE theta",
            value=f"{theta:.6g}",
            statement=f"the RoPE base of {kind} layers is {theta:.6g} instead of {right_theta:.6g}",
            oracle=ground.configured(**{field: theta}),
            number=theta,
            at=based,
        )

    yield from map(based, sorted({*_THETAS, config.full_rope_theta, config.sliding_rope_theta} - {right_theta}))
    if config.rope_scaling(kind) is not None:
        yield Hypothesis(
            name="RoPE scaling missing",
            statement="RoPE is not scaled as the configuration asks",
            oracle=ground.configured(full_rope_scaling=None, sliding_rope_scaling=None),
        )
    yield from _rotations(ground)
    for name in _NARROW:
        yield Hypothesis(
            name="RoPE tables rounded",
            value=name,
            statement=f"RoPE's cos and sin are rounded to {name}",
            oracle=ground.but(tables=_rounded_tables(right, name)),
        )
        yield Hypothesis(
            name="RoPE frequencies rounded",
            value=name,
            statement=f"RoPE's inverse frequencies are rounded to {name}",
            oracle=ground.but(frequencies=_rounded_frequencies(right, name)),
        )
        yield Hypothesis(
            name="RoPE angles rounded",
            value=name,
            statement=f"RoPE's angles (position times inverse frequency) are rounded to {name}",
            oracle=ground.but(tables=_rounded_angles(right, name)),
        )
    for name, query, key, cyclic in (
        ("one position ahead", 0, 1, False),
        ("one position behind", 0, -1, False),
        ("one position ahead, the last at the first's", 0, 1, True),
        ("one position behind, the first at the last's", 0, -1, True),
    ):
        yield Hypothesis(
            name="keys rotated elsewhere",
            value=name,
            statement=f"keys are rotated {name}",
            oracle=ground.but(positioned=_shifted(right, query, key, cyclic)),
        )


def _rounded_tables(right: Oracle, name: str) -> Callable[..., Any]:
    return lambda layer, positions: tuple(_narrowed(table, name) for table in right.tables(layer, positions))


def _rounded_frequencies(right: Oracle, name: str) -> Callable[..., Any]:
    return lambda layer: _narrowed(torch.from_numpy(right.frequencies(layer)), name).numpy()


def _rounded_angles(right: Oracle, name: str) -> Callable[..., Any]:
    def tables(layer: int, positions: npt.NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        angles = _narrowed(torch.from_numpy(positions[:, None] * right.frequencies(layer)), name)
        size = float(right.tables(layer, np.zeros(1))[0][0, 0])  # cos 0
        return angles.cos() * size, angles.sin() * size

    return tables


def _shifted(right: Oracle, query: int, key: int, cyclic: bool) -> Callable[..., Any]:
    def positioned(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positions = np.arange(q.shape[2])
        moved = (positions + key) % len(positions) if cyclic else positions + key
        turned = right.rotate(k, *right.tables(layer, moved))
        return right.rotate(q, *right.tables(layer, positions + query)), turned, v

    return positioned


def _rotations(ground: Ground) -> Iterator[Hypothesis]:
    right = ground.oracle

    def neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Pairs of neighbours instead of halves."""
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    def neighbours_tables_in_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The same with tables that are laid out for halves."""
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * torch.cat([cos, cos], dim=-1) + turned * torch.cat([sin, sin], dim=-1)

    def halves_tables_of_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * cos.repeat_interleave(2, dim=-1) + turned * sin.repeat_interleave(2, dim=-1)

    for value, rotate in (
        ("pairs and tables", neighbours),
        ("pairs", neighbours_tables_in_halves),
        ("tables", halves_tables_of_neighbours),
    ):
        yield Hypothesis(
            name="RoPE interleaved",
            value=value,
            statement=f"RoPE's {value} are laid out as neighbours, not as the two halves of a head",
            oracle=ground.but(rotate=rotate),
        )
    yield Hypothesis(
        name="RoPE backwards",
        statement="RoPE turns the other way",
        oracle=ground.but(rotate=lambda x, cos, sin: right.rotate(x, cos, -sin)),
    )
    for value, moves in {
        "at all": (False, False, False),
        "for keys": (True, False, False),
        "for queries": (False, True, False),
    }.items():
        yield Hypothesis(
            name="RoPE missing",
            value=value,
            statement=f"RoPE is not applied {value}",
            oracle=ground.but(positioned=_rotated_parts(right, moves)),
        )
    yield Hypothesis(
        name="values rotated",
        statement="values are rotated like queries and keys",
        oracle=ground.but(positioned=_rotated_parts(right, (True, True, True))),
    )


def _rotated_parts(right: Oracle, moves: tuple[bool, bool, bool]) -> Callable[..., Any]:
    def positioned(layer: int, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos, sin = right.tables(layer, np.arange(parts[0].shape[2]))
        return tuple(right.rotate(x, cos, sin) if move else x for x, move in zip(parts, moves, strict=True))

    return positioned


# Masks


def _masks(ground: Ground, layer: int) -> Iterator[Hypothesis]:
    config, right = ground.config, ground.oracle
    half, kinds = config.half_window, config.layer_types
    sliding = kinds[layer] == SLIDING
    other = {FULL: SLIDING, SLIDING: FULL}
    for value, shifted in (("early", (*kinds[1:], kinds[0])), ("late", (kinds[-1], *kinds[:-1]))):
        if shifted[layer] == kinds[layer]:
            continue
        yield Hypothesis(
            name="layer pattern shifted",
            value=f"one layer {value}",
            statement=f"the pattern of full and sliding layers starts one layer {value}",
            oracle=ground.configured(layer_types=shifted),
        )
    yield Hypothesis(
        name="layer kind",
        statement=f"the layer is treated as {other[kinds[layer]]}, mask and RoPE base; it is {kinds[layer]}",
        oracle=ground.configured(
            layer_types=tuple(other[kind] if n == layer else kind for n, kind in enumerate(kinds))
        ),
    )
    swapped = ground.configured(layer_types=tuple(other[kind] for kind in kinds))
    yield Hypothesis(
        name="masks swapped",
        statement="full layers get the window's mask and sliding layers the full one",
        oracle=ground.but(reach=swapped.reach, visible=swapped.visible),
    )
    if sliding:
        yield Hypothesis(
            name="window missing",
            statement="sliding layers see the whole sequence",
            oracle=ground.but(reach=_everywhere, visible=lambda _, back: torch.ones_like(back, dtype=torch.bool)),
        )
        for width in sorted({half + 1, half - 1, half + 2, half - 2, 2 * half, 2 * half + 1, half // 2} - {half}):
            yield Hypothesis(
                name="window width",
                value=f"{width}",
                statement=f"sliding layers see {width} positions to either side instead of {half}",
                oracle=ground.but(reach=lambda _, seq, w=width: w, visible=lambda _, back, w=width: back.abs() <= w),
            )
        for value, first, last in (("ahead", -half + 1, half), ("back", -half, half - 1)):
            yield Hypothesis(
                name="window width",
                value=f"one less {value}",
                statement=f"sliding layers see {half} positions to one side and {half - 1} {value}",
                oracle=ground.but(visible=lambda _, back, a=first, b=last: (back >= a) & (back <= b)),
            )
        for value, sign in (("back", 1), ("ahead", -1)):
            yield Hypothesis(
                name="window one-sided",
                value=value,
                statement=f"sliding layers see the {half} positions {value} only",
                oracle=ground.but(
                    visible=lambda layer, back, sign=sign: right.visible(layer, back) & (back * sign >= 0)
                ),
            )
    else:
        yield Hypothesis(
            name="window in full layers",
            statement="full layers see the sliding layers' window only",
            oracle=ground.but(reach=lambda _, seq: half, visible=lambda _, back: back.abs() <= half),
        )
        yield Hypothesis(
            name="causal mask",
            statement="tokens do not see what comes after them",
            oracle=ground.but(visible=lambda layer, back: right.visible(layer, back) & (back >= 0)),
        )
    yield Hypothesis(
        name="padding mask missing",
        statement="padding is attended to like any other token",
        oracle=ground.but(attn=lambda layer, x, mask: right.attn(layer, x, torch.ones_like(mask))),
    )
    wrongly_used: tuple[tuple[str, str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]], ...] = (
        (
            "mask added as 0 and 1",
            "the mask is added to the scores as 1 (seen) and 0",
            lambda scores, seen: (scores + seen).softmax(dim=-1),
        ),
        (
            "mask multiplied",
            "the scores are multiplied by the mask",
            lambda scores, seen: (scores * seen).softmax(dim=-1),
        ),
        (
            "mask after the softmax",
            "the mask is applied after the softmax",
            lambda scores, seen: scores.softmax(dim=-1) * seen,
        ),
    )
    for name, statement, weights in wrongly_used:
        yield Hypothesis(name=name, statement=statement, oracle=ground.but(reach=_everywhere, weights=weights))


def _everywhere(_: int, seq: int) -> int:
    return seq


# The rest of attention


def _attention(ground: Ground) -> Iterator[Hypothesis]:
    config, right = ground.config, ground.oracle
    known = {
        1.0: "is missing",
        1 / config.head_dim: "is applied twice",
        config.hidden_size**-0.5: "is hidden_size ** -0.5",
    }

    def scaled(factor: float) -> Hypothesis:
        said = known.get(factor, f"is {factor:.6g}, {factor / right.scale():.6g} times what it should be")
        return Hypothesis(
            name="attention scale",
            value=f"{factor:.6g}",
            statement=f"the scale of the scores, head_dim ** -0.5, {said}",
            oracle=ground.but(scale=lambda: factor),
            number=factor,
            at=scaled,
        )

    yield from map(scaled, (*known, 1.1 * right.scale(), 0.9 * right.scale()))
    for read in itertools.permutations(range(3)):
        if read == (0, 1, 2):
            continue
        shown = ", ".join("qkv"[n] for n in read)
        yield Hypothesis(
            name="q, k, v order",
            value=shown,
            statement=f"Wqkv is read as {shown}",
            oracle=ground.but(split=_reordered(right.split, read)),
        )
        yield Hypothesis(
            name="q, k, v order",
            value=f"{shown} after RoPE",
            statement=f"queries, keys and values are taken as {shown} after RoPE",
            oracle=ground.but(positioned=_reordered(right.positioned, read)),
        )
    sizes = {"part": 3, "head": config.num_attention_heads, "dim": config.head_dim}
    for name, *axes in (
        ("Wqkv read head by head", "head", "part", "dim"),
        ("heads interleaved", "part", "dim", "head"),
        ("Wqkv interleaved", "head", "dim", "part"),
        ("Wqkv interleaved", "dim", "part", "head"),
        ("Wqkv interleaved", "dim", "head", "part"),
    ):
        yield Hypothesis(
            name=name,
            value=" ".join(axes),
            statement=f"Wqkv's output is read as [{', '.join(axes)}] instead of [part, head, dim]",
            oracle=ground.but(split=_read_as(axes, sizes)),
        )
    yield Hypothesis(
        name="heads merged untransposed",
        statement="the heads' outputs are put together without transposing heads and positions first",
        oracle=ground.but(merged=lambda mixed: mixed.transpose(1, 2).reshape(*mixed.shape[:2], -1)),
    )
    yield from _biases(ground, "attn", ("Wqkv", "Wo"))
    yield from _untransposed(ground, "attn", "Wo")


def _reordered(original: Callable[..., Any], read: tuple[int, ...]) -> Callable[..., Any]:
    def reordered(*arguments: Any) -> tuple[torch.Tensor, ...]:
        parts = original(*arguments)
        return tuple(parts[n] for n in read)

    return reordered


def _read_as(axes: list[str], sizes: Mapping[str, int]) -> Callable[[torch.Tensor], Any]:
    order = [2 + axes.index(axis) for axis in ("part", "head", "dim")]

    def split(qkv: torch.Tensor) -> Any:
        parts = qkv.unflatten(-1, [sizes[axis] for axis in axes])
        return parts.permute(order[0], 0, order[1], 1, order[2]).unbind(0)

    return split


def _paths(ground: Ground, part: str, name: str) -> list[str]:
    """A Linear's full name, in every layer if it is in each."""
    if part in ("attn", "mlp"):
        return [f"{ground.prefix}layers.{n}.{part}.{name}" for n in range(ground.config.num_hidden_layers)]
    return [f"{part}.{name}" if part else name]


def _biases(ground: Ground, part: str, names: tuple[str, ...]) -> Iterator[Hypothesis]:
    """The biases of these modules left out, each and all."""
    biased = tuple(name for name in names if ground.weight(f"{_paths(ground, part, name)[0]}.bias") is not None)
    for chosen in [(name,) for name in biased] + [biased] * (len(biased) > 1):
        yield Hypothesis(
            name="bias missing",
            value=" and ".join(chosen),
            statement=f"the bias of {' and '.join(chosen)} is missing",
            oracle=ground.weighted({f"{path}.bias": None for name in chosen for path in _paths(ground, part, name)}),
        )


def _untransposed(ground: Ground, part: str, name: str) -> Iterator[Hypothesis]:
    weights = {f"{path}.weight": ground.weight(f"{path}.weight") for path in _paths(ground, part, name)}
    turned = {path: weight.T for path, weight in weights.items() if weight is not None}
    if all(weight.shape[0] == weight.shape[1] for weight in turned.values()):
        yield Hypothesis(
            name="weight not transposed",
            value=name,
            statement=f"{name} is used without the transpose",
            oracle=ground.weighted(turned),
        )


# Norms, the feed-forward block and the residuals


def _norm(ground: Ground, shown: str) -> Iterator[Hypothesis]:
    config, right = ground.config, ground.oracle

    def with_epsilon(epsilon: float) -> Hypothesis:
        return Hypothesis(
            name="norm epsilon",
            value=f"{epsilon:.3g}",
            statement=f"the norm's epsilon is {epsilon:.3g} instead of {config.norm_eps:.3g}",
            oracle=ground.configured(norm_eps=epsilon),
            number=epsilon,
            at=with_epsilon,
        )

    yield from (with_epsilon(epsilon) for epsilon in _EPSILONS if epsilon != config.norm_eps)
    others: list[tuple[str, str, Callable[[torch.Tensor, Any], torch.Tensor]]] = [
        ("norm missing", f"{shown} is skipped", lambda x, _: x.double()),
        ("norm weight missing", f"the weight of {shown} is not applied", _plain(right, weight=False)),
        ("norm weight plus one", f"{shown} multiplies by 1 + weight", _one_more(right)),
        ("RMSNorm", f"{shown} does not subtract the mean", _rms_norm(config.norm_eps)),
        ("norm variance", f"{shown} divides the variance by n - 1", _other_variance(config.norm_eps)),
        ("norm epsilon outside the root", f"{shown} adds epsilon to the deviation", _epsilon_outside(config.norm_eps)),
    ]
    if config.norm_bias:
        others.append(("norm bias missing", f"the bias of {shown} is not added", _plain(right, bias=False)))
        others.append(
            ("norm weight and bias missing", f"{shown} has no weight and no bias", _plain(right, False, False))
        )
    for name, statement, norm in others:
        yield Hypothesis(name=name, statement=statement, oracle=ground.but(norm=norm))


@dataclass(frozen=True)
class _Affine:
    weight: torch.Tensor
    bias: torch.Tensor | None


def _plain(right: Oracle, weight: bool = True, bias: bool = True) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """LayerNorm with only some of its parameters."""

    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        factor = module.weight if weight else torch.ones_like(module.weight)
        return right.norm(x, _Affine(factor, module.bias if bias else None))

    return norm


def _one_more(right: Oracle) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    return lambda x, module: right.norm(x, _Affine(module.weight.double() + 1, module.bias))


def _affine(x: torch.Tensor, module: Any) -> torch.Tensor:
    x = x * module.weight.detach().double()
    return x if module.bias is None else x + module.bias.detach().double()


def _rms_norm(epsilon: float) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        x = x.double()
        return _affine(x * (x.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt(), module)

    return norm


def _other_variance(epsilon: float) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        x = x.double()
        centred = x - x.mean(dim=-1, keepdim=True)
        return _affine(centred * (x.var(dim=-1, keepdim=True) + epsilon).rsqrt(), module)

    return norm


def _epsilon_outside(epsilon: float) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        x = x.double()
        centred = x - x.mean(dim=-1, keepdim=True)
        return _affine(centred / (x.var(dim=-1, keepdim=True, unbiased=False).sqrt() + epsilon), module)

    return norm


def _norm_in_layer_0(ground: Ground) -> Iterator[Hypothesis]:
    right = ground.oracle

    def normed(value: str, module: Callable[[torch.Tensor], Any]) -> Hypothesis:
        return Hypothesis(
            name="norm in layer 0",
            value=value,
            statement=f"layer 0 has an attention norm ({value}); the reference has none there",
            oracle=ground.but(attn_norm=lambda _, x: right.norm(x, module(x))),
        )

    yield normed("without weights", lambda x: _Affine(torch.ones(x.shape[-1]), None))
    for path in ("embeddings.norm", "layers.0.mlp_norm", "layers.1.attn_norm"):
        if path != "layers.1.attn_norm" or ground.config.num_hidden_layers > 1:
            full = ground.prefix + path
            weight, bias = ground.weight(f"{full}.weight"), ground.weight(f"{full}.bias")
            assert weight is not None
            yield normed(f"weights of {path}", lambda _, w=weight, b=bias: _Affine(w, b))  # type: ignore[misc]


def _input_of_mlp_norm(ground: Ground) -> Iterator[Hypothesis]:
    right = ground.oracle

    def isolated(take: Callable[[Recorded, str, str], Any]) -> Callable[..., torch.Tensor]:
        def computed(probe: str, inputs: Inputs, recorded: Recorded) -> torch.Tensor:
            layer = int(probe.split(".")[1])
            before = f"layers.{layer - 1}" if layer else "embeddings"
            return right.mlp_norm(layer, torch.as_tensor(take(recorded, f"layers.{layer}", before)))

        return computed

    for name, statement, take in (
        (
            "residual missing",
            "mlp_norm sees the attention's output without the residual",
            lambda recorded, layer, before: recorded[f"{layer}.attn"],
        ),
        (
            "attention left out",
            "mlp_norm sees the layer's input without the attention's output",
            lambda recorded, layer, before: recorded[before],
        ),
        (
            "residual taken after the norm",
            "mlp_norm sees the attention's output on top of attn_norm's, not of the layer's input",
            lambda recorded, layer, before: _sum(recorded[f"{layer}.attn_norm"], recorded[f"{layer}.attn"]),
        ),
    ):
        yield Hypothesis(name=name, statement=statement, oracle=ground.but(isolated=isolated(take)))


def _sum(*values: torch.Tensor | Floats) -> torch.Tensor:
    return torch.stack([torch.as_tensor(value).detach().double() for value in values]).sum(dim=0)


def _mlp(ground: Ground) -> Iterator[Hypothesis]:
    config = ground.config
    yield from _activations(ground, config.hidden_activation)
    right = ground.oracle
    for name, statement, gated in (
        (
            "gate and value swapped",
            "the activation is applied to the second half of Wi's output, not to the first",
            lambda value, gate: right.gated(gate, value),
        ),
        (
            "gate activated too",
            "both halves of Wi's output go through the activation",
            lambda value, gate: right.gated(value, right.activation(config.hidden_activation, gate)),
        ),
        (
            "activation after the gate",
            "the activation is applied to the product of both halves of Wi's output",
            lambda value, gate: right.activation(config.hidden_activation, value * gate),
        ),
        (
            "gate missing",
            "the second half of Wi's output is not used",
            lambda value, gate: right.activation(config.hidden_activation, value),
        ),
    ):
        yield Hypothesis(name=name, statement=statement, oracle=ground.but(gated=gated))
    yield Hypothesis(
        name="gate and value interleaved",
        statement="the two halves of Wi's output are read as interleaved",
        oracle=ground.but(gated=_interleaved(right)),
    )
    yield from _biases(ground, "mlp", ("Wi", "Wo"))
    yield from _untransposed(ground, "mlp", "Wo")


def _interleaved(right: Oracle) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def gated(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        both = torch.cat([value, gate], dim=-1)
        return right.gated(both[..., 0::2], both[..., 1::2])

    return gated


def _activations(ground: Ground, own: str) -> Iterator[Hypothesis]:
    for name, function in ACTIVATIONS.items():
        if name != OWN_NAME[own]:
            yield Hypothesis(
                name="activation",
                value=name,
                statement=f"the activation is {name} instead of {OWN_NAME[own]}",
                oracle=ground.but(activation=lambda _, x, function=function: function(x)),
            )


def _layer(ground: Ground) -> Iterator[Hypothesis]:
    def isolated(parts: tuple[str, ...]) -> Callable[..., torch.Tensor]:
        def computed(probe: str, inputs: Inputs, recorded: Recorded) -> torch.Tensor:
            layer = int(probe.split(".")[1])
            before = f"layers.{layer - 1}" if layer else "embeddings"
            return _sum(*(recorded[f"{probe}.{part}" if part else before] for part in parts))

        return computed

    for name, statement, *parts in (
        ("residual missing", "the layer's input is not added", "attn", "mlp"),
        ("residual missing", "the sum after the attention is not added", "mlp"),
        ("attention left out", "the attention's output is not added", "", "mlp"),
        ("feed-forward left out", "the feed-forward block's output is not added", "", "attn"),
        ("residual taken after the norm", "mlp_norm's output is added, not its input", "mlp_norm", "mlp"),
        ("residual taken after the norm", "attn_norm's output is added, not its input", "attn_norm", "attn", "mlp"),
        ("residual added twice", "the layer's input is added twice", "", "", "attn", "mlp"),
        ("residual added twice", "the sum after the attention is added twice", "", "attn", "", "attn", "mlp"),
    ):
        yield Hypothesis(
            name=name,
            value=" + ".join(part or "input" for part in parts),
            statement=statement,
            oracle=ground.but(isolated=isolated(tuple(parts))),
        )


# Heads and losses


def _head(ground: Ground) -> Iterator[Hypothesis]:
    config, right = ground.config, ground.oracle
    yield from _activations(ground, config.classifier_activation)
    yield from _norm(ground, "head.norm")
    yield from _biases(ground, "head", ("dense",))
    yield from _untransposed(ground, "head", "dense")
    dense, module = ground.weight("head.dense.weight"), ground.reference.head
    assert dense is not None

    def activated_last(x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x.double(), dense.double(), None if module.dense.bias is None else module.dense.bias.double())
        return right.activation(config.classifier_activation, right.norm(x, module.norm))

    yield Hypothesis(
        name="order in the head",
        statement="the head computes act(norm(dense(x))) instead of norm(act(dense(x)))",
        oracle=ground.but(head=activated_last),
    )
    if ground.head not in ("sequence_classification", "multiple_choice"):
        return
    own = config.classifier_pooling
    for pooling, statement in (("cls", "the first token"), ("mean", "the mean over the real tokens")):
        if pooling != own:
            yield Hypothesis(
                name="pooling",
                value=pooling,
                statement=f"pooling takes {statement}; the configuration says {own}",
                oracle=ground.configured(classifier_pooling=pooling),
            )
    for name, value, statement, pooled in (
        ("pooling counts padding", "", "the mean counts padding", lambda x, mask: x.double().mean(dim=1)),
        (
            "pooling",
            "sum over the mask's length",
            "the sum over real tokens is divided by the length with padding",
            lambda x, mask: (x.double() * mask.unsqueeze(-1)).mean(dim=1),
        ),
        ("pooling", "max", "pooling takes the maximum", lambda x, mask: x.double().amax(dim=1)),
        ("pooling", "last position", "pooling takes the last position", lambda x, mask: x.double()[:, -1]),
        (
            "pooling",
            "last token",
            "pooling takes the last real token",
            lambda x, mask: x.double()[torch.arange(len(x)), mask.sum(dim=-1) - 1],
        ),
    ):
        yield Hypothesis(name=name, value=value, statement=statement, oracle=ground.but(pooled=pooled))


def _loss(ground: Ground) -> Iterator[Hypothesis]:
    right = ground.oracle

    def relabelled(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Callable[..., torch.Tensor]:
        return lambda logits, labels: right.loss(logits, {name: change(values) for name, values in labels.items()})

    def times(factor: Callable[[_Labels], float]) -> Callable[..., torch.Tensor]:
        return lambda logits, labels: right.loss(logits, labels) * factor(labels)

    def counted(labels: _Labels) -> int:
        return sum(int((values != _IGNORED).sum()) for values in labels.values())

    def positions(labels: _Labels) -> int:
        return sum(values.size for values in labels.values())

    mistakes: list[tuple[str, str, Callable[..., torch.Tensor]]] = [
        ("loss summed", "the loss is a sum, not a mean", times(lambda labels: float(counted(labels)))),
        ("loss halved", "the loss is half of what it should be", times(lambda _: 0.5)),
        ("loss doubled", "the loss is twice what it should be", times(lambda _: 2.0)),
        ("loss negated", "the loss has the wrong sign", times(lambda _: -1.0)),
        ("loss in bits", "the loss uses the logarithm to base 2", times(lambda _: 1 / math.log(2))),
    ]
    if ground.head in ("masked_lm", "token_classification"):
        mistakes += [
            (
                "loss over every position",
                "the loss counts positions whose label is to be ignored, as label 0",
                relabelled(lambda labels: labels.clip(0)),
            ),
            (
                "loss divided by every position",
                "the sum over labelled positions is divided by the number of all positions",
                times(lambda labels: counted(labels) / positions(labels)),
            ),
            (
                "labels shifted",
                "labels are those of the next token",
                relabelled(lambda labels: np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)),
            ),
        ]
    for name, statement, loss in mistakes:
        yield Hypothesis(name=name, statement=statement, oracle=ground.but(loss=loss))
