"""Two commands that meet, a folder that goes while it is written to, a terminal that closes, a clock that is set."""

import ast
import faulthandler
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from launching import load_script
from reference import GOLDEN, ROOT
from refusing import sandbox  # noqa: F401  a fixture

import compare
import forgetting
import judge
import merge_lora
import predict
import score
from comparison import commands
from flags import train
from runtime import entry, folders, holding, json_lines
from runtime import streams as utils
from runtime.exits import EXIT_GONE, FolderGoneError, UserError
from training import run_log
from training.run_folder import RunFolder

HOLDER = """import os, sys, time
from runtime import holding
for path in sys.argv[2:]:
    holding.take(path, '--output_path', is_inside=sys.argv[1] == 'inside')
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(100)"""


@pytest.fixture(autouse=True)
def limit():
    """Nothing here may hang."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def other():
    """A function that lets another process hold paths; it has a forked child, which must hold nothing."""
    started, children = [], []

    def hold(kind, *paths):
        words = [sys.executable, "-c", HOLDER, kind, *map(str, paths)]
        started.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        children.append(int(started[-1].stdout.readline()))
        return started[-1]

    yield hold
    for process, child in zip(started, children):
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


# The lock.


@pytest.mark.parametrize("kind", ["inside", "beside"])
def test_one_writer_at_a_time(tmp_path, other, kind, monkeypatch, capsys):
    """The second is refused, in one line that names the holder, or waits; what a killed one leaves holds nothing."""
    path, is_inside = tmp_path / "new" / "out", kind == "inside"
    process = other(kind, path)
    into = " into" if is_inside else ""
    says = f"--output_dir {path}: another process writes{into} it \\(process {process.pid} on .*\\): wait until"
    with pytest.raises(UserError, match=says):
        holding.take(str(path), "--output_dir", is_inside)
    lock = path / ".lock" if is_inside else tmp_path / "new" / ".out.lock"
    process.kill()
    process.wait()
    assert lock.exists(), "nobody could remove it"
    holding.take(str(path), "--output_dir", is_inside)
    assert lock.read_text().startswith(f"process {os.getpid()} on ")
    holding.take(str(path), "--output_dir", is_inside)  # one's own
    holding.release(str(path))
    assert not lock.exists()


def test_a_lock_is_waited_for(tmp_path, other, capsys):
    """As one with --resume does; the folders that were made for a lock go with it where they are empty."""
    process = other("inside", tmp_path / "a" / "b")
    monitor = subprocess.Popen(["bash", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    holding.take(str(tmp_path / "a" / "b"), "--output_dir", is_inside=True, seconds=60)
    assert "waiting for the process that writes into it (process" in capsys.readouterr().out
    monitor.wait()
    holding.release_all()
    assert names(tmp_path) == ["a", "b"], "they were there before"
    with holding.holding(str(tmp_path / "c" / "d" / "e.json")):
        assert names(tmp_path / "c") == [".e.json.lock", "d"]
    assert not (tmp_path / "c").exists()


def test_a_lock_is_no_file_of_others(tmp_path, monkeypatch, capsys):
    """The kind: something else under the lock's name; a file system without locks; a name as long as can be."""
    (tmp_path / ".p.lock").write_text("mine")
    with pytest.raises(UserError, match=r"\.p\.lock: holds something else, and the lock goes there: remove or rename"):
        holding.take(str(tmp_path / "p"), "--output_path")
    os.mkfifo(tmp_path / ".q.lock")
    (tmp_path / ".r.lock").symlink_to("x")
    for name, says in (("q", "is no file"), ("r", "cannot be written")):
        with pytest.raises(UserError, match=says):
            holding.take(str(tmp_path / name), "--output_path")
    (tmp_path / "nowhere").symlink_to("nothing")
    with pytest.raises(UserError, match="cannot be written"):
        holding.take(str(tmp_path / "nowhere"), "--output_dir", is_inside=True)
    assert names(tmp_path) == [".p.lock", ".q.lock", ".r.lock", "nowhere"] and not holding.holds

    def without(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(holding.fcntl, "flock", without)
    with holding.holding(str(tmp_path / ("水" * 80))):
        assert "no locks on this file system (No locks available)" in capsys.readouterr().err


ADAPTER = {"mode": "glm3", "train_type": "lora", "weights": "adapter", "base_model": str(GOLDEN / "glm3")}
GLM3 = ["--model_path", str(GOLDEN / "glm3")]
CONFIG = f"""base: {GOLDEN / "glm3"}
train_path: rows.json
test_path: [rows.json]
methods: [{{name: one, train_type: lora}}]"""
PREDICTION = {"index": 0, "query": "问", "output": "答", "prediction": "答"}
COMMANDS = {  # (function, words, what it writes, is the lock inside it)
    "predict": (lambda: predict.main, [*GLM3, "--test_path", "rows.json", "--output_path", "out"], "out", False),
    "score": (lambda: score.main, ["--predictions", "p.jsonl"], "p.scores.json", False),
    "forgetting": (lambda: forgetting.main, [*GLM3, "--output_path", "new/out"], "new/out", False),
    "compare": (lambda: compare.main, ["c.yaml", "--output_dir", "out"], "out", True),
    "judge": (lambda: judge.main, ["--report_only", "--output_path", "out"], "out", False),
    "merge_lora": (lambda: merge_lora.main, ["--model_dir", "adapter"], "adapter-merged", False),
    "export_prefix": (lambda: load_script("export_prefix").main, ["--model_dir", "x"], "x-official", False),
    "predict_vllm": (
        lambda: load_script("predict_vllm").main,
        [*GLM3, "--mode", "glm3", "--test_path", "rows.json", "--output_path", "out"],
        "out",
        False,
    ),
}


@pytest.fixture
def inputs(sandbox):  # noqa: F811
    """A folder with what the commands read."""
    sandbox.adapter()
    for name, text in (
        ("c.yaml", CONFIG),
        ("p.jsonl", json.dumps(PREDICTION)),
        ("adapter/run.json", json.dumps(ADAPTER)),
    ):
        sandbox.write(name, text)
    return sandbox


def test_every_command_leaves_another_alone(inputs, other, capsys):
    """The kind: two of any command at once on one output. The second ends before it works, with one line, and writes
    nothing; under the lock it looks again at what it was told it may write."""
    beside = {path for *_, path, is_inside in COMMANDS.values() if not is_inside} - {"out"}
    processes = [other("beside", "/".join([str(inputs.folder), path])) for path in sorted(beside)]
    processes += [other("inside", inputs.folder / "out")]
    for name, (main, words, path, is_inside) in COMMANDS.items():
        if path == "out" and not is_inside:
            continue
        refused(inputs, main(), words, path)
    processes[-1].kill()
    processes[-1].wait()
    shutil.rmtree(inputs.folder / "out")
    other("beside", inputs.folder / "out")
    for name, (main, words, path, is_inside) in COMMANDS.items():
        if path == "out" and not is_inside:
            refused(inputs, main(), words, path)


def refused(inputs, main, words, path):
    before = inputs.files()
    with pytest.raises(UserError, match=rf"{re.escape(path)}: another process writes.* it \(process \d+ on .*\): wait"):
        main(words)
    assert inputs.files() == before and not holding.holds


def test_a_second_training_into_one_folder_is_refused(sandbox, other, monkeypatch):  # noqa: F811
    """A new folder is made and locked before anything else, and looked at again under the lock."""
    process = other("inside", sandbox.folder / "out")
    sandbox.train_fails(says=rf"--output_dir out: another process writes into it \(process {process.pid} ")
    monkeypatch.setattr(train, "HOLD_SECONDS", 0)
    sandbox.train_fails("--resume auto", says="--output_dir out: another process writes into it")
    args = SimpleNamespace(output_dir="new", model_name_or_path="x", resume=None)
    sandbox.write("new/fingerprint.json", "{}")  # that of a run which was over before the lock was ours
    with pytest.raises(UserError, match="--output_dir new: is not empty: choose a new folder"):
        train.hold_output(args)
    holding.release_all()
    assert names(sandbox.folder / "new") == ["fingerprint.json"]
    sandbox.write("killed/.lock", "process 1 on x\n")
    assert train.output_problems("killed", "x", None) == []
    sandbox.train_fails("--lora_dim 4096", output_dir="made/out", says="--lora_dim 4096: use at most")  # under the lock
    assert not (sandbox.folder / "made").exists()


# As many rows as there should be.


class Answerer:
    """Stands for a model: answers a query with itself; `at` is called before each batch."""

    def __init__(self, at=lambda number: None):
        self.at, self.num_batches = at, 0

    def prompt_ids(self, query):
        return [7] * int(query), 0

    def __call__(self, encoded):
        self.num_batches += 1
        self.at(self.num_batches)
        return [{"predictions": [str(len(ids))], "stopped": [True], "source_cut": 0} for ids, _ in encoded]


def answer_rows(folder, answerer):
    """Answer four rows in batches of one, as predict.py does under its lock."""
    rows = [{"query": str(length), "answer": None} for length in range(1, 5)]
    args = SimpleNamespace(batch_size=1, batch_tokens=0, max_new_tokens=20, output_path=f"{folder}/p.jsonl")
    vars(args).update({"num_return_sequences": 1, "num_beams": 1, "overwrite": False, "max_src_len": 64})
    with holding.holding(args.output_path):
        predict.predict_file(answerer, rows, args, key="k")


def test_a_missing_answer_is_an_error_and_the_parts_stay(tmp_path):
    """The kind: a file that is named done with fewer rows than were asked. It is an error, and the parts stay."""

    def lose(number):
        if number == 3:
            part = tmp_path / "p.jsonl.rank0.partial"
            part.write_text(part.read_text().splitlines(True)[0])

    with pytest.raises(RuntimeError, match=r"p\.jsonl: \d of 4 rows have no answer, first that of index \d"):
        answer_rows(tmp_path, Answerer(lose))
    assert names(tmp_path) == ["p.jsonl.rank0.partial"]
    part = tmp_path / "p.jsonl.rank0.partial"
    part.write_text(part.read_text() + "5\n[]\n{")
    answer_rows(tmp_path, Answerer())
    assert names(tmp_path) == ["p.jsonl"] and len((tmp_path / "p.jsonl").read_text().splitlines()) == 4


# A folder that goes.


def renamed(folder):
    folder.rename(folder.with_name("moved"))


def removed(folder):
    shutil.rmtree(folder)


def replaced(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("go", [renamed, removed, replaced, emptied])
def test_a_folder_that_goes(tmp_path, go):
    """The kind: what is written into is removed or renamed. It is not made again, and no lock stays behind."""
    out = tmp_path / "out"
    for is_inside, path in ((True, out), (False, out / "p.jsonl")):
        holding.take(str(path), "--output_dir", is_inside)
        holding.require_there(str(path))
        go(out)
        with pytest.raises(FolderGoneError, match=f"--output_dir {path}: {out} was removed, renamed or emptied while"):
            holding.require_there(str(path))
        holding.release_all()
        left = [name for name in names(tmp_path) if name not in ("moved", "out")]
        assert left == [] and out.exists() == (go in (replaced, emptied))
        shutil.rmtree(tmp_path / ("moved" if go is renamed else "out"), ignore_errors=True)


def test_a_folder_that_goes_while_rows_are_answered(tmp_path):
    """What was answered lies where the folder is now."""
    (tmp_path / "out").mkdir()
    with pytest.raises(FolderGoneError):
        answer_rows(tmp_path / "out", Answerer(lambda number: number == 2 and renamed(tmp_path / "out")))
    assert names(tmp_path) == ["moved", "p.jsonl.rank0.partial"]
    assert len((tmp_path / "moved" / "p.jsonl.rank0.partial").read_text().splitlines()) == 3


@pytest.mark.parametrize("go", [renamed, removed, emptied])
def test_a_run_leaves_nothing_half_written_where_its_folder_went(tmp_path, go, capsys):
    """In a renamed folder the whole states stay, and what was being written goes."""
    out = tmp_path / "out"
    with holding.holding(str(out), "--output_dir", is_inside=True):
        run = SimpleNamespace(args=SimpleNamespace(output_dir=str(out)), closing=None)
        RunFolder.require(run)
        go(out)
        for name in ("state-step-3", "state-step-6.partial", "mine.partial") if go is renamed else ():
            (tmp_path / "moved" / name).mkdir()
        with pytest.raises(FolderGoneError):
            RunFolder.require(run)
    found = {renamed: ["mine.partial", "moved", "state-step-3"], removed: [], emptied: ["out"]}
    assert names(tmp_path) == found[go]


def test_a_comparison_whose_folder_goes(tmp_path):
    """A step that ended well, or that failed, in a folder that has gone ends the comparison; no stamp is written."""
    out = tmp_path / "out"
    for code in (0, 5):

        def run_words(words, environment):
            removed(out)
            return code, False

        with holding.holding(str(out), "--output_dir", is_inside=True):
            runner = commands.Steps(out, run_words=run_words)
            with pytest.raises(FolderGoneError):
                runner.run("a/b", "true", [], f"{out}/result")
            with pytest.raises(FolderGoneError):
                runner.run("a/c", "true", [], f"{out}/result")
        assert names(tmp_path) == []


def test_a_folder_removed_while_it_is_written_is_not_made_again(tmp_path):
    """Also where a library makes it again to write its file."""
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="was removed while it was written"):
        with folders.new_folder(str(tmp_path / "out" / "epoch-1-step-3")) as scratch:
            removed(tmp_path / "out")
            os.makedirs(scratch)
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        with folders.new_folder(str(tmp_path / "out" / "epoch-1-step-3")):
            pass
    assert names(tmp_path) == []


def test_a_removed_output_folder_is_one_line_and_exit_code_5(monkeypatch, capsys):
    def main(argv):
        raise FolderGoneError("--output_path x: . was removed")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stop:
        entry.run(main)
    assert stop.value.code == EXIT_GONE == 5
    assert capsys.readouterr().err == "x.py: error: --output_path x: . was removed\n"


def test_two_real_trainings_into_one_folder_that_is_renamed(tmp_path):
    """The real command: the second into a new folder is refused; the first, whose folder is renamed, ends with 5."""
    row = {"instruction": "问", "input": "", "output": "答"}
    (tmp_path / "rows.json").write_text("\n".join([json.dumps(row)] * 4), encoding="utf-8")
    command = [sys.executable, ROOT / "train.py", "--train_path", "rows.json", "--output_dir", "out", "--device", "cpu"]
    command += ["--model_name_or_path", GOLDEN / "glm3", "--max_len", "64", "--max_src_len", "40"]
    command += ["--save_state_step", "50", "--show_loss_step", "1", "--num_train_epochs", "100000"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, **streams) for _ in range(2)]
    end = time.monotonic() + 240
    while (log := tmp_path / "out" / "train_log.jsonl") and not (log.exists() and log.stat().st_size):
        assert time.monotonic() < end and any(process.poll() is None for process in both)
        time.sleep(0.1)
    while all(process.poll() is None for process in both):
        assert time.monotonic() < end
        time.sleep(0.1)
    first, second = sorted(both, key=lambda process: process.poll() is not None)
    said = second.communicate(timeout=60)[0].splitlines()
    assert second.returncode == 2 and [line for line in said if "another process writes into it" in line] == said[-1:]
    (tmp_path / "out").rename(tmp_path / "moved")
    said = first.communicate(timeout=120)[0].splitlines()
    assert first.returncode == 5, said
    [line] = [line for line in said if "error:" in line or "Traceback" in line]
    assert line.startswith("train.py: error: --output_dir out: out was removed, renamed or emptied while this command")
    assert sorted(os.listdir(tmp_path)) == ["moved", "rows.json"]
    assert not [name for name in os.listdir(tmp_path / "moved") if name.endswith((".partial", ".lock"))]


