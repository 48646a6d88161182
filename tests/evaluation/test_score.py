"""Scoring: the values against the libraries themselves, the triples by hand, the command with its files and errors."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jieba
import pytest
from scoring import PAIRS, PREDICTIONS, REFERENCES

import score
from evaluation import metrics
from evaluation import predictions as evaluation_predictions
from evaluation.tasks import find_task
from flags import score as flags_score
from flags.score import score_parser

REPO_ROOT = Path(score.__file__).resolve().parent


def exit_code(arguments):
    """Of a call that is refused."""
    with pytest.raises(SystemExit) as stopped:
        score.main(arguments)
    return stopped.value.code


def write_lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def predictions_path(tmp_path):
    rows = [{"prediction": prediction, "output": reference, "index": 0} for prediction, reference in PAIRS]
    return write_lines(tmp_path / "predictions.jsonl", *rows)


def test_bom_blank_lines_and_other_columns(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        '{"prediction": "甲", "output": "乙", "index": 3}',
        "  ",
        "",
        '{"output": "丁", "prediction": "丙\\r\u2028"}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode("utf-8"))
    assert evaluation_predictions.read_predictions(path) == ([["甲"], ["丙\r\u2028"]], ["乙", "丁"], [1, 4])


def test_several_answers_count_once(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        {"predictions": ["甲", "乙", "丙"], "output": "甲"},
        {"predictions": ["丁"], "output": "丁"},
        {"prediction": "戊", "predictions": ["己"], "output": "戊"},
        {"prediction": ["庚", "辛"], "output": "庚"},
    )
    rows = evaluation_predictions.read_predictions(path)
    assert rows == ([["甲", "乙", "丙"], ["丁"], ["戊"], ["庚", "辛"]], ["甲", "丁", "戊", "庚"], [1, 2, 3, 4])
    assert (rows.predictions, rows.num_extra) == (["甲", "丁", "戊", "庚"], 3)


def test_columns_can_be_named(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"answer": "甲", "label": "乙"}, {"answers": ["丙", "丁"], "label": "丙"})
    assert evaluation_predictions.read_predictions(path, "answer", "label") == (
        [["甲"], ["丙", "丁"]],
        ["乙", "丙"],
        [1, 2],
    )
    assert score.main(["--predictions", path, "--prediction_column", "answer", "--reference_column", "label"]) == 0
    report = json.loads((tmp_path / "p.scores.json").read_text())
    assert (report["prediction_column"], report["reference_column"]) == ("answer", "label")
    assert report["metrics"]["exact_match"] == 50


def test_report_beside_the_predictions(predictions_path, tmp_path, capsys):
    output_path = tmp_path / "predictions.scores.json"
    assert score.main(["--predictions", predictions_path, "--bootstrap", "0"]) == 0
    older = output_path.read_text().replace('"num_resamples": 0', '"num_resamples": 1000')
    output_path.write_text(older)  # of the same settings: it is replaced
    capsys.readouterr()
    assert score.main(["--predictions", predictions_path]) == 0
    report = json.loads(output_path.read_text(encoding="utf-8"))
    result = metrics.score_rows(PREDICTIONS, REFERENCES)
    assert report["metrics"] == {name: result[name] for name in score.METRICS}
    assert (
        list(report["metrics"])
        == list(report["definitions"])
        == [
            *("rouge1", "rouge2", "rougeL", "bleu4", "bleu4_words", "precision", "recall", "f1"),
            *("precision_micro", "recall_micro", "f1_micro", "exact_match"),
        ]
    )
    assert (report["num_rows"], report["empty"], report["files"]) == (len(PAIRS), [], [predictions_path])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.jsonl", "predictions.scores.json"]
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"{predictions_path}: rows: {len(PAIRS)}"
    assert lines[1] == "in brackets: 95 % interval, 1,000 resamples of the rows"
    assert [line.split()[:2] for line in lines[4:]] == [[name, f"{result[name]:.2f}"] for name in score.METRICS]
    assert len({line.index(metrics.METRICS[line.split()[0]].title) for line in lines[4:]}) == 1  # aligned
    for line in lines[4:]:
        low, high = report["intervals"][line.split()[0]]
        assert f" [{low:.1f}, {high:.1f}]  " in line and low <= report["metrics"][line.split()[0]] <= high


def test_without_resamples_the_table_has_the_values_alone(predictions_path, tmp_path, capsys):
    assert score.main(["--predictions", predictions_path, "--bootstrap", "0"]) == 0
    report = json.loads((tmp_path / "predictions.scores.json").read_text(encoding="utf-8"))
    assert report["intervals"] == dict.fromkeys(score.METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["", f"{'metric':15}{'value':>8}  definition"]
    for name, line in zip(score.METRICS, lines[3:], strict=True):
        assert line == f"{name:15}{report['metrics'][name]:8.2f}  {metrics.METRICS[name].title}"


def test_definitions_name_library_and_version():
    definitions = metrics.definitions(metrics.METRICS)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert f"rouge-chinese {importlib.metadata.version('rouge-chinese')}" in definitions[name]
        assert f"jieba {jieba.__version__}" in definitions[name]
    for name in ("bleu4", "bleu4_words"):
        assert f"nltk {importlib.metadata.version('nltk')}" in definitions[name]
    assert not [sentence for sentence in definitions.values() if "{" in sentence or not sentence.endswith(".")]


def test_empty_predictions_and_further_answers_are_reported(tmp_path, capsys):
    empty = [{"prediction": " \n", "output": "好"}] * 23
    first = [{"prediction": "好", "output": "好"}, {"predictions": ["", "x", "y"], "output": "好"}]
    path = write_lines(tmp_path / "p.jsonl", *first, *empty)
    assert score.main(["--predictions", path]) == 0
    report = json.loads((tmp_path / "p.scores.json").read_text())
    assert report["empty"] == list(range(2, 26))
    assert report["num_extra_predictions"] == 2
    assert report["metrics"]["exact_match"] == 4
    assert report["metrics"]["f1"] is None
    out = capsys.readouterr().out
    listed = ", ".join(map(str, range(2, 22)))
    assert f"rows: 25; empty predictions: 24 (line {listed} and 4 more); answers after the first" in out
    assert "not scored: 2\n" in out
    assert "triples" not in out


def test_several_files_side_by_side(tmp_path, capsys):
    with_triples = write_lines(tmp_path / "a.jsonl", {"prediction": "a_b_c", "output": "a_b_c"})
    without = write_lines(tmp_path / "b", {"prediction": "好", "output": "不"})
    assert score.main(["--predictions", with_triples, without]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"[1] {with_triples}: rows: 1", f"[2] {without}: rows: 1"]
    values = {line.split()[0]: line.split()[1:3] for line in lines[4:-2]}
    assert (values["metric"], values["f1"]) == (["[1]", "[2]"], ["100.00", "-"])
    assert values["exact_match"] == ["100.00", "0.00"]
    assert lines[-2:] == ["", "[2]: its references are not those of [1], so there is no difference"]
    reports = [json.loads((tmp_path / name).read_text()) for name in ("a.scores.json", "b.scores.json")]
    assert [report["metrics"]["exact_match"] for report in reports] == [100, 0]
    assert [report["files"] for report in reports] == [[with_triples], [without]]


def test_the_same_file_twice_is_fine(predictions_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other_spelling = f"../{tmp_path.name}/predictions.jsonl"
    arguments = ["--predictions", predictions_path, predictions_path, other_spelling, "--output_path", "all.json"]
    assert score.main(arguments) == 0
    assert "[3]" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "predictions.jsonl"]


def test_a_failed_write_leaves_the_old_report(predictions_path, tmp_path, monkeypatch, capsys):
    output_path = tmp_path / "predictions.scores.json"
    assert score.main(["--predictions", predictions_path]) == 0
    older = output_path.read_text()
    capsys.readouterr()

    def refuse(source, target):
        assert json.loads(Path(source).read_text())["num_rows"] == len(PAIRS)  # complete before it is moved
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert exit_code(["--predictions", predictions_path]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert output_path.read_text() == older
    assert len(list(tmp_path.iterdir())) == 2


FOLDED = {  # task: (prediction, reference) that differ by what ChatGLM-6B's tokenizer folds
    None: ("发动机组(汽油)...第1组", "发动机组（汽油）…第①组"),
    "extraction": ("发动机组(汽油)_部件故障_漏油", "发动机组（汽油）_部件故障_漏油"),
    "classification": ("底盘(前部)", "底盘（前部）。"),
    "summary": ("水泵漏水,已经更换:10kg", "水泵漏水，已经更换：１０㎏"),
}


@pytest.mark.parametrize("task", FOLDED)
def test_texts_are_compared_folded_on_both_sides(task):
    """Kind: a perfect model whose tokenizer folds marks scored 0; every metric that compares texts folds both sides."""
    prediction, reference = FOLDED[task]
    for pair in ((prediction, reference), (reference, prediction)):
        folded, plain = (metrics.score_rows([pair[0]], [pair[1]], task, normalize=on) for on in (True, False))
        for name in find_task(task).metrics:
            assert folded[name] in (None, pytest.approx(100, abs=1e-5)), name
            assert folded[name] is None or plain[name] < 90, name


def test_the_folding_is_said_beside_the_numbers_and_can_be_switched_off(tmp_path, capsys):
    prediction, reference = FOLDED["extraction"]
    path = write_lines(tmp_path / "p.jsonl", {"prediction": prediction, "output": reference})
    reports = []
    for more in ([], ["--no_normalize", "--output_path", str(tmp_path / "plain.json")]):
        assert score.main(["--predictions", path, "--task", "extraction", *more]) == 0
        reports.append(json.loads(Path(more[-1] if more else flags_score.scores_path(path, "extraction")).read_text()))
    assert [report["metrics"]["f1"] for report in reports] == [100, 0]
    assert [report["normalize"] for report in reports] == [True, False]
    assert all("NFKC" in text and "① 1" in text for text in reports[0]["definitions"].values())
    assert all(text.endswith("(--no_normalize): （ and ( differ.") for text in reports[1]["definitions"].values())
    assert capsys.readouterr().out.count("texts are compared as they are") == 1


def test_empty_references_are_said(tmp_path, capsys):
    """Kind: a score of 0 that says nothing of the model, because there is nothing to compare with."""
    rows = [
        {"prediction": "好", "output": "好"},
        {"prediction": "好", "output": ""},
        {"prediction": "", "output": " \n"},
    ]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    assert score.main(["--predictions", path]) == 0
    line = f"{path}: rows: 3; empty predictions: 1 (line 3); empty references, which count as 0: 2 (line 2, 3)"
    assert capsys.readouterr().out.splitlines()[0] == line
    assert json.loads((tmp_path / "p.scores.json").read_text())["empty_references"] == [2, 3]
    empty = write_lines(tmp_path / "q.jsonl", *rows[1:])
    for task in ([], ["--task", "classification"]):
        assert exit_code(["--predictions", empty, *task]) == 2
        rule = 'q.jsonl: "output": is empty in all 2 rows, so every answer would count as 0: name the column'
        assert rule in capsys.readouterr().err
    assert not (tmp_path / "q.scores.json").exists()


def test_scores_of_other_settings_are_not_overwritten(tmp_path, capsys):
    """Kind: an output that another command, or other settings, wrote is replaced without a word."""
    path = write_lines(tmp_path / "p.jsonl", {"prediction": "a_b_c", "output": "a_b_c"})
    other = write_lines(tmp_path / "q.jsonl", {"prediction": "a_b_c", "output": "a_b_c"})
    assert score.main(["--predictions", path]) == 0 and score.main(["--predictions", path, "--task", "extraction"]) == 0
    assert {p.name for p in tmp_path.glob("p.*.json")} == {"p.scores.json", "p.extraction.scores.json"}
    scores = tmp_path / "p.scores.json"
    (tmp_path / "rows.json").write_text("[1]")
    (tmp_path / "p.json").write_text(Path(path).read_text())
    for arguments, says in (
        ([path, "--bootstrap", "0"], "--bootstrap was 1000, now it is 0"),
        ([path, "--no_normalize"], "--no_normalize was false, now it is true"),
        ([path, "--task", "summary", "--output_path", str(scores)], '--task was null, now it is "summary"'),
        ([path, "--reference_column", "prediction", "--prediction_column", "output"], "--prediction_column was"),
        ([other, "--output_path", str(scores)], f"p.scores.json: holds the scores of {path}"),
        ([str(tmp_path / "p.json")], f"p.scores.json: holds the scores of {path}"),
        ([path, "--output_path", str(tmp_path / "rows.json")], "rows.json: exists and holds no scores: add"),
    ):
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        assert exit_code(["--predictions", *arguments]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        assert score.main(["--predictions", *arguments, "--overwrite"]) == 0
        for file, content in before.items():
            file.write_bytes(content)
    # A report of before there was a folding was not folded.
    report = json.loads(scores.read_text())
    report.pop("normalize")
    scores.write_text(json.dumps(report))
    assert exit_code(["--predictions", path]) == 2 and "--no_normalize was true" in capsys.readouterr().err


GOOD = '{"prediction": "a", "output": "b"}\n'
BAD_FILES = {
    "empty file": ("", "{file}: no rows: there is nothing to score: write one JSON object on each line"),
    "blank lines only": ("\n \n", "{file}: no rows: there is nothing to score: write one JSON object on each line"),
    "broken JSON": (
        GOOD + '{"prediction": "a\n',
        '{file}:2: "{\\"prediction\\": \\"a": not JSON (Unterminated string starting at: line 1 column 16 (char 15)): '
        "write one JSON object on each line",
    ),
    "too deep": ("[" * 100_000 + "\n", '{file}:1: "' + "[" * 59 + "...: not JSON (maximum recursion depth exceeded"),
    "too long a number": ("9" * 5000 + "\n", '{file}:1: "' + "9" * 59 + "...: not JSON (Exceeds the limit"),
    "not UTF-8": ((GOOD + "\n").encode() + b'{"prediction": "\xb0\xa1"}', "{file}:3: byte 0xb0: not UTF-8: save"),
    "list row": (GOOD + "[1]\n", "{file}:2: a list: each row must be a JSON object: write one JSON object on each"),
    "string row": ('"text"\n', '{file}:1: the string "text": each row must be a JSON object'),
    "null row": ("null\n", "{file}:1: null: each row must be a JSON object"),
    "no prediction": (
        GOOD + '{"text": "a", "output": "b"}\n',
        '{file}:2: ["text", "output"]: has no column "prediction": name the column with --prediction_column',
    ),
    "no reference": (
        '{"prediction": "a"}\n',
        '{file}:1: ["prediction"]: has no column "output": name the column with --reference_column',
    ),
    "empty row": ("{}\n", '{file}:1: no columns: has no column "prediction"'),
    "number": (
        '{"prediction": 1.5, "output": "b"}\n',
        '{file}:1: "prediction" is 1.5: must be a string: put the text in quotes or name another column',
    ),
    "null prediction": ('{"prediction": null, "output": "b"}\n', '{file}:1: "prediction" is null: must be a string'),
    "object": ('{"prediction": {}, "output": "b"}\n', '{file}:1: "prediction" is an object: must be a string'),
    "list of numbers": ('{"predictions": ["a", 2], "output": "b"}\n', '{file}:1: "predictions" is 2: must be a string'),
    "list as reference": ('{"prediction": "a", "output": ["b"]}\n', '{file}:1: "output" is a list: must be a string'),
    "empty list": (
        GOOD + '{"predictions": [], "output": "b"}\n',
        '{file}:2: "predictions" is an empty list: a row needs a prediction: write "" for an empty answer',
    ),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line_and_writes_nothing(content, message, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    assert exit_code(["--predictions", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("score.py: error: " + message.replace("{file}", str(path)))
    assert err.count("\n") == 1 and err.endswith("\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.jsonl"]


BAD_COMMANDS = {
    "missing file": (["--predictions", "nope.jsonl"], "--predictions: nope.jsonl: cannot be read (No such file"),
    "folder": (["--predictions", "sub"], "--predictions: sub: cannot be read (Is a directory): name an existing file"),
    "no flag": ([], "the following arguments are required: --predictions (see --help)"),
    "no value": (["--predictions"], "argument --predictions: expected at least one argument (see --help)"),
    "unknown flag": (["--predictions", "a.jsonl", "--output", "x"], "unrecognized arguments: --output x (see --help)"),
    "one column for both": (
        ["--predictions", "a.jsonl", "--prediction_column", "output"],
        "--prediction_column: output: is also --reference_column, so every row would match itself: name two different",
    ),
    "one output for two": (
        ["--predictions", "a.jsonl", "sub/a.jsonl", "--output_path", "x.json"],
        "--output_path: x.json: one file cannot hold the scores of several: leave it out to write one beside each",
    ),
    "same default output": (["--predictions", "a.jsonl", "a.json"], "--predictions: a.json: its scores would go to "),
    "output is the input": (
        ["--predictions", "a.jsonl", "--output_path", "sub/../a.jsonl"],
        "--output_path: {tmp}/a.jsonl: the scores would replace the predictions: choose another --output_path",
    ),
    "output is a folder": (
        ["--predictions", "a.jsonl", "--output_path", "sub"],
        "--output_path: {tmp}/sub: is a folder: name a file, such as scores.json in it",
    ),
    "output in no folder": (
        ["--predictions", "a.jsonl", "--output_path", "new/x.json"],
        "--output_path: {tmp}/new/x.json: its folder does not exist: create {tmp}/new first",
    ),
    "output name too long": (
        ["--predictions", "a.jsonl", "--output_path", "x" * 300],
        "--output_path: {tmp}/" + "x" * 300 + ": cannot be written (File name too long): choose another --output_path",
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a.jsonl, a.json and sub/a.jsonl in it."""
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "a.json", "sub/a.jsonl"):
        (tmp_path / name).write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments, message", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_line_and_writes_nothing(arguments, message, folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_info:
        score.main(arguments)
    out, err = capsys.readouterr()
    assert (exit_info.value.code, out) == (2, "")
    assert err.startswith("score.py: error: " + message.replace("{tmp}", str(folder.resolve())))
    assert err.count("\n") == 1 and err.endswith("\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_all_problems_are_shown_at_once_and_no_file_is_scored(folder, capsys):
    (folder / "b.jsonl").write_text("[]\n")
    assert exit_code(["--predictions", "a.jsonl", "b.jsonl", "c.jsonl"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["b.jsonl:1", "--predictions"]
    assert not list(folder.glob("*.scores.json"))


def run_python(*arguments, **environment):
    command, env = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=REPO_ROOT, env=env, capture_output=True, encoding="utf-8", timeout=120)


def test_the_command_prints_only_the_table(tmp_path):
    path = write_lines(tmp_path / "预测\udcff.jsonl", {"prediction": "今天天气很好", "output": "今天天气很好"})
    result = run_python("score.py", "--predictions", path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nexact_match  100.00" in result.stdout
    assert json.loads((tmp_path / "预测\udcff.scores.json").read_text(encoding="utf-8"))["files"] == [path]


def test_the_command_fails_without_a_traceback(tmp_path):
    result = run_python("score.py", "--predictions", str(tmp_path / "nope.jsonl"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("score.py: error: --predictions: ") and result.stderr.count("\n") == 1


def test_scoring_imports_no_deep_learning_library():
    code = "import sys, score; from evaluation.metrics import score_rows; score_rows(['好_的_吧'], ['好']); print(*sys.modules)"
    modules = set(run_python("-c", code).stdout.split())
    assert {"score", "jieba", "nltk", "rouge_chinese"} <= modules
    assert not modules & {"torch", "transformers", "deepspeed", "peft", "datasets"}


def test_help_imports_no_library_and_states_every_flag():
    code = "import sys, score\ntry: score.main(['--help'])\nexcept SystemExit: print('modules:', *sys.modules)"
    text, modules = run_python("-c", code).stdout.split("modules:")
    assert not set(modules.split()) & {"jieba", "nltk", "rouge_chinese", "numpy", "torch", "transformers"}
    for flag in ("--predictions", "--output_path", "--prediction_column", "--reference_column"):
        assert flag in text
    assert all(action.help for action in score_parser()._actions)
