"""The pretraining example: masking, schedule, optimizer, stages, exact resume, and what comes out."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from examples.pretrain_mlm import data, masking, optimizer, schedule, state, training
from examples.pretrain_mlm.__main__ import HERE, main
from examples.pretrain_mlm.metrics import Evaluated, Step, read_metrics
from examples.pretrain_mlm.optimizer import StableAdamW
from examples.pretrain_mlm.recipe import OptimizerSettings, Recipe, Stage, read_recipe
from examples.pretrain_mlm.training import Training, enter
from modernbert_align.backends import paddle as backend
from modernbert_align.cli import main as align
from modernbert_align.core.model_config import FULL, SLIDING
from modernbert_align.errors import AlignError, CheckpointError, UsageError
from modernbert_align.models.modernbert import ModernBertForMaskedLM
from modernbert_align.models.modernbert.attention import ModernBertAttention, inverse_frequencies

SPECIAL = (0, 1, 2, 3, 4)
MASK, VOCABULARY = 4, 512


@pytest.fixture(scope="module")
def start(converted, tmp_path_factory):
    """`tiny` in Paddle, with dropout, so that its random numbers count too."""
    folder = tmp_path_factory.mktemp("start") / "tiny"
    shutil.copytree(converted("tiny"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"mlp_dropout": 0.1, "attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def recipe(start):
    declared = read_recipe(HERE / "few-steps.toml")
    return changed(declared, start={"checkpoint": start, "tokenizer": "train"})


def changed(recipe, **parts):
    return Recipe.model_validate(recipe.model_dump() | parts)


def with_stages(recipe, **values):
    return changed(recipe, stages=[stage.model_dump() | values for stage in recipe.stages])


def begin(recipe, out, resume=False):
    return Training(recipe, out, resume=resume, notify=lambda _message: None)


def train(recipe, out, stop_at=None, resume=False):
    done = begin(recipe, out, resume)
    done.run(stop_at or recipe.steps, lambda _step: None)
    return done


def losses(out):
    lines = read_metrics(out / training.METRICS)
    return [line.loss if isinstance(line, Step) else line.held_out_loss for line in lines]


def places(out):
    return [(type(line), line.step, line.stage) for line in read_metrics(out / training.METRICS)]


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    """All steps without a stop."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(recipe, out)
    return out


@pytest.fixture(scope="module")
def halfway(recipe, tmp_path_factory):
    """The first half, stopped within a stage."""
    out = tmp_path_factory.mktemp("runs") / "halfway"
    train(recipe, out, stop_at=6)
    return out


def mask(ids, seed=0, **values):
    settings = {"probability": 0.3, "masked": 0.8, "random": 0.1} | values
    return masking.mask_tokens(
        ids, np.random.default_rng(seed), mask_token_id=MASK, special_ids=SPECIAL, vocab_size=VOCABULARY, **settings
    )


