"""Every head through the command line, with and without a fixture, and checkpoints saved in other ways."""

import json
import shutil

import pytest
import safetensors.numpy
import torch
import transformers

from modernbert_align.core.checkpoint import open_checkpoint

HEADS = [
    "base",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
]


@pytest.mark.parametrize("model", ["tiny", "tiny-sensitive"])
@pytest.mark.parametrize("head", HEADS)
def test_head_aligns_in_both_precisions(cli, tmp_path, head, model):
    code, out, _ = cli("diff", "--model", model, "--head", head, "--dtype", "bf16", "--report-dir", tmp_path, "--json")
    report = json.loads(out)
    assert code == 0, report["first_failing"]
    probes = {row["probe"] for row in report["rows"]}
    assert ("loss" in probes) == (head != "base")
    assert ("start_logits" in probes) == (head == "question_answering")
    assert report["coverage"]["compared"] == report["coverage"]["expected"] == len(report["rows"])
    assert cli("gate", tmp_path / f"diff-{model}-{head}-bf16.json")[0] == 0


@pytest.mark.parametrize("head", HEADS[2:])
def test_head_survives_the_round_trip(cli, tmp_path, head):
    arguments = ("convert", "--src", "hf", "--dst", "paddle", "--model", "tiny", "--head", head)
    code, out, _ = cli(*arguments, "--out", tmp_path / "p", "--json")
    assert code == 0
    source = json.loads(out)["manifest"]["source"]["files"]
    assert cli("convert", "--src", "paddle", "--dst", "hf", "--model", tmp_path / "p", "--out", tmp_path / "h")[0] == 0
    weights = next(f["digest"] for f in source if f["name"] == "model.safetensors")
    manifest = json.loads((tmp_path / "h" / "conversion_manifest.json").read_text())
    assert next(f["digest"] for f in manifest["files"] if f["name"] == "model.safetensors") == weights


def test_wrong_loss_is_caught(cli, tmp_path, monkeypatch):
    """A loss that divides by all positions instead of those that count: right logits, wrong loss."""
    from modernbert_align.models.modernbert import heads

    right = heads.cross_entropy
    monkeypatch.setattr(heads, "cross_entropy", lambda logits, labels: right(logits, labels.clip(0)))
    code, out, _ = cli(
        "diff", "--model", "tiny-sensitive", "--head", "token_classification", "--report-dir", tmp_path, "--json"
    )
    assert code == 1
    assert json.loads(out)["first_failing"]["probe"] == "loss"


def test_wrong_pooling_is_caught_at_the_head(cli, tmp_path, monkeypatch):
    from modernbert_align.models.modernbert import heads

    monkeypatch.setattr(heads, "mean_pooling", lambda hidden_states, _mask: hidden_states.mean(axis=1))
    code, out, _ = cli(
        "diff", "--model", "tiny-sensitive", "--head", "sequence_classification", "--report-dir", tmp_path, "--json"
    )
    assert code == 1
    assert json.loads(out)["first_failing"]["probe"] == "head"


def test_convert_drops_a_head_only_when_asked(cli, tmp_path, fixture_folder):
    arguments = ("convert", "--src", "hf", "--dst", "paddle", "--model", fixture_folder("tiny"), "--head", "base")
    code, out, _ = cli(*arguments, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["dropped"] == ["head.dense.weight", "head.norm.weight", "decoder.bias"]
    assert cli(*arguments, "--out", tmp_path / "p")[0] == 0
    assert all(not name.startswith("model.") for name in open_checkpoint(tmp_path / "p").tensors)
    assert json.loads((tmp_path / "p" / "config.json").read_text())["architectures"] == ["ModernBertModel"]
    assert (
        cli("diff", "--model", "tiny", "--head", "base", "--candidate", tmp_path / "p", "--report-dir", tmp_path)[0]
        == 0
    )


def test_convert_never_makes_up_a_head(cli, tmp_path, fixture_folder):
    code, _, err = cli(
        "convert", "--src", "hf", "--dst", "paddle", "--model", fixture_folder("tiny"), "--head",
        "token_classification", "--out", tmp_path / "p",
    )  # fmt: skip
    assert code == 2
    assert "weights for token_classification are missing" in err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("head", ["masked_lm", "base"])
def test_names_with_and_without_the_prefix_are_read(cli, tmp_path, fixture_folder, head):
    """Some checkpoints are saved without `model.`, and some encoders with it."""
    source = tmp_path / "source"
    shutil.copytree(fixture_folder("tiny"), source)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    if head == "base":  # an encoder whose names keep the prefix
        tensors = {k: v for k, v in tensors.items() if k.startswith("model.")}
        config = json.loads((source / "config.json").read_text()) | {"architectures": ["ModernBertModel"]}
        (source / "config.json").write_text(json.dumps(config))
    else:
        tensors = {k.removeprefix("model."): v for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("convert", "--src", "hf", "--dst", "paddle", "--model", source, "--out", tmp_path / "p")
    assert code == 0, err
    usual = {name.startswith("model.") for name in open_checkpoint(tmp_path / "p").tensors}
    assert usual == ({False} if head == "base" else {True, False})
    arguments = ("diff", "--model", fixture_folder("tiny"), "--head", head, "--candidate", tmp_path / "p")
    code, out, _ = cli(*arguments, "--report-dir", tmp_path / "r")
    assert code == 0, out


def test_leftover_keys_of_hub_configs_change_nothing(cli, tmp_path, fixture_folder):
    source = tmp_path / "source"
    shutil.copytree(fixture_folder("tiny"), source)
    config = json.loads((source / "config.json").read_text())
    config |= {"layer_norm_eps": 1e-12, "position_embedding_type": "absolute", "gradient_checkpointing": False}
    (source / "config.json").write_text(json.dumps(config))
    code, out, _ = cli("diff", "--model", source, "--report-dir", tmp_path / "r")
    assert code == 0, out


def test_sparse_prediction_is_compared_without_labels(cli, tmp_path, fixture_folder):
    source = tmp_path / "source"
    shutil.copytree(fixture_folder("tiny"), source)
    config = json.loads((source / "config.json").read_text()) | {"sparse_prediction": True}
    (source / "config.json").write_text(json.dumps(config))
    code, out, _ = cli("diff", "--model", source, "--report-dir", tmp_path / "r", "--json")
    assert code == 0
    assert not any(row["probe"] == "loss" for row in json.loads(out)["rows"])


@pytest.mark.parametrize(("num_labels", "problem_type"), [(1, None), (5, "multi_label_classification")])
def test_kinds_of_classifier_align_with_their_own_loss(cli, tmp_path, num_labels, problem_type):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20}
    config = transformers.ModernBertConfig(
        **sizes, num_hidden_layers=3, pad_token_id=5, num_labels=num_labels, problem_type=problem_type
    )
    transformers.ModernBertForSequenceClassification(config).save_pretrained(tmp_path / "source")
    code, out, _ = cli("diff", "--model", tmp_path / "source", "--dtype", "bf16", "--report-dir", tmp_path / "r")
    assert code == 0, out
