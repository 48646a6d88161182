"""The long reliability checks: real runs, through the deepspeed launcher on two CPU processes, killed and gone on with.

    bash scripts/soak.sh                             # all parts
    bash scripts/soak.sh --only exact adam convert   # these parts
    bash scripts/soak.sh --only kills --types lora --kills 2 --limit 1 --json /tmp/tried.json   # tried out

Each result is kept in docs/reliability.json as soon as it is there, and the tables of docs/reliability.md are made from
it. The exit code is 1 where a part does not hold what the page promises. Minutes on two cores that do nothing else:
{minutes}
"""

import argparse
import itertools
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
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "faults")]

import try_hosts  # noqa: E402
from faulty_train import POINTS, REPLACING  # noqa: E402
from harness import TYPES, Run, last_weights, log_of, prepare  # noqa: E402

from benchmarks import report  # noqa: E402
from runtime.folders import PARTIAL, REPLACED, is_whole  # noqa: E402

FIGURES = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- figures: made by tests/faults/soak.py -->", "<!-- end of figures -->"
NOT_RUN = "not run · 未运行"
TOGETHER = "together · 合计"

END_SECONDS = 300  # after which a run counts as hanging
LONG = "--num_train_epochs 8 --show_loss_step 1 --save_model_step 2 --save_state_step 2 --save_total_limit 2"
LONG_ROWS, LONG_STEPS = 15, 32
SHORT, SHORT_STEPS, STATE_STEP = 3, 9, 4  # epochs of prepare's rows, their updates, those before the state
ADAM, ADAM_STEPS, ADAM_STATE = 14, 42, 20  # the difference takes some updates to show
FILE_POINTS, CLOSING_POINTS = POINTS[:2], POINTS[2:]  # all ranks come to the former, the first one to the latter
TRAINS = {  # what trains, without a DeepSpeed file
    "freeze": "--train_type freeze --freeze_module_name layers.1.",
    "ptuning": "--train_type ptuning --pre_seq_len 4",
    "lora": "--train_type lora --lora_dim 4 --lora_dropout 0.1",
    "all": "--train_type all",
}
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.json"))
ZERO2, ZERO3 = "ds_zero2_no_offload.json", "ds_zero3_no_offload.json"
NUM_SAVES = 9


# ---------------------------------------------------------------- runs


def end(run, seconds=END_SECONDS):
    """The exit code of a run; None where it did not end: it is killed then."""
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


def is_same_end(first, second, num_steps, after=0):
    """Are the last weights of two runs the same bytes, and the log's figures after a step the same numbers?"""
    try:
        logs = [{step: values for step, values in log_of(out).items() if step > after} for out in (first, second)]
        return logs[0] == logs[1] and last_weights(first, num_steps) == last_weights(second, num_steps)
    except (OSError, ValueError, AssertionError):  # something is missing, or twice there
        return False


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
        return f"{who}, " + (f"{self.point} {self.number}" if self.point else "loading" * self.is_loading or "training")


