"""Makes PaddleNLP's Auto classes know ModernBERT.

PaddleNLP's AutoModel picks a class by a substring of `architectures`. "ModernBert" contains "Bert", and so, untaught,
it builds a BERT with random weights from a ModernBERT folder. Here the choice is made by `model_type`, which is exact,
before PaddleNLP makes its own; a folder of any other type goes through PaddleNLP's code unchanged. AutoTokenizer knows
classes by name only, and a ModernBERT folder names a class of transformers that fits any model: `model_type` decides
there, too.

Source: paddlenlp 2.8.1 and 3.0.0b4, transformers/auto/configuration.py, modeling.py and tokenizer.py.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from paddlenlp.transformers.auto import configuration as auto_configuration
from paddlenlp.transformers.auto import modeling as auto_modeling
from paddlenlp.transformers.auto import tokenizer as auto_tokenizer

from modernbert_align.errors import ConfigError
from modernbert_align.models import modernbert
from modernbert_align.models.modernbert.configuration import ModernBertConfig
from modernbert_align.models.modernbert.tokenizer import ModernBertTokenizer

MODEL_TYPE = ModernBertConfig.model_type
DECODER_TYPE = "modernbert-decoder"
# Classes of transformers, and none, that say "as tokenizer.json has it".
GENERIC_TOKENIZERS = (None, "PreTrainedTokenizerFast", "PretrainedTokenizerFast", "TokenizersBackend")


@cache
def register() -> None:
    """Put ModernBERT into AutoConfig, AutoModel, AutoModelFor... and AutoTokenizer of PaddleNLP, in this process.

    Calling it again changes nothing. Other models are loaded as before.
    """
    auto_configuration.AutoConfig.MAPPING_NAMES[MODEL_TYPE] = [ModernBertConfig]  # paddlenlp 2.8.1
    if hasattr(auto_configuration, "CONFIG_MAPPING"):  # paddlenlp 3
        auto_configuration.CONFIG_MAPPING.register(MODEL_TYPE, ModernBertConfig, exist_ok=True)
    _choose_models_by_type(auto_modeling._BaseAutoModelClass)
    _choose_tokenizers_by_type(auto_tokenizer.AutoTokenizer)


def _choose_models_by_type(auto_class: Any) -> None:
    theirs = auto_class._get_model_class_from_config.__func__

    def choose(cls: Any, pretrained_model_name_or_path: Any, config_file_path: Any, config: Any = None) -> Any:
        model_type = _model_type(config_file_path if config is None else config)
        if model_type == MODEL_TYPE:
            return _model_class(cls)
        if model_type == DECODER_TYPE:
            raise ConfigError(
                "a ModernBERT decoder can be converted and has no Paddle model",
                hint="PaddleNLP would take it for a BERT",
            )
        return theirs(cls, pretrained_model_name_or_path, config_file_path, config)

    auto_class._get_model_class_from_config = classmethod(choose)


def _choose_tokenizers_by_type(auto_class: Any) -> None:
    theirs = auto_class.from_pretrained.__func__

    def choose(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_our_tokenizer(Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")):
            kwargs.pop("use_fast", None)  # there is one tokenizer, and it is fast
            return ModernBertTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return theirs(cls, pretrained_model_name_or_path, *args, **kwargs)

    auto_class.from_pretrained = classmethod(choose)


def _has_our_tokenizer(folder: Path) -> bool:
    config, settings = folder / "config.json", folder / "tokenizer_config.json"
    named = None
    if settings.is_file():
        written = json.loads(settings.read_text(encoding="utf-8"))
        named = written.get("init_class", written.get("tokenizer_class"))  # PaddleNLP's order
    if named in GENERIC_TOKENIZERS:
        return config.is_file() and _model_type(config) == MODEL_TYPE
    return named == ModernBertTokenizer.__name__


def _model_type(config: Any) -> str | None:
    """`model_type` of a configuration: an object, a dict, or the path of a config.json."""
    if isinstance(config, (str, Path)):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)


def _model_class(auto_class: Any) -> Any:
    """Our class for the task of an Auto class; the task is what that Auto class would build of a BERT."""
    name = "Modern" + auto_class._name_mapping["BertModel_Import_Class"]
    if name not in modernbert.__all__:
        known = ", ".join(name for name in modernbert.__all__ if name.startswith("ModernBertFor"))
        raise ConfigError(f"there is no `{name}`", hint=f"the heads are: {known}; the encoder is ModernBertModel")
    return getattr(modernbert, name)
