"""How rows differ: from the reference of their section, and from the best of their block, by paired intervals.

All rows of a comparison are resampled together: one matrix of how often each window is drawn serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from harness.intervals import RESAMPLES
from harness.records import DONE

BEST, TIED = "best", "tied"
EXCESS = 1.025
"""Stored bits over those of the budget, up to which cells compete: a group index, or a width for each group."""
DIFFERENCE = ("delta_nll", "delta_nll_low", "delta_nll_high", "delta", "delta_low", "delta_high")
CHUNK = 512
"""Rows resampled at once, which bounds memory."""


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Every row against its section's reference: `DIFFERENCE`, blank where rows cannot be compared."""
    found = pd.DataFrame(np.nan, frame.index, list(DIFFERENCE))
    done = frame[frame["status"] == DONE]
    for _, rows in done.groupby("section", sort=False):
        for reference in rows.index[rows["reference"]]:
            others = rows[~rows["reference"]]
            others = others[_comparable(others, rows.loc[reference])]
            nll = _paired(others, rows.loc[reference])
            found.loc[others.index] = np.hstack([nll, rows.loc[reference, "perplexity"] * np.expm1(nll)])
    return found


def standings(frame: pd.DataFrame, block: Sequence[str] = ("budget",)) -> pd.Series:
    """`best` for the lowest perplexity of a section's block, `tied` where the paired interval of the difference from
    the best contains zero, else nothing. One row alone is neither.

    Rows that stored more than their budget do not compete: their perplexity is that of other bits.
    """
    standing = pd.Series("", frame.index, name="standing")
    within = ~(frame["effective_bits"] > EXCESS * frame["limit_bits"])  # without a limit, all are
    contenders = frame[~frame["reference"] & (frame["status"] == DONE) & within]
    for _, rows in contenders.groupby(["section", *block], dropna=False, sort=False):
        best = rows["perplexity"].sort_values(kind="stable").index[0]
        rivals = rows[_comparable(rows, rows.loc[best]) & (rows.index != best)]
        if len(rivals):
            standing[best] = BEST
            low = _paired(rivals, rows.loc[best])[:, 1]
            standing[rivals.index[low <= 0]] = TIED
    return standing


def paired(differences: np.ndarray) -> np.ndarray:
    """The mean of each row of differences [rows, windows] and its 95 % percentile bootstrap interval: [rows, 3].

    Row for row what `harness.intervals.interval` gives, from the same resamples.
    """
    draws = _draws(differences.shape[1])
    parts = [differences[start : start + CHUNK] for start in range(0, len(differences), CHUNK)]
    ends = [np.quantile(part @ draws, [0.025, 0.975], axis=1) for part in parts]  # each [2, rows]
    return np.vstack([differences.mean(axis=1), np.hstack(ends)]).T


@lru_cache(maxsize=4)
def _draws(windows: int) -> np.ndarray:
    """The share of each window in each resample: [windows, RESAMPLES]."""
    rows = np.random.default_rng(0).integers(windows, size=(RESAMPLES, windows))
    cells = np.arange(RESAMPLES)[:, None] * windows + rows
    counts = np.bincount(cells.ravel(), minlength=RESAMPLES * windows).reshape(RESAMPLES, windows)
    return np.ascontiguousarray(counts.T / windows)


def _paired(rows: pd.DataFrame, other: pd.Series) -> np.ndarray:
    """Mean NLL of each row minus that of `other`, and the ends of the paired interval: [rows, 3]."""
    if rows.empty:
        return np.empty((0, 3))
    return paired(np.stack(rows["nll"].to_list()) - other["nll"])


def _comparable(rows: pd.DataFrame, other: pd.Series) -> pd.Series:
    """Whether rows were measured on the same windows as `other`, of which an interval needs two."""
    windows = rows["nll"].map(len)
    same = (rows["tokens"] == other["tokens"]) & (rows["length"] == other["length"])
    return same & (windows == len(other["nll"])) & (windows > 1)
