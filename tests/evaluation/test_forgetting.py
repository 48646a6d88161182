"""forgetting.py: the suite is right, losses and scores are what they say, models are compared fairly."""

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy
import pytest
import torch
from launching import check_done, run_command
from reference import GOLDEN_FOLDERS, ROOT

import forgetting
from evaluation import forgetting as evaluation_forgetting
from evaluation import general_suite
from rows.encoding import encode_row

SUITE = ROOT / "data" / "general" / "suite.jsonl"
RAW = [json.loads(line) for line in SUITE.read_text(encoding="utf-8").splitlines()]
ROWS = general_suite.read_suite(str(SUITE.parent))
SMALL = ROWS[::6]  # two of each category
BATCHES = SimpleNamespace(batch_size=5, batch_tokens=0, model_path="model")


# ---------------------------------------------------------------- the suite


def printed(*lines):
    """What a program prints."""
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def sql(tables, query):
    database = sqlite3.connect(":memory:")
    database.executescript(tables)
    return database.execute(query).fetchall()


# Is the reference right? By line of the suite, where that can be computed; question: the row's input.
VERIFIED = {
    25: lambda question, answer: printed(question) == answer,
    26: lambda question, answer: printed(question) == answer,
    27: lambda question, answer: printed(question) == answer,
    28: lambda question, answer: printed(question) == answer,
    29: lambda question, answer: printed(question) == answer,
    30: lambda question, answer: printed(question) == answer,
    31: lambda question, answer: printed(answer, "print(add(2, 3))") == "5",
    32: lambda question, answer: printed(answer, "print([is_even(n) for n in (0, 3, 8)])") == "[True, False, True]",
    33: lambda question, answer: printed(answer, "print(largest([4, 9, -2]))") == "9",
    34: lambda question, answer: (
        sql("create table students (name, age); insert into students values ('A', 18), ('B', 19)", answer) == [("B",)]
    ),
    35: lambda question, answer: printed(answer) == "0\n1\n2",
    36: lambda question, answer: printed(f"x = [1]; x.{answer}(2); print(x)") == "[1, 2]",
    49: lambda question, answer: 37 + 48 == float(answer),
    50: lambda question, answer: 203 - 78 == float(answer),
    51: lambda question, answer: 24 * 15 == float(answer),
    52: lambda question, answer: 144 / 12 == float(answer),
    53: lambda question, answer: (8 + 7) * 6 == float(answer),
    54: lambda question, answer: 25 - 3 * 4 == float(answer),
    55: lambda question, answer: 80 * 3.5 == float(answer),
    56: lambda question, answer: 9**2 + 19 == float(answer),
    57: lambda question, answer: 12 * 7 == float(answer),
    58: lambda question, answer: 200 * 15 / 100 == float(answer),
    59: lambda question, answer: -(-50 // 6) == float(answer),
    60: lambda question, answer: 180 - 25 * 6 == float(answer),
    86: lambda question, answer: question.upper() == answer,
    87: lambda question, answer: ", ".join(sorted(question.split(", "))) == answer,
    88: lambda question, answer: question[::-1] == answer,
    93: lambda question, answer: json.loads(answer) == {"name": "Tom", "age": 5},
    94: lambda question, answer: answer.split() == ["blue"] * 3,
}


def test_suite_is_well_formed():
    assert len(ROWS) == len(RAW) >= 60
    assert len({row["query"] for row in ROWS}) == len(ROWS), "a question stands twice"
    counts = Counter(row["category"] for row in ROWS)
    assert len(counts) == 8 and set(counts.values()) == {12}
    assert {row["check"] for row in ROWS} == set(general_suite.CHECKS), "each check is used"
    allowed = {"category", "check", "instruction", "input", "output", "accept"}
    assert all(set(row) <= allowed for row in RAW)
    num_chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in row["query"]) for row in ROWS)
    assert len(ROWS) / 2 < num_chinese < len(ROWS), "mostly Chinese, some English"


