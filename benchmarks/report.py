"""Figures of the benchmarks: kept in results.json beside this file, shown in RESULTS.md, which is made from it."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform

from runtime.machine import versions

FOLDER = pathlib.Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
PAGE = FOLDER / "RESULTS.md"
HEAD = """# Measured

Made by the scripts in this folder (`--save`), never by hand. Speed and memory are ratios within one run; the absolute
figures belong to the machine named beside them. What the options do: [docs/performance.md](../docs/performance.md).
"""


def machine():
    """What ran: processor or GPU, versions, date."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
        name = f"{os.cpu_count()} cores, {' '.join(sorted(models)) or platform.processor()}"
    installed = ", ".join(
        f"{name} {version}" for name, version in versions(("torch", "transformers", "deepspeed")).items()
    )
    return f"{name}; {installed}; {datetime.date.today().isoformat()}"


def save(section, command, rows):
    """Put the rows (dicts of shown values) of a command into its section, in place of its earlier ones."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results.setdefault(section, {})[command] = {"machine": machine(), "rows": rows}
    RESULTS.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


def page(results):
    """RESULTS.md of all that was kept."""
    text = HEAD
    for section in sorted(results):
        text += f"\n## {section}\n"
        for command, run in results[section].items():
            text += f"\n```bash\n{command}\n```\n\n{run['machine']}\n\n{table(run['rows'])}"
    return text


def table(rows):
    """A Markdown table of dicts; columns in the order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
