"""What a trace says: one side of a comparison, recorded alone.

A trace is one safetensors file. Its tensors are what the modules returned, in the dtype they had; the document below,
as JSON, is in the header's `__metadata__`. The other side may be recorded on another machine, so in the isolated
passes no side can start from the other's values: both start from the same drawn ones (`core.drawn`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Dtype, Mode

TRACE_VERSION = 1
FORMAT = "modernbert-align-trace"  # the `format` entry of the file's metadata
Backend = Literal["hf", "paddle"]
BACKENDS: tuple[Backend, ...] = ("hf", "paddle")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TracedOutput(_Strict):
    """One tensor that a module returned.

    Attributes:
        name: Its key, or its position where it has none.
        dtype: Without its framework's name, for example `bfloat16`.
        tensor: Which tensor of the file holds its values; empty if they are not kept.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tensor: str = ""


class TracedProbe(_Strict):
    """What was recorded of a probe.

    Attributes:
        outputs: All that the module returned when it ran first; of a probe with a key, all that the model returned.
        oracle: Which tensor of the file holds reference minus oracle in float32; empty without an oracle's value.
        null_parts: The reference against itself, see `core.rows.Record`.
    """

    outputs: tuple[TracedOutput, ...]
    oracle: str = ""
    null_parts: dict[str, float] = {}


class TracedPass(_Strict):
    """One forward pass.

    Attributes:
        stops: The probe of every hooked module that ran, in the order in which they finished.
        error: What ended the pass early; empty if nothing did.
        probes: By name.
    """

    dtype: Dtype
    mode: Mode
    stops: tuple[str, ...]
    error: str
    probes: dict[str, TracedProbe]


class TracedWeights(_Strict):
    """What a loaded model held.

    Attributes:
        sha256: By Hugging Face's name, over dtype, shape and bits in Hugging Face's layout.
        unmapped: Names, in the recording framework, that no row of the table maps.
    """

    dtype: Dtype
    sha256: dict[str, str]
    unmapped: tuple[str, ...]


class TracedModel(_Strict):
    """Which model was recorded; names as in `report.schema.ModelInfo`.

    Attributes:
        checkpoint: `converted` or the Paddle folder's name; empty for the reference.
        files_sha256: Digest over the weight files that were loaded.
    """

    name: str
    kind: Literal["fixture", "directory", "hub"]
    fixture: str | None
    revision: str | None
    head: str
    architecture: str
    checkpoint: str
    files_sha256: str
    table: str
    table_sha256: str
    config: dict[str, Any]


class TracedInputs(_Strict):
    """The batch; see `core.fixtures.Inputs`.

    Attributes:
        drawn_sha256: Digest of what this machine draws for the isolated passes.
    """

    seed: int = Field(ge=0)
    lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=2)
    sha256: str
    padded: bool
    window_bites: bool
    drawn_sha256: str


class Machine(_Strict):
    """Where a trace was recorded; what belongs to the other framework is empty."""

    versions: dict[str, str]
    platform: str
    cpu: str
    cpu_flags: tuple[str, ...]
    pins: dict[str, str]
    torch_cpu_capability: str = ""
    torch_threads: int = 0
    paddle_device: str = ""


class Trace(_Strict):
    """The document of a trace.

    Attributes:
        absent: Probe -> why the model cannot have it.
        execution: native or emulated, by dtype.
        probes_sha256: Digest of the probes that were looked for.
        tensors: Digest of every tensor of the file.
    """

    trace_version: Literal[1] = 1
    tool_version: str
    created: str
    backend: Backend
    dtypes: tuple[Dtype, ...] = Field(min_length=1)
    model: TracedModel
    inputs: TracedInputs
    probes_sha256: str
    absent: dict[str, str]
    passes: tuple[TracedPass, ...]
    weights: tuple[TracedWeights, ...]
    execution: dict[Dtype, Literal["native", "emulated"]]
    machine: Machine
    timings_s: dict[str, float]
    command: str
    tensors: dict[str, str]
    content_sha256: str = ""

    def sealed(self) -> "Trace":
        """This document with its digest filled in."""
        return self.model_copy(update={"content_sha256": self.digest()})

    def digest(self) -> str:
        """SHA-256 over everything but the digest itself; the tensors' digests are part of it."""
        document = self.model_dump(mode="json", exclude={"content_sha256"})
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def find(self, dtype: Dtype, mode: Mode) -> TracedPass | None:
        """One of the passes."""
        return next((one for one in self.passes if (one.dtype, one.mode) == (dtype, mode)), None)


def probes_digest(probes: Sequence[Probe]) -> str:
    """SHA-256 of what the probe list says for one model."""
    return hashlib.sha256(json.dumps([asdict(probe) for probe in probes], sort_keys=True).encode()).hexdigest()
