"""Fallback, as Intel Neural Compressor's strategy `hawq_v2` has it: its order, and what greed costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from harness.claims.checks.base import ALL_EQUAL, check, fact
from harness.claims.evidence import Evidence
from harness.claims.scores import formats, scores
from harness.claims.statistics import RESAMPLES
from harness.claims.verdicts import Case, Rule
from methods.allocation.base import Problem
from methods.allocation.fallback import Fallback
from methods.allocation.ilp import ILP
from methods.formats.integer import Integer

NARROW, WIDE = Integer(4, 128), Integer(8, 128)
SHARES = np.arange(0.1, 0.91, 0.05)
"""Of all weights that may fall back to the wide format: from one in ten to nine in ten."""


@check("greedy_regret", Rule((0.0, 0.02)), uses_study=True)
def greedy_regret(evidence: Evidence) -> list[Case]:
    """C55: how much more Ω is left by falling back in the order of Ω, from 4 to 8 bits, than by the exact optimum at
    the same budget, relative to the optimum; the median over budgets, with its bootstrap interval."""
    names = ["hawq_v2", "weights"]
    narrow, wide = (scores(evidence, fmt.name, names) for fmt in (NARROW, WIDE))
    values = np.array([_regret(narrow, wide, share) for share in SHARES])
    rows = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[rows], axis=1), [0.025, 0.975])
    test = (
        f"bootstrap over {len(values)} budgets, {NARROW.name} and {WIDE.name}; the largest regret is {values.max():.2g}"
    )
    return [Case("median regret", float(np.median(values)), float(low), float(high), "share of Ω", test=test)]


def _regret(narrow: pd.DataFrame, wide: pd.DataFrame, share: float) -> float:
    """Of the greedy plan, in which `share` of all weights may go wide; scales, the same in both formats, cancel."""
    sizes = {str(name): int(count) for name, count in narrow["weights"].items()}
    problem = Problem(
        {n: {NARROW: narrow["hawq_v2"][n], WIDE: wide["hawq_v2"][n]} for n in sizes},
        {n: {fmt: int(fmt.bits) * size for fmt in (NARROW, WIDE)} for n, size in sizes.items()},
        sum(sizes.values()),
        limit := NARROW.bits + share * (WIDE.bits - NARROW.bits),
        slack=limit,
    )
    greedy, best = (problem.loss(solver(problem)) for solver in (Fallback(), ILP()))
    return (greedy - best) / abs(best)


@check("fallback_order", ALL_EQUAL, uses_study=True)
def fallback_order(evidence: Evidence) -> list[Case]:
    """C54: Kendall's τ between the order in which the shipped strategy falls back, for a metric of which less is
    better, and descending Ω. It sorts by the trace alone, and the other way round."""
    return [_order(evidence, fmt) for fmt in formats(evidence)]


def _order(evidence: Evidence, fmt: str) -> Case:
    table = scores(evidence, fmt, ["inc_trace", "hawq_v2"])
    meant = float(kendalltau(table["inc_trace"], table["hawq_v2"]).statistic)
    test = f"{len(table)} linears, ascending traces as shipped; {meant:.2f} in descending order, as was meant"
    return fact(fmt, -meant, "Kendall τ", test)
