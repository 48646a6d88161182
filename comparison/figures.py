"""The figures of a comparison, from what its runs left."""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from comparison.commands import Steps
from comparison.methods import answer_steps, checkpoint_of, run_folder, train_step
from comparison.plan import Method, Plan, as_text
from evaluation.intervals import middle, resampled
from evaluation.metrics import METRICS, metrics_of, score_rows
from evaluation.predictions import read_predictions
from evaluation.tasks import Task, find_task
from runtime.json_lines import parse

if TYPE_CHECKING:
    import numpy

NUM_RESAMPLES = 1000
MOST_POINTS = 400  # of a loss curve in the report
NUM_SAMPLES = 5


def figures(plan: Plan, steps: Steps, out: str) -> dict:
    """results.json: what is known of the base model, of every method and of every run."""
    task = find_task(plan.task)
    base = {"name": "base", "runs": [answer_figures(plan, steps, out, "base", plan.base, plan.train_flags)]}
    methods = []
    for method in plan.methods:
        values = {"name": method.name, "family": method.family, "train_type": method.train_type}
        values["flags"] = {flag: as_text(value) for flag, value in method.flags.items()}
        methods.append({**values, "runs": [read_run(plan, steps, out, method, seed) for seed in plan.seeds]})
    for entry in (base, *methods):
        add_means(entry, task)
    done = [method for method in methods if method["status"] == "done"]
    best = max(done, key=lambda method: method["metrics"][task.primary], default=None)
    for method in done:
        method["to_base"] = compared(method, base, task.primary) if base["status"] == "done" else None
        method["to_best"] = compared(method, best, task.primary) if best and method is not best else None
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


def read_run(plan: Plan, steps: Steps, out: str, method: Method, seed: int) -> dict:
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
    answers = answer_figures(plan, steps, out, folder, checkpoint, method.all)
    return {
        **run,
        **answers,
        "commands": [step.command, *answers["commands"]],
        "done": read_done(step.result),
        "checkpoint": checkpoint,
        "checkpoint_bytes": sum(path.stat().st_size for path in Path(checkpoint).rglob("*") if path.is_file()),
    }


def answer_figures(plan: Plan, steps: Steps, out: str, folder: str, model: str, train_flags: dict) -> dict:
    """What a model answered, and its scores: {"status", "commands"} and, if that is done, "rows", "answers"."""
    todo = list(answer_steps(plan, out, folder, model, train_flags))
    run: dict = {"status": "not run", "commands": [step.command for step in todo]}
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
def scored(path: str, changed: int, task: str | None, normalize: bool) -> tuple[list[dict], list[tuple]]:
    """(scored rows, [(question, reference, answer), ...]) of a file of predictions that was written at a time."""
    predictions = read_predictions(path)
    with open(path, encoding="utf-8") as file:
        questions = [json.loads(line)["query"] for line in file if line.strip()]
    rows = score_rows(predictions.answers, predictions.references, task, normalize)["rows"]
    return rows, list(zip(questions, predictions.references, predictions.predictions, strict=True))


def read_done(folder: str) -> dict:
    """The event with which a training ends, {} without one."""
    path = Path(folder, "events.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    events = [event for line in lines if (event := parse(line)) and event.get("event") == "done"]
    return events[-1] if events else {}


def read_curve(folder: str) -> list[list]:
    """[[step, loss], ...] of a training's log, thinned out evenly where it is long."""
    path = Path(folder, "train_log.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    points = [[record["step"], record.get("loss")] for line in lines if (record := parse(line))]
    return points[:: max(1, math.ceil(len(points) / MOST_POINTS))]


def add_means(entry: dict, task: Task) -> None:
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
    for run, value in zip(runs, values, strict=True):
        run["metrics"] = value
    primary = [value[task.primary] for value in values]
    known = [value for value in primary if value is not None]
    entry["spread"] = statistics.stdev(known) if 1 < len(known) == len(primary) else None
    found = [run.get("forgetting") or {} for run in runs]
    entry["forgetting"] = {name: mean_interval([one.get(name) for one in found]) for name in ("loss", "score")}
    for name in ("seconds", "tokens_per_second", "peak_memory_bytes", "trained_weights", "all_weights"):
        entry[name] = mean([run.get("done", {}).get(name) for run in runs])
    entry["checkpoint_bytes"] = mean([run.get("checkpoint_bytes") for run in runs])


def mean(values: list) -> float | None:
    """The mean, None where a value is missing."""
    return None if None in values else math.fsum(values) / len(values)


def mean_interval(intervals: list) -> list[float | None] | None:
    """[value, low, high], each the mean over runs; None where one is missing."""
    return None if None in intervals else [mean(list(values)) for values in zip(*intervals)]


def compared(entry: dict, other: dict, metric: str) -> list[float | None]:
    """[difference, low, high] of a metric, over the same resamples; is 0 inside, it is inside the noise."""
    value = entry["metrics"][metric] - other["metrics"][metric]
    low, high = ends_of(entry, entry["samples"][metric] - other["samples"][metric]) or (None, None)
    return [value, low, high]


def ends_of(entry: dict, samples: numpy.ndarray) -> list[float] | None:
    """The interval of a figure from its values in the resamples; None for a single row, of which nothing follows."""
    return middle(samples) if entry["num_rows"] > 1 else None


def sample_rows(entries: list[dict], task: Task) -> list[dict]:
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
