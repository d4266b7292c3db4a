"""PaddleNLP's own conversion of a folder, as one process: `python paddlenlp_convert.py SOURCE OUT`.

The last line of stdout is JSON: what starting Python and importing the frameworks cost. PaddleNLP also writes
`model_state.pdparams` into SOURCE, so give it a copy.

Source: paddlenlp 2.8.1, transformers/conversion_utils.py, ConversionMixin.convert.
"""

import json
import sys
import time
from pathlib import Path

from modernbert_align.models import modernbert


def main(source: str, out: str) -> None:
    """Convert `source` into `out` with `from_pretrained` and `save_pretrained`."""
    start = time.perf_counter()
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    cls = getattr(modernbert, config["architectures"][0])  # imports the frameworks
    imports = {
        "cpu_s": time.process_time(),
        "wall_s": time.perf_counter() - start,
        "peak_mib": _resident_mib(),
    }
    cls.from_pretrained(source, convert_from_torch=True).save_pretrained(out, safe_serialization=True)
    sys.stdout.write(f"\n{json.dumps(imports)}\n")


def _resident_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
