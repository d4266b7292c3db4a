"""The loop: batches in, weights out, everything measured on the way."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle

from examples.common.tokenizer import spec_of, train_tokenizer
from examples.pretrain_mlm import data, schedule, state
from examples.pretrain_mlm.data import DROPOUT, Batches, Row
from examples.pretrain_mlm.metrics import Evaluated, Metrics, Step
from examples.pretrain_mlm.optimizer import StableAdamW
from examples.pretrain_mlm.recipe import Recipe, Stage
from modernbert_align.backends import paddle as backend
from modernbert_align.backends.paddle_training import parameters
from modernbert_align.core.convert import Request, plan_conversion, refuse
from modernbert_align.core.model_config import FULL
from modernbert_align.core.table import load_table
from modernbert_align.errors import CheckpointError, UsageError
from modernbert_align.models.modernbert import ModernBertConfig, ModernBertForMaskedLM, ModernBertTokenizer
from modernbert_align.models.modernbert.attention import ModernBertRotaryEmbedding

TOKENIZER, MODEL, METRICS = "tokenizer", "model", "metrics.jsonl"
HEAD, ARCHITECTURE = "masked_lm", "ModernBertForMaskedLM"

Report = Callable[[Step], None]


class Training:
    """One training in its folder, new or continued.

    Args:
        out: Where everything goes.
        resume: Continue from the newest checkpoint, or begin if there is none.
        notify: Told, in a line, what happens.

    Attributes:
        model: As it is after `step` steps.

    Raises:
        UsageError: The folder holds another training, or there is nothing to train on.
        CheckpointError: What is to be loaded cannot be.
    """

    def __init__(self, recipe: Recipe, out: Path, *, resume: bool, notify: Callable[[str], None]) -> None:
        self._recipe, self._out, self._notify = recipe, out, notify
        saved = state.folders(out)
        if not resume and (saved or (out / METRICS).exists()):
            raise UsageError(f"`{out}` holds a training", hint="continue it with --resume, or choose another --out")
        texts = data.read_texts(recipe.data)
        newest = saved[-1] if saved else None
        folder = recipe.start.checkpoint if newest is None else newest / state.MODEL
        check_checkpoint(folder)
        self._tokenizer = self._find_tokenizer(folder, texts, newest is not None)
        self._corpora = data.tokenize(texts, self._tokenizer)
        self._data_sha256 = self._corpora.sha256
        notify(f"{self._corpora.tokens:,} tokens to train on, {recipe.steps} steps in {len(recipe.stages)} stages")
        found = None
        if newest is not None:
            found = state.read_state(newest, recipe=recipe.sha256, data=self._data_sha256)
        self.model = backend.load(folder, ARCHITECTURE, "fp32")
        self.model.config.attn_implementation = None  # blockwise, as packed rows have it
        self._sparse_prediction = self.model.config.sparse_prediction
        self._optimizer = StableAdamW(parameters(self.model), recipe.optimizer)
        if newest is not None and found is not None:
            state.restore_optimizer(newest, found, self._optimizer)
            notify(f"continuing after step {found.step}")
        self._metrics = Metrics(out / METRICS, after=self.step)

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self._optimizer.steps

    def run(self, stop_at: int, report: Report) -> None:
        """Train up to a step, and save; after the last step of the recipe, write the model too.

        Args:
            stop_at: Steps of the whole recipe, those already taken included.
            report: Called after every step.

        Raises:
            UsageError: The loss is not a number any more.
            CheckpointError: The disk cannot be written.
        """
        while self.step < min(stop_at, self._recipe.steps):
            number, within = self._recipe.place(self.step)
            self._run_stage(number, within, stop_at, report)
        if self.step == self._recipe.steps:
            self._with_own_settings(
                lambda: state.whole(
                    self._out / MODEL, lambda folder: state.write_model(folder, self.model, self._tokenizer)
                )
            )

    def _run_stage(self, number: int, within: int, stop_at: int, report: Report) -> None:
        recipe = self._recipe
        stage = recipe.stages[number]
        batches = Batches(recipe, number, self._corpora)
        held_out = batches.held_out()
        enter(self.model, stage)
        if within == 0:
            self._notify(
                f"stage {stage.name}: {stage.steps} steps, {stage.length} tokens, RoPE base {stage.theta:g}, "
                f"{stage.row_tokens * stage.rows:,} tokens per batch"
            )
            self._metrics.add(Evaluated(step=self.step, stage=stage.name, held_out_loss=self._evaluate(held_out)))
        start = time.perf_counter()
        for rows in batches.start(within):
            rate = schedule.learning_rate(stage, within)
            loss = self._train_on(rows, rate, stage.learning_rate)
            tokens = data.row_tokens(rows)
            step = Step(
                step=self.step,
                stage=stage.name,
                loss=loss,
                learning_rate=rate,
                batch_tokens=tokens,
                packing_efficiency=tokens / (len(rows) * stage.row_tokens),
                tokens_per_s=tokens / (time.perf_counter() - start),
            )
            self._metrics.add(step)
            report(step)
            within += 1
            last = within == stage.steps or self.step >= stop_at
            if within == stage.steps or self.step % recipe.evaluation.every == 0:
                self._metrics.add(Evaluated(step=self.step, stage=stage.name, held_out_loss=self._evaluate(held_out)))
            if last or self.step % recipe.checkpoints.every == 0:
                self._save()
            if last:
                return
            start = time.perf_counter()

    def _train_on(self, rows: list[Row], rate: float, peak: float) -> float:
        """One step on a batch, a row at a time; gives the mean loss over the batch's predicted tokens."""
        seeds = data.generator(self._recipe, DROPOUT, self.step)
        paddle.seed(int(seeds.integers(2**31)))
        self.model.train()
        counts = [data.counted(row) for row in rows]
        loss = 0.0
        for row, count in zip(rows, counts, strict=True):
            share = row_loss(self.model, row) * (count / sum(counts))
            share.backward()
            loss += float(share)
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss of step {self.step + 1} is not a number",
                hint="lower the learning rate or lengthen its warm-up",
            )
        self._optimizer.step(rate, peak)
        return loss

    @paddle.no_grad()
    def _evaluate(self, rows: list[Row]) -> float:
        """Mean loss over the predicted tokens of held-out rows."""
        self.model.eval()
        counts = [data.counted(row) for row in rows]
        total = sum(float(row_loss(self.model, row)) * count for row, count in zip(rows, counts, strict=True))
        return total / sum(counts)

    def _save(self) -> None:
        def save() -> Path:
            return state.save(
                self._out,
                self.model,
                self._tokenizer,
                self._optimizer,
                recipe=self._recipe.sha256,
                data=self._data_sha256,
                keep=self._recipe.checkpoints.keep,
            )

        folder = self._with_own_settings(save)
        self._notify(f"saved {folder}")

    def _with_own_settings(self, write: Callable[[], Path]) -> Path:
        """Write the model with the settings it came with where the training has its own."""
        config = self.model.config
        config.sparse_prediction = self._sparse_prediction
        try:
            return write()
        finally:
            config.sparse_prediction = True

    def _find_tokenizer(self, folder: Path, texts: data.Texts, resumed: bool) -> ModernBertTokenizer:
        """The tokenizer of the checkpoint, or one that is trained now."""
        with backend.quiet():
            if self._recipe.start.tokenizer == "checkpoint" or resumed:
                tokenizer = ModernBertTokenizer.from_pretrained(str(folder))
                size = ModernBertConfig.from_pretrained(str(folder)).vocab_size
                if len(tokenizer) > size or tokenizer.mask_token_id is None:
                    raise CheckpointError(
                        f"the tokenizer of `{folder}` has {len(tokenizer)} tokens or no [MASK], the model {size}",
                        hint='train one: tokenizer = "train"',
                    )
                return tokenizer
            spec = spec_of(ModernBertConfig.from_pretrained(str(folder)))
        self._notify(f"training a tokenizer of {spec.vocab_size} tokens")
        training = (document.text for document in texts.training["sources"])
        state.whole(self._out / TOKENIZER, lambda new: train_tokenizer(spec, training, new))
        with backend.quiet():
            return ModernBertTokenizer.from_pretrained(str(self._out / TOKENIZER))


