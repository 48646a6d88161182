"""A mistake of the user is one line and exit code 2; a fault of the program keeps its traceback and exit code 1."""

import errno
import subprocess
import sys

import pytest
from reference import ROOT

COMMAND = """import sys
sys.argv = ['x.py']
from runtime import entry, watchdog
from runtime.exits import UserError
def main(argv):
    {body}
{door}
"""
DOORS = {"entry": "entry.run(main)", "train": "with watchdog.together() as it:\n    main([])"}


def run(body, door):
    code = COMMAND.format(body=body, door=DOORS[door])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("door", DOORS)
def test_what_the_user_can_fix_is_one_line(door):
    process = run("raise UserError('--flag 1: must be 2')", door)
    assert process.returncode == 2 and process.stderr.splitlines() == ["x.py: error: --flag 1: must be 2"]


@pytest.mark.parametrize(
    "body", ["a, b = [1, 2, 3]", "int('x')", "import math; math.log(-1)", "open('a\\0b')", "{}['a']", "open('/no')"]
)
@pytest.mark.parametrize("door", DOORS)
def test_a_fault_of_the_program_keeps_its_traceback(door, body):
    """Of the kind: ValueErrors of Python and of libraries, which were shown as mistakes of the user."""
    process = run(body, door)
    assert process.returncode == 1 and "Traceback" in process.stderr and "error: " not in process.stderr.splitlines()[0]


FULL = ["raise OSError(28, 'No space left on device', 'out/x')", "open('/dev/full', 'w').write('x' * 9999)"]


@pytest.mark.parametrize("body", FULL)
@pytest.mark.parametrize("door", DOORS)
def test_a_full_disk_is_no_fault_of_the_program(door, body):
    process = run(body, door)
    place = "out/x: " if "out/x" in body else ""
    line = f"x.py: error: {place}No space left on device: make room and start again"
    assert process.returncode == 2 and process.stderr.splitlines() == [line]


def test_standard_output_on_a_full_disk():
    """What could not be written is not tried again when the interpreter ends, which would change the exit code."""
    code = COMMAND.format(body="print('x' * 9999)", door=DOORS["entry"])
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "No space left" in process.stderr


def test_writers_of_weights_tell_of_a_full_disk(tmp_path):
    """safetensors and torch have errors of their own for it; the door sees the machine's error."""
    import torch

    from checkpoints.weight_files import disk_errors, write_bin
    from runtime.exits import ending

    with pytest.raises(OSError) as caught, disk_errors():
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and "make room" in ending(caught.value)[0]
    with pytest.raises(RuntimeError, match="a fault"), disk_errors():
        raise RuntimeError("a fault of the program")
    with pytest.raises(OSError) as caught:
        write_bin({"a": torch.zeros(9999)}, "/dev/full")
    assert ending(caught.value)
