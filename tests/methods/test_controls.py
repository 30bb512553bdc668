import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from methods.allocation.base import Problem
from methods.allocation.controls import Random, Uniform
from methods.formats.integer import Integer

TWO, THREE, FOUR, EIGHT = FORMATS = [Integer(2), Integer(3), Integer(4), Integer(8)]


def equal_groups(count: int, limit: float, seed: int = 0, **options) -> Problem:
    rng = random.Random(seed)
    losses = {f"g{i}": {f: rng.gauss(0, 1) for f in FORMATS} for i in range(count)}
    costs = {group: {f: 10 * f.width + 1 for f in FORMATS} for group in losses}
    return Problem(losses, costs, 10 * count, limit, **options)


def test_uniform_is_one_width_where_the_limit_is_that_of_one_width() -> None:
    for fmt in FORMATS:
        assert set(Uniform()(equal_groups(30, fmt.width + 0.1)).values()) == {fmt}


def test_uniform_gives_the_first_groups_the_next_width() -> None:
    widths = [fmt.bits for fmt in Uniform()(equal_groups(100, 3.35)).values()]
    assert widths == [4] * 25 + [3] * 75


def test_uniform_is_blind_to_the_losses() -> None:
    assert len({tuple(Uniform()(equal_groups(50, 3.6, seed)).values()) for seed in range(5)}) == 1


def test_uniform_stays_at_one_width_if_that_is_inside_the_window() -> None:
    assert set(Uniform()(equal_groups(50, 4.5, slack=0.5)).values()) == {FOUR}


def test_uniform_skips_a_group_that_does_not_fit() -> None:
    costs = {"large": {f: 100 * f.width for f in FORMATS}, "small": {f: 10 * f.width for f in FORMATS}}
    problem = Problem(costs, costs, 110, (330 + 50) / 110)
    assert Uniform()(Problem(costs, costs, 110, (330 + 10) / 110)) == {"large": THREE, "small": FOUR}
    assert Uniform()(problem) == {"large": THREE, "small": EIGHT}, "8 bits are the only way into the window"


def feasible(problem: Problem) -> list[tuple]:
    low, high = problem.window
    plans = product(*(list(costs) for costs in problem.costs.values()))
    return [plan for plan in plans if low <= problem.cost(dict(zip(problem.costs, plan, strict=True))) <= high]


@pytest.mark.parametrize(("resolution", "factor"), [(1 << 14, 1), (8, 1), (50, 1009)])
def test_random_draws_every_plan_of_the_window_with_the_same_probability(resolution: int, factor: int) -> None:
    """Also where costs are rounded: χ² against the uniform distribution, at five standard deviations."""
    rng = random.Random(1)
    names = [f"g{i}" for i in range(3)]
    costs = {g: {f: factor * (5 + i) * f.width + rng.randrange(factor) for f in FORMATS} for i, g in enumerate(names)}
    count = 1000
    problems = [Problem(costs, costs, factor * 18, 5.0, slack=1.0, seed=seed) for seed in range(count)]
    plans = feasible(problems[0])
    drawn = Counter(tuple(Random(resolution=resolution)(problem).values()) for problem in problems)
    assert set(drawn) <= set(plans)
    expected = count / len(plans)
    chi_square = sum((drawn[plan] - expected) ** 2 / expected for plan in plans)
    degrees = len(plans) - 1
    assert degrees > 5
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_random_follows_the_seed() -> None:
    blind = [Random()(equal_groups(40, 3.5, losses)) for losses in (0, 0, 1)]
    assert blind[0] == blind[1] == blind[2], "the losses do not matter"
    problem = equal_groups(40, 3.5)
    others = {tuple(Random()(replace(problem, seed=seed)).values()) for seed in range(5)}
    assert len(others) == 5


def test_random_finds_the_only_plan() -> None:
    """That plan has one chance in 4^5 of being drawn blindly."""
    rng = random.Random(0)
    costs = {f"g{i}": {f: rng.randrange(10**6) for f in FORMATS} for i in range(5)}
    chosen = {group: rng.choice(FORMATS) for group in costs}
    cost = sum(costs[group][fmt] for group, fmt in chosen.items())
    plan = Random(resolution=64, draws=5)(Problem(costs, costs, 1, float(cost), slack=0))
    assert sum(costs[group][fmt] for group, fmt in plan.items()) == cost


def test_random_knows_when_there_is_no_plan() -> None:
    problem = equal_groups(3, 4.0)
    assert Random().solve(problem, 64, 69) is None
