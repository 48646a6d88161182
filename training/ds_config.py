"""The DeepSpeed JSON: found, read, checked against the flags, filled in."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from typing import Any

from runtime.exits import UserError
from training.optimizer import ADAM
from utils import read_json

SECTIONS = ("bf16", "fp16", "data_types", "optimizer", "optimizer.params")
# What DeepSpeed reads at the top of its file (its manual, "DeepSpeed Configuration JSON"), as far as it means something
# to this training; DeepSpeed itself passes over a name that it does not know.
NAMES = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
    bf16 fp16 data_types torch_autocast zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op disable_allgather
    checkpoint aio compile disable_python_gc steps_per_print wall_clock_breakdown memory_breakdown dump_state
    comms_logger flops_profiler tensorboard wandb comet csv_monitor timers
""".split()
INSTEAD = {"activation_checkpointing": "--gradient_checkpointing"}  # names that would do nothing here
CONFIG_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")


def find_ds_file(name: str) -> str:
    """Path of `--ds_file`: as given, or inside configs/. UserError where neither exists."""
    for path in (name, os.path.join(CONFIG_FOLDER, name)):
        if os.path.isfile(path):
            return path
    known = ", ".join(sorted(name for name in os.listdir(CONFIG_FOLDER) if name.startswith("ds_")))
    raise UserError(f"--ds_file {name}: no such file here or in configs/: use one of {known} or give a path")


def is_own_file(path: str) -> bool:
    """Is a file one of configs/, which come with the program?"""
    return os.path.dirname(os.path.abspath(path)) == CONFIG_FOLDER


def what_counts(config: Any) -> dict:
    """The part of a file that decides a run: without names that mean nothing, and without what flags give."""
    return {key: value for key, value in config.items() if key in NAMES and key not in ("optimizer", "checkpoint")}


def read_ds_file(name: str) -> dict:
    """The JSON object of `--ds_file`; UserError that names file and fault."""
    config = read_json(find_ds_file(name))
    for key in config:
        if key not in NAMES and not key.startswith("_"):  # a comment
            near = difflib.get_close_matches(key, NAMES, 1)
            fix = f"use {INSTEAD[key]}" if key in INSTEAD else f"did you mean {near[0]}?" if near else "remove it"
            raise UserError(f"--ds_file {name}: {key}: does nothing in this training: {fix}")
    for path in (
        "zero_optimization",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
    ) + SECTIONS:
        if not isinstance(value_at(config, path, {}), dict):
            raise UserError(f"--ds_file {name}: {path} is {value_at(config, path)!r}: it must be a section {{...}}")
    for path in ("bf16.enabled", "fp16.enabled"):
        if value_at(config, path) not in (True, False, "auto"):
            raise UserError(f'--ds_file {name}: {path} is {value_at(config, path)!r}: use true, false or "auto"')
    steps = config.get("steps_per_print", 1)
    if type(steps) is not int or steps < 1:
        raise UserError(f"--ds_file {name}: steps_per_print is {steps!r}: it must be a whole number of at least 1")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (2, 3):
        raise UserError(f"--ds_file {name}: zero_optimization.stage is {stage}: use 2 or 3")
    return config


def value_at(config: Any, path: str, default: Any = "auto") -> Any:
    """The value at a dotted path of the JSON; `default` where a part of the path is absent."""
    for key in path.split("."):
        if not isinstance(config, dict) or key not in config:
            return default
        config = config[key]
    return config


def values_of_flags(args: argparse.Namespace, world_size: int) -> dict:
    """{key path in the DeepSpeed JSON: (flag, value)} for everything that flags decide."""
    batch = args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": ("--per_device_train_batch_size", batch),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", accumulation),
        "train_batch_size": ("batch size x accumulation x processes", batch * accumulation * world_size),
        "gradient_clipping": ("--max_grad_norm", args.max_grad_norm),
        "optimizer.params.lr": ("--learning_rate", args.learning_rate),
        "optimizer.params.weight_decay": ("--weight_decay", args.weight_decay),
    }


