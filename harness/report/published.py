"""Published figures, and whether ours agree with them.

A *cell* is what publications must share to be compared: model, data, method, widths of weights and inputs, and group
size. Publications differ in a cell by what they do not print (order of columns, calibration text, which linears), and
that disagreement is the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.records import DONE

COLUMNS = [
    *("paper", "arxiv", "table", "model", "method", "weight_bits", "act_bits", "group_size"),
    *("dataset", "metric", "value", "source"),
]
CELL = ["model", "dataset", "method", "weight_bits", "act_bits", "group_size"]
ROW, NONE = 0.0, -1.0
"""The group size of one scale a row, and that of weights that are not rounded."""
FULL = 16.0
TOLERANCE = 0.02
DIVERGED = 100.0
UNSTABLE_BITS = 2
REPRODUCED, DEVIATES = "reproduced", "deviates"
SAME_ORDER, OTHER_ORDER = "same order", "other order"


@dataclass(frozen=True)
class Match:
    """What publications call what we have.

    Attributes:
        models: our name of a model to theirs.
        data: theirs to `name/length` of ours: a text, and the tokens of a window.
        methods: our label of a method to theirs, of which there may be several.
        unverified: patterns of sources that do not count.
    """

    models: Mapping[str, str]
    data: Mapping[str, str]
    methods: Mapping[str, list[str]]
    unverified: list[str] = field(default_factory=list)


def read(path: Path) -> pd.DataFrame:
    """The published figures as printed: texts, but for `value`, which may be NaN where a publication prints that.

    Raises:
        ValueError: the file is missing, or has other columns, a value that is no number, a row twice, or no source.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: it holds the published figures, and comes with the project")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(frame.columns) != COLUMNS:
        raise ValueError(f"{path} has the columns {', '.join(frame.columns)}; it takes {', '.join(COLUMNS)}")
    numbers = pd.to_numeric(frame["value"], errors="coerce")
    bad = frame[numbers.isna() & (frame["value"] != "nan") | frame.duplicated() | (frame["source"] == "")]
    if len(bad):
        raise ValueError(f"{path}, row {bad.index[0] + 2}: a value that is no number, a row twice, or no source")
    return frame.assign(value=numbers)


def beside(figures: pd.DataFrame, records: pd.DataFrame, match: Match) -> pd.DataFrame:
    """Perplexities of the cells that `match` knows: published, and measured where a record agrees in all of `CELL`.

    Columns: `CELL` (in our names), `published` (the median), `published_low`, `published_high`, `papers`, `values`,
    `perplexity` with its interval (or, over several seeds, its standard deviation), `effective_bits`, `cells` (seeds
    measured), `deviation` (relative) and `verdict`.
    """
    published = _published(figures, match)
    if records.empty:
        return _judged(published.assign(perplexity=math.nan, perplexity_low=math.nan, perplexity_high=math.nan,
                                        perplexity_sd=math.nan, effective_bits=math.nan, cells=0))  # fmt: skip
    return _judged(published.merge(_measured(records, match), on=CELL, how="left").fillna({"cells": 0}))


def verdict(measured: float, median: float, low: float, high: float, bits: float) -> str:
    """Whether a measured perplexity agrees with published ones: within 2 % or half their range of their median.

    At 2 bits, and where either diverged (over 100), publications agree in the order of magnitude at best, and more is
    not asked: a factor of less than ten.
    """
    if math.isnan(measured) or math.isnan(median):
        return ""
    if bits <= UNSTABLE_BITS or max(measured, median) > DIVERGED:
        return SAME_ORDER if abs(math.log10(measured / median)) < 1 else OTHER_ORDER
    near = abs(measured - median) <= max(TOLERANCE * median, (high - low) / 2)
    return REPRODUCED if near else DEVIATES


def _published(figures: pd.DataFrame, match: Match) -> pd.DataFrame:
    """A row a cell, with the median and the range of what was published."""
    ours = {theirs: label for label, names in match.methods.items() for theirs in names}
    models = {theirs: name for name, theirs in match.models.items()}
    known = figures["model"].isin(models) & figures["method"].isin(ours) & figures["dataset"].isin(match.data)
    counted = ~figures["source"].isin(match.unverified)
    rows = figures[known & counted & (figures["metric"] == "ppl")]
    rows = rows.assign(
        model=rows["model"].map(models),
        method=rows["method"].map(ours),
        dataset=rows["dataset"].map(match.data),
        weight_bits=pd.to_numeric(rows["weight_bits"], errors="coerce"),
        act_bits=pd.to_numeric(rows["act_bits"], errors="coerce"),
        group_size=_groups(rows),
    ).dropna(subset=CELL)
    values = rows.groupby(CELL)["value"].agg(
        published="median", published_low="min", published_high="max", values="count"
    )
    papers = rows.groupby(CELL)["paper"].agg(lambda names: ", ".join(sorted(set(names))))
    found = values.join(papers.rename("papers")).reset_index()
    order = {column: {name: i for i, name in enumerate(names)} for column, names in
             (("model", match.models), ("dataset", match.data.values()), ("method", match.methods))}  # fmt: skip
    ranks = found.assign(
        **{column: found[column].map(order[column]) for column in order},
        act_bits=-found["act_bits"],
        weight_bits=-found["weight_bits"],
        group_size=found["group_size"].replace(ROW, math.inf),
    )
    by = ["model", "dataset", "act_bits", "weight_bits", "group_size", "method"]
    return found.loc[ranks.sort_values(by).index].reset_index(drop=True)


def _groups(rows: pd.DataFrame) -> pd.Series:
    """Columns that share a scale; a cell that does not say is no cell, unless nothing was rounded."""
    sizes = pd.to_numeric(rows["group_size"].replace("per-channel", "-1"), errors="coerce").replace(-1, ROW)
    return sizes.mask(rows["weight_bits"] == f"{FULL:g}", NONE)


def _measured(records: pd.DataFrame, match: Match) -> pd.DataFrame:
    """What was measured, a row a cell, under the columns of `CELL`; seeds taken together."""
    done = records[(records["status"] == DONE) & records["method"].isin(match.methods)]
    budgets = pd.DataFrame([_budget(cell) for cell in done["cell"]], done.index, ["weight_bits", "group_size"])
    length = done["cell"].map(lambda cell: cell["data"]["length"]).astype(str)
    cells = done.assign(
        weight_bits=budgets["weight_bits"].mask(done["reference"], FULL),
        group_size=budgets["group_size"].mask(done["reference"], NONE),
        act_bits=done["input_bits"].fillna(FULL),
        dataset=done["data"] + "/" + length,
    )
    return cells.groupby(CELL).agg(
        perplexity=("perplexity", "mean"),
        perplexity_low=("perplexity_low", "mean"),
        perplexity_high=("perplexity_high", "mean"),
        perplexity_sd=("perplexity", "std"),
        effective_bits=("effective_bits", "mean"),
        cells=("perplexity", "count"),
    ).reset_index()  # fmt: skip


def _budget(cell: Mapping[str, Any]) -> tuple[float, float]:
    """Width and group size of a uniform budget; NaN where widths are mixed."""
    bits = cell["budget"].get("bits")
    return (float(bits), float(cell["budget"].get("group_size", ROW))) if bits else (math.nan, math.nan)


def _judged(frame: pd.DataFrame) -> pd.DataFrame:
    bounds = ["perplexity", "published", "published_low", "published_high", "weight_bits"]
    words = [verdict(*row) for row in frame[bounds].itertuples(index=False, name=None)]
    return frame.assign(deviation=frame["perplexity"] / frame["published"] - 1, verdict=np.array(words, dtype=object))
