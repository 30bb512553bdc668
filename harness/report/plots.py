"""General building blocks: forest plots of effects, scatter plots of two rankings, curves with interval bands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from scipy.stats import spearmanr

from harness.report import style
from harness.report.forest import forest
from harness.report.layout import canvas, headline, legend, plain_numbers
from harness.report.style import INK, Look

__all__ = ["curves", "forest", "scatter"]

SIZE = (5.2, 4.2)
LEAST = 4
"""Points: fewer have no order worth a number."""
PLACES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1.6), (0, -1.6), (1.4, 0), (-1.4, 0))
"""Where a label may stand beside its point, in units of its offset."""
OFFSET = 5
"""Points (1/72 inch) from a point to its label."""


def scatter(
    points: pd.DataFrame, title: str, *, xlabel: str, ylabel: str, xscale: str = "linear", yscale: str = "linear"
) -> Figure:
    """One value against another, with Spearman's ρ over all points and within each series.

    Args:
        points: columns x, y, label (drawn where it covers nothing; may be empty) and series (may be all empty).
        xscale, yscale: as matplotlib names them.

    Raises:
        ValueError: a column is missing, or no point has both values.
    """
    _require(points, ("x", "y", "label", "series"))
    known = points.dropna(subset=["x", "y"])
    if known.empty:
        raise ValueError(f"{title!r} has no point with both values; measure them first")
    series = _looks(known["series"])
    names = {name: _with_rank(name, known[known["series"] == name]) for name in series}
    with matplotlib.rc_context(style.FIGURE):
        figure = canvas(*SIZE, [name for name in names.values() if name])
        axis = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
        for name, look in series.items():
            rows = known[known["series"] == name]
            axis.plot(rows["x"], rows["y"], linestyle="", label=names[name], **look.marks())
        _plain(axis)
        headline(figure, title, SIZE[0], _rank_note(known, len(points) - len(known)))
        if any(series):
            legend(figure, *axis.get_legend_handles_labels())
        _annotate(figure, axis, known)
    return figure


def curves(
    lines: pd.DataFrame,
    title: str,
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    note: str = "band: 95 % interval",
) -> Figure:
    """A line a series, with the band of its interval.

    Args:
        lines: columns x, y, low, high (NaN where there is no interval) and series.
        xscale, yscale: as matplotlib names them.

    Raises:
        ValueError: a column is missing, or no row has both x and y.
    """
    _require(lines, ("x", "y", "low", "high", "series"))
    known = lines.dropna(subset=["x", "y"])
    if known.empty:
        raise ValueError(f"{title!r} has no row with both x and y; measure them first")
    series = _looks(known["series"])
    with matplotlib.rc_context(style.FIGURE):
        figure = canvas(*SIZE, list(series))
        axis = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
        for name, look in series.items():
            rows = known[known["series"] == name].sort_values("x", kind="stable")
            axis.fill_between(rows["x"], rows["low"], rows["high"], color=look.color, alpha=0.18, linewidth=0)
            axis.plot(rows["x"], rows["y"], linestyle=look.line, label=name, **look.marks())
        _plain(axis)
        headline(figure, title, SIZE[0], note)
        legend(figure, *axis.get_legend_handles_labels())
    return figure


def _plain(axis: Axes) -> None:
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis)


def _require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"the table to draw lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def _looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each series: a method's own where a series is named like one."""
    distinct = list(dict.fromkeys(names))
    found = style.looks({name: [*name.split(), name][0] for name in distinct})
    reference = {name: Look(INK, "o", line=(0, (1, 1))) for name in distinct if name not in found}
    return reference | found


def _with_rank(name: str, rows: pd.DataFrame) -> str:
    rho = _rank(rows)
    return name if rho is None or not name else f"{name} (ρ = {rho:.2f})"


def _rank_note(known: pd.DataFrame, without: int) -> str:
    rho = _rank(known)
    text = f"Spearman’s ρ = {rho:.2f} over {len(known)} points" if rho is not None else f"{len(known)} points"
    text += f"; {without} without a value" if without else ""
    return text + ("; labels where there is room" if (known["label"] != "").any() else "")


def _rank(rows: pd.DataFrame) -> float | None:
    """None where there are too few points, or one side is constant."""
    if len(rows) < LEAST or rows["x"].nunique() < 2 or rows["y"].nunique() < 2:
        return None
    return float(spearmanr(rows["x"], rows["y"]).statistic)


def _annotate(figure: Figure, axis: Axes, points: pd.DataFrame) -> None:
    """Labels beside their points, each where it covers no point and no other label; else it is left out."""
    figure.draw_without_rendering()
    places = axis.transData.transform(points[["x", "y"]].to_numpy(float))
    taken = [Bbox.from_extents(*(place - 4), *(place + 4)) for place in places]
    for label, x, y in points[["label", "x", "y"]].itertuples(index=False):
        for right, up in PLACES if label else ():
            text = _beside(axis, str(label), (x, y), right, up)
            box = text.get_window_extent()
            inside = axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _beside(axis: Axes, label: str, point: tuple[float, float], right: float, up: float) -> Any:
    sides = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}
    return axis.annotate(
        label,
        point,
        (OFFSET * right, OFFSET * up),
        textcoords="offset points",
        ha=sides[int(np.sign(right))][0],
        va=sides[int(np.sign(up))][1],
        size="x-small",
        color=INK,
    )
