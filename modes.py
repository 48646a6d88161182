"""The table of `--mode`: one folder per model family. Adding a family is a folder and a line here."""

import importlib
import json
import os
from dataclasses import dataclass

from file_kinds import BROUGHT_ELSE, explain


@dataclass(frozen=True)
class Mode:
    """A family: where its code lives, and how its released config.json is recognised."""

    name: str
    package: str
    required_keys: tuple  # keys that every config.json of the family has
    released_name: str  # part of the released repository's name
    in_vllm: bool  # does vLLM have the network?

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
    "glm": Mode("glm", "glm1", ("inner_hidden_size", "max_sequence_length"), "chatglm-6b", False),
    "glm2": Mode("glm2", "glm2", ("padded_vocab_size", "multi_query_group_num"), "chatglm2", True),
    "glm3": Mode("glm3", "glm3", ("padded_vocab_size", "multi_query_group_num"), "chatglm3", True),
}


def possible_modes(folder):
    """Names of the modes that a checkpoint folder can be, the likeliest alone where its files name it.

    ChatGLM2 and ChatGLM3 have one network and the same keys; then the released name inside the files decides,
    and without one both are possible.
    """
    config = read_json(os.path.join(folder, "config.json"))
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


def read_json(path):
    """A JSON object from a file; ValueError that names the file otherwise."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        if os.path.isfile(path) and (said := explain(path, BROUGHT_ELSE)):
            raise ValueError(f"{path}: {said}") from None
        raise ValueError(f"{path}: cannot be read as JSON ({error}): give a complete file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is a {type(value).__name__}, not a JSON object")
    return value
