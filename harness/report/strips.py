"""Layer by layer: sensitivities, and the bits that follow from them, as heat strips, one a type of linear."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness.report.layout import headline
from harness.report.style import INK, Look

MOST_NUMBERS = 72
"""Columns that still have room for numbers."""
HEAT = matplotlib.colormaps["Oranges"]
HEAD, GAP = 0.95, 0.35
"""Heights of the line with a method's name and of the space after a method, in lines."""
INCHES = 0.235
"""Of a line."""
RATIO = 1.0001
"""Sensitivities all equal still need ends of their scale."""
SENSITIVITY = "sensitivity"
BLOCKS = "linears by type, first to last block from left to right"
NOTE = "sensitivity as the method computed it, each strip on a log scale of its own; blank where it is not positive"


@dataclass(frozen=True)
class Palette:
    """How values become colors."""

    norm: Normalize
    colors: Colormap

    def color(self, value: float) -> tuple[float, float, float, float]:
        """Red, green, blue and opacity."""
        return self.colors(self.norm(value))


@dataclass(frozen=True)
class Strip:
    """One line of heat: a value for every linear, by type.

    Attributes:
        label: what it shows.
        values: [blocks] of each type; NaN stays blank.
        palette: gives the colors.
        top: where it stands, in lines; it is one line high.
    """

    label: str
    values: Mapping[str, np.ndarray]
    palette: Palette
    top: float


def bits(title: str, done: pd.DataFrame, looks: Mapping[str, Look]) -> Figure | None:
    """Bits of every linear of cells that mix widths, below the sensitivities they follow.

    A group of strips a method: its sensitivity, where it has one, then a strip a budget. Budgets share the
    sensitivity above them; a method that measured it anew for another budget gets another strip of it.
    """
    mixed = done[done["layers"].map(lambda layers: len(_column(layers, "bits")) > 1)]
    if mixed.empty:
        return None
    types = by_type([layer["name"] for layer in mixed["layers"].iloc[0]])
    palette, widths = _palette(mixed)
    strips, heads = _groups(mixed, looks, types, palette)
    columns = sum(map(len, types.values()))
    lines = strips[-1].top + 1
    width = min(3 + max(0.2 * columns, 0.8 * len(types)), 16)
    figure = Figure(figsize=(width, 1.3 + INCHES * lines))
    axis = figure.add_subplot()
    _draw(axis, strips, types, numbers=columns <= MOST_NUMBERS)
    for top, method in heads:
        axis.text(0, top + HEAD / 2, method, va="center", size="small", fontweight="bold", color=INK)
    axis.set_ylim(lines, 0)
    sensitive = any(strip.label == SENSITIVITY for strip in strips)
    headline(figure, title, width - 1.3, NOTE if sensitive else "")
    handles = [Patch(color=palette.color(width), label=f"{width:g} bits") for width in widths]
    ends = {"least sensitive": 0.05, "most sensitive": 1.0}
    handles += [Patch(color=HEAT(place), label=label) for label, place in ends.items()] if sensitive else []
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    return figure


def by_type(names: Sequence[str]) -> dict[str, list[str]]:
    """Linears grouped by their place in a block, in order.

    `model.layers.3.mlp.up_proj` is of type `up_proj`, or `mlp.up_proj` if the last part alone is ambiguous.
    """
    types: dict[str, list[str]] = {}
    for name in names:
        _, *inside = re.split(r"\.\d+\.", name)
        types.setdefault(".".join(inside) or name, []).append(name)
    short = [kind.rpartition(".")[2] for kind in types]
    return dict(zip(short, types.values(), strict=True)) if len(set(short)) == len(types) else types


def _groups(
    mixed: pd.DataFrame, looks: Mapping[str, Look], types: Mapping[str, list[str]], palette: Palette
) -> tuple[list[Strip], list[tuple[float, str]]]:
    """All strips from top to bottom, and where each method's name stands."""
    strips: list[Strip] = []
    heads, top = [], 0.0
    seeded = mixed["seed"].nunique() > 1
    for method in (label for label in looks if label in set(mixed["method"])):
        heads.append((top, method))
        top, above = top + HEAD, np.empty(0)
        for _, row in mixed[mixed["method"] == method].iterrows():
            heat = _values(row["layers"], types, "sensitivity")
            known = np.concatenate(list(heat.values()))
            if (known > 0).any() and not np.array_equal(known, above, equal_nan=True):
                strips.append(Strip(SENSITIVITY, heat, Palette(_log_norm(known), HEAT), top))
                top, above = top + 1, known
            label = f"{row['budget']} · seed {row['seed']}" if seeded else row["budget"]
            strips.append(Strip(label, _values(row["layers"], types, "bits"), palette, top))
            top += 1
        top += GAP
    return strips, heads


def _column(layers: list[dict[str, Any]], what: str) -> set[float]:
    return {float(layer[what]) for layer in layers}


def _values(layers: list[dict[str, Any]], types: Mapping[str, list[str]], what: str) -> dict[str, np.ndarray]:
    """[blocks] of each type; NaN where a layer has no such value."""
    found = {layer["name"]: np.nan if layer[what] is None else float(layer[what]) for layer in layers}
    return {kind: np.array([found.get(name, np.nan) for name in names]) for kind, names in types.items()}


def _palette(mixed: pd.DataFrame) -> tuple[Palette, np.ndarray]:
    """Light to dark for few to many bits, one shade a width that occurs, of which there are two at least."""
    widths = np.array(sorted(set().union(*(_column(layers, "bits") for layers in mixed["layers"]))))
    shades = matplotlib.colormaps["Blues"](np.linspace(0.1, 0.95, len(widths)))
    bounds = [widths[0] - 1, *(widths[1:] + widths[:-1]) / 2, widths[-1] + 1]
    return Palette(BoundaryNorm(bounds, len(widths)), ListedColormap(shades)), widths


def _log_norm(values: np.ndarray) -> Normalize:
    positive = values[values > 0]  # NaN is not
    return LogNorm(positive.min() / RATIO, positive.max() * RATIO)


def _draw(axis: Axes, strips: Sequence[Strip], types: Mapping[str, list[str]], numbers: bool) -> None:
    left, centers = 0.0, []
    for kind, names in types.items():
        for strip in strips:
            _strip(axis, strip, kind, left, numbers and strip.label != SENSITIVITY)
        centers.append(left + len(names) / 2)
        left += len(names) + 0.5
    axis.set_xlim(0, left - 0.5)
    axis.set_xticks(centers, list(types))
    axis.set_yticks([strip.top + 0.5 for strip in strips], [strip.label for strip in strips])
    axis.set_xlabel(BLOCKS)
    axis.tick_params(length=0, labelsize="small")
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def _strip(axis: Axes, strip: Strip, kind: str, left: float, numbers: bool) -> None:
    values, palette = strip.values[kind], strip.palette
    edges, ends = left + np.arange(len(values) + 1), [strip.top, strip.top + 1]
    drawn: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5, "norm": palette.norm, "cmap": palette.colors}
    axis.pcolormesh(edges, ends, np.ma.masked_invalid(values)[None], **drawn)
    for x, value in zip(edges[:-1] + 0.5, values, strict=True):
        if numbers and np.isfinite(value):
            ink = "white" if sum(palette.color(value)[:3]) < 1.6 else INK
            axis.text(x, strip.top + 0.5, f"{value:g}", ha="center", va="center", size=6.5, color=ink)
