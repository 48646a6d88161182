"""A comparison whose commands run nothing: its file, and results as its report gets them."""

import json
from pathlib import Path

import pytest
import yaml
from reference import GOLDEN_FOLDERS

import compare
from flags import score as flags_score
from flags.train import train_parser

BASE = str(GOLDEN_FOLDERS["glm3"])
ROWS = [{"instruction": "抽取：", "input": f"零件{n}开裂", "output": f"零件{n}_部件故障_开裂"} for n in range(20)]
FLAGS = {"max_len": 64, "max_src_len": 32}
GOOD = {
    "base": BASE,
    "mode": "glm3",
    "task": "extraction",
    "train_path": "rows.jsonl",
    "test_path": ["rows.jsonl"],
    "train_flags": FLAGS,
    "predict_flags": {"max_new_tokens": 8},
    "methods": [
        {"name": "lora", "train_type": "lora", "flags": {"lora_dim": 2}, "grid": {"learning_rate": ["1e-3", 0.003]}},
        {"name": "all", "train_type": "all"},
    ],
    "seeds": [1, 2],
    "forgetting": True,
}


def write_config(values, name="c.yaml"):
    is_text = isinstance(values, str)
    Path(name).write_text(values if is_text else yaml.safe_dump(values, allow_unicode=True, sort_keys=False))


def refused(argv, capsys):
    """The lines with which compare.py ends."""
    with pytest.raises(SystemExit) as stop:
        compare.main(argv, run_words=None)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("compare.py: error: ") for line in lines)
    return [line.removeprefix("compare.py: error: ") for line in lines]


def method(**changes):
    """The file with one LoRA method that has these changes."""
    return {"methods": [{"name": "m", "train_type": "lora", **changes}]}


class FakeCommands:
    """Runs nothing, and writes what the commands would; `fails` decides what ends with which exit code."""

    def __init__(self, fails=None):
        self.ran = []
        self.fails = fails or (lambda script, words: 0)

    def __call__(self, words, environment):
        script = next(word for word in words if word.endswith(".py"))
        name = Path(script).stem
        flags = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
        output = flags.get("--output_dir") or flags.get("--output_path") or flags["--predictions"]
        self.ran.append((name, output))
        if name == "train":
            args = train_parser().parse_args(words[words.index(script) + 1 :])
            assert args.resume == "auto" and args.save_state_step == 100 and environment["CUDA_VISIBLE_DEVICES"] == "0"
            (Path(output) / "state-step-10").mkdir(parents=True, exist_ok=True)
        if code := self.fails(name, output):
            return code, False
        getattr(self, name)(Path(output), flags)
        return 0, False

    def train(self, output, flags):
        checkpoint = output / "epoch-1-step-20"
        checkpoint.mkdir()
        (checkpoint / "run.json").write_text("{}")
        (checkpoint / "adapter_model.safetensors").write_text(json.dumps(flags))
        log = [{"step": step, "loss": 3.0 / step} for step in (10, 20)]
        done = {"step": 20, "event": "done", "seconds": 83.0, "tokens_per_second": 1234.5, "peak_memory_bytes": 6.5e8}
        done |= {"trained_weights": 29_600, "all_weights": 2_000_000}
        (output / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        (output / "events.jsonl").write_text(json.dumps(done) + "\n" + '{"step": 2')

    def predict(self, output, flags):
        """The base knows nothing, `all` little, LoRA half or nearly all."""
        path = flags["--model_path"]
        share = 0.75 if "0.003" in path else 0.6 if "lora" in path else 0.2 if "all" in path else 0
        lines = []
        for n, row in enumerate(ROWS):
            answer = row["output"] if n < share * len(ROWS) else "<script>alert(1)</script>"
            query = row["instruction"] + row["input"]
            lines.append({"index": n, "query": query, "output": row["output"], "prediction": answer})
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def score(self, predictions, flags):
        flags_score.scores_path(predictions, flags.get("--task")).write_text("{}")

    def forgetting(self, output, flags):
        assert ("--before" in flags) == ("runs" in str(output))
        difference = {"loss": [0.41, 0.3, 0.55], "score": None} if "--before" in flags else None
        output.write_text(json.dumps({"loss": 1.0, "score": 2.0, "difference": difference}))


def entry(name, value, **values):
    """A method as in results.json."""
    done = {
        "status": "done",
        "metrics": {"f1": value, "bleu4": None},
        "intervals": {"f1": [value - 5, value + 5], "bleu4": None},
    }
    costs = dict(
        seconds=83.0, tokens_per_second=1234.5, peak_memory_bytes=6.5e8, trained_weights=29600, all_weights=2e6
    )
    costs |= dict(checkpoint_bytes=12_345, forgetting={"loss": [0.4, 0.3, 0.5], "score": None}, spread=1.25)
    runs = [{"seed": seed, "loss": [[1, 2.0], [2, None], [3, 0.5]]} for seed in (1, 2)]
    kind = dict(train_type="lora", flags={"lora_alpha": "<b>"}, family=name)
    return {"name": name, **done, **costs, **kind, "runs": runs, "num_rows": 50, "to_base": [60, 50, 70], **values}


EVIL = "<script>alert('坏')</script>\n```\n| a | b |"
RESULTS = {
    "plan": "configs/<i>my</i>.yaml",
    "no_normalize": False,
    "base_model": "ChatGLM3-6B",
    "task": "extraction",
    "primary": "f1",
    "metrics": {"f1": "F1 of triples", "bleu4": "BLEU-4"},
    "train_path": ["a.json"],
    "test_path": ["b.json"],
    "seeds": [1, 2],
    "forgetting": True,
    "has_grid": True,
    "base": {"name": "base", "status": "done", "metrics": {"f1": 11.25, "bleu4": None}, "num_rows": 50}
    | {"intervals": {"f1": [8.5, 14.5], "bleu4": None}, "spread": None, "runs": [{}]},
    "methods": [
        entry("all", 78.25, to_best=[-3.5, -8.25, 1.5], seconds=None, peak_memory_bytes=4e8),
        entry("法", 81.75, to_best=None),
        entry("freeze", 41.75, to_best=[-40, -48, -32]),
        {
            "name": "late",
            "status": "not run",
            "train_type": "all",
            "flags": {},
            "family": "late",
            "runs": [{"loss": []}],
        },
    ],
    "best": "法",
    "samples": [
        {"row": 7, "question": EVIL, "reference": EVIL, "answers": {"base": {"text": EVIL, "score": None}}}
        | {"answers": {"法": {"text": "", "score": 50.0}}}
    ],
    "commands": ["python train.py --x '<script>'"],
    "machine": {"system": "Linux", "cpu": "2 x X", "memory_bytes": 1e9, "gpus": [], "versions": {"torch": "2.13.0"}},
    "time": "2026-01-01 10:00",
}
