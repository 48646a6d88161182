"""How commands begin and end: what a terminal cannot show, Ctrl-C, what a launch or a parent leaves behind, `~`."""

import ast
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from command_lines import COMMANDS, NEEDED, PARSERS, run_on
from launching import default_signals
from reference import GOLDEN, ROOT
from refusing import sandbox  # noqa: F401  a fixture

from checkpoints.opening import no_checkpoint_problem
from comparison import commands
from comparison.plan import read_plan
from flags import common, predict
from flags.train import train_parser
from generation.talk import talk
from runtime import entry, ranks, watchdog
from runtime.folders import last_named

STRANGE = "水温😀\udce6"  # neither ASCII nor GBK, and half a character
ROW = {"instruction": "问😀", "input": "", "output": "答😀"}


# What a terminal cannot show.


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
@pytest.mark.parametrize("script", COMMANDS)
def test_text_that_the_terminal_cannot_encode(script, encoding, monkeypatch):
    """The kind: output of any command that the terminal's encoding does not have. It is replaced, nothing ends."""
    code, _, errors = run_on(encoding, monkeypatch, script, *NEEDED.get(script, "").split(), f"--{STRANGE}")
    assert code == 2 and f"{os.path.basename(script)}: error: unrecognized arguments: --" in errors
    assert "\\udce6" in errors and "Traceback" not in errors
    assert (r"\u6c34" in errors) == (encoding == "ascii") and ("\\U0001f600" in errors) == (encoding != "utf-8")


def test_answers_and_tables_that_the_terminal_cannot_encode(tmp_path, monkeypatch):
    rows = tmp_path / "水温😀.jsonl"
    rows.write_text(json.dumps({"prediction": "好", "output": "好"}), encoding="utf-8")
    code, out, _ = run_on("ascii", monkeypatch, "score.py", "--predictions", rows, "--task", "classification")
    assert code == 0 and r"\u6c34\u6e29\U0001f600.jsonl: rows: 1" in out and r"\u597d" in out
    flags = ["--model_path", GOLDEN / "glm3", "--prompt", "水温😀", "--max_new_tokens", "12", "--device", "cpu"]
    code, out, _ = run_on("ascii", monkeypatch, "predict.py", *flags)
    assert not code and "\\" in out


