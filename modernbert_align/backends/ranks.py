"""Runs the candidate in several processes, one per tensor-parallel rank, and keeps watch over them.

The processes stay until the work is done and answer one request after the other. What goes to them and comes back are
files in a folder of their own: a JSON document and a safetensors file each. No framework is imported here.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from modernbert_align.core.fixtures import InputSpec
from modernbert_align.core.ops import Bits
from modernbert_align.core.ports import free_ports
from modernbert_align.core.rows import Attention, Dtype, Loss, Mode
from modernbert_align.core.training import Optimizer
from modernbert_align.errors import RankError

DEFAULT_TIMEOUT_S = 600.0
JOB = "job.json"
_WORKER = "modernbert_align.engines.rank_worker"
_SETTLING_S = 0.5  # when one rank dies the others do too, of its death
_POLL_S = 0.02


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(_Message):
    """What stays the same for all requests.

    Attributes:
        candidate: Folder of the Paddle checkpoint.
        config: The reference's architecture: which probes and weights there are.
    """

    candidate: str
    architecture: str
    head: str
    config: dict[str, Any]
    inputs: InputSpec
    attention: Attention


class Request(_Message):
    """One thing to do. Tensors that belong to it are in the file beside it.

    Attributes:
        kind: `load` a dtype's weights, run `forward`, `backward` or some optimizer `steps`, or draw with dropout on
            (`randomness`).
        mode: isolated takes the reference's tensors from the file.
        loss: What is differentiated.
        steps: Of the optimizer.
        optimizer: Its settings.
        skipped: Probes that the reference does not have.
    """

    kind: Literal["load", "forward", "backward", "step", "randomness"]
    dtype: Dtype
    mode: Mode = "accumulated"
    loss: Loss = "projection"
    steps: int = 0
    optimizer: Optimizer = Optimizer()
    skipped: tuple[str, ...] = ()


class StopNote(_Message):
    """A probe that a rank came by, and the keys of the tensors it returned by name."""

    probe: str
    outputs: dict[str, str]


class Answer(_Message):
    """What one rank has to say.

    Attributes:
        rows: What is compared: row -> key of its tensor.
        digests: Key -> digest of dtype, shape and bits, of every tensor the rank had.
        dtypes: Key -> dtype without its framework's name.
        stops: Of a forward pass, in order.
        returned: Name -> key of what the whole model returned; None if it did not get that far.
        absent: Probe -> why the candidate cannot have it.
        error: What went wrong in the model, in one line.
    """

    rows: dict[str, str] = {}
    digests: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    stops: tuple[StopNote, ...] = ()
    returned: dict[str, str] | None = None
    absent: dict[str, str] = {}
    error: str = ""


class Answers:
    """The answers of all ranks to one request.

    Attributes:
        ranks: By rank.
    """

    def __init__(self, ranks: Sequence[Answer], files: Sequence[Path]) -> None:
        self.ranks = tuple(ranks)
        self._files = tuple(files)

    @property
    def first(self) -> Answer:
        """Rank 0's answer."""
        return self.ranks[0]

    def shards(self, key: str) -> list[Bits]:
        """A divided tensor's bits, by rank."""
        return [self._bits(file, key) for file in self._files]

    def bits(self, key: str) -> Bits:
        """The bits of a tensor that every rank has whole, as rank 0 has them."""
        return self._bits(self._files[0], key)

    def _bits(self, file: Path, key: str) -> Bits:
        with safe_open(file, framework="np") as tensors:
            found: Bits = tensors.get_tensor(key)
        return found

    def everywhere(self, row: str) -> bool:
        """Whether every rank has the tensor of a row."""
        key = self.first.rows.get(row)
        return key is not None and all(answer.rows.get(row) == key and key in answer.digests for answer in self.ranks)

    def equal(self, row: str) -> bool:
        """Whether every rank has the same bits there."""
        key = self.first.rows[row]
        return len({answer.digests[key] for answer in self.ranks}) == 1


