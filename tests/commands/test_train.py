"""train.py inside this process: what it logs, evaluates and saves, against values that are computed another way."""

import json
import math
import os

import pytest
import torch
from reference import GOLDEN_FOLDERS
from safetensors.torch import load_file

import predict
import train
from checkpoints.opening import load_opened, open_checkpoint
from training import setup

BASE = str(GOLDEN_FOLDERS["glm3"])
SHORT = 40  # --max_src_len
# Answers of one length, so that an update's supervised tokens are those of a row, times its rows.
ROWS = [{"instruction": "零件", "input": "风扇" * n, "output": "水温"} for n in (1, 2, 3, 4, 5)]
# Held out: answers of different lengths, the shortest question first, one that is cut.
HELD_OUT = [
    {"instruction": "水", "input": "", "output": "发动机水温高，风扇始终是低速转动"},
    {"instruction": "", "input": "发动机水温高", "output": "高"},
    {"instruction": "", "input": "风扇始终是低速转动" * 20, "output": "动力不足"},
]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


NOTED = {"skipped": []}


class Noting:
    """Stands for the watch over the processes: there is one, and nobody asks it to leave. Notes what it is told."""

    def __init__(self):
        self.asked, self.is_training, self.told = None, False, []

    def start(self, output_dir, step_timeout):
        self.told.append("start")

    def begin(self, step, rows, row_numbers):
        assert self.is_training
        self.told.append((step, len(row_numbers)))

    def pause(self):
        self.told.append("rest")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of the same rows: 9 updates of 2, 2 and 1 rows; with dropout."""
    folder = tmp_path_factory.mktemp("train")
    write(folder / "rows.json", ROWS)
    write(folder / "eval.json", HELD_OUT)
    common = f"--train_path {folder}/rows.json --model_name_or_path {BASE} --mode glm3 --train_type lora --lora_dim 4"
    common += f" --lora_alpha 8 --lora_dropout 0.3 --lora_module_name query_key_value,dense --max_src_len {SHORT}"
    common += " --max_len 300 --per_device_train_batch_size 2 --num_train_epochs 3 --learning_rate 1e-2 --device cpu"
    common += " --lr_scheduler_type linear --warmup_ratio 0 --save_total_limit 2"
    held_out = f" --eval_path {folder}/eval.json --eval_step 2"
    before, patch, num_threads = dict(os.environ), pytest.MonkeyPatch(), torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for two
    # DeepSpeed keeps the process group: one serves all runs.
    start = setup.start_distributed
    patch.setattr(setup, "start_distributed", lambda *values: torch.distributed.is_initialized() or start(*values))
    patch.setattr(train, "stop_distributed", lambda engine: engine.destroy())
    patch.setattr(train, "check_skipped", lambda *values: NOTED["skipped"].append(values[:3]))
    for name, more in (
        ("plain", " --show_loss_step 1"),
        ("evaluated", f" --show_loss_step 2{held_out}"),
        ("answered", f" --show_loss_step 9{held_out} --eval_generate --eval_max_new_tokens 6"),
    ):
        NOTED[name] = Noting()
        train.main(f"{common} --output_dir {folder}/{name}{more}".split(), NOTED[name])
    ptuning = f"--train_path {folder}/rows.json --model_name_or_path {BASE} --train_type ptuning --pre_seq_len 3"
    ptuning += f" --max_len 300 --max_src_len {SHORT} --per_device_train_batch_size 1 --gradient_accumulation_steps 3"
    ptuning += f" --num_train_epochs 1 --learning_rate 0.5 --device cpu --output_dir {folder}/prefix --seed 5"
    ptuning += " --show_loss_step 1"
    train.main(ptuning.split(), Noting())
    yield folder
    patch.undo()
    torch.set_num_threads(num_threads)
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def test_evaluating_changes_no_weight(runs):
    """Bit for bit with dropout: without held-out rows, with their loss alone, and with answers."""
    names = ("plain", "evaluated", "answered")
    weights = [load_file(runs / name / "epoch-3-step-9" / "adapter_model.safetensors") for name in names]
    for other in weights[1:]:
        assert set(other) == set(weights[0])
        assert all(torch.equal(other[name], weights[0][name]) for name in other)
    assert any(tensor.abs().sum() > 0 for name, tensor in weights[0].items() if "lora_B" in name)


def test_the_log_says_what_was_done(runs):
    """Kind: figures of the log, each against a value by hand. The rate is that of the update; a window is its own."""
    plain = read(runs / "plain" / "train_log.jsonl")
    assert [line["step"] for line in plain] == list(range(1, 10))
    assert [line["learning_rate"] for line in plain] == pytest.approx([1e-2 * (1 - n / 9) for n in range(9)])
    assert [line["epoch"] for line in plain] == pytest.approx([n / 3 for n in range(1, 10)])
    losses = [line["loss"] for line in plain]
    assert len(set(losses)) == 9
    num_rows = [2, 2, 1] * 3
    for name, ends in (("evaluated", [2, 4, 6, 8, 9]), ("answered", [9])):
        log = read(runs / name / "train_log.jsonl")
        assert [line["step"] for line in log] == ends
        for start, line in zip([0, *ends], log):
            window = range(start, line["step"])
            mean = sum(losses[n] * num_rows[n] for n in window) / sum(num_rows[n] for n in window)
            assert line["loss"] == pytest.approx(mean, rel=1e-9)
            assert line["learning_rate"] == pytest.approx(1e-2 * (1 - (line["step"] - 1) / 9))


def test_the_loss_of_the_first_update(runs):
    """Without training and without dropout's draw it would be the base's; with it, it is near."""
    model, tokenizer = load_opened(open_checkpoint(BASE, "glm3"), torch.float32, torch.device("cpu"))
    base = [row_loss(model, tokenizer, row) for row in ROWS]
    first = read(runs / "plain" / "train_log.jsonl")[0]["loss"]
    per_row = [total / count for total, count in base]
    assert min(per_row) - 1e-4 <= first <= max(per_row) + 1e-4  # lora_B is 0 before the first update
    assert {count for _, count in base} == {base[0][1]}


def row_loss(model, tokenizer, row):
    """(summed loss, supervised tokens) of a row, in plain torch, from the ids as the prompt is documented."""
    text = row["instruction"] + row["input"]
    question = tokenizer.encode_text("\n") + tokenizer.encode_text(text)
    ids = [tokenizer.get_command(name) for name in ("[gMASK]", "sop")]
    ids += [tokenizer.get_command("<|user|>"), *question][:SHORT]
    answer = [tokenizer.get_command("<|assistant|>"), *tokenizer.encode_text("\n")]
    answer += [*tokenizer.encode_text(row["output"]), tokenizer.get_command("</s>")]
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer])).logits[0].float()
    found = torch.nn.functional.cross_entropy(logits[len(ids) - 1 : -1], torch.tensor(answer), reduction="sum")
    return found.item(), len(answer)


def test_the_loss_over_held_out_rows(runs):
    """By hand from the saved weights: the sum over all supervised tokens, by their number; after the last step, too."""
    log = read(runs / "evaluated" / "eval_log.jsonl")
    assert [line["step"] for line in log] == [2, 4, 6, 8, 9]
    for step in (6, 9):
        folder = runs / "evaluated" / f"epoch-{step // 3}-step-{step}"
        model, tokenizer = load_opened(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
        sums, counts = zip(*(row_loss(model, tokenizer, row) for row in HELD_OUT))
        assert len(set(counts)) == 3
        [line] = [line for line in log if line["step"] == step]
        assert line["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert [line["loss"] for line in log] == [line["loss"] for line in read(runs / "answered" / "eval_log.jsonl")]


def test_answers_while_training_are_those_of_predict(runs, tmp_path):
    """In the rows' order, with questions cut as in the training, and at most so many tokens."""
    kept = read(runs / "answered" / "eval-step-9.jsonl")
    words = ["--model_path", str(runs / "answered" / "epoch-3-step-9"), "--test_path", str(runs / "eval.json")]
    words += ["--max_src_len", str(SHORT), "--max_new_tokens", "6", "--output_path", str(tmp_path / "p.jsonl")]
    predict.main(words)
    lines = read(tmp_path / "p.jsonl")
    assert [line["output"] for line in kept] == [row["output"] for row in HELD_OUT]
    assert [line["prediction"] for line in kept] == [line["prediction"] for line in lines]
    assert len({line["prediction"] for line in lines}) == 3, "answers that are alike would prove little"
    assert "发动机水温高" in (runs / "answered" / "eval-step-9.jsonl").read_text(encoding="utf-8"), "text for readers"
    assert "source_tokens_cut" in lines[2] and "source_tokens_cut" not in lines[0]
    predict.main([*words, "--max_src_len", "300", "--overwrite"])
    assert read(tmp_path / "p.jsonl")[2]["prediction"] != lines[2]["prediction"], "the cut does not matter here"


