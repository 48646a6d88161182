"""The steps of a method: training, answers, scores."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints.base_weights import check_weights
from checkpoints.opening import read_config
from comparison.commands import newest_checkpoint
from comparison.plan import (
    FILE_FLAGS,
    Method,
    Plan,
    as_list,
    has_base,
    predict_args,
    predict_words,
    train_args,
    train_words,
)
from flags.score import scores_path
from flags.train import train_parser
from generation.lengths import window_problem
from modes import MODES, possible_modes
from rows.reading import data_files
from train_types import TRAIN_TYPES
from training.ds_config import find_ds_file, is_own_file

if TYPE_CHECKING:
    from modeling.base_config import ChatGLMConfigBase

ROOT = Path(__file__).resolve().parent.parent


class Step(NamedTuple):
    """A command of the comparison: see `Steps.run`."""

    name: str
    command: str
    inputs: list[str]
    result: str
    goes_on: bool = False


def run_folder(name: str, seed: int) -> str:
    """Where a run lies in the output folder."""
    return f"runs/{name}/seed-{seed}"


def train_step(plan: Plan, out: str, method: Method, seed: int) -> Step:
    """The training of a method with one seed."""
    folder = run_folder(method.name, seed)
    words = train_words(plan, method, seed, f"{out}/{folder}/train")
    command = (
        f"bash {program('scripts/job.sh')} deepspeed --master_port 29500 {program('train.py')} {shlex.join(words)}"
    )
    paths = [*plan.train_path, *(path for flag in FILE_FLAGS for path in as_list(method.all.get(flag, [])))]
    inputs = [*weights_of(plan.base), *data_files(paths)]
    ds_file = find_ds_file(method.all.get("ds_file", train_parser().get_default("ds_file")))
    if not is_own_file(ds_file):
        inputs.append(ds_file)
    return Step(f"{folder}/train", command, inputs, f"{out}/{folder}/train", True)


def answer_steps(plan: Plan, out: str, folder: str, model: str, train_flags: dict) -> Iterator[Step]:
    """Prediction, scores and, where asked for, forgetting of a model; folder: "base", or that of a run.

    train_flags: as for `predict_words`.
    """
    answers = f"{out}/{folder}/predictions.jsonl"
    words = predict_words(plan, model, answers, train_flags)
    inputs = [*weights_of(model), *data_files(plan.test_path)]
    yield Step(f"{folder}/predict", f"python {program('predict.py')} {shlex.join(words)}", inputs, answers)
    words = ["--predictions", answers, *(["--task", plan.task] if plan.task else [])]
    words += [*(["--no_normalize"] if plan.no_normalize else []), "--overwrite"]
    scores = str(scores_path(answers, plan.task))
    yield Step(f"{folder}/score", f"python {program('score.py')} {shlex.join(words)}", [answers], scores)
    if plan.forgetting:
        before, result = f"{out}/base/forgetting.json", f"{out}/{folder}/forgetting.json"
        words = ["--model_path", model, *(["--mode", plan.mode] if plan.mode else []), "--output_path", result]
        words += [] if folder == "base" else ["--before", before]
        inputs = [*weights_of(model), *([] if folder == "base" else [before])]
        command = f"python {program('forgetting.py')} {shlex.join(words)} --overwrite"
        yield Step(f"{folder}/forgetting", command, inputs, result)


def program(name: str) -> str:
    """A script as it is called from this folder."""
    return name if Path.cwd() == ROOT else shlex.quote(str(ROOT / name))


def weights_of(folder: str) -> list[str]:
    """Files that decide what a model answers; none for a hub name, which stands for them itself."""
    patterns = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
    return sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern))


def checkpoint_of(folder: str) -> str:
    """A training's checkpoint to compare: best/ where it chose one by held-out rows, else the last."""
    best = os.path.join(folder, "best")
    return best if os.path.isfile(os.path.join(best, "run.json")) else newest_checkpoint(folder)


def model_problems(plan: Plan, methods: list[Method]) -> list[str | None]:
    """Layers and modules named in the flags that the base model does not have, and texts too long for it."""
    if not has_base(plan):
        return []  # a hub name
    mode = MODES[plan.mode or possible_modes(plan.base)[0]]
    config = read_config(plan.base, mode)
    names = check_weights(plan.base, mode, config)
    found = [length_problem(plan, "base", plan.train_flags, config, mode.prompt)]
    for method in methods:
        train_type = TRAIN_TYPES[method.train_type]
        found += [f"{method.name}: {text}" for text in train_type.problems(names, train_args(plan, method)[0], mode)]
        found.append(length_problem(plan, method.name, method.all, config, mode.prompt))
    return found


def length_problem(plan: Plan, name: str, train_flags: dict, config: ChatGLMConfigBase, prompt: Any) -> str | None:
    """Would predict.py refuse the lengths of questions and answers, when a model is trained? A line, or None."""
    args, _ = predict_args(plan, train_flags)
    problem = window_problem(args.max_src_len, args.max_new_tokens, config, prompt)
    return problem and f"{name}: predict_flags: {problem}"
