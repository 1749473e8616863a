"""Numbers and tables for a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits, but never fewer than stand before the point; no exponent."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def times(value: float | None) -> str:
    """A ratio."""
    return NOTHING if value is None else f"{number(value, 2)}×"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Markdown; the first columns are aligned to the left."""
    marks = ["---" if i < left else "--:" for i in range(len(titles))]
    lines = [titles, marks, *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
