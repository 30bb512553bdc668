"""Rank correlations against scipy, enumeration, and populations whose answers are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from harness.claims import ranks
from harness.claims.analyses.rank import Rank, RankDifference
from harness.claims.scores import scores
from harness.claims.verdicts import INCONCLUSIVE, REFUTED, SUPPORTED, judged

ONE = np.zeros(40, dtype=np.int64)
FORMATS = {"int2-g128": 2.0, "int4-g128": 4.0}
LINEARS = [f"blocks.{i}.{kind}" for i in range(20) for kind in ("q_proj", "down_proj")]
TYPES = np.array([0, 1] * 20)


def normal(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(size=shape)


def test_without_controls_it_is_spearmans() -> None:
    columns = normal(0, 2, 40).round(1)  # with ties
    assert ranks.correlation(columns, ONE) == pytest.approx(spearmanr(*columns).statistic)


def test_many_samples_at_once() -> None:
    columns = normal(0, 3, 3, 40)
    assert ranks.correlation(columns, ONE) == pytest.approx([float(ranks.correlation(c, ONE)) for c in columns])


def test_controls_enter_by_the_formula_of_partial_correlation() -> None:
    third = normal(0, 40)
    x, y = third + normal(1, 40), third + normal(2, 40)
    xy, xz, yz = (float(spearmanr(*pair).statistic) for pair in ((x, y), (x, third), (y, third)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert ranks.correlation(np.array([x, y, third]), ONE) == pytest.approx(expected)


def test_a_constant_or_repeated_control_holds_nothing_more() -> None:
    columns = normal(0, 3, 40)
    assert ranks.correlation(np.array([*columns, np.ones(40), columns[2]]), ONE) == pytest.approx(
        float(ranks.correlation(columns, ONE))
    )


def test_what_a_control_fixes_has_no_correlation() -> None:
    x, y = normal(0, 2, 40)
    assert np.isnan(ranks.correlation(np.array([x, y, x]), ONE))
    assert np.isnan(ranks.correlation(np.array([np.ones(40), y]), ONE))


def test_strata_are_compared_within() -> None:
    strata = np.repeat([0, 1], 20)
    x = normal(0, 40) + 100 * strata
    y = normal(1, 40) + 100 * strata
    halves = [(rankdata(v[:20]) - 10.5, rankdata(v[20:]) - 10.5) for v in (x, y)]
    a, b = (np.concatenate(half) for half in halves)
    assert ranks.correlation(np.array([x, y]), strata) == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)))
    assert spearmanr(x, y).statistic > 0.7
    assert abs(ranks.correlation(np.array([x, y]), strata)) < 0.4


def test_resamples_stay_in_their_stratum_and_draw_every_linear() -> None:
    strata = np.array([0] * 10 + [1] * 30)
    rows = ranks.resampled(strata, 500)
    assert (strata[rows] == strata).all()
    assert set(rows[:, :10].flat) == set(range(10))
    assert np.bincount(rows.ravel()) == pytest.approx(500, abs=120)


def test_the_bootstrap_takes_pairs_together() -> None:
    columns = normal(0, 2, 40)
    rows = ranks.resampled(ONE, 700)
    expected = [spearmanr(columns[0, row], columns[1, row]).statistic for row in rows]
    assert ranks.bootstrap(columns, ONE, rows) == pytest.approx(np.array(expected))


def test_the_p_value_is_that_of_all_permutations() -> None:
    x, y = np.arange(6.0), np.array([1.0, 0, 2, 4, 3, 5])
    observed = abs(spearmanr(x, y).statistic)
    every = [abs(spearmanr(p, y).statistic) for p in itertools.permutations(x)]
    expected = np.mean(np.array(every) >= observed - 1e-12)
    assert ranks.permutation_p(np.array([x, y]), ONE[:6], 20_000) == pytest.approx(expected, abs=0.006)


def test_permutations_stay_within_strata() -> None:
    pairs = np.array([0, 0, 1, 1, 2, 2])
    order = np.arange(6.0)
    # Each of three pairs is either kept or swapped: of 8 ways, all kept and all swapped are as extreme.
    assert ranks.permutation_p(np.array([order, order]), pairs, 8_000) == pytest.approx(2 / 8, abs=0.02)


def test_residuals_are_regressed_again_after_they_are_permuted() -> None:
    held = np.arange(6.0) - 2.5
    x, y = np.array([0.0, 2, 1, 5, 3, 4]) - 2.5, np.array([1.0, 0, 5, 2, 4, 3]) - 2.5

    def rest(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return values - (values @ held) / (held @ held) * held

    first, second = rest(x), rest(y)
    every = [abs(rest(np.array(p)) @ second) / np.linalg.norm(rest(np.array(p))) for p in itertools.permutations(first)]
    observed = abs(first @ second) / np.linalg.norm(first)
    expected = float(np.mean(np.array(every) >= observed - 1e-9))
    assert ranks.permutation_p(np.array([x, y, held]), ONE[:6], 20_000) == pytest.approx(expected, abs=0.01)


def test_p_values_of_nothing_are_uniform_also_within_strata_and_with_controls() -> None:
    strata = np.repeat([0, 1, 2], 8)
    found = [
        ranks.permutation_p(normal(seed, 3, 24) + strata + np.linspace(0, 3, 24), strata, 200) for seed in range(200)
    ]
    assert np.mean(np.array(found) < 0.05) < 0.1
    # What is shared, the strata and the slope within them, would alone make a correlation.
    assert np.mean([spearmanr(*(normal(s, 2, 24) + strata + np.linspace(0, 3, 24))).statistic for s in range(20)]) > 0.5


def test_a_control_that_makes_the_correlation_takes_it_away() -> None:
    third = np.linspace(-3, 3, 40)
    x, y = third + normal(1, 40), third + normal(2, 40)
    assert ranks.permutation_p(np.array([x, y]), ONE) < 0.001
    assert ranks.permutation_p(np.array([x, y, third]), ONE) > 0.05


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_ceiling_is_what_the_truth_itself_reaches(noise: float) -> None:
    truth = normal(0, 3000)
    measured = truth + noise * normal(1, 3000)
    reached = spearmanr(truth, measured).statistic
    assert ranks.ceiling(measured, np.full(3000, noise), draws=20) == pytest.approx(reached, abs=0.04)


def test_nothing_but_noise_has_no_ceiling_to_speak_of() -> None:
    assert ranks.ceiling(normal(0, 3000), np.ones(3000), draws=20) < 0.2
    assert ranks.ceiling(normal(0, 50), np.zeros(50), draws=5) == pytest.approx(1)


def test_a_score_that_ranks_well_is_supported_and_a_random_one_refuted(
    made_up: Callable[..., Any], study: Callable[..., Any]
) -> None:
    truth = np.repeat(np.arange(20.0), 2)
    table = study({"truth": truth, "kfac": truth**3, "fit": -truth, "hutchinson": normal(3, 40)}, LINEARS, FORMATS, 0.1)
    evidence = made_up(study=table)
    told = {s: Rank(says="", score=s, formats=tuple(FORMATS)) for s in ("kfac", "fit", "hutchinson")}
    verdicts = {s: [c.verdict for c in judged(part.cases(evidence), part.rule)] for s, part in told.items()}
    assert verdicts == {"kfac": [SUPPORTED] * 2, "fit": [REFUTED] * 2, "hutchinson": [INCONCLUSIVE] * 2}
    case = told["kfac"].cases(evidence)[0]
    assert (case.label, case.effect, case.high) == ("int2-g128", pytest.approx(1), pytest.approx(1))
    assert case.p is not None and case.p < 0.001
    assert "40 linears" in case.test and "noise ceiling over all linears 1.00" in case.test


def test_types_alone_do_not_make_a_correlation_within_types(
    made_up: Callable[..., Any], study: Callable[..., Any]
) -> None:
    table = study({"truth": TYPES + 0.1 * normal(0, 40), "kfac": TYPES + 0.1 * normal(1, 40)}, LINEARS, FORMATS)
    evidence = made_up(study=table)
    over, within = (
        Rank(says="", score="kfac", formats=("int2-g128",), within_types=w).cases(evidence)[0] for w in (False, True)
    )
    assert over.effect > 0.7
    assert abs(within.effect) < 0.4
    assert "within 2 types" in within.test


def test_sizes_and_errors_come_back_from_the_definitions_of_hawq(
    made_up: Callable[..., Any], study: Callable[..., Any]
) -> None:
    sizes = np.array([65536.0, 196608] * 20)
    squared = {fmt: sizes * 4.0**-bits * np.linspace(1, 2, 40) for fmt, bits in FORMATS.items()}
    eigenvalue, trace = normal(0, 40), normal(1, 40)
    table = study(
        {
            "eigenvalue": eigenvalue,
            "hutchinson": trace,
            "hawq_v1": {f: np.abs(eigenvalue) * s for f, s in squared.items()},
            "hawq_v2": {f: trace / sizes * s * (1 + 1e-7) for f, s in squared.items()},
        },
        LINEARS,
        FORMATS,
    )
    found = scores(made_up(study=table), "int4-g128", ["weights", "squared_error"]).loc[LINEARS]
    assert found["weights"].tolist() == pytest.approx(sizes, rel=5e-5)
    assert found["weights"].nunique() == 2  # roundoff must not tell equal sizes apart
    assert found["squared_error"].tolist() == pytest.approx(squared["int4-g128"])


def test_a_difference_of_correlations_is_paired(made_up: Callable[..., Any], study: Callable[..., Any]) -> None:
    truth = normal(0, 40)
    near, far = truth + 0.2 * normal(1, 40), truth + 2 * normal(2, 40)
    evidence = made_up(study=study({"truth": truth, "kfac": near, "fit": far}, LINEARS, FORMATS))
    part = RankDifference(says="", first="kfac", second="fit", formats=("int2-g128",))
    [case] = judged(part.cases(evidence), part.rule)
    assert case.effect == pytest.approx(spearmanr(near, truth).statistic - spearmanr(far, truth).statistic)
    assert case.verdict == SUPPORTED
    [back] = judged(
        RankDifference(says="", first="fit", second="kfac", formats=("int2-g128",)).cases(evidence), part.rule
    )
    assert (back.low, back.high) == (pytest.approx(-case.high), pytest.approx(-case.low))
    assert back.verdict == REFUTED
    [same] = RankDifference(says="", first="fit", second="fit", formats=("int2-g128",)).cases(evidence)
    assert (same.effect, same.low, same.high) == (0, 0, 0)


def test_what_is_missing_says_so(made_up: Callable[..., Any], study: Callable[..., Any]) -> None:
    part = Rank(says="", score="kfac", formats=("int2-g128", "int3-g128"))
    assert all("not run" in case.missing for case in part.cases(made_up()))
    evidence = made_up(study=study({"truth": normal(0, 40)}, LINEARS, {"int2-g128": 2}))
    assert [c.missing.split(":")[0] for c in part.cases(evidence)] == [
        "the study has no kfac",
        "the study has no int3-g128; it has int2-g128",
    ]
    with pytest.raises(ValueError, match="unknown score 'kfca': did you mean kfac"):
        Rank(says="", score="kfca").cases(evidence)
    flat = made_up(study=study({"truth": normal(0, 40), "kfac": np.ones(40)}, LINEARS, {"int2-g128": 2}))
    assert "does not differ" in Rank(says="", score="kfac", formats=("int2-g128",)).cases(flat)[0].missing
    few = made_up(study=study({"truth": [1, 2.0], "kfac": [1, 2.0]}, LINEARS[:2], {"int2-g128": 2}))
    assert "too few" in Rank(says="", score="kfac", formats=("int2-g128",)).cases(few)[0].missing
