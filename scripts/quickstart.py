"""The main job on an embedded default: tiny base, fine-tuning through the launcher, merge, prediction, scores, a table.

    bash scripts/quickstart.sh

Every step is a command that is printed before it runs; a step whose command, inputs and result are there already, as
it left them, is not run again. Nothing here is special to the tiny model: put a real checkpoint into the commands that
it prints.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a call from any folder
from runtime import entry  # noqa: I001  first: Ctrl-C is heard while the others are imported

# isort: split

import json
from pathlib import Path

from base_sources import base_sources

from checkpoints.kinds import KINDS
from comparison.commands import Steps, newest_checkpoint
from evaluation.metrics import score_rows
from evaluation.predictions import read_predictions
from flags.common import OneLineParser
from modes import MODES
from runtime.exits import EXIT_LEFT
from runtime.holding import holding
from train_types import TRAIN_TYPES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Learning rates, sizes and epochs that suit a base of some million weights; a 6B model wants the README's.
FLAGS = {
    "lora": "--lora_dim 16 --lora_alpha 32 --lora_dropout 0.0 --learning_rate 3e-3 --num_train_epochs 4"
    " --lora_module_name query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    "ptuning": "--pre_seq_len 32 --prefix_projection True --learning_rate 1e-2 --num_train_epochs 6",
    "freeze": "--freeze_module_name layers.2.,layers.3. --learning_rate 1e-3 --num_train_epochs 4",
    "all": "--learning_rate 5e-4 --num_train_epochs 4",
}
MAX_SRC_LEN = 192
COMMON = (
    f"--max_len 256 --max_src_len {MAX_SRC_LEN} --per_device_train_batch_size 16 --gradient_accumulation_steps 1"
    " --warmup_ratio 0.1 --seed 1234 --show_loss_step 10 --ds_file ds_zero2_no_offload.json"
)
METRICS = ("f1", "rougeL", "bleu4")


def main(argv):
    """Run the steps that are not done yet, and say what came out."""
    parser = OneLineParser(prog="quickstart.py", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, default="glm3", help="model family")
    parser.add_argument("--train_type", choices=TRAIN_TYPES, default="lora", help="what trains")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    folder = f"output/quickstart-{args.mode}-{args.train_type}"
    try:
        with holding(folder, "folder", is_inside=True):
            run_all(args, folder)
    except SystemExit as stop:
        if stop.code == EXIT_LEFT:
            print("\nleft: the same command goes on from here", flush=True)
        raise


def run_all(args, folder):
    """The steps, from the base to the scores."""
    base = f"output/base-{args.mode}"
    rows, held_out = "data/spo_0.json", "data/spo_1.json"
    steps = Steps(folder)
    steps.run("base", f"python scripts/make_base.py --mode {args.mode} --output_dir {base}", base_sources(), base)
    before = f"{folder}/before.jsonl"
    weights = [str(path) for path in sorted(Path(base).glob("*.safetensors"))]
    predict = f"python predict.py --test_path {held_out} --max_new_tokens 128 --batch_size 25 --overwrite"
    predict += f" --max_src_len {MAX_SRC_LEN}"  # the base has no run.json to take it from
    steps.run("before", f"{predict} --model_path {base} --output_path {before}", [*weights, held_out], before)

    command = (
        f"bash scripts/job.sh deepspeed --master_port 29500 train.py --train_path {rows} --model_name_or_path {base}"
        f" --mode {args.mode}"
        f" --train_type {args.train_type} {COMMON} {FLAGS[args.train_type]} --output_dir {folder}/train"
    )
    steps.run("train", command, [*weights, rows], f"{folder}/train")
    trained = newest_checkpoint(f"{folder}/train")
    model = trained
    if KINDS[TRAIN_TYPES[args.train_type].weights].not_mergeable is None:
        model = f"{folder}/merged"
        command = f"python merge_lora.py --model_dir {trained} --output_dir {model}"
        steps.run("merge", command, [*weights, f"{trained}/adapter_model.safetensors"], model)
    after = f"{folder}/after.jsonl"
    inputs = [*map(str, sorted(Path(model).glob("*.safetensors"))), held_out]
    steps.run("after", f"{predict} --model_path {model} --output_path {after}", inputs, after)
    scores = f"{folder}/after.scores.json"
    steps.run("score", f"python score.py --predictions {before} {after} --overwrite", [before, after], scores)

    # Of the answers: a file of scores is anybody's who scores them in another way.
    summary = {name: scores_of(path) for name, path in (("before", before), ("after", after))}
    summary["seconds"] = round(steps.seconds, 1)
    Path(folder, "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_summary(args, folder, steps, summary)


def scores_of(path):
    """The table's metrics of a file of answers."""
    rows = read_predictions(path)
    values = score_rows(rows.answers, rows.references)
    return {name: round(values[name], 2) for name in METRICS}


def print_summary(args, folder, steps, summary):
    """The table, where the picture is, and the commands to take along."""
    names = {"f1": "triple F1", "rougeL": "ROUGE-L", "bleu4": "BLEU-4"}
    print(f"\n{args.mode}, {args.train_type}, 50 held-out rows of data/spo_1.json")
    print(f"{'':12}{'before':>10}{'after':>10}")
    for name, title in names.items():
        print(f"{title:12}{summary['before'][name]:>10.2f}{summary['after'][name]:>10.2f}")
    print(f"\nloss curve: {folder}/train/loss.png")
    print(f"figures:    {folder}/summary.json ({summary['seconds']:.0f} s in all)")
    print("\nThe commands, in order; put your checkpoint and rows in their places:")
    for command in steps.commands:
        print(f"  {command}")


if __name__ == "__main__":
    entry.run(main)
