"""Trains in PyTorch what `train_paddle.py` trains in Paddle: `python -m examples.downstream.train_hf DIR`.

A plain loop of the functions that transformers' Trainer calls: that Trainer itself needs accelerate, which is no
dependency of this project.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from examples.downstream import recipe as recipes
from examples.downstream.recipe import Batch, Recipe, Run, Side
from modernbert_align.backends.hf import PermutedSums
from modernbert_align.backends.runtime import package_versions


def train(folder: Path, seed: int, side: Side) -> Run:
    """Train from the checkpoint of a seed.

    The null is the reference with other rounding only: sdpa attention, and every sum in a Linear in another order.
    """
    recipe, data = recipes.read_recipe(folder), recipes.read_data(folder)
    start = recipes.start_folder(folder, seed, "hf")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(start)
    architecture = getattr(transformers, recipes.ARCHITECTURES[recipe.head])
    model = architecture.from_pretrained(start, attn_implementation="eager" if side == "reference" else "sdpa")
    PermutedSums(model).active = side == "null"
    examples = recipes.encode(tokenizer, data.train, recipe.max_length)
    optimizer = torch.optim.AdamW(
        _groups(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    losses, rates, digests = [], [], []
    model.train()
    begun = time.perf_counter()
    for indices in recipes.order(recipe, seed, len(examples)):
        batch = recipes.collate([examples[index] for index in indices], tokenizer.pad_token_id)
        loss = model(**_tensors(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        losses.append(recipes.finite(loss.item()))
        rates.append(optimizer.param_groups[0]["lr"])
        digests.append(recipes.digest(batch))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    targets, predictions = _evaluate(model, tokenizer, recipe, data)
    return Run(
        side=side,
        seed=seed,
        losses=tuple(losses),
        learning_rates=tuple(rates),
        batches=tuple(digests),
        targets=tuple(targets),
        predictions=tuple(predictions),
        seconds=seconds,
        versions=package_versions(("torch", "transformers")),
    )


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases are not decayed, by their names, as both Trainers have it."""
    named = list(model.named_parameters())
    spared = {name for name, _ in named if "bias" in name or "norm" in name}
    return [
        {"params": [p for name, p in named if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def _evaluate(model: Any, tokenizer: Any, recipe: Recipe, data: recipes.Data) -> tuple[list[int], list[int]]:
    model.eval()
    targets, predictions = [], []
    for examples in recipes.chunks(recipes.encode(tokenizer, data.evaluation, recipe.max_length), recipe.batch_size):
        batch = recipes.collate(examples, tokenizer.pad_token_id)
        with torch.no_grad():
            logits = model(**_tensors(batch)).logits.numpy()
        expected, chosen = recipes.answers(np.asarray(logits), batch["labels"])
        targets += expected
        predictions += chosen
    return targets, predictions


def main(folder: Path) -> None:
    """Train every seed twice, as the reference and as the null."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sides: tuple[Side, ...] = ("reference", "null")
    for seed in recipes.read_recipe(folder).seeds:
        for side in sides:
            run = train(folder, seed, side)
            recipes.run_path(folder, side, seed).write_text(run.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
