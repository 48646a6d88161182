"""The figures of a comparison: means over seeds, intervals, differences, what was forgotten."""

import json
from pathlib import Path

import pytest
from comparing import RESULTS, ROWS, FakeCommands, entry

import compare
from comparison import figures
from comparison import methods as comparison_methods
from evaluation import metrics
from evaluation.intervals import difference, intervals
from evaluation.tasks import find_task
from reports import text as report_text


def test_one_row_gives_no_interval():
    rows = metrics.score_rows([["a_b_c"], [""]], ["a_b_c", "a_b_c"], "extraction")["rows"]
    one, other = ({"runs": [{"status": "done", "rows": [row]}]} for row in rows)
    for summary in (one, other):
        figures.add_means(summary, find_task("extraction"))
    assert one["intervals"]["f1"] is None and figures.compared(one, other, "f1") == [100, None, None]


def test_differences_are_those_of_the_scores(workdir):
    """With one seed, the interval is that of score.py; with several, runs that are alike change nothing."""
    compare.main(["c.yaml"], run_words=FakeCommands())
    results = json.loads(Path("output/compare-c/report/results.json").read_text())
    rows = {}
    for name in ("all", "lora,learning_rate=0.003"):
        path = f"output/compare-c/runs/{name}/seed-1/predictions.jsonl"
        rows[name] = figures.scored(path, 0, "extraction", True)[0]
    expected = difference(rows["lora,learning_rate=0.003"], rows["all"], "f1")
    found = next(entry for entry in results["methods"] if entry["name"] == "all")["to_best"]
    assert found == pytest.approx(list(expected))


def test_seeds_are_averaged_within_each_resample():
    """One seed is right where the other is wrong: the mean is 50 whatever rows are drawn, and no row counts twice."""
    rows = [[metrics.score_rows([row["output"] if n % 2 == k else ""], [row["output"]], "extraction")["rows"][0]
             for n, row in enumerate(ROWS)] for k in (0, 1)]  # fmt: skip
    both = {"runs": [{"status": "done", "rows": part} for part in rows]}
    one = {"runs": both["runs"][:1]}
    for method in (both, one):
        figures.add_means(method, find_task("extraction"))
    assert both["metrics"]["f1"] == 50 and both["intervals"]["f1"] == pytest.approx([50, 50]) and both["spread"] == 0
    assert one["intervals"]["f1"] == intervals(rows[0], ["f1"])["f1"] and one["spread"] is None
    change = figures.compared(both, one, "f1")
    assert change[0] == 0 and change[1] < -10 and change[2] > 10


def test_the_best_weights_are_compared(tmp_path):
    """best/ where the training chose one by held-out rows; a folder that is no checkpoint does not count."""
    for name in ("epoch-1-step-9", "epoch-2-step-18", "best"):
        (tmp_path / name).mkdir()
    for name in ("epoch-1-step-9", "epoch-2-step-18"):
        (tmp_path / name / "run.json").write_text("{}")
    assert comparison_methods.checkpoint_of(str(tmp_path)) == str(tmp_path / "epoch-2-step-18")
    (tmp_path / "best" / "run.json").write_text("{}")
    assert comparison_methods.checkpoint_of(str(tmp_path)) == str(tmp_path / "best")


def test_how_far_seeds_differ():
    """Kind: a figure that is 0 or null wherever it is looked at. The sample's deviation: 10, 20, 60 have 26.46."""
    reference = [row["output"] for row in ROWS[:10]]
    runs = []
    for right in (1, 2, 6):
        answers = reference[:right] + [""] * (10 - right)
        rows = metrics.score_rows(answers, reference, "extraction")["rows"]
        runs.append({"status": "done", "rows": rows, "done": {"seconds": right}, "checkpoint_bytes": 3 * right})
    found = {"runs": runs}
    figures.add_means(found, find_task("extraction"))
    assert found["metrics"]["f1"] == pytest.approx(30) and found["spread"] == pytest.approx(700**0.5)
    assert [run["metrics"]["f1"] for run in runs] == pytest.approx([10, 20, 60])
    assert (found["seconds"], found["checkpoint_bytes"], found["num_rows"]) == (3, 9, 10)
    assert found["tokens_per_second"] is None and found["forgetting"] == {"loss": None, "score": None}
    low, high = found["intervals"]["f1"]
    assert low < 30 < high
    two = {"runs": [{**run, "rows": run["rows"][:2]} for run in runs]}
    figures.add_means(two, find_task("extraction"))
    assert two["intervals"]["f1"] == [pytest.approx(2 * 100 / 3), 100], "right, half right, right: two rows have ends"
    one = {"runs": runs[:1]}
    figures.add_means(one, find_task("extraction"))
    assert one["spread"] is None
    unfinished = {"runs": [runs[0], {"status": "failed with exit code 3"}]}
    figures.add_means(unfinished, find_task("extraction"))
    assert unfinished["status"] == "failed with exit code 3" and "metrics" not in unfinished


@pytest.mark.parametrize(
    "change, is_forgotten",
    [([0.4, 0.3, 0.5], True), ([-0.4, -0.5, -0.3], False), ([0.4, -0.1, 0.9], False), (None, False)],
)
def test_what_is_called_forgetting(change, is_forgotten):
    """A loss on general questions that rose by more than the noise; one that fell is none."""
    methods = [entry("m", 50.0, to_best=None, forgetting={"loss": change, "score": None})]
    text = " ".join(report_text.verdict_lines({**RESULTS, "methods": methods}))
    assert ("Forgetting: the loss on general questions rose by more than the noise with m." in text) == is_forgotten
