"""What was trained on top of a base: weights of adapters and prefix encoders, read, checked and put onto the model."""

import os
import re

from checkpoints.adapter_settings import ADAPTER_FILE, PREFIX, PREFIX_FILE, SETTINGS_FILE, lora_config, read_settings
from checkpoints.base_weights import check_dtypes, empty_model, put_part, put_whole
from checkpoints.weight_files import WEIGHT_FILES, file_shapes, file_tensors, is_finite, not_finite, released_name
from runtime.exits import UserError
from train_types import add_lora

# {kind of weights: names of the file that holds them, the first one ours}
TRAINED_FILES = {"adapter": (ADAPTER_FILE, "adapter_model.bin"), "prefix": (PREFIX_FILE, *WEIGHT_FILES)}
PREFIX_ENCODER = "transformer.prefix_encoder."


def stored_name(name):
    """What a weight in the file of an adapter or a prefix encoder is called here, whatever tool saved it."""
    name = released_name(name)
    if ".lora_" not in name:
        return name
    return PREFIX + re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.removeprefix(PREFIX))


def with_our_names(found, path):
    """A table by `stored_name`; UserError where two of its weights have one name."""
    named = {stored_name(name): value for name, value in found.items()}
    if len(named) != len(found):
        raise UserError(f"{path}: holds the same weight under two names: save it again with the tool that made it")
    return named


def trained_shapes(opened):
    """{name: (shape, dtype name)} of what was trained, from the file's header. opened: an `Opened` checkpoint."""
    return with_our_names(file_shapes(opened.trained_path), opened.trained_path)


def trained_tensors(opened):
    """{name: tensor} of what was trained."""
    return with_our_names(file_tensors(opened.trained_path), opened.trained_path)


def prefix_settings(shapes):
    """{"pre_seq_len", "prefix_projection"} by the {name: (shape, dtype name)} of a prefix encoder."""
    table = shapes.get(f"{PREFIX_ENCODER}embedding.weight", ((0,), ""))[0]
    return {"pre_seq_len": table[0], "prefix_projection": any(".trans." in name for name in shapes)}


def trained_parameters(model, weights):
    """{name in the file: parameter} of what an adapter or a prefix encoder fills."""
    mark = {"adapter": ".lora_", "prefix": "prefix_encoder."}[weights]
    return {stored_name(name): parameter for name, parameter in model.named_parameters() if mark in name}


def check_trained(opened, config):
    """Names and shapes of an adapter or a prefix encoder against the model: {name: (shape, dtype name)}.

    UserError names what is missing, does not fit or cannot be obeyed. No weight is read.
    """
    import torch

    if opened.weights == "adapter":
        read_settings(opened.folder, bool(opened.run))  # what is wrong with these is said before the weights are opened
    found = trained_shapes(opened)
    check_dtypes(opened.trained_path, found)
    model = empty_model(opened.mode, config)
    if opened.weights == "adapter":
        settings = settings_of(opened, found)
        try:
            with torch.device("meta"):
                model = add_lora(model, settings)
        except ValueError as error:  # peft finds no layer that the settings choose
            path = os.path.join(opened.folder, SETTINGS_FILE)
            raise UserError(f"{path}: {error}: it is of another base model") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in trained_parameters(model, opened.weights).items()}
    check_shapes(wanted, {name: shape for name, (shape, _) in found.items()}, opened.trained_path)
    return found


def settings_of(opened, found, **changes):
    """peft's LoraConfig of an opened adapter with these weights."""
    shapes = {name: shape for name, (shape, _) in found.items()}
    return lora_config(opened.folder, opened.trained_path, shapes, bool(opened.run), **changes)


def put_trained(model, opened):
    """Put the weights of a checked adapter or prefix encoder onto a loaded base model; returns the model.

    Whole checkpoints are returned as they are. The adapter does not train.
    """
    if opened.weights == "adapter":
        model = add_lora(model, settings_of(opened, trained_shapes(opened)))
    if opened.weights != "whole":
        fill(model, opened)
    return model


def fill(model, opened):
    """Copy the stored values into the model's parameters, split over the ranks (ZeRO-3) or not. Collective if split.

    UserError where one is not finite.
    """
    import torch

    parameters, bad = trained_parameters(model, opened.weights), None
    with torch.no_grad():
        for name, tensor in trained_tensors(opened).items():
            put = put_part if hasattr(parameters[name], "ds_tensor") else put_whole
            if not put(parameters[name], tensor) and bad is None:
                bad = name, is_finite(tensor), parameters[name].dtype
    if bad:
        raise not_finite(opened.trained_path, *bad)


def check_shapes(wanted, found, path):
    """UserError that names the first difference between {name: shape} tables."""
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path}: {name} has shape {found.get(name, 'missing')}, the base model needs"
                f" {wanted.get(name, 'no such weight')}: it is of another base model or of other settings"
            )
