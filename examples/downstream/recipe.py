"""What is trained and how: the recipe both frameworks follow, the data they are given, and what a training leaves."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Side = Literal["reference", "null", "candidate"]
Head = Literal["sequence_classification", "token_classification"]

IGNORED = -100
RECIPE, DATA = "recipe.json", "data.json"
ARCHITECTURES: dict[Head, str] = {
    "sequence_classification": "ModernBertForSequenceClassification",
    "token_classification": "ModernBertForTokenClassification",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(_Strict):
    """Everything that decides a training beside its seed. Dropout is off, so nothing else is drawn.

    Attributes:
        head: Task head of the model.
        labels: Names of the classes.
        model: Sizes, by their keys in config.json.
        max_length: Tokens that a text is cut to.
        seeds: A training of each framework for every one; a seed draws the head's weights and the order of the data.
    """

    head: Head
    labels: tuple[str, ...] = ()
    model: dict[str, int] = {
        "vocab_size": 1024,
        "hidden_size": 96,
        "intermediate_size": 144,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "local_attention": 16,
        "max_position_embeddings": 128,
    }
    max_length: int = 64
    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    max_grad_norm: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)


class Example(_Strict):
    """A text with one label, or with labelled spans.

    Attributes:
        label: Index of the text's class; None with spans.
        spans: (start, end, class) in characters, in order and without overlap.
    """

    text: str
    label: int | None = None
    spans: tuple[tuple[int, int, int], ...] = ()


class Data(_Strict):
    """The examples of a task.

    Attributes:
        source: Where they are from, for the report.
    """

    source: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    evaluation: tuple[Example, ...]


class Run(_Strict):
    """What one training leaves behind.

    Attributes:
        losses: Of every step, before its update; None where it was not a finite number.
        learning_rates: That every step was taken with.
        batches: SHA-256 of what the model was given at every step.
        targets, predictions: Classes of the evaluation set, one per text or labelled token.
        seconds: That the steps took.
        versions: Of the packages that matter.
    """

    side: Side
    seed: int
    losses: tuple[float | None, ...]
    learning_rates: tuple[float, ...]
    batches: tuple[str, ...]
    targets: tuple[int, ...]
    predictions: tuple[int, ...]
    seconds: float
    versions: dict[str, str]


Encoded = dict[str, Any]
Batch = dict[str, npt.NDArray[np.int64]]


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a folder."""
    return Recipe.model_validate_json((folder / RECIPE).read_bytes())


def read_data(folder: Path) -> Data:
    """The data of a folder."""
    return Data.model_validate_json((folder / DATA).read_bytes())


def start_folder(folder: Path, seed: int, framework: Literal["hf", "paddle"]) -> Path:
    """Where the checkpoint is that a training starts from."""
    return folder / f"seed-{seed}" / f"start-{framework}"


def run_path(folder: Path, side: Side, seed: int) -> Path:
    """Where the record of a training is."""
    return folder / f"seed-{seed}" / f"{side}.json"


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Texts as token ids and labels, by the tokenizer of either framework.

    A token within a labelled text has the class of its last character; one that ends in a space between spans, and the
    special tokens, have none.

    Returns:
        Per example `input_ids`, a list of ids, and `labels`, an index or a list of indices.
    """
    encoded = tokenizer([e.text for e in examples], truncation=True, max_length=max_length, return_offsets_mapping=True)
    found = []
    for example, ids, offsets in zip(examples, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if example.label is not None:
            found.append({"input_ids": ids, "labels": example.label})
            continue
        classes = np.full(len(example.text), IGNORED)
        for start, end, label in example.spans:
            classes[start:end] = label
        labels = [int(classes[end - 1]) if end > start else IGNORED for start, end in offsets]
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(examples: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Examples as arrays, padded on the right to the longest.

    Returns:
        `input_ids` and `attention_mask` [batch seq], `labels` [batch] or [batch seq].
    """
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(rows: list[list[int]], value: int) -> npt.NDArray[np.int64]:
        return np.array([[*row, *[value] * (longest - len(row))] for row in rows], dtype=np.int64)  # [batch seq]

    ids = [example["input_ids"] for example in examples]
    labels = [example["labels"] for example in examples]
    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, IGNORED) if isinstance(labels[0], list) else np.array(labels, dtype=np.int64),
    }


def order(recipe: Recipe, seed: int, examples: int) -> list[list[int]]:
    """Which examples make up the batch of every step: epochs in an order of their own, one after the other."""
    generator = np.random.Generator(np.random.PCG64(seed))
    needed = recipe.steps * recipe.batch_size
    drawn = np.concatenate([generator.permutation(examples) for _ in range(-(-needed // examples))])[:needed]
    return [[int(index) for index in row] for row in drawn.reshape(recipe.steps, recipe.batch_size)]


def chunks(examples: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    """Examples in their order, some at a time."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def digest(batch: Batch) -> str:
    """SHA-256 of what a model is given."""
    found = hashlib.sha256()
    for name, values in sorted(batch.items()):
        found.update(f"{name}{values.shape}{values.dtype}".encode() + np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def finite(value: float) -> float | None:
    """A loss as a record has it."""
    return value if np.isfinite(value) else None


def answers(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Targets and predictions, without the positions that have no label.

    Args:
        logits: [... classes].
        labels: [...].
    """
    counted = labels != IGNORED
    return labels[counted].tolist(), logits.argmax(-1)[counted].tolist()
