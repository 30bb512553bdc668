"""A cell: one model, text, method, budget and evaluation. Its key identifies its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from harness.code import code_version
from harness.data import DataConfig, texts_digest
from harness.evaluate import EvalConfig
from harness.models import ModelConfig, weights_digest
from harness.records import Record, digest
from methods.base import Budget, Method


@dataclass(frozen=True)
class Cell:
    """What is to be computed, and nothing about how or where."""

    model: ModelConfig
    data: DataConfig
    method: Method
    budget: Budget
    evaluation: EvalConfig
    seed: int = 0

    @cached_property
    def key(self) -> str:
        """Hash of everything that determines the numbers: the resolved configuration, the bytes of weights and
        texts, and the code of the method and of the measurement."""
        cell = self.as_dict()
        if not self.method.uses_budget:
            del cell["budget"]
        code = code_version(*self.method.modules, "harness.session")
        return digest({**cell, "weights": weights_digest(self.model), "texts": texts_digest(self.data), "code": code})

    @property
    def labels(self) -> dict[str, str]:
        """Model, data, method and budget as tables print them."""
        return {
            "model": self.model.name,
            "data": self.data.name,
            "method": self.method.label,
            "budget": self.budget.name if self.method.uses_budget else "–",
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; see `harness.config.cell_from_dict`."""
        return {
            "model": asdict(self.model),
            "data": asdict(self.data),
            "method": {"name": self.method.name, **asdict(self.method)},
            "budget": {"name": self.budget.name, **asdict(self.budget)},
            "evaluation": asdict(self.evaluation),
            "seed": self.seed,
        }


def make_record(cell: Cell, status: str, reason: str | None, **content: Any) -> Record:
    """A record of `cell`, stamped with the time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(cell.key, status, cell.as_dict(), cell.labels, reason, created=now, **content)
