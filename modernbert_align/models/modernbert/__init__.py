"""ModernBERT in PaddleNLP's file set: configuration, modeling (encoder, masked LM), heads, tokenizer; and a packer.

Classes are imported when they are first used: importing this package imports neither paddle nor paddlenlp.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "ModernBertConfig": "configuration",
    "ModernBertForMaskedLM": "modeling",
    "ModernBertForMultipleChoice": "heads",
    "ModernBertForQuestionAnswering": "heads",
    "ModernBertForSequenceClassification": "heads",
    "ModernBertForTokenClassification": "heads",
    "ModernBertModel": "modeling",
    "ModernBertPretrainedModel": "modeling",
    "ModernBertTokenizer": "tokenizer",
    "Packer": "packing",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
