"""The table of tasks, its metrics against second computations, and the intervals: what they cover and compare."""

import importlib.util
import json
import random
import re
from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import load_script
from reference import ROOT

import score
from evaluation import intervals, metrics, row_scores, score_report
from evaluation.tasks import LABELS, NO_TASK, TASKS, find_task
from flags import score as flags_score
from flags.score import score_parser
from flags.train import BEST_METRICS
from reports import tables

# A prediction that is right and one that is wrong, with the reference.
EXAMPLES = {
    "extraction": ("水泵_部件故障_漏水", "水泵_部件故障_卡滞", "水泵_部件故障_漏水"),
    "generation": ("这款上衣版型宽松", "天气", "这款上衣版型宽松"),
    "classification": ("制动组。", "转向组", "制动组"),
    "summary": ("水泵漏水，已经更换", "天气", "水泵漏水，已经更换"),
    "questions": (["水泵在哪里？", "怎样更换水泵？"], ["水泵在哪里？", "水泵在哪里"], "水泵在哪里？"),
}
BEST = {"questions": row_scores.QUESTION_POINTS}  # of the primary metric; elsewhere 100


def write_lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", TASKS)
def test_task_is_finished(name):
    task, (right, wrong, reference) = TASKS[name], EXAMPLES[name]
    assert task.name == name and task.primary in task.metrics and len(set(task.metrics)) == len(task.metrics)
    best, worse = (metrics.score_rows([answer], [reference], name) for answer in (right, wrong))
    assert list(best) == [*task.metrics, "rows"]
    assert best[task.primary] == pytest.approx(BEST.get(name, 100)) and worse[task.primary] < best[task.primary]
    assert metrics.metrics_of(best["rows"], name) == {metric: best[metric] for metric in task.metrics}
    for text in metrics.definitions(task.metrics).values():
        assert text.endswith(".") and "{" not in text
    assert len(task.missing) == 2 and all(len(text) > 15 for text in task.missing)


def test_every_metric_is_in_a_task_and_offered_where_it_says():
    in_tasks = {name for task in TASKS.values() for name in task.metrics}
    assert in_tasks == set(metrics.METRICS)
    assert BEST_METRICS == ("loss", "rougeL", "bleu4", "f1", "accuracy")
    shown = [name for name, metric in metrics.METRICS.items() if metric.is_shown]
    assert sorted(shown) == sorted("rougeL bleu4 f1 accuracy macro_f1 diversity exact_match".split())
    assert set(NO_TASK.metrics) < in_tasks and NO_TASK.primary in NO_TASK.metrics
    assert next(action for action in score_parser()._actions if action.dest == "task").choices is TASKS


def test_no_module_asks_for_a_task_by_name():
    for path in ROOT.glob("*.py"):
        assert not re.search(r"task(\.name)? (==|in) ?[\"'(\[]", path.read_text(encoding="utf-8")), path


def test_an_unknown_task_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="'summaries': is none of extraction, "):
        find_task("summaries")
    path = write_lines(tmp_path / "p.jsonl", {"prediction": "a", "output": "a"})
    with pytest.raises(SystemExit) as stopped:
        score.main(["--predictions", path, "--task", "summaries"])
    assert stopped.value.code == 2 and "--task: invalid choice: 'summaries'" in capsys.readouterr().err


# ---------------------------------------------------------------- labels

LABEL_TEXTS = ["甲", "乙", "丙", "丁", "不知道", "", " 甲。\n", "乙 .", "甲乙"]


def plain_macro_f1(predictions, references):
    """Label by label, as it stands in a textbook."""
    values = []
    for label in sorted(set(references)):
        right = sum(p == r == label for p, r in zip(predictions, references))
        if not right:
            values.append(0.0)
            continue
        precision = right / predictions.count(label)
        recall = right / references.count(label)
        values.append(2 * precision * recall / (precision + recall))
    return 100 * sum(values) / len(values)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABEL_TEXTS), st.sampled_from("甲乙丙")), min_size=1, max_size=30))
