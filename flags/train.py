"""Every flag of train.py, once, with the checks on their combinations."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from typing import Any

from checkpoints.state_checks import STATE
from evaluation.general_suite import GENERAL
from evaluation.metrics import METRICS
from evaluation.tasks import TASKS, find_task
from flags.common import (
    OneLineParser,
    add_device_flags,
    add_normalize_flag,
    add_row_flags,
    collect,
    expanded_path,
    folder_problems,
    model_problems,
    place_problem,
    range_problems,
    true_or_false,
)
from generation.lengths import LEAST_SRC_LEN, columns_of, window_problem
from modes import MODES
from rows.reading import data_files
from runtime.exits import UserError, fail
from runtime.folders import numbered
from runtime.holding import ENDING, take
from runtime.hosts import START_MINUTES
from runtime.ranks import is_main, launcher_problem, world_size
from train_types import TRAIN_TYPES
from training.ds_config import conflicts, read_ds_file
from training.going_on import take_over
from training.setup import ATTENTION

HOLD_SECONDS = 30  # of --output_dir with --resume: the processes of a killed run need some seconds to end
# Of --metric_for_best_model.
BEST_METRICS = ("loss", *(name for name, metric in METRICS.items() if metric.is_for_best))


def train_parser() -> OneLineParser:
    """Flags of train.py. The seed's names and meanings."""
    parser = OneLineParser(prog="train.py", description="Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B.")
    add_data_flags(parser)
    add_model_flags(parser)
    training = parser.add_argument_group("training")
    add_update_flags(training)
    add_run_flags(training)
    add_evaluation_flags(parser)
    add_train_type_flags(parser)
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The rows, and how they are fitted in."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train_path",
        type=expanded_path,
        nargs="+",
        required=True,
        help="JSON Lines or JSON array files, or folders of them (*.json[l])",
    )
    data.add_argument("--max_len", type=int, default=1024, help="tokens of a row, question and answer; the rest is cut")
    data.add_argument("--max_src_len", type=int, default=256, help="tokens of the question; the rest is cut")
    data.add_argument("--is_skip", action="store_true", help="leave out rows that would be cut; off: cut them")
    data.add_argument(
        "--skip_bad_rows",
        action="store_true",
        help="leave out rows that are not right and list them; off: the first one ends the run",
    )
    data.add_argument(
        "--packing",
        action="store_true",
        help="put several rows, which do not see each other, into a sequence of --max_len; off: pad a batch's rows",
    )
    data.add_argument(
        "--replay_path",
        type=expanded_path,
        nargs="+",
        help="general rows that are mixed in, so that less is forgotten; left out: none",
    )
    data.add_argument(
        "--replay_ratio", type=float, default=0.1, help="general rows for each row of --train_path, with --replay_path"
    )
    data.add_argument("--num_proc", type=int, default=0, help="processes that encode rows; 0: all cores of this host")
    add_row_flags(data)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What is trained."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_name_or_path",
        type=expanded_path,
        required=True,
        help="checkpoint folder, or a hub name such as THUDM/chatglm3-6b; the folder of an adapter (with --train_type"
        " lora) or of a prefix encoder of ours (ptuning) is trained on from where it is",
    )
    model.add_argument("--mode", choices=MODES, help="model family; left out: read from the checkpoint's config.json")
    model.add_argument("--train_type", choices=TRAIN_TYPES, default="lora", help="what trains")


def add_update_flags(training: argparse._ArgumentGroup) -> None:
    """What decides the updates."""
    training.add_argument(
        "--output_dir",
        type=expanded_path,
        required=True,
        help="new or empty folder for checkpoints and logs; with --resume auto the run's",
    )
    training.add_argument(
        "--per_device_train_batch_size",
        type=int,
        default=1,
        help="rows of a micro-batch per process; with --packing: sequences",
    )
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="micro-batches of an update; 1: off"
    )
    training.add_argument("--num_train_epochs", type=int, default=1, help="passes over the rows")
    training.add_argument("--learning_rate", type=float, default=1e-4, help="highest learning rate of AdamW")
    training.add_argument("--weight_decay", type=float, default=0.1, help="of AdamW, not on norms and biases; 0: off")
    training.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the updates that warm up; 0: off")
    training.add_argument(
        "--lr_scheduler_type", choices=("cosine", "linear", "constant"), default="cosine", help="after the warm-up"
    )
    training.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the global gradient norm; 0: off")
    training.add_argument(
        "--optimizer",
        choices=("auto", "torch", "deepspeed_cpu"),
        default="auto",
        help="AdamW of torch, or DeepSpeed's for offload (needs a C++ compiler); auto: the latter for offload on GPUs",
    )
    training.add_argument(
        "--attention",
        choices=ATTENTION,
        default="sdpa",
        help="sdpa: torch's fused kernels; flex: torch's flex attention, for GPUs; eager: written out, to compare",
    )
    training.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    training.add_argument(
        "--gradient_checkpointing_interval",
        type=int,
        default=1,
        help="with --gradient_checkpointing: recompute every K-th layer only; 1: all that gradients flow through",
    )
    training.add_argument("--seed", type=int, default=1234, help="of the row order, dropout and new weights")
    training.add_argument(
        "--ds_file",
        type=expanded_path,
        default="ds_zero2_no_offload.json",
        help="DeepSpeed JSON: a path or a name in configs/",
    )


