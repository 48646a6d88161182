"""The YAML file of compare.py: read, checked, and expanded into the methods that are run."""

import argparse
import difflib
import itertools
import math
import os
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from evaluation.tasks import TASKS
from flags.common import MAX_NAME, OneLineParser, expanded_path
from flags.predict import predict_parser, sampling_problems
from flags.train import train_parser, train_problems
from generation.lengths import RUN_FLAGS
from modes import MODES
from rows.reading import data_files
from runtime.exits import UserError
from runtime.streams import BLANKS, visible
from train_types import TRAIN_TYPES

# What compare.py gives itself, and what it gives where the file does not.
FILE_FLAGS = ("eval_path", "replay_path")  # of train.py: more rows that decide the weights
OWN_TRAIN_FLAGS = "train_path model_name_or_path mode train_type output_dir seed resume local_rank".split()
OWN_PREDICT_FLAGS = (
    "model_path model_name_or_path allow_other_base mode test_path output_path overwrite prompt interactive local_rank"
).split()
TRAIN_DEFAULTS = {"save_state_step": 100, "save_total_limit": 1}
NAMED = r"[^\W_][\w.+-]*"  # of a method: it is the name of a folder, too
KEYS = {  # key of the file: (type, what messages call it, is it needed)
    "base": (str, "a folder or a hub name", True),
    "base_command": (str, "a command line", False),
    "mode": (str, f"one of {', '.join(MODES)}", False),
    "task": (str, f"one of {', '.join(TASKS)}", False),
    "train_path": ((str, list), "a path or a list of them", True),
    "test_path": ((str, list), "a path or a list of them", True),
    "train_flags": (dict, "flags of train.py without the dashes", False),
    "predict_flags": (dict, "flags of predict.py without the dashes", False),
    "methods": (list, "a list of methods", True),
    "seeds": (list, "a list of different whole numbers, 0 or more", False),
    "forgetting": (bool, "true or false", False),
    "no_normalize": (bool, "true or false", False),
}
METHOD_KEYS = {
    "name": (str, "a name", True),
    "train_type": (str, f"one of {', '.join(TRAIN_TYPES)}", True),
    "flags": (dict, "flags of train.py without the dashes", False),
    "grid": (dict, "a list of values for each flag of train.py", False),
}
PATH_KEYS = ("base", "train_path", "test_path")
# What a file may ask for; a comparison of some weeks is far below.
MOST_BYTES = 100_000  # of the file
MOST_NODES = 20_000  # values and keys in it, those that an alias stands for counted each time
MOST_DEPTH = 20  # brackets inside brackets, counted likewise
MOST_DIGITS = 50  # of a number
MOST_METHODS = 200  # rows of the report, each choice of a grid being one
MOST_SEEDS = 100
CHOICES: dict[str, Collection[str]] = {"mode": MODES, "task": TASKS, "train_type": TRAIN_TYPES}


@dataclass
class Method:
    """One row of the report: a method with one choice of the values in its grid. flags: its own; all: with those of
    all methods and the defaults."""

    name: str
    family: str  # the name in the file, of all choices of a grid
    train_type: str
    flags: dict
    all: dict


@dataclass
class Plan:
    """A comparison: what the file says, checked."""

    path: str
    base: str
    train_path: list
    test_path: list
    task: str | None = None
    base_command: str | None = None
    mode: str | None = None
    train_flags: dict = field(default_factory=dict)  # of all methods, without the defaults
    predict_flags: dict = field(default_factory=dict)
    methods: list = field(default_factory=list)
    seeds: list = field(default_factory=lambda: [1234])
    forgetting: bool = False
    no_normalize: bool = False  # of score.py
    language: str = "en"  # of the report


class Loader(yaml.SafeLoader):
    """YAML in which a key may stand once (the library would take the last one without a word), of a bounded size.

    An alias stands for all of its anchor, so that a few lines may be as long as one likes: sizes are counted as they
    are once every alias is written out, before anything is made of them.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.level = 0
        self.sizes: dict[int, tuple[int, int]] = {}  # id of a node that is whole: (its nodes, their depth)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; its size is known afterwards."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self.level += 1
        check_size(len(self.sizes), self.level, mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if node is not None and not is_alias:
            self.sizes[id(node)] = self.size(node)
        if id(node) not in self.sizes:
            raise refused("an alias inside of what it stands for", mark)
        check_size(*self.sizes[id(node)], mark)
        return node

    def size(self, node: yaml.Node) -> tuple[int, int]:
        """(nodes, depth) of a node, those of its parts being known; what no comparison has in it is refused."""
        if isinstance(node, yaml.ScalarNode):
            hidden = [char for char in node.value if not char.isprintable() and char not in BLANKS]
            if hidden:
                raise refused(f"the character {visible(hidden[0])} in a text", node.start_mark)
            if node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS:
                raise refused(f"a number of more than {MOST_DIGITS} characters", node.start_mark)
            return 1, 1
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise refused(f"{key.value} stands here twice", key.start_mark)
                keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            parts = itertools.chain(*node.value)
        sizes = [self.sizes[id(part)] for part in parts]
        return 1 + sum(num_nodes for num_nodes, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """The value of a node; where it is none of its tag, such as the 13th month of a date, its line is named."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise refused(f"no value of {node.tag} ({error})", node.start_mark) from None