def test_readme_counts_the_rows():
    text = (SUITE.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(ROWS)} questions" in text and f"{len(ROWS)} 个问题" in text
    for category, count in Counter(row["category"] for row in ROWS).items():
        assert f"| `{category}` | {count} |" in text
    assert all(f"| `{check}` |" in text for check in general_suite.CHECKS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["place"].split(":")[-1])
def test_reference_passes_its_own_check(row):
    assert general_suite.score_answer(row["answer"], row) == 100
    assert general_suite.score_answer("", row) == 0 and general_suite.score_answer("qwerty zxcvb", row) == 0


def test_references_are_right():
    """Arithmetic is computed and code is run."""
    for line, is_right in VERIFIED.items():
        assert is_right(RAW[line - 1]["input"], RAW[line - 1]["output"]), RAW[line - 1]
    counts = Counter(RAW[line - 1]["category"] for line in VERIFIED)
    assert counts["arithmetic"] == counts["code"] == 12


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "check, answer, score",
    [
        ("exact", "“收到。”", 100),
        ("exact", " **收到** \n", 100),
        ("exact", "收到，谢谢", 0),
        ("contains", "答案是 H2O。", 100),
        ("contains", "h₂o", 100),
        ("contains", "H2O2", 0),
        ("contains", "XH2O", 0),
        ("all", "def  ADD( a,b ): return a+b", 100),
        ("all", "return a + b", 50),
        ("all", "def add(a, b): return a + bc", 50),
        ("number", "12 + 1188 = 1,200。", 100),
        ("number", "１２００元", 100),
        ("number", "1200.0", 100),
        ("number", "1200.5", 0),
        ("number", "-1200", 0),
        ("number", "1200, 7", 0),
        ("number", "没有", 0),
        ("rougeL", "他喝茶", 100),
        ("rougeL", "她喝茶", 100),
        ("rougeL", "  ", 0),
    ],
)
def test_answers_are_scored_by_each_check(check, answer, score):
    row = {
        "exact": {"answer": "收到", "accept": []},
        "contains": {"answer": "水是 H2O。", "accept": ["H2O"]},
        "all": {"answer": "", "accept": [["def add("], ["a + b", "b + a"]]},
        "number": {"answer": "1200", "accept": []},
        "rougeL": {"answer": "她喝茶", "accept": ["他喝茶"]},
    }[check]
    assert general_suite.score_answer(answer, {**row, "check": check}) == score


@pytest.mark.parametrize(
    "text, number",
    [("3-5", 5), ("得-5", -5), ("= −5", -5), ("1,2", 2), ("1,234,567.5 元", 1234567.5), ("x_1-2", 2), ("", None)],
)
def test_last_number(text, number):
    assert general_suite.last_number(text) == number


# ---------------------------------------------------------------- losses


def reference_losses(model, tokenizer, prompt, rows):
    """A second way: each row alone, all logits, log-softmax in float64."""
    for row in rows:
        encoded = encode_row(row["query"], row["answer"], tokenizer, prompt, 4096, 2048)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        losses = -chances.gather(1, ids[0, 1:, None]).squeeze(1)[encoded["runs"][0].start - 1 :]
        yield losses.mean().item(), len(losses)


@pytest.mark.parametrize("kind", ["plain", "prefix_embedding"])
def test_loss_is_that_of_the_rows_alone(golden, kind):
    model = golden.model() if kind == "plain" else golden.prefix_model(kind)
    tokenizer, prompt = golden.tokenizer(), golden.mode.prompt
    rows = evaluation_forgetting.measure_losses(model.eval(), tokenizer, prompt, SMALL, BATCHES)
    expected = list(reference_losses(model, tokenizer, prompt, SMALL))
    assert [row["num_tokens"] for row in rows] == [num_tokens for _, num_tokens in expected]
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [row["index"] for row in rows] == list(range(len(SMALL)))
    total = sum(loss * count for loss, count in expected) / sum(count for _, count in expected)
    assert evaluation_forgetting.totals(rows) == {"loss": pytest.approx(total), "score": None, "num_rows": len(SMALL)}