def planned_kills(number, rng):
    """`number` kills at random moments, and at each named point of a save, in random order.

    Half of the former are of one rank, four of five while training. Each state comes after a checkpoint: the points of
    closing a folder are for the one and then for the other.
    """
    kills = [Kill(rng.choice((0, 1)) if i % 2 else None, is_loading=i // 2 % 5 == 4) for i in range(number)]
    kills += [Kill(rank, point, rng.randint(1, 4)) for rank in (0, 1) for point in FILE_POINTS]
    kills += [Kill(0, point, number) for point in (*CLOSING_POINTS, REPLACING) for number in (1, 2)]
    rng.shuffle(kills)
    return kills


def kills(args, folder):
    """Runs that are killed again and again must lose nothing and end as the one that was not."""
    for name in args.types:
        rng = random.Random(f"{args.seed} {name}")
        # Four updates in each epoch, packed or not.
        flags = f"{LONG} --output_dir out {TYPES[name]} --per_device_train_batch_size"
        flags += " 1" if "--packing" in flags else " 2"
        whole = Run(prepare(folder / f"{name}-whole", LONG_ROWS), flags)
        loading, start = loading_seconds(whole), time.monotonic()
        finished(whole)
        times = loading, time.monotonic() - start
        pending = planned_kills(args.kills, rng)
        pending = [k for k in pending if not k.point] + some([k for k in pending if k.point], args)
        for number in range(1, len(pending) + 10):
            place = prepare(folder / f"{name}-chain-{number}", LONG_ROWS)
            for row in chain(place, flags, whole.folder / "out", pending, times, rng):
                yield {"type": name, "chain": number, **row}
            if not pending:
                break
        else:
            raise RuntimeError(f"{name}: never came to {', '.join(map(str, pending))}")


def chain(folder, flags, whole, pending, times, rng):
    """Kill a run and go on with it until it comes to its end; takes from `pending` what it has done.

    Yields a row for each kill once it is known where the run went on, and one for the end of the chain.
    """
    out = folder / "out"
    saved = 0  # the last step whose state was said to be saved
    open_rows = []
    while True:
        states = sorted((int(path.name.rpartition("-")[2]) for path in out.glob("state-step-*[0-9]")), reverse=True)
        # Going on from an older state than the newest is what makes a run replace folders.
        kill = next((k for k in pending if k.point != REPLACING or len(states) > 1), Kill(None) if pending else None)
        resume = f"out/state-step-{states[1]}" if kill and kill.point == REPLACING else "auto"
        run = Run(folder, f"{flags} --resume {resume}", fault=kill and kill.fault)
        if kill and not kill.point:
            deliver(run, kill, times, rng)
        code = end(run)
        if resume == "auto" and (begun := beginning(run.text)) is not None:
            for row in open_rows:
                yield {**row, "begun": begun}
            open_rows = []
        if code == 0:
            left = [path.name for path in out.iterdir() if path.name.endswith((PARTIAL, REPLACED))]
            yield {"identical": is_same_end(out, whole, LONG_STEPS), **({"left": left} if left else {})}
            return
        if kill in pending:
            pending.remove(kill)
        was_killed = code == -signal.SIGKILL or re.search(r"rank \d has died|code = -9", run.text)
        if not was_killed or code in (None, 2, 3, 4):
            yield from ({**row, "begun": None} for row in open_rows)
            print(run.text)
            yield {"failed": f"exit code {code}, {kill}: {' | '.join(run.text.strip().splitlines()[-4:])}"}
            return
        saved = max([saved, *run.steps()])
        all_whole = all(is_whole(path) for path in out.glob("*-step-*[0-9]"))
        open_rows.append(
            {"kill": str(kill), "code": code, "saved": saved, "done": last_logged(out), "whole": all_whole}
        )


def deliver(run, kill, times, rng):
    """Kill processes of a run at a random moment. times: seconds of loading and of training."""
    if kill.is_loading:
        wait_for_ranks(run)
        time.sleep(rng.uniform(0, times[0]))
    else:
        run.wait_for(r"updates of \d+|done already", END_SECONDS)
        time.sleep(rng.uniform(0, times[1] / 3))
    run.kill(kill.rank)


def beginning(text):
    """The updates that were done where a run began to train; None where it did not come so far."""
    if "done already" in text:
        return LONG_STEPS
    if not re.search(r"updates of \d+", text):
        return None
    resumed = re.search(r"resumed from \S+: (\d+) updates are done", text)
    return int(resumed[1]) if resumed else 0


def last_logged(out):
    """The last update in a run's log, whose last line may be half a one."""
    path = out / "train_log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return max((int(step) for step in re.findall(r'^\{"step": (\d+),', text, re.M)), default=0)


def num_lost(row):
    """Updates whose state was said to be saved and that were done again after a kill."""
    return LONG_STEPS if row["begun"] is None else max(0, row["saved"] - row["begun"])


def kills_problems(rows):
    """What does not hold."""
    found = []
    for row in rows:
        name = f"{row['type']}, chain {row['chain']}, {row.get('kill', 'end')}"
        if "failed" in row:
            found.append(f"{name}: {row['failed']}")
        if "kill" in row and num_lost(row):
            found.append(f"{name}: saved was {row['saved']}, it went on from {row['begun']}")
        if not row.get("whole", True):
            found.append(f"{name}: a folder is not whole")
        if not row.get("identical", True):
            found.append(f"{name}: not the weights and the log of the run that was not stopped")
        if row.get("left"):
            found.append(f"{name}: left: {', '.join(row['left'])}")
    return found


# ---------------------------------------------------------------- exact, adam, convert


def pairs(cases, compare, epochs=SHORT, state_step=STATE_STEP):
    """A part that makes, for each case, a whole run and one resumed from its first state, and compares the two.

    cases: {name: (flags, {flags, processes} of the first run, those of the second)}. compare: what it gives of their
    two folders is a row.
    """
    fixed = f"--num_train_epochs {epochs} --show_loss_step 1 --save_state_step {state_step}"

    def run(args, folder):
        for number, (name, (flags, *kinds)) in enumerate(some(cases, args)):
            place = prepare(folder / str(number))
            for output_dir, resume, kind in zip("ab", ("", f"--resume a/state-step-{state_step}"), kinds):
                words = f"{fixed} {flags} {kind.get('flags', '')} {resume} --output_dir {output_dir}"
                finished(Run(place, words, processes=kind.get("processes", 2)))
            yield {"case": name, **compare(place / "a", place / "b")}

    return run


def exact_cases():
    """All train types, DeepSpeed files, packed or not, in float32; some in bf16."""
    cases = {}
    for (name, flags), config, packing in itertools.product(TRAINS.items(), CONFIGS, (False, True)):
        rows = "--packing --per_device_train_batch_size 1" if packing else "--per_device_train_batch_size 2"
        cases[f"{name}, {config}{', packed' * packing}"] = f"{flags} --ds_file {config} {rows}", {}, {}
    for name, config in itertools.product(("lora", "all"), (ZERO2, ZERO3)):
        flags = f"{TRAINS[name]} --ds_file {config} --per_device_train_batch_size 2 --precision bf16"
        cases[f"{name}, {config}, bf16"] = flags, {}, {}
    return cases


def identical(a, b):
    """Are the weights the same bytes, and the log the same numbers?"""
    return {"identical": is_same_end(a, b, SHORT_STEPS, after=STATE_STEP)}


def adam_cases():
    """DeepSpeed's compiled optimizer."""
    cases = {}
    for precision, config, name in itertools.product(("fp32", "bf16"), CONFIGS, ("lora", "all")):
        if "no_offload" not in config:
            flags = f"{TRAINS[name]} --ds_file {config} --precision {precision} --optimizer deepspeed_cpu"
            cases[f"{name}, {config}, {precision}"] = f"{flags} --per_device_train_batch_size 2", {}, {}
    return cases


def weights_apart(a, b):
    """The largest difference of a weight, and relative to the largest weight."""
    from safetensors.torch import load_file

    states = []
    for out in (a, b):
        [path] = out.glob(f"epoch-*-step-{ADAM_STEPS}/*.safetensors")
        states.append({name: tensor.double() for name, tensor in load_file(path).items()})
    absolute = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
    return {"absolute": absolute, "relative": absolute / max(float(t.abs().max()) for t in states[0].values())}


def convert_cases():
    """States of one process for two, and of two for one; an update has as many rows."""
    one, two = {"processes": 1, "flags": "--gradient_accumulation_steps 2"}, {}
    cases = {}
    for name, config in itertools.product(("lora", "all"), (ZERO2, ZERO3)):
        flags = TRAINS[name].replace("dropout 0.1", "dropout 0")  # other masks would be drawn
        flags += f" --ds_file {config} --per_device_train_batch_size 2"
        cases |= {f"{name}, {config}, 2 → 1": (flags, two, one), f"{name}, {config}, 1 → 2": (flags, one, two)}
    return cases


def losses_apart(a, b):
    """The largest relative difference of a loss."""
    logs = [{step: values[0] for step, values in log_of(out).items() if step > STATE_STEP} for out in (a, b)]
    if not logs[0].keys() == logs[1].keys() == set(range(STATE_STEP + 1, SHORT_STEPS + 1)):
        raise RuntimeError("updates are missing")
    return {"relative": max(abs(logs[1][step] - loss) / loss for step, loss in logs[0].items())}


# ---------------------------------------------------------------- deaths, saving, inputs


def deaths(args, folder):
    """When one process dies, all must be gone soon."""
    rng = random.Random(args.seed)
    loading = 1.0
    cases = list(itertools.product(range(3), ("training", "loading", "saving"), (0, 1)))
    for number, (_, phase, rank) in enumerate(some(cases, args)):
        flags = f"--num_train_epochs 400 --output_dir out --per_device_train_batch_size 2 {TYPES['all']}"
        kill = Kill(rank, rng.choice(FILE_POINTS if rank else POINTS)) if phase == "saving" else Kill(rank)
        flags += " --save_state_step 3" if phase == "saving" else ""
        run = Run(prepare(folder / str(number), 60), flags, fault=kill.fault)
        if phase == "loading":
            wait_for_ranks(run)
            time.sleep(rng.uniform(0, 0.9 * loading))
        else:
            loading = loading_seconds(run)
            time.sleep(rng.uniform(0, 1) * (phase == "training"))
        if phase != "saving":
            run.kill(rank)
        while rank in run.ranks() and run.process.poll() is None:
            time.sleep(0.02)
        start = time.monotonic()
        while (run.process.poll() is None or processes_in(run.folder)) and time.monotonic() - start < END_SECONDS:
            time.sleep(0.1)
        seconds = round(time.monotonic() - start, 1)
        end(run, 1)
        yield {"case": phase, "rank": rank, "seconds": seconds, "code": run.process.returncode}


def saving(args, folder):
    """How long a state keeps the loop, against a plain write of the same bytes right after it."""
    make_model(folder / "model")
    for config in (ZERO2, ZERO3):
        place = prepare(folder / config.partition(".")[0], 2 * (NUM_SAVES + 2))  # two rows for each update
        flags = f"--train_type all --precision bf16 --ds_file {config} --save_state_step 1 --output_dir out"
        finished(Run(place, flags, fault="time times.jsonl", model=folder / "model"))
        lines = (place / "times.jsonl").read_text(encoding="utf-8").splitlines()
        for values in some(list(map(json.loads, lines)), args):
            yield {"case": config, **values, "ratio": values["seconds"] / values["plain"]}
        shutil.rmtree(place)


def make_model(folder):
    """A checkpoint of 94 million random weights: ChatGLM3's shape, an eighth as wide."""
    import torch

    from benchmarks.presets import random_model
    from checkpoints.released_files import save_config
    from checkpoints.weight_files import write_weights

    folder.mkdir(parents=True)
    model = random_model("small", "glm3", torch.bfloat16, "cpu")
    save_config(model.config, folder, torch.bfloat16)
    write_weights(dict(model.named_parameters()), folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "tests" / "golden" / "glm3" / name, folder)


def saving_problems(rows):
    """DeepSpeed files whose median is above the limit."""
    found = []
    for config in dict.fromkeys(row["case"] for row in rows):
        ratio = statistics.median(row["ratio"] for row in rows if row["case"] == config)
        found += [f"{config}: a save takes {ratio:.2f} times a plain write"] if ratio > 1.2 else []
    return found


def inputs(args, folder):
    """The table of bad inputs."""
    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "tests" / "faults" / "bad_inputs.py"), "--jobs", str(os.cpu_count() or 1)]
    command += ["--only", args.inputs, "--json", str(folder / "counts.json")]
    subprocess.run(command, cwd=ROOT)
    yield json.loads((folder / "counts.json").read_text(encoding="utf-8"))


