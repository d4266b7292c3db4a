"""Runs the reference: Hugging Face ModernBERT in PyTorch."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.model_config import FULL, SLIDING, parse_config, read_config_file
from modernbert_align.core.ops import Bits
from modernbert_align.errors import CheckpointError, ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROWS = 4096  # of a weight that are permuted at a time


def load(folder: Path, architecture: str, dtype: str) -> torch.nn.Module:
    """Load a checkpoint with eager attention, in evaluation mode.

    Args:
        architecture: A transformers class name, for example `ModernBertForMaskedLM`.
        dtype: fp32 or bf16.

    Raises:
        CheckpointError: A weight of the architecture is not in the checkpoint; it is never left at random.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cls = getattr(transformers, architecture)
    options: dict[str, Any] = {"dtype": _DTYPES[dtype]}
    if int(transformers.__version__.split(".")[0]) < 5:
        options = {"torch_dtype": _DTYPES[dtype], "config": _config_in_v4_spelling(folder)}
    model, info = cls.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, local_files_only=True, **options
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"`{missing[0]}` is not in `{folder}`, so {architecture} cannot be loaded from it",
            hint="choose the --head the checkpoint was saved with",
        )
    return model.eval()


def _config_in_v4_spelling(folder: Path) -> Any:
    """The configuration as transformers 4 understands it; on its own it silently ignores the keys of version 5.

    Raises:
        ConfigError: The layer pattern or the RoPE scaling cannot be said in version 4.
    """
    resolved = parse_config(read_config_file(folder), where=str(folder / "config.json"))
    if resolved.full_rope_scaling or resolved.sliding_rope_scaling:
        raise ConfigError(
            f"transformers {transformers.__version__} does not scale RoPE as `{folder / 'config.json'}` asks",
            hint="use transformers 5 for this checkpoint",
        )
    kinds = resolved.layer_types
    for every in range(1, len(kinds) + 1):
        if kinds == tuple(SLIDING if i % every else FULL for i in range(len(kinds))):
            break
    else:
        raise ConfigError(
            f"transformers {transformers.__version__} cannot express the `layer_types` of `{folder / 'config.json'}`",
            hint="use transformers 5 for this checkpoint",
        )
    config = transformers.ModernBertConfig.from_pretrained(folder)
    config.global_attn_every_n_layers = every
    config.global_rope_theta = resolved.full_rope_theta
    config.local_rope_theta = resolved.sliding_rope_theta
    config.reference_compile = False
    return config


def inputs(batch: Inputs) -> dict[str, torch.Tensor]:
    """The batch as keyword arguments of the model."""
    return {name: torch.from_numpy(values) for name, values in batch.arguments.items()}


def to_numpy(tensor: torch.Tensor) -> Floats:
    """Values as float32 (exact for half precision), or float64."""
    tensor = tensor.detach().cpu()
    return tensor.numpy() if tensor.dtype == torch.float64 else tensor.float().numpy()


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype without its framework's name, for example `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bits(tensor: torch.Tensor) -> tuple[Bits, str]:
    """A tensor as unsigned integers, and its dtype's name; not copied if it is contiguous."""
    size = tensor.element_size()
    return tensor.detach().contiguous().view(_VIEWS[size]).numpy().view(f"u{size}"), dtype_name(tensor)


def from_numpy(values: npt.NDArray[Any]) -> torch.Tensor:
    """float32 or bfloat16 values as a tensor of its own."""
    if values.dtype == np.float32:
        return torch.from_numpy(values).clone()
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).clone()


def state_bits(model: torch.nn.Module) -> dict[str, tuple[Bits, str]]:
    """Every entry of the state dict, see `tensor_bits`."""
    return {name: tensor_bits(tensor) for name, tensor in model.state_dict().items()}


def set_attention(model: torch.nn.Module, implementation: str) -> None:
    """Switch the attention implementation of a loaded model; cheap enough to do between two of its modules."""
    config: Any = model.config
    if config._attn_implementation != implementation:
        config._attn_implementation = implementation


class PermutedSums:
    """The reference with the terms of every sum in its Linear modules in another, fixed order.

    Mathematically nothing changes, so what differs is rounding. Weights are permuted when they are used and not kept.

    Attributes:
        active: Whether the order is changed now.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.active = False
        self._modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        generator = torch.Generator().manual_seed(0)
        widths = {module.in_features for module in self._modules}
        self._orders = {width: torch.randperm(width, generator=generator) for width in sorted(widths)}
        for module in self._modules:
            module.forward = functools.partial(self._forward, module)

    def _forward(self, module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """[... in] -> [... out]."""
        if not self.active:
            return torch.nn.Linear.forward(module, x)
        return _PermutedLinear.apply(x, module.weight, module.bias, self._orders[module.in_features])

    def remove(self) -> None:
        """Give the modules their own forward() back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)


class _PermutedLinear(torch.autograd.Function):
    """A Linear that sums in another order, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: torch.Tensor
    ) -> torch.Tensor:
        """[... in], [out in], [out] -> [... out]; `order` permutes the input features."""
        ctx.save_for_backward(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], len(weight))  # [... out]
        x = x[..., order]
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            part = None if bias is None else bias[rows]
            out[..., rows] = torch.nn.functional.linear(x, weight[rows][:, order], part)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """[... out] -> gradients of what forward() took; output features and tokens are summed backwards."""
        x, weight, bias = ctx.saved_tensors
        gradient = gradients[0]
        for_x = gradient.flip(-1) @ weight.flip(0)  # [... in]
        flat, tokens = gradient.flatten(0, -2).flip(0), x.flatten(0, -2).flip(0)  # [tokens out], [tokens in]
        return for_x, flat.mT @ tokens, None if bias is None else _one_by_one(flat), None


def _one_by_one(rows: torch.Tensor) -> torch.Tensor:
    """[rows out] -> [out]: the rows added up one after the other; PyTorch's own sum goes by halves."""
    total = torch.zeros_like(rows[0], dtype=torch.promote_types(rows.dtype, torch.float32))
    for row in rows:
        total += row
    return total.to(rows.dtype)
