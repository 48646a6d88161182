"""A sample of the table of bad inputs, as real commands; bad_inputs.py runs all of it."""

import json

import bad_inputs
import pytest
import torch
from refusing import put

SAMPLE = [
    "two-bad-flags",
    "row-broken",
    "output-not-empty",
    "bin-attack",
    "index-outside",
    "safetensors-cut-off",
    "safetensors-oversized",
    "adapter-of-another-model",
    "good-model-with-bystanders",
]
TABLE = {bad.id: bad for bad in bad_inputs.TABLE}


@pytest.mark.parametrize("name", SAMPLE)
def test_bad_input(name, tmp_path):
    assert bad_inputs.problems_of(TABLE[name], tmp_path) == []


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_an_attack_runs_code_where_it_is_read_without_care(protocol, tmp_path):
    """Read without care, the file makes what the runner looks for."""
    folder = tmp_path / "case-attack" / "here"
    folder.mkdir(parents=True)
    bad_inputs.attack("attack.bin", protocol)(folder)
    path = folder / "attack.bin"
    assert not bad_inputs.marker(folder).exists()
    torch.load(path, weights_only=False) if protocol is None else bad_inputs.pickle.loads(path.read_bytes())
    assert bad_inputs.marker(folder).exists()


def test_what_is_written_is_seen(tmp_path):
    """A command that leaves a file fails the check, as does one that is not refused."""
    bad = bad_inputs.BadInput(
        "writes", "score.py --predictions a.jsonl", "error", put("a.jsonl", '{"prediction": "a"}')
    )
    assert bad_inputs.problems_of(bad, tmp_path / "refused") == []
    good = bad_inputs.BadInput("writes", bad.command, "error", put("a.jsonl", '{"prediction": "a", "output": "a"}'))
    problems = bad_inputs.problems_of(good, tmp_path / "accepted")
    assert problems[0] == "exit code 0, not 2"
    assert "written: a.scores.json" in problems


def test_counts_of_the_runner(tmp_path, capsys):
    assert bad_inputs.main(["--only", "^(two|seven)-bad-flags$", "--json", str(tmp_path / "counts.json")]) == 0
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts == {"total": 2, "as_documented": 2, "failed": [], "seconds": counts["seconds"]}
    assert "2 of 2 as documented" in capsys.readouterr().out
