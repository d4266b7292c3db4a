"""Numbers that decide, as declared in `configs/tolerances/`, each with its origin."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modernbert_align.core.probes import Probe
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.core.rows import Dtype, Mode, Phase
from modernbert_align.errors import TableError, UsageError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scope(_Strict):
    """Where the contract applies: fixtures by name, probes by pattern (`*` is every probe) but for exempt ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    fixtures: tuple[str, ...]
    probes: tuple[str, ...]
    exempt: tuple[str, ...] = Field(default=(), alias="except")

    def covers(self, pattern: str) -> bool:
        """Whether a probe pattern such as `layers.{i}` is under contract."""
        return ("*" in self.probes or pattern in self.probes) and pattern not in self.exempt


class Contract(_Strict):
    """Criterion 2: the largest mean_abs."""

    mean_abs: float = Field(gt=0)
    origin: str = Field(min_length=1)
    isolated: Scope
    accumulated: Scope

    def scope(self, mode: Mode) -> Scope:
        """Where the contract applies in one mode."""
        return self.isolated if mode == "isolated" else self.accumulated


class Ratio(_Strict):
    """The largest ratio of criterion 3 or 4, and a larger one for rows of at most `small_elements` elements."""

    factor: float = Field(gt=0)
    origin: str = Field(min_length=1)
    small_elements: int = Field(ge=0)
    small_factor: float = Field(gt=0)
    small_origin: str = Field(min_length=1)

    def factor_for(self, elements: int) -> float:
        """The largest ratio for a row of so many compared elements."""
        return self.small_factor if elements <= self.small_elements else self.factor


class Noise(Ratio):
    """Criterion 3. Neither side's error counts as less than `floor` roundings of the row's values.

    Attributes:
        small_floor: The same for the reference's error in rows of at most `small_elements` elements, where it does not
            count as less than the measured null either.
    """

    floor: float = Field(gt=0)
    small_floor: float = Field(gt=0)
    floor_origin: str = Field(min_length=1)


class Criteria(_Strict):
    """Criteria 3 and 4 of one phase."""

    noise: Noise
    direct: Ratio


class Tolerance(_Strict):
    """Everything that decides about one dtype.

    Attributes:
        unit_roundoff: Largest relative error of rounding to the dtype.
        accumulator_roundoff: The same for the format sums are kept in.
        contract: For the forward phase; no other has one.
        forward, backward, step: By phase.
    """

    dtype: Dtype
    unit_roundoff: float = Field(gt=0)
    accumulator_roundoff: float = Field(gt=0)
    contract: Contract
    forward: Criteria
    backward: Criteria
    step: Criteria

    def criteria(self, phase: Phase) -> Criteria:
        """Criteria 3 and 4 of a phase."""
        return {"forward": self.forward, "backward": self.backward, "step": self.step}[phase]

    def roundoff(self, probe: Probe) -> float:
        """Largest relative error of rounding a probe's values to the format they are kept in."""
        return self.accumulator_roundoff if probe.float32 else self.unit_roundoff

    def floor(self, probe: Probe) -> float:
        """How far two faithful computations may be apart, relatively: one rounding and the probe's widest sum."""
        return self.roundoff(probe) + self.accumulator_roundoff * math.sqrt(probe.fan_in)


class Override(_Strict):
    """A limit that a project sets itself, in place of the installed one, for the rows it names.

    Attributes:
        probe: Name of a row, or a pattern: `layers.*.mlp`, where `*` stands for anything but a dot.
        mode: None for both.
        criterion: contract limits mean_abs, and puts rows under contract that are not; noise limits noise_ratio; direct
            limits null_ratio.
        limit: The largest value that passes.
        reason: Why, in words that the report repeats.
    """

    probe: str = Field(min_length=1)
    dtype: Dtype
    phase: Phase = "forward"
    mode: Mode | None = None
    criterion: Literal["contract", "noise", "direct"]
    limit: float = Field(gt=0, allow_inf_nan=False, strict=True)
    reason: str = Field(min_length=1)

    @model_validator(mode="after")
    def _contract_is_of_the_forward_phase(self) -> "Override":
        if self.criterion == "contract" and self.phase != "forward":
            raise ValueError("the contract is about the forward phase; use noise or direct")
        if not any(letter.isalpha() for letter in self.reason):
            raise ValueError("the reason has no words")
        return self

    def covers(self, probe: str, dtype: Dtype, mode: Mode, phase: Phase) -> bool:
        """Whether it is about a row."""
        names, patterns = probe.split("."), self.probe.split(".")
        return (
            (dtype, phase) == (self.dtype, self.phase)
            and self.mode in (None, mode)
            and len(names) == len(patterns)
            and all(fnmatchcase(name, pattern) for name, pattern in zip(names, patterns, strict=True))
        )


class AppliedOverride(Override):
    """An override and how many rows of a comparison it decided about."""

    rows: int


class Overrides:
    """All overrides of a project.

    Raises:
        UsageError: In `limit`, if two set the same criterion of the same row.
    """

    def __init__(self, overrides: Sequence[Override] = ()) -> None:
        self._all = tuple(overrides)
        self._rows = [0] * len(self._all)

    def limits(self, probe: str, dtype: Dtype, mode: Mode, phase: Phase) -> dict[str, float]:
        """Criterion -> limit of a row, where one is overridden."""
        found: dict[str, float] = {}
        for n, override in enumerate(self._all):
            if override.covers(probe, dtype, mode, phase):
                if override.criterion in found:
                    raise UsageError(
                        f"two tolerance overrides set the {override.criterion} limit of {probe} ({dtype}, {mode})",
                        hint="keep one, or make their patterns narrower",
                    )
                found[override.criterion] = override.limit
                self._rows[n] += 1
        return found

    @property
    def applied(self) -> tuple[AppliedOverride, ...]:
        """Each override with the number of rows that asked for it so far."""
        return tuple(
            AppliedOverride(**override.model_dump(), rows=rows)
            for override, rows in zip(self._all, self._rows, strict=True)
        )


def load_tolerance(dtype: Dtype) -> Tolerance:
    """Load `configs/tolerances/<dtype>.toml`.

    Raises:
        TableError: The file is malformed.
    """
    path = configs_dir() / "tolerances" / f"{dtype}.toml"
    raw, _ = read_toml(path)
    try:
        return Tolerance.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise TableError(f"`{path.name}`: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def load_tolerances(dtypes: tuple[Dtype, ...]) -> Mapping[Dtype, Tolerance]:
    """Load the tolerances of several dtypes."""
    return {dtype: load_tolerance(dtype) for dtype in dtypes}
