"""Packs a stream of sequences into rows without padding, for the model's packed input. Needs no framework.

Axes in the shape comments:
    total               tokens of a row
    sequences           sequences of a row

Source: the idea, greedy packing with a bounded buffer, is that of the ModernBERT paper (arXiv 2412.13663).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from modernbert_align.errors import UsageError

__all__ = ["Packer"]

TOO_LONG = ("refuse", "split")


class Packer:
    """Rows of whole sequences, each row as full as a bounded look-ahead allows.

    A row starts with the sequence that has waited longest and takes the longest that still fits, until none does. So
    a sequence waits for `look_ahead` rows at most, and memory holds `look_ahead` sequences. The same stream gives the
    same rows; no sequence is lost, repeated or cut (but see `too_long`), and no token is added.

    Iterating starts over: the counts below are of the latest iteration, so far.

    Args:
        sequences: Token ids of one sequence after another, special tokens included; or mappings with `input_ids` and
            `labels`, the labels being one integer per token, or one number for the sequence. Other keys are ignored.
        max_tokens: Capacity of a row.
        look_ahead: How many sequences to choose from. More of them fill rows better, and mix the order more.
        too_long: What to do about a sequence of more than `max_tokens`: `refuse` it, or `split` it into pieces that
            are sequences of their own, positions from 0. With `split` labels must be per token.

    Attributes:
        rows: Rows given out.
        tokens: Tokens in them.

    Raises:
        UsageError: An argument cannot be used; when iterating: a sequence cannot.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence[int] | Mapping[str, Any]],
        max_tokens: int = 8192,
        *,
        look_ahead: int = 256,
        too_long: str = "refuse",
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("look_ahead", look_ahead)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} must be a positive integer, not {value!r}")
        if too_long not in TOO_LONG:
            raise UsageError(f"too_long must be one of {', '.join(TOO_LONG)}, not {too_long!r}")
        self._sequences = sequences
        self.max_tokens = max_tokens
        self.look_ahead = look_ahead
        self.too_long = too_long
        self.rows = 0
        self.tokens = 0

    @property
    def efficiency(self) -> float | None:
        """Tokens per place in the rows so far, 1 being no place empty; None before the first row."""
        return self.tokens / (self.rows * self.max_tokens) if self.rows else None

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Rows as the model takes them, once they are tensors.

        Yields:
            `input_ids` [1 total], int64; `position_ids` [1 total], int64, from 0 in every sequence; `cu_seqlens`
            [sequences+1], int32, where sequences start, and the end of the last; and `labels`, if the stream has them:
            [1 total], int64, or [sequences], int64 or float32.
        """
        self.rows = self.tokens = 0
        source = self._pieces()
        waiting = list(islice(source, self.look_ahead))  # in order of arrival
        while waiting:
            row: list[_Piece] = []
            space = self.max_tokens
            place: int | None = 0
            while place is not None:
                row.append(waiting.pop(place))
                waiting.extend(islice(source, 1))
                space -= len(row[-1].ids)
                place = _longest_within(space, waiting)
            self.rows += 1
            self.tokens += self.max_tokens - space
            yield _joined(row)

    def _pieces(self) -> Iterator["_Piece"]:
        """The stream, checked; what is too long is split."""
        kind = ""
        for number, sequence in enumerate(self._sequences):
            name = f"sequence {number} of the stream"
            piece = _piece(sequence, name)
            if number and piece.kind != kind:
                raise UsageError(
                    f"{name} has {piece.kind}, those before have {kind}",
                    hint="give the same kind of labels with every sequence, or with none",
                )
            kind = piece.kind
            if len(piece.ids) <= self.max_tokens:
                yield piece
                continue
            if self.too_long == "refuse":
                raise UsageError(
                    f"{name} has {len(piece.ids)} tokens, a row has {self.max_tokens}",
                    hint='truncate it, raise max_tokens, or set too_long="split"',
                )
            if piece.labels is not None and not piece.labels.ndim:
                raise UsageError(
                    f"{name} has {len(piece.ids)} tokens and one label; its pieces would have none of their own",
                    hint="truncate it or raise max_tokens",
                )
            for start in range(0, len(piece.ids), self.max_tokens):
                cut = slice(start, start + self.max_tokens)
                yield _Piece(piece.ids[cut], None if piece.labels is None else piece.labels[cut])


@dataclass(frozen=True)
class _Piece:
    """A sequence, or a piece of one.

    Attributes:
        ids: [length], int64.
        labels: [length], or [] for one label; None if there are none.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[Any] | None

    @property
    def kind(self) -> str:
        """What labels there are; the same in a whole stream."""
        if self.labels is None:
            return "no labels"
        if self.labels.ndim:
            return "labels per token"
        return "a fraction as label" if self.labels.dtype.kind == "f" else "an integer as label"


def _piece(sequence: Sequence[int] | Mapping[str, Any], name: str) -> _Piece:
    given = sequence if isinstance(sequence, Mapping) else {"input_ids": sequence}
    if "input_ids" not in given:
        raise UsageError(f"{name} is a mapping without input_ids", hint=f"its keys are {', '.join(map(str, given))}")
    ids = np.asarray(given["input_ids"])
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise UsageError(f"{name} must be a list of at least one token id, integers", hint="leave empty sequences out")
    if given.get("labels") is None:
        return _Piece(ids.astype(np.int64), None)
    labels = np.asarray(given["labels"])
    number = labels.ndim == 0 and labels.dtype.kind in "iuf"
    if not number and (labels.shape != ids.shape or labels.dtype.kind not in "iu"):
        raise UsageError(
            f"labels of {name} must be one integer for each of its {len(ids)} tokens, or one number for all"
        )
    return _Piece(ids.astype(np.int64), labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))


def _longest_within(space: int, waiting: list[_Piece]) -> int | None:
    """Place of the longest sequence of at most `space` tokens, of equal ones the oldest; None if there is none."""
    found, length = None, 0
    for place, piece in enumerate(waiting):
        if length < len(piece.ids) <= space:
            found, length = place, len(piece.ids)
    return found


def _joined(row: list[_Piece]) -> dict[str, npt.NDArray[Any]]:
    lengths = [len(piece.ids) for piece in row]
    joined: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.concatenate([piece.ids for piece in row])[None],  # [1 total]
        "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],  # [1 total]
        "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32),  # [sequences+1]
    }
    labels = [piece.labels for piece in row if piece.labels is not None]
    if labels:
        joined["labels"] = np.concatenate(labels)[None] if labels[0].ndim else np.stack(labels)
    return joined
