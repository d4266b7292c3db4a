"""Runs the reference: Hugging Face ModernBERT in PyTorch."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.ops import Bits
from modernbert_align.core.probes import Probe
from modernbert_align.errors import CheckpointError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Arrays = dict[str, Floats]


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
    parameters = inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters
    key = "dtype" if "dtype" in parameters or int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model, info = cls.from_pretrained(
        folder,
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
        **{key: _DTYPES[dtype]},
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"`{missing[0]}` is not in `{folder}`, so {architecture} cannot be loaded from it",
            hint="choose the --head the checkpoint was saved with",
        )
    return model.eval()


def inputs(batch: Inputs) -> dict[str, torch.Tensor]:
    """The batch as keyword arguments of the model."""
    return {
        "input_ids": torch.from_numpy(batch.input_ids),
        "attention_mask": torch.from_numpy(batch.attention_mask),
    }


def to_numpy(tensor: torch.Tensor) -> Floats:
    """Values as float32 (exact for half precision), or float64."""
    tensor = tensor.detach().cpu()
    return tensor.numpy() if tensor.dtype == torch.float64 else tensor.float().numpy()


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype without its framework's name, for example `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def state_bits(model: torch.nn.Module) -> dict[str, tuple[Bits, str]]:
    """Every entry of the state dict as unsigned integers, with its dtype; nothing is copied.

    Returns:
        name -> (bits, dtype name).
    """
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: (
            tensor.detach().view(views[tensor.element_size()]).numpy().view(f"u{tensor.element_size()}"),
            dtype_name(tensor),
        )
        for name, tensor in model.state_dict().items()
    }


def null_error(
    model: torch.nn.Module,
    batch: Inputs,
    probes: Sequence[Probe],
    compare: Callable[[Floats, Floats], float | None],
) -> dict[str, dict[str, float | None]]:
    """How far the reference is from itself: sdpa against eager attention, per mode and probe.

    Isolated, every probe of the sdpa run gets the eager run's values as inputs, so only the attention can differ.

    Args:
        compare: Measures (sdpa value, eager value).

    Returns:
        mode -> probe -> error.
    """
    eager = record(model, batch, probes)
    set_attention(model, "sdpa")
    try:
        return {
            "accumulated": _errors(record(model, batch, probes), eager, compare),
            "isolated": _errors(record(model, batch, probes, inject=eager), eager, compare),
        }
    finally:
        set_attention(model, "eager")


def set_attention(model: torch.nn.Module, implementation: str) -> None:
    """Switch the attention implementation of a loaded model."""
    model.set_attn_implementation(implementation)


def _errors(run: Arrays, eager: Arrays, compare: Callable[[Floats, Floats], float | None]) -> dict[str, float | None]:
    return {name: compare(run[name], eager[name]) for name in eager}


def record(
    model: torch.nn.Module, batch: Inputs, probes: Sequence[Probe], inject: Mapping[str, Any] | None = None
) -> Arrays:
    """Run the model and keep the first output tensor of every probe.

    Args:
        inject: Values that replace a probe's first output after it was recorded.

    Returns:
        probe name -> values as float32.
    """
    found: Arrays = {}
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., Any]:
        def run(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
            first = output if isinstance(output, torch.Tensor) else output[0]
            found[name] = to_numpy(first)
            if inject is None:
                return None
            replacement = torch.from_numpy(inject[name]).to(first.dtype)
            return replacement if isinstance(output, torch.Tensor) else (replacement, *output[1:])

        return run

    handles = [modules[p.hf].register_forward_hook(hook(p.name)) for p in probes if p.hf]
    try:
        with torch.no_grad():
            output = model(**inputs(batch))
    finally:
        for handle in handles:
            handle.remove()
    found |= {p.name: to_numpy(output[0]) for p in probes if not p.hf}
    return found
