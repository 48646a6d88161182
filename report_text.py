"""What the report of compare.py says: the answer in words, how to read the figures, and its tables as rows of cells."""

from pathlib import Path
from typing import NamedTuple

from folders import size_text

UNKNOWN = "not known"
NUM_OTHERS = 2  # metrics that stand below the primary one


class Cell(NamedTuple):
    """What stands in a table: the main text, and smaller text below it."""

    text: str
    small: str = ""


def ranked(results):
    """The methods that are done, the best first."""
    done = [method for method in results["methods"] if method["status"] == "done"]
    return sorted(done, key=lambda method: -method["metrics"][results["primary"]])


def is_noise(change):
    """Does the interval of [difference, low, high] include 0? Without an interval nothing is certain."""
    return change[1] is None or change[1] <= 0 <= change[2]


# What is said, in words.


def verdict(results):
    """The answer in a few sentences."""
    done, metric, base = ranked(results), results["primary"], results["base"]
    if not done:
        return ["No method has been trained and scored yet."]
    best, rows = done[0], done[0]["num_rows"]
    lines = [f"Best: {best['name']}, {metric} {value_text(best, metric)} on {rows} test rows."]
    if best["to_base"]:
        change, value = change_text(best["to_base"]), base["metrics"][metric]
        lines.append(f"The base model has {value:.2f}; the difference is {change}.")
    near = [method for method in done[1:] if is_noise(method["to_best"])]
    if near:
        names = ", ".join(method["name"] for method in near)
        lines.append(f"With these {rows} rows it cannot be told apart from {names}: more test rows or seeds would.")
        lines += cheapest([best, *near])
    elif len(done) > 1:
        lines.append("Its lead over every other method is larger than the noise of the test rows.")
    changes = {m["name"]: m["forgetting"]["loss"] for m in done}
    forgot = [name for name, change in changes.items() if change and change[0] > 0 and not is_noise(change)]
    if forgot:
        lines.append(f"Forgetting: the loss on general questions rose by more than the noise with {', '.join(forgot)}.")
    missing = [m["name"] for m in results["methods"] if m["status"] != "done"]
    if missing:
        lines.append(f"Without figures: {', '.join(missing)}.")
    return lines


def cheapest(methods):
    """Which of equally good methods costs least; nothing where that is not known."""
    found = {}
    for name, words, text in (
        ("seconds", "trains fastest", duration),
        ("peak_memory_bytes", "takes the least memory", size_text),
    ):
        if all(method[name] is not None for method in methods):
            least = min(methods, key=lambda method: method[name])
            found.setdefault(least["name"], []).append(f"{words} ({text(least[name])})")
    parts = [f"{name} {' and '.join(words)}" for name, words in found.items()]
    return [f"Of these, {'; '.join(parts)}."] if parts else []


def notes(results):
    """How to read the figures."""
    lines = [
        "Intervals hold the middle 95 % of a bootstrap over the test rows: how far a figure would move with other rows"
        " of the same kind. Differences are paired: both methods answer the same resampled rows. Inside the noise: the"
        " interval of the difference includes 0.",
        "They say nothing of another training run: for that, give several seeds; ± is then the standard deviation over"
        " seeds, and every figure is a mean over seeds.",
        "Trained: the number of weights that train. Time, tokens/s and memory are those of the training alone; memory"
        " is the peak of one process. On disk: the folder of the checkpoint.",
    ]
    if results["has_grid"]:
        lines.append(
            "Several values of a grid were tried on the same test rows, so the best of them looks a little better than"
            " it is: score it on other rows before you rely on the figure."
        )
    if results["forgetting"]:
        lines.append(
            "General loss and score are changes from the base on general questions (forgetting): the loss should not"
            " rise, the score not fall."
        )
    return lines


def value_text(entry, metric):
    """'83.50 [78.10, 88.20]'."""
    return " ".join(filter(None, metric_cell(entry, metric)))


def change_text(change):
    """'+3.21 [-1.02, +7.40], inside the noise'."""
    value, low, high = change
    ends = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
    return f"{value:+.2f}{ends}" + (", inside the noise" if is_noise(change) else "")


def duration(seconds):
    """'1 min 23 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(number):
    """29.6 M for a number of weights."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


# Tables.


