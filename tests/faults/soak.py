"""The long reliability checks: real runs, through the deepspeed launcher on two CPU processes, killed and gone on with.

    bash scripts/soak.sh                             # all parts, about an hour on two free cores
    bash scripts/soak.sh --only exact adam convert   # these parts
    bash scripts/soak.sh --only kills --kills 2 --limit 1 --json /tmp/tried.json   # tried out

Each result is kept in docs/reliability.json as soon as it is there, and the tables of docs/reliability.md are made from
it. The exit code is 1 where a part does not hold what the page promises. Minutes on two free cores:
{minutes}
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Callable

import psutil

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "faults")]

from faulty_train import POINTS, REPLACING  # noqa: E402
from harness import TYPES, Run, last_weights, log_of, prepare  # noqa: E402

from benchmarks import report  # noqa: E402
from folders import PARTIAL, REPLACED, is_whole  # noqa: E402

FIGURES = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- figures: made by tests/faults/soak.py -->", "<!-- end of figures -->"
NOT_RUN = "not run · 未运行"

TRAINS = {  # what trains, without a DeepSpeed file
    "freeze": "--train_type freeze --freeze_module_name layers.1.",
    "ptuning": "--train_type ptuning --pre_seq_len 4",
    "lora": "--train_type lora --lora_dim 4 --lora_dropout 0.1",
    "all": "--train_type all",
}
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.json"))
SHORT = "--num_train_epochs 3 --show_loss_step 1 --save_state_step 4"  # 11 rows: 9 updates, a state after 4 of them
LONG = "--num_train_epochs 8 --show_loss_step 1 --save_model_step 2 --save_state_step 2 --save_total_limit 2"
LONG_ROWS, LONG_STEPS = 15, 32
FILE_POINTS, CLOSING_POINTS = POINTS[:2], POINTS[2:]  # all ranks come to the former, the first one to the latter
END_SECONDS = 300  # after which a run counts as hanging


# ---------------------------------------------------------------- runs


def end(run, seconds=END_SECONDS):
    """The exit code of a run; None where it did not end, it is killed then."""
    try:
        return run.end(seconds)
    except (subprocess.TimeoutExpired, AssertionError):
        run.kill()
        for process in processes_in(run.folder):
            process.kill()
        return None


def finished(run):
    """A run that must end well; RuntimeError with its last words otherwise."""
    code = end(run)
    if code != 0:
        raise RuntimeError(f"exit code {code}\n{run.text[-3000:]}")
    return run


def processes_in(folder):
    """The processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_for_ranks(run):
    """Wait until both ranks of a run are there."""
    while len(run.ranks()) < 2 and run.process.poll() is None:
        time.sleep(0.05)


def loading_seconds(run):
    """Wait until a run trains; seconds since its ranks were there."""
    wait_for_ranks(run)
    start = time.monotonic()
    run.wait_for(r"updates of \d+", END_SECONDS)
    return time.monotonic() - start


def last_state(out):
    """Numbers of the states in a run's folder, the newest first."""
    return sorted((int(path.name.rpartition("-")[2]) for path in out.glob("state-step-*[0-9]")), reverse=True)


def same_end(first, second, num_steps, after=0):
    """(are the last weights of two runs equal byte for byte?, are the log's figures after a step equal?)"""
    logs = [{step: values for step, values in log_of(out).items() if step > after} for out in (first, second)]
    return last_weights(first, num_steps) == last_weights(second, num_steps), logs[0] == logs[1]


# ---------------------------------------------------------------- kills


@dataclass(frozen=True)
class Kill:
    """One kill: of a rank, or (None) of all processes; at a named point of a save, or at a random moment.

    number: how often the rank comes to the point before it is killed there.
    """

    rank: int | None
    point: str | None = None
    number: int = 1
    is_loading: bool = False

    @property
    def fault(self):
        """What faulty_train.py is told."""
        return f"kill {self.rank} {self.number} {self.point}" if self.point else None

    def __str__(self):
        who = "all processes" if self.rank is None else f"rank {self.rank}"
        where = f"{self.point}, {self.number}" if self.point else "loading" if self.is_loading else "training"
        return f"{who}, {where}"


