"""`table show`, `lint`, `explain` and `diff`: the name-mapping table, for people."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modernbert_align.backends import runtime
from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.fixtures import fixture_names, load_fixture
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.rank_files import DEGREE_KEY, RANK_KEY
from modernbert_align.core.table import Row, Side, Sizes, Table, load_table, nearest_row, table_for
from modernbert_align.core.table_check import all_rows, check_table, same_shapes, skip, with_changes
from modernbert_align.core.table_diff import Change, diff_tables
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, MissingPackageError, UsageError

_LINT_LAYERS = 2  # enough for what layer 0 lacks
_OPS = {
    "id": "id, the same bits on both sides",
    "T": "T, transposed: Hugging Face stores [out, in], Paddle [in, out]",
    "tie": "tie, left out of the files of both sides and made again when they are loaded",
}


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The model a table is looked at for.

    Attributes:
        model: How the output calls it.
        raw: Its config.json document.
        head: The head it has.
    """

    table: Table
    model: str
    raw: dict[str, Any]
    config: Sizes
    head: str


def show(*, table_name: str | None, model: str | None, head: str | None, as_json: bool) -> int:
    """Print the rows of a table for one model; returns the exit code."""
    subject = _subject(table_name, model, fixture="base")
    table, chosen = subject.table, subject.table.check_head(head or subject.head)
    entries = table.expand(subject.config, chosen)
    rows = [
        {
            "hf": entry.hf,
            "paddle": entry.paddle,
            "op": entry.op.name,
            "hf_shape": list(entry.hf_shape),
            "paddle_shape": list(entry.paddle_shape),
            "kind": entry.kind,
            "probe": entry.probe,
            "tied_to": entry.to,
            "stack_rows": list(entry.rows) if entry.rows else None,
            "shape_blind": entry.shape_blind,
            "tp": entry.row.tp,
        }
        for entry in entries
    ]
    if as_json:
        console.print_json(
            {"table": table.id, "sha256": table.digest, "model": subject.model, "head": chosen, "rows": rows}
        )
        return EXIT_ALIGNED
    width = max(len(entry.hf) for entry in entries)
    for entry in entries:
        same = "" if entry.hf == entry.paddle else f"  -> {entry.paddle}"
        place = "" if entry.rows is None else f"  rows {entry.rows[0]} to {entry.rows[1]} of {list(entry.stacked)}"
        note = f"  tied to {entry.to}" if entry.to else "  square: only values can tell" if entry.shape_blind else ""
        ranks = f"  tp {entry.row.tp}" if entry.row.tp else ""
        _line(f"{entry.hf:<{width}}  {entry.op.name:<3}  {list(entry.hf_shape)}{same}{place}{ranks}{note}")
    _line(
        f"{len(entries)} rows of {table.id} for the head {chosen} of {subject.model}, sha256 {table.digest[:12]}",
    )
    return EXIT_ALIGNED


def lint(*, table_name: str | None, model: str | None, as_json: bool) -> int:
    """Hold a table against all rules; returns the exit code: 1 if it breaks one."""
    subject = _subject(table_name, model, fixture="tiny", layers=_LINT_LAYERS)
    table = subject.table
    runtime.pin()
    console.notify("importing torch, transformers and paddle")
    try:
        from modernbert_align.engines.table_lint import check_live
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}", hint="run `modernbert-align doctor`") from None
    findings = check_table(table, subject.config)
    if any(finding.skipped for finding in findings):
        findings += (skip(3), skip(4))
    else:
        findings += check_live(table, subject.raw, subject.config, console.notify)
    problems = [
        {"rule": finding.rule, "name": finding.name, "row": fault.row, "message": fault.message}
        for finding in sorted(findings, key=lambda finding: finding.rule)
        for fault in finding.faults
    ]
    if as_json:
        console.print_json(
            {
                "table": table.id,
                "sha256": table.digest,
                "model": subject.model,
                "rules": [
                    {
                        "rule": finding.rule,
                        "name": finding.name,
                        "skipped": finding.skipped,
                        "checked": finding.checked,
                        "notes": list(finding.notes),
                        "problems": len(finding.faults),
                    }
                    for finding in sorted(findings, key=lambda finding: finding.rule)
                ],
                "problems": problems,
            }
        )
        return EXIT_MISALIGNED if problems else EXIT_ALIGNED
    _line(f"{table.id}, sha256 {table.digest[:12]}, for {subject.model}")
    for finding in sorted(findings, key=lambda finding: finding.rule):
        state = "skipped" if finding.skipped else f"{len(finding.faults)} problems" if finding.faults else "ok"
        _line(f"rule {finding.rule} ({finding.name}): {state}; {finding.checked}")
        for note in finding.notes:
            _line(f"  note: {note}")
    for problem in problems:
        row = f", row `{problem['row']}`" if problem["row"] else ""
        _line(f"problem: rule {problem['rule']} ({problem['name']}){row}: {problem['message']}")
    _line(f"{table.id}: {len(problems)} problems")
    return EXIT_MISALIGNED if problems else EXIT_ALIGNED


