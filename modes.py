"""The table of `--mode`: one folder per model family. Adding a family is a folder, and its name in FOLDERS."""

import importlib
import os
import re

from modeling.family import Family
from runtime.exits import UserError
from runtime.plain_files import open_plain
from utils import read_json

FOLDERS = ("glm1", "glm2", "glm3")
MODES: dict[str, Family] = {
    family.name: family for family in (importlib.import_module(folder).FAMILY for folder in FOLDERS)
}

# The linear layers of any family that can get matrices, by the last part of their names.
LORA_TARGETS = tuple(dict.fromkeys(target for mode in MODES.values() for target in mode.lora_targets))

PREFIX_ENCODERS = tuple(f"{mode.prefix_encoder}." for mode in MODES.values() if mode.prefix_encoder)

# Known by their model_type, to be refused by name: {model_type: what it is}.
OTHER_FAMILIES = {
    "glm": "GLM-4",
    "glm4": "GLM-4",
    "glm4v": "GLM-4V",
    "glm4_moe": "GLM-4.5",
    "llama": "LLaMA",
    "mistral": "Mistral",
    "baichuan": "Baichuan",
    "internlm": "InternLM",
    "internlm2": "InternLM2",
    "qwen": "Qwen",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "bloom": "BLOOM",
    "gpt2": "GPT-2",
    "bert": "BERT",
    "t5": "T5",
    "mt5": "mT5",
    "pegasus": "Pegasus",
}
CHATGLM_VOCABULARY = 65024  # padded_vocab_size of ChatGLM2-6B and ChatGLM3-6B
GLM4_VOCABULARY = 150000  # GLM-4 has 151552; its config.json has ChatGLM3's keys


def is_prefix(name: str) -> bool:
    """Is a parameter part of a prefix encoder?"""
    return name.startswith(PREFIX_ENCODERS)


def other_family(folder: str, config: dict) -> str | None:
    """What a checkpoint is, in words, if it is of a family that is known and not supported; else None."""
    model_type = config.get("model_type")
    if any(model_type in mode.model_types for mode in MODES.values()):
        return None
    if isinstance(model_type, str) and model_type in OTHER_FAMILIES:
        return f"{OTHER_FAMILIES[model_type]} (model_type = {model_type})"
    vocabulary = config.get("padded_vocab_size")
    if not isinstance(vocabulary, int) or vocabulary == CHATGLM_VOCABULARY:
        return None
    if vocabulary >= GLM4_VOCABULARY:
        return f"GLM-4 (padded_vocab_size = {vocabulary})"
    name = os.path.basename(os.path.normpath(str(config.get("_name_or_path", ""))))
    if re.match("glm-?4", name, re.IGNORECASE):
        return f"GLM-4 (_name_or_path = {name})"
    if is_tiktoken(os.path.join(folder, "tokenizer.model")):
        return "GLM-4 (tokenizer.model is a list of tokens in base64)"
    return None


def is_tiktoken(path: str) -> bool:
    """Does a tokenizer file begin with a token in base64 and its rank, as tiktoken's do?"""
    try:
        with open_plain(path) as file:
            return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", file.read(4096)) is not None
    except OSError:
        return False


def possible_modes(folder: str) -> list[str]:
    """Names of the modes that a checkpoint folder can be, the likeliest alone where its files name it.

    ChatGLM2 and ChatGLM3 have the same weights and keys; then the released name inside the files decides, and without
    one both are possible. UserError for a family that is known and not supported.
    """
    config_path = os.path.join(folder, "config.json")
    config = read_json(config_path)
    if other := other_family(folder, config):
        *titles, last = (mode.title for mode in MODES.values())
        raise UserError(
            f"{config_path}: is of {other}, which is not supported by this toolkit: use {', '.join(titles)} or {last}"
        )
    by_keys = [name for name, mode in MODES.items() if mode.recognises(config)]
    run_path = os.path.join(folder, "run.json")
    if os.path.exists(run_path) and read_json(run_path).get("mode") in by_keys:
        return [read_json(run_path)["mode"]]
    said = str(config.get("_name_or_path", "")) + str(config.get("auto_map", ""))
    tokenizer_path = os.path.join(folder, "tokenizer_config.json")
    if os.path.exists(tokenizer_path):
        said += str(read_json(tokenizer_path).get("name_or_path", ""))
    by_name = [name for name in by_keys if MODES[name].released_name in said.lower()]
    return by_name if len(by_name) == 1 else by_keys
