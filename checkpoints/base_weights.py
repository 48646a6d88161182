"""The weights of a base into its network, on one process or split over many."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from checkpoints.weight_files import (
    DTYPES,
    FREE_GENERATION_KEYS,
    GENERATION_KEYS,
    file_of,
    is_finite,
    loading_bar,
    not_finite,
    stored_tensors,
    weight_shapes,
)
from modes import PREFIX_ENCODERS, is_prefix
from runtime.exits import UserError
from runtime.plain_files import shown
from runtime.ranks import is_main, print_rank_0
from runtime.streams import visible
from utils import read_json

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from modeling.family import Family

HINTS = (  # part of a weight's name that no model has: what it tells
    ("base_model.", "it was saved from a model with an adapter: merge it with the tool that made it"),
    (".lora_", "it is an adapter's: merge it with the tool that made it"),
    (".qweight", "it is quantised: use the fp16 release"),
)


def empty_model(mode: Family, config: Any) -> Any:
    """The model without memory: its names and shapes."""
    import torch

    with torch.device("meta"):
        return mode.model_class(config)


def check_weights(folder: str, mode: Family, config: Any, new_prefix: bool = False) -> list:
    """Do the files hold what this model needs? Returns the parameter names; UserError names the difference.

    The released rotary buffers and a stored copy of a tied output layer are allowed, and with `new_prefix` a missing
    prefix encoder (training makes it, or it lies elsewhere).
    """
    found = weight_shapes(folder)
    found = {name: value for name, value in found.items() if not name.endswith("inv_freq")}
    if found and all(map(is_prefix, found)):
        raise UserError(
            f"{folder}: holds a prefix encoder alone: name the base model that it was trained on; predict.py takes both"
            f" (python predict.py --model_path {folder} --model_name_or_path BASE)"
        )
    model = model_for(folder, mode, config, len(found))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    missing = [n for n in wanted if n not in found and n not in tied]
    if new_prefix:
        missing = [n for n in missing if not is_prefix(n)]
    unexpected = [n for n in found if n not in wanted]
    wrong_shape = [n for n in wanted if n in found and found[n][0] != wanted[n]]
    check_dtypes(folder, found)  # before the shapes: those of quantised weights differ, too
    if wrong_shape:
        name = wrong_shape[0]
        raise UserError(
            f"{folder}: {name} has shape {list(found[name][0])}, --mode {mode.name} with this config.json needs"
            f" {list(wanted[name])}{and_others(wrong_shape)}: the files do not belong together"
        )
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing{and_others(missing)}: download the checkpoint again")
    if unexpected:
        hint = hint_of(unexpected[0], found)
        raise UserError(f"{folder}: {unexpected[0]} is not of --mode {mode.name}{and_others(unexpected)}: {hint}")
    return list(dict(model.named_parameters()))


def hint_of(name: str, found: dict) -> str:
    """What a stored weight {name: (shape, dtype name)} tells that the model has no place for."""
    if is_prefix(name):
        rows = next((found[n][0][0] for n in found if n.removesuffix("embedding.weight") in PREFIX_ENCODERS), 0)
        return f"it is a prefix encoder's, and config.json has no pre_seq_len: set it to {rows}"
    return next((hint for part, hint in HINTS if part in name), "wrong --mode or files")


def check_dtypes(folder: str, found: dict) -> None:
    """UserError for the first weight of {name: (shape, dtype name)} that is not of 16 or 32 bits, floating point."""
    for name, (_, dtype) in found.items():
        if DTYPES.get(dtype, dtype) not in DTYPES.values():
            is_unusual = dtype.lower() in ("f64", "float64", "c64", "complex64", "complex128", "bool")
            kind = "of an unusual type" if is_unusual else "quantised"
            raise UserError(f"{folder}: {name} is {kind} ({dtype}): use the fp16 release")


def model_for(folder: str, mode: Family, config: Any, num_stored: int) -> Any:
    """The model without memory; UserError where config.json describes none, or more layers than weights are stored.

    Without the latter, making the layers one by one would never end.
    """
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if isinstance(config.num_hidden_layers, int) and config.num_hidden_layers > num_stored:
        raise UserError(
            f"{folder}/config.json: {key} = {config.num_hidden_layers}, but only {num_stored} weights are stored:"
            " the files do not belong together"
        )
    try:
        return empty_model(mode, config)
    except (ArithmeticError, RuntimeError, TypeError) as error:  # a size that is negative, 0, a fraction, or enormous
        raise UserError(f"{folder}/config.json: no network has these sizes ({error}): download it again") from None


def and_others(names: Sequence[str]) -> str:
    """' (and 3 others)', or nothing."""
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def load_base(
    folder: str,
    mode: Family,
    config: Any,
    dtype: torch.dtype,
    device: Any = "cpu",
    ds_config: dict | None = None,
) -> Any:
    """A released or whole saved checkpoint as a model in `dtype` and in eval mode. Collective under ZeRO-3.

    ds_config: DeepSpeed's configuration. With stage 3 every rank reads and holds its own part of each weight, in the
    place that the configuration names; otherwise all weights go to `device`, one by one. Weights other than a new
    prefix must all be there, and all must be finite: UserError names the difference. The attention is the one
    that `config._attn_implementation` names.
    """
    import torch

    config = copy.deepcopy(config)  # what is set here belongs to this model alone
    config.name_or_path = folder
    config.dtype = dtype
    generation_config = read_generation_config(folder)
    is_split = ds_config is not None and ds_config.get("zero_optimization", {}).get("stage") == 3
    model = split_model(mode, config, ds_config) if is_split else allocated_model(mode, config, dtype, device)
    if mode.prefix_encoder and config.pre_seq_len:
        new_prefix(model.get_submodule(mode.prefix_encoder), is_split)  # what the files hold of it is put over this

    tied = set(model.all_tied_weights_keys)  # the stored copy is not read
    wanted = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    put = put_part if is_split else put_whole
    missing, unexpected, wrong, bad = set(wanted), [], [], None
    with torch.no_grad(), loading_bar(len(wanted)) as bar:
        for name, shape, rows in stored_tensors(folder):
            parameter = wanted.get(name)
            if parameter is None:
                if name not in tied and not name.endswith("inv_freq"):
                    unexpected.append(name)
            elif shape != tuple(getattr(parameter, "ds_shape", parameter.shape)):
                wrong.append(name)
            else:
                if not put(parameter, rows) and bad is None:
                    bad = name, is_finite(rows[:])
                bar.update()
            missing.discard(name)
    lacking = sorted(name for name in missing if not is_prefix(name))
    if lacking or unexpected or wrong:
        raise UserError(f"{folder}: missing {lacking}, unexpected {unexpected}, wrong {wrong}")
    if bad:
        raise not_finite(os.path.join(folder, file_of(folder, bad[0])), *bad, dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype, f"{name} is {parameter.dtype}, not {dtype}"
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    if generation_config is not None:
        model.generation_config = generation_config
    return model.eval()


def read_generation_config(folder: str) -> GenerationConfig | None:
    """The settings in generation_config.json, None without one; UserError that names the file for wrong values."""
    from transformers import GenerationConfig

    path = os.path.join(folder, "generation_config.json")
    if not os.path.isfile(path):
        return None
    values = {name: value for name, value in read_json(path).items() if value is not None}
    unused = [name for name in values if name not in (*GENERATION_KEYS, *FREE_GENERATION_KEYS)]
    if unused:
        print_rank_0(f"note: {path}: not used here: {visible(', '.join(unused)[:200])}", file=sys.stderr)
    values = {name: value for name, value in values.items() if name in GENERATION_KEYS}
    for name, value in values.items():
        is_list = name == "eos_token_id" and isinstance(value, list)
        if not all(type(v) in (bool, int, float) and abs(v) < 1e9 for v in (value if is_list else [value])):
            raise UserError(f"{path}: {name} = {shown(value)}: must be a number, or true or false: fix or remove it")
    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:  # the class does not look at types before it uses them
        raise UserError(f"{path}: {error}: fix or remove it") from None


def allocated_model(mode: Family, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with memory of its own on the device, still to be filled."""
    import torch

    model = empty_model(mode, config)
    for name, parameter in list(model.named_parameters()):  # a tied weight comes once
        module_name, _, leaf = name.rpartition(".")
        memory = torch.empty_like(parameter, dtype=dtype, device=device)
        setattr(model.get_submodule(module_name), leaf, torch.nn.Parameter(memory))
    for module in model.modules():  # what is in no file, such as rotary frequencies, the network makes itself
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
            model._init_weights(module)
    model.tie_weights()
    return model


