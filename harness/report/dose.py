"""Loss against the magnitude of planted activation outliers: a line a method, a panel a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, SymmetricalLogLocator

from harness.records import DONE, canonical
from harness.report.layout import canvas, headline, legend
from harness.report.style import INK, Look

FINE = 0.01
"""Nats around zero within which the axis is linear: about 1 % of perplexity."""
ASIDE = 0.04
"""Methods at equal doses are drawn apart by this factor, so that their bars can be told apart."""
COLUMNS = 3
NOTE = (
    "bars: 95 % interval of the paired difference from fp16 of the same model; vertical axis linear within "
    f"±{FINE} nats; methods at equal magnitudes stand side by side"
)


def dose_responses(frame: pd.DataFrame, looks: dict[str, Look]) -> Iterator[tuple[str, Figure]]:
    """A figure for every model that was measured with outliers of two magnitudes or more; none is 1.

    Args:
        frame: the tidy table. The magnitude is that of the cells' settings, whatever the model is called.

    Yields:
        The label of the section with the least outliers, and its figure.
    """
    rows = frame[(frame["status"] == DONE) & ~frame["reference"] & frame["delta_nll"].notna()]
    rows = rows.join(pd.DataFrame([_outliers(text) for text in rows["settings"]], rows.index))
    for _, same in rows.groupby("base", sort=False):
        for _, planted in same[same["dose"] != 1].groupby("planted", sort=False):
            shown = pd.concat([same[same["dose"] == 1], planted]).sort_values("dose", kind="stable")
            if shown["dose"].nunique() > 1:
                yield str(planted.sort_values("dose", kind="stable")["section"].iloc[0]), _figure(shown, looks)


def _outliers(settings: str) -> dict[str, Any]:
    """Magnitude of the outliers, how they were planted apart from it, and all other settings."""
    told = json.loads(settings)
    outliers = told["model"].pop("outliers", {})
    told["model"].pop("name", None)  # a label: the same weights bear several
    channels = outliers.get("channels", 0)
    planted = {"channels": channels, "seed": outliers.get("seed")}
    return {
        "dose": float(outliers["scale"]) if channels else 1.0,
        "planted": canonical(planted),
        "channels": channels,
        "base": canonical(told),
    }


def _figure(shown: pd.DataFrame, looks: dict[str, Look]) -> Figure:
    budgets = list(shown.drop_duplicates("budget").sort_values("nominal_bits")["budget"])
    columns = min(COLUMNS, len(budgets))
    lines = math.ceil(len(budgets) / columns)
    present = [label for label in looks if label in set(shown["method"])]
    width = 0.9 + 3.0 * columns
    figure = canvas(width, 0.9 + 2.9 * lines, present)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    _scales(panels[0, 0], sorted(shown["dose"].unique()))
    for axis, budget in zip(panels.flat, budgets, strict=False):
        _panel(axis, shown[shown["budget"] == budget], looks, present)
        axis.set_title(budget, fontsize="medium")
    for axis in list(panels.flat)[len(budgets) :]:
        axis.set_visible(False)
    figure.supylabel("Δ ln perplexity from fp16, nats per token", fontsize="medium")
    headline(figure, _title(shown), width, NOTE)
    for axis in panels[-1]:
        axis.set_xlabel("outlier magnitude (1: none)")
    legend(figure, *panels[0, 0].get_legend_handles_labels())
    return figure


def _title(shown: pd.DataFrame) -> str:
    row = shown.iloc[-1]
    return f"Outliers in {row['channels']} channels: {row['model']} on {row['data']}"


def _panel(axis: Axes, rows: pd.DataFrame, looks: dict[str, Look], present: list[str]) -> None:
    """Every cell as a point with its interval; a line through the means over seeds."""
    axis.axhline(0, color=INK, linewidth=1, linestyle=(0, (1, 1)))
    for i, label in enumerate(present):
        look, mine = looks[label], rows[rows["method"] == label]
        aside = (1 + ASIDE) ** (i - (len(present) - 1) / 2)
        line = mine.groupby("dose")["delta_nll"].mean()
        axis.plot(line.index * aside, line, color=look.color, linestyle=look.line)
        ends = [mine["delta_nll"] - mine["delta_nll_low"], mine["delta_nll_high"] - mine["delta_nll"]]
        drawn = {"linestyle": "", "elinewidth": 0.9, "capsize": 2, **look.marks()}
        axis.errorbar(mine["dose"] * aside, mine["delta_nll"], yerr=np.clip(ends, 0, None), **drawn)
        axis.plot([], [], linestyle=look.line, label=label, **look.marks())


def _scales(axis: Axes, doses: list[float]) -> None:
    """Of all panels, before anything is drawn: log by symlog, with the magnitudes themselves as ticks."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(doses, [f"{dose:g}" for dose in doses])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yscale("symlog", linthresh=FINE, linscale=0.5)
    axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=FINE))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
