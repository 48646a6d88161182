"""Prompt of TinyLM, for training and prediction alike: `<s>` question `</s>` answer `</s>`."""

from modeling.prompt import cut_question, fit_turns

RESERVED = 3  # ids of a row that are neither source nor answer: <s> </s> </s>
SUPERVISED_PROMPT_IDS = 0  # the row is trained from the answer on


def encode_prompt(tokenizer, query, history=(), max_src_len=None):
    """(ids of the generation prompt, number of ids of the question cut away). history: earlier (query, answer) pairs.

    The oldest turns give way first, then the end of the question.
    """

    def messages(turns):
        end = tokenizer.get_command("</s>")
        said = [text for turn in turns for text in turn] + [query]
        return [token_id for text in said for token_id in (*tokenizer.encode_text(text), end)][:-1]

    ids, num_cut = cut_question(fit_turns(messages, history, max_src_len), max_src_len, num_tail=0)
    return [tokenizer.get_command("<s>"), *ids, tokenizer.get_command("</s>")], num_cut


def encode_answer(tokenizer, answer):
    """Ids of the answer text, without its end."""
    return tokenizer.encode_text(answer)


def stop_ids(tokenizer):
    """Ids that end an answer; the first one closes training rows."""
    return [tokenizer.get_command("</s>")]


def clean_response(text):
    """Decoded text as it is."""
    return text.strip()
