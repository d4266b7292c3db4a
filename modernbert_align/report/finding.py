"""What a report has found, in words: which modules are wrong by themselves, by how much, and what to run next.

A fault shows in the row where it enters and in all that follow from it. What tells faults apart is which modules are
wrong by themselves, in which layers, and which of the same kind are right.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from modernbert_align.core.rows import Dtype, Row
from modernbert_align.report.schema import Report
from modernbert_align.report.svg import layer_of
from modernbert_align.report.terminal import kind


@dataclass(frozen=True, kw_only=True)
class Excess:
    """A limit that a row does not meet.

    Attributes:
        times: The value as a multiple of the limit; None where there is no value.
    """

    measure: str
    value: float | None
    limit: float
    times: float | None


def excesses(row: Row) -> tuple[Excess, ...]:
    """The limits of criteria 2 to 4 that a row does not meet."""
    found = []
    for criterion, measure, value, limit in (
        ("contract", "mean_abs", row.mean_abs, row.contract_limit),
        ("noise", "noise ratio", row.noise_ratio, row.noise_limit),
        ("direct", "rel_l2", row.rel_l2, row.direct_limit),
    ):
        if criterion in row.failed and limit:
            found.append(
                Excess(measure=measure, value=value, limit=limit, times=None if value is None else value / limit)
            )
    return tuple(found)


def wrong_by_themselves(report: Report) -> tuple[str, ...]:
    """Which modules have an error of their own, a sentence without a period per dtype; forward phase only.

    For example `fp32: attn of every sliding layer (1, 2) and of no other`, or `fp32: attn of layer 2 alone; 1, of the
    same kind (sliding), passes`.
    """
    if report.phase != "forward":
        return ()
    said: dict[str, list[Dtype]] = {}
    for dtype in dict.fromkeys(row.dtype for row in report.rows):
        rows = [row for row in report.rows if row.dtype == dtype and row.mode == "isolated"]
        kinds = dict.fromkeys(kind(row) for row in rows if row.status not in ("pass", "explained", "missing"))
        parts = [_of_kind(name, [row for row in rows if kind(row) == name], report) for name in kinds]
        if parts:
            said.setdefault("; ".join(parts), []).append(dtype)
    return tuple(f"{' and '.join(dtypes)}: {text}" for text, dtypes in said.items())


def _of_kind(name: str, rows: Sequence[Row], report: Report) -> str:
    """Where one kind of module is wrong by itself, and where it is right."""
    by_layer = {layer: row for row in rows for layer in [layer_of(row.probe)] if layer is not None}
    wrong = [layer for layer, row in by_layer.items() if row.status not in ("pass", "explained", "missing")]
    if not wrong:
        return name
    if len(wrong) == len(by_layer):
        return f"{name} of every layer"
    types = report.model.config.get("layer_types", ())
    kinds = {layer: str(types[layer]).partition("_")[0] for layer in by_layer if layer < len(types)}
    of_kind = {kinds.get(layer) for layer in wrong}
    same = [layer for layer in by_layer if kinds.get(layer) in of_kind]
    if len(of_kind) == 1 and None not in of_kind and same == wrong and len(wrong) > 1:
        return f"{name} of every {of_kind.pop()} layer ({_numbers(wrong)}) and of no other"
    right = [layer for layer in same if layer not in wrong]
    where = f"{name} of layer{'s' if len(wrong) > 1 else ''} {_numbers(wrong)} alone"
    if not right or name != "attn" or len(of_kind) != 1 or None in of_kind:
        return where
    verb = "pass" if len(right) > 1 else "passes"
    return f"{where}; {_numbers(right)}, of the same kind ({of_kind.pop()}), {verb}"


def _numbers(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:6]))
    return shown if len(layers) <= 6 else f"{shown} and {len(layers) - 6} more"


def next_commands(report: Report) -> tuple[tuple[str, str], ...]:
    """What to run next: (why, command)."""
    first = report.first_failing
    if report.verdict not in ("FAIL", "NOT_COMPARED") or first is None or report.engine.traces:
        return ()
    if not report.command.startswith("modernbert-align diff"):
        return ()
    found = []
    if report.phase != "forward":
        found.append(("First see that the outputs are right:", _with(report.command, "phase", "forward")))
    if report.dtype == "bf16" and first.dtype == "fp32":
        found.append(("It fails in fp32 already, which is faster and clearer:", _with(report.command, "dtype", "fp32")))
    differ = any(check.differences for check in report.weights)
    if differ and report.conversion is not None and report.model.candidate != "converted":
        folder = shlex.quote(report.model.candidate)
        found.append(("Is the file wrong, or what was loaded from it?", f"modernbert-align verify {folder}"))
    return tuple(found)


def _with(command: str, option: str, value: str) -> str:
    """A command with another value of an option; without `--steps`, which belongs to one phase alone."""
    if option == "phase":
        command = re.sub(r" --steps[ =]\S+", "", command)
    changed, count = re.subn(rf"(--{option})[ =]\S+", rf"\1 {value}", command)
    return changed if count else f"{command} --{option} {value}"


def caveats(report: Report) -> tuple[str, ...]:
    """What a reader of a good verdict alone would not expect, in sentences."""
    if report.verdict not in ("PASS", "EXPLAINED"):
        return ()
    found = [
        f"{dtype} was emulated on Paddle's side (float32 kernels, every result rounded): this speaks for the model, "
        f"not for Paddle's {dtype} kernels."
        for dtype, execution in report.execution.items()
        if execution.candidate == "emulated"
    ]
    contract = {one.dtype: one.value for one in report.thresholds if one.criterion == "contract"}
    for dtype, limit in contract.items():
        beyond = [
            row
            for row in report.rows
            if row.dtype == dtype and not row.contract and row.status == "pass" and (row.mean_abs or 0.0) > limit
        ]
        if beyond and report.phase == "forward":
            names = list(dict.fromkeys(row.probe for row in beyond))
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            found.append(
                f"In {dtype}, {len(beyond)} rows that are not under the contract differ by more than its {limit:g} "
                f"({shown}): by no more than rounding explains there."
            )
    return tuple(found)
