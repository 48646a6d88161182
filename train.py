"""Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B: the training story, from the flags to the saved weights.

    deepspeed --master_port 29500 train.py --train_path data/spo_0.json --model_name_or_path ChatGLM3-6B/ \
        --mode glm3 --train_type lora --output_dir ./output-glm3
"""

from __future__ import annotations

from runtime import entry  # noqa: F401, first: Ctrl-C is heard while the others are imported

# isort: split

import math
import sys
from typing import TYPE_CHECKING

from checkpoints.opening import resolve_folder
from checkpoints.progress import Progress
from checkpoints.states import convert, load_state
from data_set import load_data
from flags.train import check_folder, check_limits, hold_output, parse_train
from rows.batches import Split, Updates, collate, to_device
from runtime.distributed import on_main, stop_distributed, sum_over_ranks
from runtime.holding import require_there
from runtime.machine import peak_memory
from runtime.ranks import print_rank_0
from runtime.shared_files import check_shared
from runtime.watchdog import together
from training.bad_numbers import check_skipped, explain_bad_loss
from training.ds_config import offloads
from training.evaluation import Evaluation
from training.going_on import open_start
from training.optimizer import choose_adam
from training.resuming import choose_state, fingerprint, write_fingerprint
from training.run_folder import RunFolder, last_checkpoint
from training.run_log import RunLog, Speed, end
from training.setup import build_engine, open_base, set_up
from utils import set_seed

if TYPE_CHECKING:
    from runtime.watchdog import Watch


def main(argv: list[str], watch: Watch) -> None:
    """Train: from the flags to the saved weights. watch: what looks after the processes."""
    # Flags, device and processes.
    args = parse_train(argv)
    setup = set_up(args, watch)
    on_main(lambda: hold_output(args))  # until the process ends
    check_shared(args.output_dir)
    set_seed(args.seed)

    # Base: names and shapes are checked before any weight is read.
    start = open_start(args)  # an adapter or a prefix encoder to go on from
    folder = start.base_folder if start else resolve_folder(args.model_name_or_path)
    check_folder(args, folder)
    base = open_base(args, folder, start)
    check_limits(args, base)
    adam = choose_adam(args.optimizer, offloads(setup.ds_config), setup.device)

    # Rows, and which of them each update takes.
    rows, eval_rows = load_data(args, base.tokenizer, base.mode)
    split = Split(args.per_device_train_batch_size, args.gradient_accumulation_steps, setup.world)
    updates = Updates(
        rows.lengths, rows.num_labels, split, setup.rank, args.seed, pack_to=args.max_len if args.packing else None
    )
    print_rank_0(updates.describe())
    num_steps = len(updates) * args.num_train_epochs

    # State: what a run is resumed from, if it is that of this run.
    identity = on_main(lambda: fingerprint(args, folder, rows.key, setup, adam.name))
    state, info = on_main(lambda: choose_state(args, identity, split, num_steps))
    progress = Progress.from_info(info)
    if args.resume and (last := on_main(lambda: last_checkpoint(args.output_dir))):
        print_rank_0(f"done already: {last} is the run's last checkpoint")
        return
    is_universal = bool(info) and info["world_size"] != setup.world  # saved by another number of processes
    if is_universal:
        convert(state)

    # Model, optimizer, engine.
    engine, scheduler = build_engine(args, base, setup, adam, num_steps, is_universal)
    print_rank_0(
        f"{args.mode} on {setup.world} x {setup.device.type}, {setup.precision}, {args.ds_file}, {adam.name}:"
        f" {num_steps} updates of {updates.sequences_per_update} {'packed sequences' if args.packing else 'rows'},"
        f" {len(updates)} in each of {args.num_train_epochs} epochs"
    )
    if state:
        load_state(engine, state, info, args.seed)
    evaluation = Evaluation(args, eval_rows, base, setup) if eval_rows is not None else None
    if evaluation:
        progress.judge_by(args.metric_for_best_model, eval_rows.key)

    # What the run leaves behind.
    require_there(args.output_dir)
    on_main(lambda: write_fingerprint(args.output_dir, identity))
    log = RunLog(args.output_dir, num_steps, progress.step, progress.step - progress.owes_evaluation)
    log.bad_rows([*rows.bad_rows, *(eval_rows.bad_rows if args.eval_path else [])])
    if state:
        log.event(progress.step, "resumed", path=state)
    run_folder = RunFolder(args, base, setup, engine, log, {"fingerprint": identity, "split": split})
    if state and progress.best_step:
        run_folder.take_best(state, progress.best_step)
    watch.is_training = True  # a request to leave is heard at the end of a step from here on
    num_epochs = args.num_train_epochs
    if evaluation and evaluation.catch_up(run_folder, progress, len(updates)):
        num_epochs = 0

    # The loop. A step is one optimizer update.
    import torch

    speed, num_asked, is_last = Speed(), 0, True
    engine.train()
    for epoch, update in updates.since(progress.step, num_epochs):
        step = progress.step + 1
        update_loss = torch.zeros((), device=setup.device)
        for i, row_numbers in enumerate(update.micro_batches):
            watch.begin(step, rows, row_numbers)
            batch = collate([rows[n] for n in row_numbers], base.config.pad_token_id, args.packing)
            engine.set_gradient_accumulation_boundary(i == len(update.micro_batches) - 1)
            losses = engine(**to_device(batch, setup.device)).token_losses  # of each supervised token, float32
            # The objective: their sum, divided by the supervised tokens of the whole update. Gradients are averaged
            # over the ranks afterwards, hence the factor: any split gives the same gradient.
            loss = losses.sum() / (update.num_labels / setup.world)
            engine.backward(loss, scale_wrt_gas=False)
            update_loss += losses.detach().sum()
        update_loss, num_asked = sum_over_ranks(update_loss, watch.asked is not None, group=setup.group)
        if not math.isfinite(update_loss):
            watch.pause()
            explain_bad_loss(engine.module, update, rows, step, base.config.pad_token_id, setup)
        rate = scheduler.get_last_lr()[0]
        engine.step()
        watch.pause()
        num_tokens = int(updates.lengths[update.rows].sum())
        progress.count(update_loss, update.num_labels, num_tokens, engine.was_step_applied())
        check_skipped(progress.num_skipped, step, setup.precision, getattr(engine.optimizer, "loss_scale", 1))
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
        log.done(progress, *run_folder.counts, peak_memory(setup.device))
    log.close()
    stop_distributed(engine)
    end(args.output_dir, progress, is_last, run_folder.problem)


def is_due(step: int, interval: int) -> bool:
    """Is it time for what is done every `interval` steps? 0: never."""
    return interval > 0 and step % interval == 0


if __name__ == "__main__":
    with together() as watch:
        main(sys.argv[1:], watch)
