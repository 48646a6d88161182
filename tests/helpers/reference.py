"""The small reference checkpoints, and the environment that all tests share."""

import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_FOLDERS = {"glm": GOLDEN / "glm1", "glm2": GOLDEN / "glm2", "glm3": GOLDEN / "glm3"}

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]


class Golden:
    """One family's reference checkpoint and numbers."""

    def __init__(self, mode_name):
        from safetensors.torch import load_file

        from modes import MODES

        self.mode = MODES[mode_name]
        self.folder = str(GOLDEN_FOLDERS[mode_name])
        self.tensors = load_file(os.path.join(self.folder, "golden.safetensors"))
        with open(os.path.join(self.folder, "golden.json"), encoding="utf-8") as file:
            self.values = json.load(file)

    def config(self, **changes):
        return self.mode.config_class.from_pretrained(self.folder, **changes)

    def model(self, dtype=None, attn_implementation=None, **changes):
        import torch

        return self.mode.model_class.from_pretrained(
            self.folder,
            config=self.config(**changes),
            dtype=dtype or torch.float32,
            attn_implementation=attn_implementation,
        ).eval()

    def tokenizer(self):
        return self.mode.tokenizer_class.from_pretrained(self.folder)

    def prefix_model(self, kind, **kwargs):
        """The model with the reference prefix encoder: kind is prefix_projection or prefix_embedding."""
        model = self.model(
            pre_seq_len=self.values[f"{kind}.pre_seq_len"], prefix_projection=kind == "prefix_projection", **kwargs
        )
        start = f"{kind}.weights."
        state = {k.removeprefix(start): t.float() for k, t in self.tensors.items() if k.startswith(start)}
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        return model
