"""The tests stand as the rooms do: who looks for the tests of a file finds them in the folder of its room."""

import ast

from reference import ROOT

TESTS = ROOT / "tests"
FAMILIES = {"glm1", "glm2", "glm3"}
NOT_ROOMS = {
    "commands": "whole commands, in this process or started",
    "families": "the families, one like the other",
    "faults": "kills, full disks, hostile files; long",
    "golden": "small checkpoints and the numbers that the released code gives with them",
    "helpers": "what tests share",
    "project": "what is about the whole: READMEs, tables, floors",
}
AT_THE_TOP = {"conftest.py", "test_gpu.py"}
COMMANDS = {path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


def imported(name):
    """The first parts of all modules that a test file imports, inside functions too, and those of load_script's."""
    found = set()
    for node in ast.walk(ast.parse((TESTS / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "load_script":
            found.add("scripts")
    return found


def test_every_folder_is_a_room_or_one_of_those_named():
    """Both ways: no room is without tests, and no folder is left of a room that is gone."""
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"scripts", "benchmarks"}
    files = [path.relative_to(TESTS) for path in TESTS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    folders = {path.parts[0] for path in files if len(path.parts) > 1}
    assert folders == rooms - FAMILIES | set(NOT_ROOMS)
    assert {name for name in FILES if "/" not in name} == AT_THE_TOP


def test_a_file_of_a_room_imports_from_it():
    for name in FILES:
        room, *rest = name.split("/")
        if rest and room not in NOT_ROOMS and rest != ["conftest.py"]:
            assert len(rest) == 1 and rest[0].startswith("test_"), f"{name}: what tests share is in tests/helpers"
            assert room in imported(name), f"tests/{name} imports nothing of {room}/: it belongs elsewhere"


def test_a_file_of_commands_runs_one():
    """In this process, in a sandbox of helpers/refusing.py, or through a shell."""
    for name in FILES:
        if name.startswith("commands/"):
            text = (TESTS / name).read_text(encoding="utf-8")
            assert imported(name) & COMMANDS or "(sandbox, " in text or "run_command(" in text, name


def test_helpers_hold_no_tests():
    assert not [name for name in FILES if name.startswith("helpers/test_")]
