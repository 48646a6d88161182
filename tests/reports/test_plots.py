"""Pictures: a font that has the characters of the labels, or labels without those characters; never empty boxes."""

import warnings

import pytest
from matplotlib import font_manager

from reports import plots
from training import run_log

BARS = [("发动机, learning_rate=$3$", 83.5, 78.0, 88.0), ("base", 0.0, None, None)]


@pytest.fixture(autouse=True)
def fresh():
    """What was found in one test is not kept for the next."""
    for function in (plots.families_for, plots.hint):
        function.cache_clear()
    yield
    for function in (plots.families_for, plots.hint):
        function.cache_clear()


def draw_all(folder):
    """Every picture, with a warning, such as one of a missing glyph, as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_quality(BARS, "f1", folder / "quality.png")
        plots.draw_losses(
            {"故障": [[[1, 3.0], [2, None], [3, 0.1]], [[1, 2.0]]], "b": [[[1, 0.0]]]}, folder / "loss.png"
        )
        plots.draw_cost([(*bar, 60.0) for bar in BARS], "f1", "minutes", folder / "cost.png")
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert len(list(folder.glob("*.png"))) == 3


def test_pictures_with_the_fonts_that_are_there(tmp_path):
    draw_all(tmp_path)


def test_without_a_font_labels_are_escaped_and_said_once(tmp_path, capsys, monkeypatch):
    own = font_manager.findfont(plots.OWN_FONT)
    monkeypatch.setattr(plots, "installed_fonts", lambda: [(plots.OWN_FONT, own)])
    assert plots.readable(["故障 a", "b"]) == ([plots.OWN_FONT], [r"\u6545\u969c a", "b"])
    draw_all(tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: no installed font has") and "fonts-noto-cjk" in line


def test_what_matplotlib_brings_along_is_not_taken_for_chinese(monkeypatch):
    """Among its own fonts is one that draws a box for every character there is."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    assert any(ord("故") in plots.characters(font.fname) for font in own)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    assert plots.readable(["故"]) == ([plots.OWN_FONT], [r"\u6545"])


def test_a_font_that_has_the_characters_is_taken(monkeypatch):
    """The one that has most of them, before any other; what it lacks is escaped."""
    fonts = {"none": "", "one": "故", "both": "故障", "more": "故障发"}
    monkeypatch.setattr(plots, "installed_fonts", lambda: [(name, name) for name in fonts])
    found = plots.characters
    monkeypatch.setattr(
        plots, "characters", lambda path: frozenset(map(ord, fonts[path])) if path in fonts else found(path)
    )
    assert plots.readable(["故障"]) == ([plots.OWN_FONT, "both"], ["故障"])
    assert plots.readable(["故机"]) == ([plots.OWN_FONT, "one"], [r"故\u673a"])
    assert plots.readable(["plain"]) == ([plots.OWN_FONT], ["plain"])


def test_files_that_are_no_fonts_are_passed_over(tmp_path):
    path = tmp_path / "a.ttf"
    path.write_bytes(b"no font")
    assert plots.characters(str(path)) == frozenset()
    assert plots.OWN_FONT in dict(plots.installed_fonts())


def test_signs_that_mean_something_to_matplotlib():
    assert plots.readable(["$x$", "a\tb\n"]) == ([plots.OWN_FONT], [r"\$x\$", r"a\tb\n"])


def test_loss_of_a_run(tmp_path):
    records = [{"step": step, "loss": loss, "learning_rate": 1e-3} for step, loss in ((1, 2.0), (2, None), (3, 1.0))]
    run_log.draw_loss(records, tmp_path / "loss.png")
    alone = (tmp_path / "loss.png").read_bytes()
    assert alone.startswith(b"\x89PNG")
    run_log.draw_loss(records, tmp_path / "loss.png", [{"step": 2, "loss": 1.5}])
    assert (tmp_path / "loss.png").read_bytes() not in (alone, b"")
