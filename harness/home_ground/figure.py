"""Loss on test examples against stored bits: a row a model, a column a grid and rounding."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from harness.home_ground.ranks import ALL
from harness.home_ground.study import FULL, RANDOM
from harness.home_ground.table import reference
from harness.report import style
from harness.report.figures import INK

MARKS = (
    "gray: from the 5th to the 95th percentile of random plans; "
    "bars: 95 % interval of the paired difference from uniform"
)
SHOWN = ("uniform", "hawq_v1", "hawq_v3", "squared_error", "measured", "inverse")
"""hawq_v2 minimizes what hawq_v3 does, and lies upon it."""


def draw(table: pd.DataFrame) -> Figure:
    """The figure, of `table.tidy`'s rows."""
    rows = table[table["method"] != FULL]
    models = list(rows["model"].unique())
    columns = list(product(rows["grid"].unique(), rows["rounding"].unique()))
    figure = Figure(figsize=(2.0 + 2.4 * len(columns), 1.0 + 2.5 * len(models)))
    panels = figure.subplots(len(models), len(columns), sharex=True, sharey="row", squeeze=False)
    looks = style.looks({name: name for name in SHOWN})
    for line, model in zip(panels, models, strict=True):
        full = reference(table).set_index("model").loc[model]
        for axis, (grid, rounding) in zip(line, columns, strict=True):
            cell = rows[(rows["model"] == model) & (rows["grid"] == grid) & (rows["rounding"] == rounding)]
            _panel(axis, cell, looks)
            axis.axhline(full["loss"], color=INK, linewidth=1, linestyle=(0, (1, 1)), label=FULL)
            axis.set_title(f"{model}, {grid}, {rounding}", fontsize="small")
        line[0].set_ylabel("test loss, nats (log scale)")
    for axis in panels[-1]:
        axis.set_xlabel("stored bits a weight")
    figure.suptitle("HAWQ on its home ground", x=0.01, ha="left", fontweight="bold", fontsize="medium")
    figure.supxlabel(MARKS, fontsize="x-small", color=INK)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def _panel(axis: Axes, cell: pd.DataFrame, looks: dict[str, style.Look]) -> None:
    pooled = cell[cell["seed"] == ALL]
    base = pooled[pooled["method"] == "uniform"].set_index("budget")["loss"]
    for _, plans in cell[(cell["method"] == RANDOM) & (cell["seed"] != ALL)].groupby("budget"):
        ends = np.quantile(plans["loss"], [0.05, 0.95])
        axis.plot([plans["bits"].mean()] * 2, ends, color="#BBBBBB", linewidth=7, alpha=0.7, solid_capstyle="butt")
    for number, (name, look) in enumerate(looks.items()):
        rows = pooled[pooled["method"] == name].sort_values("bits")
        middle = rows["budget"].map(base).to_numpy(float)
        ends = rows[["delta_loss_low", "delta_loss_high"]].to_numpy(float) + middle[:, None]
        bars = np.nan_to_num(np.abs(ends - rows[["loss"]].to_numpy(float)).T)
        drawn: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": 4.5, "label": name}
        axis.errorbar(rows["bits"] + 0.015 * number, rows["loss"], yerr=bars, elinewidth=0.8, linewidth=1, **drawn)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