# A terminal that closes, and SIGTERM.

WRITES = """import os, sys, time
sys.argv = ["x.py"]
from runtime import entry, folders, holding, streams
def main(argv):
    with holding.holding("out.json"), folders.whole_file("out.json") as file:
        file.write("half")
        print("ready", flush=True)
        for _ in streams.progress_bar(range({tenths}), mininterval=0):
            time.sleep(0.1)
            print("still here", flush=True)
entry.run(main)"""


def start(folder, handler, tenths, **how):
    """A command that writes for a while, begun with SIGHUP and SIGTERM as a parent has set them."""

    def set_signals():
        signal.signal(signal.SIGHUP, handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", WRITES.format(tenths=tenths)]
    return subprocess.Popen(words, cwd=folder, env=environment, preexec_fn=set_signals, **how)


@pytest.mark.parametrize(
    "number, code, says", [("SIGHUP", 129, ": the terminal has gone"), ("SIGTERM", 143, " by SIGTERM")]
)
def test_a_command_that_is_ended_leaves_nothing_half(tmp_path, number, code, says):
    """The kind: SIGHUP and SIGTERM to any command but train.py, which ended at once and left what it had begun."""
    process = start(tmp_path, signal.SIG_DFL, 1000, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    assert names(tmp_path) == [".out.json.lock", "out.json.partial"]
    process.send_signal(getattr(signal, number))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors.splitlines()[-1] == f"x.py: stopped{says}"
    assert "Traceback" not in errors and names(tmp_path) == []


@pytest.mark.parametrize("handler, code", [(signal.SIG_IGN, 0), (signal.SIG_DFL, 129)])
def test_a_closed_terminal_ends_a_command_unless_hangups_are_ignored(tmp_path, handler, code):
    """Under nohup SIGHUP is ignored and the command comes to its end, with nothing to print to; else it ends."""
    parent, child = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), child)
    process = start(tmp_path, handler, 10 if code == 0 else 1000, start_new_session=True, **streams)
    os.close(child)
    assert b"ready" in os.read(parent, 1 << 10)
    os.close(parent)
    if code:
        process.send_signal(signal.SIGHUP)  # as the terminal of a session does
    assert process.wait(60) == code
    assert names(tmp_path) == ([] if code else ["out.json"])


