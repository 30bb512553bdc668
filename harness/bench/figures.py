"""Figures of measured costs."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from harness.report import style
from harness.report.layout import canvas, headline, legend, plain_numbers
from harness.report.style import FAINT, INK

UNIT = "forward"
"""The row that others are read against: a plain forward pass over the same text. Drawn with its
seconds: growth in proportion to the parameters, from its smallest size, a slope to compare others with."""
PANELS = {"seconds": "seconds", "extra_gb": "peak memory beyond the model, GB"}
PROPORTIONAL = "in proportion to parameters"
MARKS = "bars: fastest and slowest run; a line ends where the next size would not have fitted into the limits"


def cost_against_size(frame: pd.DataFrame, title: str) -> Figure:
    """Seconds (above) and peak memory beyond the model (below) against parameters, log-log; a column a length.

    Args:
        frame: what `scaling.run` returned.
    """
    measured = frame[frame["status"] == "measured"].assign(extra_gb=lambda rows: rows["extra_bytes"] / 1e9)
    lengths = sorted(measured["length"].unique())
    names = list(measured["row"].unique())
    looks = style.looks({name: name for name in names if name != UNIT})
    with matplotlib.rc_context(style.FIGURE):
        width = 0.8 + 2.8 * len(lengths)
        figure = canvas(width, 6.4, [*names, PROPORTIONAL])
        panels = figure.subplots(len(PANELS), len(lengths), sharex=True, sharey="row", squeeze=False)
        for line, (column, label) in zip(panels, PANELS.items(), strict=True):
            line[0].set_ylabel(label)
            for axis, length in zip(line, lengths, strict=True):
                rows = measured[measured["length"] == length]
                _unit(axis, rows[rows["row"] == UNIT], column)
                for name, look in looks.items():
                    _line(axis, rows[rows["row"] == name], column, name, look)
                _scales(axis, measured)
        for axis, length in zip(panels[0], lengths, strict=True):
            _proportional(axis, measured[(measured["length"] == length) & (measured["row"] == UNIT)])
            axis.set_title(f"{length} tokens a sequence", fontsize="medium")
        for axis in panels[-1]:
            axis.set_xlabel("parameters in linears")
        headline(figure, title, width, MARKS)
        legend(figure, *panels[0, 0].get_legend_handles_labels())
    return figure


def _line(axis: Axes, rows: pd.DataFrame, column: str, name: str, look: style.Look) -> None:
    rows = rows[rows[column] > 0]  # what a small model takes may lie below what the process held anyway
    if column == "seconds":
        bars = [rows["seconds"] - rows["seconds_low"], rows["seconds_high"] - rows["seconds"]]
        axis.errorbar(rows["parameters"], rows[column], yerr=bars, color=look.color, linestyle="", elinewidth=0.9)
    axis.plot(
        rows["parameters"],
        rows[column],
        color=look.color,
        linestyle=look.line,
        marker=look.marker,
        markeredgecolor="white",
        label=name,
    )


def _unit(axis: Axes, rows: pd.DataFrame, column: str) -> None:
    rows = rows[rows[column] > 0]
    axis.plot(rows["parameters"], rows[column], color=INK, linewidth=1, linestyle=(0, (1, 1)), label=UNIT)


def _proportional(axis: Axes, rows: pd.DataFrame) -> None:
    smallest = rows.nsmallest(1, "parameters")
    growth = smallest["seconds"].mean() / smallest["parameters"].mean()
    axis.plot(rows["parameters"], growth * rows["parameters"], color=FAINT, linewidth=0.8, label=PROPORTIONAL)


def _scales(axis: Axes, measured: pd.DataFrame) -> None:
    """Log-log, with the sizes themselves as ticks."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    sizes = measured.drop_duplicates("size").sort_values("parameters")
    axis.set_xticks(list(sizes["parameters"]), list(sizes["size"]))
    axis.tick_params(axis="x", labelsize="x-small")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    plain_numbers(axis.yaxis)
    axis.yaxis.set_minor_locator(NullLocator())
