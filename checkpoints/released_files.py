"""What lies beside saved weights so that other programs open the folder: docs/files.md says which program reads what.

The release's own files are copied from the base's folder as they lie there. Nothing of its code is run here.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from checkpoints.adapter_settings import PREFIX_FILE, SETTINGS_FILE
from checkpoints.weight_files import WEIGHT_FILES, write_bin, write_safetensors
from runtime.streams import size_text
from utils import read_json, write_json

if TYPE_CHECKING:
    import torch

# Beside whole checkpoints: the network's code for programs that run it, settings of generation, what licences ask for.
COMPANIONS = ("*.py", "generation_config.json", "LICENSE*", "MODEL_LICENSE*")
MOST_COMPANION_BYTES = 1 << 20  # of one file; the largest of a release has some ten thousand
# Keys of adapter_config.json since peft 0.5. peft up to 0.13 stops at a key that it does not know.
ADAPTER_KEYS = (
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern"),
)
PREFIX_BIN_FILE = WEIGHT_FILES[1]  # what the official code takes a prefix encoder from
MOST_PREFIX_BIN_BYTES = 256 << 20  # of a prefix encoder that is saved a second time under that name


def save_config(config: Any, folder: str, dtype: torch.dtype) -> None:
    """config.json: that of the base's folder, with the prefix's settings and the torch dtype of the weights.

    So the release's own keys stay as they are, `_name_or_path`, `auto_map` and `architectures` among them. A model
    that comes from no folder gets the keys of its configuration.
    """
    released = os.path.join(config.name_or_path, "config.json") if config.name_or_path else ""
    values = read_json(released) if os.path.isfile(released) else json.loads(config.to_json_string())
    values.pop("dtype", None)  # the name of torch_dtype since transformers 5, which takes both
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    if getattr(config, "pre_seq_len", None):
        values |= {"pre_seq_len": config.pre_seq_len, "prefix_projection": config.prefix_projection}
    write_json(values, os.path.join(folder, "config.json"))


def copy_companions(base_folder: str, folder: str) -> None:
    """Copy what COMPANIONS names; a file that is too large or a link out of the base's folder is told and left."""
    for name in sorted(os.listdir(base_folder)):
        path = os.path.join(base_folder, name)
        if not os.path.isfile(path) or not any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS):
            continue
        if not lies_in(path, base_folder):
            print(f"note: {path} is a link out of its folder: not copied into the checkpoint")
        elif os.path.getsize(path) > MOST_COMPANION_BYTES:
            print(f"note: {path} has {size_text(os.path.getsize(path))}: not copied into the checkpoint")
        else:
            shutil.copyfile(path, os.path.join(folder, name))


def lies_in(path: str, folder: str) -> bool:
    """Is a file, links followed, in the folder? In the hub's cache, also where the links of its folders lead."""
    places = [os.path.realpath(folder)]
    parent = os.path.dirname(places[0])
    if os.path.basename(parent) == "snapshots":
        places.append(os.path.join(os.path.dirname(parent), "blobs"))
    return os.path.dirname(os.path.realpath(path)) in places


def write_adapter_settings(folder: str, base_model: str) -> None:
    """Leave out of peft's adapter_config.json what older peft does not know, as far as it says nothing; name the base.

    base_model: the absolute path of a folder, or a hub name.
    """
    from peft import LoraConfig

    path = os.path.join(folder, SETTINGS_FILE)
    usual = LoraConfig().to_dict()
    values = {k: v for k, v in read_json(path).items() if k in ADAPTER_KEYS or v != usual.get(k)}
    values |= {"base_model_name_or_path": base_model, "target_modules": sorted(values["target_modules"])}
    write_json(dict(sorted(values.items())), path)


def write_prefix(state: dict, folder: str) -> None:
    """A prefix encoder {name: tensor} as safetensors and, unless it is large, as the official code loads it, too."""
    write_safetensors(state, os.path.join(folder, PREFIX_FILE))
    if prefix_bin_bytes(sum(tensor.nbytes for tensor in state.values())):
        write_bin(state, os.path.join(folder, PREFIX_BIN_FILE))


def prefix_bin_bytes(num_bytes: int) -> int:
    """Bytes of the second file of a prefix encoder of this size: 0 for a large one, which scripts/export_prefix.py
    writes when it is wanted."""
    return num_bytes if num_bytes <= MOST_PREFIX_BIN_BYTES else 0
