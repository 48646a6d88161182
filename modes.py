"""The table of `--mode`: one folder per model family. Adding a family is a folder and a line here."""

import importlib
import os
import re
from dataclasses import dataclass

from runtime.exits import UserError
from runtime.plain_files import open_plain
from utils import read_json


@dataclass(frozen=True)
class Mode:
    """A family: where its code lives, and how its released config.json is recognised."""

    name: str
    package: str
    required_keys: tuple  # keys that every config.json of the family has
    released_name: str  # part of the released repository's name
    vllm_values: dict | None  # config.json values that vLLM computes as released (others: otherwise); None: no network

    @property
    def config_class(self):
        """The family's `ChatGLMConfig`."""
        return importlib.import_module(f"{self.package}.configuration_chatglm").ChatGLMConfig

    @property
    def model_class(self):
        """The family's `ChatGLMForConditionalGeneration`."""
        return importlib.import_module(f"{self.package}.modeling_chatglm").ChatGLMForConditionalGeneration

    @property
    def tokenizer_class(self):
        """The family's `ChatGLMTokenizer`."""
        return importlib.import_module(f"{self.package}.tokenization_chatglm").ChatGLMTokenizer

    @property
    def prompt(self):
        """The family's prompt functions: a module that imports nothing heavy."""
        return importlib.import_module(f"{self.package}.prompt")


MODES = {
    "glm": Mode("glm", "glm1", ("inner_hidden_size", "max_sequence_length"), "chatglm-6b", None),
    "glm2": Mode("glm2", "glm2", ("padded_vocab_size", "multi_query_group_num"), "chatglm2", {"rope_ratio": 1}),
    "glm3": Mode("glm3", "glm3", ("padded_vocab_size", "multi_query_group_num"), "chatglm3", {}),
}

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


def other_family(folder, config):
    """What a checkpoint is, in words, if it is of a family that is known and not supported; else None."""
    model_type = config.get("model_type")
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


def is_tiktoken(path):
    """Does a tokenizer file begin with a token in base64 and its rank, as tiktoken's do?"""
    try:
        with open_plain(path) as file:
            return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", file.read(4096)) is not None
    except OSError:
        return False


def possible_modes(folder):
    """Names of the modes that a checkpoint folder can be, the likeliest alone where its files name it.

    ChatGLM2 and ChatGLM3 have the same weights and keys; then the released name inside the files decides, and without
    one both are possible. UserError for a family that is known and not supported.
    """
    config_path = os.path.join(folder, "config.json")
    config = read_json(config_path)
    if other := other_family(folder, config):
        raise UserError(
            f"{config_path}: is of {other}, which is not supported by this toolkit: use ChatGLM-6B, ChatGLM2-6B or"
            " ChatGLM3-6B"
        )
    by_keys = [name for name, mode in MODES.items() if all(key in config for key in mode.required_keys)]
    run_path = os.path.join(folder, "run.json")
    if os.path.exists(run_path) and read_json(run_path).get("mode") in by_keys:
        return [read_json(run_path)["mode"]]
    said = str(config.get("_name_or_path", "")) + str(config.get("auto_map", ""))
    tokenizer_path = os.path.join(folder, "tokenizer_config.json")
    if os.path.exists(tokenizer_path):
        said += str(read_json(tokenizer_path).get("name_or_path", ""))
    by_name = [name for name in by_keys if MODES[name].released_name in said.lower()]
    return by_name if len(by_name) == 1 else by_keys
