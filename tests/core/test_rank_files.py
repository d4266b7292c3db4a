"""Checkpoints divided among ranks: what is written, that it comes back, and which damage is seen."""

import itertools
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from modernbert_align.core.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from modernbert_align.core.convert import convert, plan_conversion
from modernbert_align.core.digest import file_sha256
from modernbert_align.core.manifest import read_manifest
from modernbert_align.core.plan import divide
from modernbert_align.core.proof import prove_roundtrip
from modernbert_align.core.rank_files import is_divided, join_ranks
from modernbert_align.core.shares import Joined, share_of
from modernbert_align.core.tensor_parallel import Division, Share, divisions
from modernbert_align.core.verify import verify
from modernbert_align.errors import AlignError, CheckpointError, ProofError

ALL = ("tensors", "dye", "roundtrip")
FOUR = {"num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 8, "vocab_size": 24}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
CLASSES = ["ModernBertModel", "ModernBertForSequenceClassification", "ModernBertForMultipleChoice"]
MODELS = {
    "tied": FOUR,
    "untied with every bias": {**FOUR, **BIASES, "tie_word_embeddings": False},
    "a vocabulary no degree divides": {**FOUR, "vocab_size": 23},
    **{name: {**FOUR, "architectures": [name], "num_labels": 3} for name in CLASSES},
}


def run(request, table, out, **options):
    return convert(request, table, out, force=False, **options)


@pytest.fixture
def divided(build, table, asking, tmp_path):
    """Gives a source and what it was divided into."""

    def make(degree=2, *, dtype="F32", **config):
        source = build(tmp_path / "source", dtype=dtype, **FOUR | config)
        out = tmp_path / "divided"
        run(asking(source.folder, tensor_parallel=degree), table, out)
        return source, out

    return make


@pytest.fixture
def same_side(asking):
    def request(folder, **options):
        return replace(asking(folder, "paddle", **options), dst="paddle")

    return request


def edit(path, change):
    """Change the arrays of a file, which stays a whole safetensors file."""
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, metadata={"format": "np"})


def join(asking, table, folder, out, **options):
    return run(asking(folder, "paddle", **options), table, out)


def without_manifest(folder):
    (folder / "conversion_manifest.json").unlink()
    return folder


# --- what is written ---


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_there_and_back_reproduces_the_source(build, table, asking, tmp_path, model, degree):
    source = build(tmp_path / "source", **MODELS[model])
    there = run(asking(source.folder, tensor_parallel=degree, prove=ALL), table, tmp_path / "divided")
    assert [proof.level for proof in there.manifest.proofs] == list(ALL)
    back = join(asking, table, tmp_path / "divided", tmp_path / "back", prove=ALL)
    assert [proof.level for proof in back.manifest.proofs] == list(ALL)
    assert file_sha256(tmp_path / "back" / "model.safetensors") == file_sha256(source.folder / "model.safetensors")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == source.config


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_every_width_comes_back(divided, table, asking, tmp_path, dtype):
    source, folder = divided(dtype=dtype)
    join(asking, table, folder, tmp_path / "back", prove=ALL)
    assert file_sha256(tmp_path / "back" / "model.safetensors") == file_sha256(source.folder / "model.safetensors")


@pytest.mark.parametrize("degree", [2, 4])
def test_every_rank_has_its_shares_of_the_whole_paddle_checkpoint(build, table, asking, tmp_path, degree):
    source = build(tmp_path / "source", **MODELS["untied with every bias"])
    run(asking(source.folder), table, tmp_path / "whole")
    run(asking(source.folder, tensor_parallel=degree), table, tmp_path / "divided")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    sizes = table.sizes(source.config, where="test")
    how = divisions(table.expand(sizes, "masked_lm"), degree)
    assert {"model.layers.1.attn.Wqkv.bias", "model.layers.0.mlp.Wo.weight", "decoder.weight"} <= set(how)
    for rank in range(degree):
        share = load_file(tmp_path / "divided" / f"model.tp{rank:02d}.safetensors")
        assert set(share) == set(whole)
        for name, array in whole.items():
            expected = how[name].cut(array, rank) if name in how else array
            np.testing.assert_array_equal(share[name], expected, err_msg=f"{name} of rank {rank}")