def diff(*, first: str, second: str, as_json: bool) -> int:
    """Compare two tables; returns the exit code: 1 if they differ."""
    a, b = load_table(first), load_table(second)
    found = diff_tables(a, b)
    code = EXIT_ALIGNED if found.equal else EXIT_MISALIGNED
    if as_json:
        console.print_json(
            {
                "a": {"table": a.id, "sha256": a.digest},
                "b": {"table": b.id, "sha256": b.digest},
                "equal": found.equal,
                "rows": {
                    "only_a": list(found.only_a),
                    "only_b": list(found.only_b),
                    "changed": [vars(change) for change in found.changed],
                },
                "settings": [{"path": c.place, "a": c.a, "b": c.b} for c in found.settings],
            }
        )
        return code
    for label, places in (("only in a", found.only_a), ("only in b", found.only_b)):
        for place in places:
            _line(f"{label}  {place}")
    for change in found.changed:
        _line(f"changed    {change.place}: {change.field} {_values(change)}")
    for change in found.settings:
        _line(f"setting    {change.place} {_values(change)}")
    _line(f"a: {a.id}, sha256 {a.digest[:12]} ({first})")
    _line(f"b: {b.id}, sha256 {b.digest[:12]} ({second})")
    total = sum(map(len, (found.only_a, found.only_b, found.changed, found.settings)))
    _line("they say the same" if found.equal else f"{total} differences")
    return code


def _values(change: Change) -> str:
    return " -> ".join("absent" if value is None else repr(value) for value in (change.a, change.b))


def explain(*, name: str, table_name: str | None, model: str | None, head: str | None, as_json: bool) -> int:
    """Print everything a table says about one weight; returns the exit code."""
    subject = _subject(table_name, model, fixture="base")
    table = subject.table
    heads = (table.check_head(head),) if head else tuple(dict.fromkeys((subject.head, *table.heads)))
    canonical = table.canonical(name.replace("{i}", "1"), "hf")
    found = _explanations(subject, canonical, heads)
    if not found:
        raise _unknown(subject, name, canonical, heads)
    if as_json:
        console.print_json(
            {
                "table": table.id,
                "sha256": table.digest,
                "model": subject.model,
                "name": name,
                "canonical": canonical,
                "rows": found,
            }
        )
        return EXIT_ALIGNED
    if canonical != name:
        _line(f"{name} is read as {canonical}")
    for document in found:
        _show_explanation(document)
    _line(f"{table.id} for {subject.model}, sha256 {table.digest[:12]}")
    return EXIT_ALIGNED


def _explanations(subject: _Subject, canonical: str, heads: Sequence[str]) -> list[dict[str, Any]]:
    """What the table says about every row that gives a name, on either side, with the prefix or without."""
    table = subject.table

    def bare(name: str) -> str:
        return name.removeprefix(table.found_prefix([name]))

    found = []
    for row in all_rows(table):
        having = [head for head in heads if row in table.rows(head)]
        for name in (row.hf, row.paddle) if having else ():
            pattern = re.escape(name).replace(r"\{i\}", r"(\d+)", 1).replace(r"\{i\}", r"\1")
            match = re.fullmatch(pattern, bare(canonical))
            if match is None:
                continue
            document = _explanation(subject, row, int(match[1]) if match.groups() else None, having)
            names = {document[side]["name"] for side in ("hf", "paddle")}
            if canonical in names | {bare(full) for full in names} or (
                having[0] == "base" and bare(canonical) in names
            ):
                found.append(document)
            break
    return found


