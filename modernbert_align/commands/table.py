"""`table show` and `table lint`: look at the name-mapping table, and hold it against live models."""

from typing import Any

from modernbert_align.backends import runtime
from modernbert_align.backends.sources import resolve_model
from modernbert_align.commands import console
from modernbert_align.core.fixtures import fixture_names, load_fixture
from modernbert_align.core.model_config import parse_config, read_config_file
from modernbert_align.core.table import Table, load_table
from modernbert_align.errors import EXIT_ALIGNED, EXIT_MISALIGNED, MissingPackageError


def show(*, model: str, head: str | None, as_json: bool) -> int:
    """Print the rows of the table for one model; returns the exit code."""
    table = load_table()
    raw, declared = _raw_config(model, table)
    chosen = table.check_head(head or declared)
    entries = table.expand(parse_config(raw), chosen)
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
            "shape_blind": entry.shape_blind,
        }
        for entry in entries
    ]
    if as_json:
        console.print_json({"table": table.id, "sha256": table.digest, "head": chosen, "rows": rows})
        return EXIT_ALIGNED
    out = console.stdout()
    width = max(len(entry.hf) for entry in entries)
    for entry in entries:
        same = "" if entry.hf == entry.paddle else f"  -> {entry.paddle}"
        note = f"  tied to {entry.to}" if entry.to else "  square: only values can tell" if entry.shape_blind else ""
        out.print(
            f"{entry.hf:<{width}}  {entry.op.name:<3}  {list(entry.hf_shape)}{same}{note}", soft_wrap=True, markup=False
        )
    out.print(f"{len(entries)} rows of {table.id} for the head {chosen}, sha256 {table.digest[:12]}", markup=False)
    return EXIT_ALIGNED


def lint(*, model: str, as_json: bool) -> int:
    """Check the table against live models; returns the exit code: 1 if it does not fit them."""
    table = load_table()
    raw, _ = _raw_config(model, table)
    runtime.pin()
    console.notify("importing torch, transformers and paddle")
    try:
        from modernbert_align.engines.table_lint import lint_table
    except ImportError as error:
        raise MissingPackageError(f"a package is missing: {error}", hint="run `modernbert-align doctor`") from None
    findings = lint_table(table, raw, console.notify)
    if as_json:
        console.print_json({"table": table.id, "checked": findings.checked, "problems": findings.problems})
    else:
        out = console.stdout()
        for problem in findings.problems:
            out.print(problem, soft_wrap=True, markup=False)
        for line in findings.checked:
            out.print(line, soft_wrap=True, markup=False)
        out.print(f"{table.id}: {len(findings.problems)} problems", markup=False)
    return EXIT_MISALIGNED if findings.problems else EXIT_ALIGNED


def _raw_config(model: str, table: Table) -> tuple[dict[str, Any], str]:
    """A model's config document and head; a fixture's comes from its declaration, without writing its weights."""
    if model in fixture_names():
        fixture, _ = load_fixture(model)
        ids = {"pad_token_id": fixture.tokenizer.pad_token_id}
        return {"model_type": "modernbert", **fixture.config, **ids}, "masked_lm"
    source = resolve_model(model, table, console.notify)
    raw = read_config_file(source.folder)
    return raw, table.head_of(raw.get("architectures"), where=str(source.folder / "config.json"))
