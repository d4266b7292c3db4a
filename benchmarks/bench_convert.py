"""Measures `modernbert-align convert` against `cp`, torch and PaddleNLP's own conversion, as whole processes.

Linux with GNU cp. Until the last run is over this process imports only the standard library: the kernel never reports
less peak memory for a child than for the process that started it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TOOL = (sys.executable, "-m", "modernbert_align.cli", "convert", "--src", "hf", "--dst", "paddle")
PEER = (sys.executable, str(Path(__file__).with_name("paddlenlp_convert.py")))
BY_HAND = (sys.executable, str(Path(__file__).with_name("torch_convert.py")))
CP, TORCH, PADDLENLP, NO_IMPORTS = "cp", "torch load and save", "PaddleNLP", "PaddleNLP without imports"
CONVERT, CRC32, SHA256 = "convert --digest none", "convert --digest crc32", "convert"
PAIRS = (
    (CONVERT, CP),
    (SHA256, CP),
    (CRC32, CONVERT),
    (SHA256, CONVERT),
    (TORCH, CONVERT),
    (PADDLENLP, CONVERT),
    (NO_IMPORTS, CONVERT),
)


class Cost(NamedTuple):
    """What one process used: user and system time together, elapsed time, peak resident memory."""

    cpu_s: float
    wall_s: float
    peak_mib: float


Costs = dict[str, list[Cost]]


class CommandError(Exception):
    """A measured command failed; the message is what it said."""


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--model", action="append", help="a fixture, a checkpoint folder or a hub id (default: base and large)"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each command, after one that is not counted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    try:
        results = [bench(model, options.runs) for model in options.model or ["base", "large"]]
    except (CommandError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(json.dumps(results, indent=2) + "\n" if options.json else "\n".join(map(tables, results)))
    return 0


def bench(model: str, runs: int) -> dict[str, Any]:
    """Measure all commands on one model, interleaved: cp, convert, PaddleNLP, cp, ...

    Raises:
        CommandError: The model cannot be converted or copied. A failure of PaddleNLP is part of the result.
    """
    plan = json.loads(run([*TOOL, "--model", model, "--dry-run", "--json"])[1])
    source = Path(plan["source"])
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as name:
        temp = Path(name)
        commands = {
            CP: ["cp", "--reflink=never", *map(str, sorted(source.glob("*.safetensors")))],
            CONVERT: [*TOOL, "--model", str(source), "--digest", "none", "--out"],
            CRC32: [*TOOL, "--model", str(source), "--digest", "crc32", "--out"],
            SHA256: [*TOOL, "--model", str(source), "--out"],
            TORCH: [*BY_HAND, str(source)],
            PADDLENLP: [*PEER, str(shutil.copytree(source, temp / "source"))],
        }
        reason = warm_up(commands, temp)
        floor_mib = own_peak_mib()
        costs = measure(commands, temp, runs)
        weights = None if reason else compare_weights(temp / CONVERT, temp / PADDLENLP)
        by_hand = compare_weights(temp / CONVERT, temp / TORCH)
        if by_hand["different"]:
            raise CommandError(f"torch's `{by_hand['different'][0]}` differs from convert's")
    return {
        "model": model,
        "weights_bytes": plan["size_bytes"],
        "runs": runs,
        "paddlenlp_failed": reason,
        "weights": weights,
        "peak_mib_floor": floor_mib,
        "median": {name: median(found)._asdict() for name, found in costs.items()},
        "median_ratio": {
            f"{a} / {b}": ratio(costs[a], costs[b])._asdict() for a, b in PAIRS if a in costs and b in costs
        },
        "costs": {name: [cost._asdict() for cost in found] for name, found in costs.items()},
    }


def run(command: list[str]) -> tuple[Cost, str]:
    """Run one process to its end.

    Returns:
        What it cost and what it wrote to stdout.

    Raises:
        CommandError: It failed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise CommandError(complaint(err.read().splitlines(), process.returncode))
        return Cost(usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss / 1024), out.read()


def complaint(lines: list[str], code: int) -> str:
    """The one line of a failed command's stderr that says what is wrong."""
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    return said[0] if said else f"the command ended with exit code {code} and said nothing"


def warm_up(commands: dict[str, list[str]], temp: Path) -> str | None:
    """Run everything once, so that files are in the page cache and modules compiled.

    Returns:
        Why PaddleNLP cannot convert this model, in which case its command is taken out; None if it can.
    """
    for name in (CP, CONVERT, CRC32, SHA256, TORCH):
        run_into(commands[name], temp / name)
    try:
        run_into(commands[PADDLENLP], temp / PADDLENLP)
    except CommandError as error:
        del commands[PADDLENLP]
        return str(error)
    return None


