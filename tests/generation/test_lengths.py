"""Questions are read and cut as the run did it, fit the model's window with their answers, and are not cut unsaid."""

# ruff: noqa: F811

import builtins
import json
from types import SimpleNamespace

import pytest
from reference import ROOT
from refusing import FOLDERS, ROW_LINE, case, put, row, sandbox  # noqa: F401, a fixture

import forgetting
import predict
from checkpoints.opening import read_config
from comparison import methods
from comparison.plan import predict_words, read_plan
from flags import predict as flags_predict
from generation import prediction_file
from generation.lengths import settle_columns, settle_lengths
from modes import MODES

PROMPT = MODES["glm"].prompt  # reserves 3 tokens


def with_run(sandbox, name="model", mode="glm3", **flags):
    """A whole checkpoint that a run with these flags saved."""
    folder = sandbox.model(mode, name)
    put("run.json", json.dumps({"mode": mode, "weights": "whole", "train_type": "all", "flags": flags}))(folder)
    return folder


@pytest.mark.parametrize("mode, window", [("glm", 2048), ("glm2", 2048), ("glm3", 8192)])
def test_the_window_is_that_of_config_json(mode, window):
    assert read_config(str(FOLDERS[mode]), MODES[mode]).window == window


def settled(sandbox, given, max_new_tokens, window, **flags):
    """(--max_src_len that holds, the lines that say why)."""
    with_run(sandbox, **flags)
    args = SimpleNamespace(model_path="model", max_src_len=given, max_new_tokens=max_new_tokens)
    notes = settle_lengths(args, SimpleNamespace(window=window), PROMPT)
    return args.max_src_len, notes


LENGTHS = [  # given, --max_new_tokens, window, flags of the run, --max_src_len that holds, what is said
    case("usual", None, 512, 2048, {}, 1024, []),
    case("of-the-run", None, 512, 2048, {"max_src_len": 192}, 192, ["--max_src_len 192, from run.json of the model"]),
    case("given", 300, 512, 2048, {"max_src_len": 192}, 300, []),
    case("fits-to-the-token", 1533, 512, 2048, {}, 1533, []),
    case("lowered", None, 1500, 2048, {}, 545,
         ["--max_src_len 545: more does not fit, with --max_new_tokens, the model's window of 2048"]),
    case("of-the-run-lowered", None, 512, 2048, {"max_src_len": 1600}, 1533, ["--max_src_len 1533: more does not"]),
    case("least", None, 2029, 2048, {}, 16, ["--max_src_len 16: more does not fit"]),
]  # fmt: skip


@pytest.mark.parametrize("given, max_new_tokens, window, flags, expected, says", LENGTHS)
def test_which_length_holds(sandbox, given, max_new_tokens, window, flags, expected, says):
    found, notes = settled(sandbox, given, max_new_tokens, window, **flags)
    assert found == expected and len(notes) == len(says)
    assert all(note.startswith(text) for note, text in zip(notes, says))


BEYOND = [
    case("by-one", 1534, 512, "--max_new_tokens 512: does not fit, with --max_src_len 1534 and 3 more tokens, the"
         " model's window of 2048 tokens: use at most --max_src_len 1533 or --max_new_tokens 511"),
    case("answer-alone", None, 2030, "use at most --max_new_tokens 1021"),
    case("both", 3000, 3000, "window of 2048 tokens: lower both"),
]  # fmt: skip


@pytest.mark.parametrize("given, max_new_tokens, says", BEYOND)
def test_what_was_asked_for_and_does_not_fit_is_refused(sandbox, given, max_new_tokens, says):
    with pytest.raises(ValueError) as error:
        settled(sandbox, given, max_new_tokens, 2048)
    assert says in str(error.value)


def test_a_run_with_flags_that_cannot_be_is_refused(sandbox):
    with pytest.raises(ValueError, match=r"run\.json: flags\.max_src_len is 'x': must be a whole number of at"):
        settled(sandbox, None, 1, 2048, max_src_len="x")


def test_every_command_that_answers_keeps_to_the_window(sandbox):
    """predict.py, evaluation while training, and forgetting.py, which cuts no question."""
    says = r"--max_new_tokens 512: does not fit, with --max_src_len 1600 and 3 more tokens"
    sandbox.fails(
        "predict.py", *sandbox.fill("--model_path {glm} --prompt a --max_src_len 1600 --device cpu"), says=says
    )
    flags = "--model_name_or_path {glm2} --eval_path rows.json --eval_generate --eval_max_new_tokens 2000"
    says = r"--eval_max_new_tokens 2000: does not fit, with --max_src_len 256 .*--max_src_len 45 or --eval_max_\w+ 1789"
    sandbox.train_fails(flags, says)
    scored = {"category": "a", "check": "exact", "accept": []}
    sandbox.write("suite.json", "\n".join([row(**scored), row(input="水" * 2100, **scored)]))
    words = "--model_path {glm} --suite suite.json --output_path out.json --device cpu".split()
    with pytest.raises(ValueError, match=r"suite\.json:2: \d{4} tokens of the question and 64 of --max_new_tokens: "):
        forgetting.main([word.format(glm=FOLDERS["glm"]) for word in words])