def conflicts(config: Any, args: argparse.Namespace, world_size: int) -> list:
    """Problems: values that the file and the flags give differently ("auto" and equal values are fine)."""
    problems = []
    for path, (flag, value) in values_of_flags(args, world_size).items():
        found = value_at(config, path)
        if found != "auto" and found != value:
            problems.append(
                f"--ds_file {args.ds_file}: {path} is {found} but {flag} is {value}:"
                f" give it once (remove it from the file or set it to the same value)"
            )
    kind = value_at(config, "optimizer.type", "AdamW")
    if kind not in ("Adam", "AdamW"):
        problems.append(f"--ds_file {args.ds_file}: optimizer.type {kind}: only AdamW is built: remove the section")
    for name, value in value_at(config, "optimizer.params", {}).items():
        if f"optimizer.params.{name}" not in values_of_flags(args, world_size) and ADAM.get(name) != value:
            rule = f"it is always {ADAM[name]}" if name in ADAM else "train.py builds AdamW itself (--optimizer)"
            problems.append(f"--ds_file {args.ds_file}: optimizer.params.{name} is {value}: {rule}: remove it")
    if value_at(config, "zero_force_ds_cpu_optimizer", False) is True:
        problems.append(f"--ds_file {args.ds_file}: zero_force_ds_cpu_optimizer: use --optimizer deepspeed_cpu instead")
    if args.optimizer == "deepspeed_cpu" and not offloads(config):
        problems.append("--optimizer deepspeed_cpu: is for offload: choose an _offload --ds_file or --optimizer torch")
    if "scheduler" in config:
        problems.append(f"--ds_file {args.ds_file}: scheduler: use --lr_scheduler_type and --warmup_ratio instead")
    for precision in ("bf16", "fp16"):
        enabled = value_at(config, f"{precision}.enabled")
        if enabled not in ("auto", args.precision == precision) and args.precision != "auto":
            problems.append(
                f"--ds_file {args.ds_file}: {precision}.enabled is {enabled} but --precision is {args.precision}:"
                " give it once"
            )
    if value_at(config, "bf16.enabled") is True is value_at(config, "fp16.enabled"):
        problems.append(f"--ds_file {args.ds_file}: bf16.enabled and fp16.enabled: choose one")
    return problems


def wanted_precision(config: Any, precision: str) -> str:
    """--precision, or where that is auto the one that the file switches on."""
    if precision == "auto":
        for name in ("bf16", "fp16"):
            if value_at(config, f"{name}.enabled") is True:
                return name
    return precision


def complete_config(
    config: Any, args: argparse.Namespace, world_size: int, precision: str, load_universal: bool = False
) -> Any:
    """The configuration that DeepSpeed gets: the file, with what the flags decide filled in.

    load_universal: a state was converted for this number of processes and will be loaded.
    """
    config = json.loads(json.dumps(config))
    config.pop("optimizer", None)
    # One engine step is one update, whatever its number of micro-batches (the last one of an epoch may be short),
    # and the loss is already divided by the tokens of the whole update: DeepSpeed must not divide again.
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = args.per_device_train_batch_size * world_size
    config["gradient_clipping"] = args.max_grad_norm
    config.setdefault("steps_per_print", 2**31)
    for name in ("bf16", "fp16"):
        config[name] = {**config.get(name, {}), "enabled": name == precision}
    if precision == "fp16":
        config["fp16"] = {"loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, **config["fp16"]}
    # Gradients of many micro-batches are added up in float32 whatever the model's precision.
    config["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if load_universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config


def check_config(config: Any, name: str) -> None:
    """Refuse, in one line, a configuration that DeepSpeed itself refuses: `name` is the file that it came from."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--ds_file {name}: {place}: {first['msg']}: DeepSpeed refuses it") from error
    except (DeepSpeedConfigError, AssertionError) as error:
        raise UserError(f"--ds_file {name}: {' '.join(str(error).split())}: DeepSpeed refuses it") from error


def offloads(config: Any) -> Any:
    """Does the configuration keep optimizer state in host memory?"""
    return value_at(config, "zero_optimization.offload_optimizer.device", "none") != "none"
