"""The table of saved kinds: what a checkpoint folder can hold, how that is written, known again, and put onto a base.

An entry is all that there is to a kind: no other code asks which one it has. `SavedKind.name` is what run.json calls
it, and what `TrainType.weights` names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoints.adapter_settings import (
    ADAPTER_FILE,
    MATRIX,
    PREFIX_FILE,
    SETTINGS_FILE,
    adapter_flags,
    lora_config,
    read_settings,
)
from checkpoints.released_files import (
    copy_companions,
    prefix_bin_bytes,
    save_config,
    write_adapter_settings,
    write_prefix,
)
from checkpoints.weight_files import (
    INDEX_FILES,
    WEIGHT_FILES,
    disk_errors,
    stored_name,
    weight_shapes,
    weight_table,
    write_weights,
)
from modes import PREFIX_ENCODERS, is_prefix
from runtime.exits import UserError
from train_types import add_lora
from utils import read_json

if TYPE_CHECKING:
    import argparse

    import torch

    from checkpoints.opening import Opened

    Shapes = dict[str, tuple[tuple[int, ...], str]]  # {name: (shape, dtype name)}

NO_BASE_FIX = "name the base with --model_name_or_path"
WHOLE_FILES = (*WEIGHT_FILES, *INDEX_FILES)


@dataclass(frozen=True)
class SavedKind:
    """What a checkpoint can hold.

    files: names of the file with its weights, ours first, then other tools'; none for weights that need no base. marks:
    files that by their names alone say that a folder is of this kind. holds(name): is a parameter of a network part of
    it? lies_in(folder): does a folder without a run.json hold it? What follows takes an `Opened` checkpoint.
    """

    name: str
    words: str
    files: tuple[str, ...]
    marks: tuple[str, ...]
    holds: Callable[[str], bool]
    lies_in: Callable[[str], bool]
    # Saving: its files into a folder, from {name: tensor}; bytes that it takes besides its weights' own.
    write: Callable[[torch.nn.Module, str, dict[str, torch.Tensor], dict], None]
    more_bytes: Callable[[int], int]
    # Opening: the base that a folder of another tool names; what is wrong with its settings; its part of the
    # configuration, by run.json's folder or by its weights; the network that has room for it.
    named_base: Callable[[str], str]
    check: Callable[[Opened], None]
    config_changes: Callable[[Opened, Callable[[], Shapes]], dict]
    wrap: Callable[..., torch.nn.Module]
    # Going on: flags that a training on it takes over, from a folder; those that only its weights tell; how its
    # network is made to train, where the train type alone does not do it; what else one can do with it.
    flags: Callable[[str, bool], dict] | None
    flags_of_weights: Callable[[Opened, Shapes], dict]
    trains: Callable[[torch.nn.Module, Opened, Shapes, argparse.Namespace], torch.nn.Module] | None
    for_other_types: str
    # Why it cannot be merged, and why vLLM does not load it; None: it can, or does.
    not_mergeable: str | None
    not_for_vllm: str | None

    @property
    def needs_base(self) -> bool:
        """Does it lie on a base, which is kept elsewhere?"""
        return bool(self.files)

    @property
    def base_makes_it(self) -> bool:
        """Is it part of the network that its configuration describes, so that a base's files do not have it?"""
        return self.needs_base and not self.marks


def has(folder: str, *names: str) -> bool:
    """Is one of these files in the folder?"""
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


# Whole weights.


def write_whole(model: Any, folder: str, state: dict, run: dict) -> None:
    """All weights under the released names, with the base's own config.json and what lies beside it."""
    save_config(model.config, folder, next(iter(state.values())).dtype)
    write_weights(state, folder)
    copy_companions(model.config.name_or_path, folder)


def nothing(*args: Any) -> None:
    """Nothing to check."""


def no_changes(*args: Any) -> dict:
    """Nothing to change."""
    return {}


def as_it_is(model: torch.nn.Module, *args: Any, **changes: Any) -> torch.nn.Module:
    """The network has room for it already."""
    return model


def no_base(folder: str) -> str:
    """Whole weights lie on no base."""
    raise AssertionError(f"{folder}: holds whole weights")


# Adapters.