def test_masking_chooses_three_tenths_and_hides_eight_tenths_of_them():
    ids = np.random.default_rng(1).integers(5, VOCABULARY, (1, 200_000))
    hidden, labels = mask(ids)
    chosen = labels != masking.IGNORED
    assert chosen.mean() == pytest.approx(0.3, abs=0.005)
    assert (hidden[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.005)
    kept = (hidden == ids) & chosen  # one of 507 random tokens is the token itself
    assert kept.sum() / chosen.sum() == pytest.approx(0.1 + 0.1 / 507, abs=0.005)
    others = hidden[chosen & (hidden != MASK) & (hidden != ids)]
    assert set(np.unique(others)) == set(range(5, VOCABULARY))
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(hidden[~chosen], ids[~chosen])


def test_special_tokens_are_never_masked_and_never_put_in():
    ids = np.random.default_rng(1).integers(0, 10, (1, 50_000))
    hidden, labels = mask(ids, masked=0.0, random=1.0)
    special = np.isin(ids, SPECIAL)
    np.testing.assert_array_equal(hidden[special], ids[special])
    assert (labels[special] == masking.IGNORED).all()
    assert not np.isin(hidden[~special], SPECIAL).any()


def test_a_row_has_a_token_to_predict_however_short_it_is():
    for seed in range(20):
        hidden, labels = mask(np.array([[1, 7, 2]]), seed, probability=1e-9, masked=1.0, random=0.0)
        assert labels.tolist() == [[-100, 7, -100]]
        assert hidden.tolist() == [[1, MASK, 2]]


STAGE = Stage(
    name="a",
    steps=100,
    length=8,
    theta=1e4,
    row_tokens=8,
    rows=5,
    first_rows=2,
    rows_warmup=30,
    learning_rate=8e-4,
    warmup=10,
    decay=25,
    mixture={"sources": 1},
)


def test_learning_rate_is_a_trapezoid_that_ends_as_one_minus_the_root():
    rates = [schedule.learning_rate(STAGE, step) for step in range(100)]
    assert rates[:10] == pytest.approx([8e-5 * n for n in range(1, 11)])
    assert rates[10:76] == [8e-4] * 66
    assert rates[75 + 4] == pytest.approx(8e-4 * (1 - 0.4))  # sqrt(4 / 25)
    assert rates[75 + 16] == pytest.approx(8e-4 * (1 - 0.8))
    assert rates[99] == pytest.approx(8e-4 * (1 - (24 / 25) ** 0.5))
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[75:]))


def test_batches_grow_with_every_size_for_as_many_steps():
    sizes = [schedule.batch_rows(STAGE, step) for step in range(100)]
    assert sizes == [2] * 10 + [3] * 10 + [4] * 10 + [5] * 70
    assert [schedule.rows_before(STAGE, step) for step in range(101)] == [sum(sizes[:step]) for step in range(101)]


