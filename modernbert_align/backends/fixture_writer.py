"""Writes a fixture with transformers: `python -m modernbert_align.backends.fixture_writer NAME ARCHITECTURE DIR`.

Runs in a process of its own, so that neither torch nor the model's memory is the caller's.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ModernBertConfig, PreTrainedTokenizerFast

from modernbert_align.backends.bpe import train_bpe
from modernbert_align.core.fixtures import Fixture, TokenizerSpec, corpus_path, load_fixture


def write_fixture(fixture: Fixture, architecture: str, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of a fixture.

    Args:
        fixture: What to write.
        architecture: A transformers class name, for example `ModernBertForMaskedLM`.
        folder: An existing, empty folder.
    """
    transformers.logging.disable_progress_bar()
    draw_model(fixture, architecture, fixture.seed).save_pretrained(folder)
    train_tokenizer(fixture.tokenizer, corpus_path()).save_pretrained(folder)


def draw_model(fixture: Fixture, architecture: str, seed: int) -> Any:
    """A model of the fixture's sizes with weights of the fixture's distribution, drawn from any seed."""
    ids = fixture.tokenizer
    config = ModernBertConfig(
        **fixture.config,
        pad_token_id=ids.pad_token_id,
        cls_token_id=ids.cls_token_id,
        bos_token_id=ids.cls_token_id,
        sep_token_id=ids.sep_token_id,
        eos_token_id=ids.sep_token_id,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    if fixture.weights == "sensitive":
        make_sensitive(model)
    if fixture.weights == "stress":
        make_stress(model)
    return model


def make_sensitive(model: torch.nn.Module) -> None:
    """Move every bias away from 0 and every norm weight away from 1, so that no term is invisible."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)


def make_stress(model: torch.nn.Module) -> None:
    """Redraw all weights as trained ones are distributed: heavy tails, and a few channels far larger than the rest.

    Matrices are normal with a log-normal scale per element (standard deviation 0.04, of output projections 0.03), norm
    weights log-normal around 1, eight times that in the same four channels of every norm, biases normal.

    Source: what outlier channels look like is after Dettmers et al. 2022, LLM.int8(), section 4.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                std = 0.03 if name.endswith(("Wo.weight", "dense.weight")) else 0.04
                parameter.normal_(0.0, std * math.exp(-0.25))
                for rows in parameter.split(4096):  # [rows cols]
                    rows.mul_(torch.randn_like(rows).mul_(0.5).exp_())
            elif name.endswith(".bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter).mul_(0.3).exp_())
                parameter[:: max(1, len(parameter) // 4)][:4] *= 8.0


def train_tokenizer(spec: TokenizerSpec, corpus: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ModernBERT's pipeline on a text file.

    The special tokens get the ids of `spec`; [UNK] and [MASK] stand beside them as in the published tokenizer.
    """
    with corpus.open(encoding="utf-8") as lines:
        engine = train_bpe(spec, lines)
    return PreTrainedTokenizerFast(
        tokenizer_object=engine,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
    )


if __name__ == "__main__":
    write_fixture(load_fixture(sys.argv[1])[0], sys.argv[2], Path(sys.argv[3]))
