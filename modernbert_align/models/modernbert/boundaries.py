"""Packed input: where the sequences of a row start and end, and what their tokens are pooled to.

Axes in the shape comments are those of attention.py, and:
    total               tokens of the packed row
    sequences           sequences in it

Source: `cu_seqlens` is that of flash-attn (flash_attn_interface.py, flash_attn_varlen_func); that restarting positions
mean packed input is after transformers 5.23.0, masking_utils.py, find_packed_sequence_indices. (ModernBERT there
hands no positions to the masks: with eager and sdpa attention its sequences see each other.)
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from modernbert_align.errors import UsageError
from modernbert_align.models.modernbert.blockwise import Indices
from modernbert_align.models.modernbert.precision import rounded


def sequence_boundaries(
    shape: list[int],
    cu_seqlens: paddle.Tensor | npt.NDArray[Any] | None,
    position_ids: paddle.Tensor | None,
    attention_mask: paddle.Tensor | None,
) -> Indices | None:
    """The sequences of packed input: as `cu_seqlens` says, or else from each position 0 to the next.

    Args:
        shape: batch and seq of the input, or 1 and total; more axes do not matter.
        cu_seqlens: [sequences+1], integers: 0, and where each sequence ends.
        position_ids: [batch_or_1 seq]. Those of padding do not count.
        attention_mask: [batch seq], 1 at real tokens.

    Returns:
        [sequences+1], or None if the input is an ordinary batch.

    Raises:
        UsageError: The arguments contradict each other, or are not what packed input looks like.
    """
    if not paddle.in_dynamic_mode():
        if cu_seqlens is not None:
            raise UsageError(
                "packed input goes by the lengths of its sequences, which a static graph has not",
                hint="export the model for padded batches: leave cu_seqlens out",
            )
        return None
    if cu_seqlens is None and position_ids is None:
        return None
    batch, seq = shape[:2]
    mask = None if attention_mask is None else attention_mask.astype("bool").numpy()
    if mask is not None and mask.all():
        mask = None
    restarts = None if position_ids is None else _restarts(batch, seq, position_ids.numpy(), mask)
    if cu_seqlens is None and restarts is None:
        return None
    named = "position_ids that start again at 0" if cu_seqlens is None else "cu_seqlens"
    if batch != 1:
        raise UsageError(
            f"packed input is one row, [1, total], but there are {batch} rows and {named}",
            hint="put the rows' sequences one behind the other into one row; or give an attention_mask instead",
        )
    if mask is not None:
        raise UsageError(
            f"attention_mask hides {int((~mask).sum())} of {seq} tokens, but packed input ({named}) has no padding",
            hint="take the padding out of the row and leave attention_mask out",
        )
    if cu_seqlens is None:
        return np.asarray([0, *(restarts or ()), seq], dtype=np.int64)
    boundaries = _checked(cu_seqlens, seq)
    if position_ids is not None:
        positions = position_ids.numpy()[0]
        if positions[0] != 0 or (restarts or ()) != tuple(boundaries[1:-1]):
            starts = (np.flatnonzero(positions == 0).tolist(), boundaries[:-1].tolist())
            raise UsageError(
                "position_ids are 0 at tokens {}, but cu_seqlens starts sequences at tokens {}".format(
                    *map(_some, starts)
                ),
                hint="leave position_ids out: they are 0, 1, 2, ... in every sequence",
            )
    return boundaries


def _restarts(
    batch: int, seq: int, positions: npt.NDArray[Any], mask: npt.NDArray[np.bool_] | None
) -> tuple[int, ...] | None:
    """Where positions are 0 again, behind the first token; None if in no row. Padding does not count.

    Raises:
        UsageError: Positions do not rise from one token of a sequence to the next.
    """
    if positions.shape not in ((1, seq), (batch, seq)):
        raise UsageError(f"position_ids have shape {list(positions.shape)}, the input has [{batch}, {seq}]")
    found: tuple[int, ...] = ()
    for number in range(len(positions) if mask is None else batch):
        row = positions[number % len(positions)]
        tokens = np.arange(seq) if mask is None else np.flatnonzero(mask[number])
        falls = tokens[1:][np.diff(row[tokens]) <= 0]
        wrong = falls[row[falls] != 0]
        if wrong.size:
            raise UsageError(
                f"position_ids go from {row[wrong[0] - 1]} to {row[wrong[0]]} at token {wrong[0]} of row {number}",
                hint="positions rise within a sequence; those of the next one in a packed row start at 0",
            )
        found = found or tuple(falls.tolist())
    return found or None


def _checked(cu_seqlens: paddle.Tensor | npt.NDArray[Any], seq: int) -> Indices:
    given = cu_seqlens.numpy() if isinstance(cu_seqlens, paddle.Tensor) else np.asarray(cu_seqlens)
    wrong = ""
    if given.ndim != 1 or len(given) < 2 or given.dtype.kind not in "iu":
        wrong = f"it has shape {list(given.shape)} and dtype {given.dtype}"
    elif given[0] != 0:
        wrong = f"it starts at {given[0]}"
    elif given[-1] != seq:
        wrong = f"it ends at {given[-1]}"
    elif (np.diff(given.astype(np.int64)) <= 0).any():
        place = int(np.argmax(np.diff(given.astype(np.int64)) <= 0))
        wrong = f"{given[place + 1]} follows {given[place]}"
    if wrong:
        raise UsageError(
            f"cu_seqlens must be integers that rise from 0 to the row's {seq} tokens, but {wrong}",
            hint="it is 0, and then where each sequence ends; leave out sequences without tokens",
        )
    return given.astype(np.int64)


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def sequence_of_token(boundaries: Indices) -> Indices:
    """[sequences+1] -> [total], which sequence each token belongs to."""
    return np.repeat(np.arange(len(boundaries) - 1), np.diff(boundaries))


def check_targets(name: str, targets: paddle.Tensor, boundaries: Indices) -> None:
    """Refuse labels that are not one for each sequence of a packed row; a single one would be broadcast.

    Raises:
        UsageError: There are more or fewer of them.
    """
    sequences = len(boundaries) - 1
    if not targets.shape or targets.shape[0] != sequences:
        raise UsageError(
            f"{name} have shape {list(targets.shape)}, but the packed row has {sequences} sequences",
            hint="give one for each sequence, in the order of the row",
        )


def packed_positions(boundaries: Indices) -> paddle.Tensor:
    """[sequences+1] -> [1 total], 0, 1, 2, ... in every sequence."""
    starts = boundaries[:-1][sequence_of_token(boundaries)]  # [total]
    return paddle.to_tensor(np.arange(boundaries[-1]) - starts).unsqueeze(0)  # [1 total]


def packed_pooling(hidden_states: paddle.Tensor, boundaries: Indices, pooling: str) -> paddle.Tensor:
    """Each sequence's first token (`cls`), or the mean over its tokens (`mean`).

    Args:
        hidden_states: [1 total hidden].
        boundaries: [sequences+1].

    Returns:
        [sequences hidden].
    """
    tokens = hidden_states.squeeze(0)  # [total hidden]
    if pooling == "cls":
        return rounded(paddle.gather, tokens, paddle.to_tensor(boundaries[:-1]))  # [sequences hidden]
    sums = rounded(paddle.geometric.segment_sum, tokens, paddle.to_tensor(sequence_of_token(boundaries)))
    counts = paddle.to_tensor(np.diff(boundaries).astype(np.float32)).astype(tokens.dtype).unsqueeze(-1)
    return rounded(paddle.divide, sums, counts)  # [sequences hidden]
