"""What a pretraining does, declared: a TOML file, checked before anything runs."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modernbert_align.core.resources import read_toml
from modernbert_align.errors import UsageError

Corpus = Literal["sources", "docstrings"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Start(_Part):
    """What the training begins with.

    Attributes:
        checkpoint: A Paddle checkpoint with a masked-LM head, as `convert` or `tile` writes it; relative to the folder
            the program is started in.
        tokenizer: `checkpoint` takes the checkpoint's, `train` trains one of the checkpoint's size on the data: for
            weights that have not been trained with a tokenizer yet.
    """

    checkpoint: Path
    tokenizer: Literal["checkpoint", "train"]


class Data(_Part):
    """Where text comes from.

    Attributes:
        root: A folder of Python files; the standard library if None.
        include: Patterns of paths below it.
        held_out_every: Of so many files, in the order of their paths, one is for evaluation and never trained on.
        look_ahead: How many sequences the packer chooses from.
    """

    root: Path | None = None
    include: tuple[str, ...] = Field(default=("**/*.py",), min_length=1)
    held_out_every: int = Field(default=50, ge=2)
    look_ahead: int = Field(default=256, ge=1)


class Masking(_Part):
    """Which tokens are to be predicted, and what stands in their place.

    Attributes:
        probability: Share of the tokens that are to be predicted; special tokens never are.
        evaluation_probability: The same in evaluations, whatever the training has, so that they compare.
        masked: Of those, the share that [MASK] stands for.
        random: Of those, the share that another token stands for; the rest stays as it is.
    """

    probability: float = Field(default=0.3, gt=0, lt=1)
    evaluation_probability: float = Field(default=0.15, gt=0, lt=1)
    masked: float = Field(default=0.8, ge=0, le=1)
    random: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> "Masking":
        if self.masked + self.random > 1:
            raise ValueError("masked and random are shares of one whole and exceed it")
        return self


class OptimizerSettings(_Part):
    """StableAdamW's constants; the learning rate is the stages'."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    epsilon: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=1e-5, ge=0, lt=1)


class Evaluation(_Part):
    """Evaluations on held-out files.

    Attributes:
        every: Steps between two; there is also one before the first step and one after the last.
        rows: Packed rows of one evaluation, always the same ones of a stage.
    """

    every: int = Field(default=100, ge=1)
    rows: int = Field(default=8, ge=1)


class Checkpoints(_Part):
    """When the state is saved.

    Attributes:
        every: Steps between two; there is also one at the end of every stage.
        keep: How many are kept, the newest.
    """

    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)


class Stage(_Part):
    """A stretch of the training with one context length.

    Attributes:
        steps: Optimizer steps.
        length: Tokens of the longest sequence, special tokens included; longer texts are cut into several.
        theta: RoPE base of the layers with full attention.
        row_tokens: Capacity of a packed row. A row is one forward and backward pass.
        rows: Rows of a batch, after the batch-size warm-up.
        first_rows: Rows of the stage's first batch.
        rows_warmup: Steps over which batches grow from `first_rows` to `rows`, each size for as many steps.
        learning_rate: The highest.
        warmup: First steps, over which the learning rate rises linearly.
        decay: Last steps, over which it falls as 1 - sqrt.
        mixture: How often each corpus is in an epoch.
    """

    name: str = Field(min_length=1)
    steps: int = Field(ge=1)
    length: int = Field(ge=3)
    theta: float = Field(gt=1)
    row_tokens: int
    rows: int = Field(ge=1)
    first_rows: int = Field(ge=1)
    rows_warmup: int = Field(ge=0)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(ge=0)
    decay: int = Field(ge=0)
    mixture: dict[Corpus, int] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> "Stage":
        if self.row_tokens < self.length:
            raise ValueError(f"a row of {self.row_tokens} tokens does not hold a sequence of {self.length}")
        if self.first_rows > self.rows:
            raise ValueError("first_rows is more than rows")
        if self.warmup + self.decay > self.steps or self.rows_warmup > self.steps:
            raise ValueError(f"warm-up and decay do not fit into {self.steps} steps")
        if min(self.mixture.values()) < 1:
            raise ValueError("a corpus of the mixture is in an epoch at least once")
        return self


class Recipe(_Part):
    """A whole pretraining."""

    seed: int = Field(ge=0)
    start: Start
    data: Data = Data()
    masking: Masking = Masking()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("two stages have one name")
        return self

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def sha256(self) -> str:
        """Digest of all that decides the numbers; when the state is saved and evaluated does not."""
        return hashlib.sha256(self.model_dump_json(exclude={"checkpoints", "evaluation"}).encode()).hexdigest()

    def place(self, step: int) -> tuple[int, int]:
        """The stage's number and the step within it, of a step of the whole, all from 0.

        Raises:
            ValueError: The recipe has fewer steps.
        """
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        raise ValueError(f"the recipe has {self.steps} steps")


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: There is no such file, or it declares something that cannot be.
        TableError: It is not TOML.
    """
    try:
        document, _ = read_toml(path)
    except OSError as error:
        raise UsageError(
            f"`{path}` cannot be read: {error.strerror}", hint="--recipe takes a TOML file as beside this program"
        ) from None
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        raise UsageError(f"`{path}`: {where}: {first['msg']}", hint="docs/pretraining.md has every key") from None
