"""The values of a row against the libraries themselves, and the triples by hand."""

import jieba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge
from scoring import PAIRS, PREDICTIONS, REFERENCES

import score
from evaluation import metrics, row_scores
from evaluation.tasks import TRIPLES


def row_values(result, name):
    return [row[name] for row in result["rows"]]


def direct_rouge(prediction, reference, name):
    texts = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
    return 100 * Rouge().get_scores(*texts)[0][name]["f"]


def direct_bleu(prediction_tokens, reference_tokens):
    smoothing = SmoothingFunction().method3
    return 100 * sentence_bleu([reference_tokens], prediction_tokens, (0.25,) * 4, smoothing_function=smoothing)


@pytest.mark.parametrize("metric, name", [("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougeL", "rouge-l")])
def test_rouge_is_that_of_the_library(metric, name):
    result = metrics.score_rows(PREDICTIONS, REFERENCES, normalize=False)
    expected = [direct_rouge(prediction, reference, name) for prediction, reference in PAIRS]
    assert row_values(result, metric) == pytest.approx(expected, abs=1e-12)
    assert result[metric] == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert len(set(expected)) > 4  # rows that all score the same would prove little


@pytest.mark.parametrize("metric, tokens", [("bleu4", list), ("bleu4_words", jieba.lcut)])
def test_bleu4_is_that_of_the_library(metric, tokens):
    result = metrics.score_rows(PREDICTIONS, REFERENCES, normalize=False)
    pairs = [[[token for token in tokens(text) if token not in " \n"] for text in pair] for pair in PAIRS]
    expected = [direct_bleu(prediction, reference) for prediction, reference in pairs]
    assert row_values(result, metric) == pytest.approx(expected, abs=1e-12)
    assert result[metric] == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_exact_match_ignores_white_space_at_the_ends_only():
    predictions, references = [" 好\n", "好 的", "好", "不"], ["好", "好的", "好", "好"]
    result = metrics.score_rows(predictions, references)
    assert row_values(result, "exact_match") == [100, 0, 100, 0]
    assert result["exact_match"] == 50


@pytest.mark.parametrize(
    "text, expected", [("好", 100 * 2**-1.5), ("好的", 100 * 2**-0.75), ("好的吧", 100 * 2**-0.25), ("好的吧啊", 100)]
)
def test_bleu4_of_a_short_identical_text_is_smoothed(text, expected):
    # By hand: each missing order counts 1/2, 1/4, 1/8 in turn, and BLEU is the fourth root of the product.
    assert metrics.score_rows([text], [text])["bleu4"] == pytest.approx(expected)


def test_blank_lines_do_not_count_as_words():
    text, spaced = "今天天气很好。\n明天下雨。", "今天天气很好。\n\n \u3000\n明天下雨。"
    result, plain = metrics.score_rows([spaced], [text]), metrics.score_rows([text], [text])
    assert direct_rouge(spaced, text, "rouge-l") < 99  # the library alone counts it
    for name in ("rouge1", "rouge2", "rougeL", "bleu4", "bleu4_words"):
        assert result[name] == plain[name] > 99.9


def test_a_reference_the_library_raises_for_counts_as_0_and_the_others_are_scored():
    with pytest.raises(ValueError):
        direct_rouge("好", " \n", "rouge-1")
    result = metrics.score_rows(["好的", "好的"], [" \n", "好的"])
    assert row_values(result, "rouge1") == [0, pytest.approx(100, abs=1e-6)]
    assert result["rouge1"] == pytest.approx(50, abs=1e-6)
    assert (row_values(result, "bleu4")[0], row_values(result, "exact_match")[0]) == (0, 0)


def test_rouge_l_of_long_texts_is_the_same_without_the_library_table(monkeypatch):
    predictions = [*PREDICTIONS, "甲乙丙丁" * 30 + "。", "一.............二"]
    references = [*REFERENCES, "丁甲丙乙" * 25, "一............二"]
    with_library = row_values(metrics.score_rows(predictions, references), "rougeL")
    monkeypatch.setattr(row_scores, "MAX_ROUGE_L_CELLS", 0)
    assert row_values(metrics.score_rows(predictions, references), "rougeL") == pytest.approx(with_library, abs=1e-9)


def test_a_very_long_text_is_scored():
    # The library's table of these would have 4e8 entries.
    text = "水泵漏水。" * 7000
    result = metrics.score_rows([text], [text])
    assert [round(result[name], 4) for name in ("rouge1", "rouge2", "rougeL", "bleu4")] == [100] * 4


