"""`verify`: look again at what `convert` wrote."""

from pathlib import Path

from modernbert_align.backends.torch_files import read_torch_file
from modernbert_align.commands import console
from modernbert_align.core.manifest import read_manifest
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.table import load_table, table_for
from modernbert_align.core.verify import verify
from modernbert_align.errors import EXIT_ALIGNED, EXIT_NOT_COMPARED


def run(*, folder: Path, source: Path | None, table_name: str | None, as_json: bool) -> int:
    """Check a converted folder; returns the exit code."""
    if folder.is_dir() and read_manifest(folder) is not None and table_name is None:
        table = table_for(read_config_file(folder), where=str(folder / "config.json"))
    else:
        table = load_table(table_name or "modernbert")
    found = verify(folder, table, source=source, read_torch=read_torch_file, notify=console.notify)
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
    out = console.stdout()
    for label, lines in (("ok", found.checked), ("not checked", found.not_checked), ("problem", found.problems)):
        for line in lines:
            out.print(f"{label}: {line}", soft_wrap=True, markup=False)
    verdict = {EXIT_ALIGNED: "unchanged", EXIT_NOT_COMPARED: "nothing could be checked"}.get(
        found.exit_code, f"{len(found.problems)} problems"
    )
    out.print(f"{folder}: {verdict}", soft_wrap=True, markup=False)
    return found.exit_code