def test_supervised_tokens_and_loss_are_those_of_training(golden):
    """The same batch through the model's own forward with labels."""
    from rows.batches import collate

    model, tokenizer = golden.model(), golden.tokenizer()
    encoded = [encode_row(r["query"], r["answer"], tokenizer, golden.mode.prompt, 4096, 2048) for r in SMALL[:4]]
    batch = collate(encoded, tokenizer.pad_token_id)
    sums = evaluation_forgetting.row_losses(model, batch)
    assert sum(count for _, count in sums) == len(batch["label_positions"])
    with torch.no_grad():
        assert sum(loss for loss, _ in sums) == pytest.approx(model(**batch).token_losses.sum().item(), rel=1e-6)


def test_weights_that_are_not_finite_are_refused():
    from reference import Golden

    golden = Golden("glm3")
    model = golden.model()
    model.get_output_embeddings().weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model: the loss of .*suite.jsonl:1 is nan"):
        evaluation_forgetting.measure_losses(model, golden.tokenizer(), golden.mode.prompt, SMALL[:1], BATCHES)


# ---------------------------------------------------------------- differences


def test_interval_holds_the_mean_about_as_often_as_it_should(monkeypatch):
    """Normal changes, 60 rows; 190 of 200 expected, about 3 fewer or more by chance."""
    monkeypatch.setattr(evaluation_forgetting, "NUM_RESAMPLES", 300)
    draws = numpy.random.default_rng(7)
    num_inside, widths = 0, []
    for _ in range(200):
        value, low, high = evaluation_forgetting.paired_difference(draws.normal(1, 2, 60), numpy.ones(60))
        assert low < value < high
        num_inside += low < 1 < high
        widths.append(high - low)
    assert 178 <= num_inside <= 199
    assert numpy.mean(widths) == pytest.approx(2 * 1.96 * 2 / 60**0.5, rel=0.05)


def test_interval_is_weighted_and_repeats():
    changes, weights = numpy.arange(8.0), numpy.array([1, 1, 1, 1, 1, 1, 1, 9])
    first = evaluation_forgetting.paired_difference(changes, weights)
    assert first == evaluation_forgetting.paired_difference(changes, weights)
    assert first[0] == (21 + 63) / 16
    assert evaluation_forgetting.paired_difference(changes[:5], weights[:5]) == [2.0, None, None]
    assert evaluation_forgetting.paired_difference([0.5] * 6, [1] * 6) == [0.5, 0.5, 0.5]


def made_rows(loss, score=None, num_rows=12):
    """Rows of two categories."""
    scores = {} if score is None else {"score": float(score)}
    noise = [0.01 * (n % 3) for n in range(num_rows)]
    return [
        {"index": n, "category": "ab"[n % 2], "num_tokens": 5 + n, "loss": loss + noise[n], **scores}
        for n in range(num_rows)
    ]


def test_verdict_names_what_was_forgotten():
    before = made_rows(1.0, 80)

    def said(after):
        return evaluation_forgetting.verdict(evaluation_forgetting.differences(after, before, "before.json"))

    assert said(made_rows(1.4, 80)) == "forgot: loss +0.40 [+0.40, +0.40]"
    assert said(made_rows(1.4, 50)) == "forgot: loss +0.40 [+0.40, +0.40], score -30.0 [-30.0, -30.0]"
    assert said(made_rows(0.8, 90)).startswith("no forgetting beyond the noise: loss -0.20 [-0.20, -0.20], score +10.0")
    assert said(made_rows(1.4)) == "forgot: loss +0.40 [+0.40, +0.40]"
    mixed = made_rows(1.0, 80)
    for row in mixed:
        row["score"] += {"a": 10, "b": -10}[row["category"]]
    assert said(mixed).endswith("; look at b")
    few = evaluation_forgetting.differences(made_rows(2.0, 80)[:4], before[:4], "before.json")
    assert few["loss"] == [pytest.approx(1.0), None, None]
    assert evaluation_forgetting.verdict(few) == "too few rows to tell forgetting from noise: loss +1.00, score +0.0"


