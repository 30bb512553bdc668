"""Figures of one section: perplexity and KL divergence against stored bits, and the bits of each layer."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from harness.records import DONE, write_atomically
from harness.report import frame as frames
from harness.report import style
from harness.report.style import Look

FAR = 3.0
"""Points above this multiple of the lowest perplexity go to a second panel, so as not to flatten the rest."""
SAME_BITS = 20
"""Cells are at equal bits when these agree to a twentieth of a bit: the line goes through their mean."""
NARROW, WIDE = 8, 300
"""Ratios of an axis' ends at which its ticks change."""
ASIDE, WIDEST = 0.011, 0.055
"""Methods at equal bits are drawn apart by this share of the bits, so that their bars can be told apart; all of them
together by no more than the second."""
INK = "#222222"
PLAIN_BARS = "bars: 95 % interval; methods at equal bits stand side by side"
PAIRED_BARS = (
    "bars: 95 % interval of the paired difference from fp16; band: that of fp16 itself; "
    "methods at equal bits stand side by side"
)
MOST_NUMBERS = 72
"""Columns of the heat strip that still have room for numbers."""


def write(frame: pd.DataFrame, folder: Path, prefix: str = "") -> list[Path]:
    """Write `pareto_…`, `kl_…` and `bits_…`, each as PNG and SVG, for every section with something in it."""
    looks = style.looks(dict(zip(frame["method"], frame["method_name"], strict=True)))
    names = frames.slugs(frame)
    paths = []
    for section, rows in frames.sections(frame):
        done = rows[rows["status"] == DONE]
        for kind, draw in (("pareto", pareto), ("kl", divergence), ("bits", bits)):
            with matplotlib.rc_context(style.FIGURE):
                figure = draw(section, done, looks)
                if figure is not None:
                    paths += save(figure, folder / f"{prefix}{kind}_{names[section]}")
    return paths


def save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG without dates and versions: the same records give the same bytes."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomically(path, buffer.getvalue())
        paths.append(path)
    return paths


def pareto(title: str, done: pd.DataFrame, looks: dict[str, Look]) -> Figure | None:
    """Perplexity against stored bits, a line a method.

    Bars are the intervals of the paired difference from the reference, which is what sets methods apart; the
    band is the reference's own interval. Without a reference, bars are each point's own interval.
    """
    methods, reference = done[~done["reference"]], done[done["reference"]]
    if methods.empty:
        return None
    shown = _paired(methods, reference)
    figure, axes = _panels(shown, reference["perplexity"].min())
    for axis in axes:
        _lines(axis, shown, looks)
        _reference_line(axis, reference)
    _finish(figure, axes, title, "perplexity per token (log scale)", PAIRED_BARS if len(reference) else PLAIN_BARS)
    return figure


def divergence(title: str, done: pd.DataFrame, looks: dict[str, Look]) -> Figure | None:
    """KL divergence from the reference against stored bits: at 8 bits too it tells methods apart."""
    methods = done[~done["reference"] & (done["kl"] > 0)]
    if methods.empty:
        return None
    figure = Figure(figsize=(7.5, 4))
    axis = figure.add_subplot()
    axis.set_yscale("log", nonpositive="clip")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _lines(axis, methods.assign(value=methods["kl"], low=methods["kl_low"], high=methods["kl_high"]), looks)
    _finish(figure, [axis], title, "KL divergence from fp16, nats per token (log scale)", PLAIN_BARS)
    return figure


