"""Looking again at a conversion: every change is found, and nothing is claimed about what was not looked at."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from modernbert_align.cli import main
from modernbert_align.core.checkpoint import open_checkpoint
from modernbert_align.core.convert import convert
from modernbert_align.core.manifest import MANIFEST, read_manifest
from modernbert_align.core.partial import JOURNAL
from modernbert_align.core.resources import configs_dir
from modernbert_align.core.table import load_table
from modernbert_align.core.verify import Verification, verify
from modernbert_align.errors import CheckpointError

WEIGHTS = "model.safetensors"
SQUARE = "model.layers.1.attn.Wo.weight"
FILES, TENSORS = "files against the digests of the manifest", "tensors against the digests they were written with"
SOURCE, AGAIN = "source files against the digests of the manifest", "tensors against a new conversion of the source"


@pytest.fixture
def made(build, asking, tmp_path):
    """Gives (source, converted folder) for options of a checkpoint and of a request."""

    def run(built_with=None, side="hf", table=None, **options) -> tuple[Path, Path]:
        files = {"tokenizer.json": '{"a": 1}\n'}
        built = build(tmp_path / "source" / "in", side=side, files=files, **(built_with or {}))
        out = tmp_path / "out"
        convert(asking(built.folder, side, **options), table or load_table(), out, force=False)
        return built.folder, out

    return run


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def edit_manifest(folder: Path, change) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def look(folder: Path, **options) -> Verification:
    return verify(folder, load_table(), **options)


def counts(found: Verification) -> dict[str, int]:
    """What was checked, as subject -> how many."""
    return {line.partition(" ")[2]: int(line.partition(" ")[0]) for line in found.checked}


# --- unchanged --------------------------------------------------------------------------------------------------------

CLEAN = {
    "as it is": ({}, {}),
    "crc32": ({}, {"digest": "crc32"}),
    "not proved": ({}, {"prove": ()}),
    "shards": ({"shards": 3}, {}),
    "split": ({}, {"shard_size": 700}),
    "rounded": ({}, {"dtype": "bf16"}),
    "without its head": ({}, {"head": "base"}),
    "tied copy stored": ({"tied_copy": True}, {}),
    "Paddle's bfloat16": ({"dtype": "U16"}, {"side": "paddle"}),
}


@pytest.mark.parametrize("case", CLEAN)
def test_a_conversion_that_did_not_change_is_checked_whole(made, case):
    source, out = made(*CLEAN[case][:1], **CLEAN[case][1])
    found = look(out)
    manifest = read_manifest(out)
    assert found.problems == []
    assert found.not_checked == []
    assert found.exit_code == 0
    everything = {
        FILES: len([path for path in out.iterdir() if path.name != MANIFEST]),
        TENSORS: len(manifest.tensors),
        SOURCE: len(list(source.iterdir())),
        AGAIN: len(manifest.tensors),
    }
    assert counts(found) == everything


def test_verifying_changes_nothing(made, tmp_path, snapshot):
    _, out = made()
    before = snapshot(tmp_path)
    look(out)
    assert snapshot(tmp_path) == before


def test_stacked_weights_are_converted_again_too(build_decoder, decoder_table, asking, tmp_path):
    built = build_decoder(tmp_path / "source" / "hf")
    convert(asking(built.folder), decoder_table, tmp_path / "out", force=False)
    found = verify(tmp_path / "out", decoder_table)
    assert (found.problems, found.not_checked, found.exit_code) == ([], [], 0)
    assert counts(found)[AGAIN] == len(read_manifest(tmp_path / "out").tensors)


# --- the folder changed -----------------------------------------------------------------------------------------------


def test_any_flipped_bit_in_the_weights_is_found(made):
    _, out = made({"num_hidden_layers": 1})
    weights = out / WEIGHTS
    whole = weights.read_bytes()
    for place in range(0, len(whole), len(whole) // 60):
        flip(weights, place)
        found = look(out)
        assert found.exit_code == 1
        assert f"`{weights}` changed: its sha256 is another than the manifest's" in found.problems
        weights.write_bytes(whole)
    assert look(out).exit_code == 0


def test_the_tensor_with_the_flipped_bit_is_named(made):
    _, out = made()
    flip(out / WEIGHTS, open_checkpoint(out).tensors[SQUARE].offset)
    found = look(out)
    assert found.problems == [
        f"`{out / WEIGHTS}` changed: its sha256 is another than the manifest's",
        f"`{SQUARE}` in `{out}` changed",
    ]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_flipped_bit_in_another_file_is_found(made, name):
    _, out = made()
    flip(out / name, 3)
    found = look(out)
    assert found.problems == [f"`{out / name}` changed: its sha256 is another than the manifest's"]
    assert found.exit_code == 1


@pytest.mark.parametrize("change", ["shorter", "longer", "empty"])
def test_another_size_is_found_and_not_called_checked(made, change):
    _, out = made()
    data = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes({"shorter": data[:-1], "longer": data + b"\0", "empty": b""}[change])
    size = (out / WEIGHTS).stat().st_size
    found = look(out)
    assert found.problems[0] == f"`{out / WEIGHTS}` has {size} bytes, the manifest says {len(data)}"
    assert found.exit_code == 1
    # Its bytes were not read, and its tensors cannot be.
    assert counts(found) == {FILES: 2, SOURCE: 3, AGAIN: 23}


@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_found_and_not_called_checked(made, name, digest):
    _, out = made(digest=digest, prove=())
    (out / name).unlink()
    found = look(out)
    assert found.problems[0] == f"`{out / name}` is missing"
    assert found.exit_code == 1
    digested = {"config.json", "tokenizer.json"} | ({WEIGHTS} if digest == "sha256" else set())
    assert counts(found)[FILES] == len(digested - {name})


def test_a_missing_shard_is_found(made):
    _, out = made({"shards": 3})
    missing = out / "model-00002-of-00003.safetensors"
    missing.unlink()
    found = look(out)
    assert f"`{missing}` is missing" in found.problems
    assert TENSORS not in counts(found)


@pytest.mark.parametrize(
    "name", ["model_state.pdparams", "pytorch_model.bin", "other.safetensors", "a.pt", f"{WEIGHTS}.index.json"]
)
def test_weights_beside_the_conversion_are_found(made, name):
    _, out = made()
    (out / name).write_bytes(b"{}")
    found = look(out)
    assert found.problems == [f"`{out / name}` is not part of the conversion, and a framework may load it instead"]
    assert found.exit_code == 1


def test_a_journal_is_found(made):
    _, out = made()
    (out / JOURNAL).write_bytes(b"{}\n")
    found = look(out)
    assert found.problems == [f"`{out / JOURNAL}` is left of a stopped conversion; delete it if nothing else is wrong"]


def test_other_files_are_said_not_to_be_checked(made):
    _, out = made()
    (out / "README.md").touch()
    (out / "runs").mkdir()
    found = look(out)
    assert found.problems == []
    assert found.not_checked == ["not part of the conversion: README.md, runs"]


def test_a_tensor_that_was_added_with_the_manifest_kept_is_found(made):
    from safetensors.numpy import load_file, save_file

    _, out = made()
    tensors = load_file(out / WEIGHTS)
    tensors["extra.weight"] = tensors.pop(SQUARE)
    save_file(tensors, out / WEIGHTS)
    problems = look(out).problems
    assert f"`{SQUARE}` is missing from `{out}`" in problems
    assert f"`extra.weight` in `{out}` is not in the manifest" in problems


# --- the manifest changed ---------------------------------------------------------------------------------------------


def other_digest(document, *path) -> None:
    for key in path[:-1]:
        document = document[key]
    digest = document[path[-1]]
    document[path[-1]] = digest[:-1] + ("0" if digest[-1] != "0" else "1")


@pytest.mark.parametrize(
    ("path", "problems"),
    [
        (("files", 0, "digest"), 1),
        (("files", 1, "digest"), 1),
        (("source", "files", 0, "digest"), 1),
        (("source", "files", 1, "digest"), 1),
        (("tensors", SQUARE, "digest"), 2),  # neither the file nor a new conversion has it
    ],
)
def test_a_changed_digest_in_the_manifest_is_found(made, path, problems):
    _, out = made()
    edit_manifest(out, lambda document: other_digest(document, *path))
    found = look(out)
    assert len(found.problems) == problems
    assert found.exit_code == 1


def test_a_tensor_left_out_of_the_manifest_is_found(made):
    _, out = made()
    edit_manifest(out, lambda document: document["tensors"].pop(SQUARE))
    found = look(out)
    assert f"`{SQUARE}` in `{out}` is not in the manifest" in found.problems
    assert f"`{SQUARE}` is on one side only: in the source or in the manifest" in found.problems


def test_a_file_left_out_of_the_manifest_is_said_not_to_be_checked(made):
    _, out = made()
    edit_manifest(out, lambda document: document["files"].pop(1))
    flip(out / "config.json", 3)
    found = look(out)
    assert found.not_checked == ["not part of the conversion: config.json"]
    assert counts(found)[FILES] == 2


def test_a_folder_without_manifest_cannot_be_verified(made):
    _, out = made()
    (out / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=rf"`{out}` has no `{MANIFEST}`") as refused:
        look(out)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema_version": 1}'])
def test_a_manifest_that_cannot_be_read_is_an_error(made, content):
    _, out = made()
    (out / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match="is not a conversion manifest this version can read"):
        look(out)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        look(tmp_path / "nowhere")


# --- the source -------------------------------------------------------------------------------------------------------


def test_a_changed_weight_of_the_source_is_found_twice(made):
    source, out = made()
    flip(source / WEIGHTS, open_checkpoint(source).tensors[SQUARE].offset)
    found = look(out)
    assert found.problems == [
        f"source: `{source / WEIGHTS}` changed: its sha256 is another than the manifest's",
        f"`{SQUARE}` is not what converting the source gives",
    ]
    # The folder itself is what it was, and that is said.
    assert {FILES, TENSORS} <= set(counts(found))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_of_the_source_is_found_and_not_called_checked(made, name):
    source, out = made()
    (source / name).unlink()
    found = look(out)
    assert f"source: `{source / name}` is missing" in found.problems
    assert counts(found)[SOURCE] == 2
    assert (AGAIN in counts(found)) == (name != "config.json")


def test_a_source_that_is_another_model_now_is_found(made, build):
    source, out = made()
    shutil.rmtree(source)
    build(source, hidden_size=12)
    found = look(out)
    assert found.exit_code == 1
    assert found.problems[0].startswith(f"source: `{source / 'config.json'}` has ")
    assert SOURCE not in counts(found)
    assert len([problem for problem in found.problems if "is not what converting the source gives" in problem]) > 10


def test_a_source_that_cannot_be_converted_any_more_is_found_and_not_called_checked(made):
    from safetensors.numpy import load_file, save_file

    source, out = made()
    tensors = load_file(source / WEIGHTS)
    del tensors[SQUARE]
    save_file(tensors, source / WEIGHTS)
    found = look(out)
    assert any(problem.startswith(f"source: `{SQUARE}` is missing from") for problem in found.problems)
    assert AGAIN not in counts(found)


def test_a_source_that_moved_is_said_not_to_be_checked(made, tmp_path):
    source, out = made()
    source.rename(tmp_path / "moved")
    found = look(out)
    assert found.problems == []
    assert found.not_checked == [f"the source `{source}` is not there: give it with --source"]
    assert counts(found) == {FILES: 3, TENSORS: 23}
    assert found.exit_code == 0


def test_a_source_that_moved_is_checked_where_it_is(made, tmp_path):
    source, out = made()
    source.rename(tmp_path / "moved")
    found = look(out, source=tmp_path / "moved")
    assert (found.problems, found.not_checked) == ([], [])
    assert counts(found) == {FILES: 3, TENSORS: 23, SOURCE: 3, AGAIN: 23}
    flip(tmp_path / "moved" / WEIGHTS)
    assert look(out, source=tmp_path / "moved").exit_code == 1


def test_a_source_given_with_the_wrong_path_is_said_not_to_be_checked(made, tmp_path):
    _, out = made()
    found = look(out, source=tmp_path / "nowhere")
    assert found.not_checked == [f"the source `{tmp_path / 'nowhere'}` is not there: give it with --source"]
    assert not {SOURCE, AGAIN} & set(counts(found))


def test_a_pickled_source_is_converted_again_with_what_reads_it(build, asking, tmp_path):
    built = build(tmp_path / "source" / "hf")
    (built.folder / WEIGHTS).rename(built.folder / "pytorch_model.bin")
    arrays = {name: (array.view(np.uint32), "F32") for name, array in built.arrays.items()}
    convert(asking(built.folder, read_torch=lambda _: arrays), load_table(), tmp_path / "out", force=False)
    found = look(tmp_path / "out", read_torch=lambda _: arrays)
    assert found.problems == []
    assert counts(found)[AGAIN] == 23
    arrays[SQUARE][0][0, 0] ^= 1
    found = look(tmp_path / "out", read_torch=lambda _: arrays)
    assert found.problems == [f"`{SQUARE}` is not what converting the source gives"]


# --- what was not looked at -------------------------------------------------------------------------------------------


def test_without_digests_only_sizes_are_checked_and_that_is_said(made):
    _, out = made(digest="none", prove=())
    found = look(out)
    assert found.problems == []
    assert found.not_checked == [
        f"files without a digest in the manifest, but for size: {WEIGHTS}",
        f"source files without a digest in the manifest, but for size: {WEIGHTS}",
        "no tensor has a digest in the manifest: none is held against the source's",
    ]
    # config.json and the tokenizer always have one.
    assert counts(found) == {FILES: 2, SOURCE: 2}
    flip(out / WEIGHTS)  # cannot be seen, and nothing above said that it was looked at
    assert look(out).exit_code == 0
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1])
    assert look(out).exit_code == 1


def test_another_table_than_then_is_said(made, tmp_path):
    _, out = made()
    text = (configs_dir() / "tables" / "modernbert.toml").read_text()
    (tmp_path / "other.toml").write_text(text + "\n# another comment\n")
    found = verify(out, load_table(str(tmp_path / "other.toml")))
    assert found.problems == []
    assert found.not_checked == [
        "the table `modernbert/1` changed since: the source is converted with the installed one"
    ]


def test_a_table_that_means_something_else_is_found(made, tmp_path):
    _, out = made({"intermediate_size": 12})
    text = (configs_dir() / "tables" / "modernbert.toml").read_text()
    one, other = (f'paddle = "layers.{{i}}.{name}.weight"' for name in ("attn.Wqkv", "mlp.Wi"))
    (tmp_path / "other.toml").write_text(text.replace(one, "@").replace(other, one).replace("@", other))
    found = verify(out, load_table(str(tmp_path / "other.toml")))
    assert "`model.layers.0.attn.Wqkv.weight` is not what converting the source gives" in found.problems


def test_nothing_looked_at_and_nothing_wrong_is_not_success():
    assert Verification().exit_code == 5
    assert Verification(not_checked=["all of it"]).exit_code == 5
    assert Verification(checked=["one thing"]).exit_code == 0
    assert Verification(checked=["one thing"], problems=["another"]).exit_code == 1


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys):
    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["verify", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command_says_unchanged_only_if_everything_was_looked_at(made, command, tmp_path):
    source, out = made()
    code, text, _ = command(out)
    assert code == 0
    assert text.splitlines()[-1] == f"{out}: unchanged"
    source.rename(tmp_path / "moved")
    code, text, _ = command(out)
    assert code == 0
    assert text.splitlines()[-1] == f"{out}: no difference in what was checked"
    assert f"not checked: the source `{source}` is not there" in text
    assert command(out, "--source", tmp_path / "moved")[1].endswith(": unchanged\n")


def test_the_command_lists_problems_and_exits_with_1(made, command):
    _, out = made()
    flip(out / WEIGHTS)
    (out / "model_state.pdparams").touch()
    code, text, err = command(out)
    assert code == 1
    assert text.count("problem: ") == 3
    assert text.splitlines()[-1] == f"{out}: 3 problems"
    assert "Traceback" not in err


@pytest.mark.parametrize("damage", ["missing", "no JSON", "another model"])
def test_the_command_finds_a_damaged_config(made, command, damage):
    _, out = made()
    config = out / "config.json"
    if damage == "missing":
        config.unlink()
    elif damage == "no JSON":
        flip(config, 0)
    else:
        config.write_text(config.read_text().replace('"modernbert"', '"modernbart"'))
    code, text, err = command(out)
    assert code == 1, err
    assert f"problem: `{config}` " in text


def test_the_command_without_a_manifest_is_one_line_and_exit_code_2(made, command):
    _, out = made()
    (out / MANIFEST).unlink()
    code, text, err = command(out)
    assert code == 2
    assert text == ""
    assert err.count("error:") == 1
    assert command(out / "nowhere")[0] == 2


def test_the_command_gives_json(made, command):
    _, out = made(digest="none", prove=())
    code, text, _ = command(out, "--json")
    document = json.loads(text)
    assert code == document["exit_code"] == 0
    assert len(document["checked"]) == 2
    assert len(document["not_checked"]) == 3
    assert document["problems"] == []


def test_the_command_takes_the_table_of_a_decoder(build_decoder, decoder_table, asking, tmp_path, command):
    built = build_decoder(tmp_path / "source" / "hf")
    convert(asking(built.folder), decoder_table, tmp_path / "out", force=False)
    code, text, _ = command(tmp_path / "out")
    assert code == 0
    assert text.endswith(": unchanged\n")
