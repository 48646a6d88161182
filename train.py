"""Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B: the training story, from the flags to the saved weights.

    deepspeed --master_port 29500 train.py --train_path data/spo_0.json --model_name_or_path ChatGLM3-6B/ \
        --mode glm3 --train_type lora --output_dir ./output-glm3
"""

from runtime import entry  # noqa: F401, first: Ctrl-C is heard while the others are imported

# isort: split

import math
import sys

from checkpoints.base_weights import check_weights, load_base
from checkpoints.bases import base_fingerprint
from checkpoints.opening import read_config, read_tokenizer, resolve_folder
from checkpoints.progress import Progress
from checkpoints.saving import checkpoint_bytes
from checkpoints.states import convert, load_state, state_bytes
from data_set import load_data, texts_of
from flags.train import ATTENTION, check_folder, check_limits, hold_output, parse_train
from modeling.gradient_checkpointing import checkpoint_layers
from modes import MODES
from rows.batches import Updates, collate, to_device
from runtime.distributed import on_main, stop_distributed, sum_over_ranks
from runtime.exits import fail
from runtime.folders import require_space
from runtime.holding import require_there
from runtime.hosts import control_group, ending_in, start_distributed
from runtime.machine import peak_memory
from runtime.ranks import print_rank_0, world_size
from runtime.shared_files import check_shared
from runtime.watchdog import together
from train_types import TRAIN_TYPES, count_parameters
from training.bad_numbers import check_skipped, explain_bad_loss, keep_going_at_low_scale
from training.ds_config import check_config, complete_config, offloads, read_ds_file, wanted_precision
from training.evaluation import Evaluation
from training.going_on import check_start, open_start, put_start
from training.optimizer import build_optimizer, build_scheduler, choose_adam
from training.resuming import choose_state, fingerprint, write_fingerprint
from training.run_folder import RunFolder, last_checkpoint
from training.run_log import RunLog, Speed, end
from utils import choose_device, choose_precision, prepare_environment, set_seed, torch_dtype


