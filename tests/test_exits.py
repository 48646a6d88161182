"""A mistake of the user is one line and exit code 2; a fault of the program keeps its traceback and exit code 1."""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMAND = """import sys
sys.argv = ['x.py']
import entry, watch
from exits import UserError
def main(argv):
    {body}
{door}
"""
DOORS = {"entry": "entry.run(main)", "train": "with watch.together() as it:\n    main([])"}


def run(body, door):
    code = COMMAND.format(body=body, door=DOORS[door])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("door", DOORS)
def test_what_the_user_can_fix_is_one_line(door):
    process = run("raise UserError('--flag 1: must be 2')", door)
    assert process.returncode == 2 and process.stderr.splitlines() == ["x.py: error: --flag 1: must be 2"]


@pytest.mark.parametrize("body", ["a, b = [1, 2, 3]", "int('x')", "import math; math.log(-1)", "open('a\\0b')", "{}['a']"])
@pytest.mark.parametrize("door", DOORS)
def test_a_fault_of_the_program_keeps_its_traceback(door, body):
    """Of the kind: ValueErrors of Python and of libraries, which were shown as mistakes of the user."""
    process = run(body, door)
    assert process.returncode == 1 and "Traceback" in process.stderr and "error: " not in process.stderr.splitlines()[0]
