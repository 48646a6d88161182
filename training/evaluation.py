"""Evaluation while training: loss and metrics over held-out rows, the best checkpoint, when to stop."""

import json
import os
import sys
from types import SimpleNamespace

from rows.batches import collate, to_device
from runtime.distributed import on_main, sum_over_ranks
from runtime.ranks import world_size


class Evaluation:
    """What a run evaluates: held-out rows, encoded for the loss and, with --eval_generate, as texts to answer.

    Called at a step, it returns {metric: value}. Collective.
    """

    def __init__(self, args, rows, texts, tokenizer, prompt, device, group, zero3):
        self.args, self.rows, self.texts = args, rows, texts
        self.tokenizer, self.prompt = tokenizer, prompt
        self.device, self.group, self.zero3 = device, group, zero3

    def is_due(self, step, is_epoch_end, is_last):
        """Is it time? Every --eval_step updates, or at each epoch's end; always at the end of the run."""
        return is_last or (step % self.args.eval_step == 0 if self.args.eval_step else is_epoch_end)

    def __call__(self, engine, step):
        batch_size = self.args.per_device_train_batch_size
        loss = evaluation_loss(engine, self.rows, batch_size, self.tokenizer.pad_token_id, self.device, self.group)
        if not self.texts:
            return {"loss": loss}
        answers = self.answers(engine, batch_size)
        return {"loss": loss, **on_main(lambda: self.score(step, answers))}

    def keep_best(self, run_folder, progress, step, epoch):
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

    def catch_up(self, run_folder, progress, updates_per_epoch):
        """The evaluation that was due when an earlier run left. Was it the one that ends the run?"""
        epoch = (progress.step - 1) // updates_per_epoch
        is_end = progress.owes_evaluation and self.keep_best(run_folder, progress, progress.step, epoch)
        if is_end:
            run_folder.save_weights(progress.step, epoch + 1)
        return is_end

    def score(self, step, answers):
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

    def answers(self, engine, batch_size):
        """The greedy answer to each of the texts, in their order, on every rank. Collective."""
        import torch.distributed as dist

        from generation.answerer import Answerer

        rank, world = dist.get_rank(), world_size()
        settings = SimpleNamespace(
            max_src_len=self.args.max_src_len,
            max_new_tokens=self.args.eval_max_new_tokens,
            num_return_sequences=1,
            num_beams=1,
            do_sample=False,
            repetition_penalty=1.0,
        )
        answer = Answerer(engine.module, self.tokenizer, self.prompt, settings, is_split=self.zero3)
        order = sorted(range(len(self.texts)), key=lambda n: (len(self.texts[n]["query"]), n), reverse=True)
        mine, found = order[rank::world], {}
        engine.eval()
        for i in range(-(-len(order) // (world * batch_size))):
            numbers = mine[i * batch_size : (i + 1) * batch_size] or order[-1:]  # a rank without rows goes along
            results = answer([answer.prompt_ids(self.texts[n]["query"]) for n in numbers])
            found |= {n: result["predictions"][0] for n, result in zip(numbers, results)}
        engine.train()
        parts = [None] * world
        dist.all_gather_object(parts, found)
        return [text for _, text in sorted({n: text for part in parts for n, text in part.items()}.items())]


def evaluation_loss(engine, rows, batch_size, pad_token_id, device, group):
    """Loss per supervised token over all rows, with their numbers of labels as weights. Collective.

    Every rank takes a share, and the same number of batches: under ZeRO-3 all must go through the model together.
    Nothing is drawn from a random generator: training goes on as if this had not been.
    """
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), world_size()
    order = rows.lengths.argsort(kind="stable")[::-1]
    num_batches = -(-len(rows) // (world * batch_size))
    mine = order[rank::world]
    loss_sum, num_labels = 0.0, 0
    engine.eval()
    with torch.no_grad():
        for i in range(num_batches):
            numbers = mine[i * batch_size : (i + 1) * batch_size]
            batch = to_device(collate([rows[n] for n in numbers], pad_token_id), device)
            loss_sum += engine(**batch).token_losses.double().sum()
            num_labels += int(rows.num_labels[numbers].sum())
    engine.train()
    loss_sum, num_labels = sum_over_ranks(loss_sum, num_labels, group=group)
    return loss_sum / num_labels


def write_answers(path, texts, answers):
    """Rows with their answers as predict.py writes them, whole or not at all."""
    with open(path + ".partial", "w", encoding="utf-8") as file:
        for n, (row, text) in enumerate(zip(texts, answers)):
            line = {"index": n, "query": row["query"], "output": row["answer"], "prediction": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(path + ".partial", path)
