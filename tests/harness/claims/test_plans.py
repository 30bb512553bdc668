"""Plans among random plans, curves at matched bits, trends: against scipy, by hand, and on made-up populations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, page_trend_test, spearmanr

from harness.claims.analyses.allocation import WIDEST, GapClosed, Percentile, resampled_shares
from harness.claims.analyses.curves import Area, Chord, area_weights
from harness.claims.analyses.trend import Trend, follows, two_sided
from harness.claims.evidence import Missing
from harness.claims.verdicts import INCONCLUSIVE, NOT_RUN, REFUTED, SUPPORTED, judged

WINDOWS = 50
TEXT = np.random.default_rng(0).normal(4, 1, WINDOWS)
"""What makes one window harder than another: every cell shares it."""
RANDOM = "method=mixed method.solver=random"


def nll(level: float, seed: int = 0, noise: float = 0.002) -> list[float]:
    return list(TEXT + level + noise * np.random.default_rng(seed).normal(size=WINDOWS))


def plans(guided: float, oracle: float = 0.0) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """Twenty random plans that lose 0.1 to 0.29, in steps of 0.01."""
    levels = {"hawq_v2": guided, "hawq_v3": oracle}

    def results(overrides: Mapping[str, str]) -> dict[str, Any]:
        random = overrides["method"] == "mixed"
        seed = int(overrides["seed"]) if random else 99
        return {"nll": nll(0.1 + 0.01 * seed if random else levels[overrides["method"]], seed)}

    return results


@pytest.mark.parametrize(
    ("guided", "beaten", "verdict"), [(0.0, 20, SUPPORTED), (0.185, 11, INCONCLUSIVE), (0.4, 0, REFUTED)]
)
def test_the_percentile_counts_plans_that_lose_more(
    made_up: Callable[..., Any], guided: float, beaten: int, verdict: str
) -> None:
    part = Percentile(says="", guided="method=hawq_v2", random=RANDOM, over="budget=b3,b4")
    cases = judged(part.cases(made_up(plans(guided))), part.rule)
    assert [c.label for c in cases] == ["b3", "b4"]
    for case in cases:
        assert (case.effect, case.verdict) == (beaten / 20, verdict)
        assert case.low == pytest.approx(beta.ppf(0.025, beaten, 21 - beaten) if beaten else 0)
        assert case.high == pytest.approx(beta.ppf(0.975, beaten + 1, 20 - beaten) if beaten < 20 else 1)


def test_every_random_plan_is_asked_for(made_up: Callable[..., Any]) -> None:
    part = GapClosed(says="", guided="method=a", random=RANDOM, oracle="method=o", over="budget=b3,b4", plans=3)
    needs = [" ".join(cell) for cell in part.needs()]
    assert len(needs) == 2 * (1 + 3 + 1)
    assert f"budget=b4 {RANDOM} seed=2 data.seed=0" in needs
    assert {"budget=b3 method=o data.seed=0", "budget=b3 method=a data.seed=0"} <= set(needs)
    assert judged(part.cases(made_up()), part.rule)[0].verdict == NOT_RUN
    with pytest.raises(ValueError, match="plans=1"):
        Percentile(says="", guided="method=a", random=RANDOM, over="", plans=1)


@pytest.mark.parametrize(
    ("guided", "share", "verdict"),
    [(0.0, 1.0, SUPPORTED), (0.0975, 0.5, SUPPORTED), (0.195, 0, INCONCLUSIVE), (0.39, -1, REFUTED)],
)
def test_the_gap_from_the_median_random_plan_to_the_oracle(
    made_up: Callable[..., Any], guided: float, share: float, verdict: str
) -> None:
    part = GapClosed(says="", guided="method=hawq_v2", random=RANDOM, oracle="method=hawq_v3", over="budget=b3")
    [case] = judged(part.cases(made_up(plans(guided))), part.rule)
    assert case.effect == pytest.approx(share, abs=0.02)
    assert case.low <= case.effect <= case.high
    assert case.verdict == verdict


def test_an_oracle_that_gains_nothing_closes_no_gap(made_up: Callable[..., Any]) -> None:
    part = GapClosed(says="", guided="method=hawq_v2", random=RANDOM, oracle="method=hawq_v3", over="budget=b3")
    [case] = judged(part.cases(made_up(plans(0.0, oracle=0.5))), part.rule)
    assert (case.effect, case.low, case.high) == (-WIDEST,) * 3


def test_both_plans_and_windows_are_resampled() -> None:
    rng = np.random.default_rng(0)
    guided, oracle, random = np.full(30, 0.5), np.zeros(30), np.repeat(rng.normal(1, 0.1, (15, 1)), 30, axis=1)
    only_plans = resampled_shares(guided, oracle, random)
    medians = np.median(random[rng.integers(15, size=(4000, 15)), 0], axis=1)
    assert only_plans.std() == pytest.approx((1 - 0.5 / medians).std(), rel=0.1)
    noisy = 0.5 + rng.normal(0, 0.3, 30)
    only_windows = resampled_shares(noisy, oracle, np.ones((15, 30)))
    assert only_windows.std() == pytest.approx(noisy.std() / np.sqrt(30), rel=0.05)


def curve(levels: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> Callable[..., dict[str, Any]]:
    """Method to bits and loss at each budget."""

    def results(overrides: Mapping[str, str]) -> dict[str, Any]:
        bits, loss = levels[overrides["method"]]
        seed = int(overrides["data.seed"])
        return {"nll": nll(loss[overrides["budget"]], seed), "effective_bits": bits[overrides["budget"]]}

    return results


BITS = {"b2": 2.0, "b3": 3.0, "b4": 4.0}
SHIFTED = {"b2": 2.5, "b3": 3.25, "b4": 4.5}
BUDGETS = "budget=b2,b3,b4"


def bent(bits: Mapping[str, float]) -> dict[str, float]:
    return {name: 4 - b for name, b in bits.items()}  # a straight line, so that knots do not matter


def test_two_samplings_of_one_line_have_no_area_between_them(made_up: Callable[..., Any]) -> None:
    evidence = made_up(curve({"a": (BITS, bent(BITS)), "b": (SHIFTED, bent(SHIFTED))}))
    [case] = Area(says="", first="method=a", second="method=b", budgets=BUDGETS, seeds=2).cases(evidence)
    assert case.effect == pytest.approx(0, abs=0.001)
    assert "mean over 2.50 to 4.00 bits" in case.test


def test_a_curve_below_another_by_a_constant(made_up: Callable[..., Any]) -> None:
    below = {name: loss - 0.02 for name, loss in bent(SHIFTED).items()}
    evidence = made_up(curve({"a": (SHIFTED, below), "b": (BITS, bent(BITS))}))
    part = Area(says="", first="method=a", second="method=b", budgets=BUDGETS, seeds=2)
    [case] = judged(part.cases(evidence), part.rule)
    assert case.effect == pytest.approx(-0.02, abs=0.001)
    assert case.verdict == SUPPORTED
    back = Area(says="", first="method=b", second="method=a", budgets=BUDGETS, seeds=2)
    assert judged(back.cases(evidence), back.rule)[0].verdict == REFUTED
    assert len(list(part.needs())) == 2 * 3 * 2


def test_the_mean_between_piecewise_lines_is_their_integral() -> None:
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.uniform(2, 4, 5)), np.sort(rng.uniform(2.2, 4.4, 4))
    f, g = rng.normal(size=5), rng.normal(size=4)
    (u, v), low, high = area_weights(x[[3, 0, 4, 1, 2]], y)
    fine = np.linspace(max(x[0], y[0]), min(x[-1], y[-1]), 200_001)
    assert (low, high) == (fine[0], fine[-1])
    expected = np.mean(np.interp(fine, x, f) - np.interp(fine, y, g))
    assert u @ f[[3, 0, 4, 1, 2]] - v @ g == pytest.approx(expected, abs=1e-4)
    with pytest.raises(Missing, match="no common range"):
        area_weights(x, y + 3)


def test_a_mixture_is_held_against_the_line_between_its_ends(made_up: Callable[..., Any]) -> None:
    ends = {"narrow": ({"b3": 2.0}, {"b3": 1.0}), "wide": ({"b3": 4.0}, {"b3": 0.2}), "mix": ({"b3": 2.5}, {"b3": 0.7})}
    part = Chord(says="", first="method=mix", low="method=narrow", high="method=wide", over="budget=b3", seeds=2)
    [case] = judged(part.cases(made_up(curve(ends))), part.rule)
    assert case.effect == pytest.approx(0.7 - (0.75 * 1.0 + 0.25 * 0.2), abs=0.001)
    assert case.verdict == SUPPORTED
    beyond = made_up(curve({**ends, "mix": ({"b3": 4.5}, {"b3": 0.7})}))
    assert "4.500 bits are not between the 2.000 and 4.000" in part.cases(beyond)[0].missing
    assert len(list(part.needs())) == 6


def test_agreement_with_an_order_is_spearmans_and_pages() -> None:
    losses = np.random.default_rng(0).normal([0, 0.2, 0.4, 0.6], size=(20, 4))
    assert follows(losses) == pytest.approx([spearmanr(row, range(4)).statistic for row in losses])
    n, m = 4, 20
    page = page_trend_test(losses).statistic
    assert follows(losses).mean() == pytest.approx(12 * page / (m * n * (n**2 - 1)) - 3 * (n + 1) / (n - 1))
    assert follows(np.ones((1, 3))) == [0]
    assert two_sided(losses) == pytest.approx(2 * page_trend_test(losses).pvalue)
    assert two_sided(losses[:, ::-1]) == pytest.approx(two_sided(losses))


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [((0, 0.01, 0.02), SUPPORTED), ((0.02, 0.01, 0), REFUTED), ((0.01, 0.01, 0.01), INCONCLUSIVE)],
)
def test_trends(made_up: Callable[..., Any], levels: tuple[float, ...], verdict: str) -> None:
    by_name = dict(zip("abc", levels, strict=True))

    def results(overrides: Mapping[str, str]) -> dict[str, Any]:
        return {"nll": nll(by_name[overrides["method"]], int(overrides["data.seed"]) + ord(overrides["method"]))}

    part = Trend(says="", ordered=("method=a", "method=b", "method=c"), over="budget=b3", seeds=2)
    [case] = judged(part.cases(made_up(results)), part.rule)
    assert case.verdict == verdict
    assert len(list(part.needs())) == 6
    with pytest.raises(ValueError, match="three alternatives"):
        Trend(says="", ordered=("method=a", "method=b"))
