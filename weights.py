"""Files of weights: named, checked from their headers, read into a model, written."""

import copy
import json
import os
import sys
import zipfile
from contextlib import nullcontext

from modes import read_json
from utils import is_main

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAX_SHARD_SIZE = "5GB"


def weight_files(folder):
    """Names of the weight files: the single file, else those in an index; safetensors before .bin.

    ValueError for a file that is missing or a name that points out of the folder.
    """
    for single, index in zip(WEIGHT_FILES, INDEX_FILES):  # the order in which transformers looks
        if os.path.isfile(os.path.join(folder, single)):
            return [single]
        index_path = os.path.join(folder, index)
        if not os.path.isfile(index_path):
            continue
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index_path}: weight_map is not a table of file names: download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if os.path.basename(name) != name:
                raise ValueError(f"{index_path}: names {name!r}, outside its folder: do not use this checkpoint")
            if not os.path.isfile(os.path.join(folder, name)):
                raise ValueError(f"{folder}/{name}: missing, but {index} names it: download it again")
        if names:
            return names
    raise ValueError(f"{folder}: no weights in it (none of {', '.join((*WEIGHT_FILES, *INDEX_FILES))})")


def weight_shapes(folder):
    """{name: (shape, dtype name)} of all weights in a folder, from headers: no weight is read.

    ValueError for a truncated or unreadable file.
    """
    shapes = {}
    for name in weight_files(folder):
        path = os.path.join(folder, name)
        shapes.update(safetensors_shapes(path) if name.endswith(".safetensors") else bin_shapes(path))
    return shapes


def saved_dtype(folder):
    """torch dtype of the weights in a folder, float32 where they differ."""
    import torch

    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    found = {names.get(dtype, dtype) for _, dtype in weight_shapes(folder).values()}
    return getattr(torch, found.pop()) if len(found) == 1 else torch.float32


