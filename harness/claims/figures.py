"""One figure a claim: its tests with their intervals."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.report.figures import save
from harness.report.forest import forest


def write(cases: pd.DataFrame, folder: Path) -> list[Path]:
    """`ID.svg` for every claim with at least one test that was run."""
    paths: list[Path] = []
    for key, rows in cases.groupby("id", sort=False):
        if rows["effect"].notna().any():
            paths += save(forest(rows, str(key)), folder / str(key), ["svg"])
    return paths
