"""What the report of compare.py says: the answer in words, how to read the figures, and its tables as rows of cells."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from reports.words import ENGLISH, Words
from runtime.streams import size_text

NUM_OTHERS = 2  # metrics that stand below the primary one


class Cell(NamedTuple):
    """What stands in a table: the main text, and smaller text below it."""

    text: str
    small: str = ""


def ranked(results: dict) -> list[dict]:
    """The methods that are done, the best first."""
    done = [method for method in results["methods"] if method["status"] == "done"]
    return sorted(done, key=lambda method: -method["metrics"][results["primary"]])


def is_noise(change: list) -> bool:
    """Does the interval of [difference, low, high] include 0? Without an interval nothing is certain."""
    return change[1] is None or change[1] <= 0 <= change[2]


def words_of(results: dict) -> Words:
    """The words of the report's language."""
    return Words(results.get("language", "en"))


def verdict_lines(results: dict) -> list[str]:
    """The answer in a few sentences."""
    say, done, metric, base = words_of(results), ranked(results), results["primary"], results["base"]
    if not done:
        return [say("No method has been trained and scored yet.")]
    best, rows = done[0], done[0]["num_rows"]
    value = " ".join(filter(None, metric_cell(best, metric, say)))
    lines = [
        say(
            "Best: {name}, {metric} {value} on {rows} test rows.",
            name=best["name"],
            metric=metric,
            value=value,
            rows=rows,
        )
    ]
    if best["to_base"]:
        change, value = change_text(best["to_base"], say), f"{base['metrics'][metric]:.2f}"
        lines.append(say("The base model has {value}; the difference is {change}.", value=value, change=change))
    near = [method for method in done[1:] if is_noise(method["to_best"])]
    if near:
        names = say(", ").join(method["name"] for method in near)
        lines.append(
            say(
                "With these {rows} rows it cannot be told apart from {names}: more test rows or seeds would.",
                rows=rows,
                names=names,
            )
        )
        lines += cheapest([best, *near], say)
    elif len(done) > 1:
        lines.append(say("Its lead over every other method is larger than the noise of the test rows."))
    changes = {m["name"]: m["forgetting"]["loss"] for m in done}
    forgot = [name for name, change in changes.items() if change and change[0] > 0 and not is_noise(change)]
    if forgot:
        lines.append(
            say(
                "Forgetting: the loss on general questions rose by more than the noise with {names}.",
                names=say(", ").join(forgot),
            )
        )
    missing = [m["name"] for m in results["methods"] if m["status"] != "done"]
    if missing:
        lines.append(say("Without figures: {names}.", names=say(", ").join(missing)))
    return lines


def cheapest(methods: list[dict], say: Words) -> list[str]:
    """Which of equally good methods costs least; nothing where that is not known."""
    found: dict[str, list[str]] = {}
    for name, fastest, text in (
        ("seconds", True, duration),
        ("peak_memory_bytes", False, size_text),
    ):
        if all(method[name] is not None for method in methods):
            least = min(methods, key=lambda method: method[name])
            value = text(least[name])
            what = (
                say("trains fastest ({value})", value=value)
                if fastest
                else say("takes the least memory ({value})", value=value)
            )
            found.setdefault(least["name"], []).append(what)
    parts = [say("{name} {what}", name=name, what=say(" and ").join(words)) for name, words in found.items()]
    return [say("Of these, {parts}.", parts=say("; ").join(parts))] if parts else []


def notes(results: dict) -> list[str]:
    """How to read the figures."""
    say = words_of(results)
    lines = [
        say(
            "Intervals hold the middle 95 % of a bootstrap over the test rows: how far a figure would move with other"
            " rows of the same kind. Differences are paired: both methods answer the same resampled rows. Inside the"
            " noise: the interval of the difference includes 0."
        ),
        say(
            "They say nothing of another training run: for that, give several seeds; ± is then the standard deviation"
            " over seeds, and every figure is a mean over seeds."
        ),
        say(
            "Trained: the number of weights that train. Time, tokens/s and memory are those of the training alone;"
            " memory is the peak of one process. On disk: the folder of the checkpoint."
        ),
    ]
    if results["has_grid"]:
        lines.append(
            say(
                "Several values of a grid were tried on the same test rows, so the best of them looks a little better"
                " than it is: score it on other rows before you rely on the figure."
            )
        )
    if results["forgetting"]:
        lines.append(
            say(
                "General loss and score are changes from the base on general questions (forgetting): the loss should"
                " not rise, the score not fall."
            )
        )
    return lines


def change_text(change: list, say: Words = ENGLISH) -> str:
    """'+3.21 [-1.02, +7.40], inside the noise'."""
    value, low, high = change
    ends = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
    return f"{value:+.2f}{ends}" + (say(", inside the noise") if is_noise(change) else "")