def add_run_flags(training: argparse._ArgumentGroup) -> None:
    """What a run shows, keeps and waits for."""
    training.add_argument("--show_loss_step", type=int, default=10, help="updates between log lines")
    training.add_argument(
        "--save_model_step", type=int, default=0, help="updates between checkpoints; 0: each epoch's end only"
    )
    training.add_argument(
        "--save_state_step",
        type=int,
        default=0,
        help="updates between states to resume from, state-step-N; 0: only when the run is asked to leave (SIGTERM)",
    )
    training.add_argument(
        "--save_total_limit",
        type=int,
        default=0,
        help="checkpoints, and states, that are kept, the newest ones; 0: all checkpoints and the last two states",
    )
    training.add_argument(
        "--resume",
        type=expanded_path,
        metavar="auto|PATH",
        help="go on with the newest whole state in --output_dir (auto: begin where there is none) or with this state",
    )
    training.add_argument(
        "--step_timeout",
        type=float,
        default=1800.0,
        help="seconds that a micro-batch or an update may take before the run ends and says where it hung; 0: off",
    )
    training.add_argument(
        "--start_timeout",
        type=float,
        default=START_MINUTES,
        help="minutes that the processes of all hosts wait for each other before the run ends and says which did not"
        " come; 0: off",
    )
    add_device_flags(training)


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Held-out rows, and what is chosen by them."""
    evaluation = parser.add_argument_group("evaluation while training")
    held_out = evaluation.add_mutually_exclusive_group()
    held_out.add_argument("--eval_path", type=expanded_path, nargs="+", help="held-out rows; left out: no evaluation")
    held_out.add_argument(
        "--eval_ratio", type=float, default=0.0, help="share of the training rows that is held out, by --seed; 0: off"
    )
    evaluation.add_argument(
        "--eval_step", type=int, default=0, help="updates between evaluations; 0: each epoch's end only"
    )
    evaluation.add_argument(
        "--eval_generate", action="store_true", help="answer the held-out rows and score them too; off: the loss only"
    )
    evaluation.add_argument(
        "--task", choices=TASKS, help="metrics of the answers, with --eval_generate; left out: all but those of labels"
    )
    add_normalize_flag(evaluation, ", with --eval_generate")
    evaluation.add_argument(
        "--eval_max_new_tokens", type=int, default=128, help="tokens of an answer at most, with --eval_generate"
    )
    evaluation.add_argument(
        "--metric_for_best_model",
        choices=BEST_METRICS,
        default="loss",
        help="what the checkpoint in best/ is chosen by; all but the loss need --eval_generate",
    )
    evaluation.add_argument(
        "--early_stopping_patience",
        type=int,
        default=0,
        help="evaluations in a row without a better value after which the run ends; 0: off",
    )


def add_train_type_flags(parser: argparse.ArgumentParser) -> None:
    """What belongs to one train type alone, as its entry in TRAIN_TYPES says."""
    freeze = parser.add_argument_group("--train_type freeze")
    freeze.add_argument(
        "--freeze_module_name", default="layers.27.", help="dotted parts of the weights that train, by comma"
    )
    ptuning = parser.add_argument_group("--train_type ptuning")
    ptuning.add_argument("--pre_seq_len", type=int, default=16, help="virtual tokens in front of every layer")
    ptuning.add_argument(
        "--prefix_projection",
        type=true_or_false,
        default=True,
        metavar="{True,False}",
        help="two-layer network in front",
    )
    lora = parser.add_argument_group("--train_type lora")
    lora.add_argument("--lora_dim", type=int, default=8, help="rank of the matrices")
    lora.add_argument("--lora_alpha", type=float, default=30, help="the delta is scaled by lora_alpha / lora_dim")
    lora.add_argument("--lora_dropout", type=float, default=0.1, help="dropout before the matrices; 0: off")
    lora.add_argument("--lora_module_name", default="query_key_value", help="linear layers that get matrices, by comma")


def parse_train(argv: list[str]) -> argparse.Namespace:
    """Checked flags of train.py; ends with exit code 2 and all problems at once. `args.mode` is filled in."""
    parser = train_parser()
    args = parser.parse_args(argv)
    problems = [*filter(None, [launcher_problem()]), *train_problems(args, parser.typed(argv))]
    if problems:
        fail(problems, parser.prog)
    return args


def train_problems(args: argparse.Namespace, typed: Collection[str]) -> list:
    """Everything that is wrong with the flags and can be known before a weight is read."""
    problems = range_problems(
        args,
        at_least_one="per_device_train_batch_size gradient_accumulation_steps num_train_epochs show_loss_step"
        " max_src_len max_len pre_seq_len lora_dim gradient_checkpointing_interval eval_max_new_tokens",
        at_least_zero="eval_step early_stopping_patience replay_ratio learning_rate weight_decay max_grad_norm"
        " save_model_step save_state_step save_total_limit step_timeout start_timeout lora_alpha num_proc",
        share="warmup_ratio lora_dropout eval_ratio",
        seed="seed",
    )
    problems += evaluation_problems(args, typed)
    for name, train_type in TRAIN_TYPES.items():
        if name != args.train_type:
            problems += [
                f"--{flag}: belongs to --train_type {name}, this run is --train_type {args.train_type}: remove one"
                for flag in train_type.flags
                if flag in typed
            ]
    if "gradient_checkpointing_interval" in typed and not args.gradient_checkpointing:
        problems.append("--gradient_checkpointing_interval: needs --gradient_checkpointing: add it or remove this flag")
    if args.response_column in columns_of(args).sources:
        problems.append(f"--response_column {args.response_column}: is part of the question: name the answer's field")
    problems += collect(data_files, args.train_path, prefix="--train_path ")
    taken = take_over(args, typed)  # where it is an adapter or a prefix encoder
    problems += model_problems(args, "--model_name_or_path", args.model_name_or_path) if taken is None else taken
    if args.mode is not None:
        problems += family_problems(args)
        if min(args.max_len, args.max_src_len) >= 1:
            problems += length_problems(args)
    if is_main():  # it makes the folder, and may be ahead of the others
        problems += output_problems(args.output_dir, args.model_name_or_path, args.resume)
        if args.resume not in (None, "auto") and not os.path.isfile(os.path.join(args.resume, "state.json")):
            [name] = numbered(args.resume, STATE)[:1] or [None]
            place = os.path.join(args.resume, name) if name else "a state-step-N folder"
            problems.append(f"--resume {args.resume}: no state in it: name {place}, or auto")
    try:
        problems += conflicts(read_ds_file(args.ds_file), args, world_size())
    except UserError as error:
        problems.append(str(error))
    return problems


def evaluation_problems(args: argparse.Namespace, typed: Collection[str]) -> list:
    """Flags of the evaluation and of general rows that mean nothing without others."""
    problems = []
    if not args.eval_path and not args.eval_ratio:
        flags = "eval_step eval_generate task no_normalize eval_max_new_tokens metric_for_best_model"
        flags += " early_stopping_patience"
        problems += [
            f"--{name}: needs --eval_path or --eval_ratio: add one or remove it"
            for name in flags.split()
            if name in typed
        ]
    if args.eval_generate and find_task(args.task).all_answers:
        problems.append(
            f"--task {args.task}: needs several answers of a row, --eval_generate gives one: score it later"
        )
    metric, metrics = args.metric_for_best_model, ("loss", *find_task(args.task).metrics)
    if metric != "loss" and not args.eval_generate:
        problems.append(f"--metric_for_best_model {metric}: needs --eval_generate: add it")
    elif metric not in metrics:
        fitting = [name for name in TASKS if metric in TASKS[name].metrics]
        problems.append(
            f"--metric_for_best_model {metric}: --task {args.task or '(none)'} does not have it: use --task"
            f" {' or '.join(fitting)}"
        )
    problems += [
        f"--{name}: needs --eval_generate: add it or remove this flag"
        for name in ("task", "no_normalize", "eval_max_new_tokens")
        if name in typed and not args.eval_generate
    ]
    if "replay_ratio" in typed and not args.replay_path:
        problems.append("--replay_ratio: needs --replay_path: add it or remove this flag")
    for flag in ("eval_path", "replay_path"):
        problems += collect(data_files, getattr(args, flag) or [], prefix=f"--{flag} ")
    for flag in ("train_path", "replay_path"):
        problems += [
            f"--{flag} {path}: holds the questions of the forgetting check, which would then measure nothing: use"
            " other general rows"
            for path in getattr(args, flag) or []
            if f"{os.path.realpath(path)}{os.sep}".startswith(GENERAL + os.sep)
        ]
    return problems


def family_problems(args: argparse.Namespace) -> list[str]:
    """Flags that the model's family cannot obey."""
    family, problems = MODES[args.mode], []
    if reason := TRAIN_TYPES[args.train_type].unfit(family):
        fitting = [name for name, train_type in TRAIN_TYPES.items() if not train_type.unfit(family)]
        problems.append(f"--train_type {args.train_type}: {reason}: use {' or '.join(fitting)}")
    if args.packing and not family.can_pack:
        problems.append(f"--packing: {family.title} does not keep rows of one sequence apart here: remove it")
    return problems