def fuzzed(args, folder):
    """Files that are nearly right, given to the code that reads them; a row for each kind."""
    import fuzz  # and with it all reading code

    rows, _ = fuzz.fuzz(args.limit or fuzz.NUM_INPUTS, args.seed, keep=fuzz.KEEP)
    yield from rows


# ---------------------------------------------------------------- the table of parts


def some(cases, args):
    """The cases, or with --limit the first of them."""
    return list(cases.items() if isinstance(cases, dict) else cases)[: args.limit or None]


def above(name, limit):
    """Problems of a part whose figures must not be above a limit."""
    return lambda rows: [f"{row['case']}: {name} is {row[name]}, at most {limit}" for row in rows if row[name] > limit]


def largest(name, form):
    """The largest figure of rows, shown."""
    return lambda rows: format(max(row[name] for row in rows), form)


def middle(name, form, scale=1.0):
    """The median of rows, shown."""
    return lambda rows: format(statistics.median(row[name] for row in rows) * scale, form)


@dataclass(frozen=True)
class Part:
    """A check. run: yields rows; problems: what does not hold; group: the table's line that a row belongs to."""

    title: str
    minutes: int
    run: Callable
    problems: Callable
    columns: dict  # {heading: function of the rows of a line}
    heading: str = ""
    group: Callable = field(default=lambda row: TOGETHER)
    has_total: bool = False
    missing: Callable = lambda: None  # why this machine cannot run it

    def table(self, rows):
        """What is shown of the rows."""
        groups = {}
        for row in rows:
            groups.setdefault(self.group(row), []).append(row)
        groups |= {TOGETHER: rows} if self.has_total else {}
        shown = {name: {h: str(f(mine)) for h, f in self.columns.items()} for name, mine in groups.items()}
        return report.table([{self.heading: name, **cells} for name, cells in shown.items()])


