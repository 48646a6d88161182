"""adapter_config.json of a LoRA adapter, ours or another tool's: what is obeyed, what is refused by name.

A file of a stranger runs nothing here: no module that it names is imported, and none of its regular expressions is
matched. Where one chooses the modules, those are taken that the adapter's weights name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from checkpoints.weight_files import PEFT_PREFIX
from modes import LORA_TARGETS
from runtime.exits import UserError
from runtime.plain_files import shown
from utils import read_json

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX_FILE = "prefix_encoder.safetensors"
ADAPTER_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"

OWN_ADVICE = "copy the folder again"
ADVICE = "merge it with the tool that made it, then give the merged folder"
MATRIX = re.compile(rf"{re.escape(PEFT_PREFIX)}([\w.]+)\.lora_([AB])\.weight")
OTHER_TYPES = {  # peft_type: what that is
    "ADALORA": "AdaLoRA, whose ranks differ and carry a third weight",
    "IA3": "IA3, vectors that scale activations",
    "LOHA": "LoHa, Hadamard products",
    "LOKR": "LoKr, Kronecker products",
    "OFT": "OFT, rotations of the weights",
    "PREFIX_TUNING": "peft's own prefix tuning, which cannot be merged; train.py trains prefix encoders of its own",
    "PROMPT_TUNING": "prompt tuning, which cannot be merged; train.py trains prefix encoders of its own",
    "P_TUNING": "p-tuning of the input, which cannot be merged; train.py trains prefix encoders of its own",
    "VERA": "VeRA, vectors beside random matrices",
}


def is_names(value: Any) -> bool:
    """Is it a list of names, of modules or of their last dotted parts?"""
    return isinstance(value, list) and all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in value)


def is_number(value: Any) -> Any:
    """Is it a finite number of 0 or more?"""
    return type(value) in (int, float) and 0 <= value < math.inf


def is_targets(value: Any) -> Any:
    """Does it choose linear layers of these models: by name, all of them, or by an expression?"""
    if isinstance(value, str):
        return bool(value)
    return is_names(value) and value and {name.split(".")[-1] for name in value} <= set(LORA_TARGETS)


def is_pattern_table(value: Any, is_good: Callable) -> bool:
    """Is it a table {pattern: value}, or nothing?"""
    return value is None or isinstance(value, dict) and all(map(is_good, value.values()))


def is_rank(value: Any) -> bool:
    """Is it a whole number of at least 1?"""
    return type(value) is int and value >= 1


OBEYED = {  # key: (is its value good, rule)
    "r": (is_rank, "must be a whole number of at least 1"),
    "lora_alpha": (is_number, "must be a number of 0 or more"),
    "target_modules": (is_targets, f"must be names out of {', '.join(LORA_TARGETS)}, or an expression"),
    "use_rslora": (lambda value: value in (None, True, False), "must be true or false"),
    "rank_pattern": (lambda value: is_pattern_table(value, is_rank), "must be a table of whole numbers"),
    "alpha_pattern": (
        lambda value: is_pattern_table(value, is_number) and is_names([n.removeprefix("^") for n in value or {}]),
        "must be a table of numbers by the names of modules: expressions are not run here",
    ),
    "layers_to_transform": (
        lambda value: value is None
        or all(type(n) is int and n >= 0 for n in (value if isinstance(value, list) else [value])),
        "must be numbers of layers",
    ),
    "layers_pattern": (lambda value: not value or isinstance(value, (str, list)), "must be a name or names"),
    "exclude_modules": (lambda value: not value or isinstance(value, (str, list)), "must be a name or names"),
    "init_lora_weights": (
        lambda value: value in (None, True, False, "gaussian", "eva", "orthogonal"),
        "changes the base's weights too: convert the adapter with the tool that made it",
    ),
}
# Of no account for what the adapter computes. The class that auto_mapping names is never looked up.
FREE = (
    *("lora_dropout", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version"),
    *("auto_mapping", "runtime_config"),
)
REASONS = {  # key that is refused where it has another value than peft's usual one: why
    "bias": "biases of the base were trained too",
    "fan_in_fan_out": "is of layers with transposed weights, which these models do not have",
    "layer_replication": "repeats layers of the base",
    "lora_bias": "the matrices have biases",
    "loftq_config": "changes the base's weights too",
    "megatron_config": "is of another network",
    "modules_to_save": "whole layers were trained beside the matrices",
    "target_parameters": "weights of other layers were trained too",
    "trainable_token_indices": "vectors of tokens were trained too",
    "use_dora": "DoRA also rescales the base's weights",
}


def read_settings(folder: str, is_own: bool = True) -> dict:
    """Values of a folder's adapter_config.json as far as they are plain; UserError names what cannot be obeyed.

    Needs no library. is_own: train.py saved it, which decides what a message advises.
    """
    path, advice = os.path.join(folder, SETTINGS_FILE), OWN_ADVICE if is_own else ADVICE
    if not os.path.isfile(path):
        raise UserError(f"{path}: missing: {advice}")
    values = {"r": 8, "lora_alpha": 8, **read_json(path)}
    kind = values.get("peft_type")
    if kind != "LORA":
        what = OTHER_TYPES.get(kind, "no kind of adapter that is known here") if isinstance(kind, str) else "no name"
        end = f": {advice}" if "merged" not in what else ""
        raise UserError(f"{path}: peft_type = {shown(kind)}: must be LORA; this is {what}{end}")
    for key, (is_good, rule) in OBEYED.items():
        if not is_good(values.get(key)):
            raise UserError(f"{path}: {key} = {shown(values.get(key))}: {rule}: {advice}")
    return values


def lora_config(folder: str, weights_path: str, shapes: dict, is_own: bool = True, **changes: Any) -> LoraConfig:
    """peft's LoraConfig of a saved adapter; UserError names a setting, or a weight that does not fit the settings.

    weights_path: the file with its weights; shapes: {name: shape} of them, named as `stored_name` does. changes: other
    values than the settings have.
    """
    from peft import LoraConfig

    path, advice = os.path.join(folder, SETTINGS_FILE), OWN_ADVICE if is_own else ADVICE
    values, usual = read_settings(folder, is_own), LoraConfig().to_dict()
    for key, value in values.items():
        if key not in (*OBEYED, *FREE, "peft_type") and value and value != usual.get(key):
            reason = REASONS.get(key, "is not known here")
            raise UserError(f"{path}: {key} = {shown(value)}: {reason}: {advice}")
    ranks = module_ranks(weights_path, shapes, values, advice)
    patterns, excluded = values.get("layers_pattern") or [], values.get("exclude_modules") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if values["target_modules"] == "all-linear":
        values["target_modules"] = list(LORA_TARGETS)
    chosen = {"target_modules": values["target_modules"]}
    if isinstance(values["target_modules"], list) and is_names(patterns) and is_names(excluded):
        if values.get("layers_to_transform") is not None:
            chosen |= {"layers_to_transform": values["layers_to_transform"], "layers_pattern": patterns or None}
        chosen["exclude_modules"] = excluded or None
    else:  # an expression chooses, and the weights say what it chose
        chosen["target_modules"] = sorted(ranks)
    return LoraConfig(
        r=values["r"],
        lora_alpha=values["lora_alpha"],
        use_rslora=bool(values.get("use_rslora")),
        rank_pattern={module: rank for module, rank in sorted(ranks.items()) if rank != values["r"]},
        alpha_pattern=values.get("alpha_pattern") or {},
        bias="none",
        task_type="CAUSAL_LM",
        **{"inference_mode": True, **chosen, **changes},
    )


def module_ranks(path: str, shapes: dict, values: dict, advice: str) -> dict:
    """{module: rank} by the weights; UserError for a weight that is no matrix of a linear layer, or of another rank."""
    ranks, allowed = {}, {values["r"], *(values.get("rank_pattern") or {}).values()}
    for name, shape in shapes.items():
        match, said = MATRIX.fullmatch(name), f"{path}: {name}"
        if not match or match[1].split(".")[-1] not in LORA_TARGETS:
            what = "an embedding" if "lora_embedding" in name else "a layer that adapters do not change here"
            raise UserError(f"{said} is of {what}: {advice}")
        if 0 in shape:
            raise UserError(f"{said} is empty: it was saved under ZeRO-3 without its values: save it again there")
        if match[2] == "A":
            ranks[match[1]] = shape[0]
            if shape[0] not in allowed:
                raise UserError(f"{said} has shape {shape}, its r is {values['r']}: {advice}")
    if not ranks:
        raise UserError(f"{path}: no matrices of an adapter in it: {advice}")
    return ranks


def adapter_flags(folder: str, is_own: bool) -> dict:
    """{flag: value} of an adapter's settings."""
    values = read_settings(folder, is_own)
    dropout, targets = values.get("lora_dropout") or 0.0, values["target_modules"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{folder}/{SETTINGS_FILE}: lora_dropout = {dropout!r}: must be 0 or more and below 1")
    names = LORA_TARGETS if targets == "all-linear" else targets
    names = shown(names) if isinstance(names, str) else ",".join(sorted({name.split(".")[-1] for name in names}))
    return {
        "lora_dim": values["r"],
        "lora_alpha": float(values["lora_alpha"]),
        "lora_module_name": names,
        "lora_dropout": float(dropout),
    }
