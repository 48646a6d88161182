"""What was trained on top of a base: its weights read, checked and put onto the model, whatever kind it is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.base_weights import check_dtypes, empty_model, put_part, put_whole
from checkpoints.kinds import SavedKind
from checkpoints.weight_files import file_shapes, file_tensors, is_finite, not_finite, stored_name
from runtime.exits import UserError

if TYPE_CHECKING:
    import torch

    from checkpoints.kinds import Shapes
    from checkpoints.opening import Opened


def with_our_names(found: dict, path: str) -> dict:
    """A table by `stored_name`; UserError where two of its weights have one name."""
    named = {stored_name(name): value for name, value in found.items()}
    if len(named) != len(found):
        raise UserError(f"{path}: holds the same weight under two names: save it again with the tool that made it")
    return named


def trained_shapes(opened: Opened) -> Shapes:
    """{name: (shape, dtype name)} of what was trained, from the file's header."""
    return with_our_names(file_shapes(opened.trained_path), opened.trained_path)


def trained_tensors(opened: Opened) -> dict[str, torch.Tensor]:
    """{name: tensor} of what was trained."""
    return with_our_names(file_tensors(opened.trained_path), opened.trained_path)


def trained_parameters(model: torch.nn.Module, kind: SavedKind) -> dict[str, torch.nn.Parameter]:
    """{name in the file: parameter} of what the weights of this kind fill."""
    return {stored_name(name): parameter for name, parameter in model.named_parameters() if kind.holds(name)}


def check_trained(opened: Opened, config: object) -> Shapes:
    """Names and shapes of what was trained against the model: {name: (shape, dtype name)}.

    UserError names what is missing, does not fit or cannot be obeyed. No weight is read.
    """
    import torch

    opened.kind.check(opened)
    found = trained_shapes(opened)
    check_dtypes(opened.trained_path, found)
    model = empty_model(opened.mode, config)
    with torch.device("meta"):
        model = opened.kind.wrap(model, opened, found)
    wanted = {name: tuple(tensor.shape) for name, tensor in trained_parameters(model, opened.kind).items()}
    check_shapes(wanted, {name: shape for name, (shape, _) in found.items()}, opened.trained_path)
    return found


def put_trained(model: torch.nn.Module, opened: Opened) -> torch.nn.Module:
    """Put checked weights onto a loaded base model; returns the model. Whole checkpoints are returned as they are, and
    nothing trains."""
    if opened.kind.needs_base:
        model = opened.kind.wrap(model, opened, trained_shapes(opened))
        fill(model, opened)
    return model


def fill(model: torch.nn.Module, opened: Opened) -> None:
    """Copy the stored values into the model's parameters, split over the ranks (ZeRO-3) or not. Collective if split.

    UserError where one is not finite.
    """
    import torch

    parameters, bad = trained_parameters(model, opened.kind), None
    with torch.no_grad():
        for name, tensor in trained_tensors(opened).items():
            put = put_part if hasattr(parameters[name], "ds_tensor") else put_whole
            if not put(parameters[name], tensor) and bad is None:
                bad = name, is_finite(tensor), parameters[name].dtype
    if bad:
        raise not_finite(opened.trained_path, *bad)


def check_shapes(wanted: dict, found: dict, path: str) -> None:
    """UserError that names the first difference between {name: shape} tables."""
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path}: {name} has shape {found.get(name, 'missing')}, the base model needs"
                f" {wanted.get(name, 'no such weight')}: it is of another base model or of other settings"
            )