class Ranks:
    """Local processes that hold one model together. Use it in a `with` statement: none outlives it.

    Args:
        degree: How many.
        folder: Where messages go; exists, and belongs to this object alone.
        job: What stays the same.
        timeout_s: How long a rank may take for one answer.
        device: `cpu` (they talk through gloo) or `gpu` (nccl, a device each).

    Raises:
        RankError: A rank died, did not answer in time, or answered with nothing.
    """

    def __init__(self, degree: int, folder: Path, job: Job, timeout_s: float, device: str) -> None:
        self.degree, self._folder, self._timeout_s = degree, folder, timeout_s
        self._count = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / JOB).write_text(job.model_dump_json(), encoding="utf-8")
        self._environments = _environments(degree, device)

    def __enter__(self) -> "Ranks":
        try:
            for rank, environment in enumerate(self._environments):
                with self._log(rank).open("wb") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", _WORKER, str(self._folder)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,  # an interrupt is for the parent, which ends them all
                    )
                self._processes.append(process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the ranks, in order."""
        return tuple(process.pid for process in self._processes)

    def ask(self, request: Request, tensors: Mapping[str, Bits] | None = None) -> Answers:
        """Have every rank do something and wait for all answers.

        Args:
            tensors: Key -> bits of what belongs to the request.

        Raises:
            RankError: A rank died, did not answer in time, or answered with nothing.
        """
        self._count += 1
        if request.kind == "load":  # nothing of the weights before is asked for any more
            for old in self._folder.glob("answer-*"):
                old.unlink()
        save_file(dict(tensors or {}), tensors_file(self._folder, self._count))
        message_file(self._folder, self._count).write_text(request.model_dump_json(), encoding="utf-8")
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has died; waiting finds out how
                process.stdin.write(f"{self._count}\n".encode())
                process.stdin.flush()
        files = [message_file(self._folder, self._count, rank) for rank in range(self.degree)]
        self._wait(files, request.kind)
        tensors_file(self._folder, self._count).unlink()
        try:
            answers = [Answer.model_validate_json(file.read_text(encoding="utf-8")) for file in files]
        except ValueError as error:
            raise RankError(
                f"a rank's answer to `{request.kind}` cannot be read: {str(error).splitlines()[0]}"
            ) from None
        return Answers(answers, [tensors_file(self._folder, self._count, rank) for rank in range(self.degree)])

    def _wait(self, files: Sequence[Path], doing: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not all(file.is_file() for file in files):
            if any(process.poll() is not None for process in self._processes):
                time.sleep(_SETTLING_S)
                raise self._death(doing)
            if time.monotonic() > deadline:
                late = [str(rank) for rank, file in enumerate(files) if not file.is_file()]
                raise RankError(
                    f"no answer to `{doing}` from rank {', '.join(late)} of {self.degree} in {self._timeout_s:g} s",
                    hint="nothing was judged; one hangs and others wait for it, or they need a longer --rank-timeout",
                )
            time.sleep(_POLL_S)

    def _death(self, doing: str) -> RankError:
        """How the rank ended that ended first, as far as that can be told."""
        ended = [(rank, code) for rank, p in enumerate(self._processes) if (code := p.poll()) is not None]
        rank, code = min(ended, key=lambda one: (one[1] not in (-signal.SIGKILL, -signal.SIGTERM), one[0]))
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = _last_words(self._log(rank))
        return RankError(
            f"rank {rank} of {self.degree} {how} during `{doing}`{': ' + said if said else ''}",
            hint="nothing was judged; the other ranks were ended too",
        )

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # nothing of theirs is kept
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()


def message_file(folder: Path, count: int, rank: int | None = None) -> Path:
    """A request, or a rank's answer to it."""
    return folder / (f"request-{count}.json" if rank is None else f"answer-{count}-rank{rank}.json")


def tensors_file(folder: Path, count: int, rank: int | None = None) -> Path:
    """The tensors that belong to a message."""
    return message_file(folder, count, rank).with_suffix(".safetensors")


def _environments(degree: int, device: str) -> list[dict[str, str]]:
    """The environment of every rank.

    Source: paddlepaddle 3.3.1, distributed/launch and distributed/parallel.py, ParallelEnv.
    """
    endpoints = [f"127.0.0.1:{port}" for port in free_ports(degree)]
    common = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "FLAGS_selected"))}
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // degree)))
    return [
        common
        | {
            "PADDLE_DISTRI_BACKEND": "gloo" if device == "cpu" else "nccl",
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(degree),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "FLAGS_selected_gpus": str(rank),
            "PADDLE_JOB_ID": secrets.token_hex(4),
        }
        for rank in range(degree)
    ]


def _last_words(log: Path) -> str:
    """The line of a log that says most: the last one that names an error, else the last one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or [""])[-1][:300]
