import random

import pytest

from methods.allocation.base import Problem
from methods.allocation.ilp import ILP
from methods.allocation.recipes import LinearProgramme, monotone
from methods.formats.integer import Integer

TWO, THREE, FOUR, EIGHT = FORMATS = [Integer(2), Integer(3), Integer(4), Integer(8)]


def random_problem(seed: int, falling: bool) -> Problem:
    rng = random.Random(seed)
    losses, costs = {}, {}
    for i in range(5):
        row = [rng.lognormvariate(0, 1) for _ in FORMATS]
        losses[f"g{i}"] = dict(zip(FORMATS, sorted(row, reverse=True) if falling else row, strict=True))
        costs[f"g{i}"] = {f: (8 + i) * f.width for f in FORMATS}
    return Problem(losses, costs, 50, rng.uniform(2, 8), slack=0.5)


def test_a_dearer_option_never_scores_worse() -> None:
    losses = {"g": {EIGHT: 3.0, TWO: 2.0, FOUR: 1.0, THREE: 5.0}}
    problem = Problem(losses, {"g": {f: f.width for f in FORMATS}}, 1, 8)
    assert monotone(problem, "g") == {TWO: 2.0, THREE: 2.0, FOUR: 1.0, EIGHT: 1.0}


def test_order_is_that_of_the_cost_and_not_of_the_width() -> None:
    costs = {"g": {TWO: 30, THREE: 20, FOUR: 10}}
    problem = Problem({"g": {TWO: 3.0, THREE: 1.0, FOUR: 2.0}}, costs, 1, 30)
    assert monotone(problem, "g") == {FOUR: 2.0, THREE: 1.0, TWO: 1.0}


def test_with_losses_that_fall_with_the_cost_it_is_the_integer_programme() -> None:
    for seed in range(10):
        problem = random_problem(seed, falling=True)
        assert problem.loss(LinearProgramme()(problem)) == pytest.approx(problem.loss(ILP()(problem)), rel=1e-9)


def test_otherwise_it_minimizes_the_lowered_scores() -> None:
    differ = 0
    for seed in range(10):
        problem = random_problem(seed, falling=False)
        scores = {group: monotone(problem, group) for group in problem.losses}
        lowered = Problem(scores, problem.costs, problem.divisor, problem.limit, problem.slack)
        plan, truth = LinearProgramme()(problem), ILP()(lowered)
        assert lowered.loss(plan) == pytest.approx(lowered.loss(truth), rel=1e-9)
        differ += problem.loss(plan) > problem.loss(ILP()(problem)) + 1e-9
    assert differ
