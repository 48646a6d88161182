"""Evaluation while training: it changes nothing, chooses the best checkpoint, stops in time; rows held out, mixed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from reference import GOLDEN_FOLDERS, ROOT
from safetensors.torch import load_file

from checkpoints.bases import base_fingerprint
from checkpoints.opening import read_config
from data_set import RowSet, hold_out, mix, texts_of
from evaluation.round_trip import come_back
from modes import MODES
from runtime.folders import is_whole
from training.evaluation import Evaluation


@pytest.mark.parametrize("every, due", [(0, [3, 6, 9, 10]), (2, [2, 4, 6, 8, 10]), (3, [3, 6, 9, 10])])
def test_evaluation_is_due_at_its_steps_and_after_the_last(every, due):
    """At each epoch's end, or every so many updates; and always after the last one."""
    evaluation = Evaluation(SimpleNamespace(eval_step=every, eval_generate=False), None, None, None)
    assert [step for step in range(1, 11) if evaluation.is_due(step, step % 3 == 0, step == 10)] == due


class Rows:
    """Stands for EncodedRows."""

    def __init__(self, name, lengths):
        self.key, self.bad_rows, self.name = name, [f"{name} has a bad row"], name
        self.lengths = numpy.array(lengths)
        self.num_labels = self.lengths - 1

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, n):
        return f"{self.name}[{n}]"

    def place(self, n):
        return f"{self.name}:{n + 1}"


def test_rows_are_chosen_and_joined():
    a, b = Rows("a", [5, 6, 7]), Rows("b", [8, 9])
    rows = RowSet([(a, [2, 0]), (b, [1, 1])])
    assert [rows[n] for n in range(len(rows))] == ["a[2]", "a[0]", "b[1]", "b[1]"] and rows[-1] == "b[1]"
    assert [rows.place(n) for n in (0, 3)] == ["a:3", "b:2"]
    assert rows.lengths.tolist() == [7, 5, 9, 9] and rows.num_labels.tolist() == [6, 4, 8, 8]
    assert rows.key == "a+b" and len(rows.bad_rows) == 2
    assert RowSet([(a, []), (b, [1])]).lengths.tolist() == [9], "a part may be empty"
    with pytest.raises(IndexError):
        rows[4]


def test_rows_are_held_out():
    rows = Rows("a", range(2, 22))
    kept, held_out = hold_out(rows, 0.25, seed=3)
    assert len(held_out) == 5 and sorted([*kept.lengths, *held_out.lengths]) == list(range(2, 22))
    for part in (kept, held_out):
        assert part.lengths.tolist() == sorted(part.lengths), "in the files' order"
        assert [rows.lengths[int(part[n][2:-1])] for n in range(len(part))] == part.lengths.tolist()
    # Pinned: a run that goes on with another version must hold out the same rows.
    assert held_out.lengths.tolist() == [4, 9, 15, 18, 19]
    again = hold_out(rows, 0.25, seed=3)
    assert again[1].lengths.tolist() == held_out.lengths.tolist() != hold_out(rows, 0.25, seed=4)[1].lengths.tolist()
    assert len(hold_out(rows, 0.001, seed=3)[1]) == 1
    with pytest.raises(ValueError, match="--eval_ratio 0.99: leaves none of 2 rows to train on"):
        hold_out(Rows("a", [2, 3]), 0.99, seed=3)


def test_general_rows_are_mixed_in():
    rows, others = Rows("a", range(2, 12)), Rows("b", [20, 21, 22])
    mixed = mix(rows, others, 0.5, seed=1)
    assert len(mixed) == 15 and mixed.lengths[:10].tolist() == list(range(2, 12))
    counts = [mixed.lengths.tolist().count(length) for length in (20, 21, 22)]
    assert sorted(counts) == [1, 2, 2], "each as often as the others, as far as it goes"
    assert mixed.lengths[10:].tolist() == sorted(mixed.lengths[10:]), "in the files' order"
    assert len(mix(hold_out(rows, 0.2, 1)[0], others, 0.0, seed=1)) == 8


@pytest.mark.parametrize("task, metric", [("classification", "accuracy"), ("extraction", "f1"), (None, "exact_match")])
@pytest.mark.parametrize("mode", MODES)
def test_perfect_answers_have_perfect_scores(mode, task, metric, tmp_path):
    """Kind: exact metrics are 0 for a perfect model of a family whose tokenizer folds marks."""
    tokenizer = MODES[mode].tokenizer_class.from_pretrained(GOLDEN_FOLDERS[mode])
    texts = [
        {"query": "问", "answer": text}
        for text in ("发动机组（汽油）_部件故障_漏油：ＡＢ１２！", "水泵（前）_部件_开裂。")
    ]
    answers = [come_back(row["answer"], tokenizer, MODES[mode].prompt) for row in texts]
    values = {}
    for off in (False, True):
        args = SimpleNamespace(output_dir=str(tmp_path), task=task, no_normalize=off, eval_generate=False)
        evaluation = Evaluation(args, None, None, None)
        evaluation.texts = texts
        values[off] = evaluation.score(1, answers)[metric]
    assert values == {False: 100, True: 100 if mode != "glm" else 0}


