"""Runs the candidate: the Paddle ModernBERT of this package."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.metrics import Floats
from modernbert_align.core.ops import Bits
from modernbert_align.errors import CheckpointError

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load(
    folder: Path,
    architecture: str,
    dtype: str,
    attention: str = "eager",
    tensor_parallel: tuple[int, int] = (1, 0),
) -> Any:
    """Load a converted checkpoint, in evaluation mode, the way users do: with `from_pretrained`.

    Args:
        architecture: A class of `modernbert_align.models.modernbert`.
        dtype: fp32 or bf16.
        attention: How attention is computed; eager carries the alignment contract.
        tensor_parallel: Degree, and this process's rank.

    Raises:
        CheckpointError: A weight of the architecture is not in the checkpoint; it is never left at random.
    """
    from modernbert_align.core.checkpoint import open_checkpoint
    from modernbert_align.models import modernbert

    stored = set(open_checkpoint(folder).tensors)
    with quiet():
        model = getattr(modernbert, architecture).from_pretrained(
            str(folder),
            dtype=_DTYPES[dtype],
            attn_implementation=attention,
            tensor_parallel_degree=tensor_parallel[0],
            tensor_parallel_rank=tensor_parallel[1],
        )
    tied = {"decoder.weight"} if model.config.tie_word_embeddings else set()
    prefix = f"{model.base_model_prefix}."
    wanted = set(model.state_dict()) - tied
    if not any(name.startswith(prefix) for name in stored):
        wanted = {name.removeprefix(prefix) for name in wanted}
    elif not any(name.startswith(prefix) for name in wanted):
        wanted = {prefix + name for name in wanted}
    missing = sorted(wanted - stored)
    if missing:
        raise CheckpointError(
            f"`{missing[0]}` is not in `{folder}`, so {architecture} cannot be loaded from it",
            hint="choose the --head the checkpoint was saved with",
        )
    model.eval()
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep PaddleNLP's progress messages off the terminal."""
    from paddlenlp.utils.log import logger

    level = logger.logger.level
    logger.set_level("ERROR")
    previous = logging.root.manager.disable
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.logger.setLevel(level)
        logging.disable(previous)


def inputs(batch: Inputs) -> dict[str, Any]:
    """The batch as keyword arguments of the model."""
    return {name: paddle.to_tensor(values) for name, values in batch.arguments.items()} | {"return_dict": True}


def places(model: Any, batch: Inputs) -> Callable[[Any], Callable[[Callable[..., Any]], Any]]:
    """Where to hook a model so that every layer is seen with its values in the batch's shape.

    With blockwise attention the encoder's layers hold the real tokens alone, in one row. There a hook is given, and may
    return, what it would without: [batch seq ...], zeros at padding.

    Returns:
        Layer -> registers a forward hook, which is called with the layer, its inputs and its output.
    """
    from modernbert_align.models.modernbert.blockwise import packing

    encoder = getattr(model, model.base_model_prefix, model)
    inside = {id(layer) for layer in encoder.sublayers()}
    if model.config.attn_implementation != "blockwise":
        inside = set()
    batch_size, seq = batch.input_ids.shape
    packed = packing(batch_size, seq, paddle.to_tensor(batch.attention_mask))

    def place(layer: Any) -> Callable[[Callable[..., Any]], Any]:
        if id(layer) not in inside:
            return layer.register_forward_post_hook

        def register(hook: Callable[..., Any]) -> Any:
            def translated(own: Any, arguments: Any, output: Any) -> Any:
                found = hook(own, arguments, _tensors(packed.restore, output))
                return None if found is None else _tensors(packed.pack, found)

            return layer.register_forward_post_hook(translated)

        return register

    return place


def _tensors(change: Callable[[paddle.Tensor], paddle.Tensor], output: Any) -> Any:
    """A layer's output with its tensors changed."""
    if isinstance(output, tuple | list):
        return type(output)(_tensors(change, value) for value in output)
    return change(output) if isinstance(output, paddle.Tensor) else output


def to_numpy(tensor: paddle.Tensor) -> Floats:
    """Values as float32 (exact for half precision), or float64."""
    tensor = tensor.detach()
    return tensor.numpy() if tensor.dtype == paddle.float64 else tensor.astype("float32").numpy()


def from_torch(tensor: Any) -> paddle.Tensor:
    """A torch tensor's values as a Paddle tensor of its own: a model may write to what it is given."""
    return paddle.utils.dlpack.from_dlpack(tensor.detach().contiguous()).clone()


def dtype_name(tensor: paddle.Tensor) -> str:
    """The dtype without its framework's name, for example `bfloat16`."""
    return str(tensor.dtype).removeprefix("paddle.")


def tensor_bits(tensor: paddle.Tensor) -> tuple[Bits, str]:
    """A tensor as unsigned integers, and its dtype's name."""
    values = tensor.numpy()  # bfloat16 comes as uint16
    return values.view(f"u{values.itemsize}"), dtype_name(tensor)


def from_numpy(values: npt.NDArray[Any]) -> paddle.Tensor:
    """float32 or bfloat16 values as a tensor of its own."""
    return paddle.to_tensor(values if values.dtype == np.float32 else values.view(np.uint16))


def state_bits(model: Any) -> dict[str, tuple[Bits, str]]:
    """Every entry of the state dict as unsigned integers, with its dtype; nothing is copied.

    Returns:
        name -> (bits, dtype name).
    """
    found = {}
    for name, tensor in model.state_dict().items():
        width = tensor.element_size()
        bits = np.from_dlpack(tensor.detach().view(f"int{8 * width}"))
        found[name] = (bits.view(f"u{width}"), dtype_name(tensor))
    return found


def set_state_bits(model: Any, bits: Mapping[str, Bits]) -> None:
    """Overwrite weights in place.

    Args:
        bits: name -> what `state_bits` would give for it.
    """
    state = model.state_dict()
    for name, values in bits.items():
        tensor = state[name]
        narrow = tensor.dtype == paddle.bfloat16  # whose numpy type is uint16
        tensor.set_value(values if narrow else values.view(dtype_name(tensor)))


def execution(dtype: str) -> str:
    """Whether half-precision kernels are the device's own or computed in float32 and rounded."""
    if dtype == "fp32":
        return "native"
    return "emulated" if paddle.get_device() == "cpu" else "native"
