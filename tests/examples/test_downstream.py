"""The downstream examples on a few steps: equal trainings pass, and nothing else does."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from examples.downstream import command, start, train_hf, train_paddle
from examples.downstream import recipe as recipes
from examples.downstream.compare import SIDES, compare, incomparable, read_runs
from examples.downstream.page import render
from examples.downstream.recipe import Data, Example, Recipe, Run
from examples.text_classification import __main__ as text_example
from examples.token_classification import __main__ as token_example
from modernbert_align.errors import UsageError

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "local_attention": 8,
    "max_position_embeddings": 64,
}
SMALL = {"model": SIZES, "max_length": 24, "steps": 4, "batch_size": 4, "warmup_steps": 1, "seeds": (0, 1)}
DATA = {"sequence_classification": text_example.functions, "token_classification": token_example.classified}


def trained(head, out):
    """A whole small run in one process."""
    data = DATA[head]()
    data = data.model_copy(update={"train": data.train[::100], "evaluation": data.evaluation[::40]})
    command.prepare(Recipe(head=head, **SMALL), data, out)
    start.main(out)
    for seed in SMALL["seeds"]:
        command.convert(out, seed)
    train_hf.main(out)
    train_paddle.main(out)
    return out


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return trained("sequence_classification", tmp_path_factory.mktemp("text"))


@pytest.fixture
def copied(example, tmp_path):
    return shutil.copytree(example, tmp_path / "copy")


def judged(folder):
    recipe = recipes.read_recipe(folder)
    return compare(recipe, read_runs(folder, recipe))


def failed(comparison):
    return {criterion.name.split()[-1] for criterion in comparison.criteria if criterion.status == "FAIL"}


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_text_classification_is_the_same_in_both_frameworks(example):
    comparison = judged(example)
    assert comparison.verdict == "PASS", comparison.sentence
    assert comparison.exit_code == 0
    assert all(result.loss_difference < 1e-4 for result in comparison.results)
    losses = [run.losses[0] for run in comparison.runs if run.side == "reference"]
    assert losses[0] != losses[1]  # another seed is another training


def test_token_classification_is_the_same_in_both_frameworks(tmp_path):
    comparison = judged(trained("token_classification", tmp_path))
    assert comparison.verdict == "PASS", comparison.sentence
    assert comparison.answers > 200


def test_another_learning_rate_in_one_framework_is_found(copied):
    rewrite(copied / recipes.RECIPE, learning_rate=1.01e-3)
    train_paddle.main(copied)
    rewrite(copied / recipes.RECIPE, learning_rate=1e-3)
    comparison = judged(copied)
    assert comparison.exit_code == 1
    assert failed(comparison) == {"step", "itself"}  # the rate by itself, and the losses by themselves


def test_another_optimizer_is_found(copied):
    rewrite(copied / recipes.RECIPE, beta2=0.97)
    train_paddle.main(copied)
    rewrite(copied / recipes.RECIPE, beta2=0.98)
    assert failed(judged(copied)) == {"itself"}


def test_a_wrong_weight_in_the_converted_checkpoint_is_found(copied):
    path = recipes.start_folder(copied, 1, "paddle") / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.attn.Wo.weight"
    save_file(tensors | {name: np.ascontiguousarray(tensors[name].T)}, path, metadata={"format": "np"})
    train_paddle.main(copied)
    comparison = judged(copied)
    assert comparison.exit_code == 1
    assert "itself" in failed(comparison)
    assert "step 1:" in comparison.sentence


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": [1.0, 1.0, 1.0]}, "3 steps where the recipe has 4"),
        ({"losses": [1.0, None, 1.0, 1.0]}, "not a finite number"),
        ({"learning_rates": []}, "steps where the recipe has"),
        ({"batches": ["0", "0", "0", "0"]}, "other batches"),
        ({"targets": [0, 1], "predictions": [0, 1]}, "something else"),
        ({"predictions": []}, "nothing evaluated"),
        ({"seed": 0}, "no record"),
        (None, "no record"),
    ],
)
def test_what_cannot_be_compared_is_never_a_pass(copied, side, change, said):
    path = recipes.run_path(copied, side, 1)
    path.unlink() if change is None else rewrite(path, **change)
    comparison = judged(copied)
    assert (comparison.verdict, comparison.exit_code) == ("NOT_COMPARED", 5)
    assert said in comparison.sentence
    page = render("text_classification", comparison, recipes.read_data(copied))
    assert "NOT COMPARED" in page
    assert "<svg" not in page


def test_no_records_at_all_are_not_compared(copied):
    recipe = recipes.read_recipe(copied)
    assert compare(recipe, {}).exit_code == 5
    single = recipe.model_copy(update={"seeds": (0,)})
    assert "no spread" in incomparable(single, read_runs(copied, single))[0]


def made(accuracy=0.8, shift=0.0, null=1e-6, seeds=(0, 1, 2)):
    """Records with known numbers; `shift` and `accuracy` are the candidate's, `null` is how far rounding goes."""
    generator = np.random.default_rng(0)
    targets = [0] * 1000
    runs = {}
    for seed in seeds:
        losses = generator.uniform(0.5, 1.5, 4)
        for side in SIDES:
            right = round(1000 * (accuracy if side == "candidate" else 0.8))
            runs[side, seed] = Run(
                side=side,
                seed=seed,
                losses=tuple(losses + {"reference": 0.0, "null": null, "candidate": shift}[side]),
                learning_rates=(1e-3,) * 4,
                batches=("a",) * 4,
                targets=tuple(targets),
                predictions=tuple([0] * right + [1] * (1000 - right)),
                seconds=1.0,
                versions={},
            )
    return compare(Recipe(head="sequence_classification", steps=4, seeds=seeds), runs)