def test_finished_rows_outlive_a_closed_terminal(tmp_path, monkeypatch, capsys):
    """predict.py: the rows of the batches before are there, and the same command goes on with them."""

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(entry.os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["predict.py"])
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        hang_up = Answerer(lambda number: number == 3 and signal.raise_signal(signal.SIGHUP))
        with pytest.raises(SystemExit) as stop:
            entry.run(lambda argv: answer_rows(tmp_path, hang_up))
    finally:
        entry.listen_as_before(before)
    assert stop.value.code == 129
    assert "the terminal has gone: the same command answers the rows that are left" in capsys.readouterr().err
    assert len((tmp_path / "p.jsonl.rank0.partial").read_text().splitlines()) == 3
    again = Answerer()
    answer_rows(tmp_path, again)
    assert again.num_batches == 2 and names(tmp_path) == ["p.jsonl"]


# A clock that is set.


def test_durations_do_not_go_by_the_clock_on_the_wall():
    """The kind: `time.time()` for how long something took. It is for dates alone: of files."""
    dates = ("doctor.py", "row_cache.py")
    for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_clock = isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.now")
            is_bar = isinstance(node, ast.ImportFrom) and node.module == "tqdm"
            assert not is_clock or path.name in dates, f"{path.name}:{node.lineno}"
            assert not is_bar, f"{path.name}:{node.lineno}: utils.progress_bar has a clock that nobody sets"


