"""Tries which operations the frameworks have kernels for, instead of assuming it."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F

DTYPES = ("float32", "bfloat16", "float16")


def paddle_kernels() -> dict[str, dict[str, bool]]:
    """For every operation of the model: dtype -> whether Paddle runs it on this device."""
    operations: dict[str, Callable[[Any], Any]] = {
        "matmul": lambda x: paddle.matmul(x, x),
        "add": lambda x: x + x,
        "multiply": lambda x: x * x,
        "scale": lambda x: paddle.scale(x, 0.125),
        "gelu": F.gelu,
        "silu": F.silu,
        "layer_norm": lambda x: F.layer_norm(x, [4]),
        "softmax": F.softmax,
        "embedding": lambda x: F.embedding(paddle.to_tensor([0]), x),
        "cast": lambda x: x.astype("float32"),
        "concat": lambda x: paddle.concat([x, x]),
    }
    return {
        name: {dtype: _runs(operation, paddle.ones([4, 4]).astype(dtype)) for dtype in DTYPES}
        for name, operation in operations.items()
    }


def _runs(operation: Callable[[Any], Any], x: Any) -> bool:
    try:
        operation(x)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return False
    return True


def onednn_isa() -> str:
    """The instruction set torch's oneDNN really uses under the current environment, in its own words.

    oneDNN says it once per process, so a process of its own is asked.
    """
    code = "import torch; x = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(x, x)"
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if ",cpu,isa:" in line:
            return line.split(",cpu,isa:", 1)[1].strip()
    return "not reported"