def test_a_training_on_a_terminal_without_chinese(tmp_path):
    """train.py shows its first row; the variables that a launch left behind are those of a launch of one."""
    (tmp_path / "rows😀.json").write_text("\n".join([json.dumps(ROW)] * 2), encoding="utf-8")
    command = [sys.executable, ROOT / "train.py", "--train_path", "rows😀.json", "--output_dir", "水温"]
    command += ["--device", "cpu", "--model_name_or_path", GOLDEN / "glm3", "--max_len", "64", "--max_src_len", "40"]
    command.append("--local-rank=0")
    left = {"MASTER_ADDR": "192.0.2.1", "RANK": "0", "WORLD_SIZE": "1"}
    environment = {**os.environ, **left, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\\U0001f600" in done.stdout and r"done: 2 updates, \u6c34\u6e29" in done.stdout


def test_streams_that_are_closed_or_not_read():
    """A parent that closes the streams, and a reader that has seen enough, are no errors."""
    for streams, code in ((">&- 2>&-", 0), ("| exit; exit ${PIPESTATUS[0]}", 141)):
        command = f"python -c 'from runtime import entry; entry.run(print)' {streams}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


# Ctrl-C.


# What finds the rooms when a script of scripts/ starts, and what costs nothing.
QUICK = ("from __future__ import annotations", "import os", "import sys", "from pathlib import Path")


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_imports_entry_first_and_ends_with_it(script):
    """Ctrl-C is heard from the first import on: `entry` comes before all that takes time."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [line for line in map(ast.unparse, imports) if line not in QUICK][0] == "from runtime import entry"
    last = ast.unparse(tree.body[-1])
    assert "entry.run(" in last or (script == "train.py" and "together()" in last)


def test_ctrl_c_is_one_line():
    """While a command imports, and while it works; a thread that is at work is not waited for."""
    for code in ("raise KeyboardInterrupt", "entry.run(lambda argv: signal.raise_signal(signal.SIGINT))"):
        code = f"from runtime import entry\nimport signal, sys, threading, time\nsys.argv = ['x.py']\n{code}"
        code = code.replace("entry.run", "threading.Thread(target=time.sleep, args=[600]).start()\nentry.run")
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180, preexec_fn=default_signals)
        assert (done.returncode, done.stderr) == (130, "\nx.py: stopped\n")


@pytest.fixture
def handlers():
    """The signal handlers, put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    entry.listen_as_before(before)


def test_what_the_parent_ignores_stays_ignored(handlers, monkeypatch):
    """The kind: nohup (SIGHUP), and a shell's background (SIGINT). SIGTERM is heard all the same."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with watchdog.together() as watched:
        assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)} == {signal.SIG_IGN}
        assert signal.getsignal(signal.SIGTERM) == watched.on_signal
    assert signal.getsignal(signal.SIGTERM) != watched.on_signal


def test_a_signal_before_the_first_step_exits_with_75(handlers, monkeypatch, capsys):
    """Before the first step there is nothing to save: the run leaves at once, and is to be started again."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stop, watchdog.together():
        signal.raise_signal(signal.SIGINT)
    assert stop.value.code == 75 and capsys.readouterr().err == "\nCtrl-C: left before the training began\n"


HEARS = """import signal, sys, time
for n in (2, 15): signal.signal(n, lambda number, frame: (print(signal.Signals(number).name, flush=True), sys.exit(75)))
print("ready", flush=True); time.sleep(600)"""


def press(words, number, **kwargs):
    """(exit code, lines on both streams) of a command that gets a signal when it has said that it is ready."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, preexec_fn=default_signals, start_new_session=True, **streams, **kwargs)
    lines = [process.stdout.readline()]
    os.killpg(process.pid, number)  # as a terminal does
    rest, _ = process.communicate(timeout=180)
    return process.returncode, [line.strip() for line in [*lines, *rest.splitlines(keepends=True)]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once(number, tmp_path):
    """By job.sh and by what runs the commands of a comparison: the same signal, once."""
    job = ["bash", str(ROOT / "scripts" / "job.sh"), sys.executable, "-c", HEARS]
    assert press(job, number) == (75, ["ready", number.name])
    code = f"import sys\nfrom comparison import commands\nprint(*commands.run_words([sys.executable, '-c', {HEARS!r}], None))"
    assert press([sys.executable, "-c", code], number, cwd=ROOT) == (0, ["ready", number.name, "75 True"])


def test_the_launcher_is_silenced_and_a_kill_is_said(tmp_path):
    """Its last line, of exit code 75, reads like a failure; that a process was killed only it would have said."""
    stub = tmp_path / "deepspeed"
    stub.write_text('#!/bin/bash\necho "$@"\nexit "$CODE"\n')
    stub.chmod(0o755)
    for code, says in (("75", ""), ("247", "ended by signal 9 (KILL): out of memory?"), ("143", "signal 15 (TERM)\n")):
        words = ["bash", ROOT / "scripts" / "job.sh", stub, "train.py", "--x"]
        done = subprocess.run(words, env={**os.environ, "CODE": code}, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (int(code), "--log_level critical train.py --x\n")
        assert says in done.stderr and bool(says) == bool(done.stderr)


@pytest.mark.parametrize("given", ["--output_dir {}", "--output_dir={}"])
def test_a_launcher_that_hides_a_kill_is_not_believed(given, tmp_path):
    """deepspeed ends with 0 where the process between it and the training was killed: then the run's own last event
    counts."""
    stub = tmp_path / "deepspeed"
    stub.write_text("#!/bin/bash\nexit 0\n")
    stub.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    words = ["bash", ROOT / "scripts" / "job.sh", stub, "train.py", *given.format(run).split()]
    for event, code in (("saved", 1), ("done", 0)):
        (run / "events.jsonl").write_text(f'{{"step": 1, "event": "done"}}\n{{"step": 2, "event": "{event}"}}\n')
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == code
        assert (f"the run in {run} is not done" in done.stderr) == (code == 1)


# What a launch left behind.


LEFT = [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not: unset WORLD_SIZE"),
    ({"WORLD_SIZE": "4", "RANK": "1"}, "WORLD_SIZE=4 is set but MASTER_ADDR is not: unset WORLD_SIZE"),
    ({"RANK": "3", "MASTER_ADDR": "a"}, "RANK=3 is set but WORLD_SIZE is not: unset RANK"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a"}, "RANK=2 is set but WORLD_SIZE is 2: unset RANK"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: is not a whole number: unset WORLD_SIZE"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: is not a whole number: unset LOCAL_RANK"),
]


@pytest.mark.parametrize("variables, says", LEFT)
def test_variables_of_a_launch_without_one(sandbox, monkeypatch, variables, says):  # noqa: F811
    """The kind: WORLD_SIZE, RANK and LOCAL_RANK exported in a shell. A run of several processes says so at once;
    commands of one process do not mind."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (ranks.world_size(), ranks.rank(), ranks.local_rank(), ranks.is_main()) == (1, 0, 0, True)
    sandbox.train_fails(says=says)
    sandbox.fails("predict.py", "--model_path", GOLDEN / "glm3", "--prompt", "问", says=says)
    sandbox.fails("merge_lora.py", "--model_dir", "nowhere", says="--model_dir nowhere: no such folder")


def test_variables_of_a_launch_are_read(monkeypatch):
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (ranks.world_size(), ranks.rank(), ranks.local_rank(), ranks.is_main()) == (2, 1, 1, False)
    assert ranks.launcher_problem() is None


def test_steps_do_not_inherit_a_launch(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "WORLD_SIZE" not in commands.Steps(tmp_path).environment


# Paths.


def flags_of(name):
    return [action for action in PARSERS[name]()._actions if action.nargs != 0]


@pytest.mark.parametrize("name", PARSERS)
def test_every_path_flag_expands_the_home_folder(name, monkeypatch):
    """Every flag that takes a path has the one type that knows `~`, also where the shell leaves it (--flag=~/x)."""
    words = ("path", "dir", "file", "folder", "config", "resume", "before", "suite", "baseline", "criteria")
    known = {"lora_module_name", "freeze_module_name", "dir"}
    paths = [a for a in flags_of(name) if any(word in a.dest for word in words) or a.dest == "predictions"]
    assert paths and all(action.type is common.expanded_path for action in paths if action.dest not in known)
    monkeypatch.setenv("HOME", "/there")
    assert common.expanded_path("~/x") == "/there/x" and common.expanded_path("a~b") == "a~b"
    args = train_parser().parse_args(["--train_path", "a", "~/b", "--model_name_or_path=~", "--output_dir=~/x"])
    assert (args.train_path, args.model_name_or_path, args.output_dir) == (["a", "/there/b"], "/there", "/there/x")


def test_paths_of_a_comparison_expand_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(GOLDEN / "glm3")
    (tmp_path / "rows.json").write_text("\n".join([json.dumps(ROW)] * 4), encoding="utf-8")
    lines = ["base: ~/base", "train_path: ~/rows.json", "test_path: [~/rows.json]"]
    lines += ["train_flags: {eval_path: ~/rows.json}", "methods:"]
    lines += ["- {name: one, train_type: lora, flags: {replay_path: [~/rows.json]}}"]
    (tmp_path / "c.yaml").write_text("\n".join(lines), encoding="utf-8")
    plan, problems = read_plan(str(tmp_path / "c.yaml"))
    rows = str(tmp_path / "rows.json")
    assert problems == [] and (plan.base, plan.train_path, plan.test_path) == (str(tmp_path / "base"), [rows], [rows])
    assert (plan.methods[0].all["eval_path"], plan.methods[0].all["replay_path"]) == (rows, [rows])


def test_a_dot_or_a_slash_at_the_end_names_the_same_folder(monkeypatch, tmp_path):
    """`.` and a slash at the end name the same folder as its name."""
    place = tmp_path / "output-x" / "epoch-1-step-3"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    assert last_named(".") == str(place) and last_named("../a/") == "../a"
    assert last_named("..") == str(place.parent)
    labels = {predict.model_label(name) for name in (".", "../epoch-1-step-3/", str(place))}
    assert labels == {"output-x-epoch-1-step-3"}
    assert predict.model_label("../best/") == "output-x-best" and predict.model_label("/") == "model"


@pytest.fixture
def run_folder(sandbox):  # noqa: F811
    """out/ with checkpoints of a run, and a state."""
    for step in (9, 12):
        sandbox.write(f"out/state-step-{step}/state.json", "{}")
    for name in ("epoch-1-step-9", "epoch-2-step-10", "epoch-2-step-11", "epoch-3-step-12", "best"):
        sandbox.adapter(f"out/{name}")
    return sandbox


NAMED = "name out/epoch-3-step-12 or out/epoch-2-step-11 or out/epoch-2-step-10 or out/best \\(1 more\\)$"


@pytest.mark.parametrize("given, what", [("out", "is a run's folder, not a"), ("out/state-step-9/", "is a state to")])
def test_a_run_is_no_checkpoint(run_folder, given, what):
    """The kind: a folder of a run given for one of the checkpoints in it. The line names them, the newest first."""
    says = rf"{given}: {what}.*{NAMED}"
    run_folder.fails("predict.py", "--model_path", given, "--prompt", "问", says=f"--model_path {says}")
    run_folder.fails("merge_lora.py", "--model_dir", given, says=f"--model_dir {says}")
    found = no_checkpoint_problem("--model_path", given)
    assert found.startswith(f"--model_path {given}: {what}")
    run_folder.train_fails(model_name_or_path=given, output_dir="new", says=f"--model_name_or_path {says}")
    run_folder.monkeypatch.chdir(given)
    assert re.search("out/best|name ./epoch-3-step-12 ", no_checkpoint_problem("--model_path", "."))


def test_a_folder_with_a_run_says_how_to_go_on(run_folder):
    fix = "is not empty: add --resume auto to go on with that run, or choose a new folder$"
    run_folder.train_fails(output_dir="out", says=f"--output_dir out: {fix}")
    run_folder.train_fails("--resume out", output_dir="new", says="no state in it: name out/state-step-12, or auto")


# Talking.

STUB = """import sys, time
from generation import talk
from runtime import entry
class Answerer:
    max_src_len = 99
    def prompt_ids(self, query, history): return [query, len(history)], 0
    def __call__(self, encoded):
        print("thinking", flush=True)
        time.sleep(30 if "slow" in encoded[0][0][0] else 0)
        return [{"predictions": ["<%s|%d>" % (ascii(encoded[0][0][0])[1:-1], encoded[0][0][1])]}]
entry.run(lambda argv: talk.talk(Answerer()))"""


PROMPT = b"\r\n> "


def converse(turns, **environment):
    """(exit code, screen) of a talk on a terminal. turns: (what is typed, what must be seen before the next)."""
    process, screen = pty.fork()
    if process == 0:
        default_signals()
        os.chdir(ROOT)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
        os.execve(sys.executable, [sys.executable, "-c", STUB], {**kept, "TERM": "dumb", **environment})
    seen, mark, end = b"", 0, time.monotonic() + 120

    def read():
        nonlocal seen
        if select.select([screen], [], [], 0.1)[0]:
            try:
                seen += os.read(screen, 1 << 16)
            except OSError:  # the other end is closed
                return False
        return True

    for typed, wanted in [(b"", b"> "), *turns]:
        time.sleep(0.1)  # Python may miss Ctrl-C while the line editor still works on what was typed
        os.write(screen, typed)
        while wanted not in seen[mark:]:
            assert read() and time.monotonic() < end, seen.decode("utf-8", "replace")
        mark = seen.index(wanted, mark) + len(wanted)
    while read() and time.monotonic() < end:
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(screen)
    return code, seen.decode("utf-8", "replace")


@pytest.mark.parametrize("environment", [{"LANG": "C.UTF-8"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_conversation_is_edited_and_interrupted_on_a_terminal(environment):
    """Backspace over Chinese, half a character, Ctrl-C while answering, on a line and at the prompt; earlier lines."""
    turns = [
        ("水温".encode() + b"\x7fx\r", rb"<\u6c34x|0>" + PROMPT),
        (b"a\xe6\xb0b\r", b"|1>" + PROMPT),
        (b"slow\r", b"thinking"),
        (b"\x03", b"(stopped)" + PROMPT),
        (b"dropped", b"dropped"),
        (b"\x03", b"> "),
        (b"kept\r", b"<kept|2>" + PROMPT),
        (b"\x1b[A\r", b"<kept|3>" + PROMPT),
        (b"\x03", b"stopped\r\n"),
    ]
    code, screen = converse(turns, **environment)
    assert code == 130 and screen.endswith("-c: stopped\r\n") and "Traceback" not in screen, screen


def test_ctrl_d_or_an_empty_line_ends_a_conversation():
    for typed in (b"\x04", b"\r"):
        code, screen = converse([(b"hi\r", b"<hi|0>" + PROMPT), (typed, b"\r\n")], LANG="C.UTF-8")
        assert code == 0 and "Traceback" not in screen


def test_a_conversation_is_read_from_a_file(monkeypatch, capsys):
    """No terminal, no line editor: bytes of another encoding do not end it."""
    stdin = io.TextIOWrapper(io.BytesIO(b"\xce\xc2\nb\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    entry.prepare_streams()
    asked = []

    class Answerer:
        def prompt_ids(self, query, history):
            return [query, len(history)], 0

        def __call__(self, encoded):
            asked.append(encoded[0][0][0])
            return [{"predictions": ["好"]}]

    talk(Answerer())
    assert asked == ["\ufffd\ufffd", "b"]


# The environment that is filled.


ACTIVE = [
    ({}, False),
    ({"VIRTUAL_ENV": "/v"}, True),
    ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, False),
    ({"CONDA_PREFIX": "/conda"}, False),
    ({"CONDA_PREFIX": "/conda/envs/glm", "CONDA_DEFAULT_ENV": "glm"}, True),
    ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base", "VIRTUAL_ENV": "/v"}, True),
]


@pytest.mark.parametrize("variables, is_active", ACTIVE)
def test_conda_base_is_not_filled(variables, is_active):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CONDA", "VIRTUAL_ENV"))}
    words = ["bash", "-euc", f"source {ROOT}/scripts/environment.sh; if has_environment; then exit 7; fi"]
    assert subprocess.run(words, env={**kept, **variables}).returncode == (7 if is_active else 0)
