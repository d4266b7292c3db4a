"""`verify`: look again at what `convert` wrote."""

from pathlib import Path

from modernbert_align.backends.sources import read_torch
from modernbert_align.commands import console
from modernbert_align.core.manifest import read_manifest
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.table import Table, load_table, table_for, table_names
from modernbert_align.core.verify import verify
from modernbert_align.errors import EXIT_ALIGNED, EXIT_NOT_COMPARED


def run(*, folder: Path, source: Path | None, table_name: str | None, as_json: bool) -> int:
    """Check a converted folder; returns the exit code."""
    table = _table(folder, table_name)
    found = verify(folder, table, source=source, read_torch=read_torch, notify=console.notify)
    if as_json:
        console.print_json(
            {
                "folder": str(folder),
                "exit_code": found.exit_code,
                "checked": found.checked,
                "problems": found.problems,
                "not_checked": found.not_checked,
            }
        )
        return found.exit_code
    for label, lines in (("ok", found.checked), ("not checked", found.not_checked), ("problem", found.problems)):
        for line in lines:
            console.line(f"{label}: {line}")
    whole = "no difference in what was checked" if found.not_checked else "unchanged"
    verdict = {EXIT_ALIGNED: whole, EXIT_NOT_COMPARED: "nothing could be checked"}.get(
        found.exit_code, f"{len(found.problems)} problems"
    )
    console.line(f"{folder}: {verdict}")
    return found.exit_code


def _table(folder: Path, name: str | None) -> Table:
    """The table asked for; else the one the manifest names, as the folder's config.json may be what is damaged."""
    manifest = read_manifest(folder) if name is None and folder.is_dir() else None
    if manifest is None:
        return load_table(name or "modernbert")
    shipped = [load_table(each) for each in table_names()]
    named = next((table for table in shipped if table.id == manifest.table), None)
    return named or table_for(read_config_file(folder), where=str(folder / "config.json"))
