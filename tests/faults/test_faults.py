"""Runs that are killed, stopped, starved and fed with NaN, through the real launcher on two processes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from harness import TYPES, Run, last_weights, log_of, prepare
from reference import ROOT

from runtime.folders import is_whole, verify

pytestmark = pytest.mark.launch

FLAGS = (
    "--per_device_train_batch_size 2 --num_train_epochs 4 --show_loss_step 1 --output_dir out --save_state_step 3"
    " --save_total_limit 2 {type}"
)


def done(run):
    """The run ended well."""
    assert run.end() == 0, run.text[-3000:]
    return run


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    """Six kills, each resumed: of a rank at named points of a save, and of all processes at a random moment (None)."""
    flags = FLAGS.format(type=TYPES["lora"]).replace("epochs 4", "epochs 20")
    done(Run(prepare(tmp_path / "whole"), flags))
    folder = prepare(tmp_path / "killed")
    faults = ["kill 1 2 before a file", "kill 0 3 before the rename", None, "kill 0 3 before the manifest", None, None]
    saved = num_kills = 0
    for fault in [*faults, "end"]:
        run = Run(folder, f"{flags} --resume auto", fault=fault if fault in faults else None)
        if fault is None:
            run.wait_for(r"updates of \d+ rows")
            time.sleep(random.Random(num_kills).uniform(0, 0.8))
            run.kill()
        code = run.end()
        assert (code == 0) == (fault == "end"), run.text[-3000:]
        num_kills += code != 0
        resumed = re.search(r"resumed from out/state-step-(\d+)", run.text)
        assert int(resumed[1] if resumed else 0) >= saved, "updates were lost whose state had been saved"
        saved = max([saved, *run.steps()])
        assert all(is_whole(path) for path in (folder / "out").glob("*-step-*[0-9]"))
    assert num_kills == 6
    assert last_weights(folder / "out", 60) == last_weights(tmp_path / "whole" / "out", 60)
    assert log_of(folder / "out") == log_of(tmp_path / "whole" / "out")
    assert not list((folder / "out").glob("*.partial"))
    assert len(list((folder / "out").glob("state-*"))) == len(list((folder / "out").glob("epoch-*"))) == 2


def test_signals_save_a_state_and_exit_with_75(tmp_path):
    """Ctrl-C to scripts/job.sh: the step ends, a state is saved, exit code 75, and nothing reads like a failure; then
    on one process, converted, and SIGTERM."""
    folder = prepare(tmp_path)
    flags = FLAGS.format(type=TYPES["all"]).replace("--save_state_step 3", "").replace("epochs 4", "epochs 40")
    run = Run(folder, f"{flags} --resume auto", before=["bash", str(ROOT / "scripts" / "job.sh")])
    assert run.wait_for("saved out/epoch-1-step-3")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 75, run.text[-3000:]
    assert "Ctrl-C: leaving after this step" in run.text and "the same command with --resume auto" in run.text
    assert not re.search(r"ERROR|launch\.py|Traceback|error:", run.text), run.text[-3000:]
    [state] = (folder / "out").glob("state-step-*")
    step = int(state.name.rpartition("-")[2])
    before = log_of(folder / "out")
    assert max(before) == step and verify(state) == []

    run = Run(folder, f"{flags} --resume auto", processes=1)
    assert run.end() == 2
    assert re.search(r"an update had 4 rows \(2 x 1 x 2: .*change --gradient_accumulation_steps", run.text)
    run = Run(folder, f"{flags} --resume auto --gradient_accumulation_steps 2", processes=1)
    assert run.wait_for(f"saved out/epoch-{step // 3 + 2}-"), run.text[-3000:]
    assert "an update is split differently (2 x 1 x 2 before, 2 x 2 x 1 now)" in run.text
    for process in run.ranks().values():
        process.terminate()
    assert run.end() == 75, run.text[-3000:]
    assert "SIGTERM: leaving after this step" in run.text
    after = log_of(folder / "out")
    assert len(after) == max(after) > step and {s: after[s] for s in before} == before
    assert not list((folder / "out").glob("*.partial"))


def listeners(process):
    """What a process listens at."""
    return [place for place in process.net_connections("inet") if place.status == psutil.CONN_LISTEN]


def test_a_dead_rank_ends_the_job(tmp_path):
    run = Run(prepare(tmp_path), FLAGS.format(type=TYPES["lora"]).replace("epochs 4", "epochs 400"))
    assert run.wait_for("saved out/state-step-3")
    # No process listens where another host, or the network, reaches it.
    listening = [(place.laddr.ip, rank) for rank, process in run.ranks().items() for place in listeners(process)]
    assert {rank for _, rank in listening} == {0, 1} and {ip for ip, _ in listening} == {"127.0.0.1"}, listening
    run.kill(1)
    began = time.monotonic()
    assert run.end() != 0
    assert time.monotonic() - began < 180
    assert "the process of rank 1 has died: the others end too" in run.text


def test_a_step_that_hangs(tmp_path):
    run = Run(prepare(tmp_path), FLAGS.format(type=TYPES["lora"]) + " --step_timeout 3", fault="hang 1 5")
    assert run.end(90) == 4, run.text[-3000:]
    rows = set()
    for rank in (0, 1):
        text = (tmp_path / "out" / f"stalled-rank-{rank}.txt").read_text(encoding="utf-8")
        assert text.startswith("step 5, rows ") and "faulty_train.py" in text and "Thread" in text
        rows |= set(re.findall(r"rows\.json:(\d+)", text))
    assert len(rows) == 4 and re.search(r"--step_timeout 3: step 5, rows \S+rows.json:\d+", run.text)


def test_a_loss_that_is_not_finite(tmp_path):
    run = Run(prepare(tmp_path), FLAGS.format(type=TYPES["all"]), fault="nan 5")
    assert run.end(90) == 3, run.text[-3000:]
    [line] = [line for line in run.text.splitlines() if ": error: " in line]
    assert re.search(
        r"step 5: the loss is not finite, the update was not applied; rows (\S+rows.json:\d+(, )?){4};", line
    )
    assert "first output that is not finite: transformer.encoder.layers.1.mlp.dense_4h_to_h;" in line
    assert "the weight transformer.encoder.layers.1.mlp.dense_4h_to_h.weight is not finite" in line
    assert sorted(log_of(tmp_path / "out")) == [1, 2, 3, 4]


def test_gradients_that_are_not_finite(tmp_path):
    """One after another is left out; after sixteen the run ends with advice, and nothing of it is saved."""
    flags = "--num_train_epochs 10 --output_dir out --show_loss_step 5 --save_state_step 20"
    text = train_alone(prepare(tmp_path, 3), flags, code=3, fault="inf 4")
    assert "step 19: the gradients of 16 updates in a row were not finite and were left out; lower --learning" in text
    assert [loss is not None for loss, *_ in log_of(tmp_path / "out").values()] == [True] * 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MB; None where mounting is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(tmp_path, small_disk):
    """The run goes on, what is there stays whole, and there is a message; with room again it saves again."""
    if small_disk is None:
        pytest.skip("file systems cannot be mounted here; test_a_disk_that_is_full_in_the_middle runs anyway")
    out = small_disk / "out"
    flags = FLAGS.format(type=TYPES["lora"]).replace("--output_dir out", f"--output_dir {out}")
    run = Run(prepare(tmp_path), flags.replace("epochs 4", "epochs 100"))
    assert run.wait_for(r"saved \S+/state-step-6"), run.text[-3000:]
    filler = small_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    assert run.wait_for(r"/epoch-\d+-step-\d+ was not saved, the run goes on: .* a checkpoint takes about [\d.]+ MB")
    assert run.wait_for(r"/state-step-\d+ was not saved, the run goes on: ")
    assert run.wait_for(r"train_log\.jsonl: .*the run goes on, its lines wait")
    states = list(out.glob("state-step-*[0-9]"))
    assert states and all(is_whole(path) for path in states)
    number = len(run.steps())
    filler.unlink()
    assert run.wait_for(rf"(saved \S+/state-step-\d+[\s\S]*){{{number + 1}}}"), run.text[-3000:]
    for process in run.ranks().values():
        process.terminate()
    assert run.end() == 75, run.text[-3000:]
    log = log_of(out)
    assert sorted(log) == list(range(1, max(log) + 1)), "no line of the log is lost"


def test_a_disk_that_is_full_in_the_middle(tmp_path):
    """Half a file is written when the disk is full: the run goes on without a state, and says at its end what to do."""
    run = Run(prepare(tmp_path), FLAGS.format(type=TYPES["lora"]), fault="full 8")
    assert run.end() == 1, run.text[-3000:]
    assert "out/state-step-6 was not saved, the run goes on: No space left on device" in run.text
    assert "out/epoch-4-step-12 was not saved" in run.text
    assert "make room and start again with --resume auto: the last checkpoint is missing" in run.text
    folders = sorted(path.name for path in (tmp_path / "out").glob("*-step-*"))
    assert folders == ["epoch-1-step-3", "epoch-2-step-6", "state-step-3"]
    assert all(is_whole(tmp_path / "out" / name) for name in folders)


def train_alone(folder, flags, code=0, fault=""):
    """train.py without a launcher, in one process; its output."""
    script = ROOT / "tests" / "faults" / "faulty_train.py" if fault else ROOT / "train.py"
    command = f"{sys.executable} {script} --train_path rows.json --model_name_or_path"
    command += f" {ROOT / 'tests/golden/glm3'} --mode glm3 --max_len 300 --max_src_len 200 --learning_rate 1e-3 {flags}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault}
    process = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment)
    assert process.returncode == code, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_a_full_log_disk_or_a_closed_pipe_does_not_end_training(tmp_path):
    """The disk that the log is sent to is full, or the reader of the pipe has gone: the run does not mind."""
    folder = prepare(tmp_path)
    command = f"{sys.executable} {ROOT}/train.py --train_path rows.json --model_name_or_path {ROOT}/tests/golden/glm3"
    command += " --mode glm3 --max_len 64 --max_src_len 48 --per_device_train_batch_size 11 --num_train_epochs 2"
    full = subprocess.Popen(f"{command} --output_dir full > /dev/full 2>&1", shell=True, cwd=folder)
    pipe = subprocess.run(f"({command} --output_dir pipe; echo $? > code) 2>&1 | head -n 1", shell=True, cwd=folder)
    assert full.wait() == pipe.returncode == 0 and (folder / "code").read_text() == "0\n"
    for name in ("full", "pipe"):
        assert last_weights(folder / name, 2) and len(log_of(folder / name)) == 1


def test_states_are_compared_with_the_run(tmp_path):
    """A state of other flags is refused by name; a damaged one is left out; a run that is done stays done."""
    folder = prepare(tmp_path, 5)
    flags = "--per_device_train_batch_size 2 --num_train_epochs 2 --output_dir out --save_state_step 2"
    train_alone(folder, flags)
    states = sorted(path.name for path in (folder / "out").glob("state-step-*"))
    assert states == ["state-step-2", "state-step-4"]
    weights = last_weights(folder / "out", 6)
    text = train_alone(folder, f"{flags} --resume out/state-step-4 --output_dir new --learning_rate 2e-3", code=2)
    assert "--resume out/state-step-4: --learning_rate was 0.001, now it is 0.002: resume with what" in text
    assert not (folder / "new").exists()

    model = folder / "out" / "state-step-4" / "deepspeed" / "mp_rank_00_model_states.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    shutil.rmtree(folder / "out" / "epoch-2-step-6")
    text = train_alone(folder, f"{flags} --resume auto")
    assert re.search(r"--resume auto: out/state-step-4 is left out, it is not whole: .*SHA-256", text)
    assert "resumed from out/state-step-2: 2 updates are done" in text
    assert last_weights(folder / "out", 6) == weights
    assert "done already" in train_alone(folder, f"{flags} --resume auto")


def test_no_process_is_left():
    """Nothing of these runs is still there."""
    mine = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if "faulty_train.py" in str(p.info["cmdline"])]
    assert mine == []


def test_a_spike_is_kept_with_its_rows(tmp_path, capsys):
    from training.run_log import RunLog

    (tmp_path / "out").mkdir()
    log = RunLog(str(tmp_path / "out"), 10)
    log.spike(7, 9.5, 1.25, (f"rows.json:{n}" for n in range(12)))
    log.close()
    [event] = map(json.loads, (tmp_path / "out" / "events.jsonl").read_text().splitlines())
    assert (event["step"], event["event"], event["loss"], len(event["rows"])) == (7, "loss spike", 9.5, 12)
    assert "step 7: loss 9.5000, usually 1.2500; rows rows.json:0, " in capsys.readouterr().out


def test_events_are_json(tmp_path):
    from runtime.json_lines import JsonLines

    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste', encoding="utf-8")
    lines = JsonLines(str(path), 1)
    assert path.read_text(encoding="utf-8").count("\n") == 3, "later lines stay until they are written again"
    lines.add({"step": 2})
    assert path.read_text(encoding="utf-8").count("\n") == 3
    lines.add({"step": 3, "event": "转向"})
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "event": "转向"},
    ]
    assert os.listdir(tmp_path) == ["events.jsonl"]
