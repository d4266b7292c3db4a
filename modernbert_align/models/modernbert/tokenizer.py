"""ModernBERT's tokenizer for PaddleNLP: the `tokenizers` package behind PaddleNLP's interface.

PaddleNLP 2.8.1 has no class that reads tokenizer.json, and that of 3.0.0b4 forgets that [MASK] takes the space before
it. What both versions share is their base class, from which this one takes the interface; every id comes from the
engine that transformers uses too, run on the same file.

Source: paddlenlp 2.8.1 and 3.0.0b4, transformers/tokenizer_utils_base.py; transformers 5.23.0,
tokenization_utils_tokenizers.py.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from paddlenlp.transformers.tokenizer_utils_base import (
    BatchEncoding,
    PaddingStrategy,
    PretrainedTokenizerBase,
    TruncationStrategy,
)
from tokenizers import AddedToken, Encoding, Tokenizer

from modernbert_align.errors import CheckpointError, UsageError

__all__ = ["ModernBertTokenizer"]

# What PaddleNLP's from_pretrained adds to the keyword arguments and would be saved as if it were a setting.
_NOT_SETTINGS = (
    "added_tokens_file",
    "chat_template_file",
    "from_slow",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_class",
)


class ModernBertTokenizer(PretrainedTokenizerBase):
    """Byte-level BPE as tokenizer.json describes it.

    Args:
        tokenizer_file: Path of a tokenizer.json.
        **kwargs: The entries of tokenizer_config.json: special tokens, `model_max_length`, `padding_side`, ...

    Raises:
        CheckpointError: There is no tokenizer.json, or it cannot be read.
    """

    resource_files_names: ClassVar[dict[str, str]] = {"tokenizer_file": "tokenizer.json"}
    pretrained_init_configuration: ClassVar[dict[str, Any]] = {}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    is_fast = True

    def __init__(self, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        if tokenizer_file is None:
            raise CheckpointError(
                f"there is no tokenizer.json in `{kwargs.get('name_or_path') or 'the folder'}`",
                hint="take a folder that has one; `modernbert-align convert` carries it along",
            )
        try:
            self._engine = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # noqa: BLE001 - the engine raises nothing narrower
            raise CheckpointError(f"`{tokenizer_file}` cannot be read: {error}") from None
        # Padding and truncation stored in the file were one call's; every call here says its own.
        self._engine.no_padding()
        self._engine.no_truncation()
        declared = kwargs.pop("added_tokens_decoder", None) or {}
        settings = {key: value for key, value in kwargs.items() if key not in _NOT_SETTINGS}
        for key, value in settings.items():
            if key.endswith("_token") and isinstance(value, dict):
                settings[key] = value["content"]  # its flags are in tokenizer.json
        extra = settings.pop("extra_special_tokens", None)
        if isinstance(extra, list):
            settings["additional_special_tokens"] = [*settings.get("additional_special_tokens", []), *extra]
        super().__init__(**settings)
        self.name_or_path = kwargs.get("name_or_path", "")
        present = {repr(token) for token in self.added_tokens_decoder.values()}
        for token in (_engine_token(token) for _, token in sorted(declared.items(), key=lambda item: int(item[0]))):
            if repr(token) not in present:
                self._add_tokens([token], special_tokens=token.special)
        self.sanitize_special_tokens()

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The engine."""
        return self._engine

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self._engine.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """Number of tokens with the added ones."""
        return self._engine.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        return self._engine.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        return self._engine.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Ids by added token."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        """Ids by added token."""
        return self.added_tokens_encoder

    def sanitize_special_tokens(self) -> int:
        """Add the special tokens that are missing; one that is there keeps its flags, [MASK] its `lstrip`.

        Returns:
            How many were added.
        """
        known = self.added_tokens_encoder
        return self.add_tokens(
            [token for token in self.all_special_tokens_extended if str(token) not in known], special_tokens=True
        )

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        tokens = [token if isinstance(token, str) else _engine_token(token) for token in new_tokens]
        return (self._engine.add_special_tokens if special_tokens else self._engine.add_tokens)(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens go around one sequence, or a pair."""
        return self._engine.num_special_tokens_to_add(pair)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[CLS] A [SEP], or [CLS] A [SEP] B [SEP]."""
        single = [self.cls_token_id, *token_ids_0, self.sep_token_id]
        return single if token_ids_1 is None else [*single, *token_ids_1, self.sep_token_id]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 for every token: ModernBERT has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of a token or of several; unknown ones get the id of [UNK]."""
        if tokens is None:
            return None
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._engine.token_to_id(tokens)
        return self.unk_token_id if index is None and self._unk_token is not None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of several; None for an id that is not in the vocabulary."""
        if isinstance(ids, int):
            return self._engine.id_to_token(ids)
        special = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._engine.id_to_token(int(index)) for index in ids if int(index) not in special]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that tokens stand for."""
        return self._engine.decoder.decode(tokens)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Tokens of a text, or of a pair."""
        return self.encode(text, text_pair=pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text of ids.

        Args:
            token_ids: An id, ids, an array or a tensor; [seq].
            skip_special_tokens: Leave special tokens out.
            clean_up_tokenization_spaces: Take spaces before punctuation away. Off unless asked for, whatever
                tokenizer_config.json says, for it changes text that byte-level BPE keeps as it was (transformers 5
                does the same).
            **kwargs: As in PaddleNLP's own tokenizers.
        """
        return super().decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """The texts of several sequences; see `decode`."""
        return super().batch_decode(
            sequences,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    def _decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text = self._engine.decode(ids, skip_special_tokens=skip_special_tokens)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _encode_plus(self, text: Any, text_pair: Any = None, return_tensors: Any = None, **kwargs: Any) -> Any:
        batch = self._batch_encode_plus(
            [(text, text_pair)] if text_pair else [text], return_tensors=return_tensors, **kwargs
        )
        if return_tensors is not None or kwargs.get("return_overflowing_tokens"):
            return batch
        return BatchEncoding({key: value[0] for key, value in batch.items()}, batch.encodings)

    def _batch_encode_plus(
        self,
        batch_text_or_text_pairs: Any,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool | str = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_position_ids: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        return_dict: bool = True,
        verbose: bool = True,
    ) -> Any:
        if is_split_into_words == "token":
            raise UsageError(
                "this tokenizer takes texts or words, not tokens",
                hint="give words with is_split_into_words=True, or ids to build_inputs_with_special_tokens",
            )
        if truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE:
            self._engine.no_truncation()
        else:
            assert max_length is not None  # PaddleNLP's base class puts model_max_length there
            self._engine.enable_truncation(
                max_length, stride=stride, strategy=truncation_strategy.value, direction=self.truncation_side
            )
        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            self._engine.no_padding()
        else:
            self._engine.enable_padding(
                direction=padding_side or self.padding_side,
                pad_id=self.pad_token_id,
                pad_type_id=self.pad_token_type_id,
                pad_token=self.pad_token,
                length=max_length if padding_strategy == PaddingStrategy.MAX_LENGTH else None,
                pad_to_multiple_of=pad_to_multiple_of,
            )
        rows: list[Encoding] = []  # one per sequence, and per piece of it if the cut off pieces are wanted
        samples: list[int] = []
        for sample, encoding in enumerate(
            self._engine.encode_batch(
                list(batch_text_or_text_pairs),
                add_special_tokens=add_special_tokens,
                is_pretokenized=bool(is_split_into_words),
            )
        ):
            pieces = [encoding, *encoding.overflowing] if return_overflowing_tokens else [encoding]
            rows += pieces
            samples += [sample] * len(pieces)
        data: dict[str, list[Any]] = {"input_ids": [row.ids for row in rows]}
        if self._wanted("token_type_ids", return_token_type_ids):
            data["token_type_ids"] = [row.type_ids for row in rows]
        if self._wanted("attention_mask", return_attention_mask):
            data["attention_mask"] = [row.attention_mask for row in rows]
        if return_position_ids:
            data["position_ids"] = [list(range(len(row.ids))) for row in rows]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if return_offsets_mapping:
            data["offset_mapping"] = [row.offsets for row in rows]
        if return_length:
            data["length"] = [len(row.ids) for row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = samples
        for row in rows:
            self._eventual_warn_about_too_long_sequence(row.ids, max_length, verbose)
        if not return_dict:
            return [{key: values[index] for key, values in data.items()} for index in range(len(rows))]
        return BatchEncoding(data, rows, tensor_type=return_tensors)

    def _wanted(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def save_pretrained(self, save_directory: Any, filename_prefix: str | None = None, **kwargs: Any) -> Any:
        """Write tokenizer.json and its settings, for PaddleNLP and for transformers.

        transformers knows no `ModernBertTokenizer` and does not read what claims to be one: `tokenizer_class` names its
        own generic class, and `init_class`, an older key of PaddleNLP for the same thing, names this one.

        Args:
            save_directory: A folder; created if absent.
            filename_prefix: Put in front of the names of the files with the settings.
            **kwargs: As in PaddleNLP's own tokenizers.

        Returns:
            The names of the files.
        """
        names = super().save_pretrained(save_directory, filename_prefix, **kwargs)
        path = Path(names[0])
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "init_class": type(self).__name__}
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return names

    def save_resources(self, save_directory: str) -> None:
        """Write tokenizer.json, with all tokens that were added since it was read."""
        self._engine.no_padding()
        self._engine.no_truncation()
        self._engine.save(str(Path(save_directory) / self.resource_files_names["tokenizer_file"]))

    def _save_pretrained(
        self, save_directory: Any, file_names: tuple[str, ...], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        self.save_resources(save_directory)
        return (*file_names, str(Path(save_directory) / self.resource_files_names["tokenizer_file"]))


def _engine_token(token: Any) -> AddedToken:
    """PaddleNLP's AddedToken, or one as JSON files spell it, as the engine's."""
    if isinstance(token, AddedToken):
        return token
    flags = token if isinstance(token, dict) else token.__getstate__()
    known = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(flags["content"], **{name: flags[name] for name in known if name in flags})
