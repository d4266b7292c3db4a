"""Attention without a matrix over all pairs of tokens, and without padding.

A batch is packed: the real tokens of all its rows stand in one row, and every sequence attends to itself only. Within
a sequence a block of queries at a time sees the keys it may see: all of them in full layers, those within the window
in sliding layers. Each block's softmax is the ordinary one over all its keys, so nothing is approximated.

Axes in the shape comments are those of attention.py, and:
    total               real tokens of the batch
    count, length       sequences of one length that stand next to each other, and that length
    queries, keys       of one block
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import paddle
import paddle.nn.functional as F

from modernbert_align.models.modernbert.precision import emulated, rounded

SLIDING_QUERIES = 128  # queries of a block in sliding layers
SCORES = 3 << 20  # scores of a block in full layers: 12 MiB, which stay in the cache and are not mapped anew each time
FEWEST_QUERIES = 256  # fewer make the products with all keys slower than the cache makes them fast
GROUPED_TOKENS = 512  # sequences are computed together up to this many tokens; longer ones are alone

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """Sequences of one length, side by side in the packed row.

    Attributes:
        start: Place of the first token in the packed row.
        count: How many sequences.
        slots: [length], where each token stood in its padded row; windows are measured in these places.
    """

    start: int
    count: int
    slots: Indices

    @property
    def length(self) -> int:
        """Tokens of one sequence."""
        return len(self.slots)

    @property
    def stop(self) -> int:
        """Where the next span starts."""
        return self.start + self.count * self.length


class Packing:
    """A batch as one row of real tokens, and back.

    Args:
        rows: For each sequence the places of its real tokens, ascending.
        shape: batch and seq of the padded batch; None if the batch came packed.
    """

    def __init__(self, rows: list[Indices], shape: tuple[int, int] | None = None) -> None:
        self.spans = _spans(rows)
        self._shape = shape
        self._kept: paddle.Tensor | None = None  # [total], places in the flat padded batch
        if shape is None or sum(map(len, rows)) == shape[0] * shape[1]:
            return
        kept = np.concatenate([row + i * shape[1] for i, row in enumerate(rows)])
        places = np.full(shape[0] * shape[1], len(kept))  # padding reads the row of zeros behind the last token
        places[kept] = np.arange(len(kept))
        self._kept, self._places = paddle.to_tensor(kept), paddle.to_tensor(places)

    def pack(self, padded: paddle.Tensor) -> paddle.Tensor:
        """[batch seq ...] -> [1 total ...]."""
        if self._shape is None:
            return padded
        flat = padded.flatten(0, 1)  # [batch*seq ...]
        if self._kept is not None:
            flat = rounded(paddle.gather, flat, self._kept)  # [total ...]
        return flat.unsqueeze(0)  # [1 total ...]

    def restore(self, packed: paddle.Tensor) -> paddle.Tensor:
        """[1 total hidden] -> [batch seq hidden], zeros at padding."""
        if self._shape is None:
            return packed
        flat = packed.squeeze(0)  # [total hidden]
        if self._kept is not None:
            flat = rounded(_gather_or_zero, flat, self._places)  # [batch*seq hidden]
        return flat.reshape([*self._shape, packed.shape[-1]])  # [batch seq hidden]


def _gather_or_zero(rows: paddle.Tensor, places: paddle.Tensor) -> paddle.Tensor:
    """[total hidden], [batch*seq] -> [batch*seq hidden]; place `total` gives zeros."""
    zeros = paddle.zeros([1, rows.shape[1]], dtype=rows.dtype)
    return paddle.gather(paddle.concat([rows, zeros]), places)


def packing(batch: int, seq: int, attention_mask: paddle.Tensor | None) -> Packing:
    """Pack a padded batch.

    Args:
        attention_mask: [batch seq], true (1) at real tokens; None if there is no padding. A row of padding only keeps
            its first token, so that no tensor is empty.
    """
    if attention_mask is None:
        return Packing([np.arange(seq)] * batch, (batch, seq))
    mask = attention_mask.astype("bool").numpy().copy()  # [batch seq]
    mask[~mask.any(axis=1), 0] = True
    return Packing([np.flatnonzero(row) for row in mask], (batch, seq))


def _spans(rows: list[Indices]) -> tuple[Span, ...]:
    found: list[Span] = []
    start = 0
    for row in rows:
        last = found[-1] if found else None
        alike = last is not None and len(row) == last.length and np.array_equal(row - row[0], last.slots)
        if last is not None and alike and (last.count + 1) * last.length <= GROUPED_TOKENS:
            found[-1] = Span(last.start, last.count + 1, last.slots)
        else:
            found.append(Span(start, 1, row - row[0]))
        start += len(row)
    return tuple(found)


def rotation(cos: paddle.Tensor, sin: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Tables for `rotate`.

    Args:
        cos: [1 total head_dim], rounded to the activations' dtype.
        sin: Like cos.

    Returns:
        cos and sin in float32, each [total head_dim]; the first half of sin is negated.
    """
    cos, sin = cos.squeeze(0).astype("float32"), sin.squeeze(0).astype("float32")  # [total head_dim]
    first, second = sin.chunk(2, axis=-1)
    return cos, paddle.concat([-first, second], axis=-1)


