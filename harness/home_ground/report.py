"""What the study found, as CSV and as a page of Markdown."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd

from harness.home_ground import table as tables
from harness.home_ground.figure import draw
from harness.home_ground.ranks import ALL
from harness.home_ground.study import FULL, UNIFORM
from harness.records import write_atomically
from harness.report import style
from harness.report.figures import save
from harness.report.tables import markdown_text

NAME = "home_ground"
LEGEND = (
    "HAWQ where it was first validated: a small CNN and a small BERT-style encoder, trained by this project. "
    "Weights alone are quantized, all of them but embeddings, norms, biases and the classifier, to symmetric integers "
    "of 2, 3, 4 or 8 bits; nothing is trained afterwards. `channel`: a scale for each output channel; "
    "`group`: one for so many "
    "columns of it. A budget is a number of stored bits a weight, scales included, or `w3`: what 3-bit codes store on "
    "that grid. Intervals: 95 % bootstrap over test examples and training seeds; bold: zero is outside."
)
METHODS = (
    "hawq_v1: widths in the order of λ/n. hawq_v2: least Ω = tr/n · ‖ΔW‖², Pareto frontier; hawq_v3: the same by an "
    "integer programme. Against them, by the same programme: fisher, squared_error (‖ΔW‖², no Hessian), and measured "
    "(the loss on scoring examples, layer by layer). inverse: HAWQ's order upside down. random: mean of random plans."
)


def write(answers: pd.DataFrame, agreement: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `home_ground{.csv,_ranks.csv,.md}` to `tables/` and the figure to `figures/`.

    Args:
        answers: of `table.frame`.
        agreement: of `ranks.agreement`.

    Returns:
        The paths written.
    """
    table = tables.tidy(answers)
    contents = {
        f"{NAME}.csv": table.to_csv(index=False, lineterminator="\n", float_format="%.6g"),
        f"{NAME}_ranks.csv": agreement.to_csv(index=False, lineterminator="\n", float_format="%.6g"),
        f"{NAME}.md": markdown(table, tables.ablation(answers), agreement),
    }
    for name, content in contents.items():
        write_atomically(folder / "tables" / name, content)
    with matplotlib.rc_context(style.FIGURE):
        figures = save(draw(table), folder / "figures" / NAME)
    return [*(folder / "tables" / name for name in contents), *figures]


def markdown(table: pd.DataFrame, ablation: pd.DataFrame, agreement: pd.DataFrame) -> str:
    """The page: full precision, methods against uniform widths, the ablation, and ranks."""
    parts = ["# HAWQ on its home ground", LEGEND, "## Full precision", _reference(table)]
    parts += ["## Loss against uniform widths", METHODS]
    pooled = table[(table["seed"] == ALL) & (table["method"] != FULL)]
    for (model, rounding), rows in pooled.groupby(["model", "rounding"], sort=False):
        parts += [f"### {markdown_text(str(model))}, rounding: {rounding}", _methods(rows)]
    parts += [
        "## Q-BERT’s ablation: groups × Hessian",
        "Change of the loss against uniform widths per channel. Under `w3` a grid’s own scales come on top, as Q-BERT "
        "counts; elsewhere both grids store the same.",
        _ablation(ablation),
        "## Ranks",
        "Spearman’s ρ over linears with the measured increase of the test loss when one linear alone is rounded, mean "
        "over seeds.",
    ]
    for model, rows in agreement[agreement["seed"] == ALL].groupby("model", sort=False):
        parts += [f"### {markdown_text(str(model))}", _ranks(rows)]
    return "\n\n".join(parts) + "\n"


def _reference(table: pd.DataFrame) -> str:
    rows = [
        {"model": row.model, "accuracy": _spread(row, "accuracy"), "loss": _spread(row, "loss")}
        for _, row in tables.reference(table).iterrows()
    ]
    return _table(pd.DataFrame(rows))


def _methods(rows: pd.DataFrame) -> str:
    """Rows: accuracy and loss of uniform widths, then the difference of each method from that loss."""
    lines: dict[str, dict[str, str]] = {}
    for _, row in rows.iterrows():
        column = f"{row.grid} {row.budget}"
        if row.method == UNIFORM:
            lines.setdefault("stored bits", {})[column] = f"{row.bits:.2f}"
            lines.setdefault("uniform: accuracy", {})[column] = f"{row.accuracy:.3f}"
            lines.setdefault("uniform: loss", {})[column] = f"{row.loss:.3f}"
        else:
            lines.setdefault(f"{row.method}: Δ", {})[column] = _difference(row, "delta_loss")
    return _table(pd.DataFrame([{"": name} | line for name, line in lines.items()]))


def _ablation(rows: pd.DataFrame) -> str:
    changes = ("groups", "hessian", "both", "interaction")
    lines = [
        {"model": row.model, "budget": row.budget, "rounding": row.rounding, "uniform": f"{row.uniform:.3f}"}
        | {name: _difference(row, name) for name in changes}
        for _, row in rows.iterrows()
    ]
    return _table(pd.DataFrame(lines))


def _ranks(rows: pd.DataFrame) -> str:
    rows = rows.assign(column=rows["grid"] + " " + rows["bits"].astype(int).astype(str) + " bits")
    cells = rows.assign(cell=[f"{r.spearman:+.2f} [{r.low:+.2f}, {r.high:+.2f}]" for r in rows.itertuples()])
    order = rows.groupby("score")["spearman"].mean().sort_values(ascending=False).index
    wide = cells.pivot(index="score", columns="column", values="cell").loc[order, list(rows["column"].unique())]
    return _table(wide.reset_index())


def _spread(row: pd.Series, name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def _difference(row: pd.Series, name: str) -> str:
    """The difference with half its interval; bold where zero is outside."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    text = f"{row[name]:+.3f} ± {(high - low) / 2:.3f}"
    return f"**{text}**" if low > 0 or high < 0 else text


def _table(rows: pd.DataFrame) -> str:
    return rows.to_markdown(index=False, disable_numparse=True)
