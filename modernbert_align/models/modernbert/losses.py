"""The reference's losses, in the precision the reference computes them in.

Source: transformers 5.23.0, loss/loss_utils.py, and the heads of models/modernbert/modeling_modernbert.py.
"""

import numpy as np
import paddle
import paddle.nn.functional as F

from modernbert_align.models.modernbert.blockwise import Indices
from modernbert_align.models.modernbert.boundaries import sequence_of_token
from modernbert_align.models.modernbert.precision import rounded


def cross_entropy(logits: paddle.Tensor, labels: paddle.Tensor, ignore_index: int = -100) -> paddle.Tensor:
    """Mean cross entropy over the labels that count; not a number if none does, as in the reference.

    Paddle's own mean divides by all positions when the ignored label is negative, and its log_softmax takes time with
    the square of the number of classes on CPU (paddle 3.3.1: 0.3 s for one row of 50368).

    Args:
        logits: [positions classes].
        labels: [positions]; `ignore_index` does not count.

    Returns:
        Scalar in the dtype of `logits`.
    """
    counted = labels != ignore_index  # [positions]
    safe = paddle.where(counted, labels, paddle.zeros_like(labels)).unsqueeze(-1)  # [positions 1]
    wide = logits.astype("float32")
    shifted = wide - wide.max(axis=-1, keepdim=True).detach()  # [positions classes]
    chosen = paddle.take_along_axis(shifted, safe, axis=-1).squeeze(-1)  # [positions]
    log_probability = chosen - shifted.exp().sum(axis=-1).log()  # [positions]
    return _mean_of_counted(log_probability, counted, logits.dtype)


def _mean_of_counted(log_probability: paddle.Tensor, counted: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """[positions] float32, [positions] bool -> the loss in the logits' dtype."""
    picked = log_probability.astype(dtype).astype("float32")  # rounded where log_softmax rounds its result
    counted = counted.astype("float32")
    total = (-(picked * counted).sum()).astype(dtype)  # the reference keeps the sum in the logits' dtype
    return rounded(paddle.divide, total, counted.sum())


def classification_loss(
    logits: paddle.Tensor, labels: paddle.Tensor, num_labels: int, problem_type: str | None
) -> paddle.Tensor:
    """Loss of a sequence classifier: regression, one label, or several.

    Args:
        logits: [batch num_labels].
        labels: [batch] class indices, or [batch num_labels] (regression with one label: [batch]) numbers.
        problem_type: `regression`, `single_label_classification`, `multi_label_classification`, or None to tell from
            the number of labels and their dtype.
    """
    if problem_type is None:
        integers = labels.dtype in (paddle.int64, paddle.int32)
        single = "single_label_classification" if integers else "multi_label_classification"
        problem_type = "regression" if num_labels == 1 else single
    if problem_type == "single_label_classification":
        return cross_entropy(logits.reshape([-1, num_labels]), labels.flatten())
    wide = logits.astype("float32")  # with float32 labels the reference computes these two in float32
    if problem_type == "regression":
        squeezed = (wide.flatten(), labels.flatten()) if num_labels == 1 else (wide, labels)
        return F.mse_loss(*squeezed)
    return F.binary_cross_entropy_with_logits(wide, labels)


def span_loss(
    start_logits: paddle.Tensor,
    end_logits: paddle.Tensor,
    start_positions: paddle.Tensor,
    end_positions: paddle.Tensor,
    boundaries: Indices | None = None,
) -> paddle.Tensor:
    """Mean of the two cross entropies; positions beyond the sequence do not count.

    Args:
        start_logits, end_logits: [batch seq].
        start_positions, end_positions: [batch] or [batch 1].
        boundaries: [sequences+1], of packed logits [1 total]; then positions are [sequences], each counted from the
            start of its sequence.
    """
    if boundaries is None:
        beyond = start_logits.shape[1]
        start = cross_entropy(start_logits, start_positions.flatten().clip(0, beyond), ignore_index=beyond)
        end = cross_entropy(end_logits, end_positions.flatten().clip(0, beyond), ignore_index=beyond)
    else:
        start = _packed_cross_entropy(start_logits, start_positions, boundaries)
        end = _packed_cross_entropy(end_logits, end_positions, boundaries)
    return rounded(paddle.scale, rounded(paddle.add, start, end), scale=0.5)


def _packed_cross_entropy(logits: paddle.Tensor, positions: paddle.Tensor, boundaries: Indices) -> paddle.Tensor:
    """`cross_entropy` of sequences whose tokens are the classes.

    Args:
        logits: [1 total].
        positions: [sequences], from the start of each; beyond its end they do not count.
        boundaries: [sequences+1].
    """
    starts, lengths = (paddle.to_tensor(numbers) for numbers in (boundaries[:-1], np.diff(boundaries)))  # [sequences]
    sequence = paddle.to_tensor(sequence_of_token(boundaries))  # [total]
    positions = positions.flatten().clip(0).astype("int64")
    counted = positions < lengths
    wide = logits.squeeze(0).astype("float32")  # [total]
    highest = paddle.geometric.segment_max(wide.detach(), sequence)  # [sequences]
    shifted = wide - highest.gather(sequence)
    chosen = shifted.gather(starts + paddle.minimum(positions, lengths - 1))  # [sequences]
    log_probability = chosen - paddle.geometric.segment_sum(shifted.exp(), sequence).log()
    return _mean_of_counted(log_probability, counted, logits.dtype)
