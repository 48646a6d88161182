"""The sample data: made the same way everywhere, true to its texts, and not solved by patterns."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from launching import load_script
from reference import ROOT

DATA = ROOT / "data"
NUM_ROWS = {"spo_0.json": 1440, "spo_1.json": 50, "d2q_0.json": 400, "d2q_1.json": 20,
            "adgen_0.json": 400, "adgen_1.json": 50, "cls_0.json": 400, "cls_1.json": 50}

make_data = load_script("make_data")
VOCABULARIES = (make_data.PARTS, make_data.FAULTS, make_data.SYSTEMS, make_data.SYMPTOMS,
                make_data.TOOLS, make_data.PARAMETERS)


def read_rows(name):
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_triples(row):
    return [tuple(line.split("_")) for line in row["output"].split("\n")]


# ---------------------------------------------------------------- a pattern match, for comparison

NEGATIONS = re.compile("没有|未|不是|并非|排除|无需|不再|曾|以前|处理|怀疑|不含")
LIST = "[、和与及]"
ONE_OF = {name: "(?:" + "|".join(vocabulary) + ")" for name, vocabulary in
          zip(("part", "fault", "system", "symptom", "tool", "parameter"), VOCABULARIES)}


def find_lists(word, text):
    """Every `A、B和C` of such words: `(start, end, [A, B, C])`."""
    return [(match.start(), match.end(), re.findall(word, match.group()))
            for match in re.finditer(f"{word}(?:{LIST}{word})*", text)]


def match_pairs(heads, relation, tails, reach, text):
    """Join each list of heads with the next list of tails in reach, unless a negation is near."""
    triples = []
    for start, end, head_words in find_lists(heads, text):
        for tail_start, _, tail_words in find_lists(tails, text):
            gap = text[end:tail_start]
            if 0 <= tail_start - end <= reach and not NEGATIONS.search(text[max(0, start - 3):end] + gap):
                triples += [(head, relation, tail) for head in head_words for tail in tail_words]
                break
    return triples


def extract_by_patterns(text):
    """What keywords, distances, lists and negation words can find of the four relations."""
    triples = []
    measured = f"(?:{ONE_OF['part']}|{ONE_OF['parameter']})"
    for clause in re.split("[。；]", text):
        triples += match_pairs(ONE_OF["part"], make_data.FAULT, ONE_OF["fault"], 8, clause)
        triples += match_pairs(ONE_OF["system"], make_data.SYMPTOM, ONE_OF["symptom"], 8, clause)
        for heads, relation, tail in match_pairs(ONE_OF["tool"], "", measured, 4, clause):
            triples.append((tail, make_data.TOOL, heads))
        for match in re.finditer(f"({ONE_OF['system']})(?:由|包括|内装有|的有)(.*?)(?:，|$)", clause):
            triples += [(match[1], make_data.COMPONENT, part) for part in re.findall(ONE_OF["part"], match[2])]
        for match in re.finditer(f"([^，]*)都?属于({ONE_OF['system']})", clause):
            triples += [(match[2], make_data.COMPONENT, part) for part in re.findall(ONE_OF["part"], match[1])]
    return triples


def f1(num_right, num_found, num_true):
    return 100 * 2 * num_right / max(1, num_found + num_true)


def macro_f1_scores(found_rows, true_rows):
    """F1 in percent as the mean over the rows and as the mean over the relations."""
    found_rows, true_rows = [set(row) for row in found_rows], [set(row) for row in true_rows]
    per_row = [f1(len(found & true), len(found), len(true)) for found, true in zip(found_rows, true_rows)]
    per_relation = []
    for relation in make_data.RELATIONS:
        right, found, true = (sum(triple[1] == relation for row in rows for triple in row) for rows in (
            [found & true for found, true in zip(found_rows, true_rows)], found_rows, true_rows))
        per_relation.append(f1(right, found, true))
    return sum(per_row) / len(per_row), sum(per_relation) / len(per_relation)


def test_a_pattern_match_does_not_solve_the_held_out_rows():
    rows = read_rows("spo_1.json")
    found = [extract_by_patterns(row["input"]) for row in rows]
    scores = macro_f1_scores(found, [read_triples(row) for row in rows])
    print(f"\npatterns: macro F1 {scores[0]:.1f} over rows, {scores[1]:.1f} over relations")
    assert 20 < max(scores) < 60, scores


# ---------------------------------------------------------------- files

def test_files_are_what_the_generator_writes(tmp_path, capsys):
    assert make_data.main(["--output_dir", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NUM_ROWS)
    for name in NUM_ROWS:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name
    assert make_data.main(["--check"]) == 0

    (tmp_path / "d2q_1.json").write_text("{}\n", encoding="utf-8")
    (tmp_path / "spo_1.json").unlink()
    capsys.readouterr()
    assert make_data.main(["--check", "--output_dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "d2q_1.json" in message and "spo_1.json" in message and "adgen" not in message


def test_the_hash_seed_changes_nothing():
    command = [sys.executable, str(ROOT / "scripts" / "make_data.py"), "--check"]
    for hash_seed in ("1", "2"):
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})


@pytest.mark.parametrize("name", NUM_ROWS)
def test_rows_are_complete(name):
    rows = read_rows(name)
    assert len(rows) == NUM_ROWS[name]
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) and value == value.strip() != "" for value in row.values())
    assert len({row["instruction"] for row in rows}) == 1


@pytest.mark.parametrize("task", ["spo", "d2q", "adgen", "cls"])
def test_no_input_occurs_twice(task):
    inputs = [row["input"] for part in "01" for row in read_rows(f"{task}_{part}.json")]
    assert len(set(inputs)) == len(inputs)


# ---------------------------------------------------------------- information extraction

def test_spo_instruction_has_a_written_backslash_n():
    instruction = read_rows("spo_0.json")[0]["instruction"]
    assert "三元组之间用\\n分割。" in instruction and "\n" not in instruction


def test_words_are_not_part_of_each_other():
    all_words = [word for vocabulary in VOCABULARIES for word in vocabulary]
    assert all(2 <= len(word) <= 5 for word in all_words)
    assert not [(a, b) for i, a in enumerate(all_words) for j, b in enumerate(all_words) if i != j and a in b]


@pytest.mark.parametrize("name", ["spo_0.json", "spo_1.json"])
def test_spo_rows_are_within_bounds(name):
    rows = read_rows(name)
    num_triples = [len(read_triples(row)) for row in rows]
    assert all(25 <= len(row["input"]) <= 90 for row in rows)
    assert 1 <= min(num_triples) and max(num_triples) <= 5 and 2 <= sum(num_triples) / len(rows) <= 3
    relations = Counter(relation for row in rows for _, relation, _ in read_triples(row))
    assert set(relations) == set(make_data.RELATIONS)
    assert min(relations.values()) >= 0.08 * sum(relations.values()), relations


@pytest.mark.parametrize("name", ["spo_0.json", "spo_1.json"])
def test_triples_stand_in_the_text_in_order(name):
    for row in read_rows(name):
        text, triples = row["input"], read_triples(row)
        assert len(set(triples)) == len(triples)
        places = [(text.index(head), text.index(tail)) for head, _, tail in triples]
        assert places == sorted(places), row
        assert all(text.count(word) == 1 for head, _, tail in triples for word in (head, tail)), row


def test_held_out_rows_combine_known_words_anew():
    train, test = ([triple for row in read_rows(name) for triple in read_triples(row)]
                   for name in ("spo_0.json", "spo_1.json"))
    held_out = make_data.held_out_combinations()
    assert set(test) <= held_out and not held_out & set(train)
    assert {(head, relation) for head, relation, _ in test} <= {(head, relation) for head, relation, _ in train}
    assert {(relation, tail) for _, relation, tail in test} <= {(relation, tail) for _, relation, tail in train}


def test_every_held_out_combination_has_words_that_others_use_alike():
    held_out = make_data.held_out_combinations()
    others = make_data.all_combinations() - held_out
    assert {(head, relation) for head, relation, _ in held_out} <= {(head, relation) for head, relation, _ in others}
    assert {(relation, tail) for _, relation, tail in held_out} <= {(relation, tail) for _, relation, tail in others}


def test_report_mentions_are_exactly_the_words_of_its_text():
    rng = random.Random(7)
    for _ in range(300):
        report = make_data.make_report(rng)
        mentions = (report.parts, report.faults, report.systems, report.symptoms, report.tools, report.parameters)
        for found, vocabulary in zip(mentions, VOCABULARIES):
            assert found == sorted((word for word in vocabulary if word in report.text), key=report.text.index)
        assert set(report.normal) <= set(report.parts)
        assert set(report.triples).isdisjoint(report.denied)
        assert set(report.triples) | set(report.denied) <= make_data.all_combinations()


def test_report_avoids_and_obeys_combinations():
    held_out = make_data.held_out_combinations()
    for seed in range(100):
        report = make_data.make_report(random.Random(seed), forbidden=held_out)
        assert report == make_data.make_report(random.Random(seed), forbidden=held_out)
        assert held_out.isdisjoint(report.triples + report.denied)
        report = make_data.make_report(random.Random(seed), only=held_out)
        assert held_out.issuperset(report.triples + report.denied)


def test_every_pattern_can_be_filled_on_both_sides():
    held_out, rng = make_data.held_out_combinations(), random.Random(3)
    patterns = [pattern for group, _ in make_data.PATTERN_GROUPS for pattern in group]
    assert len(set(patterns)) == len(patterns) >= 40
    for allowed in (held_out, make_data.all_combinations() - held_out):
        for pattern in patterns:
            assert make_data.make_report(rng, only=allowed, patterns=[pattern]).triples


# ---------------------------------------------------------------- questions and advertisements

@pytest.mark.parametrize("name", ["d2q_0.json", "d2q_1.json"])
def test_documents_and_questions(name):
    for row in read_rows(name):
        assert 60 <= len(row["input"]) <= 160, row
        assert row["output"].endswith("？") and "{" not in row["input"] + row["output"], row


def test_every_document_pattern_can_answer_every_question():
    for kind in make_data.words.DOCUMENT_KINDS:
        asked = set(re.findall(r"{(\w+)}", "".join(kind["questions"])))
        for text in kind["texts"]:
            assert asked <= set(re.findall(r"{(\w+)}", text)), text


@pytest.mark.parametrize("name", ["adgen_0.json", "adgen_1.json"])
def test_advertisements_name_every_attribute(name):
    for row in read_rows(name):
        pairs = [pair.split("#") for pair in row["input"].split("*")]
        assert pairs[0][0] == "类型" and 3 <= len(pairs) <= 5
        assert 40 <= len(row["output"]) <= 100, row
        assert all(value in row["output"] for _, value in pairs), row


# ---------------------------------------------------------------- repair requests

def complaints(text):
    """The `(complaint, team)` that a text names, in order."""
    found = [(complaint, team) for team, complaints in make_data.words.REQUESTS_OF.items() for complaint in complaints
             if complaint in text]
    return sorted(found, key=lambda pair: text.index(pair[0]))


def pattern_of(text):
    """The place of the pattern that a request was made of: the one that matches."""
    fields = re.compile(r"\\{(\w+)\\}")
    found = [i for i, pattern in enumerate(make_data.words.REQUEST_PATTERNS)
             if re.fullmatch(fields.sub("(.+)", re.escape(pattern)), text)]
    assert len(found) == 1, (text, found)
    return found[0]


def test_complaints_are_not_part_of_each_other():
    all_complaints = [complaint for group in make_data.words.REQUESTS_OF.values() for complaint in group]
    assert len(set(all_complaints)) == len(all_complaints)
    assert not [(a, b) for a in all_complaints for b in all_complaints if a != b and a in b]
    assert all("{main}" in pattern for pattern in make_data.words.REQUEST_PATTERNS)
    assert not [team for team in make_data.TEAMS for pattern in make_data.words.REQUEST_PATTERNS if team in pattern]


@pytest.mark.parametrize("name", ["cls_0.json", "cls_1.json"])
def test_requests_are_for_each_team_equally_often_and_name_one_complaint_of_it(name):
    rows = read_rows(name)
    counts = Counter(row["output"] for row in rows)
    assert set(counts) == set(make_data.TEAMS) and max(counts.values()) - min(counts.values()) <= 2
    for row in rows:
        assert 20 <= len(row["input"]) <= 60 and "{" not in row["input"]
        assert all(team in row["instruction"] for team in make_data.TEAMS)
        teams = [team for _, team in complaints(row["input"])]
        assert teams.count(row["output"]) == 1 and len(teams) <= 2, row


def test_held_out_requests_say_known_complaints_in_known_patterns_but_not_together():
    pairs = []
    for name in ("cls_0.json", "cls_1.json"):
        pairs.append({(complaint, pattern_of(row["input"])) for row in read_rows(name)
                      for complaint, team in complaints(row["input"]) if team == row["output"]})
    assert not pairs[0] & pairs[1]
    for place in (0, 1):
        assert {pair[place] for pair in pairs[1]} <= {pair[place] for pair in pairs[0]}


def test_the_place_of_a_complaint_does_not_give_the_team():
    for name in ("cls_0.json", "cls_1.json"):
        rows = read_rows(name)
        for place in (0, -1):
            right = sum(complaints(row["input"])[place][1] == row["output"] for row in rows)
            print(f"{name}, complaint {place}: {100 * right / len(rows):.1f}")
            assert right < 0.75 * len(rows)


def test_readme_shows_the_files_as_they_are():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for name, num_rows in NUM_ROWS.items():
        assert f"| `{name}` | {num_rows:,} |" in readme
        first_row = (DATA / name).read_text(encoding="utf-8").splitlines()[0]
        assert f"`{name}`\n\n```json\n{first_row}\n```\n" in readme, f"the first row of {name}"