def test_lists_of_different_or_no_length_are_refused():
    with pytest.raises(ValueError, match="2 and 1"):
        metrics.score_rows(["好", "好"], ["好"])
    with pytest.raises(ValueError, match="0 and 0"):
        metrics.score_rows([], [])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("水泵_故障_漏水", {("水泵", "故障", "漏水")}),
        ("a_b_c\na_b_c\n  a_b_c \r", {("a", "b", "c")}),
        ("a_b_c\nd_e_f", {("a", "b", "c"), ("d", "e", "f")}),
        ("a_b\na\na_b_c_d\na_b_c_d_e", set()),
        ("a__c\n_b_c\na_b_\n__\na_ _c", set()),
        ("\n\n", set()),
        ("", set()),
        ("a _b b_c", {("a ", "b b", "c")}),
        ("a_b_c\u2028d", {("a", "b", "c\u2028d")}),
    ],
)
def test_parse_triples(text, expected):
    assert row_scores.parse_triples(text) == expected


TRIPLE_PAIRS = [
    ("a_b_c\nd_e_f", "d_e_f\na_b_c"),  # order does not count
    ("a_b_c\na_b_c\nx_y_z", "a_b_c\nd_e_f\ng_h_i"),  # duplicates count once: 1 of 2 predicted, 1 of 3 expected
    ("没有", "没有三元组"),  # neither side: left out
    ("没有", "a_b_c"),
    ("a_b_c", "没有"),
    ("", "a_b_c"),
    ("", "没有"),
]


def test_triple_values_by_hand():
    result = metrics.score_rows(*map(list, zip(*TRIPLE_PAIRS)))
    assert row_values(result, "precision") == [100, 50, None, 0, 0, 0, None]
    assert row_values(result, "recall") == [100, pytest.approx(100 / 3), None, 0, 0, 0, None]
    assert row_values(result, "f1") == [100, pytest.approx(40), None, 0, 0, 0, None]
    assert row_values(result, "num_matched") == [2, 1, 0, 0, 0, 0, 0]
    assert row_values(result, "num_predicted") == [2, 2, 0, 0, 1, 0, 0]
    assert row_values(result, "num_reference") == [2, 3, 0, 1, 0, 1, 0]
    macro = {"precision": 150 / 5, "recall": (100 + 100 / 3) / 5, "f1": 140 / 5}
    micro = {"precision_micro": 100 * 3 / 5, "recall_micro": 100 * 3 / 7, "f1_micro": 100 * 6 / 12}
    assert {name: result[name] for name in TRIPLES} == pytest.approx({**macro, **micro})


def test_no_triple_predicted_gives_0_and_none_in_any_reference_null():
    assert [metrics.score_rows(["没有"], ["a_b_c"])[name] for name in TRIPLES] == [0] * 6
    result = metrics.score_rows(["a_b_c", "好"], ["没有", "好"])
    assert [result[name] for name in TRIPLES] == [None] * 6
    assert result["exact_match"] == 50


def test_aggregating_chosen_rows_is_scoring_them():
    rows = metrics.score_rows(PREDICTIONS, REFERENCES)["rows"]
    chosen = [2, 2, 0, 5]
    alone = metrics.score_rows([PREDICTIONS[i] for i in chosen], [REFERENCES[i] for i in chosen])
    assert metrics.metrics_of([rows[i] for i in chosen]) == {name: alone[name] for name in score.METRICS}


def test_an_empty_prediction_is_0_in_every_metric():
    result = metrics.score_rows(["", " \n\u3000", "好"], ["a_b_c", "", "好"])
    assert row_values(result, "exact_match") == [0, 0, 100]
    for name in ("rouge1", "rouge2", "rougeL", "bleu4", "bleu4_words"):
        assert row_values(result, name)[:2] == [0, 0]
    assert row_values(result, "f1") == [0, None, None]


texts = st.text(max_size=40) | st.text(
    alphabet="今天气好。,!?？….”’“_aB1%- \n\r\t\u3000\x1c\x85\u200b😀\ud800", max_size=60
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_no_text_crashes_and_metrics_stay_in_range(pairs):
    result = metrics.score_rows(*map(list, zip(*pairs)))
    for values in [result, *result["rows"]]:
        for name in score.METRICS:
            value = values.get(name)
            assert value is None or 0 <= value <= 100, (name, value)


@settings(max_examples=100, deadline=None)
@given(st.lists(texts.filter(str.strip), min_size=1, max_size=4))
def test_identical_texts_match(references):
    result = metrics.score_rows(references, references)
    assert result["exact_match"] == 100
    assert result["rouge1"] == pytest.approx(100, abs=1e-5)
    assert result["rougeL"] == pytest.approx(100, abs=1e-5)
    assert result["f1"] in (None, 100) and result["f1_micro"] in (None, 100)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_lcs_length_is_that_of_the_plain_recursion(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    assert row_scores.lcs_length(first, second) == table[-1][-1]
