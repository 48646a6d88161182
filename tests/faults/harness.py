"""Runs of train.py through the real launcher on two CPU processes, killed and started again."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import psutil

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from launching import default_signals, free_port  # noqa: E402

SCRIPT = ROOT / "tests" / "faults" / "faulty_train.py"
TYPES = {
    "freeze": "--train_type freeze --freeze_module_name layers.1. --ds_file ds_zero3_offload.json",
    "ptuning": "--train_type ptuning --pre_seq_len 4 --ds_file ds_zero2_no_offload.json --packing",
    "lora": "--train_type lora --lora_dim 4 --ds_file ds_zero2_offload.json",
    "all": "--train_type all --ds_file ds_zero3_no_offload.json",
}


class Run:
    """One start of the launcher, with its output as it comes."""

    def __init__(self, folder, flags, processes=2, fault=None, before=(), mode="glm3", model=None):
        self.folder = pathlib.Path(folder)
        self.output = []
        command = [
            *(
                *before,
                os.path.join(os.path.dirname(sys.executable), "deepspeed"),
                "--num_accelerators",
                str(processes),
            ),
            *("--master_port", str(free_port()), str(SCRIPT)),
            *("--train_path", str(self.folder / "rows.json")),
            *("--model_name_or_path", str(model or ROOT / "tests" / "golden" / mode), "--mode", mode),
            *("--max_len", "300", "--max_src_len", "200", "--learning_rate", "1e-3", *flags.split()),
        ]
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(processes)}
        environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        environment |= {"FAULT": fault} if fault else {}
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=default_signals,
        )
        self.started = time.monotonic()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        """Keep the output."""
        for line in self.process.stdout:
            self.output.append(line)

    @property
    def text(self):
        """Everything that was printed so far."""
        return "".join(self.output)

    def wait_for(self, pattern, seconds=300):
        """Wait until a pattern is printed; False where the run ended before."""
        while not re.search(pattern, self.text):
            if self.process.poll() is not None:
                time.sleep(0.2)
                return re.search(pattern, self.text) is not None
            assert time.monotonic() - self.started < seconds, self.text[-3000:]
            time.sleep(0.02)
        return True

    def end(self, seconds=300):
        """Wait for the end; the exit code. No process of the run is left then."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 300
        while others := self.ranks():
            assert time.monotonic() < deadline, f"still there: {others}"
            time.sleep(0.1)
        return code

    def ranks(self):
        """{rank: process} of the run's training processes."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            try:
                if str(SCRIPT) in (process.info["cmdline"] or []) and "--local_rank" in str(process.info["cmdline"]):
                    if process.environ().get("MASTER_PORT") and process.cwd() == str(self.folder):
                        found[int(process.environ()["RANK"])] = process
            except psutil.Error:
                pass
        return found

    def kill(self, rank=None):
        """SIGKILL to one rank, or to all processes that the launcher started and itself."""
        if rank is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(self.process.pid, signal.SIGKILL)
        elif rank in (ranks := self.ranks()):
            ranks[rank].kill()

    def steps(self):
        """Steps whose state is saved, as the run has said."""
        return [int(step) for step in re.findall(r"saved \S+/state-step-(\d+)", self.text)]


def prepare(folder, num_rows=11):
    """A folder with rows to train on."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:num_rows]
    (folder / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    return folder


def last_weights(output_dir, num_steps):
    """{file name: bytes} of the weights that a run ends with."""
    [folder] = pathlib.Path(output_dir).glob(f"epoch-*-step-{num_steps}")
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def log_of(output_dir):
    """{step: (loss, gradient norm, learning rate)} of train_log.jsonl."""
    lines = (pathlib.Path(output_dir) / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    return {r["step"]: (r["loss"], r["grad_norm"], r["learning_rate"]) for r in records}
