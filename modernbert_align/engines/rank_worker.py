"""One tensor-parallel rank of the candidate: a process that answers requests until its parent goes away.

Started by `backends.ranks.Ranks`. Everything that is compared is looked at here and written down with a digest, on
every rank; the tensors themselves are written by rank 0, and by all ranks where each has its share.
"""

import hashlib
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle.distributed import fleet
from safetensors import safe_open
from safetensors.numpy import save_file

from modernbert_align.backends import paddle as backend
from modernbert_align.backends import paddle_training
from modernbert_align.backends.gloo import give_groups_own_stores
from modernbert_align.backends.ranks import JOB, Answer, Job, Request, StopNote, message_file, tensors_file
from modernbert_align.core.fixtures import make_inputs
from modernbert_align.core.model_config import ModelConfig
from modernbert_align.core.ops import Bits
from modernbert_align.core.probes import load_probes
from modernbert_align.core.table import load_table
from modernbert_align.core.tensor_parallel import Division, divisions
from modernbert_align.core.training import taps, weight_of
from modernbert_align.engines.passes import Outputs, Pass, hooked, outputs_of, stopping
from modernbert_align.models.modernbert.attention import ModernBertAttention
from modernbert_align.models.modernbert.parallel import gathered, rank_group

_SEED = 20  # of the random states of all ranks; fleet derives from it one that differs between them


def main(folder: Path) -> None:
    """Join the other ranks and answer requests; ends with the parent."""
    numbers = _numbers_from_parent()
    rank, degree = int(os.environ["PADDLE_TRAINER_ID"]), int(os.environ["PADDLE_TRAINERS_NUM"])
    give_groups_own_stores()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": degree, "pp_degree": 1, "sharding_degree": 1}
    strategy.tensor_parallel_configs = {"tensor_parallel_degree": degree, "tensor_init_seed": _SEED}
    fleet.init(is_collective=True, strategy=strategy)
    worker = Worker(Job.model_validate_json((folder / JOB).read_text(encoding="utf-8")), rank, degree)
    while True:
        count = numbers.get()
        request = Request.model_validate_json(message_file(folder, count).read_text(encoding="utf-8"))
        with Parcel(tensors_file(folder, count)) as given:
            notes = worker.answer(request, given)
        notes.write(folder, count, rank)


def _numbers_from_parent() -> "queue.Queue[int]":
    """Numbers of requests, read from stdin in the background; at its end the parent is gone, and so is this process."""
    numbers: queue.Queue[int] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            numbers.put(int(line))
        os._exit(1)  # whatever it is waiting for will never come

    threading.Thread(target=read, daemon=True).start()
    return numbers


class Parcel:
    """Tensors that came with a request."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="np")
        self.keys: tuple[str, ...] = ()

    def __enter__(self) -> "Parcel":
        self._tensors = self._file.__enter__()
        self.keys = tuple(self._tensors.keys())
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.__exit__(*raised)

    def bits(self, key: str) -> Bits:
        """One tensor as unsigned integers."""
        found: Bits = self._tensors.get_tensor(key)
        return found

    def tensor(self, key: str) -> paddle.Tensor:
        """One tensor in Paddle; 16-bit ones are bfloat16, 32-bit ones float32."""
        return tensor_of(self.bits(key))

    def named(self, group: str) -> dict[str, paddle.Tensor]:
        """All tensors whose key is `group/...`, by what follows."""
        return {key.removeprefix(f"{group}/"): self.tensor(key) for key in self.keys if key.startswith(f"{group}/")}


def tensor_of(bits: Bits) -> paddle.Tensor:
    """Bits of float32 or bfloat16 as a Paddle tensor of its own."""
    return paddle.to_tensor(bits if bits.itemsize == 2 else bits.view(np.float32))  # uint16 is its bfloat16


class Notes:
    """What a rank looked at for one request."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.rows: dict[str, str] = {}
        self.stops: list[StopNote] = []
        self.returned: dict[str, str] | None = None
        self.absent: dict[str, str] = {}
        self.error = ""
        self._digests: dict[str, str] = {}
        self._dtypes: dict[str, str] = {}
        self._tensors: dict[str, Bits] = {}

    def keep(self, key: str, bits: Bits, dtype: str, *, divided: bool = False) -> str:
        """Write a tensor down; returns its key."""
        bits = np.require(bits, requirements="C")  # np.ascontiguousarray gives a scalar an axis
        digest = hashlib.sha256(f"{dtype} {list(bits.shape)} ".encode())
        digest.update(bits.reshape(-1).view(np.uint8).data)
        self._digests[key], self._dtypes[key] = digest.hexdigest(), dtype
        if divided or self.rank == 0:
            self._tensors[key] = bits
        return key

    def keep_all(self, start: str, outputs: Outputs) -> dict[str, str]:
        """Write down what a module returned; name -> key."""
        return {name: self.keep(f"{start}/{name}", *backend.tensor_bits(value)) for name, value in outputs.items()}

    def write(self, folder: Path, count: int, rank: int) -> None:
        """Give the answer; the message appears last and whole."""
        save_file(self._tensors, tensors_file(folder, count, rank))
        answer = Answer(
            rows=self.rows,
            digests=self._digests,
            dtypes=self._dtypes,
            stops=tuple(self.stops),
            returned=self.returned,
            absent=self.absent,
            error=self.error,
        )
        place = message_file(folder, count, rank)
        place.with_suffix(".partial").write_text(answer.model_dump_json(), encoding="utf-8")
        place.with_suffix(".partial").rename(place)


