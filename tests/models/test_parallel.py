"""A model divided among processes is the undivided one: outputs, gradients, training, files; through Paddle's fleet."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import parallel_worker as worker
import pytest
from safetensors.numpy import load_file

from modernbert_align.core.model_config import parse_config
from modernbert_align.core.ports import free_ports
from modernbert_align.core.table import load_table
from modernbert_align.core.tensor_parallel import divisions
from modernbert_align.errors import ConfigError, UsageError
from modernbert_align.models.modernbert import ModernBertConfig, ModernBertModel

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
DEGREES = {"two": 2, "four": 4}
TRAINED = ("masked_lm", "masked_lm untied", "masked_lm vocabulary of 97")
every_case = pytest.mark.parametrize("case", worker.CASES)
every_kind = pytest.mark.parametrize("kind", worker.INPUTS)
every_degree = pytest.mark.parametrize("launch", DEGREES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint for every case."""
    from modernbert_align.backends.paddle import quiet

    path = tmp_path_factory.mktemp("parallel")
    with quiet():
        for case in worker.CASES:
            worker.write(case, path / case)
    return path


@pytest.fixture(scope="module")
def launched(folder):
    """Gives what the ranks of a launch found; starts it on first use."""
    done = {}

    def found(launch):
        if launch not in done:
            data, degree, _ = worker.LAUNCHES[launch]
            command = [str(Path(worker.__file__)), launch, str(folder)]
            said = start(command, [folder / f"{launch} {rank}.log" for rank in range(data * degree)], folder)
            files = [folder / f"{launch} {rank}.safetensors" for rank in range(data * degree)]
            done[launch] = said, [] if said else [load_file(file) for file in files]
        said, ranks = done[launch]
        assert not said, said
        return ranks

    return found


