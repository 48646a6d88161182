"""Bad flags, folders and DeepSpeed files end with exit code 2 and one line that says what is wrong; nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from refusing import (
    FOLDERS,
    NO_CHANGE,
    NO_CUDA,
    ROOT,
    ROW_LINE,
    WeightsReached,
    both,
    case,
    cut,
    drop,
    lines,
    put,
    sandbox,  # noqa: F401, a fixture
)

from flags import train
from rows import cache


def test_good_input_is_not_refused(sandbox):
    """What the tables below change one thing of."""
    with pytest.raises(WeightsReached):
        sandbox.train_fails()
    with pytest.raises(WeightsReached):
        sandbox.fails("predict.py", "--model_path", FOLDERS["glm3"], "--prompt", "问", "--device", "cpu", says="")


# ---------------------------------------------------------------- flags of train.py

RANGES = [  # flag, values, rule
    ("per_device_train_batch_size", "0 -1", "must be at least 1"),
    ("gradient_accumulation_steps", "0 -4", "must be at least 1"),
    ("num_train_epochs", "0 -1", "must be at least 1"),
    ("show_loss_step", "0 -1", "must be at least 1"),
    ("save_model_step", "-1", "must be 0 or more"),
    ("num_proc", "-1", "must be 0 or more"),
    ("lora_dim", "0 -8", "must be at least 1"),
    ("lora_alpha", "-1 inf", "must be 0 or more"),
    ("lora_dropout", "-0.1 1 nan", "must be 0 or more and below 1"),
    ("learning_rate", "-1e-4 nan inf", "must be 0 or more"),
    ("weight_decay", "-0.1 nan", "must be 0 or more"),
    ("max_grad_norm", "-1 inf", "must be 0 or more"),
    ("warmup_ratio", "-0.1 1 1.5 nan", "must be 0 or more and below 1"),
    ("seed", "-1", "must be from 0 to 4294967295"),
]


@pytest.mark.parametrize("flag, value, rule", [(f, v, rule) for f, values, rule in RANGES for v in values.split()])
def test_numbers_out_of_range(sandbox, flag, value, rule):
    shown = value if re.fullmatch(r"-?\d+", value) and flag not in FLOAT_FLAGS else repr(float(value))
    sandbox.train_fails(f"--{flag}={value}", says=rf"--{flag} {re.escape(shown)}: {rule}$")


FLOAT_FLAGS = {a.dest for a in train.train_parser()._actions if a.type is float}

TRAIN_FLAGS = [
    case("no-train-path", "", "arguments are required: --train_path", {"train_path": None}),
    case("no-model", "", "arguments are required: --model_name_or_path", {"model_name_or_path": None}),
    case("no-output-dir", "", "arguments are required: --output_dir", {"output_dir": None}),
    case("abbreviation", "--lora 8", "unrecognized arguments: --lora 8"),
    case("unknown-flag", "--max_length 8", "unrecognized arguments: --max_length 8"),
    case("switch-with-value", "--gradient_checkpointing True", "unrecognized arguments: True"),
    case("unknown-mode", "--mode glm4", r"--mode: invalid choice: 'glm4' \(choose from 'glm', 'glm2', 'glm3'\)"),
    case("unknown-train-type", "--train_type qlora", r"--train_type: invalid choice: 'qlora' \(choose from 'freeze',"),
    case("unknown-schedule", "--lr_scheduler_type step", r"--lr_scheduler_type: invalid choice: 'step' \(choose from"),
    case("neither-true-nor-false", "--train_type ptuning --prefix_projection maybe",
         "--prefix_projection: 'maybe' is neither True nor False"),
    case("not-a-whole-number", "--num_train_epochs 1.5", "--num_train_epochs: invalid int value: '1.5'"),
    case("not-a-number", "--learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
    case("seed-too-large", f"--seed {10**30}", f"--seed {10**30}: must be"),
    # lengths
    case("max-len-0", "--max_len 0", "--max_len 0: "),
    case("max-len-small", "--max_len 20", "--max_len 20: too small for a question and an answer: use at least 23"),
    case("max-src-len-large-glm", "--max_src_len 1021",
         "--max_src_len 1021 leaves no room for an answer in --max_len 1024: use at most 1020 or raise --max_len",
         {"model_name_or_path": "{glm}"}),
    case("max-src-len-large-glm2", "--max_src_len 1021",
         "--max_src_len 1021 leaves no room .* use at most 1020 or raise --max_len",
         {"model_name_or_path": "{glm2}"}),
    case("max-src-len-large-glm3", "--max_src_len 1018",
         "--max_src_len 1018 leaves no room .* use at most 1017 or raise --max_len"),
    case("max-src-len-small", "--max_src_len 8", "--max_src_len 8: leaves nothing of a question: use at least 16"),
    # flags of another train type
    case("lora-with-all", "--train_type all --lora_dim 8",
         "--lora_dim: belongs to --train_type lora, this run is --train_type all: remove"),
    case("lora-with-equals-sign", "--train_type all --lora_alpha=8",
         "--lora_alpha: belongs to --train_type lora, this run is --train_type all"),
    case("freeze-with-lora", "--freeze_module_name layers.1",
         "--freeze_module_name: belongs to --train_type freeze, this run is --train_type lora"),
    case("flex-on-a-cpu", "--attention flex --device cpu",
         "--attention flex: has no backward pass on a CPU: use --attention sdpa"),
    case("interval-0", "--gradient_checkpointing --gradient_checkpointing_interval 0",
         "--gradient_checkpointing_interval 0: must be at least 1"),
    case("interval-without-checkpointing", "--gradient_checkpointing_interval 2",
         "--gradient_checkpointing_interval: needs --gradient_checkpointing: add it or remove this flag"),
    case("eval-step-alone", "--eval_step 5", "--eval_step: needs --eval_path or --eval_ratio: add one or remove it"),
    case("metric-without-answers", "--eval_ratio 0.5 --metric_for_best_model f1",
         "--metric_for_best_model f1: needs --eval_generate: add it"),
    case("metric-of-another-task", "--eval_ratio 0.5 --eval_generate --metric_for_best_model accuracy",
         r"--metric_for_best_model accuracy: --task \(none\) does not have it: use --task classification"),
    case("eval-ratio-1", "--eval_ratio 1", "--eval_ratio 1.0: must be 0 or more and below 1"),
    case("eval-twice", "--eval_ratio 0.5 --eval_path rows.json", "--eval_path: not allowed with argument --eval_ratio"),
    case("eval-path-nowhere", "--eval_path nowhere.json", "--eval_path nowhere.json: no such file or folder"),
    case("task-without-answers", "--eval_ratio 0.5 --task summary", "--task: needs --eval_generate: add it or remove"),
    case("replay-of-the-forgetting-check", f"--replay_path {ROOT / 'data' / 'general'}",
         r"--replay_path \S+general: holds the questions of the forgetting check, .*: use other general rows"),
    case("folding-without-answers", "--eval_ratio 0.5 --no_normalize", "--no_normalize: needs --eval_generate: add it"),
    case("questions-while-training", "--eval_ratio 0.5 --eval_generate --task questions",
         "--task questions: needs several answers of a row, --eval_generate gives one: score it later"),
    case("replay-ratio-alone", "--replay_ratio 0.5", "--replay_ratio: needs --replay_path: add it or remove this flag"),
    case("resume-nowhere", "--resume nowhere", "--resume nowhere: no state in it: name a state-step-N folder, or auto"),
    case("step-timeout-negative", "--step_timeout -1", "--step_timeout -1.0: must be 0 or more"),
    case("state-step-negative", "--save_state_step -1", "--save_state_step -1: must be 0 or more"),
    case("prefix-with-lora", "--pre_seq_len 4",
         "--pre_seq_len: belongs to --train_type ptuning, this run is --train_type lora"),
    case("prefix-false-with-freeze", "--train_type freeze --freeze_module_name layers.1 --prefix_projection False",
         "--prefix_projection: belongs to --train_type ptuning, this run is --train_type freeze"),
    case("virtual-tokens-zero", "--train_type ptuning --pre_seq_len 0", "--pre_seq_len 0: must be at least 1"),
    # what trains
    case("lora-module-unknown", "--lora_module_name q_proj",
         "--lora_module_name q_proj: matches no linear layer: choose from "
         "dense,dense_4h_to_h,dense_h_to_4h,query_key_value"),
    case("lora-module-half-unknown", "--lora_module_name query_key_value,nope",
         "--lora_module_name nope: matches no linear layer"),
    case("lora-module-none", "--lora_module_name ,", "--lora_module_name ',': names no module: choose from"),
    case("freeze-layer-unknown", "--train_type freeze --freeze_module_name layers.99.",
         r"--freeze_module_name layers\.99\.: matches no weight: this model has layers\.0\. to layers\.3\."),
    case("freeze-layer-default", "--train_type freeze",
         r"--freeze_module_name layers\.27\.: matches no weight: this model has layers\.0\. to layers\.3\."),
    case("freeze-half-a-number", "--train_type freeze --freeze_module_name ayers.2",
         r"--freeze_module_name ayers\.2: matches no weight"),
    case("freeze-nothing", "--train_type freeze --freeze_module_name ''", "--freeze_module_name '': names no layer"),
    # columns
    case("answer-in-the-question", "--response_column instruction",
         "--response_column instruction: is part of the question"),
    case("answer-is-the-question", "--prompt_column output", "--(prompt|response)_column output: "),
    case("prompt-column-absent", "--prompt_column q",
         r"rows\.json:1: no field 'q' \(it has 'instruction', 'input', 'output'\): add it, or name yours with "
         r"--prompt_column"),
    case("response-column-absent", "--response_column answer", r"rows\.json:1: no field 'answer' .*--response_column"),
    # device
    case("fp16-on-cpu", "--precision fp16",
         "--precision fp16: a CPU trains in fp32 or bf16 only: use --precision fp32"),
    case("no-cuda", "--device cuda", r"--device cuda: torch sees no CUDA device: check .* or use --device cpu",
         skip=NO_CUDA),
]


@pytest.mark.parametrize("flags, says, changes", [
    pytest.param(*(p.values if len(p.values) == 3 else (*p.values, {})), id=p.id, marks=p.marks) for p in TRAIN_FLAGS
])
def test_flags_of_train(sandbox, flags, says, changes):
    sandbox.train_fails(flags, says, **{k: v and v.format(**FOLDERS) for k, v in changes.items()})


def test_an_instruction_column_can_hold_the_answer_of_another_question(sandbox):
    """Where --prompt_column names the question, instruction and input are free."""
    sandbox.write("rows.json", json.dumps({"q": "问", "instruction": "答"}))
    with pytest.raises(WeightsReached):
        sandbox.train_fails("--prompt_column q --response_column instruction")


def test_all_problems_at_once(sandbox):
    flags = "--max_grad_norm=-1 --lora_dim 0 --pre_seq_len 4 --train_path no.json --model_name_or_path nowhere"
    code, lines = sandbox.run("train.py", *sandbox.fill(flags), "--output_dir", "rows.json", "--ds_file", "no.json")
    assert code == 2
    wanted = "--max_grad_norm --lora_dim --pre_seq_len --train_path --model_name_or_path --output_dir --ds_file".split()
    assert sorted(re.search(r"error: (--\w+)", line).group(1) for line in lines) == sorted(wanted)


def test_more_ranks_than_rows(sandbox, monkeypatch):
    for name, value in (("WORLD_SIZE", "5"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache, "cache_folder", lambda: str(sandbox.cache.parent / "filled"))
    sandbox.train_fails(says="--train_path: 4 rows for 5 processes: give at least one row to each, or start fewer")


@pytest.mark.parametrize("rank, local_rank", [(1, 1), (4, 0)])
def test_other_ranks_let_the_first_one_speak(sandbox, monkeypatch, rank, local_rank):
    """They wait for the launcher to end them, and name themselves if it is their own host that lacks something."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    variables = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 8, "MASTER_ADDR": "127.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    says = rf"^train\.py: rank {rank}: error: --train_path no\.json: no such file"
    sandbox.train_fails(train_path="no.json", says=says)
    assert waited and min(waited) >= 1