def main_table(results):
    """Rows of cells, the header first."""
    metric = results["primary"]
    others = [name for name in results["metrics"] if name != metric and not name.endswith("_micro")][:NUM_OTHERS]
    head = ["method", metric, "to the base", "to the best"]
    head += ["general loss", "general score"] if results["forgetting"] else []
    head += ["trained", "tokens/s", "memory", "time", "on disk"]
    table = [[Cell(text) for text in head]]
    rest = [method for method in results["methods"] if method["status"] != "done"]
    for entry in (*ranked(results), *rest, results["base"]):
        row = [Cell(entry["name"], describe(entry))]
        if entry["status"] == "done":
            row.append(quality_cell(entry, metric, others))
        else:
            row.append(Cell(*entry["status"].split(" with ")))
        if entry["status"] == "done" and entry["name"] != "base":
            row += [change_cell(entry["to_base"]), change_cell(entry["to_best"], "the best")]
            forgetting = entry["forgetting"]
            row += [change_cell(forgetting[name]) for name in ("loss", "score")] if results["forgetting"] else []
            row += cost_cells(entry)
        table.append(row + [Cell("")] * (len(head) - len(row)))
    return table


def quality_cell(entry, metric, others):
    """The metric; below it its interval, how far seeds differ, and other metrics."""
    value, ends = metric_cell(entry, metric)
    spread = "" if entry["spread"] is None else f"± {entry['spread']:.2f} over {len(entry['runs'])} seeds"
    more = [f"{name} {number(entry['metrics'][name])}" for name in others]
    return Cell(value, "\n".join(filter(None, (ends, spread, *more))))


def metric_cell(entry, metric):
    """A metric, and its interval below it."""
    interval = entry["intervals"][metric]
    return Cell(number(entry["metrics"][metric]), f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def describe(entry):
    """What a method is, where its name does not say it."""
    train_type = entry.get("train_type", "as it is")
    return "" if train_type == entry["name"] else train_type


def number(value):
    """A metric's value."""
    return UNKNOWN if value is None else f"{value:.2f}"


def change_cell(change, without=UNKNOWN):
    """A difference, with its interval and what that means."""
    if change is None:
        return Cell(without)
    value, low, high = change
    ends = "" if low is None else f"[{low:+.2f}, {high:+.2f}]"
    return Cell(f"{value:+.2f}", "\n".join(filter(None, (ends, "inside the noise" * is_noise(change)))))


def cost_cells(entry):
    """Trained weights, speed, memory, time, size."""
    trained, total = entry["trained_weights"], entry["all_weights"]

    def show(name, text):
        return Cell(UNKNOWN if entry[name] is None else text(entry[name]))

    share = f"{trained / total:.2%} of {count(total)}" if trained is not None and total else ""
    return [
        Cell(UNKNOWN if trained is None else count(trained), share),
        show("tokens_per_second", lambda value: f"{value:,.0f}"),
        show("peak_memory_bytes", size_text),
        show("seconds", duration),
        show("checkpoint_bytes", size_text),
    ]


def metrics_table(results):
    """All metrics of the task with their intervals; rows of cells, the header first."""
    names = list(results["metrics"])
    table = [[Cell(text) for text in ("method", *names)]]
    for entry in (*ranked(results), results["base"]):
        if entry["status"] == "done":
            table.append([Cell(entry["name"]), *(metric_cell(entry, name) for name in names)])
    return table


def facts(results):
    """(name, text) of what was compared, on what."""
    machine = results["machine"]
    yield "base model", results["base_model"]
    yield "training rows", ", ".join(results["train_path"])
    yield "test rows", ", ".join(results["test_path"])
    yield "task", results["task"] or "none"
    yield "seeds", ", ".join(map(str, results["seeds"]))
    for method in results["methods"]:
        yield method["name"], ", ".join([method["train_type"], *(f"{k} {v}" for k, v in method["flags"].items())])
    if machine:
        yield "system", machine["system"]
        yield "CPU", f"{machine['cpu']}, {size_text(machine['memory_bytes'])} memory"
        yield "cards", "; ".join(machine["cards"]) or "none"
        yield "versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield "written", results["time"]


def title_of(results):
    """The report's heading."""
    return f"Comparison: {Path(results['plan']).stem}"