def length_problems(args: argparse.Namespace) -> list[str]:
    """Does --max_src_len leave room for an answer in --max_len, and for a question?"""
    reserved = MODES[args.mode].prompt.RESERVED
    most = args.max_len - reserved - 1
    least = LEAST_SRC_LEN
    if args.max_len < reserved + 1 + least:
        return [
            f"--max_len {args.max_len}: too small for a question and an answer: use at least {reserved + 1 + least}"
        ]
    if args.max_src_len > most:
        return [
            f"--max_src_len {args.max_src_len} leaves no room for an answer in --max_len {args.max_len}:"
            f" use at most {most} or raise --max_len"
        ]
    if args.max_src_len < least:
        return [f"--max_src_len {args.max_src_len}: leaves nothing of a question: use at least {least}"]
    return []


def hold_output(args: argparse.Namespace) -> None:
    """Make --output_dir and keep other commands out of it until the process ends. For the first process.

    Only under the lock is it sure to be new, empty or that of the run that is resumed, so this is looked at again. The
    last processes of a killed run that is continued are waited for.
    """
    take(args.output_dir, "--output_dir", is_inside=True, seconds=HOLD_SECONDS if args.resume else 0)
    if problems := output_problems(args.output_dir, args.model_name_or_path, args.resume):
        raise UserError(problems[0])