def start(command, logs, folder):
    """Run every rank, one for each log, as a process in a folder; gives what the first that failed said, if any."""
    endpoints = [f"127.0.0.1:{port}" for port in free_ports(len(logs))]
    common = {
        "PADDLE_DISTRI_BACKEND": "gloo",
        "PADDLE_TRAINERS_NUM": str(len(endpoints)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    processes = []
    try:
        for rank, log in enumerate(logs):
            own = {"PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": endpoints[rank]}
            options = {"env": {**os.environ, **common, **own}, "cwd": folder}
            with log.open("w") as stream:
                process = subprocess.Popen([sys.executable, *command], **options, stdout=stream, stderr=stream)
            processes.append(process)
        deadline = time.monotonic() + TIMEOUT_S
        # As soon as one fails: the others wait for it.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                return f"ranks still run after {TIMEOUT_S} s"
            time.sleep(0.1)
        failed = [log for log, process in zip(logs, processes, strict=True) if process.poll()]
        return failed[0].read_text()[-3000:] if failed else ""
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def undivided(folder):
    """Gives the model of a case, in this process alone."""
    from modernbert_align.backends.paddle import quiet

    def model(case, **changes):
        with quiet():
            return worker.read(case, folder / case, **changes)

    return model


def under(prefix, found):
    """The values whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): values for name, values in found.items() if name.startswith(prefix)}


def division_of(case, degree):
    """Paddle name -> division of every divided weight of a case."""
    head, changes = worker.CASES[case]
    config = parse_config({"model_type": "modernbert", **worker.SIZES, **changes})
    table = load_table()
    return divisions(table.expand(config, table.head_of([f"ModernBert{head}"], where="the case")), degree)


def joined(case, ranks):
    """Weights or gradients of a model as a whole; what is not divided must be the same bits on every rank."""
    found, divided = {}, division_of(case, len(ranks))
    for name in ranks[0]:
        shards = [rank[name] for rank in ranks]
        if name in divided:
            found[name] = divided[name].join(shards)
        else:
            assert all(np.array_equal(shard, shards[0]) for shard in shards), name
            found[name] = shards[0]
    return found


def assert_close(found, expected, tolerance):
    """Every array, measured against its own largest value, or against the others if it nearly cancels."""
    assert found.keys() == expected.keys()
    largest = max(np.abs(values).max() for values in expected.values())
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        size = max(np.abs(values).max(), 1e-2 * largest)
        assert np.abs(found[name] - values).max() <= tolerance * size, name


def assert_same_outcome(case, ranks, expected, tolerance=2e-5):
    """Outputs, equal on every rank, and gradients of ranks against those of the undivided model."""
    outputs = [{name: values for name, values in rank.items() if "/" not in name} for rank in ranks]
    assert outputs[0].keys() >= {"loss"}
    for output in outputs:
        assert all(np.array_equal(output[name], outputs[0][name]) for name in outputs[0])
    for name, values in outputs[0].items():
        assert_close({name: values}, {name: expected[name]}, tolerance)
    gradients = joined(case, [under("gradient/", rank) for rank in ranks])
    assert_close(gradients, under("gradient/", expected), tolerance)


@every_degree
@every_kind
@every_case
def test_every_head_gives_the_outputs_loss_and_gradients_of_the_undivided_model(
    case, kind, launch, launched, undivided
):
    ranks = [under(f"every_case/{case}/{kind}/", rank) for rank in launched(launch)]
    assert_same_outcome(case, ranks, worker.observe(case, undivided(case), kind))


@every_degree
@every_case
def test_weights_say_that_they_are_divided_exactly_if_they_are(case, launch, launched):
    divided = division_of(case, DEGREES[launch])
    for rank in launched(launch):
        marks = under(f"every_case/{case}/distributed/", rank)
        assert {name for name, mark in marks.items() if mark} == divided.keys() & marks.keys()
        assert any(mark for mark in marks.values())


@every_degree
def test_attentions_of_all_heads_are_on_every_rank(launch, launched, undivided):
    expected = worker.attentions("masked_lm", undivided("masked_lm"))
    for rank in launched(launch):
        found = under("every_case/masked_lm/attention/", rank)
        assert_close(found, under("attention/", expected), 2e-5)


@every_degree
def test_bfloat16_rounds_as_undivided(launch, launched, undivided):
    expected = worker.observe("masked_lm", undivided("masked_lm", dtype="bfloat16"), "eager")
    ranks = [under("every_case/bf16/", rank) for rank in launched(launch)]
    assert_same_outcome("masked_lm", ranks, expected, 2**-5)  # sums in another order, rounded to 8 bits


@every_degree
@pytest.mark.parametrize("case", TRAINED)
def test_clipped_steps_of_adamw_through_fleet_are_those_of_the_undivided_model(case, launch, launched, undivided):
    model = undivided(case)
    before = under("weight/", worker.weights(model))
    expected = worker.train(case, model)
    ranks = [under(f"training/{case}/", rank) for rank in launched(launch)]
    for rank in ranks:
        assert np.abs(rank["losses"] - expected["losses"]).max() <= 1e-5 * expected["losses"].max()
    after = joined(case, [under("weight/", rank) for rank in ranks])
    moved = {name: values - before[name] for name, values in after.items()}
    assert_close(moved, {name: values - before[name] for name, values in under("weight/", expected).items()}, 1e-3)


@pytest.mark.parametrize("how", ["recomputed", "recomputed, reentrant"])
@pytest.mark.parametrize("dropout", ["without dropout", "with dropout"])
def test_recompute_gives_the_same_loss_and_gradients(dropout, how, launched):
    for rank in launched("two"):
        stored = under(f"recomputed/{dropout}/stored/", rank)
        found = under(f"recomputed/{dropout}/{how}/", rank)
        assert found.keys() == stored.keys()
        assert len(stored) > 10
        for name, values in stored.items():
            assert np.array_equal(found[name], values), name


def test_training_without_dropout_is_evaluation(launched, undivided):
    ranks = [under("recomputed/without dropout/recomputed/", rank) for rank in launched("two")]
    assert_same_outcome("masked_lm", ranks, worker.observe("masked_lm", undivided("masked_lm"), "eager"))


def test_dropout_takes_the_same_of_what_all_ranks_have(launched):
    first, second = (under("dropped/common/", rank) for rank in launched("two"))
    assert len(first) == 6
    for name, values in first.items():
        assert np.array_equal(values, second[name]), name
    for name in ("embeddings", "attention output", "classifier"):
        assert 0.4 < (first[name] == 0).mean() < 0.6, name


@pytest.mark.parametrize("name", ["attention probabilities", "feed-forward units"])
def test_dropout_takes_different_shares_of_what_ranks_have_alone(name, launched):
    first, second = (rank[f"dropped/own/{name}"] == 0 for rank in launched("two"))
    assert first.shape == second.shape
    assert 0.4 < first.mean() < 0.6
    assert 0.4 < (first == second).mean() < 0.6  # half of them by chance, all of them from one random state


def test_dropout_was_on_where_recompute_was_compared_with_it(launched):
    plain = under("recomputed/without dropout/stored/", launched("two")[0])
    dropped = under("recomputed/with dropout/stored/", launched("two")[0])
    assert not np.array_equal(plain["logits"], dropped["logits"])


def test_ranks_draw_different_shares_of_new_weights_and_the_same_of_common_ones(launched):
    ranks = [under("fresh/weight/", rank) for rank in launched("two")]
    divided = division_of("masked_lm untied", 2)
    whole = joined("masked_lm untied", ranks)  # what is not divided is equal
    drawn = [name for name in divided if whole[name].any()]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in drawn} == {
        "tok_embeddings", "Wqkv", "Wi", "Wo", "decoder"
    }  # fmt: skip
    for name in drawn:
        assert np.mean(ranks[0][name] == ranks[1][name]) < 0.1, name
    assert abs(whole["model.layers.0.attn.Wqkv.weight"].std() / worker.SIZES["initializer_range"] - 0.88) < 0.03


@pytest.mark.parametrize("name", ["classifier", "classifier without a seed"])
def test_a_head_that_the_checkpoint_lacks_is_drawn_alike_on_all_ranks(name, launched):
    first, second = (rank[f"fresh/{name}"] for rank in launched("two"))
    assert first.any()
    assert np.array_equal(first, second)


@pytest.mark.parametrize("case", ["masked_lm", "masked_lm untied"])
def test_ranks_load_their_shares_of_one_file_and_of_files_of_their_own(case, launched, folder):
    whole, divided = load_file(folder / case / "model.safetensors"), division_of(case, 2)
    for number, rank in enumerate(launched("two")):
        expected = {
            name: divided[name].cut(values, number) if name in divided else values for name, values in whole.items()
        }
        for source in ("whole", "safetensors", "pdparams"):
            found = under(f"files/{case}/{source}/weight/", rank)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], values) for name, values in expected.items()), source


@pytest.mark.parametrize("case", ["masked_lm", "masked_lm untied"])
def test_merged_files_hold_the_bits_of_the_undivided_checkpoint(case, launched, folder, undivided):
    launched("two")
    expected = load_file(folder / case / "model.safetensors")
    assert sorted(path.name for path in (folder / f"{case} shards safetensors").glob("*.safetensors")) == [
        "model.tp00.safetensors", "model.tp01.safetensors"
    ]  # fmt: skip
    merged = load_file(folder / f"{case} whole safetensors" / "model.safetensors")
    again = worker.weights(worker.read(case, folder / f"{case} whole pdparams"))
    for found in (merged, under("weight/", again)):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("degree", "ConfigError: tensor_parallel_degree is 4, fleet runs with 2"),
        ("rank", "so this process would load another rank's weights"),
        ("vocabulary", "ConfigError: the vocabulary of a model that is divided among ranks keeps its size"),
        ("seeds", "ConfigError: ranks were seeded differently, and would drop different shares of what all"),
        ("random states", "would drop the same share of different heads"),
    ],
)
def test_what_cannot_be_right_is_refused(attempt, message, launched):
    for rank in launched("two"):
        assert message in rank[f"refusals/{attempt}"].tobytes().decode()


def test_a_model_cannot_be_divided_before_fleet_runs():
    with pytest.raises(ConfigError, match="tensor_parallel_degree is 2, fleet runs with 1"):
        ModernBertModel(ModernBertConfig(**worker.SIZES, tensor_parallel_degree=2))


@pytest.mark.parametrize("changes", [{"num_attention_heads": 1}, {"intermediate_size": 15}])
def test_heads_and_feed_forward_units_that_the_degree_does_not_divide_are_refused(changes):
    with pytest.raises(UsageError, match="cannot be divided among 2 ranks"):
        ModernBertModel(ModernBertConfig(**{**worker.SIZES, **changes}, tensor_parallel_degree=2))


def test_replicas_of_a_divided_model_average_gradients_and_step_like_one(launched, undivided):
    ranks = [under("replicas/", rank) for rank in launched("two by two")]
    expected = under("gradient/", worker.observe("masked_lm", undivided("masked_lm"), "eager"))
    model = undivided("masked_lm")
    before = under("weight/", worker.weights(model))
    stepped = under("weight/", worker.train("masked_lm", model))
    for replica in (ranks[:2], ranks[2:]):
        assert_close(joined("masked_lm", [under("gradient/", rank) for rank in replica]), expected, 2e-5)
        after = joined("masked_lm", [under("weight/", rank) for rank in replica])
        moved = {name: values - before[name] for name, values in after.items()}
        assert_close(moved, {name: values - before[name] for name, values in stepped.items()}, 1e-3)
    assert not np.array_equal(ranks[0]["losses"], ranks[2]["losses"])  # each has its own half of the batch


def test_the_example_of_the_page_trains_and_merges_on_two_ranks(tmp_path, converted):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny-paddle").symlink_to(converted("tiny"))
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "parallel.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    code += f"import sys; sys.path.insert(0, {str(Path(worker.__file__).parent)!r}); import parallel_worker\n"
    assert start(["-c", f"{code}parallel_worker.leave()"], logs, tmp_path) == ""
    losses = [re.findall(r"^\d+\.\d+$", log.read_text(), re.MULTILINE) for log in logs]
    assert len(losses[0]) == 1
    assert losses[0] == losses[1]
    before = load_file(converted("tiny") / "model.safetensors")
    after = load_file(tmp_path / "checkpoints" / "trained" / "model.safetensors")
    assert {name: values.shape for name, values in after.items()} == {n: values.shape for n, values in before.items()}
    assert not any(np.array_equal(after[name], values) for name, values in before.items())