def _explanation(subject: _Subject, row: Row, layer: int | None, having: list[str]) -> dict[str, Any]:
    """What the table says about the weight of a row, whether the model has it or not."""
    table, config = subject.table, subject.config
    switch, wanted = row.when.removeprefix("not "), not row.when.startswith("not ")
    present = with_changes(config, {"num_hidden_layers": 2, **({switch: wanted} if switch else {})})
    entries = {entry.hf: entry for entry in table.expand(present, having[0])}
    prefix = next(p for p in (table.prefix(having[0]), "") if p + row.hf.format(i=1) in entries)
    entry = entries[prefix + row.hf.format(i=1)]
    absent = [
        reason
        for reason, holds in (
            (f"`{switch}` is {str(not wanted).lower()}", switch and getattr(config, switch) is not wanted),
            (f"it has {config.num_hidden_layers} layers", layer is not None and layer >= config.num_hidden_layers),
            ("layer 0 has no such weight", row.layers == "1:" and layer == 0),
        )
        if holds
    ]
    dims = row.shape.split()
    beside = [other for other in table.rows(having[0]) if row.part and other.part and other.paddle == row.paddle]
    parts = [other for other in beside if prefix + other.hf.format(i=1) in entries]
    stacked = ["+".join(part.shape.split()[0] for part in parts), *dims[1:]] if parts else dims
    groups = [names for _, names in same_shapes(table, present) if row.hf in names]
    return {
        "row": {"hf": row.hf, "paddle": row.paddle},
        "hf": {
            "name": prefix + row.hf.format(i=layer),
            "symbols": " ".join(dims),
            "shape": list(entry.hf_shape),
        },
        "paddle": {
            "name": prefix + row.paddle.format(i=layer),
            "symbols": " ".join(stacked[::-1] if row.op == "T" else stacked),
            "shape": list(entry.paddle_shape),
        },
        "op": row.op,
        "tied_to": entry.to.removesuffix(row.to.format(i=1)) + row.to.format(i=layer),
        "stack": {
            "rows": list(entry.rows),
            "of": list(entry.stacked),
            "parts": [prefix + part.hf.format(i=layer) for part in parts],
        }
        if entry.rows
        else None,
        "when": row.when,
        "in_model": not absent,
        "absent_because": absent,
        "kind": row.kind,
        "probe": row.probe.format(i=layer),
        "tp": row.tp,
        "shape_blind": entry.shape_blind,
        "same_shape": list(dict.fromkeys(name for names in groups for name in names if name != row.hf)),
        "heads": having,
    }


def _show_explanation(document: dict[str, Any]) -> None:
    hf, paddle, stack, row = document["hf"], document["paddle"], document["stack"], document["row"]
    lines = {
        "row": row["hf"] if row["hf"] == row["paddle"] else f"{row['hf']} -> {row['paddle']}",
        "hf": f"{hf['name']}  {hf['symbols']} = {hf['shape']}",
        "paddle": f"{paddle['name']}  {paddle['symbols']} = {paddle['shape']}",
        "op": _OPS[document["op"]],
        "tied to": document["tied_to"],
        "stack": f"rows {stack['rows'][0]} to {stack['rows'][1]} of {stack['of']} in Hugging Face's layout, stacked "
        f"from {', '.join(stack['parts'])}"
        if stack
        else "",
        "ranks": _among_ranks(document["tp"]),
        "when": document["when"],
        "in model": "yes" if document["in_model"] else f"no: {', '.join(document['absent_because'])}",
        "owner": f"a module of kind {document['kind']}; differences are reported at the probe {document['probe']}",
        "shapes": _what_shapes_show(document),
        "heads": ", ".join(document["heads"]),
    }
    _line(hf["name"])
    for label, text in lines.items():
        if text:
            _line(f"  {label:<8}  {text}")