def output_problems(output_dir: str, model_path: str, resume: str | None) -> list[str]:
    """The output folder must be new, empty or that of the run that is resumed, and not the model's.

    What a killed run leaves of its lock does not count.
    """
    if os.path.exists(model_path) and os.path.realpath(output_dir) == os.path.realpath(model_path):
        return [f"--output_dir {output_dir}: is the model's own folder: choose another"]
    if os.path.exists(output_dir):
        if not os.path.isdir(output_dir):
            return [f"--output_dir {output_dir}: is a file: choose a folder"]
        if resume == "auto" and not is_run_folder(output_dir):
            return [f"--output_dir {output_dir}: is not empty, and not of a run to --resume: choose the run's folder"]
        is_own = resume is not None and os.path.realpath(os.path.dirname(resume.rstrip("/"))) == os.path.realpath(
            output_dir
        )
        if names_in(output_dir) and resume != "auto" and not is_own:
            if numbered(output_dir, STATE):
                fix = "add --resume auto to go on with that run, or choose a new folder"
                return [f"--output_dir {output_dir}: is not empty: {fix}"]
            return [f"--output_dir {output_dir}: is not empty: choose a new folder, so that no earlier run is lost"]
    problem = place_problem("--output_dir", output_dir)
    return [problem] if problem else []


def names_in(folder: str) -> list[str]:
    """What lies in a folder besides a lock."""
    return [name for name in os.listdir(folder) if name != ENDING]


def is_run_folder(folder: str) -> bool:
    """Is the folder empty, or does it hold what train.py writes first?"""
    names = names_in(folder)
    return not names or any(name.startswith(("fingerprint.json", "state-step-")) for name in names)


def check_folder(args: argparse.Namespace, folder: str) -> None:
    """Check what a hub name left open until its config.json was there."""
    folder_faults = folder_problems(args, "--model_name_or_path", folder)
    if problems := folder_faults or family_problems(args) + length_problems(args):
        fail(problems)


def check_limits(args: argparse.Namespace, base: Any) -> None:
    """Refuse flags that ask for more than the model has."""
    config = base.config
    for flag, most in (("lora_dim", config.hidden_size), ("pre_seq_len", config.window)):
        if flag in base.train_type.flags and getattr(args, flag) > most:
            fail(f"--{flag} {getattr(args, flag)}: use at most {most} with this model")
    if args.max_len > config.window:
        fail(f"--max_len {args.max_len}: the model's window is {config.window} tokens: use at most {config.window}")
    answer_lengths = (args.max_src_len, args.eval_max_new_tokens, config, base.mode.prompt, "eval_max_new_tokens")
    if args.eval_generate and (problem := window_problem(*answer_lengths)):
        fail(problem)
