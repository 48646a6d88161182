"""The table of `--train_type`: which parameters train, and what of them is saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from modeling.family import Family


@dataclass(frozen=True)
class TrainType:
    """One way to fine-tune.

    flags: the flags that belong to it alone. config_changes(args): settings put into the model's configuration.
    unfit(family): why the family cannot be trained so, or None. problems(names, args, family): what is wrong with the
    flags for a model with these parameter names. prepare(model, args, family): freeze or wrap; returns the model to
    train.
    weights: "whole" checkpoints are saved complete, "adapter" and "prefix" as the trained weights alone.
    """

    name: str
    flags: tuple
    config_changes: Callable[[Namespace], dict]
    unfit: Callable[[Family], str | None]
    problems: Callable[[Sequence[str], Namespace, Family], list[str]]
    prepare: Callable[[PreTrainedModel, Namespace, Family], torch.nn.Module]
    weights: str


def split_names(text: str) -> list[str]:
    """'a,b' -> ['a', 'b']; empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def matches(name: str, pattern: str) -> bool:
    """Does a dotted pattern ("layers.27.", "mlp.dense_4h_to_h") match whole parts of a parameter's name?

    `layers.2` matches layer 2 and not layer 27.
    """
    return f".{pattern.strip('.')}." in f".{name}."


def freeze_problems(names: Sequence[str], args: Namespace, family: Family) -> list[str]:
    """Patterns of --freeze_module_name that match no parameter."""
    patterns = split_names(args.freeze_module_name)
    if not patterns:
        return [f"--freeze_module_name {args.freeze_module_name!r}: names no layer: for example layers.27.,layers.26."]
    start, word = f"{family.layers}.", family.layers.split(".")[-1]
    last = max(int(name.removeprefix(start).split(".")[0]) for name in names if name.startswith(start))
    return [
        f"--freeze_module_name {pattern}: matches no weight: this model has {word}.0. to {word}.{last}."
        for pattern in patterns
        if not any(matches(name, pattern) for name in names)
    ]


def freeze_prepare(model: PreTrainedModel, args: Namespace, family: Family) -> PreTrainedModel:
    """Only the named layers train."""
    patterns = split_names(args.freeze_module_name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(matches(name, pattern) for pattern in patterns))
    return model


def prefix_unfit(family: Family) -> str | None:
    """Why a family has no P-Tuning v2."""
    return None if family.prefix_encoder else f"{family.title} has no prefix encoder here"


def prefix_config(args: Namespace) -> dict:
    """A prefix encoder of --pre_seq_len virtual tokens."""
    return {"pre_seq_len": args.pre_seq_len, "prefix_projection": args.prefix_projection}


def prefix_prepare(model: PreTrainedModel, args: Namespace, family: Family) -> PreTrainedModel:
    """Only the prefix encoder trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{family.prefix_encoder}."))
    return model


def lora_problems(names: Sequence[str], args: Namespace, family: Family) -> list[str]:
    """Names in --lora_module_name that are no linear layer of this model."""
    modules = sorted({name.split(".")[-2] for name in names if name.endswith(".weight")} & set(family.lora_targets))
    wanted = split_names(args.lora_module_name)
    if not wanted:
        return [f"--lora_module_name {args.lora_module_name!r}: names no module: choose from {','.join(modules)}"]
    return [
        f"--lora_module_name {name}: matches no linear layer: choose from {','.join(modules)}"
        for name in wanted
        if name not in modules
    ]


def lora_prepare(model: PreTrainedModel, args: Namespace, family: Family) -> torch.nn.Module:
    """Low-rank matrices beside the named linear layers (Hu et al. 2021, arXiv:2106.09685); the base is frozen."""
    from peft import LoraConfig

    config = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=split_names(args.lora_module_name),
        bias="none",
        task_type="SEQ_2_SEQ_LM" if family.is_encoder_decoder else "CAUSAL_LM",
    )
    return add_lora(model, config)


def add_lora(model: PreTrainedModel, config: LoraConfig) -> torch.nn.Module:
    """The model with the matrices of a LoraConfig beside its layers."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from torch.nn import ModuleDict

    from modeling.fused_ops import SeededDropout

    # The engine decides the precision; one rule for ZeRO-2 and ZeRO-3.
    with_matrices = get_peft_model(model, config, autocast_adapter_dtype=False)
    for module in with_matrices.modules():
        if isinstance(module, LoraLayer) and config.lora_dropout:
            module.lora_dropout = ModuleDict({name: SeededDropout(config.lora_dropout) for name in module.lora_dropout})
    return with_matrices


def all_prepare(model: PreTrainedModel, args: Namespace, family: Family) -> PreTrainedModel:
    """Everything trains."""
    return model.requires_grad_(True)


def no_config_changes(args: Namespace) -> dict:
    """Nothing to change."""
    return {}


def no_problems(names: Sequence[str], args: Namespace, family: Family) -> list[str]:
    """Nothing to check."""
    return []


def fits_all(family: Family) -> None:
    """Every family can be trained so."""


TRAIN_TYPES = {
    "freeze": TrainType(
        name="freeze",
        flags=("freeze_module_name",),
        config_changes=no_config_changes,
        unfit=fits_all,
        problems=freeze_problems,
        prepare=freeze_prepare,
        weights="whole",
    ),
    "ptuning": TrainType(
        name="ptuning",
        flags=("pre_seq_len", "prefix_projection"),
        config_changes=prefix_config,
        unfit=prefix_unfit,
        problems=no_problems,
        prepare=prefix_prepare,
        weights="prefix",
    ),
    "lora": TrainType(
        name="lora",
        flags=("lora_dim", "lora_alpha", "lora_dropout", "lora_module_name"),
        config_changes=no_config_changes,
        unfit=fits_all,
        problems=lora_problems,
        prepare=lora_prepare,
        weights="adapter",
    ),
    "all": TrainType(
        name="all",
        flags=(),
        config_changes=no_config_changes,
        unfit=fits_all,
        problems=no_problems,
        prepare=all_prepare,
        weights="whole",
    ),
}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of weights; under ZeRO-3 the full sizes, not this rank's share."""
    trained = total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total