def adapter_lies_in(folder: str) -> bool:
    """By the names of its files alone. UserError where whole weights lie beside it."""
    if not has(folder, *ADAPTER_MARKS):
        return False
    if has(folder, *WHOLE_FILES):
        raise UserError(
            f"{folder}: holds an adapter ({SETTINGS_FILE}) and whole weights: move one of them to another folder"
        )
    return True


def write_adapter(model: Any, folder: str, state: dict, run: dict) -> None:
    """peft's files."""
    with disk_errors():
        model.save_pretrained(folder, state_dict=state)
    readme = os.path.join(folder, "README.md")  # peft's template of a model card, with nothing filled in
    if os.path.exists(readme):
        os.remove(readme)
    write_adapter_settings(folder, run["base_model"])


def base_of_adapter(folder: str) -> str:
    """What adapter_config.json says its base is: a folder, taken from where the command runs, or a hub name.

    Settings that cannot be obeyed are said first: no base helps there.
    """
    read_settings(folder, is_own=False)
    path = os.path.join(folder, SETTINGS_FILE)
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: base_model_name_or_path is {name!r}: {NO_BASE_FIX}")
    return os.path.expanduser(name)


def check_adapter(opened: Opened) -> None:
    """What is wrong with its settings is said before the weights are opened."""
    read_settings(opened.folder, bool(opened.run))


def wrap_adapter(model: Any, opened: Opened, shapes: Shapes, **changes: Any) -> torch.nn.Module:
    """The network with its matrices; UserError where peft finds no layer that the settings choose."""
    settings = lora_config(
        opened.folder,
        opened.trained_path,
        {name: shape for name, (shape, _) in shapes.items()},
        bool(opened.run),
        **changes,
    )
    try:
        return add_lora(model, settings)
    except ValueError as error:
        path = os.path.join(opened.folder, SETTINGS_FILE)
        raise UserError(f"{path}: {error}: it is of another base model") from None


def modules_of_adapter(opened: Opened, shapes: Shapes) -> dict:
    """The layers that its weights name: an expression may have chosen them."""
    modules = {match[1].split(".")[-1] for match in map(MATRIX.fullmatch, shapes) if match}
    return {"lora_module_name": ",".join(sorted(modules))}


def train_adapter(model: Any, opened: Opened, shapes: Shapes, args: argparse.Namespace) -> torch.nn.Module:
    """Its matrices train on; the dropout is the training's own."""
    return wrap_adapter(model, opened, shapes, inference_mode=False, lora_dropout=args.lora_dropout)


# Prefix encoders.


def prefix_lies_in(folder: str) -> bool:
    """By the file's name, or by the names of all weights, as the official code saves it."""
    if has(folder, PREFIX_FILE) or not has(folder, *WHOLE_FILES):
        return has(folder, PREFIX_FILE)
    names = [name for part in weight_table(folder).values() for name in part] or weight_shapes(folder)
    return all(is_prefix(stored_name(name)) for name in names)


def write_prefix_encoder(model: Any, folder: str, state: dict, run: dict) -> None:
    """Its weights and the base's config.json with its settings."""
    save_config(model.config, folder, next(iter(state.values())).dtype)
    write_prefix(state, folder)


def no_named_base(folder: str) -> str:
    """A prefix encoder of another tool does not say what its base is."""
    raise UserError(
        f"{folder}: holds a prefix encoder, which does not say what its base is: name it with --model_name_or_path"
    )


def settings_by_weights(shapes: Shapes) -> dict:
    """{"pre_seq_len", "prefix_projection"} by the weights of a prefix encoder."""
    names = [f"{start}embedding.weight" for start in PREFIX_ENCODERS]
    tables = [shape for name, (shape, _) in shapes.items() if name in names]
    return {
        "pre_seq_len": tables[0][0] if tables else 0,
        "prefix_projection": any(".trans." in name for name in shapes),
    }


