"""Checkpoints: gathered, written, checked."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Collection
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from checkpoints.bases import base_name
from checkpoints.kinds import KINDS
from checkpoints.opening import RUN_FILE
from checkpoints.weight_files import bin_shapes, finite_problem, safetensors_shapes
from modes import MODES
from runtime.distributed import on_main
from runtime.exits import BadNumbersError, UserError
from runtime.folders import file_entry, new_folder, require_space
from runtime.machine import versions
from runtime.ranks import is_main
from train_types import TRAIN_TYPES
from utils import write_json

if TYPE_CHECKING:
    from modeling.tokenizer import SentencePieceTokenizer
    from train_types import TrainType

TOKENIZER_BYTES = 4 << 20  # room for what lies beside the weights


def gather_weights(model: Any, names: Collection[str], zero3: bool) -> dict:
    """{name: CPU tensor} of the named parameters on rank 0, {} elsewhere. Collective under ZeRO-3."""
    import deepspeed

    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            with deepspeed.zero.GatheredParameters([parameter]) if zero3 else nullcontext():
                if is_main():
                    state[name] = parameter.detach().to("cpu", copy=True)
    return state


def checkpoint_bytes(model: Any, train_type: TrainType) -> int:
    """About what a checkpoint of this train type takes."""
    kind = KINDS[train_type.weights]
    sizes = [
        getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        for parameter in model.parameters()
        if parameter.requires_grad or not kind.needs_base
    ]
    return sum(sizes) + kind.more_bytes(sum(sizes)) + TOKENIZER_BYTES


def save_checkpoint(
    model: Any, tokenizer: SentencePieceTokenizer, folder: str, train_type: TrainType, run: dict, zero3: bool
) -> str | None:
    """Save a run's weights as the table of train types says; `folder` appears whole or not at all. Collective.

    lora: adapter_model.safetensors and adapter_config.json. ptuning: prefix_encoder.safetensors and config.json.
    freeze and all: a whole checkpoint under the released names. run.json and the manifest lie beside them all; all
    files are listed in docs/files.md.

    Returns, on every rank, why it could not be saved (a full disk: nothing has changed), or None. BadNumbersError where
    a weight is not finite.
    """
    whole = not KINDS[train_type.weights].needs_base
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if whole or p.requires_grad}
    try:
        on_main(lambda: require_space(folder, checkpoint_bytes(model, train_type), "a checkpoint"))
        state = gather_weights(model, names, zero3)
        if bad := on_main(lambda: finite_problem(state.items())):
            raise BadNumbersError(f"{bad}: {folder} was not saved")
        on_main(lambda: write_checkpoint(model, tokenizer, folder, train_type, run, state))
    except UserError as error:  # the same on all ranks
        return str(error)
    return None


def write_checkpoint(
    model: Any, tokenizer: SentencePieceTokenizer, folder: str, train_type: TrainType, run: dict, state: dict
) -> None:
    """The files of `save_checkpoint`, from gathered weights {name: tensor}."""
    with new_folder(folder) as scratch:
        KINDS[train_type.weights].write(model, scratch, state, run)
        tokenizer.save_pretrained(scratch)
        write_json(run, os.path.join(scratch, RUN_FILE))
        check_written(scratch, state)


def check_written(folder: str, state: dict) -> None:
    """Do the files hold as many tensors and values as they should? They are read back from their headers."""
    expected = len(state), sum(tensor.numel() for tensor in state.values())
    for ending, read in ((".safetensors", safetensors_shapes), (".bin", bin_shapes)):
        names = [name for name in os.listdir(folder) if name.endswith(ending)]
        shapes = [shape for name in names for shape, _ in read(os.path.join(folder, name)).values()]
        found = len(shapes), sum(map(math.prod, shapes))
        assert not names or found == expected, f"{folder}: {names}: tensors and values {found}, not {expected}"


def describe_run(args: argparse.Namespace, base_folder: str, precision: str, **progress: Any) -> dict:
    """What run.json says: enough to load the weights and to repeat the run."""
    vocabulary = os.path.join(base_folder, MODES[args.mode].tokenizer_class.vocab_files_names["vocab_file"])
    return {
        "mode": args.mode,
        "train_type": args.train_type,
        "weights": TRAIN_TYPES[args.train_type].weights,
        "base_model": base_name(args.model_name_or_path),
        **({"continued_from": args.continued_from} if getattr(args, "continued_from", None) else {}),
        "tokenizer_sha256": file_entry(vocabulary)["sha256"],
        "precision": precision,
        **progress,
        "flags": {n: value for n, value in sorted(vars(args).items()) if n not in ("local_rank", "continued_from")},
        "versions": versions(),
    }