# ---------------------------------------------------------------- output folders

OUTPUTS = [
    case("not-empty", "full", r"--output_dir full: is not empty: choose a new folder, so that no earlier run is lost"),
    case("a-file", "rows.json", r"--output_dir rows\.json: is a file: choose a folder"),
    case("the-models", "model", r"--output_dir model: is the model's own folder: choose another"),
    case("the-models-by-another-name", "full/../model/",
         r"--output_dir full/\.\./model/: is the model's own folder: choose another"),
    case("below-a-file", "rows.json/out", r"--output_dir rows\.json/out: "),
    case("no-name", "", r"--output_dir '?'?: "),
]


@pytest.mark.parametrize("name, says", OUTPUTS)
def test_output_folders(sandbox, name, says):
    sandbox.model("glm3")
    sandbox.write("full/train_log.jsonl", "")
    sandbox.train_fails(model_name_or_path="model", output_dir=name, says=says)


# ---------------------------------------------------------------- DeepSpeed files


def ds(**sections):
    return json.dumps({"zero_optimization": {"stage": 2}, **sections})


DS_FILES = [
    case("not-json", "{", "", r"ds\.json: cannot be read as JSON \(.*\): give a complete file"),
    case("an-array", "[]", "", r"ds\.json: is a list, not a JSON object"),
    case("stage-0", ds(zero_optimization={"stage": 0}), "",
         r"--ds_file ds\.json: zero_optimization\.stage is 0: use 2 or 3"),
    case("stage-1", ds(zero_optimization={"stage": 1}), "",
         r"--ds_file ds\.json: zero_optimization\.stage is 1: use 2 or 3"),
    case("no-stage", "{}", "", r"--ds_file ds\.json: zero_optimization\.stage is None: use 2 or 3"),
    case("a-slip", ds(gradient_cliping=0.5), "",
         r"--ds_file ds\.json: gradient_cliping: does nothing in this training: did you mean gradient_clipping\?"),
    case("of-deepspeed-alone", ds(activation_checkpointing={}), "",
         r"--ds_file ds\.json: activation_checkpointing: .*: use --gradient_checkpointing"),
    case("accumulation", ds(gradient_accumulation_steps=4), "--gradient_accumulation_steps 2",
         r"--ds_file ds\.json: gradient_accumulation_steps is 4 but --gradient_accumulation_steps is 2: give it "
         r"once"),
    case("batch-size", ds(train_micro_batch_size_per_gpu=4), "",
         r"--ds_file ds\.json: train_micro_batch_size_per_gpu is 4 but --per_device_train_batch_size is 1: give it "
         r"once"),
    case("whole-batch", ds(train_batch_size=4), "",
         r"--ds_file ds\.json: train_batch_size is 4 but batch size x accumulation x processes is 1: give it once"),
    case("clipping", ds(gradient_clipping=0.5), "",
         r"--ds_file ds\.json: gradient_clipping is 0\.5 but --max_grad_norm is 1\.0: give it once"),
    case("learning-rate", ds(optimizer={"type": "AdamW", "params": {"lr": 1.0}}), "",
         r"--ds_file ds\.json: optimizer\.params\.lr is 1\.0 but --learning_rate is 0\.0001: give it once"),
    case("weight-decay", ds(optimizer={"params": {"weight_decay": 0}}), "",
         r"--ds_file ds\.json: optimizer\.params\.weight_decay is 0 but --weight_decay is 0\.1: give it once"),
    case("optimizer", ds(optimizer={"type": "Lamb"}), "",
         r"--ds_file ds\.json: optimizer\.type Lamb: only AdamW is built: remove the section"),
    case("betas", ds(optimizer={"type": "AdamW", "params": {"betas": [0.5, 0.6]}}), "",
         r"--ds_file ds\.json: optimizer\.params\.betas"),
    case("scheduler", ds(scheduler={"type": "WarmupLR"}), "",
         r"--ds_file ds\.json: scheduler: use --lr_scheduler_type and --warmup_ratio instead"),
    case("precision", ds(fp16={"enabled": True}), "--precision fp32",
         r"--ds_file ds\.json: fp16\.enabled is True but --precision is fp32: give it once"),
    case("two-precisions", ds(bf16={"enabled": True}, fp16={"enabled": True}), "",
         r"--ds_file ds\.json: bf16\.enabled and fp16\.enabled: choose one"),
    case("precision-auto", ds(fp16={"enabled": True}), "", "--precision fp16: a CPU trains in fp32 or bf16 only",
         skip=NO_CUDA),
    case("precision-off", ds(bf16={"enabled": False}), "--precision bf16", r"--ds_file ds\.json: bf16\.enabled"),
    case("section-is-a-number", ds(zero_optimization=2), "", r"--ds_file ds\.json: .*zero_optimization"),
    case("section-is-null", ds(zero_optimization=None), "", r"--ds_file ds\.json: .*zero_optimization"),
    case("precision-is-a-switch", ds(fp16=True), "", r"--ds_file ds\.json: .*fp16"),
    case("optimizer-is-a-name", ds(optimizer="AdamW"), "", r"--ds_file ds\.json: .*optimizer"),
    case("offload-is-a-name", ds(zero_optimization={"stage": 2, "offload_optimizer": "cpu"}), "",
         r"--ds_file ds\.json: .*offload_optimizer"),
]