def test_a_clock_that_stands_still_or_goes_back(tmp_path, monkeypatch):
    """No division by zero, no negative speed: in the log, the end of a run, a bar and the costs of a step."""
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    log, speed = run_log.RunLog(str(tmp_path), 3), run_log.Speed()
    speed.count(7)
    assert speed.take() >= 0
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    log.started, speed = 5.0, run_log.Speed()
    speed.count(7)
    log.record(1, 0.5, 2.0, 1e-3, 1.0, speed.take())
    log.done(SimpleNamespace(step=1, num_tokens=7, best_step=0, best_value=None), 1, 1, 1)
    log.bar.close()
    [record] = json_lines.read_records(tmp_path / "train_log.jsonl")
    [event] = json_lines.read_records(tmp_path / "events.jsonl")
    assert (record["tokens_per_second"], record["seconds"]) == (None, 0.0)
    assert (event["tokens_per_second"], event["seconds"]) == (None, 0.0)
    monkeypatch.undo()

    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    with utils.progress_bar(total=3, file=open(os.devnull, "w")) as bar:
        bar.update(2)
        assert 0 <= bar.format_dict["elapsed"] < 60
    runner = commands.Steps(tmp_path / "steps", run_words=lambda words, environment: (0, False))
    runner.run("a", "true", [], tmp_path / "steps" / "x")
    assert 0 <= runner.stamp("a")["seconds"] < 60
