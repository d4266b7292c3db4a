"""Runs the reference: Hugging Face ModernBERT in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.model_config import FULL, SLIDING, parse_config, read_config_file
from modernbert_align.core.ops import Bits
from modernbert_align.core.probes import Probe
from modernbert_align.errors import CheckpointError, ConfigError

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
    compare: Callable[[Probe, Floats, Floats], float | None],
) -> dict[str, dict[str, float | None]]:
    """How far the reference is from itself: sdpa against eager attention, per mode and probe.

    Isolated, every probe of the sdpa run gets the eager run's values as inputs, so only the attention can differ.

    Args:
        compare: Measures (probe, sdpa value, eager value).

    Returns:
        mode -> probe -> error.
    """
    eager = record(model, batch, probes)
    set_attention(model, "sdpa")
    try:
        return {
            mode: {probe.name: compare(probe, run[probe.name], eager[probe.name]) for probe in probes}
            for mode, run in (
                ("accumulated", record(model, batch, probes)),
                ("isolated", record(model, batch, probes, inject=eager)),
            )
        }
    finally:
        set_attention(model, "eager")


def set_attention(model: torch.nn.Module, implementation: str) -> None:
    """Switch the attention implementation of a loaded model."""
    model.set_attn_implementation(implementation)


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
    found |= {p.name: to_numpy(output[p.key]) for p in probes if not p.hf}
    return found
