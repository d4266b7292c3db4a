"""One compared probe: what was measured, and what was judged from it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

Mode = Literal["isolated", "accumulated"]
Phase = Literal["forward", "backward", "step"]
# What was differentiated: a fixed random projection of the outputs, or the loss of the model's own head.
Loss = Literal["projection", "head"]
Dtype = Literal["fp32", "bf16"]
Observation = Literal["compared", "missing", "extra", "shape_mismatch", "dtype_mismatch", "nonfinite", "empty"]
Status = Literal["pass", "explained", "fail", "missing", "extra", "shape_mismatch", "dtype_mismatch", "nonfinite"]
Attention = Literal["eager", "blockwise"]  # of the candidate; the reference's is eager
EngineName = Literal["padiff", "stream", "autograd", "trace"]  # trace: both sides were recorded alone

ENGINES: tuple[EngineName, ...] = ("padiff", "stream")  # that run both models in the forward phase
ATTENTIONS: tuple[Attention, ...] = ("eager", "blockwise")
MODES: tuple[Mode, ...] = ("isolated", "accumulated")
PHASES: tuple[Phase, ...] = ("forward", "backward", "step")


class Record(BaseModel):
    """What an engine saw of one probe in one pass. Measured numbers are None where they could not be taken.

    Attributes:
        probe: A compared module; in the backward phase also a weight, whose gradient is compared; in the step phase a
            weight or a moment of the optimizer.
        mode: isolated (the module's own error, its inputs being the reference's) or accumulated (end to end).
        loss: What was differentiated; None in the forward phase.
        observation: Why there are, or are no, numbers.
        reason: In words, where `observation` is not `compared`.
        shape: Of the reference's tensor.
        elements: How many elements were compared (padding left out).
        mean_abs, max_abs, rel_l2: See `core.metrics.Metrics`.
        candidate_error, reference_error: rms distance of either side from the float64 oracle.
        ulps: Elements per bin of `core.metrics.ULP_BINS`; bf16 only.
        scale: Smallest magnitude that errors are relative to, where that depends on the values: gradients that cancel.
        null_rel_l2: The reference against itself: the largest rel_l2 of `null_parts`.
        null_parts: rel_l2 by name of the variation: `sdpa` for eager attention, `permuted` order of every sum in a
            Linear; of gradients and what follows from them also the `oracle`.
        padiff_equal: PaDiff's own elementwise verdict; information only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: str
    dtype: Dtype
    mode: Mode
    phase: Phase = "forward"
    loss: Loss | None = None
    observation: Observation
    reason: str = ""
    shape: tuple[int, ...] | None = None
    elements: int | None = None
    mean_abs: float | None = None
    max_abs: float | None = None
    rel_l2: float | None = None
    reference_rms: float | None = None
    scale: float = 0.0
    equal_share: float | None = None
    worst_index: tuple[int, ...] | None = None
    worst_candidate: float | None = None
    worst_reference: float | None = None
    candidate_error: float | None = None
    reference_error: float | None = None
    ulps: tuple[int, ...] | None = None
    null_rel_l2: float | None = None
    null_parts: dict[str, float] = {}
    padiff_equal: bool | None = None


class Row(Record):
    """A judged record.

    Attributes:
        status: The row's verdict.
        contract: Whether criterion 2 (the contract) applies to this row.
        contract_limit: Largest mean_abs the contract allows.
        direct_limit: Largest rel_l2 criterion 4 allows: a multiple of the null.
        null_ratio: rel_l2 over the null (the larger of the measured one and the roundoff floor).
        noise_ratio: Criterion 3, rms(candidate - fp64) / rms(reference - fp64); None where the candidate's error is
            below the floor, or without an oracle.
        noise_limit: Largest noise_ratio.
        failed: The criteria the row does not meet.
        overridden: The criteria whose limit is the project's own, not the installed one.
        waived: Of these, the ones that the row meets only because of it.
    """

    status: Status
    contract: bool
    contract_limit: float | None = None
    direct_limit: float | None = None
    null_ratio: float | None = None
    noise_ratio: float | None = None
    noise_limit: float | None = None
    failed: tuple[Literal["hygiene", "contract", "noise", "direct"], ...] = ()
    overridden: tuple[Literal["contract", "noise", "direct"], ...] = ()
    waived: tuple[Literal["contract", "noise", "direct"], ...] = ()

    @model_validator(mode="after")
    def _a_failed_criterion_has_its_limit(self) -> "Row":
        limits = {"contract": self.contract_limit, "noise": self.noise_limit, "direct": self.direct_limit}
        limits["contract"] = None if self.mean_abs is None else limits["contract"]
        unlimited = [name for name in self.failed if name in limits and limits[name] is None]
        if unlimited:
            raise ValueError(f"it fails the {unlimited[0]} criterion without the numbers that say so")
        return self


class WeightDifference(BaseModel):
    """A candidate weight that is not the reference's, through the table.

    Attributes:
        probe: The probe whose module owns the weight.
        differing: Elements that differ.
        max_abs: Largest difference; None if the shapes differ or a value is not finite.
        looks: What the difference looks like, in words; empty if nothing obvious.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    paddle: str
    hf: str
    probe: str
    dtype: Dtype
    problem: Literal["values", "shape", "dtype", "missing", "unmapped"]
    differing: int | None = None
    elements: int | None = None
    max_abs: float | None = None
    looks: str = ""


class WeightCheck(BaseModel):
    """Criterion 1 on weights: in memory, bit for bit, both models.

    Attributes:
        dtype: Which run.
        expected: Tensors the table lists for this model.
        compared: How many of them were compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    dtype: Dtype
    expected: int
    compared: int
    differences: tuple[WeightDifference, ...]


RankFact = Literal["weights", "values", "randomness"]


class RankCheck(BaseModel):
    """Whether tensor-parallel ranks agree where they must, and differ where they must.

    Attributes:
        dtype: Which run.
        what: `weights` and `values` (what is compared): divided ones have a share from every rank, the others are equal
            bit for bit on all; `randomness`: dropout of what is divided differs between ranks, of what is common it is
            the same.
        expected: How many there are to look at.
        compared: How many every rank had.
        wrong: Names of those that are not as they must be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    dtype: Dtype
    what: RankFact
    expected: int
    compared: int
    wrong: tuple[str, ...]
