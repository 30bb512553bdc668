"""The contract of a sensitivity metric: how much a model suffers when one linear is rounded.

A metric is a frozen dataclass, registered by name; its fields are its options. It sees the full-precision network,
text, calibration statistics and the candidate formats, and never a budget, so that one measurement serves a whole
sweep over budgets. There are two kinds. A *score* says how much a linear matters and knows no format; its loss in
a format is Ω, the score times the squared rounding error, with the mean over weights for a score that is a trace.
A metric with `per_format` gives the loss of each linear in each format itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from methods.base import Memo, Meter, Registry, Stat, Statistics, no_memo, no_meter
from methods.formats.base import Format
from methods.network import Network

Losses: TypeAlias = dict[str, dict[Format, float]]
"""Linear name to format to loss."""

COST = "cost"  # linears live in lists of blocks, so their full names have dots


@dataclass
class Cost:
    """What a measurement took, counted while it runs.

    Attributes:
        seconds: wall-clock time.
        passes: forward passes, backward passes and Hessian-vector products through the model, over one batch each.
        peak_bytes: largest memory in use meanwhile, the model included; 0 where nobody measured it.
    """

    seconds: float = 0.0
    passes: int = 0
    peak_bytes: int = 0

    def include(self, other: Cost) -> None:
        """Add what another measurement, which this one builds on, took."""
        self.seconds += other.seconds
        self.passes += other.passes
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


@dataclass(frozen=True)
class Sensitivity:
    """What a metric found.

    Attributes:
        values: larger means more sensitive. Keys are linear names, or `entry(linear, format)` of metrics with
            `per_format`.
        error: the same keys to the standard error of a random estimate; 0 where nothing is random.
        cost: of the measurement, whether it was computed now or recalled.
    """

    values: dict[str, float]
    error: dict[str, float]
    cost: Cost = field(default_factory=Cost)

    def tensors(self) -> dict[str, Tensor]:
        """As `Context.memo` wants it: key to (value, error), and the cost; all fp64."""
        rows: dict[str, tuple[float, ...]] = {key: (value, self.error[key]) for key, value in self.values.items()}
        rows[COST] = (self.cost.seconds, self.cost.passes, self.cost.peak_bytes)
        return {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sensitivity:
        """The inverse of `tensors`."""
        rows = {name: tensor.tolist() for name, tensor in tensors.items()}
        seconds, passes, peak = rows.pop(COST)
        values, error = ({name: row[i] for name, row in rows.items()} for i in range(2))
        return cls(values, error, Cost(seconds, int(passes), int(peak)))


def entry(linear: str, fmt: Format) -> str:
    """The key of a linear in a format."""
    return f"{linear} {fmt.name}"


def exact(values: dict[str, float], cost: Cost) -> Sensitivity:
    """A result in which nothing is random."""
    return Sensitivity(values, dict.fromkeys(values, 0.0), cost)


@dataclass(frozen=True)
class Subject:
    """All that a metric may look at. The network is left as it was found.

    Attributes:
        network: the full-precision model.
        tokens: int64 [sequences, length], the text on which losses and gradients are taken.
        calibration: int64 [sequences, length], the text that `statistics` were collected on.
        formats: the candidates.
        statistics: what the metric declared in `needs`.
        seed: of the metric's random numbers; see `generator`.
        memo: see `recall` and `measure`.
        meter: tells the peak of memory.
    """

    network: Network
    tokens: Tensor
    calibration: Tensor
    formats: tuple[Format, ...]
    statistics: Statistics
    seed: int = 0
    memo: Memo = no_memo
    meter: Meter = no_meter

    def generator(self) -> torch.Generator:
        """A new generator on the CPU. Every metric has its own, so that none depends on what else was measured."""
        return torch.Generator().manual_seed(self.seed)

    def measure(self, metric: Metric) -> Sensitivity:
        """The metric's result: computed, or recalled from an earlier cell or metric of the sweep."""
        # A score is the same whatever the candidates are: it must not be measured again for others.
        subject = self if metric.per_format else replace(self, formats=())
        options = {**asdict(metric), "formats": [fmt.name for fmt in subject.formats]}
        return Sensitivity.from_tensors(self.recall(metric.name, options, lambda: metric(subject).tensors(), metric))

    def recall(
        self, name: str, options: Mapping[str, object], compute: Callable[[], dict[str, Tensor]], owner: object
    ) -> dict[str, Tensor]:
        """Intermediate results that several metrics share (a pass of gradients), through the same memory.

        `options` and the seed identify the result, and so does the source code of the module that `owner` (an
        object, or a class) is defined in.
        """

        def compute_as_owner() -> dict[str, Tensor]:
            return compute()

        compute_as_owner.__module__ = owner.__module__
        return self.memo(name, {**options, "seed": self.seed}, compute_as_owner)

    @contextmanager
    def cost(self) -> Iterator[Cost]:
        """Counts a measurement: seconds and peak memory are filled in at the end, passes by the caller."""
        cost, began, peak = Cost(), perf_counter(), self.meter()
        try:
            yield cost
        finally:
            cost.seconds += perf_counter() - began
            cost.peak_bytes = max(cost.peak_bytes, peak())

    def delta(self, linear: str, fmt: Format) -> Tensor:
        """Q(W) − W of rounding to nearest: fp32 [out, in]."""
        return rounding_error(self.network, linear, fmt)


@dataclass(frozen=True)
class Metric(ABC):
    """A way to score linears. The first line of its docstring names the source."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    """Calibration statistics that it reads."""
    per_format: ClassVar[bool] = False
    """Whether values are losses of a linear in a format, rather than scores of a linear."""
    is_trace: ClassVar[bool] = False
    """Whether a score is a sum over the linear's weights: the mean of it then charges each squared error."""
    derivatives: ClassVar[int] = 0
    """Highest derivative of the loss that it takes: 1 needs a backward pass, 2 also fp32 and eager attention."""

    @abstractmethod
    def __call__(self, subject: Subject) -> Sensitivity:
        """Score every linear of the network. Call `Subject.measure` instead, which remembers the result."""

    def losses(self, found: Sensitivity, network: Network, formats: Sequence[Format]) -> Losses:
        """What allocation minimizes: a loss for every linear in every format."""
        if self.per_format:
            return {name: {f: found.values[entry(name, f)] for f in formats} for name in network.linears}
        sizes = {name: network.linear(name).weight.numel() if self.is_trace else 1 for name in network.linears}
        return {
            name: {f: found.values[name] / size * squared_error(network, name, f) for f in formats}
            for name, size in sizes.items()
        }


METRICS: Registry[Metric] = Registry("sensitivity metric", "methods.sensitivity")


def rounding_error(network: Network, linear: str, fmt: Format) -> Tensor:
    """Q(W) − W of rounding to nearest: fp32 [out, in]."""
    weight = network.weight(linear)
    return fmt.fit(weight).snap(weight) - weight


def squared_error(network: Network, linear: str, fmt: Format) -> float:
    """‖Q(W) − W‖² of rounding to nearest."""
    return float(rounding_error(network, linear, fmt).square().sum())
