"""Forest plots: effects with their intervals, a row each, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from harness.report import style
from harness.report.layout import LETTER, broken, headline
from harness.report.style import FAINT, INK, VERDICTS

COLUMNS = ("part", "label", "effect", "low", "high", "unit", "verdict")
REGION = ("region_low", "region_high")
LINE, HEAD = 0.2, 0.95
"""Inches of a line of text, and of what each panel and the figure add to them."""
WIDEST = 44
"""Characters after which a label breaks."""
BOLD = 36
"""And of a part's name: bold letters are wider, and a browser's font may be, too."""
FAR = 4.0
"""Bounds of a region beyond this multiple of the largest effect would flatten the effects: they are not shown."""
MARGIN = 0.06
"""Of an axis' range, kept free at both ends."""


@dataclass(frozen=True)
class Row:
    """One line of a panel: a case, or the name of the part that follows.

    Attributes:
        text: the label, in lines.
        middle: where it stands, in lines from the top.
        case: of which it tells; None for the name of a part.
    """

    text: str
    middle: float
    height: int
    case: pd.Series | None


def forest(cases: pd.DataFrame, title: str) -> Figure:
    """A row a case, by part, a panel a unit: the effect, its interval, and its verdict by shape and color.

    Args:
        cases: columns part, label, effect, low, high (NaN where nothing was measured), unit and verdict; where
            there are region_low and region_high, they bound what counts as no effect (NaN: no bound is drawn).

    Raises:
        ValueError: there are no cases, a column is missing, a verdict is unknown, or an interval is not one.
    """
    cases = _checked(cases, title)
    units = list(dict.fromkeys(cases["unit"]))
    panels = [_rows(cases[cases["unit"] == unit]) for unit in units]
    heights = [sum(row.height for row in rows) for rows in panels]
    widest = max(len(line) for rows in panels for row in rows for line in row.text.split("\n"))
    with matplotlib.rc_context(style.FIGURE):
        size = (6.2 + LETTER * widest, LINE * sum(heights) + HEAD * (len(units) + 0.6))
        figure = Figure(figsize=size)
        axes = figure.subplots(len(units), 1, height_ratios=[height + 1 for height in heights], squeeze=False)[:, 0]
        for axis, unit, rows, height in zip(axes, units, panels, heights, strict=True):
            _panel(axis, rows, height)
            axis.set_xlabel(unit)
        headline(figure, title, size[0] - 2, "whiskers: 95 % interval")
        _legend(figure, cases)
    return figure


def _checked(cases: pd.DataFrame, title: str) -> pd.DataFrame:
    """With every column, numbers as numbers and absent units empty."""
    missing = [name for name in COLUMNS if name not in cases]
    if missing:
        raise ValueError(f"cases for {title!r} lack {', '.join(missing)}; a forest plot needs {', '.join(COLUMNS)}")
    if cases.empty:
        raise ValueError(f"{title!r} has no cases to draw; give one row or more")
    numbers = ["effect", "low", "high", *REGION]
    cases = cases.reindex(columns=[*COLUMNS, *REGION]).astype(dict.fromkeys(numbers, float)).fillna({"unit": ""})
    unknown = sorted(set(cases["verdict"]) - set(VERDICTS))
    if unknown:
        raise ValueError(f"verdict {unknown[0]!r} is none of {', '.join(VERDICTS)}")
    infinite = cases[["effect", "low", "high"]].isin([-math.inf, math.inf]).any(axis=1)
    wrong = cases[(cases["low"] > cases["high"]) | infinite]
    if len(wrong):
        row = wrong.iloc[0]
        raise ValueError(
            f"case {row['label']!r} has the interval [{row['low']}, {row['high']}]; give finite ends, low first"
        )
    return cases


def _rows(cases: pd.DataFrame) -> list[Row]:
    """From top to bottom; each part is named before its cases."""
    found, top = [], 0
    for part, mine in cases.groupby("part", sort=False):
        texts: list[tuple[str, pd.Series | None]] = [(broken(str(part), BOLD), None)]
        texts += [(broken(str(case["label"]), WIDEST), case) for _, case in mine.iterrows()]
        for text, case in texts:
            height = text.count("\n") + 1
            found.append(Row(text, top + height / 2, height, case))
            top += height
    return found


def _panel(axis: Axes, rows: list[Row], height: int) -> None:
    measured = [row.case for row in rows if row.case is not None]
    low, high = _range(pd.DataFrame(measured))
    axis.set(xlim=(low, high), ylim=(height, 0))
    axis.axvline(0, color=INK, linewidth=0.8)
    for row in rows:
        if row.case is not None:
            _case(axis, row, row.case, low, high)
    axis.set_yticks([row.middle for row in rows], [row.text for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set(fontsize="small", fontweight="bold" if row.case is None else "normal")
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)


def _range(cases: pd.DataFrame) -> tuple[float, float]:
    """Zero, all intervals, and the bounds of regions that are not far wider; −1 to 1 where there is nothing."""
    ends = np.append(cases[["effect", "low", "high"]].to_numpy(float), 0.0)
    bounds = cases[list(REGION)].to_numpy(float)
    span = np.nanmax(np.abs(ends))
    near = bounds[np.abs(bounds) <= FAR * span] if span else bounds[np.isfinite(bounds)]
    low, high = np.nanmin([*ends, *near]), np.nanmax([*ends, *near])
    if low == high:
        return -1.0, 1.0
    return low - MARGIN * (high - low), high + MARGIN * (high - low)


def _case(axis: Axes, row: Row, case: pd.Series, low: float, high: float) -> None:
    """Whiskers, marker and, at the right, the numbers; the region behind them."""
    left, right = np.clip(case[list(REGION)].to_numpy(float), low, high)
    if left < right:
        top = row.middle - row.height / 2
        band = Rectangle((left, top), right - left, row.height, facecolor=FAINT, alpha=0.18, linewidth=0, zorder=0)
        axis.add_patch(band)
    look = VERDICTS[case["verdict"]]
    aside = axis.get_yaxis_transform()
    text: dict[str, Any] = {"transform": aside, "va": "center", "fontsize": "small"}
    if math.isnan(case["effect"]):
        axis.text(1.02, row.middle, case["verdict"], color=FAINT, fontstyle="italic", **text)
        return
    if case["low"] < case["high"]:
        axis.plot([case["low"], case["high"]], [row.middle] * 2, color=look.color, linewidth=1.4, marker="|")
    axis.plot([case["effect"]], [row.middle], linestyle="", **look.marks())
    axis.text(1.02, row.middle, _numbers(case), color=INK, **text)


def _numbers(case: pd.Series) -> str:
    """To the digits that the interval leaves certain."""
    width = case["high"] - case["low"]
    scale = width if width > 0 else abs(case["effect"])
    digits = min(6, max(0, 1 - math.floor(math.log10(scale)))) if scale > 0 else 0
    shown = [f"{case[name]:.{digits}f}".replace("-", "−") for name in ("effect", "low", "high")]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if width > 0 else shown[0]


def _legend(figure: Figure, cases: pd.DataFrame) -> None:
    drawn = set(cases.loc[cases["effect"].notna(), "verdict"])
    handles: list[Line2D | Patch] = [
        Line2D([], [], linestyle="", label=name, **look.marks()) for name, look in VERDICTS.items() if name in drawn
    ]
    if cases[list(REGION)].notna().all(axis=1).any():
        handles.append(Patch(color=FAINT, alpha=0.3, label="no effect to speak of"))
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize="small")
