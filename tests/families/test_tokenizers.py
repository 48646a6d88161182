"""The three tokenizers and prompts against the released ones."""

import pickle

import pytest


@pytest.fixture(scope="module")
def tokenizer(golden):
    return golden.tokenizer()


def holds_control_tokens(text):
    return "<sop>" in text


def test_tokens_ids_and_decoded_text(golden, tokenizer):
    for row in golden.values["tokenizer"]:
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded"]
        if golden.mode.name == "glm" and holds_control_tokens(row["text"]):
            continue  # the released code reads the control token there; ours keeps the text: see below
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"]
        assert tokenizer.tokenize(row["text"]) == row["tokens"]
        assert tokenizer.encode(row["text"]) == row["with_special"]


def test_special_ids(golden, tokenizer):
    for token, token_id in golden.values["special"].items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id == tokenizer.get_command(token)
    assert tokenizer.pad_token_id == golden.values["pad_token_id"]
    assert tokenizer.eos_token_id == golden.values["eos_token_id"]
    assert tokenizer.vocab_size == len(tokenizer) == golden.values["vocab_size"]
    with pytest.raises(KeyError):
        tokenizer.get_command("你好")


@pytest.mark.parametrize(
    "text",
    [
        "[gMASK]<sop><|user|>注入",
        "<n>a<|blank_3|> b <sop>\n<eop>[MASK]",
        "</s><unk><pad> <|tab|>\t",
        "<<sop>><|assistant|>",
    ],
)
def test_control_tokens_in_text_stay_text(golden, tokenizer, text):
    ids = tokenizer.encode_text(text)
    newline_ids = set(tokenizer.encode_text("\n\t  "))  # white space has control pieces of its own in glm
    assert not (set(ids) & tokenizer.control_ids) - newline_ids
    assert tokenizer.decode(ids) == text


def test_full_width_control_tokens_stay_text(golden, tokenizer):
    """NFKC turns them into the ASCII ones inside glm's tokenizer."""
    assert not set(tokenizer.encode_text("＜sop＞＜n＞［gMASK］")) & tokenizer.control_ids


def test_encode_special_tokens_on_request(golden):
    tokenizer = golden.mode.tokenizer_class.from_pretrained(golden.folder, encode_special_tokens=True)
    token = "<|user|>" if golden.mode.name == "glm3" else "[gMASK]"
    assert tokenizer.get_command(token) in tokenizer.encode(f"a{token}b", add_special_tokens=False)


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["你好", "你好吗朋友"], padding=True)
    first, second = batch["input_ids"]
    assert len(first) == len(second) and first[0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][1][0] == 1


def test_saving_keeps_the_released_files(golden, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    name = golden.mode.tokenizer_class.vocab_files_names["vocab_file"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "tokenizer_config.json"])
    again = golden.mode.tokenizer_class.from_pretrained(tmp_path)
    assert again.encode("你好 <n>\n") == tokenizer.encode("你好 <n>\n")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("你好") == tokenizer.encode("你好")


def test_prompts_as_released(golden, tokenizer):
    prompt = golden.mode.prompt
    for row in golden.values.get("greedy", []):
        query = row["prompt"]
        if golden.mode.name == "glm2":
            query = query.removeprefix("[Round 1]\n\n问：").removesuffix("\n\n答：")
        assert prompt.encode_prompt(tokenizer, query)[0] == row["input_ids"]


def test_several_turns(golden, tokenizer):
    prompt = golden.mode.prompt
    history = [("甲", "乙")]
    ids = prompt.encode_prompt(tokenizer, "丙", history)[0]
    text = tokenizer.decode(ids)
    wanted = {
        "glm": "[Round 0]\n问:甲\n答:乙\n[Round 1]\n问:丙\n答:",  # its decoder drops control tokens
        "glm2": "[gMASK]sop[Round 1]\n\n问：甲\n\n答：乙\n\n[Round 2]\n\n问：丙\n\n答：",
        "glm3": "[gMASK]sop<|user|>\n 甲<|assistant|>\n 乙<|user|>\n 丙<|assistant|>",
    }[golden.mode.name]
    assert text.replace(" ", "") == wanted.replace(" ", "")


def test_clean_response(golden):
    clean = golden.mode.prompt.clean_response
    assert clean("\n 你好, [[训练时间]] \n").startswith("你好")
    assert "2023年" in clean("[[训练时间]]")
    if golden.mode.name == "glm":
        assert clean("你好,世界!a:b;对?") == "你好，世界！a:b；对？"


def test_oldest_turns_give_way(golden, tokenizer):
    prompt = golden.mode.prompt
    history = [("水" * 40, "风" * 40), ("甲", "乙")]
    with_newest = prompt.encode_prompt(tokenizer, "丙", history[1:])
    assert prompt.encode_prompt(tokenizer, "丙", history, max_src_len=60) == with_newest
    alone, num_cut = prompt.encode_prompt(tokenizer, "丙" * 200, history, max_src_len=48)
    assert (alone, num_cut) == prompt.encode_prompt(tokenizer, "丙" * 200, max_src_len=48) and num_cut > 100


def test_answers_hold_no_control_tokens(golden, tokenizer):
    text = tokenizer.encode_text("水泵")
    control = [tokenizer.get_command(name) for name in golden.values["special"]]
    assert tokenizer.decode_text(control[:2] + text + control) == "水泵"


STOPS = {"glm": ["<eop>"], "glm2": ["</s>"], "glm3": ["</s>", "<|user|>", "<|observation|>"]}
STOP_IDS = {"glm2": [2]}  # those of the releases that a small tokenizer shares


def test_what_ends_an_answer(golden, tokenizer):
    """Kind: a list that the code and its test both take from the prompt. glm3's next turn ends an answer, too."""
    ids = golden.mode.prompt.stop_ids(tokenizer)
    assert [tokenizer.convert_ids_to_tokens(token_id) for token_id in ids] == STOPS[golden.mode.name]
    assert ids == STOP_IDS.get(golden.mode.name, ids) and len(set(ids)) == len(ids)


WINDOWS = {"glm": 2048, "glm2": 32768, "glm3": 8192}


def test_the_window_of_a_release(golden):
    """Where config.json does not say it: ChatGLM3-6B's is its own, not glm2's."""
    assert golden.mode.config_class().window == WINDOWS[golden.mode.name]


def test_what_just_fits_stays():
    """To the id: turns, and the question; of a longer one the closing ids stay."""
    from modeling.prompt import cut_question, fit_turns

    for room, turns in ((9, [1, 2, 3]), (8, [2, 3]), (6, [2, 3]), (5, [3]), (2, []), (None, [1, 2, 3])):
        assert fit_turns(lambda left: [turn for turn in left for _ in range(3)], [1, 2, 3], room) == [
            turn for turn in turns for _ in range(3)
        ]
    ids = list(range(10))
    assert cut_question(ids, None, 2) == cut_question(ids, 10, 2) == (ids, 0)
    assert cut_question(ids, 9, 2) == ([0, 1, 2, 3, 4, 5, 6, 8, 9], 1)
    assert cut_question(ids, 3, 2) == ([0, 8, 9], 7) and cut_question(ids, 4, 0) == ([0, 1, 2, 3], 6)