def rotate(x: paddle.Tensor, cos: paddle.Tensor, signed_sin: paddle.Tensor) -> paddle.Tensor:
    """The rotation of `apply_rotary_pos_emb`, bit for bit: the sign is in the table, not in the halves.

    Args:
        x: [... total head_dim], float32.
        cos: [total head_dim], float32; `signed_sin` alike. Both as `rotation` makes them.

    Returns:
        Same shape as x. Tables without the axes in front are what Paddle's CPU kernels broadcast fast.
    """
    return x * cos + paddle.roll(x, x.shape[-1] // 2, axis=-1) * signed_sin


def blockwise_attention(
    qkv: paddle.Tensor,
    tables: tuple[paddle.Tensor, paddle.Tensor],
    spans: tuple[Span, ...],
    num_heads: int,
    half_window: int | None,
    dropout: float,
    training: bool,
) -> paddle.Tensor:
    """Attention of packed sequences, block by block, rounding where `eager_attention` rounds.

    Args:
        qkv: [1 total 3*hidden], queries, keys and values before rotation.
        tables: See `rotation`.
        spans: The sequences.
        half_window: None for full attention.

    Returns:
        [1 total hidden].
    """
    total, hidden = qkv.shape[1], qkv.shape[2] // 3
    head_dim = hidden // num_heads
    narrow = _Narrow(qkv.dtype, emulated(qkv))
    dropout = dropout if training else 0.0
    wide = qkv.astype("float32") if narrow.emulated else qkv
    by_head = wide.reshape([total, 3 * num_heads, head_dim]).transpose([1, 0, 2])  # [3*heads total head_dim]
    # One copy in memory order: every operation on a view would make its own, and slower, element by element.
    q, k, v = by_head.contiguous().split(3)  # each [heads total head_dim]
    q, k = (narrow(rotate(x.astype("float32"), *tables)) for x in (q, k))
    scale = head_dim**-0.5
    if math.frexp(scale)[0] == 0.5:  # a power of two: the same bits whether queries or scores are scaled
        q, scale = q * scale, 1.0
    found = []
    for span in spans:
        shape = [num_heads, span.count, span.length, head_dim]
        own_q, own_k, own_v = (x[:, span.start : span.stop].reshape(shape) for x in (q, k, v))
        out = _attend(
            own_q, own_k, own_v, span.slots, scale, half_window, dropout, narrow
        )  # [heads count length head_dim]
        found.append(out.reshape([num_heads, span.count * span.length, head_dim]))
    joined = paddle.concat(found, axis=1) if len(found) > 1 else found[0]  # [heads total head_dim]
    return joined.transpose([1, 0, 2]).reshape([1, total, hidden]).astype(qkv.dtype)


@dataclass(frozen=True)
class _Narrow:
    """Rounds to the activations' dtype; where that is emulated, widens again for the next operation."""

    dtype: paddle.dtype
    emulated: bool

    def __call__(self, x: paddle.Tensor) -> paddle.Tensor:
        x = x.astype(self.dtype)
        return x.astype("float32") if self.emulated else x


def _attend(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    slots: Indices,
    scale: float,
    half_window: int | None,
    dropout: float,
    narrow: _Narrow,
) -> paddle.Tensor:
    """[heads count length head_dim] each -> [heads count length head_dim]."""
    heads, count, length, _ = q.shape
    half_window = None if half_window is None or half_window >= slots[-1] else half_window
    queries = SLIDING_QUERIES
    if half_window is None:
        queries = max(FEWEST_QUERIES, SCORES // (heads * count * length))
    bands: dict[bytes, paddle.Tensor] = {}
    found = []
    for start in range(0, length, queries):
        stop = min(start + queries, length)
        low, high = 0, length
        band = None
        if half_window is not None:
            low = int(np.searchsorted(slots, slots[start] - half_window))
            high = int(np.searchsorted(slots, slots[stop - 1] + half_window, side="right"))
            band = _band(slots[start:stop], slots[low:high], half_window, bands)
        scores = narrow(paddle.matmul(q[:, :, start:stop], k[:, :, low:high], transpose_y=True))
        if scale != 1.0:
            scores = narrow(scores * scale)  # [heads count queries keys]
        if band is not None:
            scores = scores + band.astype(scores.dtype)
        probabilities = narrow(F.softmax(scores.astype("float32"), axis=-1))
        if dropout:
            probabilities = F.dropout(probabilities, p=dropout)
        found.append(narrow(paddle.matmul(probabilities, v[:, :, low:high])))  # [heads count queries head_dim]
    return paddle.concat(found, axis=2) if len(found) > 1 else found[0]


def _band(queries: Indices, keys: Indices, half_window: int, known: dict[bytes, paddle.Tensor]) -> paddle.Tensor:
    """[queries keys], 0 where a key is within half a window of the query, minus infinity elsewhere."""
    distance = keys[None] - queries[:, None]  # [queries keys]
    hidden = np.abs(distance) > half_window
    name = hidden.tobytes() + bytes(str(hidden.shape), "ascii")
    if name not in known:
        known[name] = paddle.to_tensor(np.where(hidden, np.float32(-np.inf), np.float32(0)))
    return known[name]
