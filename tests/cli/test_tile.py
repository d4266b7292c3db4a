"""`tile` from the command line, and what both frameworks make of its output."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

WIDER = {
    "model_type": "modernbert", "vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6,
    "num_attention_heads": 6, "local_attention": 32, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def wider(tmp_path):
    """A folder with the config.json of a model somewhat larger than `tiny`."""
    folder = tmp_path / "wider"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WIDER))
    return folder


def test_both_frameworks_load_what_was_tiled_and_agree(cli, tmp_path, wider, fixture_folder):
    import torch
    import transformers

    small = json.loads((fixture_folder("tiny-sensitive") / "config.json").read_text())  # has every bias there is
    switches = {key: value for key, value in small.items() if key.endswith("_bias")}
    (wider / "config.json").write_text(json.dumps(WIDER | switches))
    code, out, err = cli("tile", "--model", "tiny-sensitive", "--to", wider, "--out", tmp_path / "large")
    assert code == 0, err
    assert "hidden_size              64 -> 96" in out
    assert "layers are made from 0, 1, 1, 2, 3, 3" in out
    assert "3 layers change between full and sliding attention: 3, 4, 5" in out
    model, loading = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "large", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(tmp_path / "large" / "model.safetensors")
    assert torch.equal(model.model.layers[5].mlp.Wi.weight, torch.from_numpy(stored["model.layers.5.mlp.Wi.weight"]))
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "large")("a b")["input_ids"]) > 2

    code, _, err = cli("convert", "--src", "hf", "--dst", "paddle", "--model", tmp_path / "large", "--dry-run")
    assert code == 0, err
    code, _, err = cli(
        "diff", "--model", tmp_path / "large", "--engine", "stream", "--report-dir", tmp_path / "reports"
    )
    assert code == 0, err


def test_a_paddle_source_gives_the_same_file(cli, tmp_path, wider, fixture_folder, converted):
    for side, folder in (("hf", fixture_folder("tiny")), ("paddle", converted("tiny"))):
        code, _, err = cli("tile", "--model", folder, "--to", wider / "config.json", "--out", tmp_path / side)
        assert code == 0, err
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "paddle" / name).read_bytes(), name


def test_labels_of_a_classifier_stay_in_their_rows(cli, tmp_path, wider, fixture_folder):
    from modernbert_align.backends.sources import resolve_model
    from modernbert_align.core.table import load_table

    head = "sequence_classification"
    code, _, err = cli("tile", "--model", "tiny", "--head", head, "--to", wider, "--out", tmp_path / "large")
    assert code == 0, err
    small = load_file(resolve_model("tiny", load_table(), lambda _: None, head).folder / "model.safetensors")
    large = load_file(tmp_path / "large" / "model.safetensors")
    assert np.array_equal(large["classifier.weight"][:, 16:80], small["classifier.weight"])
    assert np.array_equal(large["classifier.weight"][:, :16], small["classifier.weight"][:, 48:])
    assert np.array_equal(large["classifier.bias"], small["classifier.bias"])


def test_the_default_output_says_what_became_what(cli, tmp_path, wider, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("tile", "--model", "tiny", "--to", "wider", "--json", "--quiet")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["out"] == "checkpoints/wider-from-tiny"
    assert document["manifest"]["layers"] == [0, 1, 1, 2, 3, 3]
    assert document["manifest"]["sizes"]["hidden_size"] == [64, 96]
    assert (tmp_path / "checkpoints" / "wider-from-tiny" / "model.safetensors").is_file()
    code, _, err = cli("tile", "--model", "tiny", "--to", "wider")
    assert code == 2
    assert "--force" in err
    assert cli("tile", "--model", "tiny", "--to", "wider", "--force")[0] == 0


def test_settings_that_differ_are_said(cli, tmp_path, wider):
    (wider / "config.json").write_text(json.dumps(WIDER | {"local_attention": 64, "rope_scaling": None}))
    _, out, _ = cli("tile", "--model", "tiny", "--to", wider, "--out", tmp_path / "large")
    assert "local_attention is 32 in the source and 64 in the output" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--to", "larg"),
            "error: `larg` is neither a folder, a config.json nor a fixture\nhint: did you mean `large`",
        ),
        (("--to", "large"), "error: the target's `vocab_size` 50368 is not the source's 512"),
        (("--to", "nowhere/config.json"), "error: `nowhere/config.json` is neither"),
        (("--to", "wider/weights.bin"), "error: `wider/weights.bin` is a file, but not a config.json"),
        (("--to", "empty"), "error: no `config.json` in `empty`"),
        (("--to", "wider", "--head", "masked"), "error: unknown head `masked`"),
        ((), "error: Missing option '--to'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(cli, tmp_path, wider, fixture_folder, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    fixture_folder("tiny")  # written now, so that no notice of it stands before the error
    (tmp_path / "empty").mkdir()
    (wider / "weights.bin").touch()
    code, out, err = cli("tile", "--model", "tiny", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(said)
    assert not (tmp_path / "checkpoints").exists()
