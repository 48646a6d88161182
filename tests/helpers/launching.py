"""Helpers for tests that start real commands, and for those of scripts."""

import importlib.util
import os
import signal
import subprocess

from reference import ROOT

from runtime.distributed import free_port  # noqa: F401


def load_script(name):
    """A script of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_signals():
    """For `preexec_fn`: what the tests' own parent ignores (SIGINT in a shell's background, SIGHUP under nohup), a child
    would ignore, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run_command(command, folder, timeout=300, **environment):
    """Run a bash command line in a folder of the test; returns the finished process.

    Links to the commands let it say `train.py` as users do; Python finds the rooms beside the file that a link means.
    """
    for path in ROOT.glob("*.py"):
        link = folder / path.name
        if not link.exists():
            link.symlink_to(path)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def check_done(process):
    """The command ended well; its output is shown otherwise."""
    assert process.returncode == 0, (
        f"exit code {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    )
