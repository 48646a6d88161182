"""Files of weights: named, checked from their headers, read into a model, written."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from checkpoints.pickles import NotPlainError, TooLargeError, check_pickle
from runtime.exits import UserError
from runtime.file_kinds import BROUGHT_ELSE, explain
from runtime.plain_files import open_plain
from runtime.ranks import is_main
from runtime.streams import progress_bar
from utils import read_json, write_json

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # {name in safetensors: in torch} of what is read
MAX_SHARD_SIZE = "5GB"
# How safetensors and torch's writer of archives tell that the disk took less than it should.
DISK_WORDS = re.compile(r"os error (\d+)|PytorchStreamWriter failed|file write failed|unexpected pos \d+")
FINITE_PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}  # values that are looked at together
MOST_HEADER_BYTES = 8 << 20  # of a .safetensors file; a network's here has some ten thousand
# Keys of generation_config.json: what flags of predict.py decide, or what every release has; what says nothing.
GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "num_beams"),
    *("repetition_penalty", "max_length", "max_new_tokens", "num_return_sequences"),
)
FREE_GENERATION_KEYS = ("_from_model_config", "transformers_version")
# First parts of weights' names in the network inside `transformer.`, as it is stored where it was saved alone.
INNER_PARTS = (
    *("word_embeddings.", "layers.", "final_layernorm."),
    *("embedding.word_embeddings.", "encoder.layers.", "encoder.final_layernorm.", "output_layer."),
    *("rotary_pos_emb.", "prefix_encoder."),
)


PEFT_PREFIX = "base_model.model."  # in front of the model's own names in the weights of an adapter


def released_name(name: str) -> str:
    """The released name of a stored weight: without `module.` in front (torch's DataParallel), with `transformer.`."""
    name = name.removeprefix("module.")
    return f"transformer.{name}" if name.startswith(INNER_PARTS) else name


def stored_name(name: str) -> str:
    """What a weight in the file of an adapter or a prefix encoder is called here, whatever tool saved it."""
    name = released_name(name)
    if ".lora_" not in name:
        return name
    return PEFT_PREFIX + re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.removeprefix(PEFT_PREFIX))


def weight_files(folder: str) -> list[str]:
    """Names of the weight files: the single file, else those in an index; safetensors before .bin.

    UserError for a file that is missing or a name that points out of the folder.
    """
    return list(weight_table(folder))


def weight_table(folder: str) -> dict[str, list[Any]] | dict[Any, list[Any]]:
    """{file: names of the weights that the index places in it, none without an index}, as `weight_files` says.

    Other files in the folder are never opened. A file may be a link to elsewhere: the hub's cache consists of them,
    and an index, which is what a stranger writes, cannot make one.
    """
    for single, index in zip(WEIGHT_FILES, INDEX_FILES):  # the order in which transformers looks
        if os.path.isfile(os.path.join(folder, single)):
            return {single: []}
        index_path = os.path.join(folder, index)
        if not os.path.isfile(index_path):
            continue
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index_path}: weight_map is not a table of file names: download it again")
        table = {name: [] for name in sorted(set(weight_map.values()))}
        for name in table:
            if os.path.basename(name) != name:
                raise UserError(f"{index_path}: names {name!r}, outside its folder: do not use this checkpoint")
            if not os.path.isfile(os.path.join(folder, name)):
                raise UserError(f"{folder}/{name}: missing, but {index} names it: download it again")
        for weight, name in weight_map.items():
            table[name].append(weight)
        if table:
            return table
    raise UserError(f"{folder}: no weights in it (none of {', '.join((*WEIGHT_FILES, *INDEX_FILES))})")


def weight_shapes(folder: str) -> dict:
    """{name: (shape, dtype name)} of all weights in a folder, from headers: no weight is read.

    UserError for a truncated or unreadable file, and for files that are not of one checkpoint. A name in the index
    that no file holds is not said here: whether the model needs it, `check_weights` knows.
    """
    shapes, places, table = {}, {}, weight_table(folder)
    for file in table:
        for stored, value in file_shapes(os.path.join(folder, file)).items():
            name = released_name(stored)
            if name in shapes:
                raise UserError(f"{folder}: {name} is in both {places[name]} and {file}: download the checkpoint again")
            shapes[name], places[name] = value, file
    for file, names in table.items():
        for name in map(released_name, names):
            if places.get(name, file) != file:
                raise UserError(
                    f"{folder}: {name} is in {places[name]}, the index says {file}: the files do not belong together"
                )
    return shapes


def saved_dtype(folder: str) -> Any:
    """torch dtype of the weights in a folder, float32 where they differ."""
    import torch

    found = {DTYPES.get(dtype, dtype) for _, dtype in weight_shapes(folder).values()}
    return getattr(torch, found.pop()) if len(found) == 1 and found <= set(DTYPES.values()) else torch.float32


def file_shapes(path: str) -> dict:
    """{name: (shape, dtype name)} of one file of weights, as its names are stored."""
    return safetensors_shapes(path) if path.endswith(".safetensors") else bin_shapes(path)


def file_tensors(path: str) -> dict:
    """{name: tensor} of one file of weights, as its names are stored."""
    if not path.endswith(".safetensors"):
        return read_bin(path)
    from safetensors.torch import load_file

    return load_file(path)


def not_weights(path: str, usual: Any) -> str:
    """The line for a file that cannot be read: what it is instead, if that shows in its first bytes, else `usual`."""
    said = explain(path, BROUGHT_ELSE) if os.path.isfile(path) else None
    return f"{path}: {said or usual}"


