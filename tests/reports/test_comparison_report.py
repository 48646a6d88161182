"""The report of a comparison: its page, its words, nothing in a text is obeyed."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparing import EVIL, RESULTS

from comparison import commands as steps
from comparison import figures
from evaluation.metrics import METRICS, titles_in
from reports import page as report
from reports import text as report_text
from reports import words as report_words


@pytest.mark.parametrize(
    "change, is_noise",
    [([1, -1, 3], True), ([1, 0, 3], True), ([-1, -2, 0], True), ([1, 0.1, 3], False), ([-1, -3, -0.1], False)]
    + [([1, None, None], True)],
)
def test_inside_the_noise(change, is_noise):
    assert report_text.is_noise(change) == is_noise
    assert ("inside the noise" in report_text.change_text(change)) == is_noise


class Page(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write_report(RESULTS, str(folder), titles_in("en"))
    return folder


def test_the_page_needs_nothing_else(written):
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "i", "b>"} & {tag for tag, _ in page.tags}
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")


def test_the_report_has_all_numbers(written):
    page = " ".join(" ".join(Page((written / "index.html").read_text()).text).split())
    markdown = (written / "report.md").read_text().replace("\\", "")
    for text in (page, markdown):
        for number in ("81.75", "[76.75, 86.75]", "± 1.25 over 2 seeds", "-3.50", "[-8.25, +1.50] inside the noise"):
            assert number in text, number
        for number in ("1,234", "650.0 MB", "400.0 MB", "1 min 23 s", "29.6 K", "1.48% of 2 M", "12.3 KB", "11.25"):
            assert number in text, number
        for number in ("+0.40 [+0.30, +0.50]", "not known", "not run", "-40.00", "[-48.00, -32.00]", "2.13.0"):
            assert number in text, number
        assert "alert('坏')" in text and "f1 50" in text
    assert "[-48.00, -32.00] inside" not in page
    assert "81.75 [76.75, 86.75] not known" in page  # in the table of all metrics


def evil(value, key=None):
    """Results in which each text that is not this project's own is one that would do harm."""
    if isinstance(value, dict):
        return {f"{name}{HARM}" if key == "answers" else name: evil(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [evil(one, key) for one in value]
    is_own = key in ("status", "primary", "language") or value == "base"
    return f"{value}{HARM}" if isinstance(value, str) and not is_own else value


HARM = EVIL + "\"'><img src=x onerror=alert(1)></title></style></pre>\x1b[2J\x9b\u202e\ud800\0&"


def test_nothing_in_a_text_is_obeyed(written, tmp_path, monkeypatch):
    """Of the kind: a text of rows, models, paths or flags in a page, in Markdown, in JSON; any of them may do harm."""
    monkeypatch.setattr(report, "draw_pictures", lambda results, folder: {})
    report.write_report(evil(RESULTS), str(tmp_path), titles_in("en"))
    pages = [Page((folder / "index.html").read_text()) for folder in (written, tmp_path)]
    tags = [{(tag, *attributes) for tag, attributes in page.tags} for page in pages]
    assert tags[1] - {("wbr",)} <= tags[0] and pages[1].open == []
    text = " ".join(pages[1].text)
    assert text.count("onerror=alert(1)") > 20 and r"\x1b[2J\x9b\u202e\ud800\x00&" in text
    for path in tmp_path.iterdir():
        shown = path.read_text().replace("\n", "")
        assert shown.isprintable() and "onerror" in shown
    assert "default-src 'none'" in (tmp_path / "index.html").read_text()
    markdown = re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", (tmp_path / "report.md").read_text())
    assert not re.search(r"<\w", markdown) and r"\[2J" in markdown


def test_what_a_command_line_shows_is_not_obeyed(tmp_path, capsys):
    """Names and paths on the terminal; and a command that does not exist ends with a line, as a shell's does."""
    runner = steps.Steps(tmp_path)
    with pytest.raises(steps.StepError) as stop:
        runner.run("n\x1b[2J", "'no\x1b[2J\u202e' command", [], tmp_path / "x")
    shown = capsys.readouterr()
    assert stop.value.code == 127 and "no\\x1b[2J\\u202e: cannot be started (No such file" in shown.err
    assert (shown.out + shown.err).replace("\n", "").isprintable()


def test_the_verdict_names_the_best_and_the_cheapest():
    lines = report_text.verdict_lines(RESULTS)
    assert lines[0] == "Best: 法, f1 81.75 [76.75, 86.75] on 50 test rows."
    assert "cannot be told apart from all: more test rows" in lines[2]
    assert lines[3] == "Of these, all takes the least memory (400.0 MB)."  # the time of one is not known
    assert lines[-1] == "Without figures: late."
    assert report_text.verdict_lines({**RESULTS, "methods": []}) == ["No method has been trained and scored yet."]


def test_markdown_is_not_broken_by_answers(written):
    text = (written / "report.md").read_text()
    assert "<script>alert" not in re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", text)
    assert "````text\n<script>alert" in text and "&lt;b&gt;" in text
    assert all((written / name).exists() for name in re.findall(r"!\[.*?\]\((.*?)\)", text))


@pytest.fixture(scope="module")
def in_chinese(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zh")
    report.write_report({**RESULTS, "language": "zh"}, str(folder), titles_in("zh"))
    return folder


def test_the_report_in_chinese(in_chinese, written):
    """The same numbers, and no English but names of metrics, flags and commands."""
    page, english = ((folder / "index.html").read_text() for folder in (in_chinese, written))
    assert page.startswith('<!DOCTYPE html>\n<html lang="zh">') and english.startswith(
        '<!DOCTYPE html>\n<html lang="en">'
    )
    pages = [" ".join(" ".join(Page(text).text).split()) for text in (page, english)]
    for text in (
        "噪声之内",
        "81.75 [76.75, 86.75]",
        "± 1.25（2 个种子）",
        "2 M 的 1.48%",
        "三元组 F1，各行平均",
        "未运行",
    ):
        assert text in pages[0], text
    wanted = sorted(re.findall(r"\d+\.\d+", pages[1]))
    assert sorted(re.findall(r"\d+\.\d+", pages[0])) == wanted
    for text in report_words.ZH:
        assert text.count(" ") < 2 or "{" in text or text not in pages[0], text
    assert "## 各种方法" in (in_chinese / "report.md").read_text()


def test_every_text_has_its_words():
    """What the two rooms of the report say stands in the table, and nothing else does."""
    said = {"failed", "begun", "not run"}
    for module in (report, report_text):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("say", "head", "drawn")
            ):
                said |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    said |= {"time of a training", "peak memory", "minutes", "GB", "Comparison: {name}"}
    assert said == set(report_words.ZH)
    for english, chinese in report_words.ZH.items():
        assert set(re.findall(r"{(\w+)}", english)) == set(re.findall(r"{(\w+)}", chinese)), english
    titles = titles_in("zh")
    assert set(titles) == set(METRICS) and all(re.search("[一-鿿]", title) for title in titles.values())


def test_the_verdict_in_words():
    """The best first; what the noise does not tell apart is said, and what of it costs least."""
    text = " ".join(report_text.verdict_lines(RESULTS))
    assert "Best: 法, f1 81.75 [76.75, 86.75] on 50 test rows." in text
    assert "The base model has 11.25; the difference is +60.00 [+50.00, +70.00]." in text
    assert "With these 50 rows it cannot be told apart from all:" in text and "freeze:" not in text
    assert "all takes the least memory (400.0 MB)" in text and "trains fastest" not in text
    assert "Without figures: late." in text
    clear = {**RESULTS, "methods": [RESULTS["methods"][1], RESULTS["methods"][2]]}
    assert "Its lead over every other method is larger than the noise" in " ".join(report_text.verdict_lines(clear))


def test_figures_for_a_reader():
    durations = {0.4: "0 s", 59.6: "1 min 0 s", 83: "1 min 23 s", 3599: "59 min 59 s", 3661: "1 h 1 min"}
    assert {seconds: report_text.duration(seconds) for seconds in durations} == durations
    counts = {999: "999", 1000: "1 K", 29_600: "29.6 K", 1e6: "1 M", 1e9: "1 B", 6.24e9: "6.24 B"}
    assert {number: report_text.count(number) for number in counts} == counts
    assert figures.mean([1, 2, 6]) == 3 and figures.mean([1, None]) is None
    assert (
        figures.mean_interval([[1, 0, 2], [3, 2, 6]]) == [2, 1, 4] and figures.mean_interval([None, [1, 0, 2]]) is None
    )
