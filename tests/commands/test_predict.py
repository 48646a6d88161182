"""predict.py and merge_lora.py on small checkpoints, inside this process."""

import builtins
import json

import pytest
import torch
from launching import check_done, free_port, run_command
from predicting import answers, write_rows
from reference import GOLDEN_FOLDERS

import merge_lora
import predict
from checkpoints.saving import describe_run, save_checkpoint
from generation import answerer as generation_answerer
from generation import prediction_file
from train_types import TRAIN_TYPES


@pytest.fixture(scope="module")
def adapter(golden, tmp_path_factory):
    """A saved LoRA adapter with a visible effect."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    args = SimpleNamespace(
        mode=golden.mode.name,
        train_type="lora",
        model_name_or_path=golden.folder,
        lora_dim=4,
        lora_alpha=16,
        lora_dropout=0.0,
        lora_module_name="query_key_value,dense_4h_to_h",
    )
    model = TRAIN_TYPES["lora"].prepare(golden.model(), args, golden.mode)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("run") / "epoch-1-step-1"
    run = describe_run(args, golden.folder, "fp32", epoch=1, step=1)
    save_checkpoint(model, golden.tokenizer(), str(folder), TRAIN_TYPES["lora"], run, zero3=False)
    return folder


def test_a_batch_answers_like_single_rows(golden, tmp_path):
    rows = write_rows(tmp_path / "rows.json")
    single = answers(golden.folder, rows, tmp_path / "one.jsonl", "--batch_size", "1")
    batch = answers(golden.folder, rows, tmp_path / "batch.jsonl", "--batch_size", "4")
    assert single == batch
    assert [line["index"] for line in batch] == list(range(5))
    assert set(batch[0]) == {"index", "query", "output", "prediction", "stopped", "cut", "empty", "repeated"}
    assert not list(tmp_path.glob("*.partial"))


def test_several_sampled_answers_repeat_with_the_seed(golden, tmp_path):
    rows = write_rows(tmp_path / "rows.json", 2)
    flags = ["--do_sample", "--num_return_sequences", "3", "--temperature", "1.5", "--top_p", "1.0", "--seed"]
    first, again, other = (
        answers(golden.folder, rows, tmp_path / f"{i}.jsonl", *flags, seed) for i, seed in enumerate(["5", "5", "6"])
    )
    assert first == again != other
    assert all(len(line["predictions"]) == 3 == len(line["stopped"]) for line in first)


def test_merged_model_answers_like_the_adapter(golden, adapter, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.json")
    merged = tmp_path / "merged"
    merge_lora.main(["--model_dir", str(adapter), "--output_dir", str(merged), "--precision", "fp32"])
    assert "differ by at most" in capsys.readouterr().out
    files = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "run.json", "tokenizer_config.json", "manifest.json"} < files
    assert len(files) == 6
    base = answers(golden.folder, rows, tmp_path / "base.jsonl")
    from_adapter = answers(adapter, rows, tmp_path / "adapter.jsonl")
    from_merged = answers(merged, rows, tmp_path / "merged.jsonl")
    assert from_adapter == from_merged != base
    check = json.loads((merged / "run.json").read_text())["merge_check"]
    assert check["max_difference"] < 1e-4 * check["max_logit"] < check["adapter_effect"]


def test_merge_keeps_the_base_precision(golden, adapter, tmp_path):
    from checkpoints.weight_files import weight_shapes

    merge_lora.main(["--model_dir", str(adapter), "--output_dir", str(tmp_path / "merged")])
    assert {dtype for _, dtype in weight_shapes(str(tmp_path / "merged")).values()} == {"F16"}


def test_prompt_and_conversation(golden, capsys, monkeypatch):
    common = ["--model_path", golden.folder, "--max_new_tokens", "4"]
    predict.main([*common, "--prompt", "你好"])
    alone = capsys.readouterr().out.strip()
    lines = iter(["你好", "再见", "/clear", "你好", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    predict.main([*common, "--interactive"])
    said = capsys.readouterr().out
    assert said.count(alone) >= 2, "the first turn, and again after /clear"


def test_default_output_is_named_after_model_and_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.json", 1)
    predict.main(["--model_path", str(GOLDEN_FOLDERS["glm2"]), "--test_path", rows, "--max_new_tokens", "2"])
    assert (tmp_path / "predictions" / "glm2" / "rows.jsonl").exists()


def test_rows_without_answers_are_predicted(tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "说", "input": "你好"}]', encoding="utf-8")
    [line] = answers(GOLDEN_FOLDERS["glm3"], str(tmp_path / "rows.json"), tmp_path / "p.jsonl")
    assert "output" not in line and isinstance(line["prediction"], str)


def test_an_interrupted_run_is_gone_on_with(tmp_path, monkeypatch, capsys):
    """What is answered is not answered again; a torn line is; answers of other flags are refused."""
    rows = write_rows(tmp_path / "rows.json")
    model, output = GOLDEN_FOLDERS["glm3"], tmp_path / "p.jsonl"
    whole = answers(model, rows, tmp_path / "whole.jsonl", "--batch_size", "1")
    asked = []
    call = generation_answerer.Answerer.__call__

    def until_the_fourth(self, encoded):
        asked.append(len(encoded))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return call(self, encoded)

    monkeypatch.setattr(generation_answerer.Answerer, "__call__", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        answers(model, rows, output, "--batch_size", "1")
    part = tmp_path / "p.jsonl.rank0.partial"
    part.write_bytes(part.read_bytes()[:-20])  # killed while it wrote the third line
    with pytest.raises(ValueError, match=r"p.jsonl.rank0.partial: answers of an interrupted run with another model"):
        answers(model, rows, output, "--batch_size", "1", "--max_src_len", "20")
    (tmp_path / "p.jsonl.rank1.partial").write_text("")  # of a process that was killed before it wrote
    assert answers(model, rows, output, "--batch_size", "2") == whole
    assert asked[4:] == [2, 1], "three rows were left"
    text = capsys.readouterr().out
    assert "2 of 5 rows are answered already" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "rows.json", "whole.jsonl"]


@pytest.mark.parametrize(
    "text, is_loop",
    [
        ("好" * 20, True),
        ("转向系统_组成_球头\n" * 4, True),
        ("好" * 19, False),
        ("一二三四五六七八九十" * 3, False),
        ("", False),
        ("一二三四五六七" * 3, False),  # of twenty characters and more, but three times
        ("abcdefghi " * 4, True),  # its last character may have been a blank
        (("abcdefghi " * 4)[:-2], False),
        ("一二三四五 " * 4, True),
        ("一二三四 " * 4, False),  # nineteen characters
        ("".join(map(chr, range(0x4E00, 0x4E00 + 100))) * 4, True),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 101))) * 4, False),
    ],
)
def test_loops_are_found(text, is_loop):
    assert prediction_file.is_repeated("开头。" + text) == is_loop
    assert prediction_file.is_repeated(text) == is_loop  # one that repeats itself from its first character on


@pytest.mark.launch
def test_two_processes_answer_like_one(tmp_path):
    rows = write_rows(tmp_path / "rows.json", 7)
    model = GOLDEN_FOLDERS["glm"]
    alone = answers(model, rows, tmp_path / "one.jsonl", "--batch_size", "2")
    process = run_command(
        f"deepspeed --num_accelerators 2 --master_port {free_port()} predict.py --model_path {model}"
        f" --test_path {rows} --output_path two.jsonl --max_new_tokens 8 --batch_size 2",
        tmp_path,
    )
    check_done(process)
    assert [json.loads(line) for line in (tmp_path / "two.jsonl").read_text(encoding="utf-8").splitlines()] == alone
    assert not list(tmp_path.glob("*.partial"))


class Planned:
    """Stands for a model: answers with the ids that it was given, and keeps what it was asked."""

    device = torch.device("cpu")

    def __init__(self, new_ids):
        self.new_ids, self.asked = torch.tensor(new_ids), None

    def generate(self, input_ids, **asked):
        self.asked = {"input_ids": input_ids, **asked}
        return torch.cat([input_ids.repeat_interleave(len(self.new_ids) // len(input_ids), dim=0), self.new_ids], dim=1)


def answerer(model, *flags):
    """An Answerer of glm3 with flags of predict.py."""
    from flags.predict import predict_parser
    from modes import MODES

    mode = MODES["glm3"]
    tokenizer = mode.tokenizer_class.from_pretrained(GOLDEN_FOLDERS["glm3"])
    args = predict_parser().parse_args(["--model_path", "x", "--prompt", "x", "--max_src_len", "64", *flags])
    settings = generation_answerer.DecodingSettings.from_flags(args)
    return generation_answerer.Answerer(model, tokenizer, mode.prompt, settings)


def test_where_an_answer_ends():
    """An answer is its text up to the first id that ends it, and stopped; without one it is cut at its last id.

    Kind: a test that holds whatever the values are, such as that cut is the opposite of stopped.
    """
    tokenizer = answerer(None).tokenizer
    a, b = (tokenizer.encode_text(text) for text in ("水温高", "风扇"))
    user, end, pad = tokenizer.get_command("<|user|>"), tokenizer.get_command("</s>"), tokenizer.pad_token_id
    length = 1 + max(len(a), len(b))
    new_ids = [
        [*a, end] + [pad] * (length - len(a) - 1),
        ([*b] * length)[:length],
        [user] + [*b, *[pad] * length][: length - 1],
        ([*a, user] + [end] * length)[:length],
    ]
    model = Planned(new_ids)
    answer = answerer(model, "--num_return_sequences", "2", "--do_sample")
    first, second = answer([([5, 6, 7], 4), ([8], 0)])
    cut = tokenizer.decode_text(([*b] * length)[:length]).strip()
    assert first == {"predictions": ["水温高", cut], "stopped": [True, False], "source_cut": 4}
    assert second == {"predictions": ["", "水温高"], "stopped": [True, True], "source_cut": 0}
    assert model.asked["input_ids"].tolist() == [[5, 6, 7], [pad, pad, 8]]
    assert model.asked["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    line = prediction_file.output_row(3, {"query": "问", "answer": "答"}, first)
    assert (line["stopped"], line["cut"], line["empty"]) == ([True, False], [False, True], [False, False])
    assert (line["index"], line["source_tokens_cut"], line["predictions"]) == (3, 4, ["水温高", cut])
    line = prediction_file.output_row(
        0, {"query": "问", "answer": None}, {"predictions": [" "], "stopped": [False], "source_cut": 0}
    )
    assert line == {
        "index": 0,
        "query": "问",
        "prediction": " ",
        "stopped": False,
        "cut": True,
        "empty": True,
        "repeated": False,
    }


def test_every_decoding_flag_reaches_generate():
    """Kind: a flag that is taken and not obeyed. Greedy search has none of the three of sampling."""
    usual = ["--max_new_tokens", "9", "--repetition_penalty", "1.25"]
    sampling = ["--do_sample", "--temperature", "0.7", "--top_p", "0.6", "--top_k", "11"]
    stop = answerer(None).tokenizer.get_command("</s>")
    for flags, wanted, is_ours in (
        ([], {"num_beams": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}, True),
        (sampling, {"do_sample": True, "temperature": 0.7, "top_p": 0.6, "top_k": 11}, True),
        (["--num_beams", "3", "--num_return_sequences", "1"], {"num_beams": 3, "num_return_sequences": 1}, False),
    ):
        model = Planned([[stop]])
        answerer(model, *usual, *flags)([([5], 0)])
        settings = model.asked["generation_config"]
        wanted |= {"max_new_tokens": 9, "repetition_penalty": 1.25, "pad_token_id": 0}
        assert {name: getattr(settings, name) for name in wanted} == wanted
        assert settings.eos_token_id[0] == stop and len(settings.eos_token_id) == 3
        assert (model.asked["custom_generate"] is predict_decode()) == is_ours and model.asked["synced_gpus"] is False


def predict_decode():
    from generation.decoding import decode

    return decode


# Flags that may differ between an interrupted run and the one that goes on with its answers.
FREE = "test_path output_path overwrite batch_size batch_tokens local_rank device prompt allow_other_base".split()


def test_what_an_interrupted_run_may_change(tmp_path):
    """Kind: a list of exceptions that one more would not show. Every other flag, the rows and the files decide."""
    from argparse import Namespace

    from flags.predict import predict_parser

    args = vars(predict_parser().parse_args(["--model_path", "x", "--prompt", "x"]))
    assert set(FREE) < set(args)
    folders = Namespace(folder=str(tmp_path / "a"), base_folder=str(tmp_path / "b"))
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("xx")
    rows = [{"query": "问", "answer": "答"}]

    def key(rows=rows, precision="fp32", **changes):
        return prediction_file.key_of(Namespace(**{**args, **changes}), folders, rows, precision)

    first = key()
    for name in args:
        if name != "precision":
            assert (key(**{name: "another"}) == first) == (name in FREE), name
    assert first not in (key(precision="bf16"), key(rows * 2), key([{**rows[0], "answer": None}]))
    for name in "ab":
        before = key()
        (tmp_path / name / "weights").write_text("xxx")
        assert key() != before


def test_a_merged_model_that_answers_otherwise_is_not_saved():
    """A thousandth of the largest logit, or of 1 where that is smaller; what is not finite is no agreement."""
    base, adapter = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, -40.0]])
    check = merge_lora.compare(base, adapter, adapter + 0.039, adapter - 0.5)
    found = [check[name] for name in ("max_difference", "max_difference_saved", "adapter_effect", "max_logit")]
    assert found == pytest.approx([0.039, 0.5, 41, 40], rel=1e-3)
    small = torch.tensor([0.5, -0.25])
    merge_lora.compare(small, small, small + 0.0009, small)
    for adapted, merged in ((adapter, adapter + 0.041), (small, small - 0.0011), (small, small * float("nan"))):
        with pytest.raises(ValueError, match="merged logits differ from the adapter's by .*: nothing was saved"):
            merge_lora.compare(base, adapted, merged, adapted)


def test_the_rates_are_of_all_answers():
    """By hand: of four answers in three rows three stopped, one was cut and is empty, another one is a loop."""
    row = {"query": "问", "answer": None}
    lines = [
        prediction_file.output_row(0, row, {"predictions": ["水", " "], "stopped": [True, False], "source_cut": 5}),
        prediction_file.output_row(1, row, {"predictions": ["好" * 20], "stopped": [True], "source_cut": 0}),
        prediction_file.output_row(2, row, {"predictions": ["风"], "stopped": [True], "source_cut": 12}),
    ]
    said = "75.0% stopped by themselves, 25.0% cut at --max_new_tokens 7, 25.0% empty, 25.0% end in a loop"
    assert prediction_file.describe_answers(lines, 7) == f"answers: {said}"
    assert prediction_file.describe_answers([], 7).startswith("answers: 0.0% stopped")
    said = "cut 2 of 3 at --max_src_len 64: 17 tokens lost, 12 of the longest (source_tokens_cut)"
    assert prediction_file.describe_cut_questions(lines, 64) == f"questions: {said}"
    assert prediction_file.describe_cut_questions(lines[1:2], 64) == "questions: none was cut at --max_src_len 64"
