"""Which method is best for my task? Trains, predicts with and scores each of several, and writes a report.

    python compare.py configs/compare_quickstart.yaml

The methods run one after another through the launcher, on the GPUs in CUDA_VISIBLE_DEVICES (the first one without
it). What is done is not done again: after a break, the same command goes on. Paths, those in the YAML file too, are
seen from the folder it is started in.
"""

from runtime import entry  # first: Ctrl-C is heard while the others are imported

# isort: split

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from checkpoints.state_checks import STATE
from comparison.commands import RunWords, StepError, Steps, run_words
from comparison.figures import figures
from comparison.methods import answer_steps, checkpoint_of, model_problems, run_folder, train_step
from comparison.plan import Method, Plan, has_base, read_plan
from evaluation.metrics import titles_in
from flags.common import collect, place_problem
from flags.compare import compare_parser
from reports.page import read_results, write_report
from runtime.exits import EXIT_LEFT, UserError, fail
from runtime.folders import numbered, whole_file
from runtime.holding import holding, require_there
from runtime.machine import machine
from runtime.streams import visible


def main(argv: list[str] | None = None, run_words: RunWords = run_words) -> int:
    """Run what is not done yet and write the report; returns the exit code. run_words: how a command is run."""
    args = compare_parser().parse_args(argv)
    plan: Plan | None = None
    problems: list[str] = []
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
    assert plan  # there are problems otherwise

    with holding(out, "--output_dir", is_inside=True):
        return run_and_report(args, plan, out, run_words)


def run_and_report(args: argparse.Namespace, plan: Plan, out: str, run_words: RunWords) -> int:
    """From the checked flags to the report; returns the exit code."""
    steps = Steps(out, gpus=os.environ.get("CUDA_VISIBLE_DEVICES", "0"), run_words=run_words)
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


def default_output_dir(config: str) -> str:
    """output/compare-NAME for configs/compare_NAME.yaml or NAME.yaml."""
    return f"output/compare-{re.sub(r'^compare[-_]', '', Path(config).stem)}"


def run_all(plan: Plan, steps: Steps, out: str, chosen: list[Method]) -> bool:
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


def run_method(plan: Plan, steps: Steps, out: str, method: Method, seed: int) -> bool:
    """Train, predict and score one method with one seed. Has it failed?"""
    folder = run_folder(method.name, seed)
    Path(out, folder, "failed.json").unlink(missing_ok=True)
    step = train_step(plan, out, method, seed)
    try:
        steps.run(*step)
        for name in numbered(step.result, STATE):  # nobody will resume from them
            shutil.rmtree(os.path.join(step.result, name))
        for answer in answer_steps(plan, out, folder, checkpoint_of(step.result), method.all):
            step = answer
            steps.run(*step)
    except StepError as error:
        print(f"\n{step.name}: failed with exit code {error.code}, the comparison goes on", file=sys.stderr, flush=True)
        failed = {"step": step.name, "command": step.command, "code": error.code}
        write_json(failed, Path(out, folder, "failed.json"))
        return True
    return False


def write_json(value: object, path: Path) -> None:
    """A small file of the comparison, whole or not at all."""
    with whole_file(path) as file:
        json.dump(value, file, ensure_ascii=False)


def report(plan: Plan, steps: Steps, out: str) -> str:
    """Gather the figures of what is done and write the report; returns the path of its page."""
    require_there(out)
    folder = os.path.join(out, "report")
    before = read_results(folder).get("plan", plan.path)
    if before != plan.path:
        again = f"python compare.py {shlex.quote(before)} --output_dir {shlex.quote(out)} --report_only"
        print(f"\n{folder}: replaces the report on {before}, which this makes again: {again}", flush=True)
    return write_report(figures(plan, steps, out), folder, titles_in(plan.language))


if __name__ == "__main__":
    entry.run(main)
