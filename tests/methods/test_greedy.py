import random
from itertools import product

import pytest

from methods.allocation.base import Problem
from methods.allocation.completion import cheapest
from methods.allocation.greedy import Greedy, hull_steps
from methods.allocation.ilp import ILP, relaxation
from methods.formats.integer import Integer

FORMATS = [Integer(2), Integer(3), Integer(4), Integer(8)]


def random_problem(seed: int, groups: int = 5, negative: bool = True) -> Problem:
    """Integer costs and, with `negative`, losses that neither fall nor stay positive. No lower bound on the cost."""
    rng = random.Random(seed)
    names = [f"g{i}" for i in range(groups)]
    draw = (lambda f: rng.gauss(0, 1)) if negative else (lambda f: rng.lognormvariate(0, 2) * 4.0**-f.width)
    losses = {g: {f: draw(f) for f in FORMATS} for g in names}
    costs = {g: {f: (10 + 7 * i) * f.width + rng.randrange(5) for f in FORMATS} for i, g in enumerate(names)}
    least, most = Problem(losses, costs, 100, 1e6).range
    return Problem(losses, costs, 100, rng.uniform(least, most) / 100, slack=1e6)


def lagrangian_plans(problem: Problem, multiplier: float) -> list[dict]:
    """All plans in which each group takes argmin loss + λ·cost."""
    choices = []
    for group, losses in problem.losses.items():
        value = {f: loss + multiplier * problem.costs[group][f] for f, loss in losses.items()}
        choices.append([f for f in value if value[f] <= min(value.values()) + 1e-9])
    return [dict(zip(problem.losses, choice, strict=True)) for choice in product(*choices)]


@pytest.mark.parametrize("negative", [True, False])
def test_every_plan_on_the_path_is_what_a_multiplier_gives(negative: bool) -> None:
    for seed in range(10):
        problem = random_problem(seed, negative=negative)
        plan = cheapest(problem)
        slopes = [step.slope for step in hull_steps(problem)]
        assert slopes == sorted(slopes)
        for step in hull_steps(problem):
            assert plan in lagrangian_plans(problem, -step.slope)
            before, plan = plan, {**plan, step.group: step.option}
            assert plan in lagrangian_plans(problem, -step.slope)
            assert problem.cost(plan) - problem.cost(before) == step.cost > 0
            assert problem.loss(plan) - problem.loss(before) == pytest.approx(step.slope * step.cost)
        most = {group: max(costs, key=lambda f: costs[f]) for group, costs in problem.costs.items()}
        assert plan == most


def test_on_the_hull_the_result_is_optimal() -> None:
    for seed in range(6):
        problem = random_problem(seed)
        plan = cheapest(problem)
        for step in hull_steps(problem):
            if step.slope >= 0:
                break
            plan = {**plan, step.group: step.option}
            tight = Problem(problem.losses, problem.costs, 100, problem.cost(plan) / 100, slack=1e6)
            assert problem.loss(Greedy()(tight)) == pytest.approx(problem.loss(ILP()(tight)), abs=1e-9)


def test_the_gap_is_at_most_what_the_step_that_did_not_fit_would_gain() -> None:
    gaps = []
    for seed in range(15):
        problem = random_problem(seed, negative=False)
        high = problem.window[1]
        cost, gain = problem.range[0], 0.0
        for step in hull_steps(problem):
            cost += step.cost
            if cost > high:
                gain = -step.slope * step.cost
                break
        gap = problem.loss(Greedy()(problem)) - problem.loss(ILP()(problem))
        assert -1e-12 <= gap <= max(gain, 0) + 1e-12
        gaps.append(gap)
    assert max(gaps) > 0


def test_the_walk_along_the_hulls_solves_the_relaxation() -> None:
    """The linear relaxation splits one step (Sinha and Zoltners, 1979)."""
    for seed in range(10):
        problem = random_problem(seed)
        high = problem.range[0] + 97 * (1 + seed)
        cost, loss = problem.range[0], problem.loss(cheapest(problem))
        for step in hull_steps(problem):
            if step.slope < 0:
                taken = min(step.cost, high - cost)
                cost, loss = cost + taken, loss + step.slope * taken
        assert relaxation(problem, 0, high) == pytest.approx(loss, abs=1e-6)


def test_room_left_by_the_multiplier_is_filled_with_what_gains_most_per_cost() -> None:
    """The big group's step is the steepest that is left and does not fit; of the small ones', one does."""
    two, four = Integer(2), Integer(4)
    gains = {"big": 100.0, "small": 1.0, "better": 3.0, "first": 9.0}
    size = {"big": 100, "small": 10, "better": 10, "first": 1}
    losses = {group: {two: gain, four: 0.0} for group, gain in gains.items()}
    costs = {group: {two: 2 * n, four: 4 * n} for group, n in size.items()}
    plan = Greedy()(Problem(losses, costs, 121, (242 + 30) / 121, slack=100))
    assert plan == {"big": two, "small": two, "better": four, "first": four}


def test_of_equally_dear_options_the_one_that_loses_less_is_taken() -> None:
    losses = {group: dict(zip(FORMATS, (3.0, 2.0, 1.0, 0.5), strict=True)) for group in "ab"}
    costs = {group: {f: 5 if f.width < 8 else 10 for f in FORMATS} for group in "ab"}
    assert Greedy()(Problem(losses, costs, 1, 10)) == {"a": Integer(4), "b": Integer(4)}
    assert Greedy()(Problem(losses, costs, 1, 15)) == {"a": Integer(8), "b": Integer(4)}


def test_where_raising_only_harms_the_least_harm_is_done() -> None:
    losses = {f"g{i}": {f: (i + 1) * f.bits for f in FORMATS[:3]} for i in range(4)}
    costs = {f"g{i}": {f: 10 * f.width for f in FORMATS[:3]} for i in range(4)}
    plan = Greedy()(Problem(losses, costs, 40, 2.75, slack=0.25))
    assert [fmt.bits for fmt in plan.values()] == [4, 2, 2, 2]
    assert set(Greedy()(Problem(losses, costs, 40, 4, slack=4)).values()) == {Integer(2)}
