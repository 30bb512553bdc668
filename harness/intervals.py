"""Bootstrap intervals over windows, of a mean and of a paired difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """The mean and its 95 % percentile bootstrap interval (Efron & Tibshirani 1993, section 13.3)."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        raise ValueError(f"{len(sample)} window gives no interval; set data.test_sequences to 2 or more, or 0 for all")
    rows = np.random.default_rng(0).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[rows].mean(axis=1), [0.025, 0.975])
    return Estimate(float(sample.mean()), float(low), float(high))


def paired_difference(nll_a: Sequence[float], nll_b: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """Mean NLL of model a minus that of model b on the same windows, which are resampled together.

    The exponential of all three numbers is the ratio of the perplexities.
    """
    return interval(np.subtract(nll_a, nll_b).tolist(), resamples)
