"""Kernels under the roofs that bandwidth and arithmetic set (Williams, Waterman & Patterson, CACM 2009)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report import style
from harness.report.figures import save
from harness.report.layout import canvas, headline, legend, plain_numbers
from harness.report.style import INK

COLUMNS = ("kernel", "intensity", "flops", "bandwidth")
SIZE = (5.6, 4.2)
TERA = 1e12
READ, PEAK = "ceiling_read", "ceiling_flops_"
"""Columns of a CSV that give the ceilings, the same in every row; the second before the name of a dtype."""
NOTE = "roofs: measured on the same device; in brackets: highest share of its read bandwidth; hollow: peers"


@dataclass(frozen=True)
class Ceilings:
    """What the device reached.

    Attributes:
        read: bytes a second.
        peaks: FLOP a second, by the name of the dtype.
    """

    read: float
    peaks: Mapping[str, float]


def write(tables: Path, folder: Path) -> list[Path]:
    """Write `roofline_…` for every `kernels_….csv` in `tables` with arithmetic intensities; return the paths."""
    paths = []
    for path in sorted(tables.glob("kernels_*.csv")):
        table = pd.read_csv(path, comment="#")
        if "intensity" in table:
            name = path.stem.removeprefix("kernels_")
            figure = roofline(table, ceilings(table), f"Kernels: {name}")
            paths += save(figure, folder / f"roofline_{name}")
    return paths


def ceilings(table: pd.DataFrame) -> Ceilings:
    """Those that the columns `ceiling_read` and `ceiling_flops_…` name.

    Raises:
        ValueError: there are no such columns.
    """
    names = [str(name) for name in table.columns]
    peaks = {name.removeprefix(PEAK): float(table[name].iloc[0]) for name in names if name.startswith(PEAK)}
    if READ not in table or not peaks:
        raise ValueError(f"a table of kernels needs the columns {READ} and {PEAK}<dtype>; it has {list(table)}")
    return Ceilings(float(table[READ].iloc[0]), peaks)


def roofline(points: pd.DataFrame, roofs: Ceilings, title: str) -> Figure:
    """Achieved FLOP a second against FLOP a byte, log-log: a line a kernel, a roof a dtype.

    Args:
        points: columns kernel, intensity (FLOP a byte), flops (a second) and bandwidth (bytes a second); where there
            is a column peer, a kernel that is not of this project names its origin there.

    Raises:
        ValueError: a column is missing, or a number is not positive.
    """
    points = _checked(points)
    kernel_of = dict(zip(points["name"], points["kernel"], strict=True))
    best = points.groupby("name")["bandwidth"].max() / roofs.read
    looks = style.looks(kernel_of)
    labels = {name: f"{name} ({best[name]:.0%})" for name in looks}
    with matplotlib.rc_context(style.FIGURE):
        figure = canvas(*SIZE, [*labels.values(), *_roof_labels(roofs).values()])
        axis = figure.add_subplot(xscale="log", yscale="log")
        _roofs(axis, roofs, points["intensity"])
        for name, look in looks.items():
            rows = points[points["name"] == name].sort_values("intensity", kind="stable")
            axis.plot(rows["intensity"], rows["flops"] / TERA, linestyle=look.line, label=labels[name], **look.marks())
        axis.set(
            xlabel="arithmetic intensity, FLOP a byte",
            ylabel="achieved, TFLOP/s",
            xlim=_reach(roofs, points["intensity"]),
        )
        plain_numbers(axis.xaxis)
        plain_numbers(axis.yaxis)
        headline(figure, title, SIZE[0], NOTE)
        legend(figure, *axis.get_legend_handles_labels())
    return figure


def _checked(points: pd.DataFrame) -> pd.DataFrame:
    """With the column name: kernel, and origin of a peer's."""
    missing = [name for name in COLUMNS if name not in points]
    if missing:
        raise ValueError(f"a roofline needs the columns {', '.join(COLUMNS)}; {', '.join(missing)} is not there")
    wrong = points[~(points[list(COLUMNS[1:])] > 0).all(axis=1)]
    if len(wrong):
        raise ValueError(f"kernel {wrong['kernel'].iloc[0]!r} has a number that is not positive; leave such rows out")
    peer = points.reindex(columns=["peer"])["peer"].fillna("").astype(str)
    return points.assign(name=points["kernel"].where(peer == "", points["kernel"] + ", " + peer))


def _reach(roofs: Ceilings, intensity: pd.Series) -> tuple[float, float]:
    """Ends of the axis: all points, and the ridges of all roofs."""
    ridge = max(roofs.peaks.values()) / roofs.read
    return float(intensity.min()) / 2, 2 * max(float(intensity.max()), ridge)


def _roof_labels(roofs: Ceilings) -> dict[str, str]:
    peaks = {dtype: f"peak {dtype}: {peak / TERA:.4g} TFLOP/s" for dtype, peak in roofs.peaks.items()}
    return {"": f"read: {roofs.read / 1e9:.4g} GB/s", **peaks}


def _roofs(axis: Axes, roofs: Ceilings, intensity: pd.Series) -> None:
    """The slope of the bandwidth up to the highest peak, and each peak to the right of its ridge."""
    labels = _roof_labels(roofs)
    left, right = _reach(roofs, intensity)
    ridge = max(roofs.peaks.values()) / roofs.read
    drawn: dict[str, Any] = {"color": INK, "linewidth": 1.0, "zorder": 1}
    axis.plot([left, ridge], [roofs.read * left / TERA, roofs.read * ridge / TERA], label=labels[""], **drawn)
    lines = itertools.cycle(style.DASHES)
    for (dtype, peak), line in zip(roofs.peaks.items(), lines, strict=False):
        axis.plot([peak / roofs.read, right], [peak / TERA] * 2, linestyle=line, label=labels[dtype], **drawn)