def duration(seconds: float) -> str:
    """'1 min 23 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(number: float) -> str:
    """29.6 M for a number of weights."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def main_table(results: dict) -> list[list[Cell]]:
    """Rows of cells, the header first."""
    say, metric = words_of(results), results["primary"]
    others = [name for name in results["metrics"] if name != metric and not name.endswith("_micro")][:NUM_OTHERS]
    head = [say("method"), metric, say("to the base"), say("to the best")]
    head += [say("general loss"), say("general score")] if results["forgetting"] else []
    head += [say("trained"), say("tokens/s"), say("memory"), say("time"), say("on disk")]
    table = [[Cell(text) for text in head]]
    rest = [method for method in results["methods"] if method["status"] != "done"]
    for entry in (*ranked(results), *rest, results["base"]):
        row = [Cell(entry["name"], describe(entry, say))]
        if entry["status"] == "done":
            row.append(quality_cell(entry, metric, others, say))
        else:
            row.append(status_cell(entry["status"], say))
        if entry["status"] == "done" and entry["name"] != "base":
            row += [change_cell(entry["to_base"], say), change_cell(entry["to_best"], say, say("the best"))]
            forgetting = entry["forgetting"]
            row += [change_cell(forgetting[name], say) for name in ("loss", "score")] if results["forgetting"] else []
            row += cost_cells(entry, say)
        table.append(row + [Cell("")] * (len(head) - len(row)))
    return table


def status_cell(status: str, say: Words) -> Cell:
    """Why there are no figures: 'not run', 'begun', 'failed with exit code 3'."""
    _, is_failed, code = status.partition("failed with exit code ")
    if is_failed:
        return Cell(say("failed"), say("exit code {code}", code=code))
    return Cell(say("begun") if status == "begun" else say("not run"))


def quality_cell(entry: dict, metric: str, others: list[str], say: Words) -> Cell:
    """The metric; below it its interval, how far seeds differ, and other metrics."""
    value, ends = metric_cell(entry, metric, say)
    spread = ""
    if entry["spread"] is not None:
        spread = say("± {value} over {number} seeds", value=f"{entry['spread']:.2f}", number=len(entry["runs"]))
    more = [f"{name} {number(entry['metrics'][name], say)}" for name in others]
    return Cell(value, "\n".join(filter(None, (ends, spread, *more))))


def metric_cell(entry: dict, metric: str, say: Words) -> Cell:
    """A metric, and its interval below it."""
    interval = entry["intervals"][metric]
    return Cell(number(entry["metrics"][metric], say), f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def describe(entry: dict, say: Words) -> str:
    """What a method is, where its name does not say it."""
    train_type = entry.get("train_type", say("as it is"))
    return "" if train_type == entry["name"] else train_type


def number(value: float | None, say: Words) -> str:
    """A metric's value."""
    return say("not known") if value is None else f"{value:.2f}"


def change_cell(change: list | None, say: Words, without: str | None = None) -> Cell:
    """A difference, with its interval and what that means."""
    if change is None:
        return Cell(without or say("not known"))
    value, low, high = change
    ends = "" if low is None else f"[{low:+.2f}, {high:+.2f}]"
    return Cell(f"{value:+.2f}", "\n".join(filter(None, (ends, say("inside the noise") * is_noise(change)))))


def cost_cells(entry: dict, say: Words) -> list[Cell]:
    """Trained weights, speed, memory, time, size."""
    trained, total = entry["trained_weights"], entry["all_weights"]

    def show(name: str, text: Callable) -> Cell:
        return Cell(say("not known") if entry[name] is None else text(entry[name]))

    share = ""
    if trained is not None and total:
        share = say("{share} of {total}", share=f"{trained / total:.2%}", total=count(total))
    return [
        Cell(show("trained_weights", count).text, share),
        show("tokens_per_second", lambda value: f"{value:,.0f}"),
        show("peak_memory_bytes", size_text),
        show("seconds", duration),
        show("checkpoint_bytes", size_text),
    ]


def metrics_table(results: dict) -> list[list[Cell]]:
    """All metrics of the task with their intervals; rows of cells, the header first."""
    say, names = words_of(results), list(results["metrics"])
    table = [[Cell(text) for text in (say("method"), *names)]]
    for entry in (*ranked(results), results["base"]):
        if entry["status"] == "done":
            table.append([Cell(entry["name"]), *(metric_cell(entry, name, say) for name in names)])
    return table


def facts(results: dict) -> Iterator[tuple[str, str]]:
    """(name, text) of what was compared, on what."""
    say, machine = words_of(results), results["machine"]
    yield say("base model"), results["base_model"]
    yield say("training rows"), ", ".join(results["train_path"])
    yield say("test rows"), ", ".join(results["test_path"])
    yield say("task"), results["task"] or say("none")
    if results["no_normalize"]:
        yield say("scoring"), say("texts as they are (no_normalize): full-width and ASCII marks differ")
    else:
        yield say("scoring"), say("texts folded with NFKC: full-width and ASCII marks are alike")
    yield say("seeds"), ", ".join(map(str, results["seeds"]))
    for method in results["methods"]:
        yield method["name"], ", ".join([method["train_type"], *(f"{k} {v}" for k, v in method["flags"].items())])
    if machine:
        yield say("system"), machine["system"]
        size = size_text(machine["memory_bytes"])
        yield say("CPU"), say("{cpu}, {size} memory", cpu=machine["cpu"], size=size)
        yield say("GPUs"), "; ".join(machine["gpus"]) or say("none")
        yield say("versions"), ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield say("written"), results["time"]


def title_of(results: dict) -> str:
    """The report's heading."""
    return words_of(results)("Comparison: {name}", name=Path(results["plan"]).stem)
