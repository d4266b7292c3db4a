"""What is compared beyond the forward pass: gradients, and what an optimizer makes of them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modernbert_align.core.fixtures import Inputs
from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import Attention, EngineName, Loss, Phase
from modernbert_align.core.table import Entry

EMBEDDED = "inputs"  # the embedded tokens: what the gradient of the inputs is taken with respect to
MOMENTS = ("moment1", "moment2")


DEFAULT_STEPS = 3
# One step shows no loss of the weights it made, nor gradients left over from the step before.
FEWEST_STEPS = 2
MOST_STEPS = 10  # the reference's gradients of every step are held: 0.6 GB each for base


@dataclass(frozen=True, kw_only=True)
class Run:
    """How both models are run.

    Attributes:
        forward_engine: What drives the forward phase: `padiff`, a pass at a time, or `stream`, all passes at once.
        steps: How many optimizer steps the step phase takes; None in the others.
        attention: Of the candidate. Blockwise attention is compared in the forward phase, by `stream`.
        tensor_parallel: Among how many ranks the candidate's weights are divided. The forward phase is driven by
            `stream` then.

    Raises:
        ValueError: Steps without the step phase or the other way round, or too few or too many; blockwise attention
            in another phase or with another engine; ranks with another engine.
    """

    phase: Phase = "forward"
    forward_engine: EngineName = "padiff"
    steps: int | None = None
    attention: Attention = "eager"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        taken = self.steps is not None and FEWEST_STEPS <= self.steps <= MOST_STEPS
        if taken != (self.phase == "step") or (self.steps is not None and not taken):
            raise ValueError(f"phase {self.phase} and {self.steps} steps")
        if self.attention == "blockwise" and self.engine != "stream":
            raise ValueError(f"blockwise attention and engine {self.engine}")
        if self.tensor_parallel < 1 or (self.tensor_parallel > 1 and self.engine == "padiff"):
            raise ValueError(f"{self.tensor_parallel} ranks and engine {self.engine}")

    @property
    def engine(self) -> EngineName:
        """What drives this phase."""
        return self.forward_engine if self.phase == "forward" else "autograd"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW as both sides run it, in float32, also on weights of a half-precision model.

    The rates are larger than a training of ModernBERT uses, so that three steps show a wrong decay or bias correction a
    thousandfold above rounding. All numbers are exact in float32: Paddle computes 1 - beta2 in it, which with 0.98
    alone makes second moments differ by 1e-6. Norms and biases are not decayed, as transformers' Trainer has it.

    Source: transformers 5.23.0, trainer.py, Trainer.get_decay_parameter_names; paddlepaddle 3.3.1, adamw kernel.
    """

    learning_rate: float = 2.0**-10
    beta1: float = 1 - 2.0**-3
    beta2: float = 1 - 2.0**-6
    epsilon: float = 2.0**-20
    weight_decay: float = 2.0**-3

    def decays(self, entry: Entry) -> bool:
        """Whether a weight is decayed."""
        return entry.kind != "norm" and not entry.hf.endswith(".bias")


def losses(batch: Inputs) -> tuple[Loss, ...]:
    """What is differentiated: a random projection of the outputs and, where the batch has labels, the head's own loss.

    A projection reaches every output with a weight of its own; the mean of a normalised output, for one, has hardly any
    gradient.
    """
    return ("projection", "head") if batch.labels else ("projection",)


def projections(
    batch: Inputs, probes: Sequence[Probe], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, npt.NDArray[np.float32]]:
    """The fixed random weights that the outputs are summed up with.

    Args:
        shapes: Probe name -> shape, for every probe that is an output of the whole model.

    Returns:
        Probe name -> weights of that shape, zero at padding; the sum of their squares is one.
    """
    generator = np.random.Generator(np.random.PCG64(batch.spec.seed))
    found = {}
    for probe in outputs(probes):
        drawn = generator.standard_normal(shapes[probe.name])
        if probe.tokens:
            drawn[batch.attention_mask == 0] = 0.0
        found[probe.name] = (drawn / np.linalg.norm(drawn)).astype(np.float32)
    return found


def outputs(probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """The probes that are differentiable outputs of the whole model."""
    return tuple(probe for probe in probes if probe.key and probe.key != "loss")


def taps(probes: Sequence[Probe], prefix: str) -> tuple[Probe, ...]:
    """Where gradients of activations are compared: at the output of every module, and at the embedded tokens."""
    modules = [probe for probe in probes if not probe.key]
    embedding = f"{prefix}embeddings.tok_embeddings"
    first = Probe(name=EMBEDDED, pattern=EMBEDDED, hf=embedding, paddle=embedding, fan_in=modules[0].fan_in)
    return (first, *modules)


def backward_probes(probes: Sequence[Probe], entries: Sequence[Entry], prefix: str) -> tuple[Probe, ...]:
    """Every row of the backward phase: the loss, then gradients from the loss to the inputs, then those of all weights.

    Names are those of probes, `inputs`, and the weights' Hugging Face names. `pattern` has `{i}` for the layer index.
    """
    widest = max(probe.fan_in for probe in probes)
    loss = Probe(name="loss", pattern="loss", hf="", paddle="", fan_in=widest, key="loss", tokens=False, scale=1.0)
    weights = [_weight(entry, entry.hf, widest) for entry in entries if entry.op.stored]
    return (loss, *reversed(taps(probes, prefix)), *weights)


def phase_probes(run: Run, probes: Sequence[Probe], entries: Sequence[Entry], prefix: str) -> tuple[Probe, ...]:
    """Every row of a phase.

    Args:
        probes: Those of the forward phase.
        entries: The table for the model.
        prefix: What module paths of the encoder start with.
    """
    if run.phase == "forward":
        return tuple(probes)
    if run.phase == "backward":
        return backward_probes(probes, entries, prefix)
    return step_probes(probes, entries, run.steps or 0)


def weight_of(name: str) -> str:
    """The weight that a weight's moment belongs to, by their names; anything else is itself."""
    return next((name.removesuffix(f".{moment}") for moment in MOMENTS if name.endswith(f".{moment}")), name)


def phase_losses(phase: Phase, batch: Inputs) -> tuple[Loss | None, ...]:
    """What a phase differentiates: nothing, everything there is, or what a training would."""
    return {"forward": (None,), "backward": losses(batch), "step": losses(batch)[-1:]}[phase]


def step_probes(probes: Sequence[Probe], entries: Sequence[Entry], steps: int) -> tuple[Probe, ...]:
    """Every row of the step phase: every weight and both its moments after the last step, then the loss before each."""
    widest = max(probe.fan_in for probe in probes)
    before = [
        Probe(name=f"loss.{n}", pattern="loss", hf="", paddle="", fan_in=widest, tokens=False, scale=1.0)
        for n in range(1, steps + 1)
    ]
    names = [
        (entry, name)
        for entry, kind in itertools.product([e for e in entries if e.op.stored], ("", *MOMENTS))
        for name in [f"{entry.hf}.{kind}" if kind else entry.hf]
    ]
    return (*(_weight(entry, name, 1, float32=True) for entry, name in names), *before)


def _weight(entry: Entry, name: str, fan_in: int, *, float32: bool = False) -> Probe:
    pattern = re.sub(r"\.\d+\.", ".{i}.", name)
    return Probe(
        name=name,
        pattern=pattern,
        hf=entry.hf,
        paddle=entry.paddle,
        fan_in=fan_in,
        tokens=False,
        float32=float32,
    )