def test_each_criterion_can_fail_by_itself():
    assert made().verdict == "PASS"
    assert made(shift=5e-6).verdict == "PASS"
    assert failed(made(shift=1e-3)) == {"itself"}
    assert failed(made(shift=2.0)) == {"itself", "seeds"}
    assert made(accuracy=0.79).verdict == "PASS"  # one standard error of 1000 answers is 0.0126
    assert failed(made(accuracy=0.78)) == {"them"}


def test_rounding_as_large_as_the_spread_of_seeds_allows_nothing():
    noisy = made(null=0.3)
    assert (noisy.verdict, noisy.exit_code) == ("NOT_COMPARED", 5)
    assert "too much to tell" in noisy.sentence
    assert made(null=0.3, accuracy=0.5).verdict == "FAIL"


def test_an_infinite_difference_is_not_within_any_limit():
    assert made(shift=float("inf")).verdict == "NOT_COMPARED"
    assert made(shift=float("nan")).verdict == "NOT_COMPARED"


def test_the_page_carries_everything_and_fetches_nothing(copied):
    assert command.judge("text_classification", copied) == 0
    page = (copied / "text_classification.html").read_text()
    assert "PASS" in page
    assert page.count("<svg") == 2
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 1  # of http-equiv
    assert len(page) < 200_000
    document = json.loads((copied / "text_classification.json").read_text())
    assert document["verdict"] == "PASS"
    assert len(document["runs"]) == 6


def test_an_earlier_run_leaves_no_records_for_the_next(copied):
    recipe = recipes.read_recipe(copied)
    command.prepare(recipe, recipes.read_data(copied), copied)
    assert judged(copied).exit_code == 5


def test_both_frameworks_get_each_batch_in_the_same_order_and_every_example_in_turn():
    recipe = Recipe(head="sequence_classification", **SMALL)
    first = recipes.order(recipe, 0, 8)
    assert first == recipes.order(recipe, 0, 8) != recipes.order(recipe, 1, 8)
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(8))


def test_tokens_have_the_class_of_their_last_character():
    source = "x = 'a b'  # why\n\f\nif x:\n    y = 12\n"
    spans = tuple(token_example.spans_of(io.StringIO(source).readlines()))
    classes = [(source[a:b], token_example.CLASSES[label]) for a, b, label in spans]
    assert classes[:4] == [("x", "name"), ("=", "operator"), ("'a b'", "string"), ("# why", "comment")]
    assert ("if", "keyword") in classes
    assert ("12", "number") in classes
    offsets = [(0, 0), (0, 1), (1, 3), (3, 4), (4, 6), (16, 17)]  # [CLS], "x", " =", " ", "'a", "\n"

    def tokenizer(texts, **_):
        return {"input_ids": [list(range(len(offsets)))], "offset_mapping": [offsets]}

    (encoded,) = recipes.encode(tokenizer, [Example(text=source, spans=spans)], 64)
    name, operator, string = (token_example.CLASSES.index(kind) for kind in ("name", "operator", "string"))
    assert encoded["labels"] == [-100, name, operator, -100, string, -100]


def test_examples_are_real_and_kept_apart():
    for read in DATA.values():
        data = read()
        assert len(data.train) > 1000
        assert {example.text for example in data.train}.isdisjoint(example.text for example in data.evaluation)


def test_fortunes_are_refused_in_one_line_where_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_example, "FORTUNES", tmp_path / "absent")
    arguments = ["--data", "fortunes", "--out", str(tmp_path / "out")]
    readers = {"stdlib": text_example.functions, "fortunes": text_example.fortunes}
    assert command.main("text_classification", Recipe(head="sequence_classification"), readers, arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in error] == ["error", "hint"]
    assert not (tmp_path / "out").exists()


def test_fortunes_are_labelled_with_their_collection(tmp_path, monkeypatch):
    monkeypatch.setattr(text_example, "FORTUNES", tmp_path)
    (tmp_path / "wise").write_text("one\n%\ntwo\nlines\n%\nthree\n%\n")
    (tmp_path / "wise.dat").write_bytes(b"\0\1")
    (tmp_path / "short").write_text("four\n%\nfive\n%\n")
    data = text_example.fortunes()
    assert data.labels == ("short", "wise")
    examples = {example.text: data.labels[example.label] for example in data.train + data.evaluation}
    assert examples == {"one": "wise", "two\nlines": "wise", "three": "wise", "four": "short", "five": "short"}


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--steps", "0"]])
def test_a_run_that_would_compare_nothing_is_refused(arguments, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), *arguments]
    assert command.main("x", Recipe(head="sequence_classification"), {"stdlib": text_example.functions}, words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    data = Data(source="", labels=("a",), train=(), evaluation=())
    with pytest.raises(UsageError, match="cannot write"):
        command.prepare(Recipe(head="sequence_classification"), data, tmp_path / "file")


def test_a_step_that_breaks_is_a_bug_and_not_a_misalignment(tmp_path, monkeypatch):
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit) as ended:
        command._step("start", "", tmp_path)
    assert ended.value.code == 3
