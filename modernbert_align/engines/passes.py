"""Forward passes that stop wherever a probe has computed its output, so that several can run side by side.

A pass is a coroutine around a model's own forward(); hooks only stop it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import greenlet

from modernbert_align.core.probes import Probe

Outputs = Mapping[str, Any]  # name (position, where it has none) -> tensor


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A pass that has computed a probe's output."""

    probe: str
    outputs: Outputs


class Pass:
    """One forward pass that can be advanced from probe to probe.

    Args:
        forward: Runs the whole model.
        enter: Called whenever the pass goes on: what the model must be set to for this pass and not for others.

    Attributes:
        outputs: What the whole model returned; None before its end.
        error: What ended it early.
        counts: probe -> how often it ran.
    """

    def __init__(self, forward: Callable[[], Outputs], enter: Callable[[], None] = lambda: None) -> None:
        self.outputs: Outputs | None = None
        self.error = ""
        self.counts: dict[str, int] = {}
        self._forward, self._enter = forward, enter
        self._greenlet = greenlet.greenlet(self._run)
        self._ahead: Stop | None = None
        self._replacement: Any = None

    @property
    def greenlet(self) -> Any:
        """What `greenlet.getcurrent` returns inside this pass."""
        return self._greenlet

    def _run(self, _: object) -> None:
        try:
            self.outputs = self._forward()
        except Exception as raised:  # noqa: BLE001 - whatever a wrong model raises is a finding about it, not ours
            self.error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:400]}"

    def next_stop(self) -> Stop | None:
        """Run to whatever probe comes next; None at the end."""
        if self._greenlet.dead:
            return None
        self._enter()
        replacement, self._replacement = self._replacement, None
        stop: Stop | None = self._greenlet.switch(replacement)
        if stop is not None:
            self.counts[stop.probe] = self.counts.get(stop.probe, 0) + 1
        return stop

    def advance(self, probe: str, finished: Collection[str]) -> Outputs | None:
        """Run until `probe` has its output and return that; None if this pass goes past it without.

        Args:
            finished: Probes behind this one; running one of them again is counted and otherwise passed over.
        """
        stop, self._ahead = self._ahead, None
        while stop is None or stop.probe in finished:
            stop = self.next_stop()
            if stop is None:
                return None
        if stop.probe != probe:
            self._ahead = stop
            return None
        return stop.outputs

    def replace(self, values: list[Any]) -> None:
        """Have the pass go on with other values of the first tensors that the probe it stands at returns."""
        self._replacement = values

    def finish(self) -> None:
        """Run to the end."""
        while self.next_stop() is not None:
            pass


@contextmanager
def stopping(
    passes: Collection[Pass],
    places: Mapping[str, Callable[[Callable[..., Any]], Any]],
    tensors: Callable[[Any], Outputs],
) -> Iterator[None]:
    """Have passes stop at probes inside this context; hooks are removed at its end, whatever happened.

    Args:
        places: Probe -> registers a hook that is called with a module, its inputs and its output.
        tensors: Those in such an output.
    """
    main = greenlet.getcurrent()
    running = {one.greenlet for one in passes}

    def hook(probe: str) -> Callable[..., Any]:
        def stop(_module: Any, _inputs: Any, output: Any) -> Any:
            if greenlet.getcurrent() not in running:
                return None
            replacement = main.switch(Stop(probe=probe, outputs=tensors(output)))
            return None if replacement is None else replaced(output, replacement)

        return stop

    handles = []
    try:
        for probe, register in places.items():
            handles.append(register(hook(probe)))
        yield
    finally:
        for one in passes:
            one.greenlet.throw()
        for handle in handles:
            handle.remove()


def hooked(
    probes: Sequence[Probe], modules: Mapping[str, Any], side: Literal["candidate", "reference"]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The modules to look at.

    Args:
        modules: All of the model, by path.

    Returns:
        Probe -> module, and probe -> why the model does not have it.
    """
    found: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for probe in probes:
        path = probe.paddle if side == "candidate" else probe.hf
        if probe.key:
            continue
        if path in modules:
            found[probe.name] = modules[path]
        else:
            absent[probe.name] = f"the {side} has no module `{path}`"
    return found, absent


def outputs_of(output: Any, kind: type) -> dict[str, Any]:
    """The tensors in what a module returned.

    Args:
        kind: The framework's class of tensors.

    Returns:
        Name (position, where it has none) -> tensor.
    """
    named = output.items() if isinstance(output, Mapping) else enumerate(_flat(output, kind))
    found: dict[str, Any] = {}
    for name, value in named:
        tensors = _flat(value, kind)
        found |= {str(name) if len(tensors) == 1 else f"{name}.{n}": tensor for n, tensor in enumerate(tensors)}
    return found


def _flat(value: Any, kind: type) -> list[Any]:
    if isinstance(value, kind):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _flat(item, kind)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _flat(item, kind)]
    return []


def replaced(output: Any, replacements: list[Any]) -> Any:
    """`output` with its first tensors replaced; what the reference does not return stays."""
    if isinstance(output, list | tuple):
        return type(output)([*replacements[: len(output)], *output[len(replacements) :]])
    return replacements[0]
