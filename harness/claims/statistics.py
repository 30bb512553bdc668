"""Tests that several analyses share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
CHUNK = 500
"""Resamples at a time: keeps the arrays of a bootstrap over 5 seeds and 64 windows at about a megabyte."""


@dataclass(frozen=True)
class Effect:
    """An estimate, its 95 % interval, and the two-sided p-value of the hypothesis that it is zero."""

    value: float
    low: float
    high: float
    p: float


def crossed_bootstrap(differences: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Effect:
    """The mean of `differences`, [seeds, windows], where both are samples: calibration texts and test windows.

    Seeds and windows are resampled independently of each other, since every seed was evaluated on the same windows
    (the two-factor bootstrap of Owen, Annals of Applied Statistics 2007, "The pigeonhole bootstrap"). With one seed
    this is the paired bootstrap over windows.

    Raises:
        ValueError: fewer than two windows.
    """
    seeds, windows = differences.shape
    if windows < 2:
        raise ValueError(f"{windows} window gives no interval; set data.test_sequences to 2 or more, or 0 for all")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, CHUNK):
        stop = min(start + CHUNK, resamples)
        by_seed = _weights(generator, stop - start, seeds)
        by_window = _weights(generator, stop - start, windows)
        means[start:stop] = np.einsum("rs,sw,rw->r", by_seed, differences, by_window, optimize=True)
    return from_resamples(float(differences.mean()), means)


def from_resamples(value: float, resampled: Floats) -> Effect:
    """Percentile interval and p-value from the estimates of resamples.

    The p-value is twice the smaller share of resamples on either side of zero, and never below one in their number.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    tail = min((resampled <= 0).mean(), (resampled >= 0).mean())
    return Effect(value, float(low), float(high), float(min(1.0, max(2 * tail, 1 / len(resampled)))))


def _weights(generator: np.random.Generator, rows: int, items: int) -> Floats:
    """How often each item was drawn, as shares of the whole: [rows, items]."""
    return generator.multinomial(items, np.full(items, 1 / items), size=rows) / items
