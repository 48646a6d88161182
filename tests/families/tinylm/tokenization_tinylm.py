"""Tokenizer of TinyLM: a sentencepiece model with `<s>` and `</s>`."""

from modeling.tokenizer import SentencePieceTokenizer


class TinyLMTokenizer(SentencePieceTokenizer):
    """`<s>` + text; an answer ends with `</s>`."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    released_map = None

    def __init__(self, vocab_file, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", **kwargs):
        super().__init__(
            vocab_file, bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token, **kwargs
        )

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """<s> + ids (+ second ids + </s>)."""
        ids = [self.get_command("<s>"), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.get_command("</s>")]
