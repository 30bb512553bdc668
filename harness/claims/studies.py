"""Sensitivity scores that claims about rankings need: every linear, metric and width, kept beside the records."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.cache import Cache
from harness.cell import Cell
from harness.code import code_version
from harness.config import RunConfig
from harness.data import texts_digest
from harness.memory import MemoryMeter
from harness.models import weights_digest
from harness.records import digest, write_atomically
from harness.sensitivity import study
from harness.session import Session
from methods.base import discover
from methods.budget import Budget
from methods.sensitivity.base import METRICS
from methods.sensitivity.measured import Measured

log = logging.getLogger(__name__)

TRUTH = {"sequences": 64, "context": 256}
"""More text than metrics take: it is the reference."""
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Study:
    """Scores of metrics on one model and text.

    Attributes:
        cell: names model and text; its method is not used.
        folder: of the kept studies.
        group_size: columns that share a scale.
    """

    cell: Cell
    folder: Path
    group_size: int = 128

    @property
    def path(self) -> Path:
        """Where the scores lie: named by the hash of all that determines them."""
        discover()
        return self.folder / f"{digest(self._identity())}.csv"

    def read(self) -> pd.DataFrame | None:
        """The scores, a row a (metric, linear, format); see `harness.sensitivity.study.Study`. None if not run."""
        return pd.read_csv(self.path) if self.path.exists() else None

    def run(self, run: RunConfig) -> None:
        """Measure every metric and the truth, and keep the scores."""
        session = Session(self.cell, Cache(run.cache), run.device, MemoryMeter())
        budget = Budget(bits=4, group_size=self.group_size)
        formats = [budget.format(width) for width in WIDTHS]
        metrics = [METRICS[name]() for name in sorted(METRICS)]
        found = study.run(session, metrics, Measured(**TRUTH), formats, self.cell.seed)
        for row in found.costs.itertuples():
            if "reason" in found.costs and isinstance(row.reason, str):
                log.warning("%s is left out of the study: %s", row.metric, row.reason)
        write_atomically(self.path, found.scores.to_csv(index=False, lineterminator="\n"))

    def _identity(self) -> dict[str, object]:
        return {
            "weights": weights_digest(self.cell.model),
            "texts": texts_digest(self.cell.data),
            "data": self.cell.as_dict()["data"],
            "seed": self.cell.seed,
            "group_size": self.group_size,
            "truth": TRUTH,
            "metrics": sorted(METRICS),
            "code": code_version("harness.sensitivity.study", *(cls.__module__ for cls in METRICS.complete().values())),
        }
