"""The contract of a sensitivity metric: how much the loss depends on each linear's weight.

A metric is a frozen dataclass, registered by name; its fields are its options. It sees the full-precision
network and some text, and never a budget or a format, so that one measurement serves a whole sweep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Context, Registry
from methods.network import Network


@dataclass(frozen=True)
class Sensitivity:
    """A score for every linear, and what it cost.

    Attributes:
        values: linear name to score; larger means more sensitive.
        error: linear name to the standard error of a random estimate; 0 where nothing is random.
        seconds: wall-clock time.
        passes: forward passes, backward passes and Hessian-vector products, over one batch each.
    """

    values: dict[str, float]
    error: dict[str, float]
    seconds: float
    passes: int

    _COST: ClassVar[str] = "cost"  # linears live in lists of blocks, so their full names have dots

    def tensors(self) -> dict[str, Tensor]:
        """As `Context.memo` wants it: linear name to (value, error), and the cost, each fp64 [2]."""
        rows = {name: (value, self.error[name]) for name, value in self.values.items()}
        rows[self._COST] = (self.seconds, self.passes)
        return {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sensitivity:
        """The inverse of `tensors`."""
        rows = {name: tensor.tolist() for name, tensor in tensors.items()}
        seconds, passes = rows.pop(cls._COST)
        values, error = ({name: row[i] for name, row in rows.items()} for i in range(2))
        return cls(values, error, seconds, int(passes))


@dataclass(frozen=True)
class Metric(ABC):
    """A way to score linears."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, network: Network, tokens: Tensor, generator: torch.Generator) -> Sensitivity:
        """Score every linear of the full-precision network on `tokens`, int64 [sequences, length].

        `generator`, on the CPU, is the only source of randomness. The network is left as it was.
        """


METRICS: Registry[Metric] = Registry("sensitivity metric")


def measure(metric: Metric, ctx: Context) -> Sensitivity:
    """Score the linears on `ctx.scoring`, or recall what an earlier cell of the sweep measured.

    The metric gets a generator of its own, seeded from the context's: what is drawn from that one does not
    depend on whether the result was recalled.
    """
    seed = int(torch.randint(2**62, (), generator=ctx.generator))

    def compute() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return metric(ctx.network, ctx.scoring, generator).tensors()

    compute.__module__ = type(metric).__module__  # whose code determines the result
    return Sensitivity.from_tensors(ctx.memo(metric.name, {**asdict(metric), "seed": seed}, compute))
