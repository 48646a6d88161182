"""The report of compare.py from its figures: index.html, which needs no other file, report.md with its pictures, and
results.json."""

import base64
import html
import json
import os
from pathlib import Path
from typing import NamedTuple

from folders import size_text
from plots import draw_cost, draw_losses, draw_quality

UNKNOWN = "not known"
NUM_OTHERS = 2  # metrics that stand beside the primary one
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1d2329; font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Source Han Sans SC", sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid #dde2e7; }
p { margin: .4rem 0; max-width: 60rem; }
.quiet, small { color: #5b6570; font-size: .84rem; }
.verdict { background: #f0f6ff; border-left: 4px solid #2f6fd0; padding: .7rem 1rem; margin: 1rem 0;
  overflow-wrap: anywhere; }
.box { overflow-x: auto; border: 1px solid #dde2e7; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; line-height: 1.4; }
th, td { padding: .45rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e8ecf0;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { background: #f5f7f9; font-weight: 600; }
tbody th { font-weight: 600; position: sticky; left: 0; background: #fff; min-width: 8.5rem; max-width: 13rem;
  white-space: normal; overflow-wrap: anywhere; }
@media (min-width: 700px) { tbody th { min-width: 9rem; } }
thead th:first-child { position: sticky; left: 0; z-index: 1; }
td small, th small { display: block; font-weight: 400; white-space: pre; }
tr.best td, tr.best th { background: #eef7ee; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; max-width: 40rem; height: auto; display: block; }
figcaption { color: #5b6570; font-size: .86rem; }
.sample { border: 1px solid #dde2e7; border-radius: 6px; margin: 0 0 1rem; padding: .8rem; }
.texts { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.text { background: #f5f7f9; border-radius: 4px; padding: .5rem .7rem; min-width: 0; }
.text.reference { background: #eef7ee; }
.text b { display: block; font-size: .82rem; overflow-wrap: anywhere; }
.text b small { font-weight: 400; float: right; margin-left: .5rem; }
.plain { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 18rem; overflow-y: auto; margin: 0 0 .6rem; }
.text .plain { margin: .2rem 0 0; }
pre { background: #f5f7f9; border-radius: 6px; padding: .8rem; margin: .5rem 0; font-size: .82rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr); gap: .25rem 1rem; margin: 0; }
dt { color: #5b6570; max-width: 14rem; overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
"""


class Cell(NamedTuple):
    """What stands in a table: the main text, and smaller text below it."""

    text: str
    small: str = ""


def write_report(results, folder):
    """Write the report; returns the path of its page."""
    os.makedirs(folder, exist_ok=True)
    pictures = draw_pictures(results, folder)
    Path(folder, "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    Path(folder, "report.md").write_text(markdown(results, pictures), encoding="utf-8")
    page = Path(folder, "index.html")
    page.write_text(webpage(results, pictures, folder), encoding="utf-8")
    return str(page)


def draw_pictures(results, folder):
    """{file: what it shows}; a picture that there are no figures for is left out."""
    done, metric = ranked(results), results["primary"]
    curves = {m["name"]: [run["loss"] for run in m["runs"] if run["loss"]] for m in results["methods"]}
    curves = {name: runs for name, runs in curves.items() if runs}
    bars = [bar_of(entry, metric) for entry in (*done, results["base"]) if entry["status"] == "done"]
    pictures = {}
    if done:
        draw_quality(bars, metric, os.path.join(folder, "quality.png"))
        pictures["quality.png"] = f"{metric} on the test rows, with the 95 % intervals over rows"
    if curves:
        draw_losses(curves, os.path.join(folder, "loss.png"))
        pictures["loss.png"] = "Training loss of all runs"
    for name, title, scale, unit in (
        ("seconds", "time of a training", 60, "minutes"),
        ("peak_memory_bytes", "peak memory", 1e9, "GB"),
    ):
        points = [
            (*bar_of(m, metric), m[name] / scale) for m in results["methods"] if m in done and m[name] is not None
        ]
        if points:
            draw_cost(points, metric, f"{title}, {unit}", os.path.join(folder, f"{name}.png"))
            pictures[f"{name}.png"] = f"{metric} against {title}"
    return pictures


def bar_of(entry, metric):
    """(name, value, low, high) of a metric."""
    return (entry["name"], entry["metrics"][metric], *(entry["intervals"][metric] or (None, None)))


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
    value, interval = entry["metrics"][metric], entry["intervals"][metric]
    if value is None:
        return UNKNOWN
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


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
    value, _, ends = value_text(entry, metric).partition(" ")
    if entry["metrics"][metric] is None:
        return Cell(UNKNOWN)
    spread = "" if entry["spread"] is None else f"± {entry['spread']:.2f} over {len(entry['runs'])} seeds"
    more = [f"{name} {number(entry['metrics'][name])}" for name in others]
    return Cell(value, "\n".join(filter(None, (ends, spread, *more))))


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
            values = [value_text(entry, name).partition(" ") for name in names]
            table.append([Cell(entry["name"]), *(Cell(v, i) if i else Cell(v + s) for v, s, i in values)])
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


# The page.


def webpage(results, pictures, folder):
    """index.html: everything in one file."""
    escape = html.escape
    best = results["best"]
    parts = [f"<h1>{escape(title_of(results))}</h1>"]
    parts.append(f'<p class="quiet">Which method is best for this task? Written {escape(results["time"])}.</p>')
    parts.append('<div class="verdict">' + "".join(f"<p>{escape(line)}</p>" for line in verdict(results)) + "</div>")
    parts += ["<h2>Methods</h2>", html_table(main_table(results), best)]
    parts += ["<h2>Pictures</h2>", '<div class="pictures">']
    for name, caption in pictures.items():
        data = base64.b64encode(Path(folder, name).read_bytes()).decode("ascii")
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    parts += ["</div>", "<h2>All metrics</h2>", html_table(metrics_table(results), best)]
    titles = "; ".join(f"{name}: {title}" for name, title in results["metrics"].items())
    parts.append(f'<p class="quiet">{escape(titles)}.</p>')
    if results["samples"]:
        parts.append("<h2>Sample rows</h2>")
        parts.append('<p class="quiet">Evenly spaced in the test rows; the answers are those of the first seed.</p>')
        parts += [html_sample(sample, results["primary"]) for sample in results["samples"]]
    parts += ["<h2>How to read it</h2>", *(f"<p>{escape(line)}</p>" for line in notes(results))]
    parts += ["<h2>What was compared, on what</h2>", "<dl>"]
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in facts(results)]
    parts += ["</dl>", "<h2>Commands</h2>", "<details><summary>All commands, in order</summary>"]
    parts += [f"<pre>{escape(command)}</pre>" for command in results["commands"]]
    parts.append("</details>")
    return PAGE.format(title=escape(title_of(results)), style=STYLE, body="\n".join(parts))


def html_table(table, best):
    """A table that scrolls inside its box."""

    def cell(cell, tag):
        small = f"<small>{html.escape(cell.small)}</small>" if cell.small else ""
        text = html.escape(cell.text)
        if tag == "th":  # a long name may be broken here
            text = text.replace(",", ",<wbr>").replace("=", "=<wbr>")
        return f"<{tag}>{text}{small}</{tag}>"

    lines = ['<div class="box"><table>', "<thead><tr>", *(cell(c, "th") for c in table[0]), "</tr></thead>", "<tbody>"]
    for row in table[1:]:
        lines.append('<tr class="best">' if row[0].text == best else "<tr>")
        lines += [cell(c, "td" if number else "th") for number, c in enumerate(row)]
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def html_sample(sample, metric):
    """One row: the question, the reference and the answers side by side."""

    def text(title, body, small="", kind=""):
        small = f"<small>{html.escape(small)}</small>" if small else ""
        body = f'<div class="plain">{html.escape(body) or "<small>(empty)</small>"}</div>'
        return f'<div class="text{kind}"><b>{small}{html.escape(title)}</b>{body}</div>'

    texts = [text("reference", sample["reference"], kind=" reference")]
    for name, answer in sample["answers"].items():
        score = "" if answer["score"] is None else f"{metric} {answer['score']:.0f}"
        texts.append(text(name, answer["text"], score))
    question = f'<p class="plain"><small>Row {sample["row"]}</small>\n{html.escape(sample["question"])}</p>'
    return "\n".join(['<div class="sample">', question, '<div class="texts">', *texts, "</div></div>"])


# The same as Markdown.


def markdown(results, pictures):
    """report.md, with the pictures beside it."""
    lines = [f"# {plain(title_of(results))}", "", *(f"{plain(line)}  " for line in verdict(results)), ""]
    lines += ["## Methods", "", *markdown_table(main_table(results)), ""]
    lines += [line for name, caption in pictures.items() for line in (f"![{plain(caption)}]({name})", "")]
    lines += ["## All metrics", "", *markdown_table(metrics_table(results)), ""]
    for sample in results["samples"]:
        lines += [f"## Row {sample['row']}", "", *fenced(sample["question"]), "", "Reference:", ""]
        lines += fenced(sample["reference"])
        for name, answer in sample["answers"].items():
            score = "" if answer["score"] is None else f" ({results['primary']} {answer['score']:.0f})"
            lines += ["", f"{plain(name)}{score}:", "", *fenced(answer["text"])]
        lines.append("")
    lines += ["## How to read it", "", *(f"- {plain(line)}" for line in notes(results)), ""]
    lines += [
        "## What was compared, on what",
        "",
        *(f"- {name}: {plain(str(text))}" for name, text in facts(results)),
        "",
    ]
    return "\n".join([*lines, "## Commands", "", *fenced("\n".join(results["commands"])), ""])


def markdown_table(table):
    """The lines of a table."""
    rows = [[plain(f"{cell.text} {cell.small}".strip()) for cell in row] for row in table]
    rows.insert(1, ["---"] * len(rows[0]))
    return [f"| {' | '.join(row)} |" for row in rows]


def plain(text):
    """Text that Markdown takes as it is, on one line."""
    text = " ".join(html.escape(text, quote=False).split())
    return "".join(f"\\{char}" if char in "\\|`*_[]" else char for char in text)


def fenced(text):
    """Lines of a code block that the text cannot end."""
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return [f"{fence}text", text, fence]
