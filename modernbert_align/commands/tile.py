"""`tile`: a large checkpoint started from the weights of a smaller one."""

import difflib
import time
from pathlib import Path
from typing import Any

from modernbert_align.backends.sources import read_torch, resolve_model
from modernbert_align.commands import console
from modernbert_align.core.files import kind_of
from modernbert_align.core.fixtures import fixture_names, load_fixture
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.table import load_table
from modernbert_align.core.tiled_checkpoint import TileRequest, TileResult, tile
from modernbert_align.errors import EXIT_ALIGNED, UsageError


def run(*, model: str | None, to: str, out: Path | None, head: str | None, force: bool, as_json: bool) -> int:
    """Tile a checkpoint; returns the exit code."""
    table = load_table()
    if head is not None:
        table.check_head(head)
    target, where, name = _target(to)
    source = resolve_model(model or "base", table, console.notify, head)
    request = TileRequest(
        folder=source.folder,
        model=source.name,
        revision=source.revision,
        to=to,
        target=target,
        target_where=where,
        head=head,
        read_torch=read_torch,
    )
    folder = out if out is not None else Path("checkpoints") / f"{name}-from-{source.name}"
    start = time.perf_counter()
    with console.progress(f"tiling {source.name}") as report:
        result = tile(request, table, folder, force=force, progress=report, notify=console.notify)
    if as_json:
        console.print_json({"out": str(result.out), "manifest": result.manifest.model_dump(mode="json")})
    else:
        _show(result, time.perf_counter() - start)
    return EXIT_ALIGNED


def _target(to: str) -> tuple[dict[str, Any], str, str]:
    """The target's config.json document, where it is from, and a name for it.

    Raises:
        UsageError, ConfigError: There is no such target, or its config.json cannot be read.
    """
    path = Path(to)
    kind = kind_of(path)
    if kind == "folder":
        return read_config_file(path), str(path / "config.json"), path.resolve().name
    if kind == "file":
        if path.name != "config.json":
            raise UsageError(
                f"`{to}` is a file, but not a config.json", hint="give config.json, its folder or a fixture"
            )
        return read_config_file(path.parent), to, path.resolve().parent.name
    if to not in fixture_names():
        near = difflib.get_close_matches(to, fixture_names(), n=1)
        known = f"did you mean `{near[0]}`?" if near else f"fixtures: {', '.join(fixture_names())}"
        raise UsageError(f"`{to}` is neither a folder, a config.json nor a fixture", hint=known)
    return {"model_type": "modernbert", **load_fixture(to)[0].config}, f"fixture {to}", to


def _show(result: TileResult, wall_s: float) -> None:
    manifest, line = result.manifest, console.line
    weights = sum(file.size_bytes for file in manifest.files if file.name.endswith(".safetensors"))
    line(f"{result.out}: {len(manifest.tensors)} tensors, {weights:,} bytes in {wall_s:.1f} s, tiled")
    for name, (small, large) in manifest.sizes.items():
        line(f"{name:<20} {small:>6} -> {large}")
    line(f"layers are made from {_numbers(manifest.layers)}")
    if manifest.moved:
        line(f"{len(manifest.moved)} layers change between full and sliding attention: {_numbers(manifest.moved)}")
    for name, (small, large) in manifest.settings.items():
        line(f"{name} is {small} in the source and {large} in the output")
    for proof in manifest.proofs:
        line(f"proved ({proof.level}): {proof.statement}")


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
