"""What a million rows cost: encoding them the first time, starting with them the second time, and memory.

    python benchmarks/rows.py
    python benchmarks/rows.py --num_rows 100000 --num_proc 1 --save

Made-up advertisements (scripts/make_data.py) as JSON Lines, encoded with the small vocabulary of tests/golden/glm3,
all in a temporary folder. The first and the second time are processes of their own, as two runs of train.py are. The
second one imports first what train.py has imported by then, so what it shows is what the rows add. Its files are still
in the memory of the system.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

MAX_LEN, MAX_SRC_LEN = 256, 128  # tokens; no row is that long
BATCH_SIZE = 8  # rows of a micro-batch
NUM_READ = 20_000  # rows that are read at random and collated
INSTRUCTION = "写广告："
NUM_CLAUSES = 2  # of the advertisement: the small vocabulary has few words, so its rows are long


def write_rows(path, num_rows):
    """Write the rows; their number of bytes."""
    from make_data import adgen_row

    rng = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            row = adgen_row(rng)
            answer = "，".join(row["output"].split("，")[:NUM_CLAUSES])
            row = {"instruction": INSTRUCTION, "input": row["input"], "output": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return os.path.getsize(path)


def load(path, num_proc):
    """Load the file: (tokenizer, rows, counts, memory before load_rows, time when it began)."""
    from modes import MODES
    from rows.cache import load_rows
    from rows.checks import Columns
    from rows.encoding import Encoding

    mode = MODES["glm3"]
    tokenizer = mode.tokenizer_class.from_pretrained(str(ROOT / "tests" / "golden" / "glm3"))
    tokenizer.encode_text("水")
    before, start = memory(), time.perf_counter()
    rows, counts = load_rows([path], Encoding(Columns(), tokenizer, mode, MAX_LEN, MAX_SRC_LEN, False), num_proc)
    return tokenizer, rows, counts, before, start


def memory():
    """Resident memory of this process in MB: {"VmRSS", "RssAnon"}, the latter without mapped files."""
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}


def first_time(path, num_proc):
    """Encode the rows."""
    _, rows, counts, _, start = load(path, num_proc)
    seconds = time.perf_counter() - start
    folder = pathlib.Path(rows.ids.base.filename).parent
    return {
        "first_seconds": seconds,
        "rows_per_second": len(rows) / seconds,
        "tokens_per_row": counts["tokens"] / len(rows),
        "cache_mb": sum(file.stat().st_size for file in folder.iterdir()) / 2**20,
    }


def second_time(path):
    """Load the rows, plan an epoch, read some rows at random, then touch all."""
    import torch

    from rows.batches import Split, Updates, collate

    collate([], 0)  # what is imported in it
    tokenizer, rows, _, before, start = load(path, num_proc=1)
    loaded = time.perf_counter() - start
    updates = Updates(rows.lengths, rows.num_labels, Split(BATCH_SIZE, 1, 1), rank=0, seed=1)
    epoch = updates.epoch(0)
    collate([rows[n] for n in next(epoch).micro_batches[0]], tokenizer.pad_token_id)
    figures = {"second_seconds": time.perf_counter() - start, "load_seconds": loaded}

    numbers = torch.randint(len(rows), (NUM_READ,), generator=torch.Generator().manual_seed(1)).tolist()
    start = time.perf_counter()
    drawn = [rows[n] for n in numbers]
    figures["microseconds_per_row"] = (time.perf_counter() - start) / NUM_READ * 1e6
    start = time.perf_counter()
    for i in range(0, NUM_READ, BATCH_SIZE):
        collate(drawn[i : i + BATCH_SIZE], tokenizer.pad_token_id)
    figures["microseconds_per_collated_row"] = (time.perf_counter() - start) / NUM_READ * 1e6

    assert sum(int(rows[n]["input_ids"].sum()) for n in range(len(rows))) > 0  # every page is touched
    assert sum(update.num_rows for update in epoch) == len(rows) - BATCH_SIZE  # and the epoch runs to its end
    after = memory()
    return figures | {f"extra_{name}_mb": after[name] - before[name] for name in after}


def in_fresh_process(part, path, num_proc, cache):
    """The figures of `first` or `second`; the cache of encoded rows is a folder of ours."""
    command = [sys.executable, os.path.abspath(__file__), "--part", part, "--path", path, "--num_proc", str(num_proc)]
    environment = {**os.environ, "HF_DATASETS_CACHE": cache, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, default=1_000_000, help="rows")
    parser.add_argument("--num_proc", type=int, default=0, help="processes that encode; 0: all cores of this host")
    parser.add_argument("--save", action="store_true", help="put the figures into benchmarks/RESULTS.md")
    parser.add_argument("--part", choices=("first", "second"), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        figures = first_time(args.path, args.num_proc) if args.part == "first" else second_time(args.path)
        print(json.dumps(figures))
        return

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.jsonl")
        print(f"writing {args.num_rows:,} rows", file=sys.stderr)
        num_bytes = write_rows(path, args.num_rows)
        figures = {
            "num_rows": args.num_rows,
            "num_proc": args.num_proc or len(os.sched_getaffinity(0)),
            "file_mb": num_bytes / 2**20,
        }
        for part in ("first", "second"):
            figures |= in_fresh_process(part, path, args.num_proc, os.path.join(folder, "cache"))
    lines = [
        ("rows", "{num_rows:,} of {tokens_per_row:.0f} tokens, {file_mb:.0f} MB of JSON Lines"),
        ("first time, load_rows", "{first_seconds:.1f} s, {rows_per_second:,.0f} rows/s, processes: {num_proc}"),
        ("second time, load_rows to first batch", "{second_seconds:.2f} s, {load_seconds:.2f} s of them load_rows"),
        ("a random row", "{microseconds_per_row:.1f} µs; collated {microseconds_per_collated_row:.1f} µs"),
        ("extra memory, all rows touched", "RssAnon {extra_RssAnon_mb:.0f} MB, VmRSS {extra_VmRSS_mb:.0f} MB"),
        ("cache on disk", "{cache_mb:.0f} MB"),
    ]
    shown = {name: text.format(**figures) for name, text in lines}
    for name, text in shown.items():
        print(f"{name:<40}{text}")
    if args.save:
        from benchmarks import report

        argv = [word for word in argv or sys.argv[1:] if word != "--save"]
        rows = [{"what": name, "measured": text} for name, text in shown.items()]
        report.save("Rows", " ".join(["python benchmarks/rows.py", *argv]), rows)


if __name__ == "__main__":
    main()
