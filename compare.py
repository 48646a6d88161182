"""Which method is best for my task? Trains, predicts with and scores each of several, and writes a report.

    python compare.py configs/compare_quickstart.yaml

The methods run one after another through the launcher, on the cards in CUDA_VISIBLE_DEVICES (the first one without
it). What is done is not done again: after a break, the same command goes on. Paths, those in the YAML file too, are
seen from the folder it is started in.
"""

import entry  # first: Ctrl-C is heard while the others are imported

import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from arguments import collect, compare_parser, place_problem
from bootstrap import middle, resampled
from checkpoint import read_config
from compare_plan import (
    FILE_FLAGS,
    as_list,
    as_text,
    has_base,
    predict_args,
    predict_words,
    read_plan,
    train_args,
    train_words,
)
from data_set import data_files
from doctor import memory, output_of
from ds_config import find_ds_file, is_own_file
from exits import EXIT_LEFT, UserError
from folders import numbered, whole_file
from holding import holding, require_there
from lengths import window_problem
from metrics import METRICS, metrics_of
from modes import MODES, possible_modes
from report import read_results, write_report
from resume import STATE
from run_log import parse
from score import read_predictions, score_rows, scores_path
from steps import StepFailed, Steps, newest_checkpoint, run_words
from tasks import find_task
from train_arguments import train_parser
from tuning import TRAIN_TYPES
from utils import fail, visible
from weights import check_weights

ROOT = Path(__file__).resolve().parent
NUM_RESAMPLES = 1000
MOST_POINTS = 400  # of a loss curve in the report
NUM_SAMPLES = 5
PACKAGES = ("torch", "transformers", "deepspeed", "peft")


class Step(NamedTuple):
    """A command of the comparison: see `Steps.run`."""

    name: str
    command: str
    inputs: list
    result: str
    goes_on: bool = False


def main(argv, run_words=run_words):
    """Run what is not done yet and write the report; returns the exit code. run_words: how a command is run."""
    args = compare_parser().parse_args(argv)
    plan, problems = None, []
    try:
        plan, problems = read_plan(args.config)
    except UserError as error:
        problems = [str(error)]
    if plan:
        names = {name for method in plan.methods for name in (method.name, method.family)}
        problems += [
            f"--only {name}: {args.config} has no such method: choose from {', '.join(sorted(names))}"
            for name in args.only or []
            if name not in names
        ]
        plan.forgetting = plan.forgetting or args.forgetting
        plan.language = args.language
    out = os.path.normpath(args.output_dir or default_output_dir(args.config))
    if problem := place_problem("--output_dir", out):
        problems.append(problem)
    problems += collect(read_results, os.path.join(out, "report"), prefix="--output_dir: ")
    if args.report_only and not os.path.isdir(out):
        problems.append(f"--report_only: there is no {out}: run it first, or give its --output_dir")
    if problems:
        fail(problems, "compare.py")

    with holding(out, "--output_dir", is_inside=True):
        return run_and_report(args, plan, out, run_words)


def run_and_report(args, plan, out, run_words):
    """From the checked flags to the report; returns the exit code."""
    steps = Steps(out, cards=os.environ.get("CUDA_VISIBLE_DEVICES", "0"), run_words=run_words)
    failed = False
    if not args.report_only:
        chosen = [m for m in plan.methods if not args.only or {m.name, m.family} & set(args.only)]
        try:
            failed = run_all(plan, steps, out, chosen)
        except SystemExit as stop:
            if stop.code == EXIT_LEFT:
                print("\nleft: the same command goes on from here", flush=True)
            raise
    path = report(plan, steps, out)
    print(f"\nreport: {visible(path)}")
    return 1 if failed else 0


def default_output_dir(config):
    """output/compare-NAME for configs/compare_NAME.yaml or NAME.yaml."""
    return f"output/compare-{re.sub(r'^compare[-_]', '', Path(config).stem)}"


# Running.