def answered(sandbox, *words):
    """The output of predict.py on two rows of other fields, one of them long."""
    sandbox.allow_weights()
    rows = [{"q": "水" * 90, "a": "答"}, {"q": "问", "a": "答"}]
    sandbox.write("test.json", "\n".join(map(json.dumps, rows)))
    common = ["--model_path", "model", "--test_path", "test.json", "--max_new_tokens", "2", "--device", "cpu"]
    predict.main([*common, "--output_path", "out.jsonl", "--overwrite", *words])
    return [json.loads(line) for line in (sandbox.folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_are_read_and_cut_as_in_the_run_and_it_is_said(sandbox):
    """The run's flags hold unless others are given, and how much was cut is told."""
    with_run(sandbox, max_src_len=20, prompt_column="q", response_column="a")
    first, second = answered(sandbox)
    captured = sandbox.capsys.readouterr()
    for text in ("--prompt_column q,", "--response_column a,", "--max_src_len 20,"):
        assert f"{text} from run.json of the model" in captured.err
    num_cut = first["source_tokens_cut"]
    assert num_cut > 60 and first["output"] == "答" and "source_tokens_cut" not in second
    assert f"questions: cut 1 of 2 at --max_src_len 20: {num_cut} tokens lost, {num_cut} of the longest" in captured.out
    assert "source_tokens_cut" not in answered(sandbox, "--max_src_len", "200")[0]
    assert "questions: none was cut at --max_src_len 200" in sandbox.capsys.readouterr().out
    with pytest.raises(ValueError, match=r"test\.json:1: no field 'instruction'"):
        answered(sandbox, "--prompt_column", "")


def test_an_interrupted_run_is_gone_on_with_by_the_length_that_holds(sandbox):
    """Other values in run.json are other answers, though no flag was given."""
    rows = [{"query": "a", "answer": None}]
    keys = set()
    for number, length in enumerate((20, 40, 40)):
        folder = with_run(sandbox, f"{number}", max_src_len=length)
        args = flags_predict.parse_predict(["--model_path", str(folder), "--prompt", "a"])
        settle_lengths(args, SimpleNamespace(window=2048), PROMPT)
        args.model_path = "model"
        opened = SimpleNamespace(folder=str(FOLDERS["glm3"]), base_folder=str(FOLDERS["glm3"]))
        keys.add(prediction_file.key_of(args, opened, rows, "fp32"))
    assert len(keys) == 2


def test_what_a_conversation_leaves_out_is_said(sandbox, monkeypatch):
    """Oldest turns and the end of a question that find no room in the prompt."""
    sandbox.allow_weights()
    asked = iter(["水" * 10, "火" * 10, "土" * 90, "风", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(asked))
    words = ["--model_path", FOLDERS["glm3"], "--interactive", "--max_new_tokens", 4, "--max_src_len", 36]
    predict.main([str(word) for word in [*words, "--device", "cpu"]])
    said = [line for line in sandbox.capsys.readouterr().out.splitlines() if line.startswith("(no room")]
    assert len(said) >= 2 and not any("of the question" in line for line in said[:-2])
    assert any(" 2 oldest turns and " in line and " tokens of the question)" in line for line in said), said


def test_a_comparison_asks_the_base_as_it_asks_the_methods(tmp_path, monkeypatch):
    """The base has no run.json: the same cut and the same fields are given to both; a window that is too small is told
    before anything is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(ROW_LINE)
    text = (ROOT / "configs" / "compare_quickstart.yaml").read_text(encoding="utf-8")
    text = text.replace("data/spo_0.json", "rows.json").replace("data/spo_1.json", "rows.json")
    text = text.replace("output/base-glm3", str(FOLDERS["glm3"]))
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    plan, problems = read_plan("c.yaml")
    assert problems == []
    words = [predict_words(plan, "model", "out", flags) for flags in (plan.train_flags, plan.methods[0].all)]
    assert words[0] == words[1]
    assert words[0][words[0].index("--max_src_len") + 1] == "192" and "--prompt_column" not in words[0]
    plan.methods[0].all["max_src_len"] = 8100
    plan.predict_flags["max_new_tokens"] = 500
    [problem] = [line for line in methods.model_problems(plan, plan.methods[:1]) if line and "window" in line]
    assert problem.startswith("freeze: predict_flags: --max_new_tokens 500: does not fit, with --max_src_len 8100")
    plan.predict_flags["max_src_len"] = 100
    assert not any(line and "window" in line for line in methods.model_problems(plan, plan.methods[:1]))


def test_columns_of_a_prompt_are_left_alone():
    args = SimpleNamespace(test_path=None, prompt_column=None, response_column=None, model_path="nowhere")
    assert settle_columns(args)[1] == []