def test_answers_of_an_earlier_result_are_scored_as_those_of_now():
    """An older version scored another way: the difference would be that of the versions. Full width counts nowhere."""
    suite = [{"answer": "先关电源，再更换（水泵）", "accept": [], "check": "rougeL"}] * 3
    rows = [{"score": 50.0, "prediction": "先关电源,再更换(水泵)"}, {"score": 7.0, "prediction": None}, {"loss": 1.0}]
    evaluation_forgetting.rescore(rows, suite)
    assert rows[0]["score"] == 100 and rows[1:] == [{"score": 7.0, "prediction": None}, {"loss": 1.0}]


def test_other_tokens_are_refused():
    other = made_rows(1.0)
    other[3]["num_tokens"] += 1
    with pytest.raises(ValueError, match="--before b.json: row 3 has 9 supervised tokens there, 8 here"):
        evaluation_forgetting.differences(made_rows(1.0), other, "b.json")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def base_result(tmp_path_factory):
    """The golden model on a part of the suite, by the real command."""
    folder = tmp_path_factory.mktemp("forgetting")
    (folder / "small.jsonl").write_text("\n".join(json.dumps(row) for row in RAW[::6]))
    command = f"python forgetting.py --model_path {GOLDEN_FOLDERS['glm3']} --suite small.jsonl --max_new_tokens 4"
    process = run_command(f"{command} --output_path out/base.json", folder)
    check_done(process)
    assert not list(folder.glob("out/*.partial"))
    return folder / "out" / "base.json", process.stdout


def flags(result_path, *more):
    suite = result_path.parent.parent / "small.jsonl"
    given = ["--model_path", GOLDEN_FOLDERS["glm3"], "--suite", suite, "--max_new_tokens", 4, *more]
    return [str(word) for word in given]


def test_result_of_the_command(base_result):
    path, shown = base_result
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"model", "mode", "precision", "suite", "max_new_tokens", "versions"} < set(result)
    assert result["difference"] is result["before"] is result["verdict"] is None
    assert [len(digest) for digest in result["bases"]] == [64], "which models it may be compared with"
    assert [row["query"] for row in result["rows"]] == [row["query"] for row in SMALL]
    assert {"category", "output", "num_tokens", "loss", "score", "prediction", "stopped"} < set(result["rows"][0])
    part = [row for row in result["rows"] if row["category"] == "facts"]
    expected = {"loss": sum(r["loss"] * r["num_tokens"] for r in part) / sum(r["num_tokens"] for r in part)}
    expected |= {"score": sum(r["score"] for r in part) / 2, "num_rows": 2}
    assert result["categories"]["facts"] == pytest.approx(expected)
    table = [line for line in shown.splitlines() if line][1:]
    assert table[0].split() == ["category", "rows", "loss", "score"] and table[-1].split()[:2] == ["all", "16"]
    assert len({len(line) for line in table}) == 1, "aligned"


