"""Adapters as peft saves them, on the reference checkpoints."""

import torch
from peft import LoraConfig, get_peft_model
from refusing import change_json

from modes import LORA_TARGETS

CPU = torch.device("cpu")
LAST = "layers.1.mlp.dense_4h_to_h"
KINDS = {  # settings of peft that all have the function of an adapter
    "plain": {"target_modules": ["query_key_value", "dense"]},
    "rslora": {"target_modules": ["dense_h_to_4h"], "use_rslora": True, "init_lora_weights": "gaussian"},
    "all-linear": {"target_modules": list(LORA_TARGETS)},
    "regex": {"target_modules": r"(.*\.)+layers\.[02]\..*(dense|query_key_value)"},
    "layers": {"target_modules": ["dense_4h_to_h"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "parts": {"target_modules": ["mlp.dense_4h_to_h", LAST], "exclude_modules": ["layers.0.mlp.dense_4h_to_h"]},
    "patterns": {
        "target_modules": ["dense_4h_to_h", "query_key_value"],
        "rank_pattern": {LAST: 2, "query_key_value": 3},
        "alpha_pattern": {"dense_4h_to_h": 5},
    },
}


def adapted(golden, folder, name="plain", change=None):
    """peft's own model on a golden base; its adapter is saved as peft saves it, with a setting changed or not."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM", **KINDS[name]}
    model = get_peft_model(golden.model(), LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    change_json("adapter_config.json", **{"base_model_name_or_path": golden.folder, **(change or {})})(folder)
    return model