def run_all(plan, steps, out, chosen):
    """Run the base model and the chosen methods, with a report after each. Has one failed?"""
    if plan.base_command and not has_base(plan):
        path, command = map(visible, (plan.path, plan.base_command))
        print(f"\nbase_command of {path} is run, whatever it is: {command}", flush=True)
        steps.run("make-base", plan.base_command, [], plan.base)
    problems = model_problems(plan, chosen)
    for method in chosen:
        for seed in plan.seeds:
            step = train_step(plan, out, method, seed)
            problems.append(steps.conflict(step.name, steps.key(step.command, step.inputs), step.result, goes_on=True))
    if any(problems):
        fail([f"{plan.path}: {problem}" for problem in problems if problem], "compare.py")
    write_json(machine(), Path(out, "machine.json"))
    for step in answer_steps(plan, out, "base", plan.base, plan.train_flags):
        steps.run(*step)
    num_failed = 0
    runs = [(method, seed) for method in chosen for seed in plan.seeds]
    for number, (method, seed) in enumerate(runs, start=1):
        print(f"\n==== {number} of {len(runs)}: {method.name}, seed {seed}", flush=True)
        num_failed += run_method(plan, steps, out, method, seed)
        report(plan, steps, out)
    return num_failed > 0


def model_problems(plan, methods):
    """Layers and modules named in the flags that the base model does not have, and texts too long for it."""
    if not has_base(plan):
        return []  # a hub name
    mode = MODES[plan.mode or possible_modes(plan.base)[0]]
    config = read_config(plan.base, mode)
    names = check_weights(plan.base, mode, config)
    found = [length_problem(plan, "base", plan.train_flags, config, mode.prompt)]
    for method in methods:
        train_type = TRAIN_TYPES[method.train_type]
        found += [f"{method.name}: {text}" for text in train_type.problems(names, train_args(plan, method)[0])]
        found.append(length_problem(plan, method.name, method.all, config, mode.prompt))
    return found


def length_problem(plan, name, train_flags, config, prompt):
    """Would predict.py refuse the lengths of questions and answers, when a model is trained? A line, or None."""
    args, _ = predict_args(plan, train_flags)
    problem = window_problem(args.max_src_len, args.max_new_tokens, config, prompt)
    return problem and f"{name}: predict_flags: {problem}"


def run_method(plan, steps, out, method, seed):
    """Train, predict and score one method with one seed. Has it failed?"""
    folder = run_folder(method.name, seed)
    Path(out, folder, "failed.json").unlink(missing_ok=True)
    step = train_step(plan, out, method, seed)
    try:
        steps.run(*step)
        for name in numbered(step.result, STATE):  # nobody will resume from them
            shutil.rmtree(os.path.join(step.result, name))
        for step in answer_steps(plan, out, folder, checkpoint_of(step.result), method.all):
            steps.run(*step)
    except StepFailed as error:
        print(f"\n{step.name}: failed with exit code {error.code}, the comparison goes on", file=sys.stderr, flush=True)
        failed = {"step": step.name, "command": step.command, "code": error.code}
        write_json(failed, Path(out, folder, "failed.json"))
        return True
    return False


def write_json(value, path):
    """A small file of the comparison, whole or not at all."""
    with whole_file(path) as file:
        json.dump(value, file, ensure_ascii=False)


def run_folder(name, seed):
    """Where a run lies in the output folder."""
    return f"runs/{name}/seed-{seed}"


def train_step(plan, out, method, seed):
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


def answer_steps(plan, out, folder, model, train_flags):
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


def program(name):
    """A script as it is called from this folder."""
    return name if Path.cwd() == ROOT else shlex.quote(str(ROOT / name))


def weights_of(folder):
    """Files that decide what a model answers; none for a hub name, which stands for them itself."""
    patterns = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
    return sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern))


def checkpoint_of(folder):
    """A training's checkpoint to compare: best/ where it chose one by held-out rows, else the last."""
    best = os.path.join(folder, "best")
    return best if os.path.isfile(os.path.join(best, "run.json")) else newest_checkpoint(folder)


# Figures.


def report(plan, steps, out):
    """Gather the figures of what is done and write the report; returns the path of its page."""
    require_there(out)
    folder = os.path.join(out, "report")
    before = read_results(folder).get("plan", plan.path)
    if before != plan.path:
        again = f"python compare.py {shlex.quote(before)} --output_dir {shlex.quote(out)} --report_only"
        print(f"\n{folder}: replaces the report on {before}, which this makes again: {again}", flush=True)
    return write_report(figures(plan, steps, out), folder)


