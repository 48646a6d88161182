"""Do the tests notice? Puts small faults into the code, one at a time, and runs the nearest tests on each.

    bash scripts/mutate.sh                      (all, figures into docs/testing.md)
    bash scripts/mutate.sh --only optimizer.py  (those whose line has this text; no figures)

scripts/mutants.yaml says which functions and which tests belong together. Faults are of two kinds: written by hand in
that file, and made from the functions' syntax, of which a seed chooses. Each is tried in a copy of the tree, in a
process forked from one that has imported the libraries, so that it costs its tests and little more.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a call from any folder
from runtime import entry  # noqa: I001  first: Ctrl-C is heard while the others are imported

# isort: split

import ast
import builtins
import copy
import fnmatch
import hashlib
import importlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from flags.common import OneLineParser
from runtime.exits import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE = Path(ROOT, "scripts", "mutants.yaml")
PAGE = Path(ROOT, "docs", "testing.md")
BEGIN, END = "<!-- figures of scripts/mutate.py -->", "<!-- end of the figures -->"
BAR = 95.0  # per cent of the faults that the tests must find
EACH = 1  # faults chosen in a function, unless the table says another number
# Imported once, before the forks. Nothing of the project: each fork imports its own copy.
LIBRARIES = (
    "_pytest.assertion.rewrite deepspeed deepspeed.ops.adam deepspeed.runtime.zero.muon.muon_optimizer hypothesis jieba"
    " matplotlib.pyplot nltk.translate.bleu_score peft peft.tuners.lora pytest rouge_chinese safetensors.torch"
    " sentencepiece torch.distributed torch.nn.attention.flex_attention torch.utils.tensorboard tqdm transformers"
    " transformers.generation transformers.modeling_layers yaml"
).split()
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not launch and not gpu"]
SPARE_SECONDS, SPARE_FACTOR = 20, 5  # tests that take this much longer than without the fault have found it

HARMLESS = ("device", "encoding", "errors", "file", "flush", "total", "desc")  # arguments that may be dropped on a CPU
FLIPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass
class Mutant:
    """A fault: `before` is replaced by `after` at `start`, a place in the file's text."""

    file: str
    start: int
    before: str
    after: str
    tests: str
    function: str = ""  # that it was made from; of one that was written by hand: ""
    line: int = 0
    shown: str = ""  # the change of its line
    reason: tuple = ()  # why it is no fault, in both languages
    found: bool = False
    seconds: float = 0.0

    def text(self, source):
        """The file with the fault."""
        return source[: self.start] + self.after + source[self.start + len(self.before) :]


def read_table(path, seed=1):
    """(all faults of the table, a list of Mutants; problems: what of the table is no longer in the files).

    seed: of the choice among the faults that a function's syntax gives.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}): fix it") from None
    mutants, problems = [], []
    for group in table["groups"]:
        for file, names in group.get("functions", {}).items():
            source = read(file)
            found = functions_in(ast.parse(source))
            for name, _, number in (word.partition(":") for word in names.split()):
                if name not in found:
                    problems.append(f"{path.name}: {file} has no function {name}: fix the table")
                    continue
                made = made_from(source, found[name], file, name, group["tests"])
                mutants += chosen(made, int(number or EACH), seed)
        for file, before, after in group.get("faults", []):
            source = read(file)
            if source.count(before) != 1:
                number = source.count(before)
                problems.append(f"{path.name}: {before!r} is {number} times in {file}, not once: fix the table")
                continue
            mutants.append(Mutant(file, source.index(before), before, after, group["tests"]))
    by_result = {}
    for mutant in mutants:  # the same fault, written by hand and made
        by_result.setdefault((mutant.file, mutant.text(read(mutant.file))), mutant)
    mutants = list(by_result.values())
    reasons = {tuple(line[:3]): tuple(line[3:]) for line in table.get("no_fault", [])}
    for mutant in mutants:
        describe(mutant)
        for (file, text, change), reason in reasons.items():
            if mutant.file == file and text in mutant.shown.split(" → ")[0] and change in mutant.shown.split(" → ")[1]:
                mutant.reason = reason
    return mutants, problems


def read(file):
    """A source file's text."""
    return Path(ROOT, file).read_text(encoding="utf-8")