def test_the_folder_is_laid_out_as_paddlenlp_saves_it(divided):
    _, folder = divided()
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "conversion_manifest.json", "model.tp00.safetensors", "model.tp01.safetensors"
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["tensor_parallel_degree"] == 2
    assert is_divided(folder)


def test_degree_one_is_the_ordinary_conversion(build, table, asking, tmp_path, snapshot):
    source = build(tmp_path / "source", **FOUR)
    run(asking(source.folder), table, tmp_path / "a")
    run(asking(source.folder, tensor_parallel=1), table, tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert not is_divided(tmp_path / "a")


def test_the_manifest_lists_every_share_and_verify_looks_at_each(divided, table):
    source, folder = divided()
    manifest = read_manifest(folder)
    assert manifest.tensor_parallel == 2
    assert set(manifest.tensors) == {f"{name}@tp{rank:02d}" for name in source.arrays for rank in range(2)}
    found = verify(folder, table)
    assert (found.problems, found.not_checked) == ([], [])
    assert f"{2 * len(source.arrays)} tensors against a new conversion of the source" in found.checked


def test_an_equal_request_is_up_to_date_and_another_degree_is_not(divided, table, asking):
    source, folder = divided()
    assert run(asking(source.folder, tensor_parallel=2), table, folder).up_to_date
    for degree in (1, 4):
        with pytest.raises(CheckpointError, match="exists and is another or a changed conversion"):
            run(asking(source.folder, tensor_parallel=degree), table, folder)


@pytest.mark.parametrize("shards", [0, 3])
def test_a_stopped_run_is_resumed_to_the_same_bytes(build, table, asking, tmp_path, snapshot, monkeypatch, shards):
    source = build(tmp_path / "source", shards=shards, **FOUR)
    request = asking(source.folder, tensor_parallel=2)
    run(request, table, tmp_path / "whole")

    class KilledError(BaseException):
        pass

    def stop(done, total):
        if done > 0.7 * total:  # in the second rank's file
            shutil.copytree(tmp_path / "out.partial", tmp_path / "left")
            raise KilledError

    monkeypatch.setattr("modernbert_align.core.writer._SYNC_BYTES", 1)
    with pytest.raises(KilledError):
        run(request, table, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    (tmp_path / "left").rename(tmp_path / "out.partial")
    told = []
    run(request, table, tmp_path / "out", resume=True, notify=told.append)
    assert any("tensors are done" in line and ": 0 tensors" not in line for line in told)
    names = [f"model.tp0{rank}.safetensors" for rank in range(2)]
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_nothing_digested_is_the_same_bytes(build, table, asking, tmp_path):
    source = build(tmp_path / "source", **FOUR)
    run(asking(source.folder, tensor_parallel=2), table, tmp_path / "a")
    run(asking(source.folder, tensor_parallel=2, digest="none", prove=()), table, tmp_path / "b")
    join(asking, table, tmp_path / "b", tmp_path / "back", digest="none", prove=())
    for rank in range(2):
        name = f"model.tp0{rank}.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert file_sha256(tmp_path / "back" / "model.safetensors") == file_sha256(source.folder / "model.safetensors")


@pytest.mark.parametrize("degree", [2, 4])
def test_a_cast_share_is_a_share_of_the_cast_weight(build, table, asking, tmp_path, degree):
    source = build(tmp_path / "source", **FOUR)
    run(asking(source.folder, dtype="bf16"), table, tmp_path / "whole")
    there = run(asking(source.folder, dtype="bf16", tensor_parallel=degree), table, tmp_path / "divided")
    assert not there.manifest.lossless
    assert {record.cast.elements for record in there.manifest.tensors.values() if record.cast} >= {24 * 16 // degree}
    join(asking, table, tmp_path / "divided", tmp_path / "back")
    join(asking, table, tmp_path / "whole", tmp_path / "expected")
    back, expected = (tmp_path / out / "model.safetensors" for out in ("back", "expected"))
    assert back.read_bytes() == expected.read_bytes()


def test_a_head_can_be_dropped_on_the_way_there_and_back(divided, build, table, asking, tmp_path):
    source, folder = divided()
    run(asking(source.folder, head="base", tensor_parallel=2), table, tmp_path / "base", notify=lambda _: None)
    assert "decoder.bias" not in load_file(tmp_path / "base" / "model.tp01.safetensors")
    join(asking, table, tmp_path / "base", tmp_path / "a", prove=ALL)
    join(asking, table, folder, tmp_path / "b", head="base", prove=("tensors", "dye"))
    first, second = (tmp_path / out / "model.safetensors" for out in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_what_was_joined_can_be_verified_against_the_rank_files(divided, table, asking, tmp_path, same_side):
    _, folder = divided()
    join(asking, table, folder, tmp_path / "hf")
    run(same_side(folder), table, tmp_path / "merged")
    for out in ("hf", "merged"):
        found = verify(tmp_path / out, table)
        assert (found.problems, found.not_checked) == ([], [])
        assert any("against a new conversion of the source" in line for line in found.checked)
    edit(folder / "model.tp01.safetensors", flipped(WQKV))
    assert "`model.layers.1.attn.Wqkv.weight` is not what converting the source gives" in [
        *verify(tmp_path / "hf", table).problems
    ]


# --- Paddle to Paddle ---


def test_merging_gives_the_whole_paddle_checkpoint_and_dividing_that_the_shares(
    divided, table, asking, tmp_path, same_side
):
    source, folder = divided(4)
    run(asking(source.folder), table, tmp_path / "whole")
    merged = run(same_side(folder, prove=ALL), table, tmp_path / "merged")
    assert len(merged.manifest.proofs) == 3
    merged_bytes, whole_bytes = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("merged", "whole"))
    assert merged_bytes == whole_bytes
    assert "tensor_parallel_degree" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tensor_parallel_degree"] == 1
    again = run(same_side(tmp_path / "merged", tensor_parallel=4, prove=ALL), table, tmp_path / "again")
    assert len(again.manifest.proofs) == 3
    fewer = run(same_side(folder, tensor_parallel=2, prove=ALL), table, tmp_path / "fewer")
    assert fewer.manifest.tensor_parallel == 2
    run(asking(source.folder, tensor_parallel=2), table, tmp_path / "two")
    for out, expected, degree in (("again", folder, 4), ("fewer", tmp_path / "two", 2)):
        for rank in range(degree):
            name = f"model.tp0{rank}.safetensors"
            assert (tmp_path / out / name).read_bytes() == (expected / name).read_bytes()


# --- rank files of others ---


def to_pickles(folder):
    """The same shares as PaddleNLP's save_pretrained writes them by default."""
    for path in sorted(folder.glob("model.tp*.safetensors")):
        name = path.name.replace("model.", "model_state.").replace("safetensors", "pdparams")
        (folder / name).write_bytes(pickle.dumps(load_file(path), protocol=2))
        path.unlink()
    return without_manifest(folder)


def test_pickled_rank_files_are_joined(divided, table, asking, tmp_path):
    source, folder = divided()
    join(asking, table, to_pickles(folder), tmp_path / "back", prove=("tensors", "dye"))
    assert file_sha256(tmp_path / "back" / "model.safetensors") == file_sha256(source.folder / "model.safetensors")


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_copy_in_the_rank_files_is_left_out_only_if_it_is_one(divided, table, asking, tmp_path, same):
    """A tied decoder may be saved once more, divided like the embedding."""
    source, folder = divided()
    for path in sorted(without_manifest(folder).glob("*.safetensors")):
        edit(path, lambda arrays: arrays.update({"decoder.weight": arrays[EMBEDDING].copy()}))
    if same:
        join(asking, table, folder, tmp_path / "back", prove=ALL)
        assert file_sha256(tmp_path / "back" / "model.safetensors") == file_sha256(source.folder / "model.safetensors")
        return
    edit(folder / "model.tp01.safetensors", flipped("decoder.weight"))
    with pytest.raises(CheckpointError, match=r"is tied to .* but their values differ"):
        join(asking, table, folder, tmp_path / "back")


def test_what_was_true_of_one_rank_is_not_said_of_the_whole(divided, table, tmp_path, same_side):
    _, folder = divided()
    path = without_manifest(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensor_parallel_rank": 1}))
    run(same_side(folder), table, tmp_path / "merged")
    assert "tensor_parallel_rank" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_missing_pickle_is_named(divided, table, asking, tmp_path):
    _, folder = divided()
    (to_pickles(folder) / "model_state.tp01.pdparams").unlink()
    with pytest.raises(CheckpointError, match=r"lacks `model_state.tp01.pdparams`: rank 1 of 2"):
        join(asking, table, folder, tmp_path / "back")


def test_a_pickle_that_asks_for_more_than_arrays_is_refused(divided, table, asking, tmp_path):
    _, folder = divided()
    (to_pickles(folder) / "model_state.tp01.pdparams").write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(CheckpointError, match="print"):
        join(asking, table, folder, tmp_path / "back")


# --- damage that is seen ---


def remove(name):
    return lambda folder: (folder / name).unlink()


def add_rank(folder):
    shutil.copyfile(folder / "model.tp01.safetensors", folder / "model.tp02.safetensors")


def degree_is(number):
    def change(folder):
        document = json.loads((folder / "config.json").read_text())
        document["tensor_parallel_degree"] = number
        (folder / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

    return change


def in_rank(rank, change):
    return lambda folder: edit(folder / f"model.tp{rank:02d}.safetensors", change)


def cut_short(folder):
    path = folder / "model.tp01.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def all_of(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def flipped(name):
    """One bit of one element is another."""

    def change(arrays):
        arrays[name].view(np.uint32).reshape(-1)[-1] ^= 1

    return change


EMBEDDING = "model.embeddings.tok_embeddings.weight"
NORM, WQKV = "model.layers.1.mlp_norm.weight", "model.layers.1.attn.Wqkv.weight"
SEEN = {
    "missing last": (remove("model.tp01.safetensors"), "lacks `model.tp01.safetensors`: rank 1 of 2"),
    "missing first": (remove("model.tp00.safetensors"), "lacks `model.tp00.safetensors`: rank 0 of 2"),
    "missing, unsaid": (
        all_of(remove("model.tp00.safetensors"), degree_is(None)), "lacks `model.tp00.safetensors`: rank 0 of 2"
    ),
    "alone, unsaid": (all_of(remove("model.tp01.safetensors"), degree_is(None)), "has the file of rank 0 alone"),
    "too many": (add_rank, r"model.tp02.safetensors` is one too many: there are 2 ranks \(config.json: "),
    "said to be more": (degree_is(4), r"lacks `model.tp02.safetensors`: rank 2 of 4 \(config.json: "),
    "said to be very many": (degree_is(10**12), "lacks `model.tp02.safetensors`"),
    "another degree, unsaid": (
        all_of(add_rank, lambda f: shutil.copyfile(f / "model.tp00.safetensors", f / "model.tp03.safetensors"),
               degree_is(None)),
        r"`decoder.bias` is \[12\] in .*tp00.*, a share of \[24\] among 4 ranks is \[6\]",
    ),
    "cut short": (cut_short, r"model.tp01.safetensors` is truncated"),
    "a weight less": (
        in_rank(1, lambda arrays: arrays.pop(NORM)), f"`{NORM}` is in .*tp00.* and not in `model.tp01.safetensors`"
    ),
    "a weight more": (
        in_rank(1, lambda arrays: arrays.update(x=arrays[NORM])), "`x` is in .*tp01.* and not in `model.tp00.safet"
    ),
    "not divided": (
        in_rank(1, lambda arrays: arrays.update({WQKV: np.zeros((16, 48), np.float32)})),
        rf"`{WQKV}` is \[16, 48\] in .*tp01.*, a share of \[16, 48\] among 2 ranks is \[16, 24\]",
    ),
    "divided along the other axis": (
        in_rank(0, lambda arrays: arrays.update({WQKV: np.zeros((8, 48), np.float32)})),
        rf"`{WQKV}` is \[8, 48\] in .*tp00.*, a share of \[16, 48\] among 2 ranks is \[16, 24\]",
    ),
    "another size of what is not divided": (
        in_rank(1, lambda arrays: arrays.update({NORM: np.zeros(8, np.float32)})),
        rf"`{NORM}` is \[8\] in .*tp01.*, rank 0's is \[16\]",
    ),
    "another dtype": (
        in_rank(1, lambda arrays: arrays.update({NORM: arrays[NORM].astype(np.float16)})),
        f"`{NORM}` is F32 in .*tp00.* and F16 in `model.tp01.safetensors`",
    ),
    "another value of what is not divided": (
        in_rank(1, flipped(NORM)),
        f"`{NORM}` is not divided, but differs between .*tp00.safetensors` and `model.tp01.safetensors`",
    ),
    "the whole beside it": (
        lambda f: shutil.copyfile(f / "model.tp00.safetensors", f / "model.safetensors"),
        "has the whole weights and those of ranks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", SEEN)
def test_damage_that_is_seen_without_a_manifest(divided, table, asking, tmp_path, damage):
    _, folder = divided()
    join(asking, table, without_manifest(folder), tmp_path / "before")
    change, message = SEEN[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        join(asking, table, folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_degree_that_no_such_model_has_is_refused(divided, table, asking, tmp_path):
    _, folder = divided()
    all_of(add_rank, degree_is(3))(without_manifest(folder))
    with pytest.raises(AlignError, match="4 attention heads cannot be divided among 3 ranks"):
        join(asking, table, folder, tmp_path / "back")


def test_a_link_that_leads_out_is_refused(divided, table, asking, tmp_path):
    _, folder = divided()
    path = without_manifest(folder) / "model.tp01.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        join(asking, table, folder, tmp_path / "back")


def test_other_readers_say_what_to_do_with_it(divided):
    _, folder = divided()
    with pytest.raises(CheckpointError, match="is divided among tensor-parallel ranks") as caught:
        open_checkpoint(folder)
    assert caught.value.hint == f"make it whole: modernbert-align convert --src paddle --merge --model {folder}"


# --- damage that only a manifest tells ---


def exchange(folder):
    first, second = (folder / f"model.tp0{rank}.safetensors" for rank in range(2))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def split_naively(folder):
    """Wqkv as one block: rank 0 gets all of q and half of k."""
    paths = [folder / f"model.tp0{rank}.safetensors" for rank in range(2)]
    how, naive = (Division(axis=1, parts=parts, degree=2) for parts in (3, 1))
    whole = how.join([load_file(path)[WQKV] for path in paths])
    for rank, path in enumerate(paths):
        edit(path, lambda arrays, rank=rank: arrays.update({WQKV: naive.cut(whole, rank)}))


@pytest.mark.parametrize("change", [exchange, split_naively, in_rank(1, flipped(WQKV))])
def test_what_no_shape_shows_is_caught_by_the_manifest_and_not_without_it(divided, table, asking, tmp_path, change):
    source, folder = divided()
    change(folder)
    with pytest.raises(CheckpointError, match=r"is not the file that `conversion_manifest.json` beside it lists"):
        join(asking, table, folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert any("changed" in problem for problem in verify(folder, table).problems)
    # The files alone are those of some model: what comes out is whole, and is not the source.
    join(asking, table, without_manifest(folder), tmp_path / "back")
    assert file_sha256(tmp_path / "back" / "model.safetensors") != file_sha256(source.folder / "model.safetensors")


def test_a_manifest_that_cannot_be_read_is_not_passed_over(divided, table, asking, tmp_path):
    _, folder = divided()
    (folder / "conversion_manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a conversion manifest this version can read") as caught:
        join(asking, table, folder, tmp_path / "back")
    assert caught.value.hint == "remove it to join the files without looking at it"


# --- proofs can fail ---


@pytest.mark.parametrize("level", ["dye", "roundtrip"])
@pytest.mark.parametrize("wrong", ["rank", "parts"])
def test_a_wrong_cut_is_not_proved(build, table, asking, tmp_path, monkeypatch, level, wrong):
    source = build(tmp_path / "source", **FOUR)

    def cut(whole, names, share):
        how = share.division
        if how is not None and wrong == "rank":
            share = Share(rank=how.degree - 1 - share.rank, division=how)
        elif how is not None:
            share = Share(rank=share.rank, division=Division(axis=how.axis, parts=1, degree=how.degree))
        return share_of(whole, names, share)

    monkeypatch.setattr("modernbert_align.core.stream.share_of", cut)
    with pytest.raises(ProofError):
        run(asking(source.folder, tensor_parallel=2, prove=(level,)), table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("level", ["dye", "roundtrip"])
def test_a_wrong_join_is_not_proved(divided, table, asking, tmp_path, monkeypatch, level):
    _, folder = divided()

    def join_naively(self, name, start, out):
        whole = self.divided.get(name)
        ranks = self.ranks[::-1] if whole is not None else self.ranks
        original(Joined(**{**vars(self), "ranks": ranks}), name, start, out)

    original = Joined.fill
    monkeypatch.setattr(Joined, "fill", join_naively)
    with pytest.raises(ProofError):
        join(asking, table, folder, tmp_path / "back", prove=(level,))


@pytest.mark.parametrize("change", [lambda items: items[:-1], lambda items: (*items, items[-1])])
def test_a_rank_that_lacks_a_share_or_has_one_twice_is_not_proved(build, table, asking, tmp_path, monkeypatch, change):
    source = build(tmp_path / "source", **FOUR)
    monkeypatch.setattr(
        "modernbert_align.core.convert.divide",
        lambda *arguments: replace(plan := divide(*arguments), items=change(plan.items)),
    )
    with pytest.raises(ProofError):
        run(asking(source.folder, tensor_parallel=2, prove=("dye",)), table, tmp_path / "out")


def test_a_copy_that_is_another_on_one_rank_does_not_come_back(divided, table, asking):
    source, folder = divided()
    conversion = plan_conversion(asking(source.folder, tensor_parallel=2), table)
    sha256 = {"model.safetensors": file_sha256(source.folder / "model.safetensors")}
    assert prove_roundtrip(conversion.plan, conversion.sizes, folder, sha256)
    edit(folder / "model.tp01.safetensors", flipped(NORM))
    with pytest.raises(ProofError, match=f"cannot be converted back: `{NORM}` is not divided, but differs between"):
        prove_roundtrip(conversion.plan, conversion.sizes, folder, sha256)


# --- a piece at a time ---


def in_memory(arrays):
    infos = {
        name: TensorInfo(name=name, dtype="U16", shape=array.shape, path=None, offset=0)
        for name, array in arrays.items()
    }
    return Checkpoint(folder=None, tensors=infos, files=(), arrays=arrays)


@st.composite
def divided_weight(draw):
    axis, parts, degree = draw(st.integers(0, 1)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    shape = [draw(st.integers(1, 7)), draw(st.integers(1, 7))]
    shape[axis] *= parts * degree
    return Division(axis=axis, parts=parts, degree=degree), np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


@given(divided_weight(), st.data())
def test_any_piece_of_a_share_or_of_a_joined_weight_can_be_read(pair, data):
    how, whole = pair
    shares = [how.cut(whole, rank) for rank in range(how.degree)]
    rank = data.draw(st.integers(0, how.degree - 1))
    seen = share_of(in_memory({"x": whole}), ("x",), Share(rank=rank, division=how))
    assert seen.tensors["x"].shape == shares[rank].shape
    joined = Joined(
        folder=None,
        tensors=in_memory({"x": whole}).tensors,
        files=(),
        ranks=tuple(in_memory({"x": share}) for share in shares),
        divided={"x": how},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modernbert_align.core.shares._BAND_BYTES", data.draw(st.sampled_from([1, 64, 1 << 19])))
        for checkpoint, expected in ((seen, shares[rank].reshape(-1)), (joined, whole.reshape(-1))):
            start = data.draw(st.integers(0, expected.size - 1))
            out = np.empty(data.draw(st.integers(1, expected.size - start)), dtype=np.uint16)
            checkpoint.fill("x", start, out)
            np.testing.assert_array_equal(out, expected[start : start + out.size])


def test_a_share_of_the_source_is_cut_where_the_operation_puts_it(table, tiny_config):
    """Cutting before a transpose is cutting the other axis after it."""
    for axis, parts in itertools.product((0, 1), (1, 2)):
        share = Share(rank=1, division=Division(axis=axis, parts=parts, degree=2))
        whole = np.arange(16 * 8).reshape(16, 8)
        transposed = next(e.op for e in table.expand(tiny_config(), "masked_lm") if e.op.name == "T")
        before = share.of_source(transposed)
        np.testing.assert_array_equal(before.division.cut(whole, 1).T, share.division.cut(whole.T, 1))


def test_joining_needs_no_config_to_say_the_degree(divided, table):
    source, folder = divided()
    sizes = table.sizes(source.config, where="test")
    joined = join_ranks(folder, source.config, table, sizes, "masked_lm")
    assert joined.tensors[WQKV].shape == (16, 48)
    np.testing.assert_array_equal(joined.read(WQKV).view(np.float32), source.arrays[WQKV].T)
