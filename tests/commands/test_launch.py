"""Every mode and train type through the real launcher on two CPU processes, then merged, answered with and scored."""

import json
import math
import os

import pytest
import torch
from launching import check_done, free_port, run_command
from reference import GOLDEN_FOLDERS, ROOT
from safetensors.torch import load_file

import merge_lora
import predict
import score
from checkpoints.opening import load_opened, open_checkpoint
from modes import MODES
from train_types import TRAIN_TYPES

pytestmark = pytest.mark.launch

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.json"))
CASES = [
    # mode, train type, DeepSpeed file: each file serves each mode and each train type in turn
    (mode, train_type, CONFIGS[(i + j) % len(CONFIGS)])
    for i, mode in enumerate(MODES)
    for j, train_type in enumerate(TRAIN_TYPES)
]
# Each mode and each train type; ALL_CASES=1 runs every pair.
SAMPLE = "glm-freeze glm-all glm2-ptuning glm2-lora glm3-lora".split()
if not os.environ.get("ALL_CASES"):
    CASES = [case for case in CASES if "-".join(case[:2]) in SAMPLE]
NUM_ROWS = 11  # an odd number: the last update of an epoch is short, and one process has fewer rows
EXTRA = {
    "freeze": "--freeze_module_name layers.1.,layers.3.",
    "ptuning": "--pre_seq_len 4 --prefix_projection {projection} --learning_rate 1e-2",
    "lora": "--lora_dim 4 --lora_module_name query_key_value,dense,dense_h_to_4h,dense_4h_to_h --learning_rate 1e-2",
    "all": "",
}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "mode,train_type,ds_file", CASES, ids=lambda value: value.removeprefix("ds_").removesuffix(".json")
)
def test_train_save_load_predict_score(mode, train_type, ds_file, tmp_path, capsys):
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    (tmp_path / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "eval.json").write_text("\n".join(rows[:3]), encoding="utf-8")
    extra = EXTRA[train_type].format(projection=mode != "glm2")
    checkpointing = "--gradient_checkpointing" if mode == "glm" else ""
    process = run_command(
        f"deepspeed --num_accelerators 2 --master_port {free_port()} train.py --train_path rows.json"
        f" --model_name_or_path {GOLDEN_FOLDERS[mode]} --mode {mode} --train_type {train_type} --ds_file {ds_file}"
        " --max_len 300 --max_src_len 200 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
        " --num_train_epochs 2 --show_loss_step 1 --save_model_step 1 --learning_rate 1e-3"
        " --eval_path eval.json --eval_generate --eval_max_new_tokens 3"
        f" --output_dir out {extra} {checkpointing}",
        tmp_path,
    )
    check_done(process)

    # 8 rows make an update, so an epoch has 2 and the run 4; the folder of an epoch's end stands for its step's.
    out = tmp_path / "out"
    folders = ["epoch-1-step-1", "epoch-1-step-2", "epoch-2-step-3", "epoch-2-step-4"]
    assert sorted(p.name for p in out.glob("epoch*")) == folders
    log = read_lines(out / "train_log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
    assert (out / "loss.png").stat().st_size > 1000 and list((out / "tensorboard").iterdir())
    assert f"{train_type}: " in process.stdout and "done: 4 updates" in process.stdout
    assert process.stdout.count("first row (") == 1, "rank 0 alone prints"

    # Both ends of epochs are evaluated, on rows that the last process has none of; the better one is kept as best/.
    evaluations = read_lines(out / "eval_log.jsonl")
    assert [line["step"] for line in evaluations] == [2, 4] and all("rougeL" in line for line in evaluations)
    best = min(evaluations, key=lambda line: line["loss"])
    best_run = json.loads((out / "best" / "run.json").read_text(encoding="utf-8"))
    assert (best_run["step"], best_run["scores"]["loss"]) == (best["step"], best["loss"])
    assert [line["output"] for line in read_lines(out / "eval-step-4.jsonl")] == [
        json.loads(row)["output"] for row in rows[:3]
    ]

    # What was trained, and nothing else, is saved and differs from the base.
    last = out / folders[-1]
    run = json.loads((last / "run.json").read_text(encoding="utf-8"))
    assert (run["mode"], run["train_type"], run["step"], run["epoch"]) == (mode, train_type, 4, 2)
    check_saved_weights(mode, train_type, last, run)

    # It loads, is merged, answers and is scored by the other commands.
    path = last
    if train_type == "lora":
        merge_lora.main(["--model_dir", str(last)])
        path = out / "epoch-2-step-4-merged"
        check = json.loads((path / "run.json").read_text(encoding="utf-8"))["merge_check"]
        assert check["max_difference"] < 1e-3 * max(1.0, check["max_logit"]) and check["adapter_effect"] > 1e-3
        assert_same_answers(last, path)
    predictions = tmp_path / "predictions.jsonl"
    predict.main(
        ["--model_path", str(path), "--test_path", str(tmp_path / "rows.json"), "--max_new_tokens", "4"]
        + ["--output_path", str(predictions)]
    )
    lines = read_lines(predictions)
    assert [line["index"] for line in lines] == list(range(NUM_ROWS))
    assert [line["output"] for line in lines] == [json.loads(row)["output"] for row in rows]
    assert score.main(["--predictions", str(predictions)]) == 0
    assert (tmp_path / "predictions.scores.json").exists()


def check_saved_weights(mode, train_type, folder, run):
    """Names, count and change of the saved weights."""
    base = MODES[mode].model_class.from_pretrained(GOLDEN_FOLDERS[mode], dtype=torch.float32).state_dict()
    if train_type == "lora":
        state = load_file(folder / "adapter_model.safetensors")
        assert all("lora_" in name for name in state)
        assert any(tensor.abs().sum() > 0 for name, tensor in state.items() if "lora_B" in name)
    elif train_type == "ptuning":
        state = load_file(folder / "prefix_encoder.safetensors")
        assert all(name.startswith("transformer.prefix_encoder.") for name in state)
        assert not (folder / "model.safetensors").exists()
    else:
        state = load_file(folder / "model.safetensors")
        assert set(state) == set(base)
        changed = {name for name, tensor in state.items() if not torch.equal(tensor.float(), base[name])}
        frozen = {n for n in base if train_type == "freeze" and ".layers.1." not in n and ".layers.3." not in n}
        assert changed and not changed & frozen
        assert all(any(f".layers.{i}." in name for name in changed) for i in (1, 3))
        assert (
            sum(t.numel() for n, t in state.items() if n not in frozen and n != "lm_head.weight")
            == run["trained_weights"]
        )
        return
    assert sum(tensor.numel() for tensor in state.values()) == run["trained_weights"]


def assert_same_answers(adapter, merged):
    """The adapter on its base and the merged checkpoint are the same function, up to the saved precision."""
    logits = []
    for folder in (adapter, merged):
        opened = open_checkpoint(str(folder))
        model, tokenizer = load_opened(opened, torch.float32, torch.device("cpu"))
        ids = torch.tensor([opened.mode.prompt.encode_prompt(tokenizer, "发动机异响")[0]])
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 2e-2 * logits[0].abs().max()


def test_one_process_without_the_launcher(tmp_path):
    rows = (ROOT / "data" / "adgen_0.json").read_text(encoding="utf-8").splitlines()[:3]
    rows = [{"content": json.loads(row)["input"], "summary": json.loads(row)["output"]} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    process = run_command(
        f"python train.py --train_path rows.json --prompt_column content --response_column summary"
        f" --model_name_or_path {GOLDEN_FOLDERS['glm3']} --output_dir out --precision bf16 --lr_scheduler_type linear",
        tmp_path,
    )
    check_done(process)
    assert "bf16" in process.stdout
    assert load_file(tmp_path / "out" / "epoch-1-step-3" / "adapter_model.safetensors")


def test_loss_and_gradient_norm_do_not_depend_on_the_split(tmp_path):
    """train.py's own loop: one process with accumulation, and two without, take the same steps."""
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:7]
    (tmp_path / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    logs = []
    for name, start, split in (
        ("one", "python", "--per_device_train_batch_size 1 --gradient_accumulation_steps 4"),
        (
            "two",
            f"deepspeed --num_accelerators 2 --master_port {free_port()}",
            "--per_device_train_batch_size 2 --gradient_accumulation_steps 1",
        ),
    ):
        process = run_command(
            f"{start} train.py --train_path rows.json --model_name_or_path {GOLDEN_FOLDERS['glm2']} --train_type all"
            f" --max_len 300 --max_src_len 200 --num_train_epochs 2 --show_loss_step 1 --output_dir {name} {split}",
            tmp_path,
        )
        check_done(process)
        logs.append(read_lines(tmp_path / name / "train_log.jsonl"))
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_packing_takes_the_same_steps(tmp_path):
    """train.py with --packing on two processes, and padded rows on one: an update that holds all rows is the same."""
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:7]
    (tmp_path / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    logs = []
    for name, start, flags in (
        ("padded", "python", "--per_device_train_batch_size 7"),
        (
            "packed",
            f"deepspeed --num_accelerators 2 --master_port {free_port()}",
            "--packing --per_device_train_batch_size 2 --gradient_checkpointing --gradient_checkpointing_interval 2",
        ),
    ):
        process = run_command(
            f"{start} train.py --train_path rows.json --model_name_or_path {GOLDEN_FOLDERS['glm']} --train_type lora"
            f" --lora_dropout 0 --max_len 450 --max_src_len 300 --num_train_epochs 3 --learning_rate 1e-2"
            f" --show_loss_step 1 --output_dir {name} {flags}",
            tmp_path,
        )
        check_done(process)
        assert ("7 rows packed into " in process.stdout) == (name == "packed")
        assert ("of the positions are padding" in process.stdout) == (name == "padded")
        logs.append(read_lines(tmp_path / name / "train_log.jsonl"))
    assert len(logs[0]) == len(logs[1]) == 3
    for padded, packed in zip(*logs):
        assert padded["loss"] == pytest.approx(packed["loss"], rel=1e-4)
        assert padded["grad_norm"] == pytest.approx(packed["grad_norm"], rel=1e-3)


def test_a_run_that_cannot_train_says_so(tmp_path):
    """A base whose numbers overflow: the run ends at its first step and says where they do."""
    import shutil

    from safetensors.torch import save_file

    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    shutil.copytree(
        GOLDEN_FOLDERS["glm3"], tmp_path / "base", ignore=shutil.ignore_patterns("*.bin", "*.index.json", "golden*")
    )
    state = MODES["glm3"].model_class.from_pretrained(GOLDEN_FOLDERS["glm3"]).float().state_dict()
    state["transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"].fill_(3e38)
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    process = run_command("python train.py --train_path rows.json --model_name_or_path base --output_dir out", tmp_path)
    assert process.returncode == 3 and "Traceback" not in process.stderr
    assert "step 1: the loss is not finite, the update was not applied; rows rows.json:" in process.stderr
    assert "transformer.encoder.layers.0.mlp.dense_4h_to_h" in process.stderr
    assert not list((tmp_path / "out").glob("epoch*")) and not (tmp_path / "out" / "train_log.jsonl").exists()
