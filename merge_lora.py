"""Merge a LoRA adapter into its base model: a plain checkpoint that any tool for these models reads.

    python merge_lora.py --model_dir output-glm3/epoch-2-step-3900

Base model, rank and mode are read from the run, of other tools' adapters from adapter_config.json and the base (or
--model_name_or_path and --mode). The merged run.json names the base that was really used.
"""

from __future__ import annotations

from runtime import entry  # first: Ctrl-C is heard while the others are imported

# isort: split

import argparse
import os
from typing import TYPE_CHECKING, Any

from checkpoints.bases import base_fingerprint
from checkpoints.kinds import MERGED
from checkpoints.opening import RUN_FILE, load_base_and_trained, open_checkpoint
from checkpoints.released_files import copy_companions, save_config
from checkpoints.weight_files import finite_problem, saved_dtype, write_weights
from flags.merge_lora import check_arguments, merge_parser, output_problems
from runtime.exits import UserError
from runtime.folders import last_named, new_folder
from runtime.holding import holding, require_there
from utils import choose_device, prepare_environment, torch_dtype, write_json

if TYPE_CHECKING:
    import torch

    from modeling.tokenizer import SentencePieceTokenizer

SAMPLE = "发动机水温高，风扇始终是低速转动，高速档不工作。"
TOLERANCE = 1e-3  # of the largest logit: adapter and merged model are the same function in float32


def main(argv: list[str]) -> None:
    """Merge, check, save."""
    args = merge_parser().parse_args(argv)
    prepare_environment(args.device)
    output_dir = args.output_dir or last_named(args.model_dir) + "-merged"
    check_arguments(args, output_dir)
    with holding(output_dir, "--output_dir", check=lambda: output_problems(output_dir)):
        merge(args, output_dir)


def merge(args: argparse.Namespace, output_dir: str) -> None:
    """From the checked flags to the merged folder."""
    opened = open_checkpoint(args.model_dir, args.mode, base=args.model_name_or_path, flag="--model_dir")
    config = opened.config()
    tokenizer = opened.tokenizer(config)
    dtype = saved_dtype(opened.base_folder) if args.precision == "auto" else torch_dtype(args.precision)
    device = choose_device(args.device)

    import torch

    # In float32 from end to end: the delta is added before anything is rounded to the checkpoint's precision.
    model: Any = load_base_and_trained(opened, config, torch.float32, device, args.allow_other_base).eval()
    ids = torch.tensor([opened.mode.prompt.encode_prompt(tokenizer, SAMPLE)[0]], device=device)
    with torch.no_grad():
        with model.disable_adapter():
            base_logits = model(input_ids=ids).logits
        adapter_logits = model(input_ids=ids).logits
        model = model.merge_and_unload()
        merged_logits = model(input_ids=ids).logits
        model = model.to(dtype).float()
        rounded_logits = model(input_ids=ids).logits
    check = compare(base_logits, adapter_logits, merged_logits, rounded_logits)
    run = {
        **opened.run,
        "mode": opened.mode.name,
        "weights": MERGED.name,
        "base_model": opened.base_name,
    }
    run |= {"merged_from": os.path.abspath(opened.folder), "merge_check": check}
    run["base_fingerprint"] = base_fingerprint(opened.base_folder, opened.mode, config)
    write_merged(model.to(dtype), tokenizer, output_dir, run, dtype)
    print(
        f"merged and adapter logits differ by at most {check['max_difference']:.2g} in float32 and by"
        f" {check['max_difference_saved']:.2g} as saved; the adapter moves the base's by {check['adapter_effect']:.2g}"
        f" (largest logit {check['max_logit']:.3g})"
    )
    print(f"saved {output_dir} ({str(dtype).removeprefix('torch.')})")


def compare(
    base_logits: torch.Tensor, adapter_logits: torch.Tensor, merged_logits: torch.Tensor, rounded_logits: torch.Tensor
) -> dict:
    """Largest differences of logits on the sample; UserError where the merged model answers differently."""
    check: dict[str, Any] = {
        "max_difference": (merged_logits - adapter_logits).abs().max().item(),
        "max_difference_saved": (rounded_logits - adapter_logits).abs().max().item(),
        "adapter_effect": (adapter_logits - base_logits).abs().max().item(),
        "max_logit": adapter_logits.abs().max().item(),
        "sample": SAMPLE,
    }
    if not check["max_difference"] <= TOLERANCE * max(1.0, check["max_logit"]):
        raise UserError(f"merged logits differ from the adapter's by {check['max_difference']}: nothing was saved")
    return check


def write_merged(model: Any, tokenizer: SentencePieceTokenizer, output_dir: str, run: dict, dtype: torch.dtype) -> None:
    """The merged checkpoint; its folder appears whole or not at all."""
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    if bad := finite_problem(state.items()):
        what = str(dtype).removeprefix("torch.")
        raise UserError(f"{bad} in {what}: use --precision bf16 or fp32: nothing was saved")
    require_there(output_dir)
    with new_folder(output_dir) as scratch:
        save_config(model.config, scratch, dtype)
        write_weights(state, scratch)
        copy_companions(model.config.name_or_path, scratch)
        tokenizer.save_pretrained(scratch)
        write_json(run, os.path.join(scratch, RUN_FILE))


if __name__ == "__main__":
    entry.run(main)
