"""What the ledger reads: records of cells, studies of sensitivity metrics, tables of benchmarks, published figures."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

from harness.cell import Cell
from harness.claims.statistics import Floats
from harness.claims.studies import Study
from harness.config import to_cell
from harness.records import DONE, Record, Store

Overrides = tuple[str, ...]


class Missing(Exception):
    """What a case needs is not there; the message says what, and where it matters how to get it."""


def grid(expression: str) -> list[Overrides]:
    """Every combination of a grid in Hydra's language: `method=rtn,gptq budget=w3g128` gives two."""
    parsed = OverridesParser.create().parse_overrides(shlex.split(expression))
    axes = [list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.get_value_string()] for o in parsed]
    names = [o.get_key_element() for o in parsed]
    return [tuple(f"{n}={v}" for n, v in zip(names, row, strict=True)) for row in itertools.product(*axes)]


def seeded(overrides: Overrides, seeds: int) -> list[Overrides]:
    """The same cell on different calibration texts."""
    return [(*overrides, f"data.seed={seed}") for seed in range(seeds)]


class Evidence:
    """Reads; never computes.

    Args:
        base: overrides that all cells share: model, data, evaluation.
        store: of records.
        folder: holds `tables/` and `reported.csv`.
        study: scores of sensitivity metrics on the base model.

    Hydra must be initialized on `conf/` while cells are asked for.
    """

    def __init__(self, base: Sequence[str], store: Store, folder: Path, study: Study) -> None:
        self.base, self.store, self.folder, self.study = tuple(base), store, folder, study
        self._cells: dict[Overrides, Cell] = {}
        self._records: dict[str, Record | None] = {}

    def cell(self, overrides: Overrides) -> Cell:
        """The cell of these overrides on top of the base."""
        if overrides not in self._cells:
            self._cells[overrides] = self._composed(overrides)
        return self._cells[overrides]

    def _composed(self, overrides: Overrides) -> Cell:
        """Hydra takes a quarter of a second for a cell, so that seeds, of which there are many, are set without it."""
        told = dict(override.split("=", 1) for override in overrides)
        seeds = {name: int(told[name]) for name in ("data.seed", "seed") if name in told}
        plain = tuple(override for override in overrides if override.split("=", 1)[0] not in seeds)
        if not seeds:
            return to_cell(compose("config", overrides=[*self.base, *plain]))
        cell = self.cell(plain)
        data = replace(cell.data, seed=seeds.get("data.seed", cell.data.seed))
        return replace(cell, data=data, seed=seeds.get("seed", cell.seed))

    def record(self, overrides: Overrides) -> Record:
        """The record of a cell that is done.

        Raises:
            Missing: it was not run, was skipped, or failed.
        """
        key = self.cell(overrides).key
        if self._records.get(key) is None:
            self._records[key] = self.store.read(key)
        record = self._records[key]
        if record is None:
            raise Missing("not run")
        if record.status != DONE:
            raise Missing(f"{record.status}: {record.reason}")
        return record

    def nll(self, overrides: Overrides, seeds: int = 1) -> Floats:
        """Mean negative log-likelihood of every test window, in nats: [seeds, windows]. See `record` for Missing."""
        return np.array([self.record(one).result["nll"] for one in seeded(overrides, seeds)])

    def bits(self, overrides: Overrides, seeds: int = 1) -> Floats:
        """Effective bits: [seeds]."""
        return np.array([self.record(one).result["effective_bits"] for one in seeded(overrides, seeds)])

    def table(self, name: str, remedy: str) -> pd.DataFrame:
        """A committed table, `tables/NAME.csv`.

        Raises:
            Missing: there is none; `remedy` is the command that makes it.
        """
        path = self.folder / "tables" / f"{name}.csv"
        if not path.exists():
            raise Missing(f"not run: {remedy}")
        return pd.read_csv(path, comment="#")

    @cached_property
    def reported(self) -> pd.DataFrame:
        """Published figures, as text; see `results/reported.csv`."""
        return self._facts("reported")

    @cached_property
    def bibliography(self) -> pd.DataFrame:
        """Papers: identifiers, venues, years, titles and where they were looked up, as text."""
        return self._facts("bibliography")

    def _facts(self, name: str) -> pd.DataFrame:
        path = self.folder / f"{name}.csv"
        if not path.exists():
            raise Missing(f"{path} is missing; restore it from the repository")
        return pd.read_csv(path, dtype=str, keep_default_na=False)
