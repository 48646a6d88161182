"""Evaluation while training: loss and metrics over held-out rows, the best checkpoint, when to stop."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from data_set import texts_of
from rows.batches import collate, to_device
from runtime.distributed import gather, on_main, sum_over_ranks
from runtime.folders import whole_file
from runtime.json_lines import to_line
from runtime.ranks import world_size

if TYPE_CHECKING:
    from training.setup import Base, Setup


class Evaluation:
    """What a run evaluates: held-out rows, encoded for the loss and, with --eval_generate, as texts to answer.

    Called at a step, it returns {metric: value}. Collective.
    """

    def __init__(self, args: argparse.Namespace, rows: Any, base: Base, setup: Setup) -> None:
        self.args, self.rows, self.base, self.setup = args, rows, base, setup
        self.texts = texts_of(rows, args) if args.eval_generate else []

    def is_due(self, step: int, is_epoch_end: bool, is_last: bool) -> bool:
        """Is it time? Every --eval_step updates, or at each epoch's end; always at the end of the run."""
        return is_last or (step % self.args.eval_step == 0 if self.args.eval_step else is_epoch_end)

    def __call__(self, engine: Any, step: int) -> dict[str, float]:
        batch_size = self.args.per_device_train_batch_size
        loss = evaluation_loss(engine, self.rows, batch_size, self.base.tokenizer.pad_token_id, self.setup)
        if not self.texts:
            return {"loss": loss}
        answers = self.answers(engine, batch_size)
        return {"loss": loss, **on_main(lambda: self.score(step, answers))}

    def keep_best(self, run_folder: Any, progress: Any, step: int, epoch: int) -> bool:
        """Evaluate, and keep the weights if they are the best. Have evaluations been worse for long enough to stop?"""
        progress.owes_evaluation = False
        scores, before = self(run_folder.engine, step), (progress.best_value, progress.best_step)
        run_folder.require()
        metric = self.args.metric_for_best_model
        is_best = progress.is_best(metric, scores.get(metric))
        run_folder.log.evaluated(step, scores, is_best)
        if is_best:
            run_folder.save_weights(step, epoch + 1, name="best", scores=scores)
            if run_folder.problem:
                progress.forget_best(before)
        return 0 < self.args.early_stopping_patience <= progress.num_worse

    def catch_up(self, run_folder: Any, progress: Any, updates_per_epoch: int) -> bool:
        """The evaluation that was due when an earlier run left. Was it the one that ends the run?"""
        epoch = (progress.step - 1) // updates_per_epoch
        is_end = progress.owes_evaluation and self.keep_best(run_folder, progress, progress.step, epoch)
        if is_end:
            run_folder.save_weights(progress.step, epoch + 1)
        return is_end

    def score(self, step: int, answers: list) -> dict:
        """The metrics of score.py; the answers are kept in eval-step-N.jsonl, which it can read again."""
        from evaluation.metrics import score_rows

        path = os.path.join(self.args.output_dir, f"eval-step-{step}.jsonl")
        try:
            write_answers(path, self.texts, answers)
        except OSError as error:  # a full disk does not end a run
            print(f"\n{path} was not saved, the run goes on: {error.strerror}", file=sys.stderr, flush=True)
        references = [row["answer"] for row in self.texts]
        values = score_rows(answers, references, self.args.task, normalize=not self.args.no_normalize)
        return {name: value for name, value in values.items() if isinstance(value, float)}

    def answers(self, engine: Any, batch_size: int) -> list:
        """The greedy answer to each of the texts, in their order, on every rank. Collective."""
        import torch.distributed as dist

        from generation.answerer import Answerer, DecodingSettings

        rank, world = dist.get_rank(), world_size()
        settings = DecodingSettings(self.args.eval_max_new_tokens, self.args.max_src_len)
        is_split = engine.zero_optimization_stage() == 3
        answer = Answerer(engine.module, self.base.tokenizer, self.base.mode.prompt, settings, is_split)
        order = sorted(range(len(self.texts)), key=lambda n: (len(self.texts[n]["query"]), n), reverse=True)
        mine = order[rank::world]
        found: dict[int, str] = {}
        engine.eval()
        for i in range(-(-len(order) // (world * batch_size))):
            numbers = mine[i * batch_size : (i + 1) * batch_size] or order[-1:]  # a rank without rows goes along
            results = answer([answer.prompt_ids(self.texts[n]["query"]) for n in numbers])
            found |= {n: result["predictions"][0] for n, result in zip(numbers, results)}
        engine.train()
        return [text for _, text in sorted({n: text for part in gather(found) for n, text in part.items()}.items())]


def evaluation_loss(engine: Any, rows: Any, batch_size: int, pad_token_id: int, setup: Setup) -> float:
    """Loss per supervised token over all rows, with their numbers of labels as weights. Collective.

    Every rank takes a share, and the same number of batches: under ZeRO-3 all must go through the model together.
    Nothing is drawn from a random generator: training goes on as if this had not been.
    """
    import torch

    rank, world = setup.rank, setup.world
    order = rows.lengths.argsort(kind="stable")[::-1]
    num_batches = -(-len(rows) // (world * batch_size))
    mine = order[rank::world]
    loss_sum, num_labels = 0.0, 0
    engine.eval()
    with torch.no_grad():
        for i in range(num_batches):
            numbers = mine[i * batch_size : (i + 1) * batch_size]
            batch = to_device(collate([rows[n] for n in numbers], pad_token_id), setup.device)
            loss_sum += engine(**batch).token_losses.double().sum()
            num_labels += int(rows.num_labels[numbers].sum())
    engine.train()
    loss_sum, num_labels = sum_over_ranks(loss_sum, num_labels, group=setup.group)
    return loss_sum / num_labels


def write_answers(path: str, texts: list, answers: list) -> None:
    """Rows with their answers as predict.py writes them, whole or not at all."""
    with whole_file(path) as file:
        for n, (row, text) in enumerate(zip(texts, answers, strict=True)):
            file.write(to_line({"index": n, "query": row["query"], "output": row["answer"], "prediction": text}))
