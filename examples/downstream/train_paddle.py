"""Trains in Paddle with PaddleNLP's Trainer: `python -m examples.downstream.train_paddle DIR`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paddle
from paddlenlp.trainer import EvalPrediction, Trainer, TrainingArguments

from examples.downstream import recipe as recipes
from examples.downstream.recipe import Encoded, Recipe, Run
from modernbert_align.backends.paddle import quiet
from modernbert_align.backends.runtime import package_versions
from modernbert_align.models import modernbert


class RecordingTrainer(Trainer):
    """PaddleNLP's Trainer with the batches in a given order, and a record of every step.

    Args:
        order: The indices of every batch.
        **kwargs: As in PaddleNLP.
    """

    def __init__(self, *, order: Sequence[Sequence[int]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.order = order
        self.losses: list[float | None] = []
        self.learning_rates: list[float] = []
        self.batches: list[str] = []

    def get_train_dataloader(self) -> paddle.io.DataLoader:
        """The batches in the given order; PaddleNLP shuffles."""
        return paddle.io.DataLoader(self.train_dataset, batch_sampler=self.order, collate_fn=self.data_collator)

    def training_step(self, model: Any, inputs: dict[str, paddle.Tensor]) -> paddle.Tensor:
        """PaddleNLP's step, recorded."""
        self.batches.append(recipes.digest({name: values.numpy() for name, values in inputs.items()}))
        self.learning_rates.append(float(self.optimizer.get_lr()))
        loss = super().training_step(model, inputs)
        self.losses.append(recipes.finite(float(loss)))
        return loss


def arguments(recipe: Recipe, seed: int, out: Path) -> TrainingArguments:
    """The recipe in PaddleNLP's words."""
    return TrainingArguments(
        output_dir=str(out),
        device="cpu",
        seed=seed,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.max_grad_norm,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",  # its VisualDL fails on boolean settings with protobuf 7
    )


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of right answers; without a metric `predict` keeps no predictions either."""
    targets, predictions = recipes.answers(found.predictions, found.label_ids)
    return {"accuracy": sum(map(int.__eq__, targets, predictions)) / len(targets)}


def train(folder: Path, seed: int) -> Run:
    """Train from the converted checkpoint of a seed."""
    recipe, data = recipes.read_recipe(folder), recipes.read_data(folder)
    start = str(recipes.start_folder(folder, seed, "paddle"))
    tokenizer = modernbert.ModernBertTokenizer.from_pretrained(start)
    model = getattr(modernbert, recipes.ARCHITECTURES[recipe.head]).from_pretrained(start)
    examples = recipes.encode(tokenizer, data.train, recipe.max_length)

    def collator(rows: Sequence[Encoded]) -> dict[str, paddle.Tensor]:
        batch = recipes.collate(rows, tokenizer.pad_token_id)
        return {name: paddle.to_tensor(values) for name, values in batch.items()}

    trainer = RecordingTrainer(
        order=recipes.order(recipe, seed, len(examples)),
        model=model,
        args=arguments(recipe, seed, folder / f"seed-{seed}" / "trainer"),
        train_dataset=examples,
        data_collator=collator,
        tokenizer=tokenizer,
        compute_metrics=accuracy,
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    found = trainer.predict(recipes.encode(tokenizer, data.evaluation, recipe.max_length))
    targets, predictions = recipes.answers(found.predictions, found.label_ids)
    return Run(
        side="candidate",
        seed=seed,
        losses=tuple(trainer.losses),
        learning_rates=tuple(trainer.learning_rates),
        batches=tuple(trainer.batches),
        targets=tuple(targets),
        predictions=tuple(predictions),
        seconds=seconds,
        versions=package_versions(("paddlepaddle", "paddlenlp")),
    )


def main(folder: Path) -> None:
    """Train every seed."""
    for seed in recipes.read_recipe(folder).seeds:
        with quiet():
            run = train(folder, seed)
        recipes.run_path(folder, "candidate", seed).write_text(run.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
