"""Tokenizer of ChatGLM2-6B (`tokenizer.model`): byte-fallback pieces, then control tokens by number."""

from modeling.tokenizer import SentencePieceTokenizer


class ChatGLMTokenizer(SentencePieceTokenizer):
    """`[gMASK] sop` + text; unknown and padding are id 0, the end token is `</s>` (2)."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    appended_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    read_only_keys = ("bos_token", "eos_token", "unk_token", "pad_token")

    def __init__(self, vocab_file, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", **kwargs):
        super().__init__(
            vocab_file, bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token, **kwargs
        )

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """[gMASK] sop + ids (+ second ids + </s>)."""
        ids = [self.get_command("[gMASK]"), self.get_command("sop")] + token_ids_0
        return ids if token_ids_1 is None else ids + token_ids_1 + [self.get_command("</s>")]
