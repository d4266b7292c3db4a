"""Baselines: reports kept to be compared with. A baseline is a report file, one row per line."""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from modernbert_align.core.rows import Attention, Phase
from modernbert_align.errors import ReportError, UsageError
from modernbert_align.report.json_report import read_report
from modernbert_align.report.schema import Report, run_words

KEY_NAMES = ("model", "head", "dtype", "phase", "steps", "attention", "tensor_parallel")
Key = tuple[str, str, str, Phase, int | None, Attention, int]  # what a report is looked up by


def key_of(report: Report) -> Key:
    """What a report is about; a baseline is for reports with the same key."""
    model = report.model
    return model.name, model.head, report.dtype, report.phase, report.steps, report.attention, report.tensor_parallel


def words(key: Key) -> str:
    """A key for people: `tiny masked_lm bf16 step of 3 steps`."""
    model, head, dtype, phase, steps, attention, tensor_parallel = key
    return f"{model} {head} {dtype} {run_words(phase, steps, attention, tensor_parallel)}"


def file_name(key: Key) -> str:
    """The name of a baseline's file; different keys have different names."""
    model, head, dtype, phase, steps, attention, tensor_parallel = key
    stem = f"diff-{quote(model, safe='')}-{quote(head, safe='')}-{dtype}"
    if phase != "forward":
        stem += f"-{phase}"
    if attention != "eager":
        stem += f"-{attention}"
    if tensor_parallel > 1:
        stem += f"-tp{tensor_parallel}"
    return f"{stem}-{steps}.json" if steps is not None else f"{stem}.json"


def to_lines(report: Report) -> str:
    """The report as JSON, compact, with every row and every other entry on a line of its own."""
    entries = {name: _compact(value) for name, value in report.model_dump(mode="json", exclude={"rows"}).items()}
    rows = [_compact(row.model_dump(mode="json")) for row in report.rows]
    entries["rows"] = "[\n" + ",\n".join(rows) + "\n]"
    return "{\n" + ",\n".join(f"{_compact(name)}:{text}" for name, text in entries.items()) + "\n}\n"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def find(places: Sequence[str]) -> list[Path]:
    """The files meant by files, folders (their `*.json`) and patterns, each once, in order.

    Raises:
        UsageError: A place holds no baseline.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            files = sorted(path.glob("*.json"))
        elif path.exists() or not any(letter in place for letter in "*?["):
            files = [path]
        else:
            root = Path(path.anchor)
            files = sorted(root.glob(str(path.relative_to(root)))) if path.name else []
        if not files:
            raise UsageError(
                f"there is no baseline in `{place}`", hint="`modernbert-align baseline update REPORT.json` makes one"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def read_baselines(places: Sequence[str]) -> dict[Key, tuple[Path, Report]]:
    """Read baselines, by what they are about.

    Raises:
        UsageError: A place holds none, or two are of the same comparison.
        ReportError: A file is not a report.
    """
    found: dict[Key, tuple[Path, Report]] = {}
    for path in find(places):
        report = read_report(path)
        key = key_of(report)
        if key in found:
            raise UsageError(
                f"`{found[key][0]}` and `{path}` are both baselines of {words(key)}",
                hint="keep one; everything after --baseline, up to the next option, is a baseline",
            )
        found[key] = path, report
    return found


def present(folder: Path) -> dict[Key, Path]:
    """The files of a folder that are readable baselines, by what they are about; two may be of the same comparison."""
    found: dict[Key, Path] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            key = key_of(read_report(path))
        except ReportError:
            continue
        if key not in found or path.name == file_name(key):
            found[key] = path
    return found
