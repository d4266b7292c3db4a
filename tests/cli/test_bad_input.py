"""Bad input: one `error:` line, one `hint:`, exit code 2, nothing written, never a traceback."""

import json
import os
import shutil

import pytest


@pytest.fixture
def tiny(tmp_path, fixture_folder):
    """A copy of the tiny checkpoint that may be damaged."""
    folder = tmp_path / "source"
    shutil.copytree(fixture_folder("tiny"), folder)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def missing_directory(folder):
    shutil.rmtree(folder)


def empty_directory(folder):
    for path in folder.iterdir():
        path.unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def invalid_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def other_model_type(folder):
    edit_config(folder, model_type="bert")


def other_architecture(folder):
    edit_config(folder, architectures=["ModernBertDecoderForCausalLM"])


def unsupported_switch(folder):
    edit_config(folder, hidden_activation="relu")


def rope_scaling(folder):
    edit_config(folder, rope_scaling={"rope_type": "dynamic", "factor": 4.0})


def wrong_sizes(folder):
    edit_config(folder, intermediate_size=100)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def only_another_file(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def truncated(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def truncated_in_the_header(folder):
    os.truncate(folder / "model.safetensors", 40)


def empty_file(folder):
    os.truncate(folder / "model.safetensors", 0)


BROKEN = {
    missing_directory: "no such directory",
    empty_directory: "config.json|model.safetensors",
    no_config: "no `config.json`",
    invalid_config: "not valid JSON",
    config_is_a_list: "not an object",
    other_model_type: "bert",
    other_architecture: "ModernBertDecoderForCausalLM",
    unsupported_switch: "`hidden_activation` = `relu`",
    rope_scaling: "`rope_scaling.rope_type` = `dynamic`",
    wrong_sizes: "mlp.Wi.weight",
    no_weights: "no `model.safetensors`",
    only_another_file: "no `model.safetensors`",
    truncated: "truncated",
    truncated_in_the_header: "not a whole safetensors file",
    empty_file: "not a whole safetensors file",
}


def refused(result, words):
    code, out, err = result
    lines = err.strip().splitlines()
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert any(word in errors[0] for word in words.split("|")), errors[0]
    return [line for line in lines if line.startswith("hint: ")]


@pytest.mark.parametrize("verb", ["convert", "diff"])
@pytest.mark.parametrize("damage", BROKEN, ids=lambda d: d.__name__)
def test_damaged_source_is_refused(cli, tmp_path, tiny, damage, verb):
    damage(tiny)
    if verb == "convert":
        result = cli("convert", "--src", "hf", "--dst", "paddle", "--model", tiny, "--out", tmp_path / "out")
    else:
        result = cli("diff", "--model", tiny, "--report-dir", tmp_path / "out")
    refused(result, BROKEN[damage])
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) in (["source"], [])


def test_already_converted_directory_is_refused(cli, tmp_path, converted):
    result = cli("convert", "--src", "hf", "--dst", "paddle", "--model", converted("tiny"), "--out", tmp_path / "out")
    (hint,) = refused(result, "already in Paddle layout")
    assert "--src paddle" in hint
    assert not (tmp_path / "out").exists()
    refused(cli("diff", "--model", converted("tiny"), "--report-dir", tmp_path / "out"), "already in Paddle layout")
    refused(
        cli("diff", "--model", "tiny", "--candidate", converted("tiny").parent, "--report-dir", tmp_path / "out"),
        "config.json|model.safetensors",
    )
    assert not (tmp_path / "out").exists()


def test_hf_folder_as_candidate_is_refused(cli, tmp_path, fixture_folder):
    result = cli("diff", "--model", "tiny", "--candidate", fixture_folder("tiny"), "--report-dir", tmp_path / "out")
    refused(result, "already in Hugging Face layout")


def test_unknown_fixture_gets_a_suggestion(cli, tmp_path):
    (hint,) = refused(cli("diff", "--model", "tiny-sensitiv", "--report-dir", tmp_path / "out"), "`tiny-sensitiv`")
    assert "tiny-sensitive" in hint


@pytest.mark.parametrize("verb", ["convert", "diff"])
def test_file_as_model_is_refused(cli, tiny, verb):
    arguments = ("--src", "hf", "--dst", "paddle") if verb == "convert" else ()
    refused(cli(verb, *arguments, "--model", tiny / "config.json"), "is a file")


def test_unknown_head_gets_a_suggestion(cli):
    (hint,) = refused(cli("diff", "--model", "tiny", "--head", "masked-lm"), "unknown head `masked-lm`")
    assert "masked_lm" in hint


def test_head_without_weights_is_refused(cli, tmp_path, tiny):
    import torch
    import transformers

    shutil.rmtree(tiny)
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=97, hidden_size=24, num_attention_heads=3, intermediate_size=20, num_hidden_layers=2, pad_token_id=5
    )
    transformers.ModernBertModel(config).save_pretrained(tiny)
    refused(cli("diff", "--model", tiny, "--head", "masked_lm", "--report-dir", tmp_path / "out"), "head base")
    edit_config(tiny, architectures=["ModernBertForMaskedLM"])  # claims a head that the file does not have
    refused(
        cli("convert", "--src", "hf", "--dst", "paddle", "--model", tiny, "--out", tmp_path / "out"), "no row|missing"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "--src", "hf", "--dst", "hf"), "both"),
        (("convert", "--src", "jax", "--dst", "paddle"), "`jax`"),
        (("convert", "--src", "paddle", "--dst", "hf"), "needs --model"),
        (("convert", "--src", "hf", "--dst", "paddle", "--dtype", "fp8"), "`fp8`"),
        (("convert", "--src", "hf"), "--dst"),
        (("diff", "--dtype", "fp8"), "`fp8`"),
        (("diff", "--policy", "lenient"), "`lenient`"),
        (("diff", "--modle", "tiny"), "--modle"),
        (("gate",), "no report to judge"),
        (("nonsense",), "nonsense"),
        (("table", "show", "--head", "pooler"), "`pooler`"),
        (("report", "nowhere.json"), "nowhere.json"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint(cli, arguments, words):
    assert refused(cli(*arguments), words)


def test_unwritable_output_is_refused(cli, tmp_path, tiny):
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    result = cli("convert", "--src", "hf", "--dst", "paddle", "--model", tiny, "--out", blocker / "out")
    refused(result, "cannot write")
    refused(cli("diff", "--model", tiny, "--report-dir", blocker), "cannot write|is a file|not a directory")


def test_existing_output_needs_force(cli, tmp_path, tiny, fixture_folder):
    arguments = ("convert", "--src", "hf", "--dst", "paddle", "--out", tmp_path / "out")
    assert cli(*arguments, "--model", tiny)[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    (hint,) = refused(cli(*arguments, "--model", "tiny-sensitive"), "exists")
    assert "--force" in hint
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert cli(*arguments, "--model", "tiny-sensitive", "--force")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_force_does_not_replace_what_no_conversion_wrote(cli, tmp_path, tiny):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    result = cli("convert", "--src", "hf", "--dst", "paddle", "--model", tiny, "--out", tmp_path / "mine", "--force")
    refused(result, "no conversion wrote it")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_bug_keeps_its_traceback_and_has_its_own_exit_code(cli, monkeypatch):
    from modernbert_align.commands import report

    def broken(**_):
        raise RuntimeError("unexpected")

    monkeypatch.setattr(report, "run", broken)
    code, _, err = cli("report", "x.json")
    assert code == 3
    assert "Traceback" in err
    assert "bug" in err
