import random
from itertools import product

from methods.allocation.base import Problem
from methods.allocation.threshold import Threshold, below
from methods.formats.integer import Integer

FORMATS = [Integer(2), Integer(3), Integer(4), Integer(8)]


def random_problem(seed: int, slack: float = 0.02) -> Problem:
    rng = random.Random(seed)
    groups = [f"g{i}" for i in range(rng.randrange(2, 6))]
    losses = {g: {f: rng.choice([rng.gauss(0, 1), 0.25, rng.lognormvariate(0, 1)]) for f in FORMATS} for g in groups}
    costs = {g: {f: (3 + i) * f.width + rng.randrange(3) for f in FORMATS} for i, g in enumerate(groups)}
    least, most = Problem(losses, costs, 10, 1e6).range
    return Problem(losses, costs, 10, rng.uniform(least, most) / 10, slack)


def test_no_plan_that_fits_has_a_smaller_largest_loss() -> None:
    """Against enumeration."""
    for seed in range(60):
        problem = random_problem(seed)
        plans = [dict(zip(problem.costs, c, strict=True)) for c in product(FORMATS, repeat=len(problem.costs))]
        fitting = [plan for plan in plans if problem.cost(plan) <= problem.window[1]]

        def worst(plan: dict, problem: Problem = problem) -> float:
            return max(problem.losses[group][fmt] for group, fmt in plan.items())

        truth = min(map(worst, fitting))
        published = Threshold(fill=False).solve(problem, 0, problem.window[1])
        assert published is not None
        assert worst(published) == truth
        assert worst(Threshold().solve(problem, 0, problem.window[1])) == truth


def test_published_is_what_halving_the_interval_of_losses_ends_at() -> None:
    """With an option at loss 0 in each group, as in the published search."""
    for seed in range(30):
        drawn = random_problem(seed)
        losses = {g: {f: abs(x) if f.width < 8 else 0.0 for f, x in row.items()} for g, row in drawn.losses.items()}
        problem = Problem(losses, drawn.costs, drawn.divisor, drawn.limit)
        low, high = 0.0, max(loss for row in losses.values() for loss in row.values())
        found = dict.fromkeys(losses, FORMATS[0])  # what the largest loss as a bound gives
        for _ in range(100):
            middle = (low + high) / 2
            plan = {
                g: min((f for f in FORMATS if row[f] <= middle), key=lambda f: f.width) for g, row in losses.items()
            }
            if problem.cost(plan) <= problem.window[1]:
                high, found = middle, plan
            else:
                low = middle
        assert Threshold(fill=False).solve(problem, 0, problem.window[1]) == found


def test_the_plan_gets_cheaper_as_the_level_rises() -> None:
    for seed in range(20):
        problem = random_problem(seed)
        levels = sorted(loss for row in problem.losses.values() for loss in row.values())
        costs = [problem.cost(below(problem, level)) for level in [levels[0] - 1, *levels]]
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] == problem.range[0]


def test_what_is_left_goes_to_the_group_that_loses_most() -> None:
    two, four, eight = Integer(2), Integer(4), Integer(8)
    losses = {
        "a": {two: 1.0, four: 0.9, eight: 0.0},
        "b": {two: 1.0, four: 0.5, eight: 0.0},
        "c": {two: 0.8, four: 0.1, eight: 0.0},
    }
    costs = {group: {f: 10 * f.width for f in (two, four, eight)} for group in losses}
    problem = Problem(losses, costs, 30, 10 / 3, slack=0.02)
    assert Threshold(fill=False)(problem) == {"a": four, "b": four, "c": two}
    more = Problem(losses, costs, 30, 12 / 3, slack=0.02)
    assert Threshold(fill=False)(more) == {"a": four, "b": four, "c": two}, "a at 8 bits would not fit"
    assert Threshold()(more) == dict.fromkeys(losses, four), "a, which loses most, cannot be raised; c can"


def test_filling_starts_with_the_worst_group_and_goes_one_option_at_a_time() -> None:
    """The big group keeps the threshold at 5, since its next option does not fit."""
    two, four, eight = Integer(2), Integer(4), Integer(8)
    losses = {
        "big": {two: 5.0, four: 4.5, eight: 4.0},
        "a": {two: 3.0, four: 2.0, eight: 1.0},
        "b": {two: 4.0, four: 2.5, eight: 0.5},
        "c": {two: 4.5, four: 4.5, eight: 4.5},
    }
    sizes = {"big": 100, "a": 10, "b": 10, "c": 10}
    costs = {group: {f: n * f.width for f in (two, four, eight)} for group, n in sizes.items()}
    for room, expected in ((10, (two, two)), (30, (two, four)), (60, (four, four)), (80, (four, eight))):
        problem = Problem(losses, costs, 130, (260 + room) / 130, slack=8)
        assert set(Threshold(fill=False)(problem).values()) == {two}
        plan = Threshold()(problem)
        assert (plan["a"], plan["b"]) == expected
        assert plan["big"] == plan["c"] == two


def test_without_filling_the_plan_may_end_below_the_window() -> None:
    two, four = Integer(2), Integer(4)
    losses = {f"g{i}": {two: 1.0, four: 0.0} for i in range(10)}
    costs = {group: {two: 20, four: 40} for group in losses}
    problem = Problem(losses, costs, 100, 3.0)
    assert Threshold(fill=False)(problem) == dict.fromkeys(losses, two)
    assert sorted(fmt.bits for fmt in Threshold()(problem).values()) == [2] * 5 + [4] * 5
