"""ModernBERT for Paddle, with conversion from Hugging Face and a layer-by-layer proof that both agree.

Importing this package imports no framework; `register` imports PaddleNLP when it is called for the first time.
`keep_freed_memory` is for processes that run the model on CPU: docs/attention.md.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # By name, for an import statement would make every module depend on PaddleNLP through this one.
    where = {"register": "models.modernbert.auto", "keep_freed_memory": "core.memory"}
    if name not in where:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(import_module(f"{__name__}.{where[name]}"), name)
