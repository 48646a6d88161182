"""Every entry of the tables is finished."""

import ast
import inspect

import pytest
import torch
from reference import GOLDEN_FOLDERS, ROOT

from checkpoints.kinds import KINDS
from flags.train import train_parser
from modeling.base_config import ReleasedConfig
from modeling.base_model import LabelledLM
from modeling.prefix_encoder import PrefixEncoder
from modes import MODES, possible_modes
from tests.commands import test_launch
from train_types import TRAIN_TYPES, count_parameters, matches
from training.optimizer import parameter_groups


@pytest.mark.parametrize("name", MODES)
def test_family_is_finished(name):
    family = MODES[name]
    assert name == family.name and family.title and name in GOLDEN_FOLDERS
    for required in ("config_class", "model_class", "tokenizer_class"):
        assert getattr(family, required).__module__.startswith(family.package + ".")
    assert issubclass(family.config_class, ReleasedConfig) and issubclass(family.model_class, LabelledLM)
    assert all(hasattr(family.config_class, key) for key in family.vllm_values or {})
    prompt = family.prompt
    assert prompt.RESERVED >= 3 and prompt.SUPERVISED_PROMPT_IDS in (0, 1)
    for function in ("encode_prompt", "encode_answer", "stop_ids", "clean_response"):
        assert inspect.getdoc(getattr(prompt, function))
    assert possible_modes(str(GOLDEN_FOLDERS[name])) == [name]
    assert any(case[0] == name for case in test_launch.CASES)


@pytest.mark.parametrize("name", MODES)
def test_names_of_a_family_are_those_of_its_network(name):
    """Layers, norms, linear layers, the prefix encoder, the fields of a batch, ids of its configuration."""
    family = MODES[name]
    changes = {"pre_seq_len": 2} if family.prefix_encoder else {}
    config = family.config_class.from_pretrained(GOLDEN_FOLDERS[name], **changes)
    with torch.device("meta"):
        model = family.model_class(config)
    layers = model.get_submodule(family.layers)
    assert len(layers) == config.num_hidden_layers
    linear = {name.split(".")[-1] for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(family.lora_targets) == linear
    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    assert norms and all(any(part in name for part in family.norms) for name in norms)
    decayed, _ = parameter_groups(model, 0.1, family.norms)
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    if family.prefix_encoder:
        assert isinstance(model.get_submodule(family.prefix_encoder), PrefixEncoder)
    assert set(family.batch_fields) <= set(inspect.signature(type(model).forward).parameters)
    assert [] != [name for name in family.special_ids if getattr(config, name, None) is not None]
    assert config.window == getattr(config, config.window_key) > 0


@pytest.mark.parametrize("name", TRAIN_TYPES)
@pytest.mark.parametrize("mode_name", MODES)
def test_train_type_is_finished(name, mode_name):
    """What trains is what the type says, on a network without memory."""
    train_type, mode = TRAIN_TYPES[name], MODES[mode_name]
    parser = train_parser()
    args = parser.parse_args(["--train_path", "x", "--model_name_or_path", "x", "--output_dir", "x"])
    args.freeze_module_name = "layers.1."
    assert train_type.name == name and train_type.weights in KINDS
    assert all(hasattr(args, flag) for flag in train_type.flags)
    assert name in test_launch.EXTRA
    config = mode.config_class.from_pretrained(GOLDEN_FOLDERS[mode_name], **train_type.config_changes(args))
    with torch.device("meta"):
        model = mode.model_class(config)
        assert train_type.problems([n for n, _ in model.named_parameters()], args, mode) == []
        model = train_type.prepare(model, args, mode)
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


def test_no_module_asks_for_a_mode_by_name():
    for path in [*ROOT.glob("*.py"), *(ROOT / "modeling").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert 'mode == "' not in text and 'mode.name == "' not in text, path


def names_asked(path):
    """Names of saved kinds that a source compares with, looks up, or has as keys, outside the table itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key]
        for part in parts:
            values = part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
            yield from (v.value for v in values if isinstance(v, ast.Constant) and v.value in KINDS)


def test_no_code_asks_for_a_saved_kind_by_name():
    """Adding one is an entry of the table: what differs between kinds is in it."""
    table = ROOT / "checkpoints" / "kinds.py"
    assert set(names_asked(table)) == set(KINDS)
    folders = {path.parent for path in ROOT.glob("*/*.py")} - {ROOT / "tests"}
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.glob("*.py"))]:
        if path != table:
            assert not set(names_asked(path)), path


@pytest.mark.parametrize("name", KINDS)
def test_saved_kind_is_finished(name):
    kind = KINDS[name]
    assert kind.name == name and kind.words.startswith("a")
    assert kind.needs_base == bool(kind.files) == bool(kind.flags) == bool(kind.for_other_types)
    assert any(train_type.weights == name for train_type in TRAIN_TYPES.values())