def describe(mutant):
    """Fill in where a fault is, and what becomes of its line."""
    source = read(mutant.file)
    mutant.line = source.count("\n", 0, mutant.start) + 1
    first = source.rfind("\n", 0, mutant.start) + 1
    last = source.find("\n", mutant.start + len(mutant.before))
    old, new = source[first:last], source[first : mutant.start] + mutant.after
    new += source[mutant.start + len(mutant.before) : last]
    mutant.shown = " → ".join(" ".join(text.split()) for text in (old, new))


def functions_in(tree, prefix=""):
    """{name: node} of functions, methods (Class.name) and module-level assignments of a name."""
    found = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[prefix + node.name] = node
            found |= functions_in(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[prefix + node.targets[0].id] = node
    return found


def chosen(mutants, number, seed=1):
    """So many of a function's faults: those with the smallest hashes, whatever line they stand on."""

    def draw(mutant):
        text = f"{seed} {mutant.file} {mutant.function} {mutant.before} {mutant.after}"
        return hashlib.sha256(text.encode()).hexdigest()

    return sorted(mutants, key=draw)[:number]


def made_from(source, function, file, name, tests):
    """Every fault that the syntax of a function gives, a list of Mutants."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line, column):  # columns are counted in bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found, seen = [], set()
    for node in code_in(function):
        for new in changes_of(node):
            part, new = new if isinstance(new, tuple) else (node, new)
            start, end = place(part.lineno, part.col_offset), place(part.end_lineno, part.end_col_offset)
            before, after = source[start:end], new if isinstance(new, str) else ast.unparse(new)
            if isinstance(new, (ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp)):
                after = f"({after})"
            if (start, after) not in seen and after != before:
                seen.add((start, after))
                found.append(Mutant(file, start, before, after, tests, name))
    return found


def code_in(node):
    """The nodes of a function that decide what it does: no annotations, no texts, no messages of errors."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            is_message = isinstance(child, (ast.Raise, ast.JoinedStr, ast.Assert))
            call = child.value if isinstance(child, ast.Expr) else child
            is_message |= isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("print", "print_rank_0")
            if isinstance(child, ast.AST) and not is_message:
                yield child
                yield from code_in(child)


def changes_of(node):
    """Yield what a node may be replaced by: another node or a text, or (a part of it, what that may be replaced by)."""

    def changed(**values):
        new = copy.deepcopy(node)
        for name, value in values.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPS:
        yield changed(ops=[FLIPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield changed(op=FLIPS[type(node.op)]())
    elif isinstance(node, ast.BinOp) and type(node.op) in FLIPS and not has_text(node):
        yield changed(op=FLIPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield str(node.value * 2 if type(node.value) is float and node.value else node.value + 1)
    elif isinstance(node, ast.AugAssign):
        yield f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"
    elif isinstance(node, ast.IfExp):
        yield changed(body=node.orelse, orelse=node.body)
    elif isinstance(node, (ast.If, ast.While)) and isinstance(node.test, (ast.Name, ast.Attribute, ast.Call)):
        yield node.test, f"not {ast.unparse(node.test)}"
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield node.ifs[0], "True"
    if isinstance(node, ast.Call):
        # Of the project's own functions, which a name calls: elsewhere it would mostly be no call that can be made.
        is_own = isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id)
        if len(node.args) > 1 and is_own and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            yield changed(args=[node.args[1], node.args[0], *node.args[2:]])
        for number, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, *HARMLESS):
                yield changed(keywords=[*node.keywords[:number], *node.keywords[number + 1 :]])


def has_text(node):
    """Is a text, or a list, among the operands of a sum?"""
    kinds = (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple)
    return any(
        isinstance(part, kinds) or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in ast.walk(node)
    )


class Tree:
    """A copy of the project for one process at a time."""

    def __init__(self, folder):
        self.folder, self.number = Path(folder), 0
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in names:
            source, target = Path(ROOT, name), self.folder / "tree" / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def start(self, tests, mutant=None):
        """Run tests in a fork, with a fault put in; its process id."""
        self.restore = None
        if mutant:
            path = self.folder / "tree" / mutant.file
            source, changed = path.read_text(encoding="utf-8"), path.stat().st_mtime
            path.write_text(mutant.text(source), encoding="utf-8")
            self.number += 1  # compiled files are told apart by the time of their source: none is taken for another
            os.utime(path, (changed + 10 * self.number,) * 2)
            self.restore = path, source, changed
        process = os.fork()
        if process == 0:
            os.setsid()
            for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
                signal.signal(number, handler)
            code = 99
            try:
                code = run_tests(self.folder, tests)
            finally:
                os._exit(code)
        self.tests, self.mutant, self.began = tests, mutant, time.monotonic()
        return process

    def tidy(self, process):
        """Afterwards: end what the tests have left, take the fault out."""
        try:
            os.killpg(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        if self.restore:
            path, source, changed = self.restore
            path.write_text(source, encoding="utf-8")
            os.utime(path, (changed, changed))
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)


def run_tests(folder, tests):
    """In a fork: pytest's exit code."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number in (1, 2):
        os.dup2(log, number)
    os.chdir(folder / "tree")
    sys.path = [
        str(folder / "tree"),
        *(place for place in sys.path if not place.startswith(ROOT + "/scripts") and place != ROOT),
    ]
    for name, module in list(sys.modules.items()):
        if is_of_project(module):
            del sys.modules[name]
    sys.excepthook = sys.__excepthook__
    import hypothesis
    import pytest

    # An example that fails is enough: none simpler is looked for.
    phases = [phase for phase in hypothesis.Phase if phase.name not in ("shrink", "explain")]
    hypothesis.settings.register_profile("mutants", phases=phases, database=None)
    hypothesis.settings.load_profile("mutants")
    return int(
        pytest.main([*PYTEST, f"--basetemp={folder / 'tmp'}", f"--rootdir={folder / 'tree'}", *shlex.split(tests)])
    )


def is_of_project(module):
    """Was a module imported from this tree (and not from an environment inside it)?"""
    file = getattr(module, "__file__", None) or ""
    return file.startswith(ROOT + os.sep) and "site-packages" not in file and module.__name__ != "__main__"


def run_jobs(jobs, trees, limits):
    """Yield (tests, mutant, exit code or None after the time limit, seconds) of each (tests, mutant) as it ends."""
    waiting, idle, running = list(reversed(jobs)), list(trees), {}
    while waiting or running:
        while waiting and idle:
            tree = idle.pop()
            running[tree.start(*waiting.pop())] = tree
        process, status = os.waitpid(-1, os.WNOHANG)
        late = [p for p, t in running.items() if time.monotonic() - t.began > limits.get(t.tests, 600)]
        if process == 0 and not late:
            time.sleep(0.02)
            continue
        code = os.waitstatus_to_exitcode(status) if process else None
        if process == 0:
            process = late[0]
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        tree = running.pop(process)
        seconds = time.monotonic() - tree.began
        log = (tree.folder / "log.txt").read_text(errors="replace")
        tree.tidy(process)
        idle.append(tree)
        yield tree.tests, tree.mutant, code, seconds, log


def prepare():
    """The environment of the tests, and the libraries."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    for name in LIBRARIES:
        importlib.import_module(name)


def try_all(mutants, num_jobs):
    """Run the tests of each mutant and note what they found; UserError where they fail without a fault."""
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as scratch:
        trees = [Tree(os.path.join(scratch, str(number))) for number in range(num_jobs)]
        limits = {}
        groups = dict.fromkeys(mutant.tests for mutant in mutants)
        for tests, _, code, seconds, log in run_jobs([(tests, None) for tests in groups], trees, {}):
            if code != 0:
                raise UserError(f"{tests}: fails without a fault (exit code {code}): {log[-1500:]}")
            limits[tests] = SPARE_SECONDS + SPARE_FACTOR * seconds
            print(f"{seconds:5.1f} s without a fault: {tests}", flush=True)
        jobs = [(mutant.tests, mutant) for mutant in mutants]
        for number, (_, mutant, code, seconds, _) in enumerate(run_jobs(jobs, trees, limits), start=1):
            mutant.found, mutant.seconds = code != 0, seconds
            word = "found" if mutant.found else "no fault" if mutant.reason else "LIVES"
            print(f"{number:4} of {len(mutants)} {seconds:5.1f} s {word:8} {name_of(mutant)}", flush=True)


def name_of(mutant):
    """file:line and the change, on one line."""
    return f"{mutant.file}:{mutant.line}: {mutant.shown}"


def summary(mutants):
    """{file: (faults, found)}, those left out that are no faults."""
    counts = {}
    for mutant in mutants:
        if not mutant.reason:
            faults, found = counts.get(mutant.file, (0, 0))
            counts[mutant.file] = faults + 1, found + mutant.found
    return dict(sorted(counts.items()))


def share_found(mutants):
    """Per cent of the faults that were found."""
    counts = summary(mutants).values()
    return 100 * sum(found for _, found in counts) / max(1, sum(faults for faults, _ in counts))


WORDS = (
    {
        "total": "{faults} faults, {found} found: {share:.1f} %. {seconds:.1f} s for one, on average.",
        "head": "file | faults | found",
        "lives": "Not found:",
        "none": "Not found: none.",
        "equal": "Changes that are no faults, and why:",
    },
    {
        "total": "{faults} 个错误，发现 {found} 个：{share:.1f} %。平均每个 {seconds:.1f} 秒。",
        "head": "文件 | 错误 | 发现",
        "lives": "没有发现的：",
        "none": "没有发现的：无。",
        "equal": "不算错误的改动及其原因：",
    },
)


def figures(mutants, language):
    """The figures for docs/testing.md, in English (0) or Chinese (1)."""
    words, counts = WORDS[language], summary(mutants)
    faults, found = (sum(values) for values in zip(*counts.values()))
    seconds = sum(mutant.seconds for mutant in mutants) / len(mutants)
    values = {"faults": faults, "found": found, "share": share_found(mutants), "seconds": seconds}
    lines = [words["total"].format(**values), "", f"| {words['head']} |", "|---|---|---|"]
    lines += [f"| `{file}` | {faults} | {found} |" for file, (faults, found) in counts.items()]
    lives = [mutant for mutant in mutants if not mutant.found and not mutant.reason]
    lines += ["", words["lives"] if lives else words["none"], *([""] * bool(lives))]
    lines += [f"- `{name_of(mutant)}`" for mutant in lives]
    equal = [mutant for mutant in mutants if mutant.reason]
    lines += ["", words["equal"], ""] if equal else []
    lines += [f"- `{name_of(mutant)}`: {mutant.reason[language]}" for mutant in equal]
    return "\n".join(lines)


def page_with(page, mutants):
    """The page with the figures of both languages between their marks."""
    parts = re.split(f"({re.escape(BEGIN)}.*?{re.escape(END)})", page, flags=re.S)
    for language, number in enumerate((1, 3)):
        parts[number] = f"{BEGIN}\n{figures(mutants, language)}\n{END}"
    return "".join(parts)


def main(argv):
    """Try the faults; the exit code is 1 where the tests find too few."""
    parser = OneLineParser(prog="mutate.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        default="",
        help="text, or a pattern with *, of file:line: change; left out: all, and docs/testing.md is written",
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time, default: one for each core"
    )
    parser.add_argument("--seed", type=int, default=1, help="another choice of faults; no figures are written then")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies go
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give at least 1")
    mutants, problems = read_table(TABLE, args.seed)
    mutants = [m for m in mutants if args.only in name_of(m) or fnmatch.fnmatch(name_of(m), f"*{args.only}*")]
    if not mutants:
        parser.error(f"--only {args.only}: no fault has it: see --list")
    if args.list:
        print("\n".join(f"{name_of(mutant)} [{mutant.tests}]" for mutant in mutants))
        return 0
    prepare()
    try_all(mutants, args.jobs)
    for mutant in mutants:
        if not mutant.found and not mutant.reason:
            print(f"lives: {name_of(mutant)}")
        elif mutant.found and mutant.reason:
            print(f"found, although scripts/mutants.yaml says that it is no fault: {name_of(mutant)}")
    print("".join(f"{problem}\n" for problem in problems), end="")
    share, faults = share_found(mutants), sum(faults for faults, _ in summary(mutants).values())
    print(f"{share:.1f} % of {faults} faults were found, the bar is {BAR:g} %")
    if not args.only and args.seed == 1:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), mutants), encoding="utf-8")
    return 1 if problems or share < BAR else 0


if __name__ == "__main__":
    entry.run(main)