def measure(commands: dict[str, list[str]], temp: Path, runs: int) -> Costs:
    """Run the commands in turn; the output of the last turn stays in `temp`."""
    costs: Costs = {name: [] for name in commands}
    if PADDLENLP in commands:
        costs[NO_IMPORTS] = []
    for index in range(runs):
        for name, command in commands.items():
            sys.stderr.write(f"run {index + 1} of {runs}: {name}\n")
            cost, said = run_into(command, temp / name)
            costs[name].append(cost)
            if name == PADDLENLP:
                imports = Cost(**json.loads(said.splitlines()[-1]))
                costs[NO_IMPORTS].append(by_field(lambda whole, part: whole - part, cost, imports))
    return costs


def run_into(command: list[str], out: Path) -> tuple[Cost, str]:
    """Run a command whose last argument is its output folder, with nothing left over from the run before."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out.parent / "source" / "model_state.pdparams").unlink(missing_ok=True)  # PaddleNLP writes it only if absent
    os.sync()  # or the disk would write one command's output while the next one is timed
    return run([*command, str(out)])


def own_peak_mib() -> float:
    """This process's peak memory: no child is reported with less."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare_weights(ours: Path, theirs: Path) -> dict[str, Any]:
    """Compare two checkpoint folders bit for bit.

    Returns:
        Number of tensors in both together, and the names of those that are not the same in both.
    """
    import ml_dtypes  # noqa: F401 - makes numpy know bfloat16
    from safetensors import safe_open

    def handles(folder: Path) -> dict[str, Any]:
        files = [safe_open(path, framework="np") for path in folder.glob("*.safetensors")]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    def same(name: str) -> bool:
        if name not in a or name not in b:
            return False
        x, y = a[name].get_tensor(name), b[name].get_tensor(name)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

    a, b = handles(ours), handles(theirs)
    names = sorted(a.keys() | b.keys())
    return {"tensors": len(names), "different": [name for name in names if not same(name)]}


def by_field(function: Callable[..., float], *costs: Cost) -> Cost:
    """Apply a function to the CPU times, the wall times and the memory."""
    return Cost(*(function(*values) for values in zip(*costs, strict=True)))


def median(costs: list[Cost]) -> Cost:
    """The median of each measure by itself."""
    return by_field(lambda *values: statistics.median(values), *costs)


def ratio(over: list[Cost], under: list[Cost]) -> Cost:
    """The median over the turns of the ratio within a turn, so that slow drift of the machine cancels."""
    return median([by_field(lambda a, b: a / max(b, 1e-4), *pair) for pair in zip(over, under, strict=True)])


def tables(result: dict[str, Any]) -> str:
    """The result for people."""
    at_floor = result["median"][CP]["peak_mib"] <= result["peak_mib_floor"]
    lines = [
        f"{result['model']}: {result['weights_bytes']:,} bytes of weights, median of {result['runs']} interleaved runs",
        weights_line(result),
        "",
        f"{'':<36}{'CPU s':>10}{'wall s':>10}{'peak MiB':>12}",
    ]
    for name, cost in result["median"].items():
        bound = "<= " if name == CP and at_floor else ""
        memory = f"{bound}{cost['peak_mib']:.0f}"
        lines.append(f"{name:<36}{cost['cpu_s']:>10.2f}{cost['wall_s']:>10.2f}{memory:>12}")
    lines += ["", f"{'ratio':<36}{'CPU':>10}{'wall':>10}{'memory':>12}"]
    for name, cost in result["median_ratio"].items():
        bound = ">= " if name.endswith(f"/ {CP}") and at_floor else ""
        memory = f"{bound}{cost['peak_mib']:.1f}"
        lines.append(f"{name:<36}{cost['cpu_s']:>10.1f}{cost['wall_s']:>10.1f}{memory:>12}")
    return "\n".join(lines) + "\n"


def weights_line(result: dict[str, Any]) -> str:
    """Whether PaddleNLP gave the same weights."""
    if result["paddlenlp_failed"]:
        return f"PaddleNLP cannot convert this model and was not measured: {result['paddlenlp_failed']}"
    total, different = result["weights"]["tensors"], result["weights"]["different"]
    if different:
        return (
            f"PaddleNLP's weights DIFFER from convert's in {len(different)} of {total} tensors, first `{different[0]}`"
        )
    return f"PaddleNLP's weights equal convert's bit for bit, {total} tensors"


if __name__ == "__main__":
    sys.exit(main())