def _paired(methods: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """With columns value, low and high: what is drawn."""
    ends = methods[["perplexity_low", "perplexity_high"]].to_numpy()
    if len(reference):
        paired = methods[["delta_low", "delta_high"]].to_numpy() + reference["perplexity"].iloc[0]
        ends = np.where(np.isnan(paired), ends, paired)
    return methods.assign(value=methods["perplexity"], low=ends[:, 0], high=ends[:, 1])


def _panels(shown: pd.DataFrame, base: float) -> tuple[Figure, list[Axes]]:
    """One panel, or two: a fine one where methods can be told apart, above it one for those that broke down.

    The break lies in the widest gap between values, so that it cuts no point.
    """
    values = np.sort(np.append(shown["value"], base))
    values = values[~np.isnan(values)]  # there may be no base
    near = values[:-1] <= FAR * values[0]
    if values[-1] <= FAR * values[0]:
        figure = Figure(figsize=(7.5, 4.2))
        axes = [figure.add_subplot()]
        axes[0].set_ylim(min(values[0], shown["low"].min()) / 1.01, max(values[-1], shown["high"].max()) * 1.01)
    else:
        figure = Figure(figsize=(7.5, 5.2))
        gap = np.argmax(np.where(near, np.diff(np.log(values)), -1))
        axes = list(figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.8)))
        axes[0].set_ylim(values[gap + 1] / 1.12, values[-1] * 1.25)
        axes[1].set_ylim(values[0] / 1.02, values[gap] * 1.04)
        _break_marks(*axes)
    for axis in axes:
        axis.set_yscale("log")
        _plain_log_ticks(axis)
    return figure, axes


def _break_marks(upper: Axes, lower: Axes) -> None:
    upper.spines["bottom"].set_visible(False)
    upper.tick_params(axis="x", which="both", length=0)
    slant: dict[str, Any] = {
        "marker": [(-1, -0.6), (1, 0.6)],
        "markersize": 8,
        "color": INK,
        "clip_on": False,
    }
    upper.plot([0], [0], transform=upper.transAxes, **slant)
    lower.plot([0], [1], transform=lower.transAxes, **slant)


def _lines(axis: Axes, shown: pd.DataFrame, looks: dict[str, Look]) -> None:
    """Every cell as a point with its interval; a line through the mean of a method's cells at equal bits."""
    present = [label for label in looks if label in set(shown["method"])]
    share = min(ASIDE, WIDEST / len(present))
    for i, label in enumerate(present):
        look, rows = looks[label], shown[shown["method"] == label]
        aside = 1 + share * (i - (len(present) - 1) / 2)
        line = rows.groupby((rows["effective_bits"] * SAME_BITS).round())[["effective_bits", "value"]].mean()
        marker = _marker(look)
        axis.plot(line["effective_bits"] * aside, line["value"], color=look.color, linestyle=look.line)
        bars = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
        drawn = {"linestyle": "", "elinewidth": 0.9, "capsize": 2, **marker}
        axis.errorbar(rows["effective_bits"] * aside, rows["value"], yerr=bars, **drawn)
        axis.plot([], [], linestyle=look.line, label=label, **marker)
    left, right = math.floor(shown["effective_bits"].min()) * 0.97, shown["effective_bits"].max() * 1.06
    axis.set_xlim(left, max(right, 1.4 * left))


def _marker(look: Look) -> dict[str, Any]:
    face, edge = (look.color, "white") if look.filled else ("white", look.color)
    return {"marker": look.marker, "color": look.color, "markerfacecolor": face, "markeredgecolor": edge}


def _reference_line(axis: Axes, reference: pd.DataFrame) -> None:
    for _, row in reference.iterrows():
        label = f"{row['method']} ({row['perplexity']:.2f})"
        axis.axhline(row["perplexity"], color=INK, linewidth=1, linestyle=(0, (1, 1)), label=label)
        axis.axhspan(row["perplexity_low"], row["perplexity_high"], color=INK, alpha=0.07, linewidth=0)


