"""Rank correlation with controls and strata: the estimate, its bootstrap, its permutation test, its noise ceiling.

Linears are the samples. A sample of k columns is an array [k, n]; the first two are correlated, the others held
fixed. Ranks are taken within strata, centered there, and divided by the size of the stratum plus one, so that a
correlation within strata compares linears of one type only (the aligned-rank form of a blocked correlation).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from harness.claims.statistics import CHUNK, RESAMPLES, Floats

Rows = NDArray[np.int64]

LEAST = 5
"""Linears, below which ranks say nothing: with four, no permutation test reaches 5 %."""
NOTHING = 1e-9
"""Length of residual ranks that roundoff alone leaves."""


def correlation(columns: Floats, strata: Rows) -> Floats:
    """Partial Spearman correlation of the first two of `columns` [..., k, n], given the others: [...].

    Strata are numbers [n] in ascending order. NaN where one of the two is constant, or fixed by the others.
    """
    ranks = _ranks(columns, strata)
    rest = _without(ranks[..., :2, :], ranks[..., 2:, :])
    norms = np.linalg.norm(rest, axis=-1)
    product = norms[..., 0] * norms[..., 1]
    defined = norms.min(-1) > NOTHING
    ratio = np.divide(
        (rest[..., 0, :] * rest[..., 1, :]).sum(-1), product, out=np.full_like(product, np.nan), where=defined
    )
    return np.clip(ratio, -1.0, 1.0)  # roundoff must not leave the region of a rule


def resampled(strata: Rows, resamples: int = RESAMPLES, seed: int = 0) -> Rows:
    """Linears drawn with replacement within each stratum: indices [resamples, n]."""
    generator = np.random.default_rng(seed)
    parts = []
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        parts.append(members[generator.integers(len(members), size=(resamples, len(members)))])
    return np.concatenate(parts, axis=1)


def bootstrap(columns: Floats, strata: Rows, rows: Rows) -> Floats:
    """The correlations of resampled linears: [resamples], NaN where `correlation` is."""
    drawn = [
        correlation(np.moveaxis(columns[:, rows[start : start + CHUNK]], 0, 1), strata)
        for start in range(0, len(rows), CHUNK)
    ]
    return np.concatenate(drawn)


def permutation_p(columns: Floats, strata: Rows, permutations: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of no correlation: the first column's ranks are permuted within strata.

    With controls, what permutes are the residuals of the ranks given the controls, regressed on these again (Freedman
    and Lane, Journal of Business & Economic Statistics 1983).
    """
    ranks = _ranks(columns, strata)
    first, second = _without(ranks[:2], ranks[2:])
    draws = np.random.default_rng(seed).random((permutations, len(strata)))
    # Adding the number of the stratum keeps each one's places together.
    shuffled = _without(first[np.argsort(strata + draws, axis=1)], ranks[2:])
    drawn = np.abs(shuffled @ second) / np.linalg.norm(shuffled, axis=1)
    observed = abs(first @ second) / np.linalg.norm(first)
    return float(((drawn >= observed * (1 - 1e-12)).sum() + 1) / (permutations + 1))


def ceiling(values: Floats, errors: Floats, draws: int = 1000, seed: int = 0) -> float:
    """The largest rank correlation that a perfect score could have with values [n] of these standard errors [n].

    Values measured twice are imitated by adding noise to the measured ones. Of a rank correlation a between them,
    with variance T of what is true and E of the noise in ranks, a² = (T + E)/(T + 2E), hence the reliability
    T/(T + E) = 2 − 1/a², whose root bounds the correlation (Spearman, American Journal of Psychology 1904). 0 where
    nothing but noise was measured.
    """
    noise = np.random.default_rng(seed).standard_normal((draws, len(values))) * errors
    pairs = np.stack([np.broadcast_to(values, noise.shape), values + noise], axis=1)
    again = float(correlation(pairs, np.zeros(len(values), dtype=np.int64)).mean())
    return float(np.sqrt(max(0.0, 2 - 1 / again**2))) if again > 0 else 0.0


def _ranks(columns: Floats, strata: Rows) -> Floats:
    """Centered ranks within strata, over the size of the stratum plus one: the shape of `columns`."""
    parts = []
    for stratum in np.unique(strata):
        part = columns[..., strata == stratum]
        ranks = rankdata(part, axis=-1)
        size = part.shape[-1]
        parts.append((ranks - (size + 1) / 2) / (size + 1))
    return np.concatenate(parts, axis=-1)


def _without(values: Floats, held: Floats) -> Floats:
    """What a regression of `values` [..., m, n] on `held` [..., k, n] leaves; these may be constant or collinear."""
    across = np.swapaxes(held, -1, -2)
    return values - (values @ across) @ np.linalg.pinv(held @ across, hermitian=True) @ held