def test_best_weights_newest_checkpoints_and_last_event_are_kept(runs):
    """The best value's weights, the newest checkpoints, the last event."""
    log = read(runs / "evaluated" / "eval_log.jsonl")
    best = min(log, key=lambda line: line["loss"])
    run = json.loads((runs / "evaluated" / "best" / "run.json").read_text(encoding="utf-8"))
    assert (run["step"], run["scores"]) == (best["step"], {"loss": best["loss"]})
    assert run["epoch"] == -(-best["step"] // 3) and run["flags"]["seed"] == 1234
    for name in ("plain", "evaluated"):
        assert sorted(path.name for path in (runs / name).glob("epoch-*")) == ["epoch-2-step-6", "epoch-3-step-9"]
        last = read(runs / name / "events.jsonl")[-1]
        assert (last["event"], last["step"]) == ("done", 9) and math.isfinite(last["tokens_per_second"])
        assert (last["trained_weights"], last["best_step"]) == (
            sum(t.numel() for t in load_file(runs / name / "epoch-3-step-9/adapter_model.safetensors").values()),
            best["step"] if name == "evaluated" else 0,
        )


def test_the_watch_is_told_of_every_step_and_its_rows(runs):
    """Each step with its rows, and when it rests; the updates left out are looked at after every one."""
    for name in ("plain", "evaluated", "answered"):
        told = NOTED[name].told
        assert told[0] == "start" and NOTED[name].is_training
        assert told[1:] == [part for step in range(1, 10) for part in ((step, 1 if step % 3 == 0 else 2), "rest")]
    assert NOTED["skipped"][:9] == [(0, step, "fp32") for step in range(1, 10)]


def read_flags(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["flags"]


def test_a_prefix_that_was_trained(runs):
    """A new prefix encoder follows the seed, is trained and saved: two updates, of three rows and of two."""
    log = read(runs / "prefix" / "train_log.jsonl")
    assert [line["step"] for line in log] == [1, 2] and log[1]["learning_rate"] > 0
    # The sum over three micro-batches, not the last one's: an untrained prefix moves the loss, but not to a third.
    model, tokenizer = load_opened(open_checkpoint(BASE, "glm3"), torch.float32, torch.device("cpu"))
    base = [total / count for total, count in (row_loss(model, tokenizer, row) for row in ROWS)]
    assert 0.7 * min(base) < log[0]["loss"] < 1.4 * max(base)
    folder = runs / "prefix" / "epoch-1-step-2"
    saved = load_file(folder / "prefix_encoder.safetensors")
    parameters = dict(
        load_opened(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))[0].named_parameters()
    )
    assert saved and all(torch.equal(parameters[name], tensor) for name, tensor in saved.items())
    [table] = [tensor for name, tensor in saved.items() if name.endswith("embedding.weight")]
    assert len(table) == 3
    assert (len(saved) > 1) == read_flags(folder)["prefix_projection"]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (run["mode"], run["train_type"], run["weights"], run["epoch"]) == ("glm3", "ptuning", "prefix", 1)