def test_a_changed_model_is_compared(base_result, tmp_path, capsys):
    """A LoRA adapter with a strong effect on the same rows; in other batches."""
    from reference import Golden

    from checkpoints.saving import describe_run, save_checkpoint
    from train_types import TRAIN_TYPES

    golden, lora = Golden("glm3"), TRAIN_TYPES["lora"]
    settings = {"lora_dim": 4, "lora_alpha": 16, "lora_dropout": 0.0, "lora_module_name": "query_key_value,dense"}
    names = {"mode": "glm3", "train_type": "lora", "model_name_or_path": golden.folder}
    args = SimpleNamespace(**names, **settings)
    torch.manual_seed(0)
    model = lora.prepare(golden.model(), args, golden.mode)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    run = describe_run(args, golden.folder, "fp32", epoch=1, step=1)
    save_checkpoint(model, golden.tokenizer(), str(tmp_path / "run"), lora, run, zero3=False)

    path = base_result[0]
    words = flags(path, "--model_path", tmp_path / "run", "--before", path, "--output_path", tmp_path / "after.json")
    assert forgetting.main([*words, "--batch_size", "3"]) == 0
    result, before = (json.loads(p.read_text(encoding="utf-8")) for p in (tmp_path / "after.json", path))
    value, low, high = result["difference"]["loss"]
    assert value == pytest.approx(result["loss"] - before["loss"]) and low < value < high
    assert set(result["difference"]["categories"]) == set(result["categories"])
    assert result["difference"]["categories"]["code"]["loss"][1] is None, "two rows have no interval"
    assert result["difference"]["score"][0] == pytest.approx(result["score"] - before["score"])
    assert result["before"]["loss"] == pytest.approx(before["loss"]) and result["before"]["path"] == str(path)
    assert (low > 0) == result["verdict"].startswith("forgot: loss")
    shown = capsys.readouterr().out
    assert result["verdict"] in shown and "difference" in shown


def test_batches_do_not_matter_and_the_same_model_forgot_nothing(base_result, tmp_path, capsys):
    path, output = base_result[0], tmp_path / "again.json"
    words = flags(path, "--before", path, "--output_path", output, "--batch_tokens", 200)
    assert forgetting.main(words) == 0
    result, before = (json.loads(p.read_text(encoding="utf-8")) for p in (output, path))
    for new, old in zip(result["rows"], before["rows"]):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-5)
        assert new["prediction"] == old["prediction"] and new["score"] == old["score"]
    assert result["difference"]["score"] == [0, 0, 0] and max(map(abs, result["difference"]["loss"])) < 1e-5
    verdict = "no forgetting beyond the noise: loss +0.00 [+0.00, +0.00], score +0.0 [+0.0, +0.0]"
    assert result["verdict"] == verdict and verdict in capsys.readouterr().out


def test_losses_alone(base_result, tmp_path, capsys):
    path, output = base_result[0], tmp_path / "losses.json"
    words = [word for word in flags(path, "--before", path, "--output_path", output) if word not in ("4",)]
    words.remove("--max_new_tokens")
    assert forgetting.main([*words, "--no_generate"]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["score"] is None and result["difference"]["score"] is None and "score" not in result["rows"][0]
    assert result["difference"]["loss"][0] == pytest.approx(0, abs=1e-6)
    assert "score" not in capsys.readouterr().out


# ---------------------------------------------------------------- refusals


def refused(words, capsys):
    """The one line (or lines) of an exit with code 2, as the program would print it."""
    try:
        with pytest.raises(SystemExit) as ended:
            forgetting.main([str(word) for word in words])
        assert ended.value.code == 2
        return capsys.readouterr().err.strip()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--batch_size", 0], "--batch_size 0: must be at least 1"),
        (["--batch_tokens", -1], "--batch_tokens -1: must be 0 or more"),
        (["--max_new_tokens", 0], "--max_new_tokens 0: must be at least 1"),
        (["--no_generate"], "--max_new_tokens: belongs to the answers"),
        (["--model_path", "nowhere"], "--model_path nowhere: no such folder"),
        (["--suite", "nowhere"], "--suite nowhere: no such file or folder"),
        (["--before", "nowhere.json"], "--before nowhere.json: cannot be read as JSON"),
        (["--device", "GPU"], "argument --device: invalid choice"),
        (["--mode", "glm"], "--mode glm: config.json of"),
        (["--temperature", "1"], "unrecognized arguments: --temperature 1"),
    ],
)
def test_wrong_flags_are_refused(base_result, tmp_path, capsys, more, says):
    output = tmp_path / "new.json"
    line = refused(flags(base_result[0], "--output_path", output, *more), capsys)
    assert says in line and "\n" not in line and not output.exists()


