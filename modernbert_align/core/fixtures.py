"""Seeded checkpoints and the inputs they are compared on, as declared in `configs/fixtures/`."""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modernbert_align.core.model_config import SLIDING, ModelConfig
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.errors import TableError, UsageError

DEFAULT_LENGTHS = (192, 160)


class TokenizerSpec(BaseModel):
    """Size and special ids of the tokenizer trained for a fixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    vocab_size: int = Field(gt=261)
    pad_token_id: int
    cls_token_id: int
    sep_token_id: int


class InputSpec(BaseModel):
    """Which inputs a comparison runs on: a seed and the number of tokens per row."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int
    lengths: tuple[int, ...] = Field(min_length=2)


class Fixture(BaseModel):
    """One seeded checkpoint.

    Attributes:
        weights: `hf-init` as transformers draws them; `sensitive` with every bias and norm weight away from its neutral
            value; `stress` heavy-tailed, with outlier channels, as trained checkpoints have them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    weights: Literal["hf-init", "sensitive", "stress"]
    seed: int
    config: dict[str, Any]
    tokenizer: TokenizerSpec
    inputs: InputSpec

    @property
    def under_contract(self) -> bool:
        """Whether the user's contract is for such weights; with `stress`, PyTorch differs from itself by more."""
        return self.weights != "stress"


def contract_fixture(name: str | None) -> str | None:
    """`name` if it is that of a fixture under contract, else None."""
    return name if name is not None and load_fixture(name)[0].under_contract else None


def fixture_names() -> list[str]:
    """Names of all fixtures."""
    return sorted(path.stem for path in (configs_dir() / "fixtures").glob("*.toml"))


def load_fixture(name: str) -> tuple[Fixture, str]:
    """Load a fixture.

    Returns:
        The fixture and a digest of all that decides its bytes: its file, the corpus, the writing packages.

    Raises:
        UsageError: There is no such fixture.
        TableError: Its file is malformed.
    """
    path = configs_dir() / "fixtures" / f"{name}.toml"
    if name not in fixture_names():
        near = difflib.get_close_matches(name, fixture_names(), n=1)
        raise UsageError(
            f"`{name}` is neither a directory nor a fixture nor a hub id",
            hint=f"did you mean `{near[0]}`?"
            if near
            else f"fixtures: {', '.join(fixture_names())}; hub ids look like `answerdotai/ModernBERT-base`",
        )
    raw, digest = read_toml(path)
    if "like" in raw:  # another fixture's sizes and inputs, under other weights
        shared, shared_digest = read_toml(path.with_name(f"{raw['like']}.toml"))
        raw = shared | {key: value for key, value in raw.items() if key != "like"}
        digest += shared_digest
    try:
        fixture = Fixture.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise TableError(f"`{path.name}`: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    parts = [digest, hashlib.sha256(corpus_path().read_bytes()).hexdigest()]
    for package in ("torch", "transformers", "tokenizers"):
        try:
            parts.append(f"{package}=={version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} absent")
    return fixture, hashlib.sha256("\n".join(parts).encode()).hexdigest()


def corpus_path() -> Path:
    """The text the fixtures' tokenizers are trained on."""
    return configs_dir() / "fixtures" / "corpus.txt"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch for both models.

    Attributes:
        input_ids: [batch seq], int64.
        attention_mask: [batch seq], int64, 1 at real tokens.
        labels: What the head's loss needs, by argument name; empty for the encoder.
        choices: Whether the rows are the choices of one question.
        spec: What they were drawn from.
        window_bites: Whether sliding layers hide something that full layers see.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    labels: Mapping[str, npt.NDArray[Any]]
    choices: bool
    spec: InputSpec
    window_bites: bool

    @property
    def arguments(self) -> dict[str, npt.NDArray[Any]]:
        """Everything the models are called with, by name and in the head's shapes."""
        rows = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}  # each [batch seq]
        if self.choices:
            rows = {name: values[None] for name, values in rows.items()}  # each [1 choices seq]
        return {**rows, **self.labels}

    @property
    def sha256(self) -> str:
        """Digest of everything the models are called with."""
        digest = hashlib.sha256()
        for name, values in sorted(self.arguments.items()):
            digest.update(f"{name}{values.shape}".encode() + values.tobytes())
        return digest.hexdigest()

    @property
    def padded(self) -> bool:
        """Whether any position is padding."""
        return not bool(self.attention_mask.all())


def make_inputs(spec: InputSpec, config: ModelConfig, head: str) -> Inputs:
    """Draw a batch for a head: uniform token ids without the padding id, rows padded on the right, and labels.

    Raises:
        UsageError: The model takes shorter sequences than the batch has.
    """
    seq = max(spec.lengths)
    if seq > config.max_position_embeddings:
        raise UsageError(
            f"the comparison needs {seq} tokens, the model takes {config.max_position_embeddings} "
            "(`max_position_embeddings`)"
        )
    generator = np.random.Generator(np.random.PCG64(spec.seed))
    allowed = np.setdiff1d(
        np.arange(config.vocab_size), [config.pad_token_id if config.pad_token_id is not None else -1]
    )
    input_ids = generator.choice(allowed, size=(len(spec.lengths), seq)).astype(np.int64)
    attention_mask = (np.arange(seq)[None, :] < np.array(spec.lengths)[:, None]).astype(np.int64)
    input_ids[attention_mask == 0] = config.pad_token_id if config.pad_token_id is not None else 0
    return Inputs(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=_labels(head, config, generator, attention_mask),
        choices=head == "multiple_choice",
        spec=spec,
        window_bites=SLIDING not in config.layer_types or min(spec.lengths) > config.half_window + 1,
    )


def _labels(
    head: str, config: ModelConfig, generator: np.random.Generator, mask: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """Labels for the loss of a head; sparse prediction runs without, since labels would change its logits' shape."""
    rows, seq = mask.shape
    if head == "masked_lm" and not config.sparse_prediction:
        chosen = (generator.random((rows, seq)) < 0.3) & (mask == 1)
        chosen[np.arange(rows), mask.argmax(axis=1)] = True  # a loss over nothing is not a number
        return {"labels": np.where(chosen, generator.integers(0, config.vocab_size, (rows, seq)), -100)}
    if head == "token_classification":
        return {"labels": np.where(mask == 1, generator.integers(0, config.num_labels, (rows, seq)), -100)}
    if head == "question_answering":
        return {name: generator.integers(0, mask.sum(axis=1)) for name in ("start_positions", "end_positions")}
    if head == "multiple_choice":
        return {"labels": generator.integers(0, rows, (1,))}
    if head == "sequence_classification":
        kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        if kind == "single_label_classification":
            return {"labels": generator.integers(0, config.num_labels, (rows,))}
        shape = (rows,) if kind == "regression" and config.num_labels == 1 else (rows, config.num_labels)
        drawn = generator.random(shape).astype(np.float32)
        return {"labels": drawn if kind == "regression" else (drawn < 0.5).astype(np.float32)}
    return {}


def default_inputs(config: ModelConfig) -> InputSpec:
    """Inputs for a model that is no fixture: long enough for its window to bite, one row padded."""
    longest = min(max(DEFAULT_LENGTHS[0], 2 * config.half_window + 64), config.max_position_embeddings)
    return InputSpec(seed=0, lengths=(longest, longest - longest // 6))
