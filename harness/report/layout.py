"""What all figures share: titles that fit, legends beside the axes that they never cover, plain logarithmic ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from harness.report.style import INK

LABEL = 40
"""Characters after which a label of the legend breaks."""
TALLEST = 48
"""Lines of a legend's column."""
LINE, LETTER, HANDLE = 0.17, 0.064, 0.75
"""Inches that a line, a letter and the sample of a line take in a legend."""
TITLE_LETTER, NOTE_LETTER = 0.092, 0.062
NARROW, WIDE = 8, 300
"""Ratios of an axis' ends at which its ticks change."""


def broken(label: str, width: int = LABEL) -> str:
    """In lines of at most `width` characters."""
    return fill(label, width) or label


def legend_room(labels: Sequence[str]) -> tuple[float, float]:
    """Width and height in inches of a legend with these labels."""
    lines = [line for label in labels for line in broken(label).split("\n")]
    if not lines:
        return 0.0, 0.0
    columns = _columns(len(lines))
    width = columns * (HANDLE + LETTER * max(map(len, lines)))
    return width, LINE * math.ceil(len(lines) / columns) + 0.3


def canvas(width: float, height: float, labels: Sequence[str]) -> Figure:
    """A figure whose axes get `width` by `height` inches or so, with room for a legend of these labels beside them."""
    beside, least = legend_room(labels)
    return Figure(figsize=(width + beside, max(height, least)))


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Beside the axes, where it covers no point; a label that occurs again is left out."""
    if not labels:
        return
    once = {label: handle for handle, label in reversed(list(zip(handles, labels, strict=True)))}
    texts = [broken(label) for label in dict.fromkeys(labels)]
    lines = sum(text.count("\n") + 1 for text in texts)
    shown = [once[label] for label in dict.fromkeys(labels)]
    figure.legend(shown, texts, loc="outside right upper", fontsize="small", handlelength=3.4, ncols=_columns(lines))


def _columns(lines: int) -> int:
    return math.ceil(lines / TALLEST)


def headline(figure: Figure, title: str, width: float, note: str = "") -> None:
    """The title above and the note below the axes, both from the left and broken to `width` inches."""
    text = fill(title, int(width / TITLE_LETTER))
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold", fontsize="medium")
    if note:
        text = fill(note, int(width / NOTE_LETTER))
        figure.supxlabel(text, x=0.01, ha="left", fontsize="x-small", color=INK)


def plain_numbers(axis: Axis) -> None:
    """No powers of ten, whose exponents would need mathematical type; no numbers at minor ticks."""
    if axis.get_scale() != "linear":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def plain_log_ticks(axis: Axes) -> None:
    """A few round numbers over a narrow range, 1, 2, 5, 10 … over a wider one; never powers of ten."""
    low, high = axis.get_ylim()
    wide = LogLocator(subs=(1, 2, 5)) if high < WIDE * low else LogLocator(numticks=6)
    axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]) if high < NARROW * low else wide)
    axis.yaxis.set_minor_locator(NullLocator())
    plain_numbers(axis.yaxis)
