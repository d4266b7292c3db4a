"""What was measured, one JSON object per line, appended as the training goes."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from modernbert_align.core.files import write_atomically
from modernbert_align.errors import UsageError


class Step(BaseModel):
    """One step of the optimizer.

    Attributes:
        step: From 1.
        loss: Mean over the batch's predicted tokens, before the step.
        learning_rate: Before clipping.
        batch_tokens: Tokens of the batch.
        packing_efficiency: Those per place in its rows.
        tokens_per_s: Those per second of the step, without evaluations and saving.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    stage: str
    loss: float
    learning_rate: float
    batch_tokens: int
    packing_efficiency: float
    tokens_per_s: float


class Evaluated(BaseModel):
    """One evaluation.

    Attributes:
        step: Steps taken before it.
        held_out_loss: Mean over the predicted tokens of the stage's held-out rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    stage: str
    held_out_loss: float


Line = Step | Evaluated
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class Metrics:
    """The file that is written.

    Args:
        after: Steps that were taken: lines of later ones, which a killed process left, are removed.

    Raises:
        UsageError: The file cannot be read or written.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        kept = [line for line in (read_metrics(path) if path.exists() else []) if line.step <= after]
        write_atomically(path, "".join(line.model_dump_json() + "\n" for line in kept))
        self._path = path
        self._known = {(line.step, line.stage) for line in kept if isinstance(line, Evaluated)}

    def add(self, line: Line) -> None:
        """Add a step or an evaluation; one of the same place is not repeated, which a resumed stage would do.

        Raises:
            UsageError: The file cannot be written.
        """
        if isinstance(line, Evaluated):
            if (line.step, line.stage) in self._known:
                return
            self._known.add((line.step, line.stage))
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line.model_dump_json() + "\n")
        except OSError as error:
            raise UsageError(
                f"cannot write `{self._path}`: {error.strerror}",
                hint="check free space and permissions, then continue with --resume",
            ) from None


def read_metrics(path: Path) -> list[Line]:
    """Every line, in order; the last one is left out if a killed process did not finish it.

    Raises:
        UsageError: This is no such file.
    """
    try:
        written = path.read_text(encoding="utf-8")
        return [_LINE.validate_json(line) for line in written[: written.rfind("\n") + 1].splitlines()]
    except (OSError, UnicodeError, ValidationError):
        raise UsageError(f"`{path}` cannot be read as metrics of a training", hint="delete it") from None
