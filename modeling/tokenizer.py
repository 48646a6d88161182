"""A sentencepiece tokenizer that never reads control tokens out of a user's text."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

from runtime.exits import UserError

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
NEW_KEYS = ("backend", "is_local", "local_files_only", "model_specific_special_tokens")  # of transformers 5 alone
MOST_TOKEN = 100  # characters of the name of a control token


def is_token(value: Any) -> bool:
    """Is it the name of a control token?"""
    return isinstance(value, str) and 0 < len(value) <= MOST_TOKEN and value.isprintable()


TOKEN = is_token, "the name of a token"
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "gmask_token", "end_token")


class SentencePieceTokenizer(PreTrainedTokenizer):
    """Base of the three tokenizers: text by sentencepiece, control tokens only by id.

    Subclasses set `vocab_files_names`, `appended_tokens` (control tokens numbered after the file's own pieces) and
    `build_inputs_with_special_tokens`; glm1 also has pieces that stand for white space.
    `encode_special_tokens=True` reads control tokens written in text as tokens, as ChatGLM3 offers it.
    """

    model_input_names = ["input_ids", "attention_mask"]
    appended_tokens: tuple[str, ...] = ()
    settings = {  # keys of tokenizer_config.json that are obeyed: (is a value good, rule)
        **dict.fromkeys(TOKEN_NAMES, TOKEN),
        "padding_side": (lambda value: value in ("left", "right"), "left or right"),
        "encode_special_tokens": (lambda value: type(value) is bool, "true or false"),
    }
    # Keys of releases, and of what libraries write, that decide nothing here: text never becomes one of these tokens.
    free_settings = (
        *("name_or_path", "tokenizer_class", "auto_map", "model_max_length", "model_input_names", "processor_class"),
        *("remove_space", "do_lower_case", "clean_up_tokenization_spaces", "split_special_tokens", "use_fast"),
        *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template"),
        *("special_tokens_map_file", "tokenizer_file", "vocab_file", "sp_model_kwargs", *NEW_KEYS),
    )
    # The release's entry for transformers in tokenizer_config.json; None: it has none.
    released_map: list[str | None] | None = ["tokenization_chatglm.ChatGLMTokenizer", None]
    # Settings that the released class cannot be given: it has properties without setters.
    read_only_keys: tuple[str, ...] = ()

    def __init__(
        self, vocab_file: str, padding_side: str = "left", encode_special_tokens: bool = False, **kwargs: Any
    ) -> None:
        # The base class asks for the vocabulary while it starts, so the model comes first.
        self.vocab_file = vocab_file
        self.encode_special_tokens = encode_special_tokens
        try:
            self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{vocab_file}: not a sentencepiece model ({error}): download it again") from None
        self._inner_reader: sentencepiece.SentencePieceProcessor | None = None
        self.num_pieces = self.sp_model.get_piece_size()
        self.token_to_id = {token: self.num_pieces + i for i, token in enumerate(self.appended_tokens)}
        self.id_to_token = {i: token for token, i in self.token_to_id.items()}
        self.control_ids = {i for i in range(self.num_pieces) if self.is_control_piece(i)} | set(self.id_to_token)
        names = sorted(map(self._convert_id_to_token, self.control_ids), key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, names)))
        kwargs.pop("clean_up_tokenization_spaces", None)
        super().__init__(padding_side=padding_side, clean_up_tokenization_spaces=False, **kwargs)

    def is_control_piece(self, token_id: int) -> bool:
        """Pieces that stand for something other than their own text."""
        return self.sp_model.is_control(token_id) or self.sp_model.is_unknown(token_id)

    def normalise(self, text: str) -> str:
        """Text as the sentencepiece model's own normaliser will see it."""
        return text

    def encode_plain(self, text: str, reader: sentencepiece.SentencePieceProcessor) -> list[int]:
        """Ids of a text without control tokens."""
        return reader.encode(text, out_type=int)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, with control tokens in it spelled out as text: no input can produce a control id.

        Each control token is cut after its first character (`<` | `sop>`), so that the model cannot see one piece.
        """
        normal = self.normalise(text)
        if not self.control_pattern.search(normal):
            return self.encode_plain(text, self.sp_model)
        cuts = [0] + [match.start() + 1 for match in self.control_pattern.finditer(normal)] + [len(normal)]
        ids = self.encode_plain(normal[: cuts[1]], self.sp_model)
        for start, end in zip(cuts[1:], cuts[2:]):
            ids += self.encode_plain(normal[start:end], self.inner_reader)
        return ids

    def decode_text(self, ids: list[int]) -> str:
        """Text of ids, control tokens left out: the reverse of `encode_text`."""
        return str(self.decode([i for i in ids if i not in self.id_to_token], skip_special_tokens=True))

    @property
    def inner_reader(self) -> sentencepiece.SentencePieceProcessor:
        """A reader for the middle of a text: it puts no space in front. Made when first needed."""
        if self._inner_reader is None:
            from sentencepiece import sentencepiece_model_pb2

            proto: Any = sentencepiece_model_pb2  # made by protobuf, without hints
            model = proto.ModelProto.FromString(self.sp_model.serialized_model_proto())
            model.normalizer_spec.add_dummy_prefix = False
            model.normalizer_spec.remove_extra_whitespaces = False
            self._inner_reader = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        return self._inner_reader

    def get_command(self, token: str) -> int:
        """Id of a control token, such as `[gMASK]`; KeyError for a name that is none."""
        if token in self.token_to_id:
            return self.token_to_id[token]
        token_id = self.sp_model.piece_to_id(token)
        if token_id not in self.control_ids or self.sp_model.id_to_piece(token_id) != token:
            raise KeyError(f"{token} is not a control token of {self.vocab_file}")
        return token_id

    # What the base class asks of a tokenizer.

    @property
    def vocab_size(self) -> int:
        """Number of pieces and control tokens."""
        return self.num_pieces + len(self.token_to_id)

    def get_vocab(self) -> dict[str, int]:
        vocab = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        vocab.update(self._added_tokens_encoder)
        return vocab

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces of a text; control tokens in it stay text unless `encode_special_tokens` is set."""
        if not self.encode_special_tokens:
            return self._tokenize(text)
        tokens, start = [], 0
        for match in self.control_pattern.finditer(text):
            tokens += [*self._tokenize(text[start : match.start()]), match.group()]
            start = match.end()
        return tokens + self._tokenize(text[start:])

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._convert_id_to_token(i) for i in self.encode_text(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.token_to_id[token] if token in self.token_to_id else self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index in self.id_to_token:
            return self.id_to_token[index]
        # Ids between the vocabulary and the padded embedding are rows that no text reaches.
        return self.sp_model.id_to_piece(index) if 0 <= index < self.num_pieces else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; control tokens that were not skipped appear by name."""
        text = ""
        pieces: list[str] = []
        for token in tokens:
            if token in self.token_to_id:
                text += self.sp_model.decode_pieces(pieces) + token
                pieces = []
            elif token:
                pieces.append(self.piece_text(token))
        return text + self.sp_model.decode_pieces(pieces)

    def piece_text(self, piece: str) -> str:
        """What a piece is to the decoder: itself."""
        return piece

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> tuple[str]:
        """Write the files as they lie in the folder that the tokenizer was read from; new ones have the released keys.

        Keys that stop the released classes are left out of both.
        """
        source = os.path.dirname(self.vocab_file)
        if not os.path.isfile(os.path.join(source, SETTINGS_FILES[0])):
            super().save_pretrained(save_directory, **kwargs)
            more: dict[str, Any] = {"remove_space": False, "do_lower_case": False}
            more |= {"auto_map": {"AutoTokenizer": self.released_map}} if self.released_map else {}
            self.rewrite(save_directory, SETTINGS_FILES[0], ("added_tokens_decoder",), more)
            return self.save_vocabulary(save_directory)
        os.makedirs(save_directory, exist_ok=True)
        for name in filter(lambda name: os.path.isfile(os.path.join(source, name)), SETTINGS_FILES):
            shutil.copyfile(os.path.join(source, name), os.path.join(save_directory, name))
            if name.endswith(".json"):
                self.rewrite(save_directory, name)
        return self.save_vocabulary(save_directory)

    def rewrite(self, folder: str, name: str, less: Sequence[str] = (), more: dict | None = None) -> None:
        """Leave `less` and the keys that stop released classes out of a JSON file, and add `more` {key: value}."""
        path = os.path.join(folder, name)
        with open(path, encoding="utf-8-sig") as file:
            before = json.load(file)
        dropped = {*NEW_KEYS, *self.read_only_keys, *less}
        after = {key: value for key, value in before.items() if key not in dropped} | (more or {})
        if after != before:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(after, file, ensure_ascii=False, indent=2)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the sentencepiece model under its released name."""
        name = self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
