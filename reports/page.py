"""The report of compare.py from its figures: index.html, which needs no other file, report.md with its pictures, and
results.json."""

import base64
import html
import json
import os
from pathlib import Path
from typing import Any

from reports.plots import can_draw, draw_cost, draw_losses, draw_quality
from reports.text import Cell, facts, main_table, metrics_table, notes, ranked, title_of, verdict_lines, words_of
from reports.words import ENGLISH, Words
from runtime.exits import UserError
from runtime.folders import whole_file
from runtime.streams import visible

PAGE = """<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
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


def read_results(folder: str) -> dict:
    """The figures of the report in a folder, {} where there is none; UserError for a folder with something else."""
    if not os.path.isdir(folder) or not os.listdir(folder):
        return {}
    try:
        results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
        if {"plan", "methods"} <= results.keys():
            return results
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise UserError(f"{folder}: the report goes there, and it holds something else: remove or rename it")


def write_report(results: dict, folder: str, titles: dict[str, str]) -> str:
    """Write the report; returns the path of its page.

    titles: {metric: what it is, in the report's language}.
    """
    results = shown(results)
    if not os.path.isdir(folder):
        os.mkdir(folder)
    write_text(Path(folder, "results.json"), json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    pictures = draw_pictures(results, folder)
    write_text(Path(folder, "report.md"), markdown(results, pictures))
    page = Path(folder, "index.html")
    write_text(page, webpage(results, pictures, folder, titles))
    return str(page)


def write_text(path: Path, text: str) -> None:
    """A file of the report, whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def shown(value: Any) -> Any:
    """Figures whose texts, those of rows and models among them, hold nothing that a terminal or a page would obey."""
    if isinstance(value, dict):
        return {shown(key): shown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shown(one) for one in value]
    return visible(value, as_lines=True) if isinstance(value, str) else value


def draw_pictures(results: dict, folder: str) -> dict[str, str]:
    """{file: what it shows}; a picture that there are no figures for is left out."""
    done, metric = ranked(results), results["primary"]
    curves = {m["name"]: [run["loss"] for run in m["runs"] if run["loss"]] for m in results["methods"]}
    curves = {name: runs for name, runs in curves.items() if runs}
    bars = [bar_of(entry, metric) for entry in (*done, results["base"]) if entry["status"] == "done"]
    say, pictures = words_of(results), {}
    drawn = say if can_draw(say("update") + say("peak memory")) else ENGLISH  # the words on the axes
    if done:
        draw_quality(bars, metric, os.path.join(folder, "quality.png"))
        caption = say("{metric} on the test rows, with the 95 % intervals over rows", metric=metric)
        pictures["quality.png"] = caption
    if curves:
        draw_losses(curves, os.path.join(folder, "loss.png"), (drawn("update"), drawn("loss per supervised token")))
        pictures["loss.png"] = say("Training loss of all runs")
    for name, title, scale, unit in (
        ("seconds", "time of a training", 60, "minutes"),
        ("peak_memory_bytes", "peak memory", 1e9, "GB"),
    ):
        points = [
            (*bar_of(m, metric), m[name] / scale) for m in results["methods"] if m in done and m[name] is not None
        ]
        if points:
            draw_cost(points, metric, f"{drawn(title)}, {drawn(unit)}", os.path.join(folder, f"{name}.png"))
            pictures[f"{name}.png"] = say("{metric} against {cost}", metric=metric, cost=say(title))
    return pictures


def bar_of(entry: dict, metric: str) -> tuple:
    """(name, value, low, high) of a metric."""
    return (entry["name"], entry["metrics"][metric], *(entry["intervals"][metric] or (None, None)))


def webpage(results: dict, pictures: dict[str, str], folder: str, titles: dict[str, str]) -> str:
    """index.html: everything in one file."""
    escape, say, best = html.escape, words_of(results), results["best"]

    def head(text: str) -> str:
        return f"<h2>{escape(say(text))}</h2>"

    parts = [f"<h1>{escape(title_of(results))}</h1>"]
    subtitle = say("Which method is best for this task? Written {time}.", time=results["time"])
    parts.append(f'<p class="quiet">{escape(subtitle)}</p>')
    parts.append(
        '<div class="verdict">' + "".join(f"<p>{escape(line)}</p>" for line in verdict_lines(results)) + "</div>"
    )
    parts += [head("Methods"), html_table(main_table(results), best)]
    parts += [head("Pictures"), '<div class="pictures">']
    for name, caption in pictures.items():
        data = base64.b64encode(Path(folder, name).read_bytes()).decode("ascii")
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    parts += ["</div>", head("All metrics"), html_table(metrics_table(results), best)]
    explained = "; ".join(f"{name}: {titles[name]}" for name in results["metrics"])
    parts.append(f'<p class="quiet">{escape(explained)}.</p>')
    if results["samples"]:
        parts.append(head("Sample rows"))
        text = say("Evenly spaced in the test rows; the answers are those of the first seed.")
        parts.append(f'<p class="quiet">{text}</p>')
        parts += [html_sample(sample, results["primary"], say) for sample in results["samples"]]
    parts += [head("How to read it"), *(f"<p>{escape(line)}</p>" for line in notes(results))]
    parts += [head("What was compared, on what"), "<dl>"]
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in facts(results)]
    parts += ["</dl>", head("Commands"), f"<details><summary>{escape(say('All commands, in order'))}</summary>"]
    parts += [f"<pre>{escape(command)}</pre>" for command in results["commands"]]
    parts.append("</details>")
    body = "\n".join(parts)
    return PAGE.format(language=say.language, title=escape(title_of(results)), style=STYLE, body=body)


