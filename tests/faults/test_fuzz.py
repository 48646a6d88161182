"""Files that are nearly right, a few of each kind: taken, or refused in one line; and what watches over the reading."""

import json
import random
import time

import fuzz
import pytest

from runtime.exits import UserError

NUM_EACH = 17


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.torch.set_num_threads(1)
    return folder


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_made_files_are_accepted_or_refused(quiet, name):
    """Everything but success and a UserError is a fault of the reading code."""
    for chosen, content in fuzz.seeds_of(name).items():
        assert fuzz.read_input(name, chosen, content, quiet) == ("accepted", "")
    for number in range(NUM_EACH):
        outcome, text = fuzz.read_input(*fuzz.make_input(name, number, seed=1), quiet)
        assert outcome != "problem", f"{name} {number}: {text}"


def test_the_same_seed_makes_the_same_files():
    made = [[fuzz.make_input(name, 5, seed)[2] for name in fuzz.TARGETS] for seed in (1, 1, 2)]
    assert made[0] == made[1] and made[0] != made[2]


def reading(kind):
    """A reader with a fault."""

    def read(seed, folder):
        if kind == "memory":
            bytearray(400 << 20)
        if kind == "much":
            bytearray(b"x" * (160 << 20))
        if kind == "alarm":
            time.sleep(60)
        if kind == "hang":  # in code that hears no signal: the hash of a tuple is made anew each time
            key = ()
            for _ in range(60):
                key = (key, key)
            hash(key)
        if kind == "end":
            fuzz.os._exit(7)
        if kind == "fault":
            raise KeyError("x")
        if kind == "refused":
            raise UserError("no")

    return read


def test_what_goes_wrong_is_a_problem(monkeypatch, tmp_path):
    """Memory, time and the end of a process are bounded, and what was read then is named and kept."""
    kinds = ("memory", "much", "alarm", "hang", "end", "fault", "refused", "good")
    for kind in kinds:
        target = fuzz.Target("a.json", lambda: {"a": b"{}"}, lambda content, rng: content, reading(kind))
        monkeypatch.setitem(fuzz.TARGETS, kind, target)
    monkeypatch.setattr(fuzz, "warm_up", lambda names: None)
    for name, value in (("SECONDS", 1), ("GRACE", 1), ("MEMORY", 256 << 20)):
        monkeypatch.setattr(fuzz, name, value)
    rows, problems = fuzz.fuzz(2 * len(kinds), 1, kinds, jobs=2, keep=tmp_path)
    assert [row["inputs"] for row in rows] == [2] * len(kinds), "another worker goes on"
    said = {problem.split(" ")[0]: problem for problem in problems}
    assert {row["target"] for row in rows if row["problem"]} == set(kinds[:6]) == said.keys()
    assert "MemoryError" in said["memory"] and "took " in said["much"] and "the process ended (7)" in said["end"]
    assert "not done after 1 s" in said["alarm"] and "hangs for more than 1 s" in said["hang"]
    assert "KeyError: " in said["fault"] and "in read" in said["fault"]
    assert [row["refused"] for row in rows][6:] == [2, 0] and rows[7]["accepted"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {f"{kind}-{n}-a-a.json" for kind in kinds[:6] for n in (0, 1)}


def test_most_made_files_differ_and_many_are_json():
    """Nearly all files differ from the one that they are made from, and many are still JSON."""
    content, rng = json.dumps(fuzz.ADAPTER).encode(), random.Random(1)
    made = [fuzz.json_file(json.loads(content), rng) for _ in range(300)]
    assert len(set(made)) > 250

    def is_json(text):
        try:
            json.loads(text)
            return True
        except (ValueError, RecursionError):
            return False

    assert 150 < sum(map(is_json, made)) < 295
