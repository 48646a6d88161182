"""The tiny base: a checkpoint of its family that has not seen what the sample data tests."""

import json
import random
import re

import pytest
import torch
from launching import load_script
from reference import ROOT

from modes import MODES, possible_modes

make_base = load_script("make_base")
make_data = make_base.make_data
TEXT = "故障现象：轿车的水泵漏水，用压力表检测；件号B2043，读数 0.35MPa。\n葛优 ok"


@pytest.fixture(scope="module", params=tuple(MODES))
def base(request, tmp_path_factory):
    """(mode, folder, arguments) of a base that has trained for two steps."""
    folder = tmp_path_factory.mktemp("base") / request.param
    arguments = ["--mode", request.param, "--output_dir", str(folder), "--num_steps", "2", "--seed", "3"]
    make_base.make_base(make_base.parse_args(arguments))
    return request.param, folder, arguments


def test_the_families_own_classes_load_it(base):
    mode, folder, _ = base
    assert possible_modes(folder) == [mode]
    tokenizer = MODES[mode].tokenizer_class.from_pretrained(folder)
    model, info = MODES[mode].model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
    row = make_base.encode_row("水泵漏水", "水泵：漏水", tokenizer, MODES[mode].prompt, 64, 48)
    assert torch.isfinite(model(**make_base.collate([row], tokenizer.pad_token_id)).loss)


def test_the_tokenizer_gives_text_back_and_knows_the_words(base):
    mode, folder, _ = base
    tokenizer = MODES[mode].tokenizer_class.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode_text(TEXT)) == tokenizer.normalise(TEXT)
    whole = sum(len(tokenizer.encode_text("，" + word)) <= 3 for word in make_base.WORDS)
    assert whole > 0.9 * len(make_base.WORDS)


def test_released_ids(base):
    mode, folder, _ = base
    tokenizer = MODES[mode].tokenizer_class.from_pretrained(folder)
    pieces = [tokenizer.sp_model.id_to_piece(i) for i in range(15)]
    if mode == "glm":
        assert pieces == [
            "<unk>",
            "<s>",
            "</s>",
            "<pad>",
            "[MASK]",
            "[gMASK]",
            "[sMASK]",
            "<unused_0>",
            "<sop>",
            "<eop>",
            "<ENC>",
            "<dBLOCK>",
            "<n>",
            "<|tab|>",
            "<|blank_2|>",
        ]
        assert tokenizer.sp_model.id_to_piece(92) == "<|blank_80|>"
    else:
        assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
        assert tokenizer.sp_model.pad_id() == -1


def test_a_second_call_finds_it(base, capsys):
    _, folder, arguments = base
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_base.make_base(make_base.parse_args(arguments))
    assert "holds this base already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_settings_replace_it(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "base.json").write_text('{"num_steps": 7}', encoding="utf-8")
    (folder / "stale").write_text("", encoding="utf-8")
    make_base.make_base(make_base.parse_args(["--output_dir", str(folder), "--num_steps", "1"]))
    assert not (folder / "stale").exists()
    assert json.loads((folder / "base.json").read_text(encoding="utf-8"))["num_steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_change_of_any_source_makes_another_base(tmp_path, monkeypatch):
    """Of a kind: what is kept and found again is of everything that decided it, the code of the network included."""
    args = make_base.parse_args(["--output_dir", "x"])
    before = make_base.settings_of(args)
    sources = make_base.base_sources()
    assert ROOT / "glm2" / "configuration_chatglm.py" in sources and ROOT / "glm1" / "modeling_chatglm.py" in sources
    for number in range(len(sources)):
        changed = tmp_path / "changed.py"
        changed.write_bytes(sources[number].read_bytes() + b"#")
        monkeypatch.setattr(make_base, "base_sources", lambda: [*sources[:number], changed, *sources[number + 1 :]])
        assert make_base.settings_of(args) != before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="--output_dir .* holds something else"):
        make_base.make_base(make_base.parse_args(["--output_dir", str(tmp_path), "--num_steps", "1"]))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("tasks", [make_base.TASKS, make_base.FIRST_TASKS], ids=["tasks", "first_tasks"])
def test_rows_show_neither_the_extraction_format_nor_held_out_combinations(tasks):
    rng, held_out = random.Random(11), make_data.held_out_combinations()
    reports, seen = make_data.make_report, []

    def recorded(*args, **kwargs):
        seen.append(reports(*args, **kwargs))
        return seen[-1]

    make_base.make_data.make_report = recorded
    try:
        rows = [make_base.make_row(rng, held_out, tasks) for _ in range(500)]
    finally:
        make_base.make_data.make_report = reports
    assert len(seen) > 400
    for report in seen:
        assert held_out.isdisjoint(report.triples + report.denied)
    for query, answer in rows:
        assert "_" not in query and "_" not in answer
        assert not re.search("信息抽取|三元组", query)
    answers = {answer for _, answer in rows}
    assert len(answers) > 100
    assert not any(
        f"{relation}{mark}" in answer for answer in answers for relation in make_data.RELATIONS for mark in "：=（"
    )


def test_every_task_answers_from_the_text():
    """Words of an answer stand in the text or in the question."""
    rng, held_out = random.Random(12), make_data.held_out_combinations()
    for task, _ in make_base.TASKS:
        if task in (make_base.ask_topics, make_base.ask_kind, make_base.ask_whether):
            continue
        for _ in range(50):
            report = make_data.make_report(rng, forbidden=held_out)
            question, answer = task(rng, report)
            assert question
            words = re.split("[：；=\n（）、]", answer) if task is not make_base.ask_copy else [answer]
            assert answer == make_base.NOTHING or all(word in report.text for word in words if word), task.__name__