def main(argv, watch):
    """Train: from the flags to the saved weights. watch: what looks after the processes."""
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
    with ending_in(args.start_timeout):
        start_distributed(device, args.start_timeout)
        watch.start(args.output_dir, args.step_timeout)
        rank, world, group = dist.get_rank(), world_size(), control_group(device)
    on_main(lambda: hold_output(args))  # until the process ends
    check_shared(args.output_dir)
    set_seed(args.seed)

    # Checkpoint: names and shapes are checked before any weight is read.
    start = open_start(args)  # an adapter or a prefix encoder to go on from
    folder = start.base_folder if start else resolve_folder(args.model_name_or_path)
    check_folder(args, folder)
    mode, train_type = MODES[args.mode], TRAIN_TYPES[args.train_type]
    config = read_config(folder, mode, train_type.config_changes(args))
    check_limits(args, config, mode, train_type)
    names = check_weights(folder, mode, config, new_prefix=train_type.weights == "prefix")
    if problems := train_type.problems(names, args, mode):
        fail(problems)
    check_start(start, config)
    tokenizer = read_tokenizer(folder, mode, config)
    is_compiled, optimizer_name = choose_adam(args.optimizer, offloads(ds_config), device)

    # Rows, and which of them each update takes.
    rows, eval_rows = load_data(args, tokenizer, mode)
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

    # State: what a run is resumed from, if it is that of this run.
    base = (folder, on_main(lambda: base_fingerprint(folder, mode, config)))
    identity = on_main(lambda: fingerprint(args, folder, rows.key, precision, optimizer_name, device, ds_config))
    split = [args.per_device_train_batch_size, args.gradient_accumulation_steps, world]
    state, info = on_main(lambda: choose_state(args, identity, split, num_steps))
    progress = Progress.from_info(info)
    if args.resume and (last := on_main(lambda: last_checkpoint(args.output_dir))):
        print_rank_0(f"done already: {last} is the run's last checkpoint")
        return
    if info and info["world_size"] != world:
        convert(state)

    # Model: under ZeRO-3 the weights are split over the ranks while they load.
    ds_config = complete_config(ds_config, args, world, precision, load_universal=info and info["world_size"] != world)
    check_config(ds_config, args.ds_file)
    zero3 = ds_config["zero_optimization"]["stage"] == 3
    model = load_base(folder, mode, config, dtype, device, ds_config, ATTENTION[args.attention])
    model = put_start(model, start, args) if start else train_type.prepare(model, args, mode)
    if args.gradient_checkpointing:
        checkpoint_layers(model, args.gradient_checkpointing_interval)
    trained, total = count_parameters(model)
    print_rank_0(f"{args.train_type}: {trained:,} of {total:,} weights train ({trained / total:.4%})")
    sizes = [checkpoint_bytes(model, train_type), state_bytes(trained, dtype) if args.save_state_step else 0]
    on_main(lambda: require_space(args.output_dir, sum(sizes), "a checkpoint" + " and a state" * bool(sizes[1])))

    # Engine.
    optimizer = build_optimizer(model, args, mode.norms, is_compiled)
    scheduler = build_scheduler(optimizer, args, num_steps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    keep_going_at_low_scale(engine)
    unit = "packed sequences" if args.packing else "rows"
    print_rank_0(
        f"{args.mode} on {world} x {device.type}, {precision}, {args.ds_file}, {optimizer_name}: {num_steps} updates of"
        f" {updates.sequences_per_update} {unit}, {len(updates)} in each of {args.num_train_epochs} epochs"
    )
    if state:
        load_state(engine, state, info, args.seed)
    evaluation = None
    if eval_rows is not None:
        texts = texts_of(eval_rows, args) if args.eval_generate else []
        evaluation = Evaluation(args, eval_rows, texts, tokenizer, mode.prompt, device, group, zero3)
        progress.judge_by(args.metric_for_best_model, eval_rows.key)
    require_there(args.output_dir)
    on_main(lambda: write_fingerprint(args.output_dir, identity))
    log = RunLog(args.output_dir, num_steps, progress.step, progress.step - progress.owes_evaluation)
    log.bad_rows([*rows.bad_rows, *(eval_rows.bad_rows if args.eval_path else [])])
    if state:
        log.event(progress.step, "resumed", path=state)

    run_folder = RunFolder(args, base, precision, engine, tokenizer, train_type, (trained, total), log, identity, split)

    if state and progress.best_step:
        run_folder.take_best(state, progress.best_step)
    watch.is_training = True  # a request to leave is heard at the end of a step from here on
    num_epochs = args.num_train_epochs
    if evaluation and evaluation.catch_up(run_folder, progress, len(updates)):
        num_epochs = 0

    # The loop. A step is one optimizer update.
    speed, num_asked, is_last = Speed(), 0, True
    engine.train()
    for epoch, update in updates.since(progress.step, num_epochs):
        step = progress.step + 1
        update_loss = torch.zeros((), device=device)
        for i, row_numbers in enumerate(update.micro_batches):
            watch.begin(step, rows, row_numbers)
            batch = collate([rows[n] for n in row_numbers], config.pad_token_id, args.packing)
            engine.set_gradient_accumulation_boundary(i == len(update.micro_batches) - 1)
            losses = engine(**to_device(batch, device)).token_losses  # of each supervised token, float32
            # The objective: their sum, divided by the supervised tokens of the whole update. Gradients are averaged
            # over the ranks afterwards, hence the factor: any split gives the same gradient.
            loss = losses.sum() / (update.num_labels / world)
            engine.backward(loss, scale_wrt_gas=False)
            update_loss += losses.detach().sum()
        update_loss, num_asked = sum_over_ranks(update_loss, watch.asked is not None, group=group)
        if not math.isfinite(update_loss):
            watch.rest()
            explain_bad_loss(engine.module, update, rows, step, config.pad_token_id, device, precision)
        rate = scheduler.get_last_lr()[0]
        engine.step()
        watch.rest()
        num_tokens = int(updates.lengths[update.rows].sum())
        progress.count(update_loss, update.num_labels, num_tokens, engine.was_step_applied())
        check_skipped(progress.num_skipped, step, precision, getattr(engine.optimizer, "loss_scale", 1))
        run_folder.require()
        log.advance()
        speed.count(num_tokens)

        is_epoch_end, is_last = step % len(updates) == 0, step == num_steps
        if progress.usual_loss.is_spike(update_loss / update.num_labels):
            log.spike(step, update_loss / update.num_labels, progress.usual_loss.mean, map(rows.place, update.rows))
        if is_last or is_due(step, args.show_loss_step):
            norm = engine.get_global_grad_norm()
            log.record(
                step,
                epoch=step / len(updates),
                loss=progress.window_loss / progress.window_labels,
                learning_rate=rate,
                grad_norm=None if norm is None else float(norm),
                tokens_per_second=speed.take(),
            )
            progress.window_loss, progress.window_labels = 0.0, 0
        if evaluation and evaluation.is_due(step, is_epoch_end, is_last):
            progress.owes_evaluation = bool(num_asked) and not is_last  # it may take long: the resumed run does it
            if not progress.owes_evaluation:
                is_last = evaluation.keep_best(run_folder, progress, step, epoch) or is_last
        if is_epoch_end or is_last or is_due(step, args.save_model_step):
            run_folder.save_weights(step, epoch + 1)
        if not is_last and (num_asked or is_due(step, args.save_state_step)):
            run_folder.save_state(progress)
        if is_last or num_asked:
            break

    run_folder.finish_state()
    if is_last and run_folder.problem is None and progress.num_applied:
        log.done(progress, trained, total, peak_memory(device))
    log.close()
    stop_distributed(engine)
    end(args.output_dir, progress, is_last, run_folder.problem)


def is_due(step, interval):
    """Is it time for what is done every `interval` steps? 0: never."""
    return interval > 0 and step % interval == 0


if __name__ == "__main__":
    with together() as watch:
        main(sys.argv[1:], watch)
