"""The tokenizer against transformers' own, from the same files: the same ids, masks, offsets and texts."""

import json
import random

import numpy as np
import paddle
import paddlenlp.transformers as paddlenlp_transformers
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import modernbert_align
from modernbert_align.backends.paddle import quiet
from modernbert_align.errors import CheckpointError, UsageError
from modernbert_align.models.modernbert.tokenizer import ModernBertTokenizer

KEYS = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping")
EVERYTHING = {
    "return_token_type_ids": True,
    "return_attention_mask": True,
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
}
FIRST = [
    "The cat sat on the mat.",
    "",
    "    indented   code",
    "naïve café, e\u0301 and é",
    "[MASK] is [SEP] not",
    "日本語👩‍👩‍👧",
]
SECOND = ["A second one.", "x", "y  z", "  [MASK]", "a\tb\nc", "\u0000 end"]


@pytest.fixture(scope="session")
def folder(fixture_folder, tmp_path_factory):
    """The fixture's tokenizer with what the published one has: [MASK] takes the space before it, runs of spaces."""
    out = tmp_path_factory.mktemp("tokenizer")
    source = fixture_folder("tiny")
    document = json.loads((source / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    contents = [" " * count for count in range(24, 1, -1)] + ["|||IP_ADDRESS|||", "[unused0]"]
    size = 1 + max(token["id"] for token in document["added_tokens"])
    size = max(size, 1 + max(document["model"]["vocab"].values()))
    for token in document["added_tokens"]:
        if token["content"] == "[MASK]":
            token["lstrip"] = True
    document["added_tokens"] += [{"id": size + i, "content": text, **plain} for i, text in enumerate(contents)]
    (out / "tokenizer.json").write_text(json.dumps(document))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)  # transformers 4 would put [MASK]'s flags back
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def load(folder):
    with quiet():
        return ModernBertTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="session")
def ours(folder):
    return load(folder)


