"""Quality against stored bits: a line a method, with intervals, and the Pareto front over all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.report.frame import EXCESS
from harness.report.layout import canvas, headline, legend, plain_log_ticks, plain_numbers
from harness.report.style import FAINT, INK, Look

FAR = 3.0
"""Points above this multiple of the lowest perplexity go to a second panel, so as not to flatten the rest."""
SAME_BITS = 20
"""Cells are at equal bits when these agree to a twentieth of a bit: the line goes through their mean."""
ASIDE, WIDEST = 0.011, 0.03
"""Methods at equal bits are drawn apart by this share of the bits, so that their bars can be told apart; all of them
together by no more than the second."""
CROWD = 8
"""Methods beyond which lines become thinner and points smaller."""
WIDTH = 5.2
"""Inches of the axes."""
BITS = "stored bits a weight, with scales and zeros (log scale)"
SHARED = "; methods at equal bits stand side by side; gray steps: Pareto front"


def pareto(title: str, done: pd.DataFrame, looks: dict[str, Look]) -> Figure | None:
    """Perplexity against stored bits.

    Bars are the intervals of the paired difference from the reference, which is what sets methods apart; the
    band is the reference's own interval. Without a reference, bars are each point's own interval.
    """
    methods, reference = done[~done["reference"]], done[done["reference"]]
    if methods.empty:
        return None
    shown = _placed(_paired(methods, reference), looks)
    figure, axes = _panels(shown, reference["perplexity"].min())
    for axis in axes:
        _front(axis, shown)
        _lines(axis, shown, looks)
        _reference_line(axis, reference)
    _finish(figure, axes, title, "perplexity per token (log scale)", _bars(reference) + SHARED)
    return figure


def divergence(title: str, done: pd.DataFrame, looks: dict[str, Look]) -> Figure | None:
    """KL divergence from the reference against stored bits: at 8 bits too it tells methods apart."""
    methods = done[~done["reference"] & (done["kl"] > 0)]
    if methods.empty:
        return None
    shown = _placed(methods.assign(value=methods["kl"], low=methods["kl_low"], high=methods["kl_high"]), looks)
    figure = canvas(WIDTH, 4.2, sorted(set(shown["method"])))
    axis = figure.add_subplot()
    axis.set_yscale("log", nonpositive="clip")
    plain_numbers(axis.yaxis)
    _front(axis, shown)
    _lines(axis, shown, looks)
    measure = "KL divergence from fp16, nats per token"
    _finish(figure, [axis], title, measure, "bars: 95 % interval" + SHARED)
    return figure


def front(points: pd.DataFrame) -> pd.DataFrame:
    """The points, by bits, that no other undercuts: none has a lower `value` at no more `effective_bits`.

    Up to `EXCESS` more bits count as no more: a group index decides no comparison.
    """
    known = points.dropna(subset=["effective_bits", "value"]).sort_values(["effective_bits", "value"], kind="stable")
    bits, values = known["effective_bits"].to_numpy(), known["value"].to_numpy()
    rivals = [values[bits <= EXCESS * own].min() for own in bits]
    return known[values <= rivals].drop_duplicates("value")


def _paired(methods: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """With columns value, low and high: what is drawn."""
    ends = methods[["perplexity_low", "perplexity_high"]].to_numpy()
    if len(reference):
        paired = methods[["delta_low", "delta_high"]].to_numpy() + reference["perplexity"].iloc[0]
        ends = np.where(np.isnan(paired), ends, paired)
    return methods.assign(value=methods["perplexity"], low=ends[:, 0], high=ends[:, 1])


def _placed(shown: pd.DataFrame, looks: dict[str, Look]) -> pd.DataFrame:
    """With the column place: the bits, methods a little apart."""
    present = [label for label in looks if label in set(shown["method"])]
    share = min(ASIDE, WIDEST / len(present))
    aside = {label: 1 + share * (i - (len(present) - 1) / 2) for i, label in enumerate(present)}
    return shown.assign(place=shown["effective_bits"] * shown["method"].map(aside))


def _bars(reference: pd.DataFrame) -> str:
    if reference.empty:
        return "bars: 95 % interval"
    row = reference.iloc[0]
    own = f", {row['perplexity_low']:.2f} to {row['perplexity_high']:.2f}"
    return f"bars: 95 % interval of the paired difference from fp16; band: that of fp16 itself{own}"


def _panels(shown: pd.DataFrame, base: float) -> tuple[Figure, list[Axes]]:
    """One panel, or two: a fine one where methods can be told apart, above it one for those that broke down.

    The break lies in the widest gap between values, so that it cuts no point.
    """
    labels = [*sorted(set(shown["method"])), "fp16 (00.00)"]
    values = np.sort(np.append(shown["value"], base))
    values = values[~np.isnan(values)]  # there may be no base
    near = values[:-1] <= FAR * values[0]
    if values[-1] <= FAR * values[0]:
        figure = canvas(WIDTH, 4.2, labels)
        axes = [figure.add_subplot()]
        axes[0].set_ylim(min(values[0], shown["low"].min()) / 1.01, max(values[-1], shown["high"].max()) * 1.01)
    else:
        figure = canvas(WIDTH, 5.2, labels)
        gap = np.argmax(np.where(near, np.diff(np.log(values)), -1))
        axes = list(figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.8)))
        axes[0].set_ylim(values[gap + 1] / 1.12, values[-1] * 1.25)
        axes[1].set_ylim(values[0] / 1.02, values[gap] * 1.04)
        _break_marks(*axes)
    for axis in axes:
        axis.set_yscale("log")
        plain_log_ticks(axis)
    return figure, axes


def _break_marks(upper: Axes, lower: Axes) -> None:
    upper.spines["bottom"].set_visible(False)
    upper.tick_params(axis="x", which="both", length=0)
    slant: dict[str, Any] = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 8, "color": INK, "clip_on": False}
    upper.plot([0], [0], transform=upper.transAxes, **slant)
    lower.plot([0], [1], transform=lower.transAxes, **slant)


def _front(axis: Axes, shown: pd.DataFrame) -> None:
    """As steps, at the bits themselves: between two points of the front the one with fewer bits is to be had."""
    edge = front(shown.groupby(["method", "budget"], as_index=False)[["effective_bits", "value"]].mean())
    right = shown["effective_bits"].max() * 1.06
    drawn: dict[str, Any] = {"color": FAINT, "alpha": 0.4, "linewidth": 4, "zorder": 1, "solid_joinstyle": "miter"}
    axis.step([*edge["effective_bits"], right], [*edge["value"], edge["value"].iloc[-1]], where="post", **drawn)


def _lines(axis: Axes, shown: pd.DataFrame, looks: dict[str, Look]) -> None:
    """Every cell as a point with its interval; a line through the mean of a method's cells at equal bits."""
    present = [label for label in looks if label in set(shown["method"])]
    thick, size = (1.4, 6.5) if len(present) <= CROWD else (0.8, 5.0)
    for label in present:
        look, rows = looks[label], shown[shown["method"] == label]
        line = rows.groupby((rows["effective_bits"] * SAME_BITS).round())[["place", "value"]].mean()
        drawn = {"linewidth": thick, "markersize": size, **look.marks()}
        axis.plot(line["place"], line["value"], color=look.color, linestyle=look.line, linewidth=thick)
        bars = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
        ends = {"linestyle": "", "elinewidth": 0.9, "capsize": 2}
        axis.errorbar(rows["place"], rows["value"], yerr=bars, **drawn | ends)
        axis.plot([], [], linestyle=look.line, label=label, **drawn)
    left, right = math.floor(shown["effective_bits"].min()) * 0.97, shown["effective_bits"].max() * 1.06
    axis.set_xlim(left, max(right, 1.4 * left))


def _reference_line(axis: Axes, reference: pd.DataFrame) -> None:
    for _, row in reference.iterrows():
        label = f"{row['method']} ({row['perplexity']:.2f})"
        axis.axhline(row["perplexity"], color=INK, linewidth=1, linestyle=(0, (1, 1)), label=label)
        axis.axhspan(row["perplexity_low"], row["perplexity_high"], color=INK, alpha=0.07, linewidth=0, zorder=0)


def _finish(figure: Figure, axes: list[Axes], title: str, measure: str, note: str) -> None:
    for axis in axes:
        axis.set_xscale("log")  # widths differ by ratio, and most methods meet between 2 and 4.5 bits
        axis.xaxis.set_major_locator(FixedLocator(range(1, 17)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel(BITS)
    figure.supylabel(measure, fontsize="medium")
    headline(figure, title, WIDTH, note)
    legend(figure, *axes[0].get_legend_handles_labels())
