"""Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B: the training story, from the flags to the saved weights.

    deepspeed --master_port 29500 train.py --train_path data/spo_0.json --model_name_or_path ChatGLM3-6B/ \
        --mode glm3 --train_type lora --output_dir ./output-glm3
"""

import os
import sys
import time

from arguments import ATTENTION, columns_of, folder_problems, length_problems, parse_train
from batches import Updates, collate, to_device
from checkpoint import (
    describe_run,
    read_config,
    read_tokenizer,
    resolve_folder,
    save_checkpoint,
)
from data_set import show_row
from ds_config import complete_config, offloads, read_ds_file, wanted_precision
from modes import MODES
from optimizer import build_optimizer, build_scheduler, choose_adam
from row_cache import describe_counts, load_rows
from run_log import RunLog
from tuning import TRAIN_TYPES, checkpoint_layers, count_parameters
from utils import (
    barrier,
    choose_device,
    choose_precision,
    fail,
    is_local_main,
    prepare_environment,
    print_rank_0,
    set_seed,
    start_distributed,
    stop_distributed,
    torch_dtype,
    world_size,
)
from weights import check_weights, load_base


def main(argv):
    """Train: from the flags to the saved weights."""
    # Flags, and everything that they alone can get wrong.
    args = parse_train(argv)
    prepare_environment(args.device)
    import deepspeed
    import torch
    import torch.distributed as dist

    device = choose_device(args.device)
    if args.attention == "flex" and device.type == "cpu":
        fail("--attention flex: has no backward pass on a CPU: use --attention sdpa")
    ds_config = read_ds_file(args.ds_file)
    precision = choose_precision(wanted_precision(ds_config, args.precision), device)
    dtype = torch_dtype(precision)
    start_distributed(device)
    rank, world = dist.get_rank(), world_size()
    set_seed(args.seed)

    # Checkpoint: names and shapes are checked before any weight is read.
    folder = resolve_folder(args.model_name_or_path)
    complete_mode(args, folder)
    mode, train_type = MODES[args.mode], TRAIN_TYPES[args.train_type]
    config = read_config(folder, mode, train_type.config_changes(args))
    names = check_weights(folder, mode, config, new_prefix=train_type.weights == "prefix")
    if problems := train_type.problems(names, args):
        fail(problems)
    tokenizer = read_tokenizer(folder, mode, config)
    is_compiled, optimizer_name = choose_adam(args.optimizer, offloads(ds_config), device)
    window = getattr(config, "max_sequence_length", None) or config.seq_length
    if args.max_len > window:
        fail(f"--max_len {args.max_len}: the model's window is {window} tokens: use at most {window}")

    # Rows: the first process of a host encodes them where that was not done before, the others wait for it.
    rows, counts = load_rows(
        args.train_path,
        columns_of(args),
        tokenizer,
        mode,
        args.max_len,
        args.max_src_len,
        args.is_skip,
        args.num_proc,
        encodes=is_local_main(),
    )
    if len(rows) < world:
        fail(f"--train_path: {len(rows)} rows for {world} processes: give at least one row to each, or start fewer")
    print_rank_0(describe_counts(counts, args.max_len, args.max_src_len, args.is_skip))
    print_rank_0(show_row(rows[0], tokenizer))
    updates = Updates(
        rows.lengths,
        rows.num_labels,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        rank,
        world,
        args.seed,
        pack_to=args.max_len if args.packing else None,
    )
    print_rank_0(updates.describe())
    num_steps = len(updates) * args.num_train_epochs

    # Model: under ZeRO-3 the weights are split over the ranks while they load.
    ds_config = complete_config(ds_config, args, world, precision)
    zero3 = ds_config["zero_optimization"]["stage"] == 3
    model = load_base(folder, mode, config, dtype, device, ds_config, ATTENTION[args.attention])
    model = train_type.prepare(model, args)
    if args.gradient_checkpointing:
        checkpoint_layers(model, args.gradient_checkpointing_interval)
    trained, total = count_parameters(model)
    print_rank_0(f"{args.train_type}: {trained:,} of {total:,} weights train ({trained / total:.4%})")

    # Engine.
    optimizer = build_optimizer(model, args, is_compiled)
    scheduler = build_scheduler(optimizer, args, num_steps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    unit = "packed sequences" if args.packing else "rows"
    print_rank_0(
        f"{args.mode} on {world} x {device.type}, {precision}, {args.ds_file}, {optimizer_name}: {num_steps} updates of"
        f" {updates.sequences_per_update} {unit}, {len(updates)} in each of {args.num_train_epochs} epochs"
    )

    def save(epoch, step):
        """Write the trained weights; all ranks take part."""
        path = os.path.join(args.output_dir, f"epoch-{epoch + 1}-step-{step}")
        run = describe_run(
            args, folder, precision, epoch=epoch + 1, step=step, trained_weights=trained, all_weights=total
        )
        save_checkpoint(engine.module, tokenizer, path, train_type, run, zero3)
        barrier()
        print_rank_0(f"\nsaved {path}")

    # The loop. A step is one optimizer update.
    log = RunLog(args.output_dir, num_steps)
    step = num_applied = 0
    window_loss, window_labels, window_tokens, window_start = torch.zeros((), device=device), 0, 0, time.time()
    engine.train()
    for epoch in range(args.num_train_epochs):
        for update in updates.epoch(epoch):
            for i, row_numbers in enumerate(update.micro_batches):
                micro_batch = [rows[n] for n in row_numbers]
                batch = to_device(collate(micro_batch, config.pad_token_id, args.packing), device)
                engine.set_gradient_accumulation_boundary(i == len(update.micro_batches) - 1)
                # The sum over this batch's supervised tokens, divided by those of the whole update. Gradients are
                # averaged over the ranks afterwards, hence the factor: any split gives the same gradient.
                loss = engine(**batch, num_items_in_batch=update.num_labels / world).loss
                engine.backward(loss, scale_wrt_gas=False)
                window_loss += loss.detach() * (update.num_labels / world)
                window_tokens += sum(len(row["input_ids"]) for row in micro_batch)
            rate = scheduler.get_last_lr()[0]
            engine.step()
            step += 1
            num_applied += engine.was_step_applied()
            window_labels += update.num_labels
            log.advance()

            if step % args.show_loss_step == 0 or step == num_steps:
                dist.all_reduce(window_loss)
                norm = engine.get_global_grad_norm()
                log.record(
                    step,
                    epoch=step / len(updates),
                    loss=window_loss.item() / window_labels,
                    learning_rate=rate,
                    grad_norm=None if norm is None else float(norm),
                    tokens_per_second=window_tokens * world / (time.time() - window_start),
                )
                window_loss.zero_()
                window_labels, window_tokens, window_start = 0, 0, time.time()

            if args.save_model_step and step % args.save_model_step == 0 and step % len(updates):
                save(epoch, step)
        save(epoch, step)

    log.close()
    stop_distributed(engine)
    if num_applied < step:
        print_rank_0(f"{step - num_applied} of {step} updates were left out: their gradients were not finite")
    if num_applied == 0:
        fail(
            "no update was applied, every gradient was infinite or NaN: check the base weights, or use --precision bf16"
        )
    print_rank_0(f"done: {step} updates, {args.output_dir}")


def complete_mode(args, folder):
    """Check what a hub name left open until its config.json was there."""
    if problems := folder_problems(args, "--model_name_or_path", folder) or length_problems(args):
        fail(problems)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        fail(" ".join(str(error).split()))
