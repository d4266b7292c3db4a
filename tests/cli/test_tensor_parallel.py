"""`convert --tensor-parallel` and `--merge` from the command line, and rank files given to the other commands."""

import json
import shutil

import pytest

from modernbert_align.core.digest import file_sha256


@pytest.fixture(scope="module")
def folders(fixture_folder, tmp_path_factory):
    """A fixture, its whole Paddle conversion and one that is divided among two ranks; not to be changed."""
    from modernbert_align.cli import main

    folder = tmp_path_factory.mktemp("divided")
    source = fixture_folder("tiny-sensitive")
    common = ("convert", "--src", "hf", "--dst", "paddle", "--model", str(source), "--quiet", "--out")
    assert main([*common, str(folder / "whole")]) == 0
    assert main([*common, str(folder / "divided"), "--tensor-parallel", "2"]) == 0
    return {"source": source, "whole": folder / "whole", "divided": folder / "divided"}


def to_paddle(*options):
    return ("convert", "--src", "hf", "--dst", "paddle", *options)


def test_the_output_is_named_after_the_degree_and_says_what_it_is(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*to_paddle("--model", "tiny", "--tensor-parallel", "2", "--prove", "tensors,dye,roundtrip"))
    assert code == 0, err
    folder = tmp_path / "checkpoints" / "tiny-paddle-tp2"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "model.tp00.safetensors",
        "model.tp01.safetensors",
    ]
    assert " tensors for 2 ranks, " in out
    assert "its place in the files of 2 ranks, and none is missing or doubled" in out
    assert "converting back reproduces the source's SHA-256" in out
    assert cli("verify", folder)[0] == 0


def test_there_and_back(cli, tmp_path, folders):
    arguments = ("--src", "paddle", "--dst", "hf", "--model", folders["divided"], "--out", tmp_path / "hf")
    code, _, err = cli("convert", *arguments, "--prove", "tensors,dye,roundtrip")
    assert code == 0, err
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert file_sha256(tmp_path / "hf" / name) == file_sha256(folders["source"] / name), name


@pytest.mark.parametrize("dst", [(), ("--dst", "paddle")])
def test_merge_makes_one_whole_paddle_checkpoint(cli, tmp_path, folders, dst):
    merge = ("convert", "--src", "paddle", *dst, "--merge", "--model", folders["divided"], "--out", tmp_path / "merged")
    code, _, err = cli(*merge)
    assert code == 0, err
    merged, whole = (file_sha256(each / "model.safetensors") for each in (tmp_path / "merged", folders["whole"]))
    assert merged == whole


def test_a_whole_paddle_checkpoint_can_be_divided(cli, tmp_path, folders):
    divide = ("--src", "paddle", "--dst", "paddle", "--tensor-parallel", "2", "--model", folders["whole"])
    assert cli("convert", *divide, "--out", tmp_path / "again")[0] == 0
    for rank in range(2):
        name = f"model.tp0{rank}.safetensors"
        assert file_sha256(tmp_path / "again" / name) == file_sha256(folders["divided"] / name)


def test_dry_run_lists_the_rank_files(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = to_paddle("--model", "tiny", "--tensor-parallel", "4", "--dry-run")
    document = json.loads(cli(*arguments, "--json")[1])
    assert (document["ranks"], document["problems"]) == (4, [])
    assert [file["name"] for file in document["files"]] == [f"model.tp0{rank}.safetensors" for rank in range(4)]
    assert len(document["shape_blind"]) == len(set(document["shape_blind"])) == 5
    assert "ranks    4, one file for each" in cli(*arguments)[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (to_paddle("--tensor-parallel", "3"), "4 attention heads cannot be divided among 3 ranks"),
        (to_paddle("--tensor-parallel", "0"), "a tensor parallel degree of 0"),
        (to_paddle("--tensor-parallel", "65"), "a tensor parallel degree of 65"),
        (to_paddle("--tensor-parallel", "two"), "Invalid value for '--tensor-parallel'"),
        (to_paddle("--tensor-parallel", "2", "--shard-size", "1MB"), "--shard-size and --tensor-parallel exclude"),
        (to_paddle("--tensor-parallel", "2", "--shard-size", "none"), "--shard-size and --tensor-parallel exclude"),
        (to_paddle("--merge"), "--merge joins the rank files of a Paddle checkpoint"),
        (("convert", "--src", "hf"), "--dst is missing"),
        (("convert", "--src", "hf", "--dst", "hf", "--tensor-parallel", "2"), "divides Paddle checkpoints only"),
        (("convert", "--src", "paddle", "--dst", "hf", "--tensor-parallel", "2"), "divides Paddle checkpoints only"),
        (("convert", "--src", "paddle", "--merge", "--tensor-parallel", "2"), "--merge and --tensor-parallel exclude"),
        (("convert", "--src", "paddle", "--dst", "paddle"), "--src and --dst are both `paddle`"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(cli, tmp_path, options, says):
    code, out, err = cli(*options, "--model", "tiny", "--out", tmp_path / "p")
    assert (code, out) == (2, "")
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing_to_merge_in_a_whole_checkpoint(cli, tmp_path, folders):
    code, _, err = cli("convert", "--src", "paddle", "--merge", "--model", folders["whole"], "--out", tmp_path / "p")
    assert code == 2
    assert "there is nothing to --merge" in err


def test_a_missing_rank_is_named(cli, tmp_path, folders):
    shutil.copytree(folders["divided"], tmp_path / "d")
    (tmp_path / "d" / "model.tp01.safetensors").unlink()
    code, _, err = cli("convert", "--src", "paddle", "--merge", "--model", tmp_path / "d", "--out", tmp_path / "p")
    assert code == 2
    assert "lacks `model.tp01.safetensors`: rank 1 of 2" in err.splitlines()[0]
    code, out, _ = cli("verify", tmp_path / "d")
    assert code == 1
    assert "model.tp01.safetensors` is missing" in out


def test_verify_sees_that_ranks_were_exchanged(cli, tmp_path, folders):
    shutil.copytree(folders["divided"], tmp_path / "d")
    first, second = (tmp_path / "d" / f"model.tp0{rank}.safetensors" for rank in range(2))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    code, out, _ = cli("verify", tmp_path / "d")
    assert code == 1
    assert "model.tp00.safetensors` changed: its sha256 is another than the manifest's" in out
    assert "`model.layers.0.attn.Wqkv.weight@tp00` in" in out


@pytest.mark.parametrize(
    "command",
    [
        ("diff", "--model", "tiny-sensitive", "--candidate", "FOLDER"),
        ("trace", "--backend", "paddle", "--model", "tiny-sensitive", "--candidate", "FOLDER", "--out", "t.npz"),
        ("tile", "--to", "base", "--model", "FOLDER", "--out", "tiled"),
        ("convert", "--src", "hf", "--dst", "paddle", "--model", "FOLDER", "--out", "out"),
    ],
)
def test_a_command_that_needs_whole_weights_says_to_merge(cli, tmp_path, monkeypatch, folders, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(*(str(folders["divided"]) if word == "FOLDER" else word for word in command))
    assert code == 2
    error, hint = err.splitlines()[-2:]
    assert "is divided among tensor-parallel ranks" in error
    assert f"modernbert-align convert --src paddle --merge --model {folders['divided']}" in hint


def test_the_table_is_shown_for_a_divided_checkpoint_as_for_a_whole_one(cli, folders):
    divided, whole = (cli("table", "show", "--model", folders[name], "--json")[1] for name in ("divided", "whole"))
    assert json.loads(divided)["rows"] == json.loads(whole)["rows"]
