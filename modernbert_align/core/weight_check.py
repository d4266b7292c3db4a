"""Criterion 1 on weights: what both models hold in memory, compared bit for bit through the table."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from modernbert_align.core.cast import FLOATS
from modernbert_align.core.ops import Bits
from modernbert_align.core.rows import Dtype, WeightCheck, WeightDifference
from modernbert_align.core.table import Entry, Side

State = Mapping[str, tuple[Bits, str]]
_FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def check_weights(entries: Sequence[Entry], candidate: State, reference: State, dtype: Dtype) -> WeightCheck:
    """Compare every weight of the table, and report every one that only one side has.

    Args:
        candidate, reference: name -> (bits, dtype name) of everything the model's state dict holds.
    """
    differences: list[WeightDifference] = []
    compared = 0
    for entry in entries:
        ours, theirs = candidate.get(entry.paddle), reference.get(entry.hf)
        if ours is None or theirs is None:
            side = "candidate" if ours is None else "reference"
            differences.append(_difference(entry, dtype, "missing", looks=f"the {side} does not have it"))
            continue
        compared += 1
        difference = _compare(entry, dtype, ours, theirs, entries, reference)
        if difference is not None:
            differences.append(difference)
    for side, state, names in (
        ("candidate", candidate, {entry.paddle for entry in entries}),
        ("reference", reference, {entry.hf for entry in entries}),
    ):
        for name in sorted(set(state) - names):
            differences.append(
                WeightDifference(
                    paddle=name if side == "candidate" else "",
                    hf=name if side == "reference" else "",
                    probe="output",
                    dtype=dtype,
                    problem="unmapped",
                    looks=f"only the {side} has it and no row of the table maps it",
                )
            )
    return WeightCheck(dtype=dtype, expected=len(entries), compared=compared, differences=tuple(differences))


def weight_digests(entries: Sequence[Entry], state: State, side: Side) -> tuple[dict[str, str], tuple[str, ...]]:
    """SHA-256 of every weight, in Hugging Face's layout, so that both sides' digests of one weight are equal.

    Args:
        state: name -> (bits, dtype name) of everything the model's state dict holds.
        side: Whose names and layout it has.

    Returns:
        Hugging Face's name -> digest over dtype, shape and bits, without what the model does not have; and the names
        that no row of the table maps.
    """
    digests = {}
    for entry in entries:
        held = state.get(entry.name(side))
        if held is not None:
            bits, dtype = held
            if side == "paddle" and bits.shape == entry.paddle_shape:
                bits = entry.inverse_op().apply(bits)
            digest = hashlib.sha256(f"{dtype} {list(bits.shape)} ".encode())
            digest.update(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
            digests[entry.hf] = digest.hexdigest()
    return digests, tuple(sorted(set(state) - {entry.name(side) for entry in entries}))


def _difference(entry: Entry, dtype: Dtype, problem: str, **found: object) -> WeightDifference:
    return WeightDifference.model_validate(
        {"paddle": entry.paddle, "hf": entry.hf, "probe": entry.probe, "dtype": dtype, "problem": problem, **found}
    )


def _compare(
    entry: Entry, dtype: Dtype, ours: tuple[Bits, str], theirs: tuple[Bits, str], entries: Sequence[Entry], state: State
) -> WeightDifference | None:
    (candidate, candidate_dtype), (source, reference_dtype) = ours, theirs
    if candidate_dtype != reference_dtype:
        return _difference(entry, dtype, "dtype", looks=f"{candidate_dtype}, the reference's is {reference_dtype}")
    reference = entry.op.apply(source)
    if candidate.shape != reference.shape:
        return _difference(
            entry, dtype, "shape", looks=f"{list(candidate.shape)}, the reference's is {list(reference.shape)}"
        )
    if np.array_equal(candidate, reference):
        return None
    differing = candidate != reference
    float_type = FLOATS[_FORMATS[candidate_dtype]]
    values = candidate.view(float_type).astype(np.float64) - reference.view(float_type).astype(np.float64)
    return _difference(
        entry,
        dtype,
        "values",
        differing=int(differing.sum()),
        elements=candidate.size,
        max_abs=float(np.abs(values).max()) if np.isfinite(values).all() else None,
        looks=_looks(entry, candidate, reference, entries, state),
    )


def _looks(entry: Entry, candidate: Bits, reference: Bits, entries: Sequence[Entry], state: State) -> str:
    """Name the mistake if it is an obvious one."""
    if entry.op.name == "T" and candidate.shape == reference.T.shape and np.array_equal(candidate, reference.T):
        return "it is the reference's weight without the transpose"
    if candidate.ndim == 2:
        for count, parts in ((2, "two halves"), (3, "three parts")):
            order = _order_of_parts(candidate, reference, count)
            if order:
                return f"its {parts} are swapped" if count == 2 else f"its {parts} are in the order {order}"
    for other in entries:
        same_kind = other.hf != entry.hf and other.paddle_shape == candidate.shape and other.hf in state
        if same_kind and np.array_equal(other.op.apply(state[other.hf][0]), candidate):
            return f"it is the reference's `{other.hf}`"
    return ""


def _order_of_parts(candidate: Bits, reference: Bits, count: int) -> str:
    """In which order the candidate has equal parts of the reference's columns, numbered from 1; empty if in none."""
    width, rest = divmod(candidate.shape[1], count)
    if rest:
        return ""
    ours, theirs = (values.reshape(len(values), count, width) for values in (candidate, reference))
    for order in itertools.permutations(range(count)):
        if all(np.array_equal(ours[:, place], theirs[:, part]) for place, part in enumerate(order)):
            return ", ".join(str(part + 1) for part in order)
    return ""
