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
from data_set import describe_counts, hold_out, mix, texts_of
from flags.common import folder_problems
from flags.train import ATTENTION, hold_output, length_problems, parse_train
from generation.lengths import columns_of, window_problem
from modeling.gradient_checkpointing import checkpoint_layers
from modes import MODES
from rows.batches import Updates, collate, to_device
from rows.cache import load_rows
from rows.encoding import show_row
from rows.reading import read_row
from runtime.distributed import on_main, stop_distributed, sum_over_ranks
from runtime.exits import EXIT_LEFT, BadNumbers, fail
from runtime.folders import require_space
from runtime.holding import require_there
from runtime.hosts import check_same, check_shared, control_group, ending_in, start_distributed
from runtime.machine import peak_memory
from runtime.ranks import is_local_main, print_rank_0, world_size
from runtime.watchdog import together
from train_types import TRAIN_TYPES, count_parameters
from training.bad_numbers import check_skipped, explain_bad_loss, keep_going_at_low_scale
from training.ds_config import check_config, complete_config, offloads, read_ds_file, wanted_precision
from training.evaluation import Evaluation
from training.going_on import check_start, open_start, put_start
from training.optimizer import build_optimizer, build_scheduler, choose_adam
from training.resuming import choose_state, fingerprint, write_fingerprint
from training.run_folder import RunFolder, last_checkpoint
from training.run_log import RunLog, Speed
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
    complete_mode(args, folder)
    mode, train_type = MODES[args.mode], TRAIN_TYPES[args.train_type]
    config = read_config(folder, mode, train_type.config_changes(args))
    for flag, most in (("lora_dim", config.hidden_size), ("pre_seq_len", config.window)):
        if flag in train_type.flags and getattr(args, flag) > most:
            fail(f"--{flag} {getattr(args, flag)}: use at most {most} with this model")
    names = check_weights(folder, mode, config, new_prefix=train_type.weights == "prefix")
    if problems := train_type.problems(names, args):
        fail(problems)
    check_start(start, config)
    tokenizer = read_tokenizer(folder, mode, config)
    is_compiled, optimizer_name = choose_adam(args.optimizer, offloads(ds_config), device)
    if args.max_len > config.window:
        fail(f"--max_len {args.max_len}: the model's window is {config.window} tokens: use at most {config.window}")
    answer_lengths = (args.max_src_len, args.eval_max_new_tokens, config, mode.prompt, "eval_max_new_tokens")
    if args.eval_generate and (problem := window_problem(*answer_lengths)):
        fail(problem)

    # Rows: the first process of a host encodes them where that was not done before, the others wait for it.
    def encoded(paths, what="rows"):
        found, counts = load_rows(
            paths,
            columns_of(args),
            tokenizer,
            mode,
            args.max_len,
            args.max_src_len,
            args.is_skip,
            args.num_proc,
            encodes=is_local_main(),
            skip_bad_rows=args.skip_bad_rows,
        )
        check_same(f"{what} (or the tokenizer)", found.key)
        print_rank_0(describe_counts(counts, args.max_len, args.max_src_len, args.is_skip, what))
        return found

    rows = encoded(args.train_path)
    eval_rows = encoded(args.eval_path, "held-out rows") if args.eval_path else None
    if args.eval_ratio:
        rows, eval_rows = hold_out(rows, args.eval_ratio, args.seed)
    if args.replay_path:
        rows = mix(rows, encoded(args.replay_path, "general rows"), args.replay_ratio, args.seed)
    if len(rows) < world:
        fail(f"--train_path: {len(rows)} rows for {world} processes: give at least one row to each, or start fewer")
    print_rank_0(show_row(rows[0], tokenizer, read_row(args.train_path, columns_of(args), rows.place(0))))
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
    model = put_start(model, start, args) if start else train_type.prepare(model, args)
    if args.gradient_checkpointing:
        checkpoint_layers(model, args.gradient_checkpointing_interval)
    trained, total = count_parameters(model)
    print_rank_0(f"{args.train_type}: {trained:,} of {total:,} weights train ({trained / total:.4%})")
    sizes = [checkpoint_bytes(model, train_type), state_bytes(trained, dtype) if args.save_state_step else 0]
    on_main(lambda: require_space(args.output_dir, sum(sizes), "a checkpoint" + " and a state" * bool(sizes[1])))

    # Engine.
    optimizer = build_optimizer(model, args, is_compiled)
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
        texts = texts_of(eval_rows, columns_of(args), args) if args.eval_generate else []
        evaluation = Evaluation(args, eval_rows, texts, tokenizer, mode.prompt, device, group, zero3)
        progress.judge_by(args.metric_for_best_model, eval_rows.key)
    require_there(args.output_dir)
    on_main(lambda: write_fingerprint(args.output_dir, identity))
    log = RunLog(args.output_dir, num_steps, progress.step, progress.step - progress.owes_evaluation)
    log.bad_rows([*rows.bad_rows, *(eval_rows.bad_rows if args.eval_path else [])])
    if state:
        log.event(progress.step, "resumed", path=state)

    run_folder = RunFolder(args, base, precision, engine, tokenizer, train_type, (trained, total), log, identity, split)

    def evaluate(step, epoch):
        """Evaluate, and keep the weights if they are the best. Have evaluations been worse for long enough to stop?"""
        progress.owes_evaluation = False
        scores, before = evaluation(engine, step), (progress.best_value, progress.best_step)
        run_folder.require()
        is_best = progress.is_best(args.metric_for_best_model, scores.get(args.metric_for_best_model))
        log.evaluated(step, scores, is_best)
        if is_best:
            run_folder.save_weights(step, epoch + 1, name="best", scores=scores)
            if run_folder.problem:
                progress.forget_best(before)
        return 0 < args.early_stopping_patience <= progress.num_worse

    if state and progress.best_step:
        run_folder.take_best(state, progress.best_step)
    # An evaluation that was due when the run left; it may be the one that ends the run.
    num_epochs, last_epoch = args.num_train_epochs, (progress.step - 1) // len(updates)
    watch.is_training = True  # a request to leave is heard at the end of a step from here on
    if evaluation and progress.owes_evaluation and evaluate(progress.step, last_epoch):
        num_epochs = 0
        run_folder.save_weights(progress.step, last_epoch + 1)

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
            # The sum over this batch's supervised tokens, divided by those of the whole update. Gradients are averaged
            # over the ranks afterwards, hence the factor: any split gives the same gradient.
            loss = engine(**to_device(batch, device), num_items_in_batch=update.num_labels / world).loss
            engine.backward(loss, scale_wrt_gas=False)
            update_loss += loss.detach() * (update.num_labels / world)
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
                is_last = evaluate(step, epoch) or is_last
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


def end(output_dir, progress, is_last, problem):
    """The last words of a run: it is done, or it leaves because it was asked to."""
    step, num_left_out = progress.step, progress.step - progress.num_applied
    if num_left_out:
        print_rank_0(f"{num_left_out} of {step} updates were left out: their gradients were not finite")
    if problem and is_last:
        fail(f"{problem}; make room and start again with --resume auto: the last checkpoint is missing", code=1)
    if problem:
        fail(f"left after step {step} without a state: {problem}", code=1)
    if not is_last:
        print_rank_0(f"left after step {step}: the same command with --resume auto goes on from {output_dir}")
        sys.exit(EXIT_LEFT)
    if progress.num_applied == 0:
        raise BadNumbers(
            "no update was applied, every gradient was infinite or NaN: check the base weights, or use --precision bf16"
        )
    print_rank_0(f"done: {step} updates, {output_dir}")


def complete_mode(args, folder):
    """Check what a hub name left open until its config.json was there."""
    if problems := folder_problems(args, "--model_name_or_path", folder) or length_problems(args):
        fail(problems)


if __name__ == "__main__":
    with together() as watch:
        main(sys.argv[1:], watch)