def planned_kills(number, rng):
    """`number` kills at random moments, and one at each named point of a save, in random order.

    Half of the former are of one rank, four of five while training. A checkpoint is saved before each state, so that
    closing points come up for the one and then for the other.
    """
    kills = [Kill(rank=rng.choice((0, 1)) if i % 2 else None, is_loading=(i // 2) % 5 == 4) for i in range(number)]
    kills += [Kill(rank, point, rng.randint(1, 4)) for rank in (0, 1) for point in FILE_POINTS]
    kills += [Kill(0, point, number) for point in (*CLOSING_POINTS, REPLACING) for number in (1, 2)]
    rng.shuffle(kills)
    return kills


def kills(args, folder):
    """Runs that are killed again and again must lose nothing and end as the one that was not."""
    for name in args.types:
        rng = random.Random(f"{args.seed} {name}")
        flags = f"{LONG} --output_dir out {TYPES[name]}"
        flags += f" --per_device_train_batch_size {1 if '--packing' in flags else 2}"  # 4 updates in each epoch
        whole = Run(prepare(folder / f"{name}-whole", LONG_ROWS), flags)
        loading = loading_seconds(whole)
        start = time.monotonic()
        finished(whole)
        times = loading, time.monotonic() - start
        pending = planned_kills(args.kills, rng)
        if args.limit:
            pending = [kill for kill in pending if not kill.point] + [k for k in pending if k.point][: args.limit]
        number = 0
        while pending:
            number += 1
            place = prepare(folder / f"{name}-chain-{number}", LONG_ROWS)
            for row in chain(place, flags, whole.folder / "out", pending, times, rng):
                yield {"type": name, "chain": number, **row}
            if not args.keep:
                shutil.rmtree(place)


def chain(folder, flags, whole, pending, times, rng):
    """Kill a run and go on with it until it comes to its end; takes from `pending` what it has done.

    Yields a row for each kill once it is known where the run went on, and one for the end of the chain.
    """
    out = folder / "out"
    saved = 0  # the last step whose state was said to be saved
    open_rows = []
    while True:
        states = last_state(out)
        # A folder is replaced where a run goes on from an older state; what it comes to is there already.
        kill = next((k for k in pending if k.point != REPLACING or len(states) > 1), Kill(None) if pending else None)
        replacing = kill is not None and kill.point == REPLACING
        resume = f"out/state-step-{states[1]}" if replacing else "auto"
        run = Run(folder, f"{flags} --resume {resume}", fault=kill.fault if kill else None)
        was_killed = deliver(run, kill, times, rng) if kill else False
        code = end(run)
        text = run.text
        was_killed = was_killed or re.search(r"of rank \d has died|return code = -9", text) is not None
        if (begun := beginning(text)) is not None and not replacing:
            for row in open_rows:
                yield row | {"begun": begun}
            open_rows = []
        if code == 0:
            break
        if not kill or not was_killed or code in (None, 2, 3, 4):
            yield from (row | {"begun": None} for row in open_rows)
            yield {"failed": f"exit code {code} after {kill}: {' | '.join(text.strip().splitlines()[-4:])}"}
            return
        if kill in pending:
            pending.remove(kill)
        saved = max([saved, *run.steps()])
        whole_folders = all(is_whole(path) for path in out.glob("*-step-*[0-9]"))
        open_rows.append({"kill": str(kill), "code": code, "saved": saved, "done": done(out), "whole": whole_folders})
    weights, log = same_end(out, whole, LONG_STEPS)
    left = [path.name for path in out.iterdir() if path.name.endswith((PARTIAL, REPLACED))]
    yield {"identical": weights and log and not left}


def deliver(run, kill, times, rng):
    """Kill the processes of a run at a random moment; those of a named point kill themselves. Was it still there?"""
    if kill.point:
        return False
    loading, training = times
    if kill.is_loading:
        wait_for_ranks(run)
        time.sleep(rng.uniform(0, loading))
    else:
        run.wait_for(r"updates of \d+|done already", END_SECONDS)
        time.sleep(rng.uniform(0, training / 3))
    was_there = run.process.poll() is None
    run.kill(kill.rank)
    return was_there


def beginning(text):
    """The updates that were done where a run began to train; None where it did not come so far."""
    if "done already" in text:
        return LONG_STEPS
    if not re.search(r"updates of \d+", text):
        return None
    resumed = re.search(r"resumed from \S+: (\d+) updates are done", text)
    return int(resumed[1]) if resumed else 0


def done(out):
    """The last update in a run's log, whose last line may be half a one."""
    try:
        text = (out / "train_log.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0
    return max((int(step) for step in re.findall(r'^\{"step": (\d+),', text, re.M)), default=0)


def lost(row):
    """Updates whose state was said to be saved and that were done again after a kill."""
    return LONG_STEPS if row["begun"] is None else max(0, row["saved"] - row["begun"])


def kills_table(rows):
    """One line for each train type."""
    lines = []
    for name in [*dict.fromkeys(row["type"] for row in rows), None]:
        mine = [row for row in rows if name in (None, row["type"])]
        killed = [row for row in mine if "kill" in row]
        ends = [row["identical"] for row in mine if "identical" in row]
        lines.append(
            {
                "train type · 方式": name or "together · 合计",
                "kills · 杀死次数": len(killed),
                "chains that ended · 走到终点的链": len(ends),
                "of these identical · 其中逐位相同": sum(ends),
                "kills that lost a saved update · 丢失已保存更新的次数": sum(lost(row) > 0 for row in killed),
                "updates done again at most · 最多重做的更新": max(
                    (row["done"] - row["begun"] for row in killed if row["begun"] is not None), default=0
                ),
            }
        )
    return lines


def kills_problems(rows):
    """What does not hold."""
    found = [f"{row['type']}, chain {row['chain']}: {row['failed']}" for row in rows if "failed" in row]
    for row in rows:
        name = f"{row['type']}, chain {row['chain']}, {row.get('kill', 'end')}"
        if "kill" in row and lost(row):
            found.append(f"{name}: begun at {row['begun']}, saved was {row['saved']}")
        if not row.get("whole", True):
            found.append(f"{name}: a folder is not whole")
        if not row.get("identical", True):
            found.append(f"{name}: other weights, another log or something left")
    return found


# ---------------------------------------------------------------- exact, adam, convert


def pair(folder, flags, first, second):
    """Two runs: whole, and resumed from its state after 4 updates; first, second: {flags, processes} of each.

    Returns their output folders.
    """
    prepare(folder)
    for name, options in (("a", first), ("b", {**second, "flags": f"{second['flags']} --resume a/state-step-4"})):
        options = {"processes": 2} | options
        finished(Run(folder, f"{flags} {options['flags']} --output_dir {name}", options["processes"]))
    return folder / "a", folder / "b"


def exact_cases():
    """{name: flags}: all train types, DeepSpeed files, packed or not, in float32; some in bf16."""
    cases = {}
    for train_type, flags in TRAINS.items():
        for config in CONFIGS:
            for packing in ("", "--packing"):
                batch = "--per_device_train_batch_size " + ("1" if packing else "2")
                name = f"{train_type}, {config}{', packed' if packing else ''}"
                cases[name] = f"{flags} --ds_file {config} {batch} {packing}"
    for train_type in ("lora", "all"):
        for config in ("ds_zero2_no_offload.json", "ds_zero3_no_offload.json"):
            flags = f"{TRAINS[train_type]} --ds_file {config} --per_device_train_batch_size 2 --precision bf16"
            cases[f"{train_type}, {config}, bf16"] = flags
    return cases


def exact(args, folder):
    """A run that goes on from a state must end with the weights of the one that was not stopped, byte for byte."""
    for number, (name, flags) in enumerate(some(exact_cases(), args.limit)):
        a, b = pair(folder / str(number), f"{SHORT} {flags}", {"flags": ""}, {"flags": ""})
        weights, log = same_end(a, b, 9, after=4)
        yield {"case": name, "identical": weights and log}


def exact_table(rows):
    """One line for each train type."""
    groups = {}
    for row in rows:
        groups.setdefault(row["case"].partition(",")[0], []).append(row["identical"])
    groups["together · 合计"] = [row["identical"] for row in rows]
    return [
        {"train type · 方式": name, "runs · 次数": len(found), "of these identical · 其中逐位相同": sum(found)}
        for name, found in groups.items()
    ]


def adam_cases():
    """{name: flags} for DeepSpeed's compiled optimizer."""
    return {
        f"{train_type}, {config}, {precision}": f"{TRAINS[train_type]} --ds_file {config} --precision {precision}"
        for precision in ("fp32", "bf16")
        for config in ("ds_zero2_offload.json", "ds_zero3_offload.json")
        for train_type in ("lora", "all")
    }


def adam(args, folder):
    """With DeepSpeed's CPU Adam the weights differ a little: how much?"""
    import torch
    from safetensors.torch import load_file

    fixed = "--optimizer deepspeed_cpu --per_device_train_batch_size 2"
    for number, (name, flags) in enumerate(some(adam_cases(), args.limit)):
        outs = pair(folder / str(number), f"{SHORT} {flags} {fixed}", {"flags": ""}, {"flags": ""})
        states = []
        for out in outs:
            [path] = out.glob("epoch-*-step-9/*.safetensors")
            states.append({name: tensor.double() for name, tensor in load_file(path).items()})
        absolute = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
        largest = max(float(tensor.abs().max()) for tensor in states[0].values())
        assert all(torch.isfinite(tensor).all() for state in states for tensor in state.values())
        yield {"case": name, "absolute": absolute, "relative": absolute / largest}


def adam_table(rows):
    """One line for each precision."""
    lines = []
    for precision in ("fp32", "bf16"):
        mine = [row for row in rows if row["case"].endswith(precision)]
        if mine:
            lines.append(
                {
                    "precision · 精度": precision,
                    "runs · 次数": len(mine),
                    "largest difference of a weight · 权重的最大差": f"{max(row['absolute'] for row in mine):.1e}",
                    "relative to the largest weight · 相对最大权重": f"{max(row['relative'] for row in mine):.1e}",
                }
            )
    return lines


def convert_cases():
    """{name: (flags, how the first run is started, how the second)}."""
    one = {"processes": 1, "flags": "--gradient_accumulation_steps 2"}
    two = {"processes": 2, "flags": ""}
    cases = {}
    for train_type in ("lora", "all"):
        for config in ("ds_zero2_no_offload.json", "ds_zero3_no_offload.json"):
            flags = f"{TRAINS[train_type].replace('dropout 0.1', 'dropout 0')} --ds_file {config}"
            for text, first, second in (("2 → 1", two, one), ("1 → 2", one, two)):
                cases[f"{train_type}, {config}, {text}"] = flags, first, second
    return cases


def convert(args, folder):
    """On another number of processes the losses differ by rounding: how much?"""
    for number, (name, (flags, first, second)) in enumerate(some(convert_cases(), args.limit)):
        flags = f"{SHORT} {flags} --per_device_train_batch_size 2"
        logs = [log_of(out) for out in pair(folder / str(number), flags, first, second)]
        steps = [step for step in logs[0] if step > 4]
        assert [step for step in logs[1] if step > 4] == steps, "updates are missing"
        losses = [[log[step][0] for step in steps] for log in logs]
        yield {"case": name, "relative": max(abs(a - b) / a for a, b in zip(*losses))}


def convert_table(rows):
    """One line for each case."""
    return [
        {
            "case · 情形": row["case"],
            "largest relative difference of the loss · 损失的最大相对差": f"{row['relative']:.1e}",
        }
        for row in rows
    ]


# ---------------------------------------------------------------- deaths


def deaths(args, folder):
    """When one process dies, all must be gone soon."""
    rng = random.Random(args.seed)
    loading = 1.0
    cases = [(phase, rank) for _ in range(3) for phase in ("training", "loading", "saving") for rank in (0, 1)]
    for number, (phase, rank) in enumerate(some(cases, args.limit)):
        flags = f"--num_train_epochs 400 --output_dir out --per_device_train_batch_size 2 {TYPES['all']}"
        kill = Kill(rank, rng.choice(FILE_POINTS if rank else (*FILE_POINTS, *CLOSING_POINTS)))
        if phase == "saving":
            run = Run(prepare(folder / str(number), 60), f"{flags} --save_state_step 3", fault=kill.fault)
            run.wait_for(r"updates of \d+", END_SECONDS)
        else:
            run = Run(prepare(folder / str(number), 60), flags)
            if phase == "training":
                loading = loading_seconds(run)
                time.sleep(rng.uniform(0, 1))
            else:
                wait_for_ranks(run)
                time.sleep(rng.uniform(0, 0.9 * loading))
            run.kill(rank)
        while rank in run.ranks() and run.process.poll() is None:
            time.sleep(0.02)
        start = time.monotonic()
        while run.process.poll() is None or processes_in(run.folder):
            if time.monotonic() - start > END_SECONDS:
                end(run, 1)
                break
            time.sleep(0.1)
        seconds = time.monotonic() - start
        yield {"case": phase, "rank": rank, "seconds": round(seconds, 1), "code": run.process.returncode}


def deaths_table(rows):
    """One line for each phase."""
    names = {"training": "training · 训练", "loading": "loading · 加载", "saving": "saving · 保存"}
    lines = []
    for phase, name in names.items():
        mine = [row for row in rows if row["case"] == phase]
        if mine:
            codes = sorted({row["code"] for row in mine}, key=str)
            lines.append(
                {
                    "killed while · 时刻": name,
                    "kills · 次数": len(mine),
                    "all gone after at most · 全部退出最长用时": f"{max(row['seconds'] for row in mine):.1f} s",
                    "exit codes · 退出码": ", ".join(map(str, codes)),
                }
            )
    return lines


# ---------------------------------------------------------------- saving, inputs


def make_model(folder):
    """A checkpoint of 94 million random weights: ChatGLM3's shape, an eighth as wide."""
    import torch

    from benchmarks.presets import random_model
    from checkpoint import save_config
    from weights import write_weights

    folder.mkdir(parents=True)
    model = random_model("small", "glm3", torch.bfloat16, "cpu")
    save_config(model.config, folder, torch.bfloat16)
    write_weights(dict(model.named_parameters()), folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "tests" / "golden" / "glm3" / name, folder)


def saving(args, folder):
    """How long a state keeps the loop, against a plain write of as many bytes right after it."""
    make_model(folder / "model")
    for config in ("ds_zero2_no_offload.json", "ds_zero3_no_offload.json"):
        place = prepare(folder / config.partition(".")[0], 2 * SAVES + 2)
        flags = f"--train_type all --precision bf16 --ds_file {config} --save_state_step 1 --output_dir out"
        flags += " --num_train_epochs 1"
        finished(Run(place, flags, fault="time times.jsonl", model=folder / "model"))
        for line in (place / "times.jsonl").read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            yield {"case": config, **values, "ratio": values["seconds"] / values["plain"]}
        shutil.rmtree(place)


SAVES = 5


def saving_table(rows):
    """One line for each DeepSpeed file."""
    lines = []
    for config in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == config]

        def middle(name):
            return statistics.median(row[name] for row in mine)

        lines.append(
            {
                "DeepSpeed file · 文件": config,
                "state · 状态": f"{middle('bytes') / 1e6:,.0f} MB",
                "saves · 次数": len(mine),
                "a save, median · 保存（中位数）": f"{middle('seconds'):.2f} s",
                "plain write, median · 直接写（中位数）": f"{middle('plain'):.2f} s",
                "ratio, median · 比值（中位数）": f"{middle('ratio'):.2f}",
            }
        )
    return lines


def inputs(args, folder):
    """The table of bad inputs."""
    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "tests" / "faults" / "bad_inputs.py"), "--jobs", str(os.cpu_count() or 1)]
    command += ["--only", args.inputs] if args.inputs else []
    subprocess.run([*command, "--json", str(folder / "counts.json")], cwd=ROOT)
    yield json.loads((folder / "counts.json").read_text(encoding="utf-8"))


def inputs_table(rows):
    """One line."""
    return [
        {"bad inputs · 错误输入": row["total"], "refused as documented · 按说明拒绝": row["as_documented"]}
        for row in rows
    ]


# ---------------------------------------------------------------- the table of parts, and the page


def some(cases, limit):
    """The first cases of a list or dict, all without a limit."""
    found = list(cases.items() if isinstance(cases, dict) else cases)
    return found[: limit or None]


def differing(rows):
    """The cases that are not identical."""
    return [f"{row['case']}: not identical" for row in rows if not row["identical"]]


@dataclass(frozen=True)
class Part:
    """A check. run: yields rows; table: makes what is shown of them; problems: says what does not hold."""

    title: str
    minutes: int
    run: Callable
    table: Callable
    problems: Callable


def above(name, limit):
    """Problems of a part whose figures must not be above a limit."""
    return lambda rows: [f"{row['case']}: {row[name]} is above {limit}" for row in rows if not row[name] <= limit]


def slow_saves(rows):
    """DeepSpeed files whose median is above the limit."""
    found = []
    for config in dict.fromkeys(row["case"] for row in rows):
        ratio = statistics.median(row["ratio"] for row in rows if row["case"] == config)
        found += [f"{config}: a save takes {ratio:.2f} times a plain write"] if ratio > 1.2 else []
    return found


PARTS = {
    "kills": Part("Killed, and gone on with · 杀死后恢复", 30, kills, kills_table, kills_problems),
    "exact": Part("Resumed exactly · 逐位恢复", 16, exact, exact_table, differing),
    "inputs": Part("Bad inputs · 错误输入", 10, inputs, inputs_table, lambda rows: rows[0]["failed"]),
    "deaths": Part("A process dies · 进程死亡", 5, deaths, deaths_table, above("seconds", 60)),
    "saving": Part("What a save costs · 保存的代价", 2, saving, saving_table, slow_saves),
    "adam": Part("DeepSpeed's CPU Adam · DeepSpeed 的 CPU Adam", 5, adam, adam_table, above("relative", 0.01)),
    "convert": Part("Another number of processes · 改变进程数", 5, convert, convert_table, above("relative", 1e-4)),
}


def figures_text(figures):
    """The tables of all parts, those that were not run too, as Markdown."""
    text = ""
    for name, part in PARTS.items():
        text += f"\n**{part.title}** (`bash scripts/soak.sh --only {name}`)\n\n"
        kept = figures.get(name)
        if not kept or not kept["rows"]:
            text += f"{NOT_RUN}\n"
            continue
        text += report.table(part.table(kept["rows"]))
        text += f"\n{kept['machine']}{'' if kept['is_complete'] else '; interrupted · 未完成'}\n"
    return text


def page_with(text, figures):
    """The page with its figures part made new."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{figures_text(figures)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def figures_file(figures):
    """The file of figures: a row a line."""
    parts = []
    for name, kept in figures.items():
        rows = ",\n".join("   " + json.dumps(row, ensure_ascii=False) for row in kept["rows"])
        head = json.dumps({key: value for key, value in kept.items() if key != "rows"}, ensure_ascii=False)[:-1]
        parts.append(f' {json.dumps(name)}: {head}, "rows": [\n{rows}\n ]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_figures(path):
    """{part: {machine, is_complete, rows}}."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(path, name, rows, is_complete):
    """Put the rows of a part in place of its earlier ones, and make the page new."""
    figures = read_figures(path) | {name: {"machine": report.machine(), "is_complete": is_complete, "rows": rows}}
    replace(path, figures_file({name: figures[name] for name in PARTS if name in figures}))
    if path == FIGURES:
        replace(PAGE, page_with(PAGE.read_text(encoding="utf-8"), figures))


def replace(path, text):
    """Write a file that is whole or as it was."""
    scratch = path.with_name(path.name + PARTIAL)
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def parse(argv):
    """Flags."""
    minutes = "\n".join(
        f"    {name:8} {part.minutes:3} {part.title.partition(' ·')[0]}" for name, part in PARTS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__.replace("{minutes}", minutes), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run; left out: all")
    parser.add_argument("--types", choices=TYPES, nargs="+", default=list(TYPES), help="kills: train types")
    parser.add_argument("--kills", type=int, default=20, help="kills: those at random moments, for each train type")
    parser.add_argument("--limit", type=int, default=0, help="first cases of a part only, and named points; 0: all")
    parser.add_argument("--inputs", default="", help="inputs: pattern of the ids to run; left out: all")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument(
        "--json", type=pathlib.Path, default=FIGURES, help="file of figures; another leaves docs/ alone"
    )
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the runs, which stay there")
    return parser.parse_args(argv)


def main(argv):
    """Run the parts; the exit code is 1 where something does not hold."""
    args = parse(argv)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder goes
    problems = []
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = pathlib.Path(args.keep or scratch).resolve()
        os.environ["HF_DATASETS_CACHE"] = os.path.join(scratch, "rows")
        for name in args.only:
            part, rows, start = PARTS[name], [], time.monotonic()
            print(f"{name}: {part.title.partition(' ·')[0]}, about {part.minutes} minutes")
            try:
                for row in part.run(args, folder / name):
                    rows.append(row)
                    keep(args.json, name, rows, False)
                    print(f"{name} {time.monotonic() - start:5.0f} s: {json.dumps(row, ensure_ascii=False)}")
                keep(args.json, name, rows, True)
            except (RuntimeError, AssertionError, OSError, ValueError) as error:  # the other parts can still run
                problems.append(f"{name}: {type(error).__name__}: {error}")
            found = part.problems(rows) if rows else ["nothing was measured"]
            problems += [f"{name}: {line}" for line in found]
            print(
                f"{name}: {len(rows)} results in {(time.monotonic() - start) / 60:.1f} minutes, {len(found)} problems"
            )
    print("\n".join(problems or ["all of this holds"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
