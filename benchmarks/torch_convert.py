"""The same conversion with torch and safetensors as one process: `python torch_convert.py SOURCE OUT`.

Loads the whole file, transposes what the table says, saves it: what a hand-written script does. Single-file
checkpoints only.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from modernbert_align.core.table import load_table


def main(source: str, out: str) -> None:
    """Convert `source` into `out`."""
    raw = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    table = load_table()
    head = table.head_of(raw["architectures"], where=source)
    state = load_file(Path(source) / "model.safetensors")
    converted = {
        entry.paddle: state[entry.hf].t().contiguous() if entry.op.name == "T" else state[entry.hf]
        for entry in table.expand(table.sizes(raw, where=source), head)
        if entry.op.stored
    }
    save_file(converted, Path(out) / "model.safetensors", metadata={"format": "np"})
    shutil.copyfile(Path(source) / "config.json", Path(out) / "config.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
