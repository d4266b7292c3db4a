"""PaddleNLP itself reads the rank files that are written here, and what it saves is joined here."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modernbert_align
from modernbert_align.core.convert import Request, convert
from modernbert_align.core.model_config import read_config_file
from modernbert_align.core.ports import free_ports
from modernbert_align.core.table import load_table
from modernbert_align.core.tensor_parallel import divisions

RANKS = 2
WORKER = Path(__file__).with_name("load_share.py")
TIMEOUT_S = 240


def request(folder, src="hf", **options):
    dst = "paddle" if src == "hf" else "hf"
    return Request(folder=folder, model="test", revision=None, src=src, dst=dst, **options)


def run_ranks(folder, *arguments):
    """Run the worker once for each rank; none outlives this call."""
    processes = []
    try:
        endpoints = [f"127.0.0.1:{port}" for port in free_ports(RANKS)]
        for rank in range(RANKS):
            settings = {
                "PADDLE_DISTRI_BACKEND": "gloo",
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(RANKS),
                "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
                "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(modernbert_align.__file__).parents[1]),
            }
            with (folder / f"log{rank}").open("w") as log:
                command = [sys.executable, str(WORKER), *map(str, arguments)]
                environment = os.environ | settings
                processes.append(
                    subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
        logs = "\n".join((folder / f"log{rank}").read_text()[-2000:] for rank in range(RANKS))
        assert codes == [0] * RANKS, logs
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def loaded(fixture_folder, tmp_path_factory):
    """What two processes loaded from rank files and saved again, beside the whole conversion."""
    folder, table = tmp_path_factory.mktemp("ranks"), load_table()
    source = folder / "source"
    shutil.copytree(fixture_folder("tiny-sensitive"), source)  # every bias is on
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    arrays = load_file(source / "model.safetensors")
    arrays["decoder.weight"] = arrays["model.embeddings.tok_embeddings.weight"][::-1].copy()
    save_file(arrays, source / "model.safetensors", metadata={"format": "pt"})
    convert(request(source), table, folder / "whole", force=False)
    convert(request(source, tensor_parallel=RANKS), table, folder / "divided", force=False)
    (folder / "out").mkdir()
    run_ranks(folder, folder / "divided", folder / "whole", folder / "out")
    return folder


def test_paddlenlp_loads_from_rank_files_what_it_cuts_from_whole_ones(loaded):
    table, whole = load_table(), load_file(loaded / "whole" / "model.safetensors")
    sizes = table.sizes(read_config_file(loaded / "source"), where="test")
    divided = divisions(table.expand(sizes, "masked_lm"), RANKS)
    assert {"decoder.weight", "decoder.bias", "model.layers.0.attn.Wqkv.bias"} <= set(divided)
    for rank in range(RANKS):
        ours, theirs = (load_file(loaded / "out" / f"{name}{rank}") for name in ("from_ranks", "from_whole"))
        assert set(ours) == set(theirs) == set(whole)
        for name, array in whole.items():
            how = divided.get(name)
            expected = array if how is None else how.cut(array, rank)
            np.testing.assert_array_equal(ours[name].view(np.uint32), expected.view(np.uint32), err_msg=name)
            np.testing.assert_array_equal(theirs[name].view(np.uint32), expected.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("saved", ["safetensors", "pickles"])
def test_what_paddlenlp_saves_on_every_rank_is_joined_to_the_reference(loaded, tmp_path, saved):
    folder = tmp_path / "saved"
    shutil.copytree(loaded / "out" / f"{saved}0", folder)
    for rank in range(1, RANKS):
        (path,) = (loaded / "out" / f"{saved}{rank}").glob(f"*.tp0{rank}.*")
        shutil.copy(path, folder)
    table = load_table()
    convert(request(folder, "paddle", prove=("tensors", "dye")), table, tmp_path / "hf", force=False)
    back, source = (load_file(each / "model.safetensors") for each in (tmp_path / "hf", loaded / "source"))
    assert set(back) == set(source)
    assert all(np.array_equal(back[name], source[name]) for name in source)
    merging = replace(request(folder, "paddle"), dst="paddle")
    convert(merging, table, tmp_path / "whole", force=False)
    merged, whole = ((each / "model.safetensors").read_bytes() for each in (tmp_path / "whole", loaded / "whole"))
    assert merged == whole
