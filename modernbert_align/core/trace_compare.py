"""Compares two traces: makes the records of a live comparison, without either framework.

In the isolated passes every module starts from drawn values, which are the same on both sides as long as both sides ran
the modules before it and these returned the same shapes. Where they did not, the next modules start from different
values, and nothing can be said about them: they are not compared.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modernbert_align.core.compare import Beside, Context, Output, compare
from modernbert_align.core.drawn import drawn_digest
from modernbert_align.core.fixtures import Inputs, InputSpec, make_inputs
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.probes import Probe, load_probes
from modernbert_align.core.rows import MODES, Dtype, Record, WeightCheck
from modernbert_align.core.table import Entry, Table
from modernbert_align.core.trace import Trace, TracedPass, TracedProbe, probes_digest
from modernbert_align.core.trace_file import TraceFile
from modernbert_align.errors import TraceError

_AGAIN = "record both sides again with the same model, options and version of modernbert-align"


@dataclass(frozen=True, kw_only=True)
class TracePair:
    """Two traces that belong together. Use `pair_traces`.

    Attributes:
        batch: The inputs both ran on, made again.
        probes: What both must have recorded, by the installed list.
        entries: The weights both must have had, by the installed table.
    """

    reference: TraceFile
    candidate: TraceFile
    config: ModelConfig
    batch: Inputs
    probes: tuple[Probe, ...]
    entries: tuple[Entry, ...]

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """What both recorded."""
        return self.reference.document.dtypes


def pair_traces(reference: TraceFile, candidate: TraceFile, table: Table) -> TracePair:
    """Check that two traces are the two sides of one comparison.

    Raises:
        TraceError: They are of other sides, or differ in dtypes, head, architecture, inputs, weights, table or probes.
        UsageError: The head is not known here.
    """
    for side, backend, file in (("reference", "hf", reference), ("candidate", "paddle", candidate)):
        if file.document.backend != backend:
            raise TraceError(
                f"`{file.path}` is not a trace of the {side}",
                hint=f"`modernbert-align trace --backend {backend}` makes one",
            )
    theirs, ours = reference.document, candidate.document
    keys = sorted({*theirs.model.config, *ours.model.config})
    differing = [
        (what, a, b)
        for what, a, b in (
            ("dtypes", ", ".join(theirs.dtypes), ", ".join(ours.dtypes)),
            ("head", theirs.model.head, ours.model.head),
            *((key, theirs.model.config.get(key), ours.model.config.get(key)) for key in keys),
        )
        if a != b
    ]
    if differing:
        what, a, b = differing[0]
        raise TraceError(f"the traces are not of one model: {what} is {a} in `{reference.path}`, {b} in the other")
    if theirs.inputs != ours.inputs:
        raise TraceError(f"the inputs of `{reference.path}` and `{candidate.path}` are not the same", hint=_AGAIN)
    head = table.check_head(theirs.model.head)
    config, batch = _inputs(reference)
    probes, entries = load_probes(config, head, table.prefix(head)), table.expand(config, head)
    for file in (reference, candidate):
        document = file.document
        if (document.model.table_sha256, document.probes_sha256) != (table.digest, probes_digest(probes)):
            raise TraceError(
                f"`{file.path}` was recorded with another name-mapping table or probe list than the installed ones",
                hint=_AGAIN,
            )
    for dtype in theirs.dtypes:
        _check_weights(reference, candidate, entries, dtype)
    return TracePair(
        reference=reference, candidate=candidate, config=config, batch=batch, probes=probes, entries=entries
    )


def _inputs(reference: TraceFile) -> tuple[ModelConfig, Inputs]:
    document = reference.document
    try:
        config = ModelConfig.from_dict(document.model.config)
        whole = len(config.layer_types) == config.num_hidden_layers
    except TypeError:
        whole = False
    if not whole:
        raise TraceError(f"`{reference.path}` records an architecture that is not one", hint=_AGAIN)
    recorded = document.inputs
    batch = make_inputs(InputSpec(seed=recorded.seed, lengths=recorded.lengths), config, document.model.head)
    if (batch.sha256, drawn_digest(batch.sha256)) != (recorded.sha256, recorded.drawn_sha256):
        raise TraceError(f"the inputs of `{reference.path}` are not those its seed and lengths give", hint=_AGAIN)
    return config, batch


def _check_weights(reference: TraceFile, candidate: TraceFile, entries: Sequence[Entry], dtype: Dtype) -> None:
    """Refuse weights that are not equal bit for bit, or that only one side has."""
    sides = [_weights(file.document, dtype) for file in (reference, candidate)]
    names = [entry.hf for entry in entries]
    differing = [name for name in names if len({side.get(name) for side in sides} - {None}) != 1]
    differing += [name for name in names if name not in differing and any(name not in side for side in sides)]
    if differing:
        lacking = [
            side for side, held in zip(("reference", "candidate"), sides, strict=True) if differing[0] not in held
        ]
        what = f"is not in the {lacking[0]}" if lacking else f"is not the same in both traces ({dtype})"
        more = f", and {len(differing) - 1} more weights" if len(differing) > 1 else ""
        raise TraceError(
            f"the weight `{differing[0]}` {what}{more}",
            hint="convert the reference's checkpoint and record the candidate again",
        )
    for side, file in (("reference", reference), ("candidate", candidate)):
        unmapped = [name for one in file.document.weights if one.dtype == dtype for name in one.unmapped]
        if unmapped:
            raise TraceError(f"only the {side} has the weight `{unmapped[0]}`: no row of the table maps it")


def _weights(document: Trace, dtype: Dtype) -> Mapping[str, str]:
    return next((one.sha256 for one in document.weights if one.dtype == dtype), {})


def weight_checks(pair: TracePair) -> tuple[WeightCheck, ...]:
    """Criterion 1 on weights, by dtype: `pair_traces` refuses any that differ."""
    count = len(pair.entries)
    return tuple(WeightCheck(dtype=dtype, expected=count, compared=count, differences=()) for dtype in pair.dtypes)


def compare_traces(pair: TracePair) -> tuple[Record, ...]:
    """Measure every probe of both traces, one after the other.

    Returns:
        A record for every dtype, mode and probe, whatever happened.

    Raises:
        TraceError: A file was changed.
    """
    return tuple(
        record
        for dtype in pair.dtypes
        for mode in MODES
        for record in _compare_pass(pair, Context(mask=pair.batch.attention_mask.astype(bool), dtype=dtype, mode=mode))
    )


def _compare_pass(pair: TracePair, context: Context) -> list[Record]:
    theirs = pair.reference.document.find(context.dtype, context.mode)
    ours = pair.candidate.document.find(context.dtype, context.mode)
    assert theirs is not None  # `open_trace` looked
    assert ours is not None
    in_time = _in_time(ours.stops, theirs.stops)
    records = []
    unlike = ""  # the probe from which the two sides went on with different values
    for probe in pair.probes:
        record = _unseen(pair, probe, context, theirs, ours, in_time)
        if record is None and unlike:
            record = context.unseen(
                probe, "missing", f"it depends on {unlike}, after which the two sides went on with different values"
            )
        records.append(record or _measured(pair, probe, context, theirs.probes[probe.name], ours.probes[probe.name]))
        if context.mode == "isolated" and not probe.key:
            if not _alike(theirs.probes.get(probe.name), ours.probes.get(probe.name)):
                unlike = probe.name
            elif probe.pattern == "layers.{i}":  # all that later probes start from
                unlike = ""
    return records


def _in_time(ours: Sequence[str], theirs: Sequence[str]) -> set[str]:
    """The probes that the candidate reached when the reference had reached them, both running side by side."""
    found, finished, position = set(), set(), 0
    for probe in dict.fromkeys(theirs):
        while position < len(ours) and ours[position] in finished:
            position += 1
        if position < len(ours) and ours[position] == probe:
            found.add(probe)
            position += 1
        finished.add(probe)
    return found


def _unseen(
    pair: TracePair, probe: Probe, context: Context, theirs: TracedPass, ours: TracedPass, in_time: set[str]
) -> Record | None:
    """The record of a probe that one side did not run once and in its time; None if both did."""
    absent = pair.reference.document.absent.get(probe.name) or pair.candidate.document.absent.get(probe.name)
    if absent:
        return context.unseen(probe, "missing", absent)
    here, there = Counter(ours.stops)[probe.name], Counter(theirs.stops)[probe.name]
    both = probe.name in ours.probes and probe.name in theirs.probes
    if both and (probe.key or (probe.name in in_time and here == there == 1)):
        return None
    if both and probe.name in in_time:
        return context.unseen(probe, "extra", f"the candidate ran this module {here} times, the reference {there}")
    error = theirs.error or ours.error
    if here and there and not error:
        return context.unseen(probe, "missing", "the candidate ran this module out of the reference's order")
    side = "candidate" if there else "reference"
    return context.unseen(probe, "missing", error or f"no call of this module was seen in the {side}")


def _alike(theirs: TracedProbe | None, ours: TracedProbe | None) -> bool:
    """Whether both sides went on with the same drawn values: both ran the module, and its first tensors fit."""
    if theirs is None or ours is None:
        return False
    return bool(theirs.outputs and ours.outputs) and theirs.outputs[0].shape == ours.outputs[0].shape


def _measured(pair: TracePair, probe: Probe, context: Context, theirs: TracedProbe, ours: TracedProbe) -> Record:
    expected = {output.name: output for output in theirs.outputs}
    found = {output.name: output for output in ours.outputs}
    compared = probe.key or next(iter(expected), "")
    r, c = expected.get(compared), found.get(compared)
    fits = r is not None and c is not None and (r.shape, r.dtype) == (c.shape, c.dtype)
    if r is not None and c is not None and fits and not (r.tensor and c.tensor):
        return context.unseen(probe, "missing", f"the values of output {compared} are not in both traces")
    reference = {name: pair.reference.output(output) for name, output in expected.items()}
    oracle = None
    if r is not None and fits:
        values = functools.cache(reference[compared].values)  # for the oracle and for the comparison
        reference[compared] = Output(shape=r.shape, dtype=r.dtype, values=values)
        if theirs.oracle:
            with np.errstate(invalid="ignore"):  # infinity is found by the comparison
                oracle = values().astype(np.float64)
                oracle -= pair.reference.read(theirs.oracle)
    candidate = {name: pair.candidate.output(output) for name, output in found.items()}
    return compare(probe, context, candidate, reference, Beside(oracle=oracle, null_parts=theirs.null_parts))
