"""Why a comparison fails: which known mistake the first failing probe shows."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from modernbert_align.core.rows import Dtype

Level = Literal["explained", "partial", "unexplained", "structural"]


class Tried(BaseModel):
    """A mistake that was considered.

    Attributes:
        name: The mistake.
        value: Which one of those that differ in a number only, in words.
        ratio: What it leaves of the difference between candidate and reference; 0 is all explained, 1 nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    value: str
    ratio: float


class Cause(BaseModel):
    """What the first failing probe says about the candidate's mistake.

    Attributes:
        probe: The probe that was looked at, by itself.
        level: explained (what a candidate with this mistake would compute is what this one computes, up to rounding),
            partial (most of the difference is explained, not all), unexplained, or structural (there are no values to
            explain: the finding is the cause).
        names: The mistakes that fit, more than one if they cannot be told apart; empty where none does.
        statement: The finding in one sentence without a period.
        residual: rms(candidate - reference); None where there are no values.
        left: What the best mistake leaves of it.
        ratio: The same as a part of the residual.
        rounding: How much rounding may leave.
        tried: Every mistake that was considered and shows on these inputs, best first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    probe: str
    dtype: Dtype
    level: Level
    names: tuple[str, ...] = ()
    statement: str
    residual: float | None = None
    left: float | None = None
    ratio: float | None = None
    rounding: float | None = None
    tried: tuple[Tried, ...] = ()