def _finish(figure: Figure, axes: list[Axes], title: str, measure: str, note: str) -> None:
    """Labels, and a legend beside the axes, where it covers no point."""
    figure.suptitle(fill(title, 70), x=0.01, ha="left", fontweight="bold", fontsize="medium")
    for axis in axes:
        axis.set_xscale("log")  # widths differ by ratio, and most methods meet between 2 and 4.5 bits
        axis.xaxis.set_major_locator(FixedLocator(range(1, 17)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel("stored bits a weight, with scales and zeros (log scale)")
    figure.supylabel(measure, fontsize="medium")
    figure.supxlabel(note, fontsize="x-small", color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small", handlelength=3.4)


def _plain_log_ticks(axis: Axes) -> None:
    """A few round numbers over a narrow range, 1, 2, 5, 10 … over a wider one; never powers of ten."""
    low, high = axis.get_ylim()
    wide = LogLocator(subs=(1, 2, 5)) if high < WIDE * low else LogLocator(numticks=6)
    axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]) if high < NARROW * low else wide)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def bits(title: str, done: pd.DataFrame, looks: dict[str, Look]) -> Figure | None:
    """Bits of every linear of cells that mix widths: rows are methods and budgets, columns layers by type."""
    del looks
    mixed = done[done["layers"].map(lambda layers: len({layer["bits"] for layer in layers}) > 1)]
    if mixed.empty:
        return None
    widths = [{layer["name"]: layer["bits"] for layer in layers} for layers in mixed["layers"]]
    types = by_type(list(widths[0]))
    grids = {kind: np.array([[row[name] for name in names] for row in widths]) for kind, names in types.items()}
    count = len(widths[0])
    figure = Figure(figsize=(min(3 + max(0.2 * count, 0.8 * len(types)), 16), 1.3 + 0.3 * len(mixed)))
    axis = figure.add_subplot()
    _strips(figure, axis, grids, numbers=count <= MOST_NUMBERS)
    seeded = mixed["seed"].nunique() > 1
    labels = [f"{row.method} · {row.budget}" + f" · seed {row.seed}" * seeded for row in mixed.itertuples()]
    axis.set_yticks(np.arange(len(mixed)) + 0.5, labels)
    figure.suptitle(fill(title, 70), x=0.01, ha="left", fontweight="bold", fontsize="medium")
    axis.set_xlabel("linears by type, first to last block from left to right")
    return figure


def by_type(names: list[str]) -> dict[str, list[str]]:
    """Linears grouped by their place in a block, in order.

    `model.layers.3.mlp.up_proj` is of type `up_proj`, or `mlp.up_proj` if the last part alone is ambiguous.
    """
    types: dict[str, list[str]] = {}
    for name in names:
        _, *inside = re.split(r"\.\d+\.", name)
        types.setdefault(".".join(inside) or name, []).append(name)
    short = [kind.rpartition(".")[2] for kind in types]
    return dict(zip(short, types.values(), strict=True)) if len(set(short)) == len(types) else types


def _strips(figure: Figure, axis: Axes, grids: dict[str, np.ndarray], numbers: bool) -> None:
    """A strip a type, [rows, blocks], light to dark for few to many bits, with numbers if there is room."""
    widths = sorted({float(width) for grid in grids.values() for width in grid.flat})
    shades = matplotlib.colormaps["Blues"](np.linspace(0.1, 0.95, len(widths)))
    palette = dict(zip(widths, shades, strict=True))
    left, centers = 0.0, []
    for grid in grids.values():
        for (row, column), width in np.ndenumerate(grid):
            x, color = left + column, palette[float(width)]
            axis.add_patch(Rectangle((x, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
            if numbers:
                ink = "white" if sum(color[:3]) < 1.6 else INK
                axis.text(x + 0.5, row + 0.5, f"{width:g}", ha="center", va="center", size=6.5, color=ink)
        centers.append(left + grid.shape[1] / 2)
        left += grid.shape[1] + 0.5
    axis.set(xlim=(0, left - 0.5), ylim=(len(grid), 0))
    axis.set_xticks(centers, list(grids))
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    handles = [Patch(color=color, label=f"{width:g} bits") for width, color in palette.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
