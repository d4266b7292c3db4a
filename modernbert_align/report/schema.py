"""The report: the JSON contract that gates read and from which the HTML page is made.

Keys are stable; a change that breaks a reader raises `schema_version`. Only `created` and `timings_s` change between
two runs on the same machine.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modernbert_align.core.cause import Cause
from modernbert_align.core.rows import Attention, Dtype, EngineName, Mode, Phase, RankCheck, Row, WeightCheck
from modernbert_align.core.tolerance import AppliedOverride
from modernbert_align.core.trace import Machine
from modernbert_align.core.verdict import Coverage, Failing, Policy, Verdict

SCHEMA_VERSION = 4


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Execution(_Strict):
    """native (the device's own kernels) or emulated (float32 kernels, rounded after every operation)."""

    reference: Literal["native"]
    candidate: Literal["native", "emulated"]


class ModelInfo(_Strict):
    """What was compared.

    Attributes:
        name: As asked for: a fixture, a hub id, or the folder's name.
        kind: Where the reference came from.
        fixture: Name of the contract fixture, or null.
        candidate: `converted` (this tool converted the reference just before) or the candidate folder's name.
        reference_sha256: Digest over the reference's weight files.
        table, table_sha256: The name-mapping table used.
        config: The resolved architecture, Hugging Face's names.
    """

    name: str
    kind: Literal["fixture", "directory", "hub"]
    fixture: str | None
    revision: str | None
    head: str
    architecture: str
    candidate: str
    reference_sha256: str
    candidate_sha256: str
    table: str
    table_sha256: str
    config: dict[str, Any]
    candidate_config_differences: tuple[str, ...]


class ConversionInfo(_Strict):
    """How the candidate's folder was made, as its conversion manifest says.

    Attributes:
        dtype: `keep`, or the float format all tensors were cast to.
        lossless: Whether every bit of every tensor can be recovered.
        tensors: Written tensors.
        files: Weight files that were written.
        size_bytes: Of these files.
        operations: What was done with the table's weights: name of the operation -> how many.
        tied: (repeated name, name it repeats) that were not written a second time.
        dropped: Weights of a head that were left out.
        proofs: What was proved when the folder was written, in sentences.
    """

    dtype: str
    lossless: bool
    table: str
    table_sha256: str
    tensors: int
    files: int
    size_bytes: int
    operations: dict[str, int]
    tied: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    proofs: tuple[str, ...]


class InputInfo(_Strict):
    """The batch both models ran on; both rows and columns can be made again from seed and lengths."""

    seed: int
    lengths: tuple[int, ...]
    sha256: str
    padded: bool
    window_bites: bool


class Threshold(_Strict):
    """A number that decided in the report's phase, and where it comes from."""

    dtype: Dtype
    criterion: Literal["contract", "noise", "direct"]
    measure: str
    value: float
    origin: str
    applied: bool


class EnginePass(_Strict):
    """One pass of the engine and what the engine itself said of it (information only)."""

    dtype: Dtype
    mode: Mode
    padiff_verdict: bool | None
    error: str


class TraceInfo(_Strict):
    """One side that was recorded alone.

    Attributes:
        file: As given.
        content_sha256: Digest of the trace's document, which holds the digest of every tensor.
    """

    side: Literal["reference", "candidate"]
    file: str
    content_sha256: str
    created: str
    tool_version: str
    machine: Machine


class Engine(_Strict):
    """What drove both models.

    Attributes:
        traces: What was compared where the models did not run here; then `environment` is where they were judged.
    """

    name: EngineName
    version: str
    passes: tuple[EnginePass, ...]
    traces: tuple[TraceInfo, ...] = ()


class Environment(_Strict):
    """Machine and versions. Rounding depends on the instruction set, so it is recorded and pinned."""

    versions: dict[str, str]
    platform: str
    cpu: str
    cpu_flags: tuple[str, ...]
    pins: dict[str, str]
    torch_cpu_capability: str
    torch_threads: int
    paddle_device: str


def run_words(phase: Phase, steps: int | None, attention: Attention, tensor_parallel: int) -> str:
    """What was run, for people: `forward`, `step of 3 steps`, `forward with blockwise attention on 2 ranks`."""
    of = f" of {steps} steps" if steps else ""
    by = "" if attention == "eager" else f" with {attention} attention"
    return phase + of + by + (f" on {tensor_parallel} ranks" if tensor_parallel > 1 else "")


def rank_line(report: "Report") -> str:
    """What the ranks of a divided candidate showed, in one line."""
    shown = [f"{check.dtype} {check.what} {check.compared} of {check.expected}" for check in report.ranks]
    wrong = sum(len(check.wrong) for check in report.ranks)
    return f"{report.tensor_parallel} ranks: {', '.join(shown) or 'nothing was compared'}; {wrong or 'none'} wrong"


class Report(_Strict):
    """A whole comparison.

    Attributes:
        phase: What was run; a report holds one phase.
        steps: Optimizer steps of the step phase, else null.
        attention: How the candidate computed attention; the reference's is eager.
        tensor_parallel: Among how many ranks the candidate's weights were divided; 1 if they were not.
        ranks: What those ranks have in common, and what they do not; empty if there was one.
        conversion: Null where the candidate's folder has no conversion manifest, or was not at hand.
        overrides: Limits that the project set itself; shown by every view of the report.
    """

    schema_version: Literal[4] = 4
    tool_version: str
    created: str
    verdict: Verdict
    exit_code: int
    policy: Policy
    dtype: Dtype
    phase: Phase
    steps: int | None
    attention: Attention
    tensor_parallel: int = Field(ge=1)
    execution: dict[Dtype, Execution]
    model: ModelInfo
    conversion: ConversionInfo | None
    inputs: InputInfo
    thresholds: tuple[Threshold, ...]
    overrides: tuple[AppliedOverride, ...]
    coverage: Coverage
    weights: tuple[WeightCheck, ...]
    ranks: tuple[RankCheck, ...]
    rows: tuple[Row, ...] = Field(min_length=1)
    first_failing: Failing | None
    cause: Cause | None = None
    hints: tuple[str, ...]
    engine: Engine
    environment: Environment
    timings_s: dict[str, float]
    command: str
    content_sha256: str = ""

    @property
    def run(self) -> str:
        """What was run, for people."""
        return run_words(self.phase, self.steps, self.attention, self.tensor_parallel)

    def sealed(self) -> "Report":
        """This report with its digest filled in."""
        return self.model_copy(update={"content_sha256": self.digest()})

    def digest(self) -> str:
        """SHA-256 over everything but the digest itself."""
        document = self.model_dump(mode="json", exclude={"content_sha256"})
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