def html_table(table: list[list[Cell]], best: str | None) -> str:
    """A table that scrolls inside its box."""

    def cell(cell: Cell, tag: str) -> str:
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


def html_sample(sample: dict, metric: str, say: Words) -> str:
    """One row: the question, the reference and the answers side by side."""

    empty = f"<small>{say('(empty)')}</small>"

    def text(title: str, body: str, small: str = "", kind: str = "") -> str:
        small = f"<small>{html.escape(small)}</small>" if small else ""
        body = f'<div class="plain">{html.escape(body) or empty}</div>'
        return f'<div class="text{kind}"><b>{small}{html.escape(title)}</b>{body}</div>'

    texts = [text(say("reference"), sample["reference"], kind=" reference")]
    for name, answer in sample["answers"].items():
        score = "" if answer["score"] is None else f"{metric} {answer['score']:.0f}"
        texts.append(text(name, answer["text"], score))
    row = say("Row {number}", number=sample["row"])
    question = f'<p class="plain"><small>{row}</small>\n{html.escape(sample["question"])}</p>'
    return "\n".join(['<div class="sample">', question, '<div class="texts">', *texts, "</div></div>"])


def markdown(results: dict, pictures: dict[str, str]) -> str:
    """report.md, with the pictures beside it."""
    say = words_of(results)
    lines = [f"# {escaped(title_of(results))}", "", *(f"{escaped(line)}  " for line in verdict_lines(results)), ""]
    lines += [f"## {say('Methods')}", "", *markdown_table(main_table(results)), ""]
    lines += [line for name, caption in pictures.items() for line in (f"![{escaped(caption)}]({name})", "")]
    lines += [f"## {say('All metrics')}", "", *markdown_table(metrics_table(results)), ""]
    for sample in results["samples"]:
        lines += [f"## {say('Row {number}', number=sample['row'])}", "", *fenced(sample["question"]), ""]
        lines += [f"{say('reference')}:", "", *fenced(sample["reference"])]
        for name, answer in sample["answers"].items():
            score = "" if answer["score"] is None else f" ({results['primary']} {answer['score']:.0f})"
            lines += ["", f"{escaped(name)}{score}:", "", *fenced(answer["text"])]
        lines.append("")
    lines += [f"## {say('How to read it')}", "", *(f"- {escaped(line)}" for line in notes(results)), ""]
    lines += [f"## {say('What was compared, on what')}", ""]
    lines += [*(f"- {escaped(name)}: {escaped(str(text))}" for name, text in facts(results)), ""]
    return "\n".join([*lines, f"## {say('Commands')}", "", *fenced("\n".join(results["commands"])), ""])


def markdown_table(table: list[list[Cell]]) -> list[str]:
    """The lines of a table."""
    rows = [[escaped(f"{cell.text} {cell.small}".strip()) for cell in row] for row in table]
    rows.insert(1, ["---"] * len(rows[0]))
    return [f"| {' | '.join(row)} |" for row in rows]


def escaped(text: str) -> str:
    """Text that Markdown takes as it is, on one line."""
    text = " ".join(html.escape(text, quote=False).split())
    return "".join(f"\\{char}" if char in "\\|`*_[]" else char for char in text)


def fenced(text: str) -> list[str]:
    """Lines of a code block that the text cannot end."""
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return [f"{fence}text", text, fence]
