"""From texts to masked, packed batches. Everything is drawn anew from the seed and the place: nothing has to be saved.

Axes in the shape comments:
    total       tokens of a row
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.common.corpus import Document, docstrings, source_files
from examples.pretrain_mlm import schedule
from examples.pretrain_mlm.masking import IGNORED, mask_tokens
from examples.pretrain_mlm.recipe import Corpus, Data, Recipe
from modernbert_align.errors import UsageError
from modernbert_align.models.modernbert import ModernBertTokenizer, Packer

# What a generator of random numbers is for; part of its seed.
ORDER, MASKS, EVALUATION, DROPOUT = range(4)

Row = dict[str, npt.NDArray[Any]]
Tokens = npt.NDArray[np.int64]


def generator(recipe: Recipe, purpose: int, *place: int) -> np.random.Generator:
    """Random numbers for one purpose at one place of the training; the same whenever they are asked for."""
    return np.random.Generator(np.random.PCG64([recipe.seed, purpose, *place]))


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents, training and held-out files apart.

    Attributes:
        training: Corpus -> documents.
        held_out: Corpus -> documents.
    """

    training: Mapping[Corpus, list[Document]]
    held_out: Mapping[Corpus, list[Document]]


def read_texts(settings: Data) -> Texts:
    """Read the files and set some of them apart.

    Raises:
        UsageError: There are too few.
    """
    files = source_files(settings.root, settings.include)
    parts = ([f for i, f in enumerate(files) if i % settings.held_out_every], files[:: settings.held_out_every])
    training, held_out = (_corpora(part) for part in parts)
    for part, name in ((training, "train on"), (held_out, "evaluate on")):
        for corpus, documents in part.items():
            if not documents:
                raise UsageError(
                    f"{len(files)} files have no {corpus} to {name}", hint="name more files in `data.include`"
                )
    return Texts(training=training, held_out=held_out)


def _corpora(files: list[Document]) -> dict[Corpus, list[Document]]:
    return {"sources": files, "docstrings": docstrings(files)}


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """Token ids of all documents, without special tokens.

    Attributes:
        training: Corpus -> documents.
        held_out: Corpus -> documents.
        tokenizer: What they were made with.
    """

    training: Mapping[Corpus, list[Tokens]]
    held_out: Mapping[Corpus, list[Tokens]]
    tokenizer: ModernBertTokenizer

    @property
    def sha256(self) -> str:
        """Digest of every token."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for corpus, documents in sorted(part.items()):
                digest.update(f"{corpus} {len(documents)}\n".encode())
                for tokens in documents:
                    digest.update(f"{len(tokens)}\n".encode() + tokens.tobytes())
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens to train on, each corpus once."""
        return sum(len(tokens) for documents in self.training.values() for tokens in documents)


def tokenize(texts: Texts, tokenizer: ModernBertTokenizer) -> Corpora:
    """Turn every document into token ids, without special tokens."""

    def encoded(part: Mapping[Corpus, list[Document]]) -> dict[Corpus, list[Tokens]]:
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        return {
            corpus: [
                np.array(found.ids, dtype=np.int64)
                for found in encode([document.text for document in documents], add_special_tokens=False)
            ]
            for corpus, documents in part.items()
        }

    return Corpora(training=encoded(texts.training), held_out=encoded(texts.held_out), tokenizer=tokenizer)


class Batches:
    """The batches of one stage, in order; where to begin is free, and the batches are the same wherever that is.

    Args:
        number: The stage's number, from 0.
    """

    def __init__(self, recipe: Recipe, number: int, corpora: Corpora) -> None:
        self._recipe, self._number, self._corpora = recipe, number, corpora
        self._stage = recipe.stages[number]

    def start(self, step: int) -> Iterator[list[Row]]:
        """Batches from a step of the stage on: rows of the model's packed input, masked, with labels.

        What came before is packed once more and left out, which takes a fraction of the time that training on it took.
        """
        rows = iter(self._packer(self._epochs()))
        skipped = schedule.rows_before(self._stage, step)
        next(islice(rows, skipped, skipped), None)
        for place in range(step, self._stage.steps):
            draw = generator(self._recipe, MASKS, self._number, place)
            batch = islice(rows, schedule.batch_rows(self._stage, place))
            yield [self._masked(row, draw, self._recipe.masking.probability) for row in batch]

    def held_out(self) -> list[Row]:
        """The rows of an evaluation, the same every time."""
        draw = generator(self._recipe, EVALUATION, self._number)
        pieces = self._pieces(self._corpora.held_out)
        stream = (pieces[index] for index in draw.permutation(len(pieces)))
        rows = islice(self._packer(stream), self._recipe.evaluation.rows)
        return [self._masked(row, draw, self._recipe.masking.evaluation_probability) for row in rows]

    def _packer(self, sequences: Iterator[Tokens]) -> Packer:
        return Packer(sequences, self._stage.row_tokens, look_ahead=self._recipe.data.look_ahead)

    def _epochs(self) -> Iterator[Tokens]:
        """Sequences without end, every epoch in an order of its own."""
        pieces = self._pieces(self._corpora.training)
        epoch = 0
        while True:
            for index in generator(self._recipe, ORDER, self._number, epoch).permutation(len(pieces)):
                yield pieces[index]
            epoch += 1

    def _pieces(self, documents: Mapping[Corpus, list[Tokens]]) -> list[Tokens]:
        """The stage's mixture, cut into sequences of at most its length, each within [CLS] and [SEP]."""
        tokenizer, inner = self._corpora.tokenizer, self._stage.length - 2
        return [
            np.concatenate([[tokenizer.cls_token_id], tokens[at : at + inner], [tokenizer.sep_token_id]])
            for corpus, copies in self._stage.mixture.items()
            for tokens in documents[corpus] * copies
            for at in range(0, len(tokens), inner)
        ]

    def _masked(self, row: Row, draw: np.random.Generator, probability: float) -> Row:
        tokenizer, settings = self._corpora.tokenizer, self._recipe.masking
        hidden, labels = mask_tokens(
            row["input_ids"],
            draw,
            probability=probability,
            masked=settings.masked,
            random=settings.random,
            mask_token_id=tokenizer.mask_token_id,
            special_ids=tokenizer.all_special_ids,
            vocab_size=len(tokenizer),
        )
        return {**row, "input_ids": hidden, "labels": labels}  # each [1 total]


def counted(row: Row) -> int:
    """How many tokens of a row are predicted."""
    return int((row["labels"] != IGNORED).sum())


def row_tokens(rows: list[Row]) -> int:
    """Tokens of several rows."""
    return sum(row["input_ids"].size for row in rows)
