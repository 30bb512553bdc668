"""What a study found, as tables, in the terminal, and as heat maps."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from harness.records import write_atomically
from harness.report import style
from harness.report.figures import save
from harness.report.tables import markdown_text
from harness.sensitivity.study import Study, agreement, matrix
from methods.sensitivity.base import Sensitivity

KINDS = {"spearman": "Spearman’s ρ", "kendall": "Kendall’s τ"}
LEGEND = (
    "Rank correlation over linears with the truth: the measured increase of the loss on test text when one linear "
    "alone is rounded to nearest. Brackets: 95 % bootstrap interval over linears. Ω: what allocation makes of a "
    "score, its product with ‖ΔW‖² (of a trace, divided by the number of weights). Passes: forward, backward and "
    "Hessian-vector products over one batch each."
)


def announce(console: Console, name: str, found: Sensitivity | str) -> None:
    """One line as soon as a metric is done."""
    if isinstance(found, str):
        console.print(f"{name:24} – {found}", style="yellow", markup=False)
        return
    cost = found.cost
    console.print(f"{name:24} {cost.seconds:8.1f} s {cost.passes:7} passes {cost.peak_bytes / 1e9:6.2f} GB")


def summary(found: Study) -> pd.DataFrame:
    """A row a metric, by its mean rank correlation: cost, and correlation with the truth in each format, as text."""
    agreed = agreement(found.scores)
    rows = []
    for metric, part in agreed.groupby("metric", sort=False):
        row: dict[str, object] = {"metric": metric, "mean": part["spearman"].mean()}
        for _, cell in part.iterrows():
            for kind in KINDS:
                low, high = cell[f"{kind}_low"], cell[f"{kind}_high"]
                row[f"{kind} {cell['format']}"] = f"{cell[kind]:+.2f} [{low:+.2f}, {high:+.2f}]"
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("mean", ascending=False, kind="stable").drop(columns="mean")
    costs = found.costs.set_index("metric").reindex(table["metric"])
    for column, form in {"seconds": "{:.1f}", "passes": "{:.0f}", "peak_gb": "{:.2f}"}.items():
        table[column] = [form.format(value) if np.isfinite(value) else "" for value in costs[column]]
    return table


def show(console: Console, found: Study) -> None:
    """Print the summary, Spearman's correlations only: Kendall's are in the files."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = summary(found)
    shown = shown[[name for name in shown.columns if not name.startswith("kendall")]]
    for i, head in enumerate(shown.columns):
        table.add_column(head.removeprefix("spearman "), justify="right" if i else "left", no_wrap=not i)
    for row in shown.itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)


def write(found: Study, title: str, folder: Path) -> list[Path]:
    """Write `sensitivity_….csv` (every score), `agreement_….{csv,md}` and the heat maps `agreement_…`, `metrics_…`.

    Returns:
        The paths written.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", title.split(" on ")[0]).strip("-.")[:80] or "model"
    tables = folder / "tables"
    contents = {
        f"sensitivity_{slug}.csv": found.scores.to_csv(index=False, lineterminator="\n"),
        f"agreement_{slug}.csv": agreement(found.scores).to_csv(index=False, lineterminator="\n"),
        f"agreement_{slug}.md": _markdown(found, title),
    }
    for name, content in contents.items():
        write_atomically(tables / name, content)
    paths = [tables / name for name in contents]
    with matplotlib.rc_context(style.FIGURE):
        paths += save(with_truth(found, title), folder / "figures" / f"agreement_{slug}")
        paths += save(between_metrics(found, title), folder / "figures" / f"metrics_{slug}")
    return paths


def _markdown(found: Study, title: str) -> str:
    table = summary(found).map(lambda value: markdown_text(str(value))).to_markdown(index=False, disable_numparse=True)
    parts = [f"# Sensitivity metrics: {markdown_text(title)}", LEGEND, table]
    if "reason" in found.costs:
        left_out = found.costs.dropna(subset="reason")
        parts += [f"- {row.metric}: {markdown_text(str(row.reason))}" for row in left_out.itertuples()]
    return "\n\n".join(parts) + "\n"


def with_truth(found: Study, title: str) -> Figure:
    """Heat map: metrics by formats, rank correlation with the truth."""
    agreed = agreement(found.scores)
    order = agreed.groupby("metric", sort=False)["spearman"].mean().sort_values(ascending=False).index
    figure = Figure(figsize=(4.4 + 0.9 * agreed["format"].nunique() * len(KINDS) / 1.4, 1.5 + 0.25 * len(order)))
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axis, (kind, label) in zip(panels, KINDS.items(), strict=True):
        wide = agreed.pivot(index="metric", columns="format", values=kind)
        _heat(axis, wide.loc[order, list(agreed["format"].unique())])
        axis.set_title(label, fontsize="medium")
    figure.suptitle(
        fill(f"Agreement with the measured loss: {title}", 70), x=0.01, ha="left", fontweight="bold", fontsize="medium"
    )
    return figure


def between_metrics(found: Study, title: str) -> Figure:
    """Heat map: metrics by metrics, the truth first, in the second-narrowest format."""
    formats = list(found.scores.sort_values("bits", kind="stable")["format"].unique())
    fmt = formats[min(1, len(formats) - 1)]
    wide = matrix(found.scores, fmt)
    side = 3.2 + 0.36 * len(wide)
    figure = Figure(figsize=(side, side - 1))
    axis = figure.add_subplot()
    _heat(axis, wide)
    axis.tick_params(axis="x", rotation=90)
    figure.suptitle(
        fill(f"Spearman’s ρ between rankings at {fmt}: {title}", 90),
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize="medium",
    )
    return figure


def _heat(axis: Axes, table: pd.DataFrame) -> None:
    """−1 to 1, blue to orange through white, a number in every cell."""
    colors = matplotlib.colormaps["PuOr_r"]
    axis.imshow(table.to_numpy(float), cmap=colors, vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table.to_numpy(float)):
        ink = "white" if abs(value) > 0.7 else style.INK
        axis.text(
            column, row, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", size=6.5, color=ink
        )
    axis.set_xticks(range(table.shape[1]), [str(name) for name in table.columns])
    axis.set_yticks(range(table.shape[0]), [str(name) for name in table.index])
    axis.tick_params(length=0, labelsize="small")
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