def check_size(num_nodes: int, depth: int, mark: yaml.Mark) -> None:
    """Refuse what is larger than the file of a comparison is."""
    if num_nodes > MOST_NODES:
        raise refused(f"more than {MOST_NODES:,} values and keys, with every alias written out", mark)
    if depth > MOST_DEPTH:
        raise refused(f"nested deeper than {MOST_DEPTH}, with every alias written out", mark)


def refused(rule: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    """The error for a place in a YAML file."""
    return yaml.constructor.ConstructorError(None, None, rule, mark)


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file; UserError that names the line otherwise."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): name a YAML file") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: is larger than {MOST_BYTES:,} bytes: name the YAML file of a comparison")
    try:
        values = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML ({show(error.problem, 200)}): fix this line") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an escape of no character
        raise UserError(f"{path}: not YAML ({show(error, 200)}): fix it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is {name_type(values)}: write keys with values, such as base: ChatGLM3-6B")
    return values


def read_plan(path: str) -> tuple[Plan | None, list[str]]:
    """(Plan, problems): the problems are one line each, as {key: value, rule, fix}; the plan is None with them."""
    values = read_yaml(path)
    problems = key_problems(values, KEYS, "")
    entries = values.get("methods")
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        where = f"methods[{number}]"
        if isinstance(entry, dict):
            problems += key_problems(entry, METHOD_KEYS, f"{where}.")
        else:
            problems.append(f"{where} {show(entry)}: is {name_type(entry)}: write name and train_type")
    values = values if problems else with_home(values)
    problems = problems or value_problems(values)
    if not problems:
        plan = expand(path, values)
        problems = flag_problems(plan, values)
    return (None if problems else plan), [f"{path}: {problem}" for problem in problems]


def key_problems(values: dict, keys: dict, where: str) -> list[str]:
    """Keys that are unknown, missing or of another type."""
    problems = []
    for key, value in values.items():
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            fix = f"did you mean {near[0]}?" if near else f"known are {', '.join(keys)}"
            problems.append(f"{where}{key} {show(value)}: no such key: {fix}")
        elif not isinstance(value, keys[key][0]) or (value in ("", []) and keys[key][2]):
            problems.append(f"{where}{key} {show(value)}: is {name_type(value)}: give {keys[key][1]}")
        elif key in CHOICES and value not in CHOICES[key]:
            problems.append(f"{where}{key} {show(value)}: is none of them: give {keys[key][1]}")
    return problems + [
        f"{where}{key}: is missing: give {text}"
        for key, (_, text, is_needed) in keys.items()
        if is_needed and key not in values
    ]


def with_home(values: dict) -> dict:
    """The file's values with `~` replaced in its paths, as on a command line; flags that take a path included."""
    parsers = (train_parser(), predict_parser())
    takes_path = {action.dest for parser in parsers for action in parser._actions if action.type is expanded_path}

    def expanded(value: object) -> object:
        if isinstance(value, list):
            return list(map(expanded, value))
        return expanded_path(value) if isinstance(value, str) else value

    def of_flags(flags: dict, keys: Collection[str] = takes_path) -> dict:
        return {key: expanded(value) if key in keys else value for key, value in flags.items()}

    def of_all(entry: dict) -> dict:
        tables = ("flags", "grid", "train_flags", "predict_flags")
        return {key: of_flags(value) if key in tables else value for key, value in entry.items()}

    methods = [of_all(entry) for entry in values["methods"]]
    return of_flags({**of_all(values), "methods": methods}, PATH_KEYS)