def independent_stable_adamw(weight, gradients, rates, peak, settings):
    """In float64 and with Adam's own bias correction, instead of betas that are corrected."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = settings.beta1 * m + (1 - settings.beta1) * g
        v = settings.beta2 * v + (1 - settings.beta2) * g**2
        m_hat, v_hat = m / (1 - settings.beta1**t), v / (1 - settings.beta2**t)
        clipped = rate / max(1.0, np.sqrt(np.mean(g**2 / np.maximum(v_hat, settings.epsilon**2))))
        decay = settings.weight_decay * clipped / peak if weight.ndim > 1 else 0.0
        weight = weight * (1 - decay) - clipped * m_hat / (np.sqrt(v_hat) + settings.epsilon)
    return weight


def take_steps(weights, gradients, rates, peak, settings):
    made = {name: paddle.create_parameter(list(value.shape), "float32") for name, value in weights.items()}
    for name, value in weights.items():
        made[name].set_value(value.astype(np.float32))
    ours = StableAdamW(made, settings)
    for step, rate in enumerate(rates):
        for name, weight in made.items():
            weight.grad = paddle.to_tensor(gradients[name][step].astype(np.float32))
        ours.step(rate, peak)
    return {name: weight.numpy() for name, weight in made.items()}


@pytest.fixture
def trajectory():
    """Weights and gradients whose size jumps, so that updates are clipped."""
    draw = np.random.default_rng(0)
    weights = {"matrix": draw.normal(size=(6, 5)), "norm": draw.normal(size=6)}
    jumps = [1, 1, 30, 1, 0.1, 5]
    gradients = {name: [jump * draw.normal(size=value.shape) for jump in jumps] for name, value in weights.items()}
    return weights, gradients, [1e-2, 2e-2, 4e-2, 4e-2, 3e-2, 1e-2], 4e-2, OptimizerSettings(weight_decay=0.1)


def test_stable_adamw_equals_an_independent_computation(trajectory):
    weights, gradients, rates, peak, settings = trajectory
    ours = take_steps(*trajectory)
    for name, weight in weights.items():
        theirs = independent_stable_adamw(weight, gradients[name], rates, peak, settings)
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=2e-6)
        assert np.abs(theirs - weight).max() > 1e-2


@pytest.mark.parametrize("fault", ["no clipping", "decay everywhere", "no bias correction", "decay not clipped"])
def test_a_wrong_optimizer_is_told_from_a_right_one(trajectory, monkeypatch, fault):
    weights, gradients, rates, peak, settings = trajectory
    right = {n: independent_stable_adamw(w, gradients[n], rates, peak, settings) for n, w in weights.items()}
    if fault == "no clipping":
        monkeypatch.setattr(optimizer.math, "sqrt", lambda _value: 0.0)
    if fault == "no bias correction":
        monkeypatch.setattr(optimizer, "_corrected", lambda beta, _step: beta)
    if fault == "decay everywhere":
        weights = {name: value[None] for name, value in weights.items()}
        gradients = {name: [g[None] for g in given] for name, given in gradients.items()}
    if fault == "decay not clipped":
        peak = 2 * peak
    wrong = take_steps(weights, gradients, rates, peak, settings)
    assert max(np.abs(wrong[name].reshape(right[name].shape) - right[name]).max() for name in right) > 1e-4


def test_losses_fall_and_the_metrics_say_what_was_done(recipe, straight):
    lines = read_metrics(straight / training.METRICS)
    steps = [line for line in lines if isinstance(line, Step)]
    assert [step.step for step in steps] == list(range(1, 13))
    assert [step.stage for step in steps] == [stage.name for stage in recipe.stages for _ in range(4)]
    for step in steps:
        number, within = recipe.place(step.step - 1)
        stage = recipe.stages[number]
        assert step.learning_rate == schedule.learning_rate(stage, within)
        places = schedule.batch_rows(stage, within) * stage.row_tokens
        assert step.packing_efficiency == pytest.approx(step.batch_tokens / places)
        assert 0.8 < step.packing_efficiency <= 1
        assert step.tokens_per_s > 0
    held_out = [line for line in lines if isinstance(line, Evaluated)]
    assert [line.step for line in held_out] == [0, 4, 4, 8, 8, 12]
    assert held_out[0].held_out_loss == pytest.approx(np.log(VOCABULARY), abs=0.1)
    assert held_out[1].held_out_loss < held_out[0].held_out_loss
    assert held_out[-1].held_out_loss < held_out[2].held_out_loss


def test_a_resumed_training_goes_on_with_the_same_losses_to_the_last_bit(recipe, straight, halfway, tmp_path):
    assert (halfway / "checkpoints" / "step-000006").is_dir()
    assert not (halfway / training.MODEL).exists()
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    train(recipe, tmp_path, resume=True)
    assert losses(tmp_path) == losses(straight)
    assert places(tmp_path) == places(straight)
    for name in ("model/model.safetensors", "checkpoints/step-000012/optimizer.safetensors"):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.parametrize("after", [2, 8], ids=["before the first checkpoint", "between two"])
def test_a_killed_training_is_resumed_without_a_trace(recipe, straight, tmp_path, after):
    class Killed(BaseException):
        pass

    def die(step):
        if step.step == after:
            raise Killed

    with pytest.raises(Killed):
        begin(recipe, tmp_path).run(recipe.steps, die)
    with (tmp_path / training.METRICS).open("a") as file:
        file.write('{"step":99,"sta')
    train(recipe, tmp_path, resume=True)
    assert losses(tmp_path) == losses(straight)
    assert places(tmp_path) == places(straight)


@pytest.mark.parametrize("fault", ["moments", "bias correction", "dropout", "masks", "data"])
def test_what_a_resumed_training_forgot_would_show_in_its_losses(
    recipe, straight, halfway, tmp_path, monkeypatch, fault
):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    if fault == "moments":
        whole = StableAdamW.restore
        monkeypatch.setattr(
            StableAdamW, "restore", lambda self, steps, found: whole(self, steps, {k: 0 * v for k, v in found.items()})
        )
    if fault == "bias correction":
        corrected = optimizer._corrected
        monkeypatch.setattr(optimizer, "_corrected", lambda beta, step: corrected(beta, step - 5))
    if fault in ("dropout", "masks"):
        purpose = {"dropout": data.DROPOUT, "masks": data.MASKS}[fault]
        original = data.generator
        monkeypatch.setattr(
            data, "generator", lambda r, p, *place: original(r, p, *place, *([1] if p == purpose else []))
        )
    if fault == "data":
        monkeypatch.setattr(schedule, "rows_before", lambda _stage, _step: 0)
    train(recipe, tmp_path, resume=True)
    assert losses(tmp_path)[: len(losses(halfway))] == losses(halfway)
    assert losses(tmp_path) != losses(straight)


def test_rows_of_a_batch_count_by_their_predicted_tokens(recipe, tmp_path, monkeypatch):
    """Two rows of different lengths have the loss and the gradients of both side by side in one row."""
    found = []

    def keep(self, *_rates):
        found.append({name: weight.grad.numpy().copy() for name, weight in self._parameters.items()})

    monkeypatch.setattr(StableAdamW, "step", keep)
    one = begin(recipe, tmp_path)
    enter(one.model, recipe.stages[1])
    for layer in one.model.sublayers():
        if isinstance(layer, paddle.nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, ModernBertAttention):
            layer.attention_dropout = 0.0
    long, other = next(iter(data.Batches(recipe, 1, one._corpora).start(0)))
    short = {name: other[name][:, :60] for name in ("input_ids", "position_ids", "labels")}
    joined = {name: np.concatenate([long[name], short[name]], axis=1) for name in short}
    short["cu_seqlens"] = np.array([0, 60], dtype=np.int32)
    joined["cu_seqlens"] = np.append(long["cu_seqlens"], long["cu_seqlens"][-1] + 60).astype(np.int32)
    assert data.counted(long) > 2 * data.counted(short) > 0
    losses = []
    for rows in ([long, short], [joined]):
        one.model.clear_gradients(set_to_zero=False)
        losses.append(one._train_on(rows, 1e-3, 1e-3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in found[1].items():
        np.testing.assert_allclose(found[0][name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


def test_stages_change_the_context_length_and_the_theta_of_full_attention(recipe, straight, tmp_path):
    model = backend.load(recipe.start.checkpoint, training.ARCHITECTURE, "fp32")
    ids = paddle.arange(5, 69).unsqueeze(0)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    outputs = []
    for stage in recipe.stages[:2]:
        enter(model, stage)
        resolved = model.config.resolved()
        assert resolved.rope_theta(FULL) == stage.theta
        assert resolved.rope_theta(SLIDING) == 10_000
        frequencies = model.model.rotary_emb[FULL].inv_freq
        np.testing.assert_array_equal(frequencies, inverse_frequencies(head_dim, stage.theta))
        outputs.append(model.model(ids)[0].numpy())
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-5

    corpora = begin(recipe, tmp_path)._corpora
    for number, stage in enumerate(recipe.stages):
        rows = [row for batch in data.Batches(recipe, number, corpora).start(0) for row in batch]
        longest = max(np.diff(row["cu_seqlens"]).max() for row in rows)
        assert longest == stage.length
    saved = json.loads((straight / "model" / "config.json").read_text())
    assert saved["rope_parameters"][FULL]["rope_theta"] == 160_000
    assert saved["sparse_prediction"] is False


def test_sequences_begin_and_end_with_special_tokens_and_lose_no_text(recipe, tmp_path):
    corpora = begin(recipe, tmp_path)._corpora
    pieces = data.Batches(recipe, 0, corpora)._pieces({"sources": corpora.training["sources"]})
    assert {(piece[0], piece[-1]) for piece in pieces} == {(1, 2)}
    joined = np.concatenate([piece[1:-1] for piece in pieces])
    np.testing.assert_array_equal(joined, np.concatenate(corpora.training["sources"]))
    held_out = {document.path for document in data.read_texts(recipe.data).held_out["docstrings"]}
    trained_on = {document.path for document in data.read_texts(recipe.data).training["docstrings"]}
    assert held_out
    assert not held_out & trained_on


def test_the_result_converts_to_hugging_face_and_both_agree(straight, tmp_path, capsys):
    out = str(tmp_path / "hf")
    assert align(["convert", "--src", "paddle", "--dst", "hf", "--model", str(straight / "model"), "--out", out]) == 0
    arguments = ["--model", out, "--candidate", str(straight / "model"), "--report-dir", str(tmp_path)]
    assert align(["diff", *arguments]) == 0, capsys.readouterr()
    reloaded = backend.load(straight / "model", training.ARCHITECTURE, "fp32")
    assert isinstance(reloaded, ModernBertForMaskedLM)


def test_a_tiled_checkpoint_is_trained_on_once_it_is_paddles(recipe, converted, tmp_path):
    wider = json.loads((converted("tiny") / "config.json").read_text()) | {"hidden_size": 96, "num_attention_heads": 6}
    (tmp_path / "wider").mkdir()
    (tmp_path / "wider" / "config.json").write_text(json.dumps(wider))
    tiled, ready = tmp_path / "tiled", tmp_path / "ready"
    assert align(["tile", "--model", str(converted("tiny")), "--to", str(tmp_path / "wider"), "--out", str(tiled)]) == 0
    with pytest.raises(CheckpointError, match="Hugging Face layout"):
        begin(changed(recipe, start={"checkpoint": tiled, "tokenizer": "checkpoint"}), tmp_path / "run")
    assert align(["convert", "--src", "hf", "--dst", "paddle", "--model", str(tiled), "--out", str(ready)]) == 0
    done = train(changed(recipe, start={"checkpoint": ready, "tokenizer": "checkpoint"}), tmp_path / "run", stop_at=1)
    assert done.model.config.hidden_size == 96
    assert not (tmp_path / "run" / training.TOKENIZER).exists()


@pytest.mark.parametrize("broken", ["a weight", "the config", "the head", "the tokenizer"])
def test_a_start_that_cannot_be_used_is_refused(recipe, converted, tmp_path, broken):
    folder = tmp_path / "start"
    shutil.copytree(converted("tiny"), folder)
    if broken == "a weight":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    if broken == "the config":
        (folder / "config.json").write_text("{")
    if broken == "the head":
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["ModernBertModel"]}
        (folder / "config.json").write_text(json.dumps(config))
    if broken == "the tokenizer":
        (folder / "tokenizer.json").unlink()
    with pytest.raises(AlignError):
        begin(changed(recipe, start={"checkpoint": folder, "tokenizer": "checkpoint"}), tmp_path / "run")


def command(recipe_path, out, *options):
    return main(["--recipe", str(recipe_path), "--out", str(out), *options])


def written(recipe, path, **values):
    """A recipe file; TOML of what these recipes have."""
    document = json.loads(recipe.model_dump_json(exclude_none=True)) | values

    def value(given):
        if isinstance(given, dict):
            return "{" + ", ".join(f"{key} = {value(one)}" for key, one in given.items()) + "}"
        return "[" + ", ".join(map(value, given)) + "]" if isinstance(given, list) else json.dumps(given)

    path.write_text("".join(f"{key} = {value(given)}\n" for key, given in document.items()))
    return path


def test_the_program_writes_a_report_and_says_where(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(written(recipe, tmp_path / "r.toml"), out, "--stop-at", "5") == 0
    assert capsys.readouterr().out.splitlines() == [str(out / "report.html")]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert all(word in page for word in ("short context", "long context", "held-out files", "160000", "1 of 4"))
    assert page.count("://") == page.count('xmlns="http://www.w3.org/2000/svg"') == 3
    assert "<script" not in page
    assert command(tmp_path / "r.toml", out, "--resume") == 0
    assert capsys.readouterr().out.splitlines() == [str(out / "report.html"), str(out / "model")]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": -1}, "seed"),
        ({"sead": 1}, "sead"),
        ({"masking": {"probability": 1.5}}, "masking.probability"),
        ({"masking": {"masked": 0.8, "random": 0.3}}, "exceed"),
        ({"stages": []}, "stages"),
        ({"data": {"root": "nowhere"}}, "no Python file"),
        ({"start": {"checkpoint": "nowhere", "tokenizer": "train"}}, "no checkpoint"),
    ],
)
def test_a_wrong_recipe_gets_one_line_and_code_two(recipe, tmp_path, capsys, change, complaint):
    path = written(recipe, tmp_path / "r.toml", **change)
    assert command(path, tmp_path / "run") == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_missing_recipe_and_an_occupied_folder_are_refused(recipe, straight, tmp_path, capsys):
    assert command(tmp_path / "none.toml", tmp_path / "run") == 2
    (tmp_path / "no.toml").write_text("= 1")
    assert command(tmp_path / "no.toml", tmp_path / "run") == 2
    with pytest.raises(UsageError, match="holds a training"):
        begin(recipe, straight)
    capsys.readouterr()


def test_a_checkpoint_of_something_else_or_a_damaged_one_is_not_continued(recipe, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(UsageError, match="another recipe"):
        begin(changed(recipe, seed=1), tmp_path / "run", resume=True)
    assert begin(changed(recipe, checkpoints={"every": 5}), tmp_path / "run", resume=True).step == 12
    newest = tmp_path / "run" / "checkpoints" / "step-000012"
    weights = newest / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        begin(recipe, tmp_path / "run", resume=True)
    shutil.rmtree(newest)
    resumed = train(recipe, tmp_path / "run", resume=True)
    assert resumed.step == 12
    assert losses(tmp_path / "run") == losses(straight)


def test_a_folder_belongs_to_one_process_and_is_rid_of_half_written_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / ".new-killed" / "new").mkdir(parents=True)
    with state.held(tmp_path):
        assert not list((tmp_path / "checkpoints").iterdir())
        with pytest.raises(UsageError, match="another process"), state.held(tmp_path):
            pass
    with state.held(tmp_path):
        pass


def test_other_data_than_before_is_noticed(recipe, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "run")
    whole = data.source_files

    def other(*arguments):
        first, *rest = whole(*arguments)
        return [first, *rest[:-1]]

    monkeypatch.setattr(data, "source_files", other)
    with pytest.raises(UsageError, match="other data"):
        begin(recipe, tmp_path / "run", resume=True)


def test_only_the_newest_checkpoints_are_kept(straight):
    assert [path.name for path in state.folders(straight)] == ["step-000009", "step-000012"]
    assert not list(straight.glob("**/.new-*"))


def test_a_training_that_diverges_stops(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "row_loss", lambda *_: paddle.to_tensor(float("nan"), stop_gradient=False) * 1.0)
    with pytest.raises(UsageError, match="not a number"):
        train(recipe, tmp_path)


def test_stages_that_cannot_be_are_refused():
    for wrong in (
        {"row_tokens": 7},
        {"first_rows": 6},
        {"warmup": 80, "decay": 80},
        {"rows_warmup": 101},
        {"mixture": {"sources": 0}},
        {"mixture": {"web": 1}},
    ):
        with pytest.raises(ValueError, match=r"."):
            Stage.model_validate(STAGE.model_dump() | wrong)


@pytest.mark.parametrize("name", sorted(path.name for path in Path(HERE).glob("*.toml")))
def test_recipes_beside_the_program_are_valid(name):
    assert len(read_recipe(HERE / name).stages) == 3
