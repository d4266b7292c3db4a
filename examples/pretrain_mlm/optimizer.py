"""StableAdamW: AdamW whose step is made smaller, weight by weight, when gradients outgrow their second moment."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import paddle

from examples.pretrain_mlm.recipe import OptimizerSettings

MOMENTS = ("moment1", "moment2")
Floats = npt.NDArray[np.float32]


class StableAdamW:
    """AdamW with Adafactor's update clipping, and decay that is scaled by the schedule but not by the learning rate.

    For every weight, at step t, with gradient g:

        b1, b2    = beta (1 - beta^(t-1)) / (1 - beta^t)       so that the moments need no correction
        m, v      = b1 m + (1 - b1) g,  b2 v + (1 - b2) g^2
        rms       = sqrt(mean(g^2 / max(v, epsilon^2)))        over the whole weight
        rate      = learning_rate / max(1, rms)
        w         = w (1 - weight_decay rate / peak) - rate m / (sqrt(v) + epsilon)

    Norms and biases, the weights with one axis, are not decayed.

    Args:
        parameters: Everything that is trained, by name, each weight once; in float32.

    Source: Wortsman et al. 2023 (arXiv 2304.13013), algorithm 2; the form with corrected betas and the decay are those
    of optimi's StableAdamW with `decouple_lr`, which the ModernBERT paper trained with.
    """

    def __init__(self, parameters: Mapping[str, paddle.Tensor], settings: OptimizerSettings) -> None:
        self._parameters = dict(parameters)
        self._settings = settings
        self._moments = {
            name: (paddle.zeros_like(weight), paddle.zeros_like(weight)) for name, weight in parameters.items()
        }
        self.steps = 0

    @paddle.no_grad()
    def step(self, learning_rate: float, peak: float) -> None:
        """Change the weights by one step and clear their gradients; a weight without one stays as it is.

        Args:
            learning_rate: Of this step.
            peak: The schedule's highest, which decay is measured by.
        """
        self.steps += 1
        settings = self._settings
        beta1, beta2 = (_corrected(beta, self.steps) for beta in (settings.beta1, settings.beta2))
        for name, weight in self._parameters.items():
            gradient = weight.grad
            if gradient is None:
                continue
            moment1, moment2 = self._moments[name]
            square = gradient * gradient
            moment1 = beta1 * moment1 + (1 - beta1) * gradient
            moment2 = beta2 * moment2 + (1 - beta2) * square
            floor = paddle.full([], settings.epsilon**2, moment2.dtype)
            rms = math.sqrt(float((square / paddle.maximum(moment2, floor)).mean()))
            rate = learning_rate / max(1.0, rms)
            kept = 1 - settings.weight_decay * rate / peak if weight.ndim > 1 else 1.0
            weight.set_value(weight * kept - rate * moment1 / (moment2.sqrt() + settings.epsilon))
            self._moments[name] = (moment1, moment2)
            weight.clear_gradient(set_to_zero=False)

    def state(self) -> dict[str, Floats]:
        """Moments as `<name>.moment1` and `<name>.moment2`, float32."""
        return {
            f"{name}.{kind}": moment.numpy()
            for name, moments in self._moments.items()
            for kind, moment in zip(MOMENTS, moments, strict=True)
        }

    def restore(self, steps: int, state: Mapping[str, Floats]) -> None:
        """Continue where `state` was taken.

        Raises:
            KeyError: A moment is missing.
        """
        self.steps = steps
        self._moments = {
            name: (paddle.to_tensor(state[f"{name}.{MOMENTS[0]}"]), paddle.to_tensor(state[f"{name}.{MOMENTS[1]}"]))
            for name in self._parameters
        }


def _corrected(beta: float, step: int) -> float:
    """Adam's bias correction, put into beta itself."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)