class Worker:
    """This rank's share of the candidate, and what can be asked of it."""

    def __init__(self, job: Job, rank: int, degree: int) -> None:
        self._job, self._rank, self._degree = job, rank, degree
        config, table = ModelConfig.from_dict(dict(job.config)), load_table()
        self._config = config
        self._prefix = table.prefix(job.head)
        self._probes = load_probes(config, job.head, self._prefix)
        self._entries = table.expand(config, job.head)
        self._batch = make_inputs(job.inputs, config, job.head)
        self._divisions = divisions(self._entries, degree)
        self._model: Any = None

    def answer(self, request: Request, given: Parcel) -> Notes:
        """Do what is asked; whatever goes wrong in the model is a finding, not a failure."""
        notes = Notes(self._rank)
        if request.kind == "load":
            self._load(request, notes)
        elif request.kind == "forward":
            self._forward(request, given, notes)
        elif request.kind == "backward":
            self._backward(request, given, notes)
        elif request.kind == "step":
            self._step(request, given, notes)
        else:
            self._randomness(notes)
        return notes

    def _load(self, request: Request, notes: Notes) -> None:
        self._model = None
        self._model = backend.load(
            Path(self._job.candidate),
            self._job.architecture,
            request.dtype,
            self._job.attention,
            tensor_parallel=(self._degree, self._rank),
        )
        for name, (bits, dtype) in backend.state_bits(self._model).items():
            notes.rows[name] = notes.keep(name, bits, dtype, divided=name in self._divisions)

    def _forward(self, request: Request, given: Parcel, notes: Notes) -> None:
        model, batch = self._model, self._batch
        modules, notes.absent = hooked(self._probes, dict(model.named_sublayers()), "candidate")
        place = backend.places(model, batch)
        one = Pass(lambda: outputs_of(model(**backend.inputs(batch)), paddle.Tensor))
        injected = given.named("value")
        places = {name: place(module) for name, module in modules.items() if name not in request.skipped}
        tensors = _whole_outputs(modules)
        with paddle.no_grad(), stopping([one], places, lambda output: outputs_of(output, paddle.Tensor)):
            while (stop := one.next_stop()) is not None:
                outputs = tensors(stop.probe, stop.outputs)
                keys = notes.keep_all(f"{len(notes.stops)}/{stop.probe}", outputs)
                notes.stops.append(StopNote(probe=stop.probe, outputs=keys))
                if keys:
                    notes.rows.setdefault(stop.probe, next(iter(keys.values())))
                if stop.probe in injected and stop.outputs:
                    one.replace([injected[stop.probe]])
        if one.outputs is not None:
            notes.returned = notes.keep_all("output", one.outputs)
            notes.rows |= {p.name: notes.returned[p.key] for p in self._probes if p.key in notes.returned}
        notes.error = one.error

    def _backward(self, request: Request, given: Parcel, notes: Notes) -> None:
        injected = None
        if request.mode == "isolated":
            injected = paddle_training.Given(values=given.named("value"), gradients=given.named("gradient"))
        projections = {name: value.numpy() for name, value in given.named("projection").items()}
        try:
            recording = paddle_training.run(
                self._model,
                self._batch,
                taps(self._probes, self._prefix),
                self._probes,
                projections if request.loss == "projection" else None,
                injected,
            )
        except Exception as raised:  # noqa: BLE001 - whatever a wrong model raises is a finding about it, not ours
            notes.error = paddle_training.one_line(raised)
            return
        for probe, gradient in recording.gradients.items():
            notes.rows[probe] = notes.keep(f"gradient/{probe}", *backend.tensor_bits(gradient))
        self._keep_weights(notes, recording.weights)
        if recording.loss is not None:
            notes.rows["loss"] = notes.keep("loss", *backend.tensor_bits(recording.loss))

    def _step(self, request: Request, given: Parcel, notes: Notes) -> None:
        projections = {name: value.numpy() for name, value in given.named("projection").items()}
        by_name = {entry.hf: entry for entry in self._entries if entry.op.stored}
        gradients: list[dict[str, Any]] | None = None
        if request.mode == "isolated":
            gradients = []
            for n in range(request.steps):
                entries = {by_name[name]: tensor for name, tensor in given.named(f"step{n}").items()}
                gradients.append(
                    {e.paddle: self._share(e.paddle, paddle_training.turned(e, t)) for e, t in entries.items()}
                )
        found, notes.error = paddle_training.train(
            self._model,
            self._batch,
            self._probes,
            self._entries,
            projections if request.loss == "projection" else None,
            gradients,
            request.optimizer,
            request.steps,
        )
        self._keep_weights(notes, found)

    def _keep_weights(self, notes: Notes, tensors: Mapping[str, Any]) -> None:
        """Write down what has the layout of a weight, under its name."""
        for name, tensor in tensors.items():
            notes.rows[name] = notes.keep(
                name, *backend.tensor_bits(tensor), divided=weight_of(name) in self._divisions
            )

    def _share(self, name: str, whole: paddle.Tensor) -> paddle.Tensor:
        """This rank's share of what has a weight's layout."""
        divided: Division | None = self._divisions.get(name)
        if divided is None:
            return whole
        bits, _ = backend.tensor_bits(whole)
        return tensor_of(divided.cut(bits, self._rank))

    def _randomness(self, notes: Notes) -> None:
        """Draw with every dropout at one half, in training mode, and write down what was kept."""
        model, config = self._model, self._model.config
        attention, before = config.attn_implementation, {}
        kept: dict[str, paddle.Tensor] = {}

        def watch(name: str, which: int | None) -> Any:
            def hook(_layer: Any, _inputs: Any, output: Any) -> None:
                kept[name] = (output if which is None else output[which]) != 0

            return hook

        handles = []
        config.attn_implementation = "eager"  # which returns its probabilities, dropped as they are used
        model.train()
        fleet.meta_parallel.model_parallel_random_seed(_SEED)
        try:
            for name, layer in model.named_sublayers():
                if isinstance(layer, paddle.nn.Dropout):
                    before[layer] = ("p", layer.p)
                    layer.p = 0.5
                    handles.append(layer.register_forward_post_hook(watch(name, None)))
                elif isinstance(layer, ModernBertAttention):
                    before[layer] = ("attention_dropout", layer.attention_dropout)
                    layer.attention_dropout = 0.5
                    handles.append(layer.register_forward_post_hook(watch(name, 1)))
            with paddle.no_grad():
                model(**backend.inputs(self._batch))
        except Exception as raised:  # noqa: BLE001 - whatever a wrong model raises is a finding about it, not ours
            notes.error = paddle_training.one_line(raised)
        finally:
            model.eval()
            config.attn_implementation = attention
            for layer, (attribute, value) in before.items():
                setattr(layer, attribute, value)
            for handle in handles:
                handle.remove()
        for name, mask in kept.items():
            notes.rows[name] = notes.keep(name, np.packbits(mask.numpy()), "bits", divided=True)


def _whole_outputs(modules: Mapping[str, Any]) -> Any:
    """What a probe returned with the probabilities of all ranks' heads, which every rank has its share of."""

    def whole(probe: str, outputs: Outputs) -> Outputs:
        if not isinstance(modules[probe], ModernBertAttention):
            return outputs
        first, *rest = outputs.items()
        return dict([first, *((name, gathered(value, rank_group(), axis=1)) for name, value in rest)])

    return whole


if __name__ == "__main__":
    main(Path(sys.argv[1]))