def safetensors_shapes(path: str) -> dict:
    """Names, shapes and dtypes in one .safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_plain(path) as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER_BYTES:
            reason = f"truncated or not safetensors (a header of {size:,} bytes)"
            raise UserError(not_weights(path, f"{reason}: download it again"))
        with safe_open(path, framework="pt") as file:
            return {
                key: (tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()) for key in file.keys()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(not_weights(path, f"truncated or not safetensors ({error}): download it again")) from None


def bin_shapes(path: str) -> dict:
    """Names, shapes and dtypes in one .bin file."""
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in read_bin(path).items()}


def read_bin(path: str) -> dict:
    """{name: tensor} of one .bin file; nothing but tensors is unpickled.

    The tensors are parts of the mapped file, of which nothing is read before it is used. Only a file in the format
    of before torch 1.6 is read whole. UserError for tensors that claim more than the file holds.
    """
    import pickle

    import torch

    not_plain = f"{path}: not a weight file (not a plain table of tensors): download it again"
    try:
        check_pickle(path)
        is_archive = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's notes about kinds of tensors that are refused anyway
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except UserError:
        raise
    except TooLargeError:
        reason = "its tensors claim more than it holds, or it is compressed"
        raise UserError(f"{path}: {reason}: download it again") from None
    except NotPlainError:
        raise UserError(not_plain) from None
    except pickle.UnpicklingError:
        usual = "holds more than tensors, or is no weight file: it is not read, since that could run code of others"
        raise UserError(not_weights(path, f"{usual}: do not use it")) from None
    except Exception as error:  # bytes that are no weights make the reader fail in many ways
        reason = f"{type(error).__name__} while reading"
        raise UserError(not_weights(path, f"truncated or not a weight file ({reason}): download it again")) from None
    if not isinstance(state, dict) or not all(isinstance(n, str) and is_plain(t) for n, t in state.items()):
        raise UserError(not_plain)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    for name, size in sizes.items():
        if size > state[name].untyped_storage().nbytes():  # an expanded tensor: a few bytes claim a disk
            raise UserError(f"{path}: {name} claims more than is stored of it: do not use it")
    if sum(sizes.values()) > 2 * os.path.getsize(path):  # twice: a tied output layer may lie where its embedding does
        raise UserError(f"{path}: many weights lie in the same bytes of it: do not use it")
    return state


def is_plain(value: Any) -> Any:
    """Is it a tensor like those of a network: not sparse or nested, with data, and of no class of its own?"""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def stored_tensors(folder: str) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(released name, shape, rows) of all stored tensors, file after file; rows[a:b] is the tensor of these rows.

    rows[a:b] is part of the mapped file, which is not read before it is used: copy it and let it go. Only a .bin file
    in the format of before torch 1.6 is read whole.
    """
    from safetensors import safe_open

    for file_name in weight_files(folder):
        path = os.path.join(folder, file_name)
        if file_name.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    rows = file.get_slice(name)
                    yield released_name(name), tuple(rows.get_shape()), rows
        else:
            state = read_bin(path)
            for name in list(state):
                rows = state.pop(name)  # so that nothing of this file is held while the next one is read
                yield released_name(name), tuple(rows.shape), rows


def file_of(folder: str, name: str) -> str:
    """The file of a folder that holds a weight."""
    paths = {file: map(released_name, file_shapes(os.path.join(folder, file))) for file in weight_files(folder)}
    return next(file for file, names in paths.items() if name in names)


def not_finite(path: str, name: str, is_finite_there: bool, dtype: torch.dtype) -> UserError:
    """The error for a weight that holds NaN or an infinity: in its file, or (is_finite_there) only in this dtype."""
    if is_finite_there:
        what = str(dtype).removeprefix("torch.")
        return UserError(f"{path}: {name} is too large for {what}: use --precision bf16 or fp32")
    return UserError(
        f"{path}: {name} holds values that are not finite: the file is damaged, or of a training that went wrong: use"
        " another one"
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Are all values finite? A sum is quick and not finite if a value is not; it can also run over, hence two looks."""
    import torch

    if not tensor.is_floating_point():
        return True
    # In pieces, because the sum makes a float32 copy first; in large ones on a GPU, which is waited for.
    pieces = tensor.detach().reshape(-1).split(FINITE_PIECE.get(tensor.device.type, 1 << 24))
    return all(torch.isfinite(p.sum(dtype=torch.float32)) or torch.isfinite(p).all() for p in pieces)


def loading_bar(total: int) -> Any:
    """A bar over the weights, on the first process and on a terminal only."""
    return progress_bar(
        total=total, desc="loading", unit="weight", leave=False, disable=not (is_main() and sys.stderr.isatty())
    )


def finite_problem(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The first of (name, tensor) that holds an infinity or NaN, as a line; None without one."""
    bad = next((name for name, tensor in named_tensors if not is_finite(tensor)), None)
    return None if bad is None else f"{bad} holds values that are not finite"


def write_safetensors(state: dict, path: str) -> None:
    """One .safetensors file."""
    from safetensors.torch import save_file

    with disk_errors():
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})


def write_bin(state: dict, path: str) -> None:
    """One .bin file of plain tensors, as released ones are."""
    import torch

    with disk_errors(), open(path, "wb") as file:
        torch.save(dict(state), file)


@contextmanager
def disk_errors() -> Iterator[None]:
    """safetensors' and torch's errors for a full or broken disk as the OSError that it is; others stay."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not (found := DISK_WORDS.search(str(error))):
            raise
        raise OSError(int(found[1] or errno.EIO), str(error)) from None


def write_weights(state: dict, folder: str, max_shard_size: Any = MAX_SHARD_SIZE) -> None:
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
