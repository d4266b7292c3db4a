"""A tokenizer of ModernBERT's kind, trained on any texts."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken

from modernbert_align.backends.bpe import special_ids, train_bpe
from modernbert_align.backends.paddle import quiet
from modernbert_align.core.fixtures import TokenizerSpec
from modernbert_align.models.modernbert import ModernBertConfig, ModernBertTokenizer

MODEL_MAX_LENGTH = 8192
_LONGEST = 100_000  # characters of a piece: what a regular expression of the engine is run on at once


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str], folder: Path) -> ModernBertTokenizer:
    """Train byte-level BPE and write `tokenizer.json` and `tokenizer_config.json`, which transformers reads too.

    As in the published tokenizer, [MASK] takes the space before it.

    Args:
        spec: Size and special ids; those of a model by `spec_of`.
        folder: Where to write; created if need be.
    """
    engine = train_bpe(spec, (text[at : at + _LONGEST] for text in texts for at in range(0, len(text), _LONGEST)))
    specials = list(special_ids(spec))
    engine.add_special_tokens([AddedToken(token, lstrip=token == "[MASK]", special=True) for token in specials])
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    tokenizer = ModernBertTokenizer(
        tokenizer_file=str(folder / "tokenizer.json"),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=MODEL_MAX_LENGTH,
    )
    with quiet():
        tokenizer.save_pretrained(str(folder))
    return tokenizer


def spec_of(config: ModernBertConfig) -> TokenizerSpec:
    """The tokenizer that fits a model: as many tokens as it has embeddings, and its special ids."""
    return TokenizerSpec(
        vocab_size=config.vocab_size,
        pad_token_id=config.pad_token_id,
        cls_token_id=config.cls_token_id,
        sep_token_id=config.sep_token_id,
    )
