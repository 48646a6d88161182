"""What a run stands on: its device and processes, its base, the network that trains."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoints.base_weights import check_weights, load_base
from checkpoints.bases import base_fingerprint
from checkpoints.kinds import KINDS
from checkpoints.opening import Opened, read_config, read_tokenizer
from checkpoints.saving import checkpoint_bytes
from checkpoints.states import state_bytes
from modeling.family import Family
from modeling.gradient_checkpointing import checkpoint_layers
from modes import MODES
from runtime.distributed import on_main
from runtime.exits import fail
from runtime.folders import require_space
from runtime.hosts import control_group, ending_in, start_distributed
from runtime.ranks import print_rank_0, rank, world_size
from train_types import TRAIN_TYPES, TrainType, count_parameters
from training.bad_numbers import keep_going_at_low_scale
from training.ds_config import check_config, complete_config, read_ds_file, wanted_precision
from training.going_on import check_start, put_start
from training.optimizer import Adam, build_optimizer, build_scheduler
from utils import choose_device, choose_precision, prepare_environment, torch_dtype

if TYPE_CHECKING:
    import torch

    from modeling.tokenizer import SentencePieceTokenizer
    from runtime.watchdog import Watch

ATTENTION = {"sdpa": "sdpa", "flex": "flex_attention", "eager": "eager"}  # the library's names


@dataclass(frozen=True)
class Setup:
    """What a run computes with. group: of the processes, for small numbers; ds_config: as --ds_file has it."""

    device: torch.device
    precision: str
    ds_config: dict
    rank: int
    world: int
    group: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch_dtype(self.precision)


def set_up(args: argparse.Namespace, watch: Watch) -> Setup:
    """Choose device and precision, and join the other processes. watch: what looks after them from here on."""
    prepare_environment(args.device)
    device = choose_device(args.device)
    if args.attention == "flex" and device.type == "cpu":
        fail("--attention flex: has no backward pass on a CPU: use --attention sdpa")
    ds_config = read_ds_file(args.ds_file)
    precision = choose_precision(wanted_precision(ds_config, args.precision), device)
    with ending_in(args.start_timeout):
        start_distributed(device, args.start_timeout)
        watch.start(args.output_dir, args.step_timeout)
        return Setup(device, precision, ds_config, rank(), world_size(), control_group(device))


@dataclass(frozen=True)
class Base:
    """The checkpoint that a run trains. start: the adapter or prefix encoder it goes on from, or None; fingerprint: of
    its weights, on the first process."""

    folder: str
    mode: Family
    train_type: TrainType
    config: Any
    tokenizer: SentencePieceTokenizer
    start: Opened | None
    fingerprint: Any


def open_base(args: argparse.Namespace, folder: str, start: Opened | None) -> Base:
    """Understand the base in a folder; UserError where its files, or the flags, do not fit. No weight is read but for
    the fingerprint."""
    mode, train_type = MODES[args.mode], TRAIN_TYPES[args.train_type]
    config = read_config(folder, mode, train_type.config_changes(args))
    names = check_weights(folder, mode, config, new_prefix=KINDS[train_type.weights].base_makes_it)
    if problems := train_type.problems(names, args, mode):
        fail(problems)
    check_start(start, config)
    tokenizer = read_tokenizer(folder, mode, config)
    its_fingerprint = on_main(lambda: base_fingerprint(folder, mode, config))
    return Base(folder, mode, train_type, config, tokenizer, start, its_fingerprint)


def build_engine(
    args: argparse.Namespace, base: Base, setup: Setup, adam: Adam, num_steps: int, is_universal: bool
) -> tuple[Any, Any]:
    """(DeepSpeed's engine around the network that trains, the schedule of its learning rate). is_universal: it will
    load a state of another number of processes."""
    import deepspeed

    ds_config = complete_config(setup.ds_config, args, setup.world, setup.precision, load_universal=is_universal)
    check_config(ds_config, args.ds_file)
    model = load_model(args, base, setup, ds_config)
    optimizer = build_optimizer(model, args, base.mode.norms, adam.is_compiled)
    scheduler = build_scheduler(optimizer, args, num_steps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    keep_going_at_low_scale(engine)
    return engine, scheduler


def load_model(args: argparse.Namespace, base: Base, setup: Setup, ds_config: dict) -> torch.nn.Module:
    """The network with the base's weights, and what trains in it. Under ZeRO-3 the weights are split over the ranks
    while they load. UserError where there is no room for what it will leave on the disk."""
    base.config._attn_implementation = ATTENTION[args.attention]
    model = load_base(base.folder, base.mode, base.config, setup.dtype, setup.device, ds_config)
    if base.start:
        model = put_start(model, base.start, args)
    else:
        model = base.train_type.prepare(model, args, base.mode)
    if args.gradient_checkpointing:
        checkpoint_layers(model, args.gradient_checkpointing_interval)
    trained, total = count_parameters(model)
    print_rank_0(f"{args.train_type}: {trained:,} of {total:,} parameters are trainable ({trained / total:.4%})")
    sizes = [checkpoint_bytes(model, base.train_type), state_bytes(trained, setup.dtype) if args.save_state_step else 0]
    what = "a checkpoint and a state" if args.save_state_step else "a checkpoint"
    on_main(lambda: require_space(args.output_dir, sum(sizes), what))
    return model
