"""`doctor`: what is installed here, what the processor can do, and what would be emulated."""

from importlib import import_module
from typing import Any

from modernbert_align.backends import runtime
from modernbert_align.commands import console
from modernbert_align.errors import EXIT_ENVIRONMENT

NEEDED = ("torch", "transformers", "paddle", "paddlenlp", "padiff", "safetensors", "matplotlib", "tokenizers")


def run(*, as_json: bool) -> int:
    """Look around; returns the exit code: 4 if a package cannot be imported."""
    runtime.pin()
    found: dict[str, Any] = {**runtime.describe(), "problems": []}
    for package in NEEDED:
        console.notify(f"importing {package}")
        try:
            import_module(package)
        except Exception as error:  # noqa: BLE001 - whatever a package does on import, say it and go on
            found["problems"].append(f"{package} cannot be imported: {type(error).__name__}: {error}")
    if not found["problems"]:
        from modernbert_align.backends.kernels import onednn_isa, paddle_kernels

        console.notify("trying Paddle's kernels")
        found["paddle_kernels"] = paddle_kernels()
        found["onednn_isa"] = onednn_isa()
    if as_json:
        console.print_json(found)
    else:
        _show(found)
    return EXIT_ENVIRONMENT if found["problems"] else 0


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    out = console.stdout()
    for name, version in found["versions"].items():
        out.print(f"{name:<18} {version}", markup=False)
    out.print(f"{'processor':<18} {found['cpu']}: {' '.join(found['cpu_flags'])}", markup=False, soft_wrap=True)
    out.print(f"{'oneDNN runs with':<18} {found.get('onednn_isa', '-')}", markup=False, soft_wrap=True)
    for name, value in found["pins"].items():
        out.print(f"{name:<18} {value}", markup=False)
    kernels = found.get("paddle_kernels")
    if kernels:
        table = Table(box=None, pad_edge=False, header_style="bold", title="Paddle kernels here", title_justify="left")
        dtypes = list(next(iter(kernels.values())))
        for name in ("operation", *dtypes):
            table.add_column(name)
        for operation, by_dtype in kernels.items():
            table.add_row(operation, *("native" if by_dtype[d] else "emulated in float32" for d in dtypes))
        out.print(table)
    for problem in found["problems"]:
        out.print(f"problem: {problem}", markup=False, soft_wrap=True)
    out.print(
        "ready" if not found["problems"] else "not ready: install the package again under constraints/default.txt"
    )
