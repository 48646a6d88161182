"""Tables on a terminal, where a Chinese character takes two columns."""

import unicodedata


def display_width(text: str) -> int:
    """Columns of a text on a terminal, where a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def align(cells: list[list[str]]) -> list[str]:
    """Lines of a table, every column as wide as its widest cell."""
    widths = [max(map(display_width, column)) for column in zip(*cells)]
    padded = ([cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths)] for row in cells)
    return ["".join(row).rstrip() for row in padded]
