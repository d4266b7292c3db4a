"""What a selftest finds out: the outcome of every fault, and alarms without one."""

from pydantic import BaseModel, ConfigDict

from modernbert_align.core.cause import Level
from modernbert_align.core.rows import MODES, Dtype, Mode, Phase

CRITERIA = ("hygiene", "contract", "noise", "direct", "weights")
_PLACE: dict[Mode, str] = {"isolated": "own", "accumulated": "end"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Outcome(_Strict):
    """What the comparison made of one fault in one precision.

    Attributes:
        must_die: Whether the comparison has to fail.
        equivalent: Whether the change changes nothing but rounding, so that it must not fail.
        killed_by: All criteria that saw it.
        seen: Mode -> criteria that saw it there; weights have no mode.
        first_probe: Where the comparison places it; empty if nowhere.
        effect: Largest rel_l2 over what rounding explains, in the forward phase the largest isolated one; null where
            there is something else to see.
        cause_level, cause_names: What the comparison names as the cause; null and empty where there is nothing to look
            at.
        expected_cause: What it must name; empty where there is nothing to name.
    """

    name: str
    head: str
    dtype: Dtype
    phase: Phase
    must_die: bool
    equivalent: bool
    killed: bool
    killed_by: tuple[str, ...]
    seen: dict[Mode, tuple[str, ...]]
    verdict: str
    first_probe: str
    expected_probe: str
    effect: float | None
    cause_level: Level | None
    cause_names: tuple[str, ...]
    expected_cause: str

    @property
    def survived(self) -> bool:
        """Whether the comparison missed what it had to find."""
        return self.must_die and not self.killed

    @property
    def false_alarm(self) -> bool:
        """Whether the comparison failed for a change that changes nothing."""
        return self.equivalent and self.killed

    @property
    def said(self) -> str:
        """The outcome in words."""
        if self.equivalent:
            return "false alarm" if self.killed else "harmless, passed"
        if self.survived:
            return "SURVIVED"
        if not self.killed:
            return "within rounding"
        return "killed" if self.first_probe == self.expected_probe else f"killed, not at {self.expected_probe}"

    @property
    def cause_found(self) -> bool:
        """Whether the right cause is named as certain, alone or with others that cannot be told apart from it."""
        return self.cause_level == "explained" and self.expected_cause in self.cause_names

    @property
    def cause_wrong(self) -> bool:
        """Whether a wrong cause is named as certain."""
        return self.cause_level == "explained" and not self.cause_found

    @property
    def cause_said(self) -> str:
        """The cause in words; empty where there is nothing to look at."""
        names = " or ".join(self.cause_names)
        match self.cause_level:
            case "explained":
                return f"WRONG: {names}" if self.cause_wrong else names
            case "partial":
                return f"perhaps {names}"
            case "unexplained":
                return "not known"
            case "structural":
                return "the finding itself"
            case None:
                return ""

    def places(self, criterion: str) -> str:
        """Where a criterion saw it: `own`, `end`, both, or nothing."""
        if criterion == "weights":
            return "seen" if "weights" in self.killed_by else ""
        return " + ".join(_PLACE[mode] for mode in MODES if criterion in self.seen.get(mode, ()))


class Alarm(_Strict):
    """An unbroken model that the comparison failed.

    Attributes:
        seed: Of weights and inputs; null for the fixture itself.
    """

    head: str
    dtype: Dtype
    phase: Phase
    seed: int | None
    verdict: str
    detail: str