PARTS = {
    "kills": Part(
        "Killed, and gone on with · 杀死后恢复",
        28,
        kills,
        kills_problems,
        {
            "kills · 杀死次数": lambda rows: sum("kill" in row for row in rows),
            "chains of them · 组成的链": lambda rows: sum("identical" in row for row in rows),
            "that ended identical · 终点逐位相同": lambda rows: sum(row.get("identical", False) for row in rows),
            "kills that lost a saved update · 丢失已保存更新": lambda rows: sum(
                num_lost(row) > 0 for row in rows if "kill" in row
            ),
            "updates done again at most · 最多重做的更新": lambda rows: max(
                (row["done"] - row["begun"] for row in rows if row.get("begun") is not None), default=0
            ),
        },
        "train type · 方式",
        lambda row: row["type"],
        has_total=True,
    ),
    "exact": Part(
        "Resumed exactly · 逐位恢复",
        15,
        pairs(exact_cases(), identical),
        lambda rows: [f"{row['case']}: not identical" for row in rows if not row["identical"]],
        {"runs · 次数": len, "identical · 逐位相同": lambda rows: sum(row["identical"] for row in rows)},
        "train type · 方式",
        lambda row: row["case"].partition(",")[0],
        has_total=True,
    ),
    "inputs": Part(
        "Bad inputs · 错误输入",
        4,
        inputs,
        lambda rows: rows[0]["failed"],
        {
            "inputs · 输入": lambda rows: rows[0]["total"],
            "answered as documented · 按说明处理": lambda rows: rows[0]["as_documented"],
        },
    ),
    "fuzz": Part(
        "Files nearly right · 几乎正确的文件",
        12,
        fuzzed,
        lambda rows: [f"{row['target']}: {row['problem']} neither taken nor refused" for row in rows if row["problem"]],
        {
            "files · 文件数": lambda rows: f"{sum(row['inputs'] for row in rows):,}",
            "taken · 接受": lambda rows: f"{sum(row['accepted'] for row in rows):,}",
            "refused in one line · 一行拒绝": lambda rows: f"{sum(row['refused'] for row in rows):,}",
            "neither · 都不是": lambda rows: sum(row["problem"] for row in rows),
            "s at most · 最多用时": largest("seconds", ".1f"),
            "MB at most · 最多内存": largest("megabytes", "d"),
        },
        "kind · 种类",
        lambda row: row["target"],
        has_total=True,
    ),
    "deaths": Part(
        "A process dies · 一个进程死亡",
        3,
        deaths,
        above("seconds", 60),
        {
            "kills · 次数": len,
            "seconds until all are gone, at most · 全部退出最多用时（秒）": largest("seconds", ".1f"),
            "exit codes · 退出码": lambda rows: ", ".join(sorted({str(row["code"]) for row in rows})),
        },
        "killed while · 时刻",
        lambda row: {"training": "training · 训练", "loading": "loading · 加载", "saving": "saving · 保存"}[
            row["case"]
        ],
    ),
    "saving": Part(
        "What a state costs · 保存状态的代价",
        3,
        saving,
        saving_problems,
        {
            "state, MB · 状态": middle("bytes", ",.0f", 1e-6),
            "saves · 次数": len,
            "the loop waits, s (median) · 循环等待": middle("seconds", ".2f"),
            "plain write, flushed, s (median) · 直接写并刷盘": middle("plain", ".2f"),
            "ratio (median) · 比值": middle("ratio", ".2f"),
            "until it has its name, s (median) · 到改名为止": middle("named", ".2f"),
        },
        "DeepSpeed file · 文件",
        lambda row: row["case"],
    ),
    "adam": Part(
        "DeepSpeed's CPU Adam · DeepSpeed 的 CPU Adam",
        5,
        pairs(adam_cases(), weights_apart, ADAM, ADAM_STATE),
        above("relative", 0.01),
        {
            "runs · 次数": len,
            "largest difference of a weight · 权重的最大差": largest("absolute", ".1e"),
            "relative to the largest weight · 相对最大权重": largest("relative", ".1e"),
        },
        "precision · 精度",
        lambda row: row["case"].rpartition(" ")[2],
    ),
    "convert": Part(
        "Another number of processes · 改变进程数",
        4,
        pairs(convert_cases(), losses_apart),
        above("relative", 1e-4),
        {"runs · 次数": len, "largest relative difference of a loss · 损失的最大相对差": largest("relative", ".1e")},
        "processes · 进程数",
        lambda row: row["case"].rpartition(", ")[2],
    ),
    "hosts": Part(
        "Several hosts · 多台主机",
        10,
        try_hosts.trials,
        lambda rows: [f"{row['case']}: not as documented" for row in rows if not row["holds"]],
        {
            "hosts · 主机": largest("hosts", "d"),
            "exit codes · 退出码": lambda rows: ", ".join(str(code) for row in rows for code in row["codes"]),
            "seconds · 秒": largest("seconds", ".1f"),
            "as documented · 与说明一致": lambda rows: "yes · 是" if all(row["holds"] for row in rows) else "no · 否",
        },
        "trial · 试验",
        lambda row: row["case"],
        missing=try_hosts.missing,
    ),
}


