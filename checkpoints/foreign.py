"""Folders that other tools saved: adapters of peft, alone or among a trainer's files, and official prefix encoders.

They have no run.json. Of the files in them only those named here are opened, so no trainer's pickle is ever read.
"""

import os

from checkpoints.adapter_settings import PREFIX_FILE, SETTINGS_FILE, read_settings
from checkpoints.trained_weights import PREFIX_ENCODER, TRAINED_FILES, stored_name
from checkpoints.weight_files import INDEX_FILES, WEIGHT_FILES, weight_shapes, weight_table
from runtime.exits import UserError
from utils import read_json

NO_BASE_FIX = "name the base with --model_name_or_path"
WHOLE = (*WEIGHT_FILES, *INDEX_FILES)


def has(folder, *names):
    """Is one of these files in the folder?"""
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def holds_adapter(folder):
    """Is it the folder of an adapter? By the names of its files alone."""
    return has(folder, SETTINGS_FILE, *TRAINED_FILES["adapter"])


def foreign_kind(folder):
    """ "adapter", "prefix" or "whole": what a folder without a run.json holds. UserError where it could be two."""
    if holds_adapter(folder):
        if has(folder, *WHOLE):
            raise UserError(
                f"{folder}: holds an adapter ({SETTINGS_FILE}) and whole weights: move one of them to another folder"
            )
        return "adapter"
    if has(folder, PREFIX_FILE):
        return "prefix"
    if not has(folder, *WHOLE):
        return "whole"
    table = weight_table(folder)
    names = [name for part in table.values() for name in part] or weight_shapes(folder)
    return "prefix" if all(stored_name(name).startswith(PREFIX_ENCODER) for name in names) else "whole"


def foreign_file(folder, kind):
    """Name of the file that holds an adapter's or a prefix encoder's weights."""
    for name in TRAINED_FILES[kind]:
        if has(folder, name):
            return name
    raise UserError(f"{folder}: no weights in it (none of {', '.join(TRAINED_FILES[kind])}): copy the folder again")


def named_base(folder, kind):
    """What a folder says its base is: a folder, taken from where the command runs, or a hub name. UserError without.

    Settings that cannot be obeyed are said first: no base helps there.
    """
    if kind == "prefix":
        raise UserError(
            f"{folder}: holds a prefix encoder, which does not say what its base is: name it with --model_name_or_path"
        )
    read_settings(folder, is_own=False)
    path = os.path.join(folder, SETTINGS_FILE)
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: base_model_name_or_path is {name!r}: {NO_BASE_FIX}")
    return os.path.expanduser(name)


def not_mergeable(flag, folder, kind):
    """Why what a folder holds is not merged, and what to do with it; None for an adapter."""
    if kind == "adapter":
        return None
    use = f"use it as it is (python predict.py --model_path {folder}"
    if kind == "whole":
        return f"{flag} {folder}: holds a whole model, which needs no merging: {use})"
    base = "" if has(folder, "run.json") else " --model_name_or_path BASE"
    return f"{flag} {folder}: holds a prefix encoder, which cannot be merged: {use}{base})"
