"""Times of several operations on one machine, measured in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

Operation = Callable[[int], object]
"""Takes the number of the call, by which it chooses one of several copies of its weights."""

CALLS = 6
"""Least of a round, of which the median counts."""
SECONDS = 0.01
"""Least time of a round."""


@dataclass(frozen=True)
class Times:
    """Seconds of one operation, a number a round: fp64 [rounds]."""

    rounds: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.rounds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the rounds, in seconds."""
        low, high = np.quantile(self.rounds, (0.25, 0.75))
        return float(low), float(high)

    @property
    def spread(self) -> float:
        """The distance of the quartiles over the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    def speedup(self, peer: Times, seed: int = 0) -> tuple[float, float, float]:
        """The peer's time over ours: median over rounds, each a pair, and its 95 % interval by resampling rounds."""
        ratios = peer.rounds / self.rounds
        drawn = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
        low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
        return float(np.median(ratios)), float(low), float(high)


def in_turns(operations: Mapping[str, Operation], rounds: int) -> dict[str, Times]:
    """Each operation in each round, in an order that moves on by one a round; a first round does not count."""
    names = list(operations)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in _rotated(names, turn):
            seconds = _round(operations[name], turn)
            if turn:
                found[name].append(seconds)
    return {name: Times(np.array(seconds)) for name, seconds in found.items()}


def _rotated(names: Sequence[str], by: int) -> list[str]:
    start = by % len(names)
    return [*names[start:], *names[:start]]


def _round(operation: Operation, turn: int) -> float:
    """The median of calls that take `SECONDS` together; the first after another operation does not count."""
    operation(turn)
    samples: list[float] = []
    while len(samples) < CALLS or sum(samples) < SECONDS:
        began = perf_counter()
        operation(turn + 1 + len(samples))
        samples.append(perf_counter() - began)
    return median(samples)