def split_model(mode: Family, config: Any, ds_config: Any) -> Any:
    """The model with each parameter split over the ranks (ZeRO-3), still to be filled."""
    import deepspeed
    from transformers.initialization import no_init_weights

    # The precision comes from the configuration too: zero.Init's `dtype` is not heeded on every accelerator.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = mode.model_class(config)
    model.tie_weights()  # left out above, with the initial weights
    return model


def new_prefix(prefix_encoder: Any, is_split: bool) -> None:
    """Give a prefix encoder new weights from torch's random generator.

    Each rank draws its own (`set_seed`), and what counts is what rank 0 drew: GatheredParameters sends it round under
    ZeRO-3, and otherwise DeepSpeed's engine sends round rank 0's whole model when it starts (`_broadcast_model`).
    """
    together = nullcontext()
    if is_split:
        import deepspeed

        together = deepspeed.zero.GatheredParameters(list(prefix_encoder.parameters()), modifier_rank=0)
    with together:
        prefix_encoder.reset_parameters()


def put_whole(parameter: Any, rows: Any) -> bool:
    """Copy a stored tensor into a parameter, in the parameter's precision. Is what it holds now finite?"""
    parameter.copy_(rows[:])
    return is_finite(parameter)


def put_part(parameter: Any, rows: Any) -> bool:
    """Copy this rank's part of a stored tensor into a parameter that is split over the ranks (ZeRO-3). Collective.

    DeepSpeed cuts the flattened tensor into equal parts, `ds_tensor`, the last one padded. Is this rank's part finite?
    """
    part = parameter.ds_tensor
    if part.final_location is not None or parameter.ds_secondary_tensor is not None or hasattr(part, "ds_quant_scale"):
        # The part lies on a disk, or is quantised, or there is a second one: DeepSpeed makes these from the whole.
        return put_from_main(parameter, rows)
    start = min(parameter.ds_zero_partition_rank * part.ds_numel, parameter.ds_numel)
    stop = min(start + part.ds_numel, parameter.ds_numel)
    row_size = parameter.ds_numel // parameter.ds_shape[0]
    first_row = start // row_size
    flat = rows[first_row : -(-stop // row_size)].reshape(-1)
    part[: stop - start].copy_(flat[start - first_row * row_size : stop - first_row * row_size])
    part[stop - start :].zero_()
    return is_finite(part)


def put_from_main(parameter: Any, rows: Any) -> bool:
    """Fill a split parameter from the first process, which alone reads the tensor. Collective. Is it finite there?"""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        return put_whole(parameter, rows) if is_main() else True
