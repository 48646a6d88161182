"""What a model forgot: losses and answers over the general suite, before and after."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from evaluation.general_suite import score_answer
from evaluation.intervals import weighted_mean
from generation.answerer import make_batches
from rows.encoding import encode_row
from runtime.exits import UserError
from runtime.folders import whole_file
from runtime.holding import require_there
from runtime.streams import progress_bar
from utils import dump_json, read_json

if TYPE_CHECKING:
    import torch

    from modeling.family import Prompt
    from modeling.tokenizer import SentencePieceTokenizer

MAX_LEN = 1 << 30  # tokens of a row: a reference is never cut
NUM_RESAMPLES = 2000
MIN_ROWS = 6  # of fewer, all change in one direction by chance in more than 5 % of cases: no interval then
DIGITS = {"loss": 2, "score": 1}


def in_batches(label: str, sizes: list[int], args: argparse.Namespace) -> Iterator[list[int]]:
    """Yield lists of row numbers, with a progress bar. sizes: tokens of each row."""
    with progress_bar(total=len(sizes), desc=label, unit="row") as bar:
        for numbers in make_batches(dict(enumerate(sizes)), args.batch_size, args.batch_tokens):
            yield numbers
            bar.update(len(numbers))


def measure_losses(
    model: torch.nn.Module,
    tokenizer: SentencePieceTokenizer,
    prompt: Prompt,
    suite: list[dict],
    args: argparse.Namespace,
) -> list[dict]:
    """The rows of the result: what each of the suite is, and its loss per supervised token."""
    from rows.batches import collate, to_device

    encoded = [encode_row(row["query"], row["answer"], tokenizer, prompt, MAX_LEN, None) for row in suite]
    rows: list[dict] = [{} for _ in suite]
    device: Any = model.device
    for numbers in in_batches("losses", [len(row["input_ids"]) for row in encoded], args):
        batch = to_device(collate([encoded[n] for n in numbers], tokenizer.pad_token_id), device)
        for n, (loss_sum, num_tokens) in zip(numbers, row_losses(model, batch)):
            row = suite[n]
            if not math.isfinite(loss_sum):
                raise UserError(f"{args.model_path}: the loss of {row['place']} is {loss_sum}: python doctor.py --full")
            rows[n] = {"index": n, "category": row["category"], "query": row["query"], "output": row["answer"]}
            rows[n] |= {"num_tokens": num_tokens, "loss": loss_sum / num_tokens}
    return rows


def require_room(
    suite: list[dict], tokenizer: SentencePieceTokenizer, prompt: Prompt, config: Any, args: argparse.Namespace
) -> None:
    """UserError for a row that does not fit the model's window with its reference or with an answer.

    Questions are never cut, whatever the training did: models that cut in different places could not be compared.
    """
    for row in suite:
        length = len(prompt.encode_prompt(tokenizer, row["query"])[0])
        lengths = {"its reference": len(prompt.encode_answer(tokenizer, row["answer"])) + 1}
        lengths |= {} if args.no_generate else {"--max_new_tokens": args.max_new_tokens}
        what = max(lengths, key=lambda name: lengths[name])
        if length + lengths[what] > config.window:
            raise UserError(
                f"{row['place']}: {length} tokens of the question and {lengths[what]} of {what}: the model's window is"
                f" {config.window} tokens, and no question is cut here: shorten the row or its answer"
            )


def row_losses(model: torch.nn.Module, batch: dict) -> list[tuple[float, int]]:
    """(cross entropy summed in float32, number of supervised tokens) of each row of a batch from `collate`."""
    import torch

    with torch.inference_mode():
        losses = model(**batch).token_losses
    row_of = batch["label_positions"] // batch["labels"].shape[1]
    rows = [losses[row_of == n] for n in range(len(batch["labels"]))]
    return [(row.sum().item(), row.numel()) for row in rows]


def measure_answers(answer: Any, suite: list[dict], args: argparse.Namespace) -> list[dict]:
    """{"prediction", "stopped", "score"} for each row of the suite."""
    prompts = [answer.prompt_ids(row["query"]) for row in suite]
    found: list[dict] = [{} for _ in suite]
    for numbers in in_batches("answers", [len(ids) + args.max_new_tokens for ids, _ in prompts], args):
        for n, result in zip(numbers, answer([prompts[n] for n in numbers])):
            [text], [stopped] = result["predictions"], result["stopped"]
            found[n] = {"prediction": text, "stopped": stopped, "score": score_answer(text, suite[n])}
    return found


def totals(rows: Any) -> dict:
    """{"loss", "score", "num_rows"}: the loss over all tokens; the mean score, or None where nothing was answered."""
    loss = math.fsum(row["loss"] * row["num_tokens"] for row in rows) / sum(row["num_tokens"] for row in rows)
    score = math.fsum(row["score"] for row in rows) / len(rows) if "score" in rows[0] else None
    return {"loss": loss, "score": score, "num_rows": len(rows)}


def by_category(rows: Any, function: Callable) -> dict:
    """{category: function(its rows)}, the categories as they come."""
    names = dict.fromkeys(row["category"] for row in rows)
    return {name: function([row for row in rows if row["category"] == name]) for name in names}


def summary(rows: Any) -> dict:
    """The totals of all rows, and of each category."""
    return {**totals(rows), "categories": by_category(rows, totals)}


def paired_difference(changes: list[float], weights: list[float]) -> list:
    """[weighted mean of the rows' changes, low, high]: 95 %, percentile bootstrap over rows, always the same draws."""
    mean, low, high = weighted_mean(changes, weights, NUM_RESAMPLES)
    return [mean, low, high] if len(changes) >= MIN_ROWS else [mean, None, None]


def differences(after: list[dict], before: Any, path: str) -> dict:
    """After minus before: {"loss": [value, low, high], "score": the same or None, "categories": {name: both}}."""
    for new, old in zip(after, before, strict=True):
        if new["num_tokens"] != old["num_tokens"]:
            counts = f"row {new['index']} has {old['num_tokens']} supervised tokens there, {new['num_tokens']} here"
            raise UserError(f"--before {path}: {counts}: compare models that have the same tokenizer")

    def compare(pairs: list[dict]) -> dict:
        loss = paired_difference([pair["loss"] for pair in pairs], [pair["num_tokens"] for pair in pairs])
        scores = [pair["score"] for pair in pairs if "score" in pair]
        return {"loss": loss, "score": paired_difference(scores, [1] * len(scores)) if scores else None}

    pairs = []
    for new, old in zip(after, before):
        both = [name for name in DIGITS if name in new and name in old]
        pairs.append({**new, **{name: new[name] - old[name] for name in both}})
        if "score" not in both:
            pairs[-1].pop("score", None)
    return {**compare(pairs), "categories": by_category(pairs, compare)}


def read_before(path: str) -> dict:
    """A result of an earlier run; UserError where it is not one."""
    result = read_json(path)
    try:
        summary(result["rows"])
        is_result = {"model", "mode", "precision", "max_new_tokens"} <= set(result) and result["suite"]["sha256"]
    except (KeyError, TypeError, IndexError, ZeroDivisionError):
        is_result = False
    if not is_result:
        raise UserError(f"{path}: is not a result of forgetting.py: name what its --output_path wrote")
    return result


def rescore(rows: Any, suite: list[dict]) -> Any:
    """Score the answers of an earlier result anew: that of an older version would differ by how it scores, too."""
    for row, asked in zip(rows, suite):
        if "score" in row and isinstance(row.get("prediction"), str):
            row["score"] = score_answer(row["prediction"], asked)


def require_comparable(before: Any, now: dict, path: str) -> None:
    """UserError where a difference could come from something else than the weights."""
    if before["suite"]["sha256"] != now["suite"]["sha256"]:
        raise UserError(f"--before {path}: is of another suite than {now['suite']['path']}: measure that model again")
    for key in ("mode", "precision", "max_new_tokens"):
        is_off = key == "max_new_tokens" and None in (before[key], now[key])  # then only losses are compared
        if before[key] != now[key] and not is_off:
            raise UserError(f"--before {path}: {key} is {before[key]} there, {now[key]} here: use the same for both")


def require_same_base(before: Any, trained_from: Any, args: argparse.Namespace) -> None:
    """UserError where the model was trained from another one than that of --before, as far as both are known."""
    bases = before.get("bases")
    if trained_from and isinstance(bases, list) and trained_from not in bases:
        raise UserError(
            f"--before {args.before}: is of {before['model']}, and {args.model_path} was trained from another base"
            " (other weights, another precision or another config.json): measure its own, or add --allow_other_base"
        )


def is_worse(name: str, interval: list) -> bool:
    """Does the interval, as it is shown, lie on the bad side of 0? A loss should not rise, a score should not fall.

    Rounded, because other batches change a loss in its last digits.
    """
    _, low, high = interval or (None, None, None)
    if low is None:
        return False
    return round(low, DIGITS[name]) > 0 if name == "loss" else round(high, DIGITS[name]) < 0


def verdict(difference: dict) -> str:
    """The differences in one sentence."""
    said = {name: f"{name} {interval_text(name, difference[name])}" for name in DIGITS if difference[name]}
    worse = [text for name, text in said.items() if is_worse(name, difference[name])]
    if worse:
        return f"forgot: {', '.join(worse)}"
    if difference["loss"][1] is None:
        return f"too few rows to tell forgetting from noise: {', '.join(said.values())}"
    named = [label for label, part in difference["categories"].items() if any(is_worse(n, part[n]) for n in DIGITS)]
    note = f"; look at {', '.join(named)}" if named else ""
    return f"no forgetting beyond the noise: {', '.join(said.values())}{note}"


def interval_text(name: str, interval: list) -> str:
    """`+0.41 [+0.30, +0.55]`; without bounds where there are none, `-` where nothing was compared."""
    if interval is None:
        return "-"
    # Plus 0.0 makes a plus of the minus of a rounded 0.
    value, *bounds = (f"{round(x, DIGITS[name]) + 0.0:+.{DIGITS[name]}f}" for x in interval if x is not None)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def save(result: dict, path: str) -> None:
    """Write the result, whole or not at all."""
    require_there(path)
    try:
        with whole_file(path) as file:
            dump_json(result, file)
    except OSError as error:
        raise UserError(f"--output_path {path}: cannot be written ({error.strerror}): choose another place") from None


def format_result(result: dict) -> str:
    """The table, a line for each category and one for all, with the verdict where there is one."""
    before, difference = result["before"], result["difference"]
    names = [name for name in DIGITS if result[name] is not None]
    cells = [["category", "rows"]]
    for name in names:
        cells[0] += [f"{name} before", "after", "difference"] if before else [name]
    for label in [*result["categories"], None]:
        reports = (result, before, difference)
        now, then, change = (report["categories"][label] if report and label else report for report in reports)
        line = [label or "all", str(now["num_rows"])]
        for name in names:
            values = [report[name] for report in ([then, now] if before else [now])]
            line += ["-" if value is None else f"{value:.{DIGITS[name]}f}" for value in values]
            if change:
                line.append(interval_text(name, change[name]) + (" *" if is_worse(name, change[name]) else "  "))
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    if difference:
        lines += ["* worse, and more than noise: the 95 % interval leaves out 0", "", result["verdict"]]
    title = f"{result['model']} on {result['suite']['path']}" + (f", before: {before['model']}" if before else "")
    return "\n".join(line.rstrip() for line in [title, "", *lines])
