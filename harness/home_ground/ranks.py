"""How scores rank linears, against how much each linear really costs when it alone is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from methods.sensitivity.base import Losses

Floats: TypeAlias = NDArray[np.float64]

TRUTH, PLAIN = "truth", "squared_error"
"""The score that all are compared with, and the one without data that a Hessian has to beat."""
RESAMPLES = 2000
ALL = "all"  # seeds together


def tidy(found: Mapping[str, Losses]) -> pd.DataFrame:
    """A row a (score, linear, format): columns score, linear, format, bits, value."""
    rows = [
        {"score": score, "linear": name, "format": fmt.name, "bits": fmt.bits, "value": value}
        for score, losses in found.items()
        for name, row in losses.items()
        for fmt, value in row.items()
    ]
    return pd.DataFrame(rows)


def agreement(found: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ of every score with the truth over linears, a row a (model, grid, bits, score, seed).

    The seed `all` is the mean over seeds. Intervals are of 95 %, by the bootstrap over linears and, for `all`, over
    seeds too; `gain` is what a score's ρ exceeds that of ‖ΔW‖² by, on the same resamples.

    Args:
        found: rows of `tidy` with the columns model, seed and grid.
    """
    rows: list[dict[str, object]] = []
    for (model, grid, bits), part in found.groupby(["model", "grid", "bits"], sort=False):
        place = {"model": model, "grid": grid, "bits": bits}
        wides = {seed: own.pivot(index="linear", columns="score", values="value") for seed, own in part.groupby("seed")}
        names = list(next(iter(wides.values())).columns)
        values = np.stack([_correlations(wide.to_numpy(float)[None], names.index(TRUTH))[0] for wide in wides.values()])
        drawn = np.stack(
            [_drawn(wide.to_numpy(float), names.index(TRUTH), seed) for seed, wide in enumerate(wides.values())]
        )
        for seed, own, resampled in zip(wides, values, drawn, strict=True):
            rows += [place | {"seed": str(seed)} | row for row in _rows(names, own, resampled)]
        rows += [place | {"seed": ALL} | row for row in _rows(names, values.mean(0), _mixed(drawn))]
    return pd.DataFrame(rows)


def _rows(names: list[str], values: Floats, drawn: Floats) -> list[dict[str, object]]:
    """A row a score: of ρ [scores] and its resamples [resamples, scores]."""
    plain = names.index(PLAIN)
    ends = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    gains = np.nanquantile(drawn - drawn[:, [plain]], [0.025, 0.975], axis=0)
    return [
        {
            "score": name,
            "spearman": values[i],
            "low": ends[0, i],
            "high": ends[1, i],
            "gain": values[i] - values[plain],
            "gain_low": gains[0, i],
            "gain_high": gains[1, i],
        }
        for i, name in enumerate(names)
        if name != TRUTH
    ]


def _drawn(table: Floats, truth: int, seed: int) -> Floats:
    """ρ of resampled linears, [resamples, scores], of a table [linears, scores]."""
    rows = np.random.default_rng(seed).integers(len(table), size=(RESAMPLES, len(table)))
    return _correlations(table[rows], truth)


def _mixed(drawn: Floats) -> Floats:
    """The mean over resampled seeds, [resamples, scores], of [seeds, resamples, scores]."""
    seeds = np.random.default_rng(0).integers(len(drawn), size=(RESAMPLES, len(drawn)))
    return drawn[seeds, np.arange(RESAMPLES)[:, None]].mean(1)


def _correlations(tables: Floats, truth: int) -> Floats:
    """Spearman's ρ of each column with the column `truth`: [tables, scores], of tables [tables, linears, scores].

    NaN where a column is constant.
    """
    order = rankdata(tables, axis=1)
    order -= order.mean(1, keepdims=True)
    products = (order * order[:, :, [truth]]).sum(1)
    norms = np.sqrt((order**2).sum(1) * (order[:, :, [truth]] ** 2).sum(1))
    return np.divide(products, norms, out=np.full_like(products, np.nan), where=norms > 0)
