"""Making a prompt fit its room, alike in all families."""


def fit_turns(encode, history, max_src_len):
    """Ids of `encode(history)`, the oldest turns left out until they fit `max_src_len` (None: no limit)."""
    history = list(history)
    ids = encode(history)
    while history and max_src_len is not None and len(ids) > max_src_len:
        history.pop(0)
        ids = encode(history)
    return ids


def cut_question(ids, max_src_len, num_tail):
    """(ids cut to `max_src_len`, number cut away); the last `num_tail` ids, which close the prompt, stay."""
    if max_src_len is None or len(ids) <= max_src_len:
        return ids, 0
    assert max_src_len > num_tail, (max_src_len, num_tail)
    return ids[: max_src_len - num_tail] + ids[len(ids) - num_tail :], len(ids) - max_src_len


def num_tail_ids(tokenizer, tail):
    """Number of ids that `tail` takes at the end of a text."""
    return len(tokenizer.encode_text("x" + tail)) - len(tokenizer.encode_text("x"))
