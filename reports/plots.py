"""Pictures by matplotlib, without a screen, in fonts that have the characters of their labels."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN_FONT = "DejaVu Sans"  # comes with matplotlib
# Fonts for Chinese that systems have, the best first; where there is none of them, any other font is looked at.
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)
NO_FONTS = ("last resort", "lastresort", "adobe blank")  # have every character, as a box or as nothing
MARKERS = "osD^vP*X<>"
GREY = "#777777"


def installed_fonts() -> list[tuple[str, str]]:
    """(family, path) of the fonts on this machine, those for Chinese first."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib keeps its list on disk: newer ones are not in it
        if path not in known:
            with contextlib.suppress(RuntimeError, OSError, ValueError):
                manager.addfont(path)
    order = {name: number for number, name in enumerate(CHINESE_FONTS)}
    upright = [font for font in manager.ttflist if font.style == "normal" and 300 <= int(font.weight) <= 500]
    upright = [font for font in upright if not font.name.lower().lstrip(".").startswith(NO_FONTS)]
    return sorted({(font.name, font.fname) for font in upright}, key=lambda font: (order.get(font[0], 99), font))


@functools.cache
def characters(path: str) -> frozenset[int]:
    """Code points that a font file has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()


@functools.cache
def families_for(wanted: frozenset[str]) -> tuple[list[str], set[str]]:
    """(font families for a frozenset of characters, those that no font has)."""
    from matplotlib import font_manager

    own = characters(font_manager.findfont(OWN_FONT))
    missing = {char for char in wanted if ord(char) not in own and char.isprintable()}
    families = [OWN_FONT]
    best: tuple[str, set[str]] | None = None
    for name, path in installed_fonts() if missing else []:
        found = {char for char in missing if ord(char) in characters(path)}
        if len(found) > len(best[1] if best else ()):
            best = name, found
        if found == missing:
            break
    if best:
        families.append(best[0])
        missing -= best[1]
    return families, missing


def readable(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """(font families, texts as they can be drawn in them): what no font has is escaped, never an empty box."""
    families, missing = families_for(frozenset("".join(texts)))
    if missing:
        hint()
    shown = ("".join(escape(char) if char in missing or not char.isprintable() else char for char in t) for t in texts)
    return families, [text.replace("$", r"\$") for text in shown]  # two dollars would make a formula


def escape(char: str) -> str:
    """'故' -> '\\u6545'."""
    return char.encode("unicode_escape").decode("ascii")


@functools.cache
def hint() -> None:
    """Say once what would help."""
    text = "no installed font has all characters of the labels: in pictures they are escaped"
    print(f"note: {text}; a font for Chinese, such as fonts-noto-cjk, helps", file=sys.stderr, flush=True)


def can_draw(text: str) -> bool:
    """Is there a font for all characters of a text?"""
    return not families_for(frozenset(text))[1]


@contextlib.contextmanager
def picture(
    path: str, size: tuple[float, float] = (5.6, 4.0), families: Sequence[str] = (OWN_FONT,), has_legend: bool = False
) -> Iterator[Axes]:
    """A PNG with one axis, which is yielded; size in inches. The legend stands below, where it hides nothing."""
    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font without the usual weight will do
    with matplotlib.rc_context({"font.family": list(families), "font.size": 11}):
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.add_subplot()
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        yield axis
        if has_legend:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        figure.savefig(path, dpi=160)


def draw_losses(
    curves: dict[str, list], path: str, labels: tuple[str, str] = ("update", "loss per supervised token")
) -> None:
    """Loss over the updates. curves: {name: [one run's [[step, loss], ...], ...]}; runs of a name share a colour.

    labels: of the two axes.
    """
    families, (*names, across, up) = readable([*curves, *labels])
    with picture(path, families=families, has_legend=True) as axis:
        values: list[float] = []
        for number, (name, runs) in enumerate(zip(names, curves.values(), strict=True)):
            for k, points in enumerate(runs):
                losses = [math.nan if loss is None else loss for _, loss in points]
                axis.plot(
                    [step for step, _ in points],
                    losses,
                    label=None if k else name,
                    color=f"C{number % 10}",
                    linestyle=("-", "--", ":")[number // 10 % 3],
                    linewidth=1.4,
                )
                values += [loss for loss in losses if loss > 0]
        if values and max(values) > 20 * min(values):
            axis.set_yscale("log")
        axis.set_xlabel(across)
        axis.set_ylabel(up)


def draw_quality(bars: list[tuple], metric: str, path: str) -> None:
    """A bar with its interval for each of `bars`: (name, value, low, high), the first on top."""
    families, names = readable([bar[0] for bar in bars])
    with picture(path, size=(5.6, 1.0 + 0.36 * len(bars)), families=families) as axis:
        places = range(len(bars))
        colours = [GREY if bar[0] == "base" else "tab:blue" for bar in bars]
        values = [bar[1] for bar in bars]
        axis.barh(places, values, color=colours, height=0.62)
        axis.errorbar(values, places, xerr=spans(bars), fmt="none", ecolor="black", capsize=3, linewidth=1)
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_xlim(left=min(0, *values))
        axis.set_xlabel(metric)


def draw_cost(points: list[tuple], metric: str, cost: str, path: str) -> None:
    """Quality against what it costs. points: (name, value, low, high, cost of it)."""
    families, (*names, cost) = readable([*(point[0] for point in points), cost])
    with picture(path, families=families, has_legend=True) as axis:
        for number, (name, point) in enumerate(zip(names, points, strict=True)):
            axis.errorbar(
                [point[4]],
                [point[1]],
                yerr=spans([point]),
                label=name,
                fmt=MARKERS[number % len(MARKERS)],
                color=f"C{number % 10}",
                capsize=3,
                markersize=7,
                linewidth=1,
            )
        axis.set_xlim(0, 1.06 * max(point[4] for point in points) or 1)
        axis.set_xlabel(cost)
        axis.set_ylabel(metric)


def spans(bars: list[tuple]) -> list[list[float]]:
    """Intervals as matplotlib wants them: what is below and above each value; nothing where there is none."""
    below = [0 if low is None else max(0, value - low) for _, value, low, *_ in bars]
    above = [0 if bar[3] is None else max(0, bar[3] - bar[1]) for bar in bars]
    return [below, above]