@pytest.mark.parametrize("content, flags, says", DS_FILES)
def test_deepspeed_files(sandbox, content, flags, says):
    sandbox.write("ds.json", content)
    sandbox.train_fails(f"--ds_file ds.json {flags}", says)


def test_a_deepspeed_file_that_is_nowhere(sandbox):
    says = r"--ds_file no\.json: no such file here or in configs/: use one of ds_zero2_no_offload\.json, .* or give a"
    sandbox.train_fails("--ds_file no.json", says)


# ---------------------------------------------------------------- predict.py

PROMPT = "--model_path {glm3} --device cpu --prompt a"
FILE = "--model_path {glm3} --device cpu --test_path rows.json"
PREDICT = [
    case("nothing", "", "arguments are required: --model_path"),
    case("no-source", "--model_path {glm3}", "one of the arguments --test_path --prompt --interactive is required"),
    case("two-sources", f"{PROMPT} --interactive", "--interactive: not allowed with argument --prompt"),
    case("abbreviation", "--model {glm3} --prompt a --model_path {glm3}", "unrecognized arguments: --model"),
    case("no-model", "--model_path nowhere --prompt a",
         "--model_path nowhere: no such folder: give a checkpoint folder or a hub name"),
    case("model-is-a-file", "--model_path rows.json --prompt a",
         r"--model_path rows\.json: is a file: name the checkpoint's folder"),
    case("model-is-empty", "--model_path {sandbox}/empty --prompt a", r"--model_path \S+/empty: no config\.json in it"),
    case("hub-unreachable", "--model_path no/where --prompt a",
         r"--model_path no/where: cannot be fetched from the hub"),
    case("wrong-mode", f"{PROMPT} --mode glm",
         r"--mode glm: config\.json of \S+ is of glm3: change --mode or --model_path"),
    case("unknown-mode", f"{PROMPT} --mode glm4", r"--mode: invalid choice: 'glm4'"),
    case("no-rows", f"{FILE} --test_path no.json", r"--test_path no\.json: no such file or folder"),
    case("rows-folder-empty", f"{FILE} --test_path empty", r"--test_path empty: no \*\.json or \*\.jsonl file"),
    case("bad-row", f"{FILE} --test_path bad.json", r"bad\.json:2: no field 'instruction' \(it has 'input'\): add"),
    case("column-absent", f"{FILE} --prompt_column q --output_path new.jsonl", r"rows\.json:1: no field 'q'"),
    case("output-exists", f"{FILE} --output_path old.jsonl",
         r"--output_path old\.jsonl: exists: choose another or add --overwrite"),
    case("default-output-exists", f"{FILE}",
         r"--output_path predictions/glm3/rows\.jsonl: exists: choose another or add --overwrite"),
    case("output-is-a-folder", f"{FILE} --output_path empty --overwrite", r"--output_path empty: "),
    case("output-below-a-file", f"{FILE} --output_path rows.json/out.jsonl", r"--output_path rows\.json/out\.jsonl: "),
    case("output-is-the-input", f"{FILE} --output_path rows.json --overwrite", r"--output_path rows\.json: "),
    case("output-without-file", f"{PROMPT} --output_path x", "--output_path x: belongs to --test_path: remove it"),
    case("overwrite-without-file", f"{PROMPT} --overwrite", "--overwrite: belongs to --test_path: remove it"),
    case("batch-without-file", f"{PROMPT} --batch_size 2", "--batch_size: belongs to --test_path: remove it"),
    case("column-without-file", f"{PROMPT} --prompt_column q", "--prompt_column: belongs to --test_path: remove it"),
    case("batch-size-0", f"{FILE} --batch_size 0 --output_path new.jsonl", "--batch_size 0: must be at least 1"),
    case("new-tokens-0", f"{PROMPT} --max_new_tokens 0", "--max_new_tokens 0: must be at least 1"),
    case("source-of-2-tokens", f"{PROMPT} --max_src_len 2 --model_path {{glm2}}",
         "--max_src_len 2: .*use at least 16"),
    case("beams-0", f"{PROMPT} --num_beams 0", "--num_beams 0: must be at least 1"),
    case("temperature-without-sampling", f"{PROMPT} --temperature 0.5",
         "--temperature: needs --do_sample: add it or remove this flag"),
    case("top-p-without-sampling", f"{PROMPT} --top_p=0.5", "--top_p: needs --do_sample: add it or remove this flag"),
    case("seed-without-sampling", f"{PROMPT} --seed 1", "--seed: needs --do_sample: add it or remove this flag"),
    case("two-answers-without-sampling", f"{PROMPT} --num_return_sequences 2",
         "--num_return_sequences 2: greedy search has one answer: add --do_sample, or --num_beams of as many"),
    case("more-answers-than-beams", f"{PROMPT} --num_return_sequences 3 --num_beams 2", "--num_return_sequences 3: "),
    case("temperature-0", f"{PROMPT} --do_sample --temperature 0", "--temperature 0.0: must be above 0"),
    case("temperature-infinite", f"{PROMPT} --do_sample --temperature inf", "--temperature inf: must be"),
    case("top-p-0", f"{PROMPT} --do_sample --top_p 0", "--top_p 0.0: must be above 0"),
    case("top-p-above-1", f"{PROMPT} --do_sample --top_p 1.5", "--top_p 1.5: must be"),
    case("top-k-negative", f"{PROMPT} --do_sample --top_k -1", "--top_k -1: must be 0 or more"),
    case("repetition-penalty-0", f"{PROMPT} --repetition_penalty 0", "--repetition_penalty 0.0: must be above 0"),
    case("fp16-on-cpu", f"{PROMPT} --precision fp16", "--precision fp16: .*: use --precision fp32"),
    case("no-cuda", "--model_path {glm3} --device cuda --prompt a", "--device cuda: torch sees no CUDA device",
         skip=NO_CUDA),
]


