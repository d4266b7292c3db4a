"""`diff --attention blockwise`: what users run by default is looked at too, and the look can fail."""

import json
from contextlib import ExitStack

import pytest
from faults import FAULTS

from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.models.modernbert import ModernBertConfig, blockwise, modeling

HEADS = ["base", "masked_lm", "sequence_classification", "token_classification", "multiple_choice"]


def diff(cli, folder, *arguments):
    code, out, err = cli("diff", "--attention", "blockwise", "--report-dir", folder, "--json", *arguments)
    assert out, err
    return code, json.loads(out)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_meets_the_contract_of_eager_attention(cli, tmp_path, head):
    code, report = diff(cli, tmp_path, "--model", "tiny-sensitive", "--dtype", "bf16", "--head", head)
    assert code == 0, report["first_failing"]
    assert report["attention"] == "blockwise"
    assert report["engine"]["name"] == "stream"
    assert report["coverage"]["compared"] == report["coverage"]["expected"] == len(report["rows"])
    path = tmp_path / f"diff-tiny-sensitive-{head}-bf16-blockwise.json"
    assert cli("gate", path)[0] == 0


def test_gate_takes_one_implementation_for_itself_only(cli, tmp_path):
    assert diff(cli, tmp_path, "--model", "tiny")[0] == 0
    (path,) = tmp_path.glob("*.json")
    assert "forward with blockwise attention" in cli("gate", path)[1]
    assert cli("gate", path, "--require", "model=tiny,dtype=fp32,attention=blockwise")[0] == 0
    code, out, _ = cli("gate", path, "--require", "model=tiny,dtype=fp32")
    assert code == 5
    assert "no report covers it" in out
    assert cli("baseline", "update", path, "--baseline-dir", tmp_path / "kept")[0] == 0
    eager = ("diff", "--model", "tiny", "--engine", "stream", "--report-dir", tmp_path / "eager")
    assert cli(*eager)[0] == 0
    (other,) = (tmp_path / "eager").glob("*.json")
    code, out, _ = cli("gate", other, "--baseline", tmp_path / "kept")
    assert code == 5  # the baseline of blockwise attention has no report
    assert "blockwise" in out
    code, _, err = cli("compare", path, other)
    assert code == 2
    assert "attention blockwise and eager" in err


def test_report_of_blockwise_attention_cannot_pass_for_one_of_eager(cli, tmp_path):
    assert diff(cli, tmp_path, "--model", "tiny")[0] == 0
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text().replace('"attention": "blockwise"', '"attention": "eager"'))
    assert cli("gate", path)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--attention", "flash"), "`flash`"),
        (("--attention", "blockwise", "--engine", "padiff"), "padiff"),
        (("--attention", "blockwise", "--phase", "backward"), "backward"),
        (("--attention", "blockwise", "--phase", "step"), "step"),
        (("--attention", "blockwise", "--head", "question_answering"), "padding"),
    ],
)
def test_what_cannot_be_compared_is_refused(cli, tmp_path, arguments, words):
    code, out, err = cli("diff", "--model", "tiny", "--report-dir", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]  # notices may stand before it
    assert words in error
    assert not (tmp_path / "out").exists()


# Faults

OF_THE_MODEL = [
    "tanh GELU",
    "epsilon 1e-6 in one norm",
    "thetas swapped",
    "two layers swapped",
    "final norm skipped",
    "probe ran twice",
]


@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_fault_of_the_model_is_found_in_blockwise_attention_too(cli, tmp_path, monkeypatch, name):
    load, fault = paddle_backend.load, FAULTS[name]
    with ExitStack() as stack:

        def broken(*arguments):
            model = load(*arguments)
            stack.enter_context(fault.inject(model))
            return model

        monkeypatch.setattr(paddle_backend, "load", broken)
        code, report = diff(cli, tmp_path, "--model", "tiny-sensitive")
    assert code == 1
    assert report["first_failing"]["probe"] == fault.first
    if fault.cause:
        assert report["cause"]["names"] == [fault.cause]


def window(change):
    band = blockwise._band
    return blockwise, "_band", lambda queries, keys, half, known: band(queries, keys, half + change, known)


def merged():
    """All sequences as one: tokens see those of other sequences."""

    def spans(rows):
        return (blockwise.Span(0, 1, blockwise.np.arange(sum(map(len, rows)))),)

    return blockwise, "_spans", spans


def unscaled():
    attend = blockwise._attend
    return blockwise, "_attend", lambda q, k, v, slots, scale, *rest: attend(q * 8.0, k, v, slots, scale, *rest)


def last_block_missing():
    attend = blockwise._attend

    def short(*arguments):
        out = attend(*arguments)
        out[:, :, -1] = 0.0
        return out

    return blockwise, "_attend", short


def unrotated():
    return blockwise, "rotate", lambda x, _cos, _sin: x


OF_BLOCKWISE = {
    "window one narrower": (lambda: window(-1), "layers.1.attn"),
    "window one wider": (lambda: window(1), "layers.1.attn"),
    "sequences merged": (merged, "layers.0.attn"),
    "scale": (unscaled, "layers.0.attn"),
    "last row not written": (last_block_missing, "layers.0.attn"),
    "no rotation": (unrotated, "layers.0.attn"),
}


@pytest.mark.parametrize("name", OF_BLOCKWISE)
def test_fault_of_blockwise_attention_is_found_where_it_is(cli, tmp_path, monkeypatch, name):
    change, first = OF_BLOCKWISE[name]
    monkeypatch.setattr(*change())
    code, report = diff(cli, tmp_path, "--model", "tiny-sensitive")
    assert code == 1
    assert report["first_failing"]["probe"] == first
    (path,) = tmp_path.glob("*.json")
    assert cli("gate", path)[0] == 1


def test_padding_left_in_is_no_pass(cli, tmp_path, monkeypatch):
    packing = modeling.packing
    monkeypatch.setattr(modeling, "packing", lambda batch, seq, _mask: packing(batch, seq, None))
    assert diff(cli, tmp_path, "--model", "tiny-sensitive")[0] in (1, 5)


def test_eager_attention_that_ran_in_its_place_is_no_pass(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(ModernBertConfig, "attention_for", lambda _config, **_: "eager")
    code, report = diff(cli, tmp_path, "--model", "tiny-sensitive")
    assert code in (1, 5)
    assert report["coverage"]["compared"] < report["coverage"]["expected"]