def figures(plan, steps, out):
    """results.json: what is known of the base model, of every method and of every run."""
    task = find_task(plan.task)
    base = {"name": "base", "runs": [read_answers(plan, steps, out, "base", plan.base, plan.train_flags)]}
    methods = []
    for method in plan.methods:
        values = {"name": method.name, "family": method.family, "train_type": method.train_type}
        values["flags"] = {flag: as_text(value) for flag, value in method.flags.items()}
        methods.append({**values, "runs": [read_run(plan, steps, out, method, seed) for seed in plan.seeds]})
    for entry in (base, *methods):
        summarize(entry, task)
    done = [method for method in methods if method["status"] == "done"]
    best = max(done, key=lambda method: method["metrics"][task.primary], default=None)
    for method in done:
        method["to_base"] = compared(method, base, task.primary) if base["status"] == "done" else None
        method["to_best"] = compared(method, best, task.primary) if method is not best else None
    samples = sample_rows([entry for entry in (base, *done) if entry["status"] == "done"], task)
    commands = [plan.base_command] if plan.base_command else []
    for entry in (base, *methods):
        for run in entry["runs"]:
            commands += run.pop("commands")
            run.pop("answers", None), run.pop("rows", None)
        entry.pop("samples", None)
    machine_path = Path(out, "machine.json")
    return {
        "plan": plan.path,
        "language": plan.language,
        "base_model": plan.base,
        "task": plan.task,
        "no_normalize": plan.no_normalize,
        "primary": task.primary,
        "metrics": {name: METRICS[name].title for name in task.metrics},
        "train_path": plan.train_path,
        "test_path": plan.test_path,
        "seeds": plan.seeds,
        "forgetting": plan.forgetting,
        "has_grid": len({method.family for method in plan.methods}) < len(plan.methods),
        "base": base,
        "methods": methods,
        "best": best["name"] if best else None,
        "samples": samples,
        "commands": commands,
        "machine": json.loads(machine_path.read_text(encoding="utf-8")) if machine_path.exists() else {},
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def read_run(plan, steps, out, method, seed):
    """The figures of one run: {"seed", "status", "commands"} and, as far as it came, what it gave."""
    folder = run_folder(method.name, seed)
    step = train_step(plan, out, method, seed)
    run = {"seed": seed, "status": "not run", "commands": [step.command], "loss": read_curve(step.result)}
    failed = Path(out, folder, "failed.json")
    if failed.exists():
        code = json.loads(failed.read_text(encoding="utf-8"))["code"]
        return {**run, "status": f"failed with exit code {code}"}
    stamp = steps.stamp(step.name)
    if not steps.is_current(step.name, step.command, step.inputs, step.result):
        # What is done all the same is of other rows, or of another base.
        is_begun = stamp.get("command") == step.command and not steps.is_done(step.name, step.result)
        return {**run, "status": "begun"} if is_begun and run["loss"] else {**run, "loss": []}
    checkpoint = checkpoint_of(step.result)
    answers = read_answers(plan, steps, out, folder, checkpoint, method.all)
    return {
        **run,
        **answers,
        "commands": [step.command, *answers["commands"]],
        "done": read_done(step.result),
        "checkpoint": checkpoint,
        "checkpoint_bytes": sum(path.stat().st_size for path in Path(checkpoint).rglob("*") if path.is_file()),
    }


def read_answers(plan, steps, out, folder, model, train_flags):
    """What a model answered, and its scores: {"status", "commands"} and, if that is done, "rows", "answers"."""
    todo = list(answer_steps(plan, out, folder, model, train_flags))
    run = {"status": "not run", "commands": [step.command for step in todo]}
    predicted, _, *measured = todo  # the figures are of the answers: what lies in a file of scores is not asked
    for step in (predicted, *measured):
        if not steps.is_current(step.name, step.command, step.inputs, step.result):
            return run
    path = predicted.result
    rows, answers = scored(path, os.stat(path).st_mtime_ns, plan.task, not plan.no_normalize)
    run |= {"status": "done", "rows": rows, "answers": answers}
    if plan.forgetting:
        with open(measured[0].result, encoding="utf-8") as file:
            run["forgetting"] = json.load(file).get("difference")
    return run


@functools.cache
def scored(path, changed, task, normalize):
    """(scored rows, [(question, reference, answer), ...]) of a file of predictions that was written at a time."""
    predictions = read_predictions(path)
    with open(path, encoding="utf-8") as file:
        questions = [json.loads(line)["query"] for line in file if line.strip()]
    rows = score_rows(predictions.answers, predictions.references, task, normalize)["rows"]
    return rows, list(zip(questions, predictions.references, predictions.predictions))


def read_done(folder):
    """The event with which a training ends, {} without one."""
    path = Path(folder, "events.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    events = [event for line in lines if (event := parse(line)) and event.get("event") == "done"]
    return events[-1] if events else {}


def read_curve(folder):
    """[[step, loss], ...] of a training's log, thinned out evenly where it is long."""
    path = Path(folder, "train_log.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    points = [[record["step"], record.get("loss")] for line in lines if (record := parse(line))]
    return points[:: max(1, math.ceil(len(points) / MOST_POINTS))]


def summarize(entry, task):
    """Put into a method the means over its runs; its status is "done" where all of them are."""
    runs = entry["runs"]
    open_ones = [run["status"] for run in runs if run["status"] != "done"]
    entry["status"] = open_ones[0] if open_ones else "done"
    if open_ones:
        return
    # Every run has the same rows, and so the same resamples: the mean over seeds is taken in each of them.
    samples = [resampled(run["rows"], task.metrics, NUM_RESAMPLES) for run in runs]
    entry["samples"] = {name: sum(sample[name] for sample in samples) / len(samples) for name in task.metrics}
    values = [metrics_of(run["rows"], task.name or None) for run in runs]
    entry["metrics"] = {name: mean([value[name] for value in values]) for name in task.metrics}
    entry["num_rows"] = len(runs[0]["rows"])
    entry["intervals"] = {name: ends_of(entry, entry["samples"][name]) for name in task.metrics}
    for run, value in zip(runs, values):
        run["metrics"] = value
    primary = [value[task.primary] for value in values]
    entry["spread"] = statistics.stdev(primary) if len(primary) > 1 and None not in primary else None
    found = [run.get("forgetting") or {} for run in runs]
    entry["forgetting"] = {name: mean_interval([one.get(name) for one in found]) for name in ("loss", "score")}
    for name in ("seconds", "tokens_per_second", "peak_memory_bytes", "trained_weights", "all_weights"):
        entry[name] = mean([run.get("done", {}).get(name) for run in runs])
    entry["checkpoint_bytes"] = mean([run.get("checkpoint_bytes") for run in runs])


def mean(values):
    """The mean, None where a value is missing."""
    return None if None in values else math.fsum(values) / len(values)


def mean_interval(intervals):
    """[value, low, high], each the mean over runs; None where one is missing."""
    return None if None in intervals else [mean(list(values)) for values in zip(*intervals)]


def compared(entry, other, metric):
    """[difference, low, high] of a metric, over the same resamples; is 0 inside, it is inside the noise."""
    value = entry["metrics"][metric] - other["metrics"][metric]
    low, high = ends_of(entry, entry["samples"][metric] - other["samples"][metric]) or (None, None)
    return [value, low, high]


def ends_of(entry, samples):
    """The interval of a figure from its values in the resamples; None for a single row, of which nothing follows."""
    return middle(samples) if entry["num_rows"] > 1 else None


def sample_rows(entries, task):
    """A few rows, evenly spaced whatever the answers are, with what each answered in its first run."""
    if not entries:
        return []
    runs = {entry["name"]: entry["runs"][0] for entry in entries}
    count = min(len(run["rows"]) for run in runs.values())
    samples = []
    for n in [count * k // min(NUM_SAMPLES, count) for k in range(min(NUM_SAMPLES, count))]:
        question, reference, _ = runs[entries[0]["name"]]["answers"][n]
        answers = {
            name: {"text": run["answers"][n][2], "score": metrics_of([run["rows"][n]], task.name or None)[task.primary]}
            for name, run in runs.items()
        }
        samples.append({"row": n + 1, "question": question, "reference": reference, "answers": answers})
    return samples


def machine():
    """What the comparison runs on, and the versions."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        names = re.findall(r"^model name\s*: (.*)$", file.read(), re.M)
    code, cards = output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return {
        "system": platform.platform(),
        "cpu": f"{len(os.sched_getaffinity(0))} x {names[0] if names else platform.machine()}",
        "memory_bytes": memory()[0],
        "cards": cards.splitlines() if code == 0 else [],
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    entry.run(main)