@pytest.mark.parametrize("flags, says", PREDICT)
def test_flags_of_predict(sandbox, flags, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (sandbox.folder / "empty").mkdir()
    sandbox.write("bad.json", lines(ROW_LINE, '{"input": "a"}'))
    sandbox.write("old.jsonl", "")
    sandbox.write("predictions/glm3/rows.jsonl", "")
    sandbox.fails("predict.py", *sandbox.fill(flags), says=says)


# ---------------------------------------------------------------- merge_lora.py


def base_without_config(folder):
    """A base model beside the adapter, copied but for its config.json."""
    shutil.copytree(FOLDERS["glm3"], folder.parent / "base", ignore=shutil.ignore_patterns("config.json"))


MERGE = [
    case("nothing", "", drop("none"), "arguments are required: --model_dir"),
    case("no-folder", "--model_dir nowhere", drop("none"),
         r"--model_dir nowhere: no such folder: give a checkpoint folder or a hub name"),
    case("released-folder", "--model_dir {glm3}", drop("none"),
         r"--model_dir \S+: holds a whole model, which needs no merging: use it as it is \(python predict\.py"),
    case("output-exists", "--model_dir adapter --output_dir old", NO_CHANGE,
         r"--output_dir old: exists: choose a new folder"),
    case("default-output-exists", "--model_dir adapter/",
         both(NO_CHANGE, lambda folder: (folder.parent / "adapter-merged").mkdir()),
         r"--output_dir adapter-merged: exists: choose a new folder"),
    case("output-below-a-file", "--model_dir adapter --output_dir rows.json/x", NO_CHANGE,
         r"--output_dir rows\.json/x: "),
    case("prefix", "--model_dir prefix", drop("none"),
         r"--model_dir prefix: holds a prefix encoder, which cannot be merged: use it as it is"),
    case("whole", "--model_dir whole", drop("none"),
         r"--model_dir whole: holds a whole model, which needs no merging"),
    case("adapter-file-missing", "--model_dir adapter", drop("none"),
         r"adapter/adapter_model\.safetensors: missing, but run\.json says it is there: copy the folder again"),
    case("base-moved", "--model_dir moved", drop("none"),
         r"moved/run\.json: base model /gone/base is not there: give its place with --model_name_or_path"),
    case("base-not-there", "--model_dir adapter --model_name_or_path /nowhere", NO_CHANGE,
         r"--model_name_or_path /nowhere: no such folder"),
    case("base-of-another-family", "--model_dir adapter --model_name_or_path {glm}", NO_CHANGE,
         r"--model_name_or_path \S*/glm1.* is of glm\b"),
    case("base-without-weights", "--model_dir adapter --model_name_or_path old", NO_CHANGE, r"\bold: no weights in it"),
    case("base-without-config", "--model_dir adapter --model_name_or_path base",
         both(NO_CHANGE, base_without_config),
         r"\bbase(/|: no )config\.json"),
    case("run-not-json", "--model_dir adapter", put("run.json", "{"), r"adapter/run\.json: cannot be read as JSON"),
    case("unknown-precision", "--model_dir adapter --precision int8", NO_CHANGE, "--precision: invalid choice: 'int8'"),
    case("no-cuda", "--model_dir adapter --device cuda", NO_CHANGE, "--device cuda: torch sees no CUDA device",
         skip=NO_CUDA),
]


@pytest.mark.parametrize("flags, spoil, says", MERGE)
def test_flags_of_merge(sandbox, flags, spoil, says):
    spoil(sandbox.adapter())
    (sandbox.folder / "old").mkdir()
    put("prefix_encoder.safetensors", b"")(sandbox.adapter("prefix", weights="prefix"))
    sandbox.adapter("whole", weights="whole")
    NO_CHANGE(sandbox.adapter("moved", base_model="/gone/base"))
    sandbox.fails("merge_lora.py", *sandbox.fill(flags), says=says)


# ---------------------------------------------------------------- from outside


def run_process(folder, *argv):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def check_process(done, folder, says):
    assert done.returncode == 2
    assert re.fullmatch(rf"\w+\.py: error: [^\n]*{says}[^\n]*\n", done.stderr), done.stderr
    assert "Traceback" not in done.stdout
    assert not (folder / "out").exists()


def test_a_process_with_bad_flags(sandbox):
    done = run_process(sandbox.folder, "train.py", "--train_path", "rows.json", "--lora", "8")
    check_process(done, sandbox.folder, "required: --model_name_or_path, --output_dir")
    assert done.stdout == ""


def test_a_process_with_a_truncated_shard(sandbox):
    cut("pytorch_model-00001*")(sandbox.model("glm3"))
    flags = "--train_path rows.json --model_name_or_path model --output_dir out --device cpu".split()
    check_process(run_process(sandbox.folder, "train.py", *flags), sandbox.folder, r"00001-of-00002\.bin: truncated")


def test_a_process_with_a_bad_row(sandbox):
    sandbox.write("rows.json", lines(ROW_LINE, "{"))
    flags = sandbox.fill("--train_path rows.json --model_name_or_path {glm3} --output_dir out --device cpu")
    process = run_process(sandbox.folder, "train.py", *flags)
    check_process(process, sandbox.folder, r"rows\.json:2: '\{': not a JSON object")