# ---------------------------------------------------------------- figures and page


def figures_text(figures):
    """The tables of all parts as Markdown; those that were not run are named."""
    text = ""
    for name, part in PARTS.items():
        text += f"\n**{part.title}** (`bash scripts/soak.sh --only {name}`)\n\n"
        if kept := figures.get(name):
            state = "" if kept["is_complete"] else "; interrupted · 未完成"
            text += f"{part.table(kept['rows'])}\n{kept['machine']}{state}\n"
        else:
            text += f"{NOT_RUN}\n"
    return text


def page_with(text, figures):
    """The page with its figures part made new."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{figures_text(figures)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def figures_file(figures):
    """The file of figures, in the order of the parts, a row a line."""
    parts = []
    for name in PARTS:
        if kept := figures.get(name):
            head = "".join(f"  {json.dumps(key)}: {to_json(value)},\n" for key, value in kept.items() if key != "rows")
            rows = ",\n".join(f"   {to_json(row)}" for row in kept["rows"])
            parts.append(f' "{name}": {{\n{head}  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def to_json(value):
    """JSON with Chinese as it is."""
    return json.dumps(value, ensure_ascii=False)


def read_figures(path):
    """{part: {machine, is_complete, rows}}."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(path, name, rows, is_complete):
    """Put the rows of a part in place of its earlier ones, and make the page new."""
    figures = {**read_figures(path), name: {"machine": report.machine(), "is_complete": is_complete, "rows": rows}}
    replace(path, figures_file(figures))
    if path == FIGURES:
        replace(PAGE, page_with(PAGE.read_text(encoding="utf-8"), figures))