def test_accuracy_and_macro_f1_are_those_of_a_second_computation(pairs):
    predictions, references = map(list, zip(*pairs))
    result = metrics.score_rows(predictions, references, "classification")
    cleaned = [text.strip(" \n。.") for text in predictions]
    assert result["accuracy"] == pytest.approx(100 * sum(p == r for p, r in zip(cleaned, references)) / len(pairs))
    assert result["macro_f1"] == pytest.approx(plain_macro_f1(cleaned, references))
    if importlib.util.find_spec("sklearn"):
        from sklearn.metrics import f1_score

        labels = sorted(set(references))
        value = f1_score(references, cleaned, labels=labels, average="macro", zero_division=0)
        assert result["macro_f1"] == pytest.approx(100 * value)

    confusion = metrics.confusion_of(result["rows"])
    assert set(confusion["labels"]) == set(references)
    found = Counter({(r, p): n for r, row in confusion["counts"].items() for p, n in row.items()})
    other = Counter(r for r, p in zip(references, cleaned) if p not in references)
    assert found == Counter((r, p) for p, r in zip(cleaned, references) if p in references)
    assert confusion["other"] == other and found.total() + other.total() == len(pairs)


def test_macro_f1_by_hand():
    # 甲: 1 right of 2 predicted and 2 in references; 乙: 1 right of 1 and 2; 丙 is in no reference; 丁: never right.
    result = metrics.score_rows(["甲", "丙", "甲", "乙", "？"], ["甲", "甲", "乙", "乙", "丁"], "classification")
    assert result["accuracy"] == 40
    assert result["macro_f1"] == pytest.approx(100 * (2 / 4 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(
    "prediction, reference, right",
    [
        ("制动组", "制动组", True),
        (" 制动组\n", "制动组。", True),
        ("制动组。 ", "制动组", True),
        ("brakes..", "brakes", True),
        ("制动组．", "制动组", True),
        ("制动组．。 .", "制动组", True),
        ("Brakes", "brakes", False),
        ("制动组！", "制动组", False),
        ("答案：制动组", "制动组", False),
        ("制动组\n因为刹车软", "制动组", False),
        ("", "制动组", False),
        ("", "", False),
        ("。", "", False),
    ],
)
def test_a_label_is_the_text_without_white_space_and_full_stops(prediction, reference, right):
    result = metrics.score_rows([prediction, "好"], [reference, "好"], "classification")
    assert [row["accuracy"] for row in result["rows"]] == [100 * right, 100]
    hits = metrics.sums_of(metrics.score_arrays(result["rows"]))["label_hits"].sum()
    assert hits == 1 + right  # the table of labels and the accuracy are of one mind


def test_the_confusion_table_is_aligned_and_cut(tmp_path, capsys):
    references = ["制动组"] * 3 + ["a", "很长很长很长很长的名称\n"] + ["转向组"] * 2
    predictions = ["制动组", "制动组", "x", "a", "很长很长很长很长的名称", "制动组", "转向组"]
    rows = [{"prediction": p, "output": r} for p, r in zip(predictions, references)]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    assert score.main(["--predictions", path, "--task", "classification"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1] == "task: classification; primary metric: accuracy"
    table = out[out.index("confusion, rows\n") :].splitlines()[1:]
    assert [line.split() for line in table] == [
        ["reference", "\\", "prediction", "制动组", "转向组", "a", "很长很长很长...", "other"],
        ["制动组", "2", "0", "0", "0", "1"],
        ["转向组", "1", "1", "0", "0", "0"],
        ["a", "0", "0", "1", "0", "0"],
        ["很长很长很长...", "0", "0", "0", "1", "0"],
    ]
    ends = [tables.display_width(line[: line.rindex(" ")]) for line in table]
    assert len(set(ends)) == 1  # the last column begins at one place of the terminal
    report = json.loads((tmp_path / "p.classification.scores.json").read_text(encoding="utf-8"))
    assert report["confusion"]["counts"]["制动组"] == {"制动组": 2} and report["confusion"]["other"] == {"制动组": 1}
    assert list(report["metrics"]) == list(report["definitions"]) == list(report["intervals"]) == list(LABELS)

    many = [{"prediction": "a", "output": f"label {number}"} for number in range(score_report.MAX_LABELS + 1)]
    assert score.main(["--predictions", write_lines(tmp_path / "q.jsonl", *many), "--task", "classification"]) == 0
    assert capsys.readouterr().out.endswith(f"confusion of {score_report.MAX_LABELS + 1} labels: see the JSON file\n")


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize(
    "questions, num_repeated, num_empty, num_overlong",
    [
        (["水泵在哪里？", "怎样更换水泵？", "水泵多少钱？"], 0, 0, 0),
        (["水泵在哪里？", "水泵在哪里?", " 水泵，在哪里"], 2, 0, 0),  # each repetition is a fault, the first is none
        (["红枣最突出的特点是什么？", "红枣最突出特点是什么？"], 1, 0, 0),
        (["冲服具有什么优点？", "冲服具有什么缺点？"], 0, 0, 0),  # one character can ask for something else
        (["", " \n", "？？", "水泵在哪里？"], 0, 3, 0),
        (["问" * 64 + "？", "水" * 65, "水泵" * 40, "水泵" * 40], 1, 0, 4),
        (["a"] * 40, 39, 0, 0),
        ([""], 0, 1, 0),
    ],
)
def test_faults_of_questions_by_hand(questions, num_repeated, num_empty, num_overlong):
    row = row_scores.score_questions(questions)
    assert [row[f"num_{name}"] for name in ("repeated", "empty", "overlong")] == [num_repeated, num_empty, num_overlong]
    assert row["diversity"] == max(0, 5 - 0.25 * (num_repeated + num_empty + num_overlong))


def test_shares_of_faults_are_of_all_questions():
    predictions = [["甲是什么？", "甲是什么？", "", "乙是什么？" * 20], ["丙在哪里？"]]
    result = metrics.score_rows(predictions, ["", ""], "questions")
    shares = {"repeated_questions": 20, "empty_questions": 20, "overlong_questions": 20}
    assert {name: result[name] for name in TASKS["questions"].metrics} == {"diversity": (4.25 + 5) / 2, **shares}
    assert metrics.score_rows([["甲"], ["乙"]], ["", ""], "questions")["diversity"] is None


def test_questions_about_different_facts_are_no_near_duplicates():
    words = load_script("data_words")
    for kind in words.DOCUMENT_KINDS:
        slots = {name: options[0] for name, options in kind.items() if name not in ("texts", "questions")}
        questions = [question.format(**slots) for question in kind["questions"]]
        assert row_scores.score_questions(questions)["diversity"] == 5, questions


def test_all_answers_of_a_row_count_as_questions(tmp_path, capsys):
    rows = [{"predictions": ["甲是什么？", "甲是什么", "乙呢？"], "output": ""}] * 2
    path = write_lines(tmp_path / "p.jsonl", *rows)
    assert score.main(["--predictions", path, "--task", "questions"]) == 0
    out = capsys.readouterr().out
    assert "not scored" not in out and "\ndiversity" in out
    report = json.loads((tmp_path / "p.questions.scores.json").read_text(encoding="utf-8"))
    assert report["empty_references"] == []  # nothing is compared with them
    assert report["metrics"]["diversity"] == 4.75 and "judge.py --task questions" in report["definitions"]["diversity"]


# ---------------------------------------------------------------- intervals


def plain_rows(**columns):
    """Rows as score_rows gives them, from lists of their numbers."""
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def mixed_rows(generator, num_rows):
    """Scored rows with and without triples, and with labels."""
    triples = ["a_b_c", "d_e_f", "g_h_i", "没有"]
    pairs = [["\n".join(generator.sample(triples, 2)) for _ in range(2)] for _ in range(num_rows)]
    found = []
    for prediction, reference in pairs:
        row = row_scores.score_triples(prediction, reference) | {"exact_match": 100.0 * (prediction == reference)}
        found.append(row | row_scores.score_label(generator.choice("甲乙丙丁"), generator.choice("甲甲乙丙")))
    return found


@pytest.mark.parametrize("num_rows", [2, 3, 40])
def test_resampling_by_counts_is_scoring_the_drawn_rows(num_rows, monkeypatch):
    names = ("precision", "recall", "f1", "precision_micro", "recall_micro", "f1_micro", "exact_match", *LABELS)
    rows = mixed_rows(random.Random(num_rows), num_rows)
    found = intervals.resampled(rows, names, 50, seed=3)
    drawn = numpy.random.default_rng(3).integers(num_rows, size=(50, num_rows))
    for number, places in enumerate(drawn):
        chosen = [rows[place] for place in places]
        expected = metrics.metrics_of(chosen, "extraction") | metrics.metrics_of(chosen, "classification")
        for name in names:
            value = found[name][number]
            assert expected[name] == (None if numpy.isnan(value) else pytest.approx(value, abs=1e-9)), name
    monkeypatch.setattr(intervals, "MAX_CELLS", 7 * num_rows)
    again = intervals.resampled(rows, names, 50, seed=3)  # in blocks
    assert all(numpy.allclose(found[name], again[name], atol=1e-9, equal_nan=True) for name in names)


def test_intervals_are_the_same_in_every_run_and_turn_on_the_seed():
    rows = mixed_rows(random.Random(1), 30)
    first = intervals.intervals(rows, LABELS, 200)
    assert first == intervals.intervals(rows, LABELS, 200)
    assert first != intervals.intervals(rows, LABELS, 200, seed=1)
    for name, (low, high) in first.items():
        assert 0 <= low < metrics.metrics_of(rows, "classification")[name] < high <= 100


def drawn_sets(num_sets=300, num_rows=60):
    """Sets of rows from distributions whose true values are known."""
    rng = numpy.random.default_rng(0)
    for _ in range(num_sets):
        label = rng.integers(3, size=num_rows)
        # Right with 80 per cent, else one of the two others: then precision, recall and F1 of each label are 80.
        predicted = (label + (rng.random(num_rows) > 0.8) * rng.integers(1, 3, size=num_rows)) % 3
        matched, counts = rng.binomial(3, 0.6, size=num_rows), [3] * num_rows
        yield plain_rows(
            exact_match=100.0 * (rng.random(num_rows) < 0.7),
            rougeL=100.0 * rng.beta(2, 1, size=num_rows),
            num_matched=matched,
            num_predicted=counts,
            num_reference=counts,
            label=map(str, label),
            predicted_label=map(str, predicted),
            accuracy=100.0 * (label == predicted),
        )


def test_intervals_cover_the_true_value_as_often_as_they_say():
    truth = {"exact_match": 70, "rougeL": 200 / 3, "f1_micro": 60, "macro_f1": 80, "accuracy": 80}
    covered = Counter()
    for rows in drawn_sets():
        for name, (low, high) in intervals.intervals(rows, truth).items():
            covered[name] += low <= truth[name] <= high
    print({name: f"{100 * number / 300:.1f} %" for name, number in covered.items()})
    assert all(0.90 * 300 <= covered[name] <= 0.99 * 300 for name in truth), covered


def width(ends):
    return ends[-1] - ends[-2]


def test_the_paired_difference_is_narrower_than_the_unpaired():
    rng = numpy.random.default_rng(5)
    hard = rng.beta(1, 1, size=100) * 80  # rows differ much, and alike for both
    rows_a, rows_b = (plain_rows(rougeL=hard + gain + rng.normal(0, 3, size=100)) for gain in (8, 11))
    value, low, high = intervals.difference(rows_a, rows_b, "rougeL")
    assert 0 < low < value < high and value == pytest.approx(3, abs=1)
    single = [intervals.intervals(rows, ("rougeL",))["rougeL"] for rows in (rows_a, rows_b)]
    assert width((low, high)) < 0.3 * numpy.hypot(*map(width, single))
    assert single[0][1] > single[1][0]  # the two intervals overlap, the difference is beyond the noise all the same
    assert intervals.difference(rows_b, rows_a, "rougeL") == pytest.approx((-value, -high, -low))


def test_a_difference_that_is_none_is_inside_the_noise_as_often_as_it_says():
    rng = numpy.random.default_rng(6)
    inside = 0
    for _ in range(200):
        rows = [plain_rows(exact_match=100.0 * (rng.random(60) < 0.7)) for _ in range(2)]
        _, low, high = intervals.difference(*rows, "exact_match", 400)
        inside += low <= 0 <= high
    assert 0.90 * 200 <= inside <= 0.99 * 200, inside


def test_the_texts_of_a_row_are_folded_unless_told_otherwise():
    """`（` and `(` are one character after NFKC."""
    for flags, value in (({}, 100.0), ({"normalize": True}, 100.0), ({"normalize": False}, 0.0)):
        assert metrics.score_row(["（a"], "(a", ("exact_match",), **flags) == {"exact_match": value}


def test_no_rows_one_row_and_equal_rows():
    row = metrics.score_row(["a_b_c"], "a_b_c\nd_e_f", ("f1", "f1_micro"))
    names = ("f1", "f1_micro")
    assert metrics.metrics_of([]) == dict.fromkeys(NO_TASK.metrics)
    for rows in ([], [row]):
        assert intervals.intervals(rows, names) == {"f1": None, "f1_micro": None}
    assert intervals.difference([], [], "f1") == (None, None, None)
    assert intervals.difference([row], [row], "f1") == (0, None, None)
    assert intervals.intervals([row] * 9, names) == {name: pytest.approx([200 / 3] * 2) for name in names}
    assert intervals.difference([row] * 9, [row] * 9, "f1") == (0, 0, 0)
    assert intervals.intervals([row] * 9, names, num_resamples=0) == {"f1": None, "f1_micro": None}
    assert intervals.difference([row] * 9, [row] * 9, "f1", num_resamples=0) == (0, None, None)
    with pytest.raises(ValueError, match="9 and 8"):
        intervals.difference([row] * 9, [row] * 8, "f1")


def test_a_metric_without_a_value_has_no_interval():
    rows = metrics.score_rows(["好", "不", "没有"], ["好", "不好", "有"], "extraction")["rows"]
    assert intervals.intervals(rows, ("f1", "exact_match"))["f1"] is None
    assert intervals.difference(rows, rows, "f1") == (None, None, None)
    one = rows + metrics.score_rows(["a_b_c"], ["a_b_c"], "extraction")["rows"]  # in some resamples it has one
    assert intervals.intervals(one, ("f1",))["f1"] == [100, 100]


# ---------------------------------------------------------------- the command


def test_files_over_the_same_rows_are_compared_with_the_first(tmp_path, capsys):
    answers = {"a": ["好"] * 40 + ["不"] * 20, "b": ["好"] * 57 + ["不"] * 3, "c": ["好"] * 41 + ["不"] * 19}
    paths = {}
    for name, texts in answers.items():
        paths[name] = write_lines(tmp_path / f"{name}.jsonl", *({"prediction": t, "output": "好"} for t in texts))
    paths["d"] = write_lines(tmp_path / "d.jsonl", *({"prediction": "好", "output": "不"} for _ in range(60)))
    command = ["--predictions", *paths.values(), paths["a"], "--task", "classification"]
    assert score.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("difference to [1], row by row")
    assert lines[start + 1].split() == ["metric", "[2]", "[3]"]
    row = lines[start + 2]
    assert row.startswith("accuracy  +28.33 [+") and row.count("inside the noise") == 1
    assert re.search(r"\+1\.67 \[\+0\.00, \+\d\.\d\d\] inside the noise$", row), row
    assert "[4]: its references are not those of [1], so there is no difference" in lines

    reports = {
        name: json.loads(flags_score.scores_path(path, "classification").read_text()) for name, path in paths.items()
    }
    rows = {name: metrics.score_rows(texts, ["好"] * 60, "classification")["rows"] for name, texts in answers.items()}
    for name, inside_noise in (("b", False), ("c", True)):
        found = reports[name]["difference"]
        value, low, high = intervals.difference(rows["a"], rows[name], "accuracy")
        assert found["to"] == paths["a"]
        assert found["metrics"]["accuracy"] == {"value": value, "interval": [low, high], "inside_noise": inside_noise}
    assert "difference" not in reports["a"] and reports["d"]["difference"] is None

    assert score.main([*command, "--bootstrap", "0", "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert "\naccuracy  +28.33   +1.67\n" in out and "noise" not in out and "in brackets" not in out


REFUSED = {
    "too few resamples": (["--bootstrap", "99"], "--bootstrap: 99: is too few for the ends of a 95 % interval: use at"),
    "negative": (["--bootstrap=-1"], "--bootstrap: -1: is too few for the ends of a 95 % interval: use at least 100"),
    "no triples": (["--task", "extraction"], "--task: extraction: {file}: no reference has a triple, a line such as"),
    "one question": (["--task", "questions"], "--task: questions: {file}: every row has one answer, and one question"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_scored_is_refused(arguments, message, tmp_path, capsys):
    path = write_lines(tmp_path / "p.jsonl", {"prediction": "好", "output": "好"})
    with pytest.raises(SystemExit) as stopped:
        score.main(["--predictions", path, *arguments])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("score.py: error: " + message.replace("{file}", path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.jsonl"]


def test_macro_f1_of_resamples_without_a_label():
    """Every prediction is right, so every resample has 100: the labels that it lacks count in no way."""
    labels = list("甲乙丙丁戊")
    rows = metrics.score_rows(labels, labels, "classification")["rows"]
    found = intervals.resampled(rows, LABELS, 200, seed=3)
    assert found["macro_f1"].tolist() == found["accuracy"].tolist() == [100] * 200
    # 甲 twice and both right, 乙 once and wrong (its prediction is 甲), 丙 not drawn: (2 x 2 / (2 + 3) + 0) / 2
    rows = metrics.score_rows(["甲", "甲", "丙"], ["甲", "乙", "丙"], "classification")["rows"]
    sums = metrics.sums_of(metrics.score_arrays(rows), numpy.array([[2.0, 1, 0], [1, 1, 1], [0, 0, 3]]))
    assert metrics.macro_f1(sums).tolist() == pytest.approx([100 * 0.8 / 2, 100 * (2 / 3 + 0 + 1) / 3, 100])


def test_a_percentile_by_hand():
    """The middle 95 % of 0 to 200 is 5 to 195; what has no value does not count."""
    values = numpy.array([float("nan"), *range(201)])
    assert intervals.middle(values) == [5, 195] and intervals.middle(values[:1]) is None
    assert intervals.weighted_mean([1, 2, 6], [1, 1, 2])[0] == 15 / 4
    assert intervals.weighted_mean([3.5])[1:] == [None, None]
    low, high = intervals.weighted_mean([0, 10] * 200, num_resamples=2000)[1:]
    assert low == pytest.approx(5 - 0.49, abs=0.06) and high == pytest.approx(5 + 0.49, abs=0.06)  # 1.96 x 5 / 20


@pytest.mark.parametrize(
    "first, second, is_one",
    [
        ("一二三四五六七八九十", "一二三四五六七八九甲", True),  # 2 x 9 / 20 is 0.9, which is enough
        ("一二三四五六七八九十", "一二三四五六七八甲乙", False),
        ("一二三四五六七八九", "一二三四五六七八九十子", True),  # 18 / 20, though one is longer
        ("一二三四五六七八九", "一二三四五六七八九十子丑", False),
        ("一二三四五六七八甲", "一二三四五六七八九十子", False),
    ],
)
def test_the_overlap_from_which_two_questions_are_one(first, second, is_one):
    for pair in ((first, second), (second, first)):
        assert row_scores.is_near_duplicate(*map(list, pair)) == is_one
        assert row_scores.score_questions(list(pair))["num_repeated"] == is_one


@pytest.mark.parametrize("length, is_long", [(64, False), (65, True)])
def test_the_length_from_which_a_question_is_overlong(length, is_long):
    assert row_scores.score_questions([" " + "问" * length + "\n"])["num_overlong"] == is_long


def test_the_empty_label_is_no_label():
    """A prediction that is empty is another word even where a reference is empty: it is never right."""
    result = metrics.score_rows(["", "。", "甲", "", "乙"], ["", "甲", "", "甲", "乙"], "classification")
    table = metrics.confusion_of(result["rows"])
    assert table == {
        "labels": ["", "甲", "乙"],
        "counts": {"": {"甲": 1}, "甲": {}, "乙": {"乙": 1}},
        "other": {"": 1, "甲": 2},
    }
    assert result["accuracy"] == 20 and result["macro_f1"] == pytest.approx(100 / 3)


def test_usual_numbers_of_resamples():
    """A thousand, where nothing is said; two rows are enough for an interval, one is not."""
    rows = mixed_rows(random.Random(4), 12)
    assert intervals.intervals(rows, LABELS) == intervals.intervals(rows, LABELS, 1000, 1234)
    assert intervals.differences(rows, rows[::-1], LABELS) == intervals.differences(rows, rows[::-1], LABELS, 1000)
    assert intervals.weighted_mean([1, 2], num_resamples=200)[1:] == [1, 2]
    assert intervals.intervals(rows[:1], ["f1"]) == {"f1": None} != intervals.intervals(rows[:2], ["accuracy"])


def test_full_stops_of_a_label_that_is_not_folded():
    """With --no_normalize the full-width one is still there."""
    for text in ("制动组．", "制动组。", "制动组.", " 制动组 ．。.\n"):
        assert row_scores.clean_label(text) == "制动组"
    result = metrics.score_rows(["制动组．"], ["制动组"], "classification", normalize=False)
    assert result["accuracy"] == 100


def test_two_or_more_questions_are_several():
    for number in (1, 2, 3):
        row = row_scores.score_questions([f"第{n}个部件在哪里" for n in "一二三"[:number]])
        assert (row["num_questions"], row["has_several"]) == (number, int(number > 1))
