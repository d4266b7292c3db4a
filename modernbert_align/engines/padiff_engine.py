"""Drives PaDiff: it hooks both models, pairs their modules and injects the reference's values; the verdict is ours.

PaDiff 0.2.0 stops at the root when the root looks equal, and its single-step mode always reports success. So its
recorder is used and its verdict is kept as information: every recorded pair is measured here and judged elsewhere.
This is the only module that imports padiff.

Source: padiff 0.2.0, auto_diff.py, trainer/Runner.py, trainer/trainer_utils/hooks.py and report.py.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import torch

if os.environ.get("PADIFF_API_CHECK") != "OFF" or os.environ.get("PADIFF_CUDA_MEMORY") != "OFF":
    raise RuntimeError("call modernbert_align.backends.runtime.pin() before importing the PaDiff engine")

import padiff
from paddle.utils import flatten, pack_sequence_as
from padiff import utils as padiff_utils
from padiff.file_loader import global_yaml_loader
from padiff.trainer.trainer_utils import current_paddle_report, current_torch_report, get_action
from padiff.trainer.trainer_utils import hooks as padiff_hooks

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.compare import Beside, Context
from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Dtype, Mode, Record
from modernbert_align.engines.pair import compare
from modernbert_align.engines.reference_side import Nulls
from modernbert_align.engines.truth import Truth

PINNED = "0.2.0"
_STRICT = {"atol": 1e-5, "rtol": 1e-5, "compare_mode": "strict", "diff_phase": "forward"}


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """One pass over both models.

    Attributes:
        records: One per probe, in probe order.
        padiff_verdict: What auto_diff returned; None if it could not compare (bfloat16) or raised.
        error: What stopped the pass, in one line; empty if it ran to its end.
    """

    records: tuple[Record, ...]
    padiff_verdict: bool | None
    error: str


class _ProbeMap(padiff.LayerMap):
    """Pairs modules by our probe table: probe i has the same net_id on both sides, whatever the definition order."""

    def __init__(self, candidate: Any, reference: torch.nn.Module, probes: Sequence[Probe]) -> None:
        super().__init__()
        layers = dict(candidate.named_sublayers())
        modules = dict(reference.named_modules())
        inner = [p for p in probes if p.paddle or p.hf]
        self.absent = {
            p.name: f"the {side} has no module `{path}`"
            for p in inner
            for side, path, found in (("candidate", p.paddle, layers), ("reference", p.hf, modules))
            if path not in found
        }
        hooked = [p for p in inner if p.name not in self.absent]
        self.net_ids = {p.name: 0 for p in probes if not p.paddle and not p.hf}
        self.net_ids |= {p.name: index for index, p in enumerate(hooked, start=1)}
        self._nets = {
            id(candidate): [candidate, *(layers[p.paddle] for p in hooked)],
            id(reference): [reference, *(modules[p.hf] for p in hooked)],
        }
        self.reports: tuple[Any, Any] = (None, None)

    def ignore_class(self, layer: Any, ign_cls: Any = None) -> None:
        """Ignore nothing: what is compared is decided by the probe table."""

    def weight_init_layers(self, layer: Any) -> list[Any]:
        return self._nets[id(layer)]

    def struct_hook_layers(self, layer: Any) -> list[Any]:
        # Called inside auto_diff's report guard: the one moment at which its two reports can be had.
        self.reports = (current_paddle_report(), current_torch_report())
        return self._nets[id(layer)]


def run(
    candidate: Any,
    reference: torch.nn.Module,
    batch: Inputs,
    probes: Sequence[Probe],
    *,
    dtype: Dtype,
    mode: Mode,
    truth: Truth,
    nulls: Nulls,
) -> PassResult:
    """Run both models once and measure every probe.

    Args:
        candidate: The Paddle model, in evaluation mode.
        reference: The PyTorch model, in evaluation mode with eager attention.
        mode: accumulated (each model on its own values) or isolated (every probe's output in the Paddle model is
            replaced, after being recorded, by the reference's, so the next one starts from equal inputs).
        truth: The oracle's values.
        nulls: The reference against itself.

    Returns:
        A record for every probe, whatever happened.
    """
    layer_map = _ProbeMap(candidate, reference, probes)
    verdict, error = None, ""
    with _patched(), torch.no_grad(), paddle.no_grad():
        try:
            verdict = padiff.auto_diff(
                candidate,
                reference,
                (paddle_backend.inputs(batch), hf.inputs(batch)),
                auto_weights=False,
                options=dict(_STRICT, single_step=mode == "isolated"),
                layer_map=layer_map,
                loss_fn=(lambda _: paddle.zeros([]), lambda _: torch.zeros([])),  # its default has no bf16 kernel
            )
        except Exception as raised:  # noqa: BLE001 - whatever a wrong model raises is a finding about it, not ours
            error = " ".join(str(raised).split())[:400]
    context = Context(mask=batch.attention_mask.astype(bool), dtype=dtype, mode=mode)
    with _patched():
        records = tuple(_record(probe, layer_map, context, error, truth, nulls) for probe in probes)
    return PassResult(records=records, padiff_verdict=None if dtype == "bf16" else verdict, error=error)


def _record(probe: Probe, layer_map: _ProbeMap, context: Context, error: str, truth: Truth, nulls: Nulls) -> Record:
    def unseen(observation: Any, reason: str) -> Record:
        return context.unseen(probe, observation, reason)

    if probe.name in layer_map.absent:
        return unseen("missing", layer_map.absent[probe.name])
    candidates, references = (_items(report, layer_map.net_ids[probe.name]) for report in layer_map.reports)
    if references:
        truth.record(probe, _outputs(references[0]))  # later probes start from it, whatever the candidate did
    if not candidates or not references:
        side = "reference" if not references else "candidate"
        return unseen("missing", error or f"no call of this module was seen in the {side}")
    if len(candidates) != len(references) or len(references) > 1:
        return unseen(
            "extra", f"the candidate ran this module {len(candidates)} times, the reference {len(references)}"
        )
    ours, theirs = _outputs(candidates[0]), _outputs(references[0])
    beside = Beside(oracle=truth.value(probe, context.mode), null_parts=nulls.get((probe.name, context.mode), {}))
    record = compare(probe, context, ours, theirs, beside)
    if record.observation != "compared" or context.dtype != "fp32":
        return record
    return record.model_copy(update={"padiff_equal": _padiff_equal(candidates[0], references[0])})


def _items(report: Any, net_id: int) -> list[Any]:
    if report is None:
        return []
    return [item for item in report.items if item.type == "forward" and item.net_id == net_id]


def _outputs(item: Any) -> dict[str, Any]:
    """What a module returned: name (position, where it has none) -> tensor."""
    output = item.output
    named = output.items() if isinstance(output, Mapping) else enumerate(_flat(output))
    found: dict[str, Any] = {}
    for name, value in named:
        tensors = _flat(value)
        found |= {str(name) if len(tensors) == 1 else f"{name}.{n}": tensor for n, tensor in enumerate(tensors)}
    return found


def _flat(value: Any) -> list[Any]:
    return [tensor for (tensor,) in padiff_utils.for_each_tensor(value)]


def _inject(convert: Callable[[Any], Any], recorded: Sequence[Any], output: Any) -> Any:
    """`output` with its tensors replaced by the reference's; what the reference does not return stays."""
    theirs = [convert(value) for value in flatten(recorded[0])]
    ours = flatten(output)
    return pack_sequence_as(output, [*theirs[: len(ours)], *ours[len(theirs) :]])


def _padiff_equal(candidate: Any, reference: Any) -> bool:
    """PaDiff's own EqualAction on one recorded pair."""
    try:
        get_action(reference.net, candidate.net)(reference, candidate, dict(_STRICT, debug=False))
    except AssertionError:
        return False
    return True


def _to_paddle(tensor: Any) -> Any:
    """A recorded torch tensor as a Paddle tensor; numpy has no bfloat16, so its bits travel as uint16."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return paddle.to_tensor(tensor.view(torch.int16).numpy().view(np.uint16))
    return paddle.to_tensor(tensor.numpy())


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """PaDiff with its process-wide state clean and the functions replaced that cannot work here.

    - extract_frame_summary asserts when the tool is installed under /usr/local;
    - tensor transfer and the log of the maximum cannot handle bfloat16;
    - injection needs as many tensors on both sides, also where one returns something more;
    - log files would go beside the console script, whose `diff_log` folder would be deleted first;
    - options and in-hook flags outlive a call, hooks outlive an exception;
    - it prints to stdout.
    """
    with tempfile.TemporaryDirectory(prefix="modernbert-align-padiff-") as logs, contextlib.ExitStack() as stack:

        def log_file(name: str, mode: str, info: str) -> str:
            path = Path(logs) / name
            with path.open(mode) as file:
                file.write(info)
            return str(path)

        replacements: dict[str, Any] = {
            "extract_frame_summary": lambda: (None, []),
            "_torch_tensor_to_paddle_tensor": _to_paddle,
            "map_structure_and_replace_key": _inject,
            "max_diff": lambda *_: "not computed",
            "log_file": log_file,
        }
        for module in [m for name, m in sys.modules.items() if name.startswith("padiff.") and m is not None]:
            for attribute, value in replacements.items():
                if attribute in vars(module):
                    stack.callback(setattr, module, attribute, getattr(module, attribute))
                    setattr(module, attribute, value)
        padiff_hooks.__in_torch_api_hook__ = False
        padiff_hooks.__in_paddle_api_hook__ = False
        global_yaml_loader._options.clear()
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


@contextlib.contextmanager
def clean_hooks(*models: Any) -> Iterator[None]:
    """Remove every forward hook that an exception inside PaDiff left on the models."""
    try:
        yield
    finally:
        for model in models:
            modules = model.sublayers(include_self=True) if hasattr(model, "sublayers") else model.modules()
            for module in modules:
                for registry in ("_forward_hooks", "_forward_pre_hooks", "_forward_post_hooks"):
                    hooks = getattr(module, registry, {})
                    for key in [k for k, h in hooks.items() if _is_padiffs(h)]:
                        del hooks[key]


def _is_padiffs(hook: Any) -> bool:
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("padiff.")