def value_problems(values: dict) -> list[str]:
    """What is wrong with values that have the right type."""
    problems = []
    for key in ("train_path", "test_path"):
        try:
            paths = as_list(values[key])
            if not all(isinstance(path, str) for path in paths):
                raise UserError("a path is no text: put it in quotes")
            data_files(paths)
        except UserError as error:
            problems.append(f"{key} {error}")
    try:
        if "base_command" in values and not shlex.split(values["base_command"]):
            raise UserError("it is empty")
    except ValueError as error:  # quotes that are not closed, too
        problems.append(f"base_command {show(values['base_command'])}: is no command line ({error}): fix it")
    seeds = values.get("seeds", [0])
    if not seeds or len({*map(str, seeds)}) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
        problems.append(f"seeds {show(seeds)}: must be {KEYS['seeds'][1]}: for example [1234, 1235]")
    if len(seeds) > MOST_SEEDS:
        problems.append(f"seeds: are {len(seeds)}: at most {MOST_SEEDS} can be compared: remove some")
    names: set[str] = set()
    num_methods = 0
    for number, entry in enumerate(values["methods"]):
        where, name = f"methods[{number}]", entry["name"]
        if not re.fullmatch(NAMED, name) or name.lower() in ("base", *names):
            rule = "is taken" if name.lower() in ("base", *names) else "is a folder's name too"
            problems.append(f"{where}.name {show(name)}: {rule}: give another, of letters, digits, '.', '_', '+', '-'")
        names.add(name.lower())
        for flag, choices in (entry.get("grid") or {}).items():
            texts = [as_text(choice) for choice in choices] if isinstance(choices, list) else []
            if not texts or len(set(texts)) < len(texts):
                rule = "must be a list of different values"
                problems.append(f"{where}.grid.{flag} {show(choices)}: {rule}: for example [1e-4, 3e-4]")
            if flag in (entry.get("flags") or {}):
                problems.append(f"{where}.grid.{flag}: stands in flags too: remove one")
        # Counted before any of them is made.
        lengths = [len(choices) for choices in (entry.get("grid") or {}).values() if isinstance(choices, list)]
        num_methods += math.prod(lengths)
    if num_methods > MOST_METHODS:
        shown = f"{num_methods:,}" if num_methods < 10**12 else "more than a million million"
        rule = f"are {shown} with the choices of their grids, and at most {MOST_METHODS} can be compared"
        problems.append(f"methods: {rule}: take values out of a grid")
    return problems


def expand(path: str, values: dict) -> Plan:
    """The plan, with a method for each choice of the values in a grid."""
    common = {**TRAIN_DEFAULTS, **values.get("train_flags", {})}
    methods = []
    for entry in values["methods"]:
        grid = entry.get("grid", {})
        for choice in itertools.product(*grid.values()):
            point = dict(zip(grid, choice, strict=True))
            name = ",".join([entry["name"], *(f"{flag}={as_text(value)}" for flag, value in point.items())])
            flags = {**entry.get("flags", {}), **point}
            name = re.sub(r"[^\w.,=+-]+", "-", name)
            methods.append(Method(name, entry["name"], entry["train_type"], flags, {**common, **flags}))
    same = {key: value for key, value in values.items() if key != "methods"}
    return Plan(path=path, **same | {key: as_list(values[key]) for key in ("train_path", "test_path")}, methods=methods)


def flag_problems(plan: Plan, values: dict) -> list[str]:
    """What train.py and predict.py would refuse."""
    problems = [
        f"{method.name}: is a folder's name too, and longer than {MAX_NAME} bytes: make methods of the grid's choices"
        for method in plan.methods
        if len(os.fsencode(method.name)) > MAX_NAME
    ]
    problems += name_problems(train_parser(), values.get("train_flags", {}), OWN_TRAIN_FLAGS, "train_flags.")
    for number, entry in enumerate(values["methods"]):
        for key in ("flags", "grid"):
            where = f"methods[{number}].{key}."
            problems += name_problems(train_parser(), entry.get(key, {}), OWN_TRAIN_FLAGS, where)
    problems += name_problems(predict_parser(), plan.predict_flags, OWN_PREDICT_FLAGS, "predict_flags.")
    if problems:
        return problems
    numbers = {entry["name"]: number for number, entry in enumerate(values["methods"])}
    for method in plan.methods:
        where = f"methods[{numbers[method.family]}] ({method.name})"
        problems += [f"{where}: {text}" for text in train_flag_problems(plan, method)]
    return problems + [f"predict_flags: {text}" for text in predict_flag_problems(plan)]


def name_problems(parser: argparse.ArgumentParser, flags: dict, own: Collection[str], where: str) -> list[str]:
    """Flags that the script does not have, or that are not the file's to give."""
    known = [action.dest for action in parser._actions if action.dest not in ("help", *own)]
    problems = []
    for flag, value in flags.items():
        if flag in own:
            problems.append(
                f"{where}{flag} {show(value)}: compare.py gives it: remove it (seeds, base and paths are keys)"
            )
        elif flag not in known:
            near = difflib.get_close_matches(str(flag), known, 1)
            fix = f"did you mean {near[0]}?" if near else f"see python {parser.prog} --help"
            problems.append(f"{where}{flag} {show(value)}: {parser.prog} has no such flag: {fix}")
    return problems


