"""Trains a byte-level BPE tokenizer with ModernBERT's pipeline, with the `tokenizers` package alone."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from modernbert_align.core.fixtures import TokenizerSpec

__all__ = ["special_ids", "train_bpe"]


def special_ids(spec: TokenizerSpec) -> dict[str, int]:
    """Ids of the special tokens; [UNK] and [MASK] stand beside the others as in the published tokenizer."""
    return {
        "[UNK]": spec.cls_token_id - 1,
        "[CLS]": spec.cls_token_id,
        "[SEP]": spec.sep_token_id,
        "[PAD]": spec.pad_token_id,
        "[MASK]": spec.pad_token_id + 1,
    }


def train_bpe(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """Train an engine whose special tokens are in the vocabulary, and are not yet declared as special.

    Args:
        spec: Size of the vocabulary, and the special tokens' ids.
        texts: What to train on, in pieces; where a text is cut makes no difference at line ends.
    """
    specials = special_ids(spec)
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=spec.vocab_size - len(specials),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    start = len(specials) if min(specials.values()) == 0 else 0
    ordered = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    vocab = {token: start + index for index, (token, _) in enumerate(ordered)} | specials
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(trained)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", specials["[CLS]"]), ("[SEP]", specials["[SEP]"])],
    )
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(first, second) for first, second in pairs]
