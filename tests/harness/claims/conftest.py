"""Evidence that tests make up: records by what is asked for, a study as a table, tables in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from harness.claims.evidence import Evidence, Missing, Overrides
from harness.records import Record, Store

Results = Callable[[Mapping[str, str]], Mapping[str, Any] | None]
"""From overrides, by their names, to `nll`, `effective_bits` and `seconds`; None where nothing was run."""


class MadeUp(Evidence):
    """`record` asks `results`; all else is the real thing."""

    def __init__(self, results: Results, folder: Path, study: pd.DataFrame | None) -> None:
        super().__init__((), Store(folder), folder, SimpleNamespace(read=lambda: study))
        self.results = results

    def record(self, overrides: Overrides) -> Record:
        found = self.results(dict(part.split("=", 1) for part in overrides))
        if found is None:
            raise Missing("not run")
        return Record("", "done", {}, {}, result=dict(found), cost={"seconds": found.get("seconds", {})})


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[..., MadeUp]:
    """Builds evidence from any of results and the scores of a study, in an empty folder."""

    def build(results: Results = lambda _: None, study: pd.DataFrame | None = None) -> MadeUp:
        return MadeUp(results, tmp_path, study)

    return build


@pytest.fixture
def study() -> Callable[..., pd.DataFrame]:
    """Builds a study: metric to a value for each linear, the same in all formats, or format to such values."""

    def build(
        metrics: Mapping[str, Any], linears: list[str], formats: Mapping[str, float], error: float = 0.0
    ) -> pd.DataFrame:
        rows = []
        for metric, values in metrics.items():
            for fmt, bits in formats.items():
                here = values[fmt] if isinstance(values, Mapping) else values
                rows += [(metric, n, fmt, bits, v, error) for n, v in zip(linears, here, strict=True)]
        return pd.DataFrame(rows, columns=["metric", "linear", "format", "bits", "value", "error"])

    return build