def check_checkpoint(folder: Path) -> None:
    """Refuse what is no Paddle checkpoint of a masked language model, by its headers.

    Raises:
        CheckpointError, ConfigError, UsageError: It is not.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint `{folder}`",
            hint="write one first: modernbert-align convert --src hf --dst paddle --model tiny",
        )
    request = Request(
        folder=folder, model=str(folder), revision=None, src="paddle", dst="hf", head=HEAD, digest="none", prove=()
    )
    refuse(plan_conversion(request, load_table()).plan.problems, "")


def enter(model: ModernBertForMaskedLM, stage: Stage) -> None:
    """Set a model up for a stage: RoPE base of full attention, context length, and a head that predicts few tokens."""
    config = model.config
    parameters_by_kind = {kind: dict(given) for kind, given in config.rope_parameters.items()}
    parameters_by_kind[FULL]["rope_theta"] = stage.theta
    config.rope_parameters = parameters_by_kind
    config.max_position_embeddings = max(config.max_position_embeddings, stage.length)
    config.sparse_prediction = True
    model.model.rotary_emb[FULL] = ModernBertRotaryEmbedding(config, FULL)


def row_loss(model: ModernBertForMaskedLM, row: Row) -> paddle.Tensor:
    """Mean loss over the predicted tokens of a packed row, a scalar."""
    arguments: dict[str, Any] = {name: paddle.to_tensor(values) for name, values in row.items()}
    return model(**arguments, return_dict=True).loss