def _among_ranks(tp: str) -> str:
    kind, _, parts = tp.partition(":")
    words = {"col": "by output features", "row": "by input features", "vocab": "by tokens, if the degree divides them"}
    blocks = f", of each of their {parts} blocks a share" if parts else ""
    return f"{tp}, divided among tensor-parallel ranks {words[kind]}{blocks}" if tp else ""


def _what_shapes_show(document: dict[str, Any]) -> str:
    if document["op"] == "tie":
        return ""
    shown = ["a forgotten transpose shows"] if document["op"] == "T" else []
    if document["shape_blind"]:
        shown = ["the matrix is square, a forgotten transpose does not show"]
    same = ", ".join(document["same_shape"])
    shown.append(f"a swap with {same} does not show" if same else "no other weight beside it has its shape")
    return "; ".join(shown)


def _unknown(subject: _Subject, name: str, canonical: str, heads: Sequence[str]) -> UsageError:
    """Why a name cannot be explained, with what may have been meant."""
    table = subject.table
    elsewhere = _explanations(subject, canonical, table.heads)
    if elsewhere:
        having = ", ".join(dict.fromkeys(head for document in elsewhere for head in document["heads"]))
        return UsageError(f"the head {heads[0]} has no `{name}`", hint=f"heads that have it: {having}")
    sides: tuple[Side, ...] = ("hf", "paddle")
    near = [found for head in heads for side in sides if (found := nearest_row(canonical, table, head, side))]
    hint = f"did you mean `{near[0]}`?" if near else "`modernbert-align table show` lists every name"
    return UsageError(f"no row of table `{table.id}` maps `{name}`", hint=hint)


def _line(text: str) -> None:
    console.stdout().print(text, soft_wrap=True, markup=False)


def _subject(table_name: str | None, model: str | None, *, fixture: str, layers: int | None = None) -> _Subject:
    """The table and the model to look at it for.

    Args:
        table_name: None takes the table of the model's type.
        model: None takes `fixture` for ModernBERT itself, and for any other table what it says are the defaults.
        layers: With the defaults, how many layers at most.

    Raises:
        AlignError: There is no such table or model, or they do not belong together.
    """
    table = load_table(table_name or "modernbert")
    head = next((head for head in (*table.heads[1:], *table.heads) if head != "base"), "base")
    if model is None and table.model_type != "modernbert":
        where = f"[config] defaults of table {table.id}"
        raw = vars(table.sizes({}, where=where))
        depth = raw["num_hidden_layers"]
        cut = layers is not None and layers < depth
        raw |= {"num_hidden_layers": layers if cut else depth}
        label = f"the table's default sizes{f' with {layers} of {depth} layers' if cut else ''}"
        return _Subject(table=table, model=label, raw=raw, config=table.sizes(raw, where=where), head=head)
    model = model or fixture
    if model in fixture_names() and not Path(model).is_dir():
        if table.model_type != "modernbert":
            raise UsageError(
                f"the fixture {model} is a modernbert model, table `{table.id}` is for {table.model_type}",
                hint="give a checkpoint folder, or no --model for the table's default sizes",
            )
        declared, _ = load_fixture(model)
        ids = declared.tokenizer
        raw = {
            "model_type": "modernbert",
            **declared.config,
            "pad_token_id": ids.pad_token_id,
            "cls_token_id": ids.cls_token_id,
            "bos_token_id": ids.cls_token_id,
            "sep_token_id": ids.sep_token_id,
            "eos_token_id": ids.sep_token_id,
        }
        label = f"the fixture {model}"
        return _Subject(table=table, model=label, raw=raw, config=table.sizes(raw, where=label), head=head)
    source = resolve_model(model, table, console.notify)
    raw, where = read_config_file(source.folder), str(source.folder / "config.json")
    # A table is about whole weights, however a checkpoint's files divide them.
    raw = {key: value for key, value in raw.items() if key not in (DEGREE_KEY, RANK_KEY)}
    if table_name is None:
        table = table_for(raw, where=where)
    head = table.head_of(raw.get("architectures"), where=where)
    return _Subject(table=table, model=str(source.folder), raw=raw, config=table.sizes(raw, where=where), head=head)