@pytest.fixture(scope="session")
def theirs(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def assert_same(a, b):
    for key in KEYS:
        assert [list(map(tuple, row)) if key == "offset_mapping" else row for row in a[key]] == b[key], key


def random_text(generator):
    pools = [
        "abc XYZ'.,!?-019",
        "éüñßøÅ",
        "\u0301\u0300\u0308\u20dd",
        "日本語中文한국어",
        "👍🏽👩‍👩‍👧🇩🇪",
        "\u0000\u0007\u200b\ufeff\u00a0\t\r\n ",
    ]
    pieces = []
    for _ in range(generator.randint(0, 12)):
        kind = generator.random()
        if kind < 0.15:
            pieces.append(generator.choice(["[MASK]", " [MASK] ", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[unused0]"]))
        elif kind < 0.3:
            pieces.append(" " * generator.randint(1, 60))
        elif kind < 0.35:
            code = generator.choice([generator.randint(1, 0xD7FF), generator.randint(0xE000, 0x10FFFF)])
            pieces.append(chr(code))
        else:
            pieces.append("".join(generator.choices(generator.choice(pools), k=generator.randint(1, 15))))
    return "".join(pieces)


def test_thousand_random_texts_give_the_same_ids_offsets_and_texts(ours, theirs):
    generator = random.Random(0)
    texts = [random_text(generator) for _ in range(1000)]
    a, b = ours(texts, **EVERYTHING), theirs(texts, **EVERYTHING)
    assert_same(a, b)
    assert sum(4 in row for row in a["input_ids"]) > 100  # [MASK] occurs
    for skip in (False, True):
        assert ours.batch_decode(a["input_ids"], skip_special_tokens=skip) == theirs.batch_decode(
            a["input_ids"], skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def test_very_long_text_gives_the_same_ids(ours, theirs):
    text = "".join(random_text(random.Random(seed)) for seed in range(3000))
    assert len(text) > 100_000
    assert ours(text, verbose=False)["input_ids"] == theirs(text, verbose=False)["input_ids"]
    assert ours("x" * 50_000, truncation=True)["input_ids"] == theirs("x" * 50_000, truncation=True)["input_ids"]
    assert len(ours("x" * 50_000, truncation=True)["input_ids"]) == ours.model_max_length


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_special_tokens": False},
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 40},
        {"padding": True, "truncation": True, "max_length": 9},
        {"padding": "max_length", "truncation": "longest_first", "max_length": 16, "pad_to_multiple_of": 8},
    ],
)
def test_batches_are_padded_and_cut_as_in_transformers(ours, theirs, pairs, arguments):
    texts = (FIRST, SECOND) if pairs else (FIRST,)
    assert_same(ours(*texts, **EVERYTHING, **arguments), theirs(*texts, **EVERYTHING, **arguments))


@pytest.mark.parametrize("strategy", ["only_first", "only_second", "longest_first"])
def test_every_truncation_strategy_cuts_as_in_transformers(ours, theirs, strategy):
    first, second = ["one two three four five six seven"] * 2, ["eight nine ten eleven twelve"] * 2
    arguments = {"truncation": strategy, "max_length": 24}
    a = ours(first, second, **EVERYTHING, **arguments)
    assert_same(a, theirs(first, second, **EVERYTHING, **arguments))
    assert len(a["input_ids"][0]) == 24
    assert a["input_ids"] != ours(first, second)["input_ids"]


def test_left_sides_are_left_as_in_transformers(folder):
    ours, theirs = load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for tokenizer in (ours, theirs):
        tokenizer.padding_side = tokenizer.truncation_side = "left"
    arguments = {"padding": "max_length", "truncation": True, "max_length": 12}
    a = ours(FIRST, **EVERYTHING, **arguments)
    assert_same(a, theirs(FIRST, **EVERYTHING, **arguments))
    assert a["attention_mask"][1][0] == 0


def test_cut_off_pieces_come_as_rows_of_their_own(ours, theirs):
    arguments = {"truncation": "only_second", "max_length": 20, "stride": 4, "return_overflowing_tokens": True}
    first, second = ["a question", "another"], ["word " * 30, "short"]
    a, b = ours(first, second, **EVERYTHING, **arguments), theirs(first, second, **EVERYTHING, **arguments)
    assert_same(a, b)
    assert a["overflow_to_sample_mapping"] == b["overflow_to_sample_mapping"]
    assert len(a["input_ids"]) > 3


def test_words_are_tokenized_as_in_transformers(ours, theirs):
    words = [["Hello", "wide", "world"], ["x"]]
    a = ours(words, is_split_into_words=True)
    b = theirs(words, is_split_into_words=True)
    assert a["input_ids"] == b["input_ids"]
    assert a.word_ids(0) == b.word_ids(0)


def test_mask_takes_the_space_before_it(ours, theirs):
    ids = ours("a cat [MASK] sat")["input_ids"]
    assert ids == theirs("a cat [MASK] sat")["input_ids"] == ours("a cat[MASK] sat")["input_ids"]
    assert ids.count(ours.mask_token_id) == 1


def test_one_text_gives_one_row_without_batch_axis(ours, theirs):
    a, b = ours("one text", "a pair", **EVERYTHING), theirs("one text", "a pair", **EVERYTHING)
    assert a["input_ids"] == b["input_ids"]
    assert a["offset_mapping"] == b["offset_mapping"]
    assert a.tokens() == b.tokens()
    assert ours.encode("one text")["input_ids"] == theirs.encode("one text")


def test_tensors_are_paddle_and_numpy(ours, theirs):
    reference = theirs(FIRST, padding=True, return_tensors="np")
    in_paddle = ours(FIRST, padding=True, return_tensors="pd")
    in_numpy = ours(FIRST, padding=True, return_tensors="np")
    assert in_paddle["input_ids"].dtype == paddle.int64
    for key in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(in_paddle[key].numpy(), reference[key])
        np.testing.assert_array_equal(in_numpy[key], reference[key])
    assert ours("one", return_tensors="pd")["input_ids"].shape[0] == 1
    assert ours.decode(in_paddle["input_ids"][0]) == theirs.decode(reference["input_ids"][0])


def test_default_inputs_are_those_the_model_takes(ours):
    assert list(ours("a text")) == ["input_ids", "attention_mask"]
    assert list(ours("a text", return_attention_mask=False)) == ["input_ids"]


def test_vocabulary_and_special_tokens_are_those_of_transformers(ours, theirs):
    assert len(ours) == len(theirs)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    for name in ("cls", "sep", "pad", "mask", "unk"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    tokens = ours.tokenize("A cat  [MASK]!")
    assert tokens == theirs.tokenize("A cat  [MASK]!")
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("no such token") == ours.unk_token_id
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    ids = [*ours.convert_tokens_to_ids(tokens), ours.sep_token_id]
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == theirs.convert_ids_to_tokens(
        ids, skip_special_tokens=True
    )


def test_ids_get_special_tokens_as_texts_do(ours):
    first, second = (ours(text, add_special_tokens=False)["input_ids"] for text in ("one", "two three"))
    assert ours.build_inputs_with_special_tokens(first) == ours("one")["input_ids"]
    assert ours.build_inputs_with_special_tokens(first, second) == ours("one", "two three")["input_ids"]
    assert ours.num_special_tokens_to_add(pair=True) == 3


def test_pad_brings_rows_to_one_length(ours, theirs):
    rows = [{"input_ids": ours(text)["input_ids"]} for text in FIRST]
    a, b = ours.pad(rows, return_attention_mask=True), theirs.pad(rows)
    assert a["input_ids"] == b["input_ids"]
    assert a["attention_mask"] == b["attention_mask"]


def test_calls_do_not_remember_padding_and_truncation(ours):
    plain = ours(FIRST)["input_ids"]
    ours(FIRST, padding="max_length", truncation=True, max_length=8)
    assert ours(FIRST)["input_ids"] == plain


def test_return_dict_false_gives_one_dict_per_row(ours):
    rows = ours(["one", "two three"], return_dict=False)
    assert [row["input_ids"] for row in rows] == ours(["one", "two three"])["input_ids"]


def test_decoding_changes_no_spaces_unless_asked(ours):
    ids = ours("well , yes .", add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == "well , yes ."
    assert ours.decode(ids, clean_up_tokenization_spaces=True) == "well, yes."


@pytest.mark.parametrize(
    "reader",
    [load, PreTrainedTokenizerFast.from_pretrained, AutoTokenizer.from_pretrained],
    ids=["ours", "fast", "auto"],
)
def test_saved_tokenizer_gives_the_same_ids(folder, tmp_path, reader):
    tokenizer = load(folder)
    assert tokenizer.add_tokens(["newtoken"]) == 1
    tokenizer(FIRST, padding=True, truncation=True, max_length=7)
    with quiet():
        tokenizer.save_pretrained(str(tmp_path))
    loaded = reader(tmp_path)
    texts = [*FIRST, "a newtoken [MASK]"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert len(loaded) == len(tokenizer) == len(load(folder)) + 1
    assert loaded.mask_token_id == tokenizer.mask_token_id
    assert loaded.model_max_length == tokenizer.model_max_length
    assert str(tmp_path) not in (tmp_path / "tokenizer_config.json").read_text()
    assert str(folder) not in (tmp_path / "tokenizer_config.json").read_text()


def test_special_tokens_map_does_not_take_the_flags_of_mask_away(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "[MASK]"}')
    assert load(tmp_path)("a cat [MASK]")["input_ids"] == load(folder)("a cat [MASK]")["input_ids"]


@pytest.mark.parametrize("spelling", [{"mask_token": {"content": "[MASK]"}}, {"extra_special_tokens": ["[unused0]"]}])
def test_special_tokens_may_be_spelled_as_transformers_spells_them(folder, tmp_path, spelling):
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | spelling
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    loaded = load(tmp_path)
    assert loaded.mask_token_id == load(folder).mask_token_id
    assert ("[unused0]" in loaded.all_special_tokens) == ("extra_special_tokens" in spelling)


def test_added_tokens_of_the_settings_are_added(folder, tmp_path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    index = len(load(folder))
    settings["added_tokens_decoder"] = {str(index): {"content": "<late>", "normalized": False, "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    assert load(tmp_path).convert_tokens_to_ids("<late>") == index
    assert index in load(tmp_path)("a<late>b")["input_ids"]


def test_folder_without_a_tokenizer_is_refused(tmp_path, folder):
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


def test_tokens_instead_of_words_are_refused(ours):
    with pytest.raises(UsageError, match="not tokens"):
        ours([["a", "b"]], is_split_into_words="token")


@pytest.mark.parametrize("named", ["as carried", "saved", "absent"])
def test_auto_tokenizer_finds_it_in_a_converted_checkpoint(converted, fixture_folder, tmp_path, named):
    modernbert_align.register()
    source = converted("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((source / name).read_text())
    if named == "saved":
        (tmp_path / "config.json").unlink()
        with quiet():
            load(source).save_pretrained(str(tmp_path))
    if named == "absent":
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings.pop("tokenizer_class")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with quiet():
        tokenizer = paddlenlp_transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(tokenizer) is ModernBertTokenizer
    theirs = PreTrainedTokenizerFast.from_pretrained(fixture_folder("tiny"))
    assert tokenizer(FIRST, SECOND)["input_ids"] == theirs(FIRST, SECOND)["input_ids"]


def test_auto_tokenizer_still_gives_bert_its_own(tmp_path):
    modernbert_align.register()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with quiet():
        tokenizer = paddlenlp_transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(tokenizer) is paddlenlp_transformers.BertTokenizer


def test_masking_collator_of_paddlenlp_takes_it(ours):
    from paddlenlp.data import DataCollatorForLanguageModeling, DataCollatorWithPadding

    rows = [{"input_ids": ours(text)["input_ids"]} for text in FIRST]
    padded = DataCollatorWithPadding(ours)(rows)
    assert padded["input_ids"].shape == padded["attention_mask"].shape
    paddle.seed(0)
    batch = DataCollatorForLanguageModeling(ours, mlm_probability=0.5)(rows)
    masked = batch["labels"].numpy() != -100
    special = np.isin(padded["input_ids"].numpy(), ours.all_special_ids)
    assert masked.any()
    assert not (masked & special).any()
