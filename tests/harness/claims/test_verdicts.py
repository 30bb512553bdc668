"""The rules that turn intervals into verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from harness.claims import verdicts
from harness.claims.statistics import crossed_bootstrap
from harness.claims.verdicts import (
    INCONCLUSIVE,
    NOT_RUN,
    NOT_TESTABLE,
    PARTLY,
    REFUTED,
    SUPPORTED,
    Case,
    Rule,
    holm,
)

LOWER = Rule((-math.inf, 0.0), (-0.005, math.inf), 0.005)


def case(low: float, high: float, p: float | None = 0.001) -> Case:
    return Case("", (low + high) / 2, low, high, p=p)


@pytest.mark.parametrize(
    ("low", "high", "p", "told"),
    [
        (-0.02, -0.01, 0.001, SUPPORTED),
        (-0.02, -0.01, 0.2, INCONCLUSIVE),  # not after Holm's correction
        (-0.02, 0.01, 0.5, INCONCLUSIVE),
        (-0.004, -0.001, 0.001, REFUTED),  # certain, and of no practical meaning
        (-0.004, 0.02, 0.3, REFUTED),
        (0.01, 0.02, 0.001, REFUTED),
    ],
)
def test_a_case_is_judged_by_its_interval_floor_and_p_value(low: float, high: float, p: float, told: str) -> None:
    assert LOWER.judge(case(low, high, p)) == told


def test_equivalence_is_refuted_on_either_side_and_only_outside() -> None:
    same = Rule((-0.01, 0.01))
    intervals = [(-0.009, 0.009), (-0.02, 0.005), (-0.03, -0.02), (0.02, 0.03)]
    told = [same.judge(case(*ends, None)) for ends in intervals]
    assert told == [SUPPORTED, INCONCLUSIVE, REFUTED, REFUTED]


def test_a_case_without_numbers_is_not_run() -> None:
    assert LOWER.judge(Case("", missing="not run")) == NOT_RUN


def test_holm_agrees_with_its_definition() -> None:
    # Sorted 0.01, 0.02, 0.03 times 3, 2, 1, and never falling.
    assert holm([0.03, None, 0.01, 0.02]) == pytest.approx([0.04, None, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_correction_runs_over_all_parts_of_a_claim() -> None:
    first, second = verdicts.corrected([[case(-1, -0.5, 0.03)], [case(-1, -0.5, 0.03)]])
    assert first[0].p == second[0].p == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("cases", "told"),
    [
        ([SUPPORTED, SUPPORTED, INCONCLUSIVE], SUPPORTED),
        ([SUPPORTED, SUPPORTED, REFUTED], INCONCLUSIVE),
        ([SUPPORTED, INCONCLUSIVE], INCONCLUSIVE),
        ([REFUTED, REFUTED, INCONCLUSIVE], REFUTED),
        ([SUPPORTED, NOT_RUN], NOT_RUN),
        ([], NOT_RUN),
    ],
)
def test_two_thirds_of_the_cases_decide_a_part_unless_one_opposes(cases: list[str], told: str) -> None:
    assert verdicts.of_part([Case("", 0.0, -1.0, 1.0, verdict=verdict) for verdict in cases], 2 / 3) == told


def test_facts_that_disagree_make_a_part_partly_right() -> None:
    facts = [Case("", 1.0, 1.0, 1.0, verdict=SUPPORTED), Case("", 0.0, 0.0, 0.0, verdict=REFUTED)]
    assert verdicts.of_part(facts, 1.0) == PARTLY
    assert verdicts.of_claim([PARTLY]) == verdicts.of_claim([PARTLY, REFUTED]) == PARTLY


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([SUPPORTED, SUPPORTED], SUPPORTED),
        ([SUPPORTED, REFUTED], PARTLY),
        ([REFUTED, INCONCLUSIVE], INCONCLUSIVE),
        ([SUPPORTED, NOT_RUN], NOT_RUN),
        ([SUPPORTED, NOT_TESTABLE], SUPPORTED),
        ([], NOT_TESTABLE),
    ],
)
def test_parts_decide_a_claim(parts: list[str], told: str) -> None:
    assert verdicts.of_claim(parts) == told


def test_bootstrap_with_one_seed_is_that_of_the_mean_over_windows() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    found = crossed_bootstrap(values[None])
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx(
        [values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.01
    )
    assert found.p == pytest.approx(2 * norm.sf(values.mean() / error), rel=0.5, abs=2e-4)


def test_bootstrap_over_seeds_carries_the_spread_between_them() -> None:
    """Windows that agree leave only the seeds to vary: each mean is one of 3 ** 3 draws of three values."""
    offsets = np.array([0.0, 3.0, 6.0])
    found = crossed_bootstrap(np.repeat(offsets[:, None], 50, axis=1))
    draws = [np.mean([a, b, c]) for a in offsets for b in offsets for c in offsets]
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1.01)
    assert found.high - found.low > 3


def test_bootstrap_needs_two_windows() -> None:
    with pytest.raises(ValueError, match="1 window gives no interval"):
        crossed_bootstrap(np.ones((3, 1)))