def prefix_settings(opened: Opened, shapes: Callable[[], Shapes]) -> dict:
    """{"pre_seq_len", "prefix_projection"}: its config.json's, and of another tool's, which may leave them out, else
    those that the weights have."""
    path = os.path.join(opened.folder, "config.json")
    saved = read_json(path) if opened.run or os.path.isfile(path) else {}
    usual = {} if opened.run else settings_by_weights(shapes())
    changes = {}
    for key in ("pre_seq_len", "prefix_projection"):
        changes[key] = usual.get(key) if saved.get(key) is None else saved[key]
        if changes[key] is None:
            raise UserError(f"{path}: has no {key}, which the prefix encoder needs: copy the folder again")
    if type(changes["pre_seq_len"]) is not int or changes["pre_seq_len"] < 1:
        raise UserError(f"{path}: pre_seq_len = {changes['pre_seq_len']!r}: must be a whole number, 1 or more")
    if type(changes["prefix_projection"]) is not bool:
        raise UserError(f"{path}: prefix_projection = {changes['prefix_projection']!r}: must be true or false")
    return changes


def prefix_flags(folder: str, is_own: bool) -> dict:
    """{flag: value} of a prefix encoder's settings; what is wrong with them is said when it is opened."""
    saved = read_json(os.path.join(folder, "config.json"))
    return {name: saved.get(name) for name in ("pre_seq_len", "prefix_projection")}


ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.bin")
ADAPTER_MARKS = (SETTINGS_FILE, *ADAPTER_FILES)
KINDS = {  # in the order in which a folder without a run.json is looked at
    "adapter": SavedKind(
        name="adapter",
        words="an adapter",
        files=ADAPTER_FILES,
        marks=ADAPTER_MARKS,
        holds=lambda name: ".lora_" in name,
        lies_in=adapter_lies_in,
        write=write_adapter,
        more_bytes=lambda num_bytes: 0,
        named_base=base_of_adapter,
        check=check_adapter,
        config_changes=no_changes,
        wrap=wrap_adapter,
        flags=adapter_flags,
        flags_of_weights=modules_of_adapter,
        trains=train_adapter,
        for_other_types="for others merge it (python merge_lora.py --model_dir {path}) and give the merged folder",
        not_mergeable=None,
        not_for_vllm="and the server takes whole checkpoints: merge it first (python merge_lora.py --model_dir {path})",
    ),
    "prefix": SavedKind(
        name="prefix",
        words="a prefix encoder",
        files=(PREFIX_FILE, *WEIGHT_FILES),
        marks=(),
        holds=is_prefix,
        lies_in=prefix_lies_in,
        write=write_prefix_encoder,
        more_bytes=prefix_bin_bytes,
        named_base=no_named_base,
        check=nothing,
        config_changes=prefix_settings,
        wrap=as_it_is,
        flags=prefix_flags,
        flags_of_weights=no_changes,
        trains=None,
        for_other_types="for others give the base: a prefix encoder cannot be merged into it",
        not_mergeable="which cannot be merged",
        not_for_vllm="which vLLM does not know: use predict.py",
    ),
    "whole": SavedKind(
        name="whole",
        words="a whole model",
        files=(),
        marks=(),
        holds=lambda name: True,
        lies_in=lambda folder: True,
        write=write_whole,
        more_bytes=lambda num_bytes: 0,
        named_base=no_base,
        check=nothing,
        config_changes=no_changes,
        wrap=as_it_is,
        flags=None,
        flags_of_weights=no_changes,
        trains=None,
        for_other_types="",
        not_mergeable="which needs no merging",
        not_for_vllm=None,
    ),
}


MERGED = KINDS["whole"]  # what merging makes


def kind_of(folder: str) -> SavedKind:
    """What a folder without a run.json holds. UserError where it could be two."""
    return next(kind for kind in KINDS.values() if kind.lies_in(folder))


def marked_kind(folder: str) -> SavedKind | None:
    """The kind that files in a folder mark by their names alone."""
    return next((kind for kind in KINDS.values() if has(folder, *kind.marks)), None)


def weight_file(folder: str, kind: SavedKind) -> str:
    """Name of the file that holds the weights of what lies on a base."""
    for name in kind.files:
        if has(folder, name):
            return name
    raise UserError(f"{folder}: no weights in it (none of {', '.join(kind.files)}): copy the folder again")


def merge_problem(flag: str, folder: str, kind: SavedKind) -> str | None:
    """Why what a folder holds is not merged, and what to do with it; None where it is."""
    if kind.not_mergeable is None:
        return None
    base = " --model_name_or_path BASE" if kind.needs_base and not has(folder, "run.json") else ""
    use = f"use it as it is (python predict.py --model_path {folder}{base})"
    return f"{flag} {folder}: holds {kind.words}, {kind.not_mergeable}: {use}"