def test_texts_of_held_out_rows_come_without_bad_ones(tmp_path):
    """With --skip_bad_rows the rows that are not right are left out again when the texts are read."""
    path = tmp_path / "rows.json"
    good = [json.dumps({"instruction": word, "output": word}) for word in ("a", "b")]
    path.write_text("\n".join([good[0], "{", good[1]]), encoding="utf-8")

    class Rows(list):
        def place(self, n):
            return f"{path}:{self[n]}"

    args = SimpleNamespace(eval_path=[str(path)], skip_bad_rows=True, prompt_column=None, response_column="output")
    assert [row["query"] for row in texts_of(Rows([3, 1]), args)] == ["b", "a"]


def train(folder, name, more, code=0, fault=None):
    """train.py on one process, with a fault of tests/faults/faulty_train.py; its output."""
    script = ROOT / ("tests/faults/faulty_train.py" if fault else "train.py")
    command = f"{sys.executable} {script} --train_path rows.json --model_name_or_path"
    command += f" {GOLDEN_FOLDERS['glm3']} --mode glm3 --train_type lora --lora_module_name dense --max_len 300"
    command += " --max_src_len 200 --per_device_train_batch_size 2 --learning_rate 1e-2 --show_loss_step 1"
    command += f" --output_dir {name} {more}"
    environment = {**os.environ, "FAULT": fault or ""}
    process = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment)
    assert process.returncode == code, process.stdout + process.stderr
    return process.stdout + process.stderr


@pytest.mark.launch
def test_evaluation_changes_nothing(tmp_path):
    """Weights with and without it are equal to the bit; the best checkpoint is that of the best value; it stops."""
    for name, file in (("rows", "spo_0.json"), ("eval", "spo_1.json")):
        lines = (ROOT / "data" / file).read_text(encoding="utf-8").splitlines()[:5]
        (tmp_path / f"{name}.json").write_text("\n".join(lines), encoding="utf-8")
    train(tmp_path, "plain", "--num_train_epochs 3")
    train(tmp_path, "evaluated", "--num_train_epochs 3 --eval_path eval.json --eval_step 2 --eval_generate")
    weights = [
        load_file(tmp_path / name / "epoch-3-step-9" / "adapter_model.safetensors") for name in ("plain", "evaluated")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [(tmp_path / name / "train_log.jsonl").read_text().splitlines() for name in ("plain", "evaluated")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]

    # A learning rate that is far too high: the loss on held-out rows has its best value early, then the run stops.
    early = "--num_train_epochs 30 --eval_ratio 0.4 --eval_step 1 --early_stopping_patience 4 --learning_rate 0.3"
    early += " --lr_scheduler_type linear --resume auto"
    text = train(tmp_path, "stopped", early)
    values = [json.loads(line) for line in (tmp_path / "stopped" / "eval_log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in values}
    best = min(losses, key=losses.get)
    assert 1 < best < max(losses) == best + 4, losses
    run = json.loads((tmp_path / "stopped" / "best" / "run.json").read_text())
    assert run["step"] == best and run["scores"] == {"loss": losses[best]}
    base = (str(GOLDEN_FOLDERS["glm3"]), MODES["glm3"])
    assert run["base_fingerprint"] == base_fingerprint(*base, read_config(*base))
    assert f"done: {best + 4} updates" in text
    assert "done already" in train(tmp_path, "stopped", early)

    # Asked to leave in the step whose evaluation would have stopped the run: the resumed run makes up for it, in a
    # folder of its own, which gets the best weights too.
    train(tmp_path, "left", early, code=75, fault=f"ask {best + 4}")
    assert not (tmp_path / "left" / f"eval-step-{best + 4}.jsonl").exists()
    from_there = early.replace("--resume auto", f"--resume left/state-step-{best + 4}")
    assert f"done: {best + 4} updates" in train(tmp_path, "elsewhere", from_there)
    for path in (f"epoch-*-step-{best + 4}/adapter_model.safetensors", "best/adapter_model.safetensors"):
        [first], [second] = ((tmp_path / name).glob(path) for name in ("stopped", "elsewhere"))
        assert first.read_bytes() == second.read_bytes()
    assert is_whole(str(tmp_path / "elsewhere" / "best"))
    logs = [(tmp_path / name / "eval_log.jsonl").read_text().splitlines() for name in ("stopped", "left", "elsewhere")]
    assert logs[0] == logs[1] + logs[2] and len(logs[2]) == 1