def train_flag_problems(plan: Plan, method: Method) -> list[str]:
    """What train.py would say of a method's command line before it reads a weight."""
    try:
        found = train_problems(*train_args(plan, method))
    except UserError as error:
        return [str(error)]
    # A base that a command will make cannot be looked at yet.
    return [p for p in found if not (plan.base_command and not has_base(plan) and p.startswith("--model_name_or_path"))]


def train_args(plan: Plan, method: Method) -> tuple[argparse.Namespace, set[str]]:
    """(args of train.py for a method, names of the flags that are given); UserError for a flag that it refuses."""
    parser = strict(train_parser())
    words = train_words(plan, method, plan.seeds[0], os.path.join("output", "not-there-yet"))
    return parser.parse_args(words), parser.typed(words)


def predict_flag_problems(plan: Plan) -> list[str]:
    """What predict.py would say of its command line; the ranges of numbers it says itself, at the base's rows."""
    try:
        return sampling_problems(*predict_args(plan, plan.train_flags))
    except UserError as error:
        return [str(error)]


def predict_args(plan: Plan, train_flags: dict) -> tuple[argparse.Namespace, set[str]]:
    """(args of predict.py for a model of this training, names of the flags that are given); as `train_args`."""
    parser = strict(predict_parser())
    words = predict_words(plan, plan.base, "predictions.jsonl", train_flags)
    return parser.parse_args(words), parser.typed(words)


def strict(parser: OneLineParser) -> OneLineParser:
    """The parser, raising UserError where it would end the program."""

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}: see python {parser.prog} --help")

    parser.error = error  # type: ignore[method-assign]
    return parser


def has_base(plan: Plan) -> bool:
    """Is the base model there?"""
    return os.path.isfile(os.path.join(plan.base, "config.json"))


def train_words(plan: Plan, method: Method, seed: int, output_dir: str) -> list[str]:
    """The flags of train.py for a method with one seed, as words."""
    words = ["--train_path", *plan.train_path, "--model_name_or_path", plan.base]
    words += ["--mode", plan.mode] if plan.mode else []
    words += ["--train_type", method.train_type, *flag_words(train_parser(), method.all)]
    return [*words, "--seed", str(seed), "--output_dir", output_dir, "--resume", "auto"]


def predict_words(plan: Plan, model: str, output_path: str, train_flags: dict) -> list[str]:
    """The flags of predict.py for a model, as words.

    train_flags: those of its training; for the base, those of all methods. Rows are read and cut as they were there,
    where predict_flags does not say otherwise: the base has no run.json that would say it.
    """
    words = ["--model_path", model, *(["--mode", plan.mode] if plan.mode else []), "--test_path", *plan.test_path]
    words += flag_words(predict_parser(), answer_flags(plan, train_flags))
    return [*words, "--output_path", output_path, "--overwrite"]


def answer_flags(plan: Plan, train_flags: dict) -> dict:
    """{flag: value} of predict.py for a model that was trained with these flags."""
    usual = {flag: train_parser().get_default(flag) for flag in RUN_FLAGS}
    of_rows = {flag: train_flags.get(flag, value) for flag, value in usual.items()}
    return {**{flag: value for flag, value in of_rows.items() if value is not None}, **plan.predict_flags}


def flag_words(parser: argparse.ArgumentParser, flags: dict) -> list[str]:
    """{flag: value} as words: true and false switch a flag that takes no value; UserError where it is neither."""
    actions = {action.dest: action for action in parser._actions}
    words = []
    for flag, value in flags.items():
        if actions[flag].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"--{flag} {show(value)}: is on or off: give true or false")
            words += [f"--{flag}"] if value else []
        elif isinstance(value, dict) or value is None or any(isinstance(part, (dict, list)) for part in as_list(value)):
            raise UserError(f"--{flag} {show(value)}: is {name_type(value)}: give a text or a number")
        elif isinstance(value, list) and actions[flag].nargs is None:
            raise UserError(f"--{flag} {show(value)}: takes one value: give one, or write the list as a grid")
        else:
            words += [f"--{flag}", *map(as_text, as_list(value))]
    return words


def as_list(value: Any) -> list:
    """A list as it is, another value as a list of one."""
    return value if isinstance(value, list) else [value]


def as_text(value: object) -> str:
    """A value of the file as a word of a command line."""
    return str(value)


def show(value: object, most: int = 60) -> str:
    """A value for a message, on one line, `most` characters of it."""
    return " ".join(str(value).split())[:most] or repr(value)


def name_type(value: object) -> str:
    """What a value is, in YAML's words."""
    names: dict[type, str] = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "empty",
    }
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
