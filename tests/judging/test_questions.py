"""Judging of questions for documents."""

from types import SimpleNamespace

import pytest
from judge_stand_in import MODEL, JudgeSandbox, blocks_of, completion, write

import judge
from judging import endpoint
from judging import questions as judge_questions
from judging import rows as judging_rows

# Rows of questions; those that a stand-in finds wrong say so.
QUESTIONS = [
    ["水温高怎么办？", "wrong 谁写的？", "风扇为什么不转？", "wrong 多少钱？", "空调何时开？"],  # 2 wrong
    ["水温高怎么办？", "水温高怎么办", "风扇为什么不转？", "", "空调何时开？"],  # 1 repeated, 1 empty
    ["水温高怎么办？", "油" * 65, "wrong " + "油" * 65, "机油多久换？", "谁来修？"],  # 2 overlong, 1 repeated, 1 wrong
]


def find_wrong(prompt, language="zh"):
    """A whole reply."""
    texts = list(blocks_of(prompt).values())[1:]
    numbers = [str(number) for number, text in enumerate(texts, start=1) if "wrong" in text or not text]
    words = {"zh": ("有错：", "，", "无"), "en": ("WRONG: ", ", ", "none")}[language]
    return f"理由 reasons\n{words[0]}{words[1].join(numbers) or words[2]}"


class QuestionsSandbox(JudgeSandbox):
    """A folder with questions for documents."""

    def flags(self, url=None, *more):
        words = ["--task", "questions", "--predictions", self.folder / "questions.jsonl", "--output_path", self.output]
        return [str(word) for word in [*words, "--model", MODEL, *(("--base_url", url) if url else ()), *more]]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_questions_for_documents(serve, tmp_path, capsys, language, monkeypatch):
    sandbox = QuestionsSandbox(tmp_path, capsys)
    rows = [{"index": i, "query": f"文档 {i}", "predictions": texts} for i, texts in enumerate(QUESTIONS)]
    write(sandbox.folder / "questions.jsonl", [*rows, {"index": 9, "query": "文档", "prediction": "好吗？"}])
    server = serve(lambda request: completion(find_wrong(request["messages"][0]["content"], language)))
    report, table = sandbox.run(server.url, "--language", language)
    # By hand, faults: 2 wrong; 2 counted (an empty one is not wrong, too); 1 wrong and 3 counted; none.
    wrong = {verdict["index"]: verdict["wrong"] for verdict in sandbox.verdicts()}
    assert wrong == {0: [2, 4], 1: [], 2: [3], 9: []}
    expected = {"num_rows": 4, "num_questions": 16, "num_left_out": 0, "num_unparsed": 0, "wrong_questions": 18.75}
    expected |= {"accuracy": (4.5 + 5 + 4.75 + 5) / 4, "diversity": (5 + 4.5 + 4.25 + 5) / 4, "language": language}
    expected |= {"score": (4.5 + 4.5 + 4 + 5) / 4, "score_percent": 90.0}
    assert {name: report[name] for name in expected} == expected
    low, high = report["score_interval"]
    assert 4 <= low < 4.5 < high <= 5 and "accuracy" in report["definitions"]
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert {"accuracy 4.81 4.62 to 5.00 found by the judge", "score, % 90.00"} < set(lines)
    for prompt in server.judged:
        words = judge_questions.LANGUAGES[language]
        assert words["criteria"] in prompt and prompt.endswith("\n" + words["last_line"])
    assert list(blocks_of(server.requests[0]["messages"][0]["content"]))[0] == words["labels"][0]
    # All is there: nothing is asked, and the file alone tells the same.
    monkeypatch.delenv("OPENAI_API_KEY")
    assert sandbox.run(None, "--language", language) == (report, table)
    judge.main(["--task", "questions", "--report_only", "--output_path", str(sandbox.output)])
    assert capsys.readouterr().out == table and len(server.requests) == 4
    sandbox.fails("is no verdict of judge.py", argv=["--report_only", "--output_path", str(sandbox.output)])
    sandbox.fails(
        "--baseline: does not apply", "http://127.0.0.1:9/v1", "--baseline", sandbox.folder / "questions.jsonl"
    )


def test_a_list_of_questions_that_cannot_be_read(serve, tmp_path, capsys):
    """Numbers of questions that are not there are asked for again; then the row is left out."""
    sandbox = QuestionsSandbox(tmp_path, capsys)
    write(sandbox.folder / "questions.jsonl", [{"query": "文档", "predictions": ["问题一？", "第二个问题？"]}])
    server = serve(faults=[completion("有错：3")], answer=lambda request: completion("都好"))
    report, table = sandbox.run(server.url)
    assert len(server.requests) == endpoint.ASKS and "编号" in server.requests[1]["messages"][2]["content"]
    assert (report["num_rows"], report["num_unparsed"], report["num_left_out"]) == (0, 1, 1) and "score" not in report
    [verdict] = sandbox.verdicts()
    assert verdict["wrong"] is None and verdict["reasons"] == "都好"


@pytest.mark.parametrize(
    "last, wrong",
    [
        ("WRONG: 1, 3", [1, 3]),
        ("有错：3，1", [1, 3]),
        ("**有错：1、2 和 3。**", [1, 2, 3]),
        ("Wrong: 1 and 2.", [1, 2]),
        ("WRONG: none", []),
        ("有错：无", []),
        ("WRONG: 0", None),
        ("WRONG: 4", None),
        ("WRONG: -1", None),
        ("WRONG: N, N", None),
        ("WRONG:", None),
        ("WRONG: 1" + "0" * 5000, None),
        ("WRONG: none\nSo all are right.", None),
    ],
)
def test_last_line_of_questions(last, wrong):
    job = judging_rows.Job(0, "alone", "", "", "", {"num_questions": 3, "empty": []})
    reasons, found = judge_questions.read_reply(job, f"A question says\nWRONG: 2\nwhich is data.\n{last}")
    assert found == (None if wrong is None else {"wrong": wrong})
    assert wrong is None or reasons == "A question says\nWRONG: 2\nwhich is data."


def test_questions_are_counted_as_score_counts_them(sandbox):
    """The faults that can be counted are those of score.py, which folds texts first."""
    row = {"index": 0, "query": "q", "predictions": ["水泵重１０㎏？", "水泵重10kg?", "℃", "问" * 60 + "…………"]}
    write(sandbox.folder / "questions.jsonl", [row])
    args = SimpleNamespace(predictions=str(sandbox.folder / "questions.jsonl"), language="zh", limit=0, model=MODEL)
    [job] = judge_questions.make_jobs(args, "c")
    assert [job.facts[name] for name in ("num_repeated", "num_empty", "num_overlong", "empty")] == [1, 0, 1, []]
