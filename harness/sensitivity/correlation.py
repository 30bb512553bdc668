"""Rank correlations with bootstrap intervals, vectorized over resamples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata, spearmanr

from harness.intervals import Estimate

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEAST = 4  # pairs: fewer have no order worth a number


def spearman(x: Floats, y: Floats, resamples: int = RESAMPLES) -> Estimate:
    """Spearman's ρ of paired samples, each [n], with its 95 % percentile bootstrap interval over pairs."""
    _check(x, y)
    rows = _resamples(len(x), resamples)
    a, b = rankdata(x[rows], axis=1), rankdata(y[rows], axis=1)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return _estimate(float(spearmanr(x, y).statistic), _ratio((a * b).sum(1), norms))


def kendall(x: Floats, y: Floats, resamples: int = RESAMPLES) -> Estimate:
    """Kendall's τ-b of paired samples, each [n], with its 95 % percentile bootstrap interval over pairs.

    A resample is a weight for each pair; pairs of pairs then count with the product of their weights, which spares
    counting them anew for every resample.
    """
    _check(x, y)
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (x, y))
    rows = _resamples(len(x), resamples)
    weights = np.stack([np.bincount(row, minlength=len(x)) for row in rows]).astype(np.float64)
    agreement, a_pairs, b_pairs = (
        np.einsum("ri,ij,rj->r", weights, m, weights, optimize=True) for m in (a * b, a**2, b**2)
    )
    return _estimate(float(kendalltau(x, y).statistic), _ratio(agreement, np.sqrt(a_pairs * b_pairs)))


def _check(x: Floats, y: Floats) -> None:
    if x.shape != y.shape or x.ndim != 1 or len(x) < LEAST:
        raise ValueError(f"a rank correlation needs two lists of at least {LEAST} numbers, not {x.shape} and {y.shape}")


def _resamples(count: int, resamples: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(count, size=(resamples, count))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where one side is constant."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _estimate(value: float, drawn: Floats) -> Estimate:
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))
