"""Every entry of the tables is finished, and imports point down."""

import ast
import inspect

import pytest
import test_launch
import torch
from conftest import GOLDEN_FOLDERS, ROOT

from modes import MODES, possible_modes
from train_arguments import train_parser
from tuning import TRAIN_TYPES, count_parameters, matches

# A file may import those of its own level and below.
LEVELS = [
    {"exits", "plain_files", "pickles", "glm_common", "glm1", "glm2", "glm3"},
    {
        *("entry", "utils", "modes", "tasks", "folders", "holding", "hosts", "watch", "plots", "steps", "report_words"),
        *("file_kinds", "row_checks"),
    },
    {
        *("tuning", "data_set", "batches", "guard", "ds_config", "optimizer", "run_log", "weights", "metrics"),
        *("bootstrap", "bases", "adapter_settings", "trained_weights", "foreign"),
    },
    {
        *("released_files", "progress", "checkpoint", "resume", "state_checks", "run_folder", "row_cache", "row_sets"),
        *("report", "report_text", "round_trip", "going_on"),
    },
    {"arguments", "train_arguments", "compare_plan", "lengths"},
    {
        *("train", "evaluation", "predict", "merge_lora", "score", "forgetting", "doctor", "compare", "talk"),
        *("judge", "judge_pairs", "judge_questions", "judge_rows", "endpoint"),
    },
]


@pytest.mark.parametrize("name", MODES)
def test_mode_is_finished(name):
    mode = MODES[name]
    assert name == mode.name and name in GOLDEN_FOLDERS
    for required in ("config_class", "model_class", "tokenizer_class"):
        assert getattr(mode, required).__module__.startswith(mode.package + ".")
    assert all(hasattr(mode.config_class, key) for key in mode.vllm_values or {})
    prompt = mode.prompt
    assert prompt.RESERVED >= 3 and prompt.SUPERVISED_PROMPT_IDS in (0, 1)
    for function in ("encode_prompt", "encode_answer", "stop_ids", "clean_response"):
        assert inspect.getdoc(getattr(prompt, function))
    assert possible_modes(str(GOLDEN_FOLDERS[name])) == [name]
    assert any(case[0] == name for case in test_launch.CASES)


@pytest.mark.parametrize("name", TRAIN_TYPES)
@pytest.mark.parametrize("mode_name", MODES)
def test_train_type_is_finished(name, mode_name):
    """What trains is what the type says, on a network without memory."""
    train_type, mode = TRAIN_TYPES[name], MODES[mode_name]
    parser = train_parser()
    args = parser.parse_args(["--train_path", "x", "--model_name_or_path", "x", "--output_dir", "x"])
    args.freeze_module_name = "layers.1."
    assert train_type.name == name and train_type.weights in ("whole", "adapter", "prefix")
    assert all(hasattr(args, flag) for flag in train_type.flags)
    assert name in test_launch.EXTRA
    config = mode.config_class.from_pretrained(GOLDEN_FOLDERS[mode_name], **train_type.config_changes(args))
    with torch.device("meta"):
        model = mode.model_class(config)
        assert train_type.problems([n for n, _ in model.named_parameters()], args) == []
        model = train_type.prepare(model, args)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    expected = {
        "freeze": lambda n: ".layers.1." in n,
        "ptuning": lambda n: ".prefix_encoder." in n,
        "lora": lambda n: "lora_" in n and "query_key_value" in n,
        "all": lambda n: True,
    }[name]
    assert trained == [n for n, _ in model.named_parameters() if expected(n)] and trained
    count, total = count_parameters(model)
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad) and count <= total


def test_patterns_match_whole_parts():
    assert matches("transformer.layers.27.mlp.weight", "layers.27.")
    assert matches("transformer.layers.2.mlp.weight", "layers.2")
    assert not matches("transformer.layers.27.mlp.weight", "layers.2")
    assert matches("a.mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h") and not matches("a.dense_h_to_4h.w", "dense")


def test_sizes_of_the_released_models():
    sizes = {"glm": 6_173_286_400, "glm2": 6_243_584_000, "glm3": 6_243_584_000}
    for name, mode in MODES.items():
        with torch.device("meta"):
            assert count_parameters(mode.model_class(mode.config_class()))[1] == sizes[name]


def imported(path):
    """Top-level names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_point_down():
    level_of = {name: level for level, names in enumerate(LEVELS) for name in names}
    for path in ROOT.glob("*.py"):
        assert path.stem in level_of, f"{path.name} is in no level"
        for name in imported(path):
            assert level_of.get(name, -1) <= level_of[path.stem], f"{path.name} imports {name}"
    for package in LEVELS[0]:
        for path in (ROOT / package).glob("*.py"):
            for name in imported(path):
                assert level_of.get(name, 0) == 0, f"{path} imports {name}"


def test_no_module_asks_for_a_mode_by_name():
    for path in [*ROOT.glob("*.py"), *(ROOT / "glm_common").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert 'mode == "' not in text and 'mode.name == "' not in text, path