def test_output_is_not_replaced_unasked(base_result, capsys):
    path = base_result[0]
    content = path.read_bytes()
    assert "exists: choose another or add --overwrite" in refused(flags(path, "--output_path", path), capsys)
    words = flags(path, "--output_path", path, "--before", path, "--overwrite")
    assert "is the input: choose another file" in refused(words, capsys)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change, says",
    [
        ({"rows": []}, "is not a result of forgetting.py"),
        ({"rows": [{"loss": 1.0}]}, "is not a result of forgetting.py"),
        ({"rows": [1]}, "is not a result of forgetting.py"),
        ({"suite": {}}, "is not a result of forgetting.py"),
        ({"suite": {"sha256": "0"}}, "is of another suite than"),
        ({"mode": "glm2"}, "mode is glm2 there, glm3 here"),
        ({"precision": "bf16"}, "precision is bf16 there, fp32 here"),
        ({"max_new_tokens": 8}, "max_new_tokens is 8 there, 4 here"),
    ],
)
def test_what_cannot_be_compared_is_refused(base_result, tmp_path, capsys, monkeypatch, change, says):
    monkeypatch.setattr(forgetting, "load_opened", lambda *_: pytest.fail("a weight was read"))
    path, changed = base_result[0], tmp_path / "changed.json"
    changed.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}))
    words = flags(path, "--before", changed, "--output_path", tmp_path / "new.json")
    line = refused([*words, "--device", "cpu"], capsys)
    assert says in line and "--before" in line and "\n" not in line and not (tmp_path / "new.json").exists()


def test_hash_is_of_the_questions_and_not_of_the_file(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps([{**row, "more": 1} for row in RAW]))
    assert general_suite.suite_hash(general_suite.read_suite(str(tmp_path))) == general_suite.suite_hash(ROWS)
    assert general_suite.suite_hash(ROWS[:-1]) != general_suite.suite_hash(ROWS)
    assert general_suite.suite_hash([{**row, "accept": []} for row in ROWS]) != general_suite.suite_hash(ROWS)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"category": " "}, "field 'category'"),
        ({"category": ["facts"]}, "field 'category'"),
        ({"check": "guess"}, "field 'check': must be one of exact, contains"),
        ({"check": []}, "field 'check'"),
        ({"accept": "北京"}, "check contains takes a list of strings"),
        ({"accept": []}, "check contains takes a list of strings"),
        ({"accept": ["  "]}, "check contains takes a list of strings"),
        ({"check": "all"}, "check all takes a list of lists of strings"),
        ({"check": "all", "accept": [["a"], []]}, "check all takes a list of lists of strings"),
        ({"check": "all", "accept": []}, "check all takes a list of lists of strings"),
        ({"check": "all", "accept": 1}, "check all takes a list of lists of strings"),
        ({"check": "number"}, "field 'output' holds no number"),
        ({"output": ""}, "field 'output' is empty"),
        ({"instruction": None}, "field 'instruction' is null"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tmp_path, change, says):
    row = {"instruction": "首都？", "input": "", "output": "北京", "category": "facts", "check": "contains"}
    path = tmp_path / "suite.jsonl"
    path.write_text("\n" + json.dumps({**row, "accept": ["北京"], **change}))
    with pytest.raises(ValueError, match=f"suite.jsonl:2: .*{says}"):
        general_suite.read_suite(str(path))


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(value, file):
        raise OSError(28, "No space left on device")

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(evaluation_forgetting, "dump_json", full)
    with pytest.raises(ValueError, match="result.json: cannot be written .No space left on device.: choose"):
        evaluation_forgetting.save({}, str(tmp_path / "new" / "result.json"))
    assert not list((tmp_path / "new").iterdir())
