"""Write the sample data of data/: information extraction, question generation, advertisements, classification.

Every text is made up from word lists and patterns with a fixed seed, so the files are the same
bytes on every machine. `python scripts/make_data.py` rewrites them; `--check` compares instead.

The vehicle fault reports are made by `make_report`, which other scripts may call with their own
random generator; `forbidden=held_out_combinations()` keeps them clear of the held-out rows.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a call from any folder
from runtime import entry  # noqa: I001  first: Ctrl-C is heard while the others are imported

# isort: split

import argparse
import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import data_words as words

ROOT = Path(__file__).resolve().parent.parent

FAULT, SYMPTOM, COMPONENT, TOOL = "部件故障", "性能故障", "组成", "检测工具"
RELATIONS = (SYMPTOM, FAULT, COMPONENT, TOOL)
SPO_INSTRUCTION = (
    '你现在是一个信息抽取模型，请你帮我抽取出关系内容为"性能故障", "部件故障", "组成"和 "检测工具"'
    '的相关三元组，三元组内部用"_"连接，三元组之间用\\n分割。文本：'
)


def flatten(by_kind):
    """All words of a table, each once, in the order of the table."""
    return tuple(dict.fromkeys(word for group in by_kind.values() for word in group))


PARTS = flatten(words.PARTS_BY_KIND)
FAULTS = flatten(words.FAULTS_BY_KIND)
TOOLS = flatten(words.TOOLS_BY_KIND)
PARAMETERS = flatten(words.PARAMETERS_BY_KIND)
VEHICLES = words.VEHICLES
ASSEMBLIES = tuple(words.COMPONENTS_OF)
SYSTEMS = VEHICLES + ASSEMBLIES
SYMPTOMS = words.SYMPTOMS

SLOT_WORDS = {"p": PARTS, "f": FAULTS, "v": SYSTEMS, "s": SYMPTOMS, "a": ASSEMBLIES,
              "t": TOOLS, "q": PARAMETERS}
RELATION_OF_SLOTS = {"pf": FAULT, "vs": SYMPTOM, "as": SYMPTOM, "ap": COMPONENT, "pt": TOOL, "qt": TOOL}

HOLD_OUT_EVERY = 4   # one combination in so many is kept for the held-out rows
MAX_TRIPLES = 5
MIN_CHARS, MAX_CHARS = 25, 90
PATTERN_GROUPS = (   # patterns, and the percentage of the draws that they get
    (words.FAULT_PATTERNS, 34),
    (words.SYMPTOM_PATTERNS, 26),
    (words.COMPONENT_PATTERNS, 14),
    (words.TOOL_PATTERNS, 26),
)


@dataclass(frozen=True)
class Report:
    """A vehicle fault report and all that it says. Every word occurs once in the text."""

    text: str
    triples: list     # (head, relation, tail) that hold, by place of the head, then of the tail
    denied: list      # (head, relation, tail) that are mentioned but do not hold, in the same order
    normal: list      # parts said to be fine; this and all below in order of appearance
    parts: list       # every part mentioned, whatever is said of it
    faults: list
    systems: list     # vehicles and assemblies
    symptoms: list
    tools: list
    parameters: list


def pick(rng, items):
    """One of the items. Uses only `random()`, whose values are the same in every Python."""
    return items[int(rng.random() * len(items))]


def pick_weighted(rng, groups):
    """The first element of one of the `(element, weight)` groups."""
    point = rng.random() * sum(weight for _, weight in groups)
    for element, weight in groups:
        point -= weight
        if point < 0:
            return element
    return groups[-1][0]  # a sum that was rounded down


# ---------------------------------------------------------------- combinations

def _word_tables():
    """Yield `(heads, relation, tails, shift)`: every head goes with every tail."""
    for kind, parts in words.PARTS_BY_KIND.items():
        yield parts, FAULT, words.FAULTS_BY_KIND[kind], 0
        yield parts, TOOL, words.TOOLS_BY_KIND[kind], 1
        yield words.PARAMETERS_BY_KIND[kind], TOOL, words.TOOLS_BY_KIND[kind], 2
    yield VEHICLES, SYMPTOM, SYMPTOMS, 3
    for shift, assembly in enumerate(ASSEMBLIES):
        yield (assembly,), SYMPTOM, words.SYMPTOMS_OF[assembly], shift
        yield (assembly,), COMPONENT, words.COMPONENTS_OF[assembly] + words.COMMON_COMPONENTS, shift


def _combinations():
    """Map every `(head, relation, tail)` that makes sense to whether it is held out.

    The held-out ones lie on diagonals of the tables, so that heads share held-out tails and
    lists such as `A和B都漏水` can be made of them.
    """
    table = {}
    for heads, relation, tails, shift in _word_tables():
        for i, head in enumerate(heads):
            for j, tail in enumerate(tails):
                table[head, relation, tail] = (i + j + shift) % HOLD_OUT_EVERY == 0
    return table


_COMBINATIONS = _combinations()


def all_combinations():
    """The set of all `(head, relation, tail)` that a report may state."""
    return frozenset(_COMBINATIONS)


def held_out_combinations():
    """The combinations that only the held-out rows use. Every word of them has others too."""
    return frozenset(triple for triple, is_held_out in _COMBINATIONS.items() if is_held_out)


# ---------------------------------------------------------------- reports

def _number(rng, name):
    """The text of a numeric slot: a date, a mileage, a part number, a code, a reading."""
    def digits(low, high):
        return low + int(rng.random() * (high - low + 1))

    return {
        "date": lambda: f"{digits(1, 12)}月{digits(1, 28)}日",
        "km": lambda: f"{digits(1, 24)}{digits(0, 9)}00公里",
        "no": lambda: f"{pick(rng, 'ABCDEF')}{digits(1000, 9999)}",
        "code": lambda: f"P0{digits(100, 799)}",
        "temp": lambda: f"{digits(60, 110)}℃",
        "num": lambda: pick(rng, (f"{digits(10, 14)}.{digits(0, 9)}V", f"{digits(0, 4)}.{digits(1, 9)}MPa",
                                  f"0.{digits(10, 90)}mm")),
    }[name]()


def _parse_facts(facts):
    """`"p1-f1 p2=ok"` -> `[("p1", "-", "f1"), ("p2", "=", "ok")]`."""
    return [re.fullmatch(r"(\w+)([-!=])(\w+)", fact).groups() for fact in facts.split()]


def _fill_words(rng, slots, pairs, allowed, used):
    """Choose an unused word for each slot so that each pair of slots is an allowed combination.

    Returns a dict slot -> word, or None where no word is left.
    """
    chosen = {}
    for slot in slots:
        tests = [(head, RELATION_OF_SLOTS[head[0] + tail[0]], tail) for head, tail in pairs
                 if slot in (head, tail) and (head in chosen or tail in chosen)]
        candidates = [
            word for word in SLOT_WORDS[slot[0]]
            if word not in used and word not in chosen.values()
            and all((chosen.get(head, word), relation, chosen.get(tail, word)) in allowed
                    for head, relation, tail in tests)
        ]
        if not candidates:
            return None
        chosen[slot] = pick(rng, candidates)
    return chosen


def _fill_pattern(rng, pattern, allowed, used):
    """Fill one pattern: `(text, true triples, denied triples, normal parts)`, or None."""
    text, facts = pattern
    names = re.findall(r"{(\w+)}", text)
    facts = _parse_facts(facts)
    slots = [name for name in names if name[-1].isdigit()]
    pairs = [(head, tail) for head, sign, tail in facts if sign != "="]
    chosen = _fill_words(rng, slots, pairs, allowed, used)
    if chosen is None:
        return None
    used.update(chosen.values())
    for name in names:
        value = chosen.get(name)
        if value is None:
            value = pick(rng, words.FILLERS[name]) if name in words.FILLERS else _number(rng, name)
        text = text.replace("{" + name + "}", value, 1)

    def triples(wanted):
        return [(chosen[head], RELATION_OF_SLOTS[head[0] + tail[0]], chosen[tail])
                for head, sign, tail in facts if sign == wanted]

    return text, triples("-"), triples("!"), [chosen[head] for head, sign, _ in facts if sign == "="]


def _draw_patterns(rng):
    """One or two patterns that state something."""
    return [pick(rng, pick_weighted(rng, PATTERN_GROUPS)) for _ in range(1 + (rng.random() < 0.6))]


def _add_distractors(rng, patterns):
    """An opening, which may be empty, then the patterns with at most one distractor among them."""
    patterns = list(patterns)
    if rng.random() < 0.45:
        patterns.insert(int(rng.random() * (len(patterns) + 1)), pick(rng, words.DISTRACTOR_PATTERNS))
    opening = (pick(rng, words.OPENINGS), "") if rng.random() < 0.4 else ("", "")
    return [opening] + patterns


def _try_report(rng, patterns, allowed):
    """Make one report of the patterns, or None where the words drawn give no good one."""
    used, texts, triples, denied, normal = set(), [], [], [], []
    for pattern in _add_distractors(rng, patterns):
        filled = _fill_pattern(rng, pattern, allowed, used)
        if filled is None:
            return None
        texts.append(filled[0])
        triples += filled[1]
        denied += filled[2]
        normal += filled[3]
    text = texts[0] + texts[1]
    for clause in texts[2:]:
        text += pick(rng, "，；。") + clause
    text += "。"
    if not (MIN_CHARS <= len(text) <= MAX_CHARS and 1 <= len(triples) <= MAX_TRIPLES):
        return None

    def mentioned(vocabulary):
        return sorted((word for word in vocabulary if word in used), key=text.index)

    def by_place(facts):
        return sorted(facts, key=lambda fact: (text.index(fact[0]), text.index(fact[2])))

    return Report(text, by_place(triples), by_place(denied), sorted(normal, key=text.index), mentioned(PARTS),
                  mentioned(FAULTS), mentioned(SYSTEMS), mentioned(SYMPTOMS), mentioned(TOOLS), mentioned(PARAMETERS))


def make_report(rng, forbidden=frozenset(), only=None, patterns=None):
    """Make a vehicle fault report from a `random.Random`.

    Args:
        rng: where all chance comes from; the same state gives the same report.
        forbidden: combinations `(head, relation, tail)` that the report must not name, not even
            to deny them.
        only: the combinations to choose from; None for all.
        patterns: the one or two patterns that state something; None draws them.
    """
    allowed = (all_combinations() if only is None else only) - forbidden
    while True:
        report = _try_report(rng, patterns or _draw_patterns(rng), allowed)
        if report is not None:
            return report


def spo_row(report):
    """The instruction row of a report."""
    return {"instruction": SPO_INSTRUCTION, "input": report.text,
            "output": "\n".join("_".join(triple) for triple in report.triples)}


# ---------------------------------------------------------------- files

def unique_rows(make_row, count, seen):
    """`count` rows whose inputs are new; the inputs are added to `seen`."""
    rows = []
    while len(rows) < count:
        row = make_row()
        if row["input"] not in seen:
            seen.add(row["input"])
            rows.append(row)
    return rows


def deal_patterns(rng, num_reports):
    """Deal every pattern once: `num_reports` lists of one or two patterns."""
    while True:
        deck = [pattern for patterns, _ in PATTERN_GROUPS for pattern in patterns]
        deck.sort(key=lambda pattern: rng.random())
        num_pairs = len(deck) - num_reports
        hands = [deck[2 * i:2 * i + 2] for i in range(num_pairs)] + [[pattern] for pattern in deck[2 * num_pairs:]]
        if all(sum(facts.count("-") for _, facts in hand) <= MAX_TRIPLES for hand in hands):
            return hands


def make_spo():
    """The rows of spo_0.json and spo_1.json. The held-out rows use every pattern once."""
    rng, seen, held_out = random.Random(2024), set(), held_out_combinations()
    train = unique_rows(lambda: spo_row(make_report(rng, forbidden=held_out)), 1440, seen)
    hands = iter(deal_patterns(rng, 50))
    test = unique_rows(lambda: spo_row(make_report(rng, only=held_out, patterns=next(hands))), 50, seen)
    triples = [{tuple(line.split("_")) for row in rows for line in row["output"].split("\n")}
               for rows in (train, test)]
    assert triples[0].isdisjoint(held_out) and triples[1] <= held_out, "a held-out combination in training"
    vocabularies = [{(word, relation) for head, relation, tail in part for word in (head, tail)} for part in triples]
    unseen = vocabularies[1] - vocabularies[0]
    assert not unseen, f"words of the held-out rows that training never extracts: {sorted(unseen)}"
    return {"spo_0.json": train, "spo_1.json": test}


# ---------------------------------------------------------------- documents and questions

D2Q_INSTRUCTION = "你现在是一个问题生成模型，请根据下面文档生成一个问题，文档："
MIN_DOCUMENT_CHARS, MAX_DOCUMENT_CHARS = 60, 160


def d2q_row(rng):
    """A made-up document and a question that it answers."""
    while True:
        kind = pick(rng, words.DOCUMENT_KINDS)
        text, question = pick(rng, kind["texts"]), pick(rng, kind["questions"])
        chosen = {}
        for name in dict.fromkeys(re.findall(r"{(\w+)}", text)):
            options = kind[name.rstrip("0123456789")]
            if isinstance(options[0], int):
                options = range(options[0], options[1] + 1)
            chosen[name] = pick(rng, [option for option in options if option not in chosen.values()])
        text = text.format(**chosen)
        if MIN_DOCUMENT_CHARS <= len(text) <= MAX_DOCUMENT_CHARS:
            return {"instruction": D2Q_INSTRUCTION, "input": text, "output": question.format(**chosen)}


def make_d2q():
    """The rows of d2q_0.json and d2q_1.json."""
    rng, seen = random.Random(2025), set()
    return {"d2q_0.json": unique_rows(lambda: d2q_row(rng), 400, seen),
            "d2q_1.json": unique_rows(lambda: d2q_row(rng), 20, seen)}


# ---------------------------------------------------------------- advertisements

ADGEN_INSTRUCTION = "你现在是一个广告文案生成模型，请根据下面的商品属性生成一段广告文案，属性："
MIN_ADVERT_CHARS, MAX_ADVERT_CHARS = 40, 100


def adgen_row(rng):
    """The attributes of an article, and an advertisement that names every one of them."""
    while True:
        types, attributes = pick(rng, words.GOODS)
        attributes = sorted(attributes, key=lambda attribute: rng.random())[:2 + int(rng.random() * 3)]
        pairs, phrases = [("类型", pick(rng, types))], []
        for attribute in attributes:
            details, patterns = words.ATTRIBUTES[attribute]
            value = pick(rng, tuple(details))
            pairs.append((attribute, value))
            phrases.append(pick(rng, patterns).format(value=value, detail=details[value]))
        advert = pick(rng, words.ADVERT_OPENINGS).format(type=pairs[0][1]) + "，".join(phrases)
        advert += pick(rng, words.ADVERT_CLOSINGS)
        if MIN_ADVERT_CHARS <= len(advert) <= MAX_ADVERT_CHARS:
            attribute_list = "*".join(f"{attribute}#{value}" for attribute, value in pairs)
            return {"instruction": ADGEN_INSTRUCTION, "input": attribute_list, "output": advert}


def make_adgen():
    """The rows of adgen_0.json and adgen_1.json."""
    rng, seen = random.Random(2026), set()
    return {"adgen_0.json": unique_rows(lambda: adgen_row(rng), 400, seen),
            "adgen_1.json": unique_rows(lambda: adgen_row(rng), 50, seen)}


# ---------------------------------------------------------------- repair requests

TEAMS = tuple(words.REQUESTS_OF)
CLS_INSTRUCTION = (
    "你现在是一个文本分类模型，请判断下面的报修记录应该由哪个班组处理，只回答班组名称，可选的班组有："
    + "、".join(TEAMS) + "。记录："
)


def cls_row(rng, team, held_out):
    """A made-up repair request and the team that it is for.

    A quarter of the pairs of a request and a pattern is for the held-out rows.
    """
    place, shift = int(rng.random() * len(words.REQUESTS_OF[team])), TEAMS.index(team)
    patterns = [pattern for i, pattern in enumerate(words.REQUEST_PATTERNS)
                if ((i + place + shift) % HOLD_OUT_EVERY == 0) == held_out]
    text = pick(rng, patterns)
    other = pick(rng, [name for name in TEAMS if name != team])
    chosen = {
        "main": words.REQUESTS_OF[team][place], "other": pick(rng, words.REQUESTS_OF[other]),
        "date": _number(rng, "date"), "days": 2 + int(rng.random() * 13),
        **{name: pick(rng, options) for name, options in words.REQUEST_FILLERS.items()},
    }
    return {"instruction": CLS_INSTRUCTION, "input": text.format(**chosen), "output": team}


def make_cls():
    """The rows of cls_0.json and cls_1.json: every team equally often, in no order."""
    rng, seen = random.Random(2027), set()

    def rows(count, held_out):
        teams = itertools.cycle(TEAMS)
        made = unique_rows(lambda: cls_row(rng, next(teams), held_out), count, seen)
        return sorted(made, key=lambda row: rng.random())

    return {"cls_0.json": rows(400, False), "cls_1.json": rows(50, True)}


# ---------------------------------------------------------------- command

FILE_MAKERS = (make_spo, make_d2q, make_adgen, make_cls)


def make_files():
    """Map each file name to its bytes: JSON Lines in UTF-8."""
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        for make in FILE_MAKERS for name, rows in make().items()
    }


def home(text):
    """A path, `~` in it being the home folder."""
    return Path(text).expanduser()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=home, default=ROOT / "data", help="folder of the files (default: data/)")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit 1 if a file differs from what would be written")
    args = parser.parse_args(argv)

    files = make_files()
    if args.check:
        paths = [args.output_dir / name for name in files]
        stale = [path for path in paths if not path.is_file() or path.read_bytes() != files[path.name]]
        for path in stale:
            print(f"{path} is not what make_data.py writes: run `python scripts/make_data.py`", file=sys.stderr)
        return 1 if stale else 0
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (args.output_dir / name).write_bytes(content)
        num_rows = len(content.splitlines())
        print(f"{args.output_dir / name}: {num_rows:,} rows")
    return 0


if __name__ == "__main__":
    entry.run(main)