def replace(path, text):
    """Write a file that is whole or as it was."""
    scratch = path.with_name(path.name + PARTIAL)
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def parse(argv):
    """Flags."""
    minutes = [f"    {name:8} {part.minutes:3} {part.title.partition(' ·')[0]}" for name, part in PARTS.items()]
    minutes += [f"    all      {sum(part.minutes for part in PARTS.values()):3}"]
    text = __doc__.replace("{minutes}", "\n".join(minutes))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run; left out: all")
    parser.add_argument("--types", choices=TYPES, nargs="+", default=list(TYPES), help="kills: train types")
    parser.add_argument("--kills", type=int, default=25, help="kills: those at random moments, for each train type")
    parser.add_argument("--limit", type=int, default=0, help="the first cases of a part only; 0: all")
    parser.add_argument("--inputs", default="", help="inputs, hosts: the ids to run, by a part of them; left out: all")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--json", type=pathlib.Path, default=FIGURES, help="figures; another file leaves docs/ alone")
    parser.add_argument("--keep", type=pathlib.Path, help="new folder for the runs, which stay there")
    return parser.parse_args(argv)


def main(argv):
    """Run the parts; the exit code is 1 where something does not hold."""
    args = parse(argv)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes
    problems = []
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as scratch:
        folder = pathlib.Path(args.keep or scratch).resolve()
        os.environ["HF_DATASETS_CACHE"] = os.path.join(scratch, "rows")
        for name in args.only:
            part, rows, start = PARTS[name], [], time.monotonic()
            print(f"{name}: {part.title.partition(' ·')[0]}, about {part.minutes} minutes")
            found = []
            if reason := part.missing():
                print(f"{name}: skipped: {reason}")
                continue
            try:
                for row in part.run(args, folder / name):
                    rows.append(row)
                    keep(args.json, name, rows, False)
                    print(f"{name} {time.monotonic() - start:5.0f} s: {to_json(row)}")
                keep(args.json, name, rows, True)
            except (RuntimeError, AssertionError, OSError, ValueError) as error:  # the other parts can still run
                found.append(f"{type(error).__name__}: {error}")
            found += part.problems(rows) if rows else ["nothing was measured"]
            problems += [f"{name}: {line}" for line in found]
            minutes = (time.monotonic() - start) / 60
            print(f"{name}: {len(rows)} results in {minutes:.1f} minutes, problems: {len(found)}")
    print("\n".join(problems or ["all of this holds"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
