"""What doctor.py says of a folder, and an adapter to look at."""

import argparse

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from reference import GOLDEN_FOLDERS
from safetensors.torch import save_file

from checkpoints import base_weights, inspection
from checkpoints.opening import read_config
from modes import MODES
from runtime import machine


def look(path, mode=None, full=False, facts=None, base=None):
    """The lines of a folder."""
    args = argparse.Namespace(mode=mode, full=full, model_name_or_path=base)
    return list(inspection.folder_lines(str(path), args, facts or machine.Facts()))


def text_of(lines, name):
    """The text of the line of this name."""
    return next(text for _, line, text in lines if line == name)


def bad(lines):
    """Texts of what is BAD."""
    return [text for mark, _, text in lines if mark == machine.BAD]


def spoilt(lines, *says):
    """Is something BAD, and told with these words?"""
    assert bad(lines) and all(word in " ".join(bad(lines)) for word in says), lines
    assert "loads" not in [name for _, name, _ in lines]
    return True


def adapter(sandbox, **run):
    """An adapter as train.py saves it."""
    path, mode = sandbox.adapter(**run), MODES["glm3"]
    model = get_peft_model(
        base_weights.empty_model(mode, read_config(str(GOLDEN_FOLDERS["glm3"]), mode)),
        LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].save_pretrained(path)
    with machine.quiet():
        state = {name: torch.zeros(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, path / "adapter_model.safetensors")
    return path
