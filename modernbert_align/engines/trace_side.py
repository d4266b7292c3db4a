"""What recording either side of a comparison has in common; imports no framework."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Dtype, Mode
from modernbert_align.core.table import Entry
from modernbert_align.core.trace import Machine, TracedOutput, TracedPass, TracedWeights
from modernbert_align.core.trace_file import FORMATS, TraceWriter
from modernbert_align.engines.passes import Outputs

Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be recorded.

    Attributes:
        architecture: Class name, the same on both sides.
        entries: The table for this model.
    """

    architecture: str
    head: str
    batch: Inputs
    probes: tuple[Probe, ...]
    entries: tuple[Entry, ...]
    dtypes: tuple[Dtype, ...]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What was recorded beside the tensors; see `core.trace.Trace`."""

    passes: tuple[TracedPass, ...]
    weights: tuple[TracedWeights, ...]
    absent: dict[str, str]
    execution: dict[Dtype, Literal["native", "emulated"]]
    machine: Machine
    timings_s: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Writes what the modules of one pass return.

    Args:
        backend: `backends.hf` or `backends.paddle`.
    """

    writer: TraceWriter
    backend: Any
    dtype: Dtype
    mode: Mode

    def tensor_name(self, probe: Probe) -> str:
        """What the values of a probe are called in the file."""
        return f"{self.dtype}/{self.mode}/{probe.name}"

    def keep(self, probe: Probe, outputs: Outputs) -> tuple[TracedOutput, ...]:
        """Write the output that is compared at a probe, and describe all."""
        compared = probe.key or next(iter(outputs), "")
        found = []
        for name, tensor in outputs.items():
            dtype = self.backend.dtype_name(tensor)
            held = ""
            if name == compared and dtype in FORMATS:
                held = self.writer.add(self.tensor_name(probe), *self.backend.tensor_bits(tensor))
            found.append(TracedOutput(name=name, shape=tuple(tensor.shape), dtype=dtype, tensor=held))
        return tuple(found)