def safetensors_shapes(path):
    """Names, shapes and dtypes in one .safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {
                key: (tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()) for key in file.keys()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not safetensors ({error}): download it again") from None


def bin_shapes(path):
    """Names, shapes and dtypes in one .bin file; nothing but tensors is unpickled."""
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds more than tensors, or is no weight file: it is not read, since that could run code of"
            " others: do not use it"
        ) from None
    except Exception as error:  # bytes that are no weights make the reader fail in many ways
        reason = f"{type(error).__name__} while reading"
        raise ValueError(f"{path}: truncated or not a weight file ({reason}): download it again") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: not a weight file (not a plain table of tensors): download it again")
    return {key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in state.items()}


def empty_model(mode, config):
    """The model without memory: its names and shapes."""
    import torch

    with torch.device("meta"):
        return mode.model_class(config)


def check_weights(folder, mode, config, new_prefix=False):
    """Do the files hold what this model needs? Returns the parameter names; ValueError names the difference.

    The released rotary buffers and a stored copy of a tied output layer are allowed, and with `new_prefix` a missing
    prefix encoder (training makes it, or it lies elsewhere).
    """
    model = empty_model(mode, config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    found = weight_shapes(folder)
    found = {name: value for name, value in found.items() if not name.endswith("inv_freq")}
    missing = [n for n in wanted if n not in found and n not in tied]
    if new_prefix:
        missing = [n for n in missing if "prefix_encoder." not in n]
    unexpected = [n for n in found if n not in wanted]
    wrong_shape = [n for n in wanted if n in found and found[n][0] != wanted[n]]
    integers = [n for n in found if "int" in found[n][1].lower() or found[n][1].startswith(("I", "U"))]
    if wrong_shape:
        name = wrong_shape[0]
        raise ValueError(
            f"{folder}: {name} has shape {list(found[name][0])}, --mode {mode.name} with this config.json needs"
            f" {list(wanted[name])}{and_others(wrong_shape)}: the files do not belong together"
        )
    if integers:
        raise ValueError(f"{folder}: {integers[0]} is quantised ({found[integers[0]][1]}): use the fp16 release")
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing{and_others(missing)}: download the checkpoint again")
    if unexpected:
        hint = "it is a prefix encoder's checkpoint" if "prefix_encoder." in unexpected[0] else "wrong --mode or files"
        raise ValueError(f"{folder}: {unexpected[0]} is not of --mode {mode.name}{and_others(unexpected)}: {hint}")
    return list(dict(model.named_parameters()))


def and_others(names):
    """' (and 3 others)', or nothing."""
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def load_base(folder, mode, config, dtype, device="cpu", ds_config=None, attn_implementation=None):
    """A released or whole saved checkpoint as a model in `dtype` and in eval mode. Collective under ZeRO-3.

    ds_config: DeepSpeed's configuration. With stage 3 every rank reads and holds its own part of each weight, in the
    place that the configuration names; otherwise all weights go to `device`, one by one. Weights other than a new
    prefix must all be there: ValueError names the difference.
    """
    import torch

    config = copy.deepcopy(config)  # what is set here belongs to this model alone
    config.name_or_path = folder
    config.dtype = dtype
    config._attn_implementation = attn_implementation
    generation_config = read_generation_config(folder)
    is_split = ds_config is not None and ds_config.get("zero_optimization", {}).get("stage") == 3
    model = split_model(mode, config, ds_config) if is_split else allocated_model(mode, config, dtype, device)
    if config.pre_seq_len:
        new_prefix(model, is_split)  # what the files hold of it is put over this

    tied = set(model.all_tied_weights_keys)  # the stored copy is not read
    wanted = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    put = put_part if is_split else put_whole
    missing, unexpected, wrong = set(wanted), [], []
    with torch.no_grad(), progress_bar(len(wanted)) as bar:
        for name, shape, rows in stored_tensors(folder):
            parameter = wanted.get(name)
            if parameter is None:
                if name not in tied and not name.endswith("inv_freq"):
                    unexpected.append(name)
            elif shape != tuple(getattr(parameter, "ds_shape", parameter.shape)):
                wrong.append(name)
            else:
                put(parameter, rows)
                bar.update()
            missing.discard(name)
    missing = sorted(name for name in missing if "prefix_encoder." not in name)
    if missing or unexpected or wrong:
        raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}, wrong {wrong}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_meta and tensor.dtype == dtype, f"{name} is {tensor.dtype} on {tensor.device}, not {dtype}"
    if generation_config is not None:
        model.generation_config = generation_config
    return model.eval()


def read_generation_config(folder):
    """The settings in generation_config.json, None without one."""
    from transformers import GenerationConfig

    path = os.path.join(folder, "generation_config.json")
    return GenerationConfig.from_dict(read_json(path)) if os.path.isfile(path) else None


def allocated_model(mode, config, dtype, device):
    """The model with memory of its own on the device, still to be filled."""
    import torch

    model = empty_model(mode, config)
    for name, parameter in list(model.named_parameters()):  # a tied weight comes once
        module_name, _, leaf = name.rpartition(".")
        memory = torch.empty_like(parameter, dtype=dtype, device=device)
        setattr(model.get_submodule(module_name), leaf, torch.nn.Parameter(memory))
    model.tie_weights()
    return model


def split_model(mode, config, ds_config):
    """The model with each parameter split over the ranks (ZeRO-3), still to be filled."""
    import deepspeed
    from transformers.initialization import no_init_weights

    # The precision comes from the configuration too: zero.Init's `dtype` is not heeded on every accelerator.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = mode.model_class(config)
    model.tie_weights()  # left out above, with the initial weights
    return model


def new_prefix(model, is_split):
    """Give the prefix encoder new weights from torch's random generator.

    Each rank draws its own (`set_seed`), and what counts is what rank 0 drew: GatheredParameters sends it round under
    ZeRO-3, and otherwise DeepSpeed's engine sends round rank 0's whole model when it starts (`_broadcast_model`).
    """
    prefix_encoder = model.transformer.prefix_encoder
    together = nullcontext()
    if is_split:
        import deepspeed

        together = deepspeed.zero.GatheredParameters(list(prefix_encoder.parameters()), modifier_rank=0)
    with together:
        prefix_encoder.reset_parameters()


def stored_tensors(folder):
    """(name, shape, rows) of all stored tensors, file after file; rows[a:b] is the tensor of these rows.

    rows[a:b] is part of the mapped file, which is not read before it is used: copy it and let it go. Only a .bin file
    in the format of before torch 1.6 is read whole.
    """
    import torch
    from safetensors import safe_open

    for file_name in weight_files(folder):
        path = os.path.join(folder, file_name)
        if file_name.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    rows = file.get_slice(name)
                    yield name, tuple(rows.get_shape()), rows
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            for name in list(state):
                rows = state.pop(name)  # so that nothing of this file is held while the next one is read
                yield name, tuple(rows.shape), rows


def put_whole(parameter, rows):
    """Copy a stored tensor into a parameter, in the parameter's precision."""
    parameter.copy_(rows[:])


def put_part(parameter, rows):
    """Copy this rank's part of a stored tensor into a parameter that is split over the ranks (ZeRO-3). Collective.

    DeepSpeed cuts the flattened tensor into equal parts, `ds_tensor`, the last one padded.
    """
    part = parameter.ds_tensor
    if part.final_location is not None or parameter.ds_secondary_tensor is not None or hasattr(part, "ds_quant_scale"):
        # The part lies on a disk, or is quantised, or there is a second one: DeepSpeed makes these from the whole.
        put_from_main(parameter, rows)
        return
    start = min(parameter.ds_zero_partition_rank * part.ds_numel, parameter.ds_numel)
    stop = min(start + part.ds_numel, parameter.ds_numel)
    row_size = parameter.ds_numel // parameter.ds_shape[0]
    first_row = start // row_size
    flat = rows[first_row : -(-stop // row_size)].reshape(-1)
    part[: stop - start].copy_(flat[start - first_row * row_size : stop - first_row * row_size])
    part[stop - start :].zero_()


def put_from_main(parameter, rows):
    """Fill a split parameter from the first process, which alone reads the tensor. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        if is_main():
            parameter.copy_(rows[:])


def progress_bar(total):
    """A bar over the weights, on the first process and on a terminal only."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc="loading", unit="weight", leave=False, disable=not (is_main() and sys.stderr.isatty())
    )


def write_safetensors(state, path):
    """One .safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})


def write_weights(state, folder, max_shard_size=MAX_SHARD_SIZE):
    """model.safetensors, or shards with an index, under the released parameter names."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        write_safetensors({key: state[key] for key in keys}, os.path.join(folder, name))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(index, os.path.join(folder, INDEX_FILES[0]))


def write_json(value, path):
    """A JSON file, indented, with Chinese as it is."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")
