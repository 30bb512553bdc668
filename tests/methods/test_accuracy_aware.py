import random
from itertools import combinations, pairwise

import pytest

from methods.allocation.accuracy_aware import AccuracyAware
from methods.allocation.base import Problem
from methods.formats.integer import Integer

TWO, FOUR, EIGHT = Integer(2), Integer(4), Integer(8)


def two_options(gains: list[float], limit: float = 8.0, **options) -> Problem:
    """Groups of one size at 2 or 8 bits; going to 8 lowers the loss by the gain."""
    losses = {f"g{i}": {TWO: gain, EIGHT: 0.0} for i, gain in enumerate(gains)}
    costs = {group: {TWO: 2, EIGHT: 8} for group in losses}
    return Problem(losses, costs, len(gains), limit, **options)


def reverted(plan: dict) -> set[str]:
    return {group for group, fmt in plan.items() if fmt == EIGHT}


def test_with_additive_losses_and_equal_costs_it_is_the_optimal_knapsack() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        gains = [rng.lognormvariate(0, 1) for _ in range(7)]
        count = rng.randrange(8)
        problem = two_options(gains, 2 + 6 * count / 7)
        truth = max(sum(chosen) for chosen in combinations(gains, count))
        plan = AccuracyAware()(problem)
        assert len(reverted(plan)) == count
        assert sum(gains) - problem.loss(plan) == pytest.approx(truth)


def test_more_budget_reverts_more_of_the_same() -> None:
    """Nested from budget to budget, and within one search."""
    rng = random.Random(0)
    gains = [rng.random() for _ in range(8)]
    plans = [AccuracyAware()(two_options(gains, 2 + 6 * count / 8)) for count in range(9)]
    for fewer, more in pairwise(plans):
        assert reverted(fewer) < reverted(more)

    seen: list[set[str]] = []

    def judge(plan: dict) -> float:
        seen.append(reverted(plan))
        return sum(gain for i, gain in enumerate(gains) if plan[f"g{i}"] == TWO)

    AccuracyAware()(two_options(gains, judge=judge))
    assert seen[:2] == [set(), {f"g{i}" for i in range(8)}], "the start, and the reference of the drop"
    assert sorted(map(sorted, seen[2:10])) == [[f"g{i}"] for i in range(8)], "the ranking: each group alone"
    steps = seen[10:]
    assert [len(step) for step in steps] == list(range(1, 9))
    assert all(fewer < more for fewer, more in pairwise(steps))


def test_it_stops_at_the_drop_and_at_the_number_of_iterations() -> None:
    gains = [5.0, 4.0, 3.0, 2.0, 1.0]
    problem = two_options(gains, slack=100.0)  # nothing to fill up to
    for drop, count in ((15.0, 0), (14.9, 1), (6.0, 2), (5.9, 3), (0.5, 5), (0.0, 5)):
        plan = AccuracyAware(max_drop=drop)(problem)
        assert reverted(plan) == {f"g{i}" for i in range(count)}
        assert problem.loss(plan) <= drop
    assert reverted(AccuracyAware(max_num_iterations=2)(problem)) == {"g0", "g1"}


def test_the_drop_is_measured_from_everything_at_its_dearest() -> None:
    problem = two_options([5.0, 4.0, 3.0], slack=100.0, judge=lambda plan: 70.0 + problem.loss(plan))
    assert reverted(AccuracyAware(max_drop=3.5)(problem)) == {"g0", "g1"}


def test_a_plan_that_stops_early_is_filled_in_the_order_of_the_ranking() -> None:
    gains = [1.0, 4.0, 2.0, 5.0, 3.0]
    calls = []

    def judge(plan: dict) -> float:
        calls.append(plan)
        return sum(gain for i, gain in enumerate(gains) if plan[f"g{i}"] == TWO)

    plan = AccuracyAware(max_num_iterations=1)(two_options(gains, 2 + 6 * 3 / 5, judge=judge))
    assert reverted(plan) == {"g3", "g1", "g4"}
    assert len(calls) == 2 + 5 + 1


def test_a_step_that_harms_is_undone_the_rest_ranked_again_and_the_next_step_kept() -> None:
    """a and b gain most alone and harm together; once a is reverted, c is the next best."""
    table = {"": 10.0, "a": 5.0, "b": 6.0, "c": 8.0, "ab": 7.0, "ac": 3.0, "bc": 4.0, "abc": 1.0}
    seen = []

    def judge(plan: dict) -> float:
        seen.append("".join(sorted(reverted(plan))))
        return table[seen[-1]]

    losses = {group: {TWO: 1.0, EIGHT: 0.0} for group in "abc"}
    costs = {group: {TWO: 2, EIGHT: 8} for group in "abc"}
    plan = AccuracyAware()(Problem(losses, costs, 3, 8, judge=judge))
    start, ranking, undone, again, rest = seen[:2], seen[2:5], seen[5:7], seen[7:9], seen[9:]
    assert start == ["", "abc"]
    assert ranking == ["a", "b", "c"]
    assert undone == ["a", "ab"]
    assert sorted(again) == ["ab", "ac"], "the group that was undone is ranked again, too"
    assert rest == ["ac", "abc"]
    assert reverted(plan) == {"a", "b", "c"}


def test_a_step_after_one_undone_is_kept_even_if_it_harms() -> None:
    table = {"": 10.0, "a": 5.0, "b": 6.0, "ab": 7.0}
    losses = {group: {TWO: 1.0, EIGHT: 0.0} for group in "ab"}
    costs = {group: {TWO: 2, EIGHT: 8} for group in "ab"}
    problem = Problem(losses, costs, 2, 8, slack=6, judge=lambda plan: table["".join(sorted(reverted(plan)))])
    assert reverted(AccuracyAware(max_drop=-4.0)(problem)) == {"a", "b"}


def test_where_the_dearest_does_not_fit_the_dearest_that_does_is_taken() -> None:
    losses = {"a": {TWO: 9.0, FOUR: 4.0, EIGHT: 0.0}, "b": {TWO: 5.0, FOUR: 2.0, EIGHT: 0.0}}
    costs = {group: {TWO: 20, FOUR: 40, EIGHT: 80} for group in losses}
    assert AccuracyAware()(Problem(losses, costs, 20, 6.0)) == {"a": EIGHT, "b": FOUR}
    assert AccuracyAware()(Problem(losses, costs, 20, 4.0, slack=1)) == {"a": FOUR, "b": FOUR}


def test_nothing_is_measured_for_a_window_without_plans() -> None:
    """Groups are too large for a window of 0.02: it is widened before the search, not after each of many searches."""
    calls = []
    problem = two_options([3.0, 2.0, 1.0], 4.9, judge=lambda plan: calls.append(plan) or 0.0)
    assert AccuracyAware().solve(problem, *problem.window) is None
    assert not calls
    assert reverted(AccuracyAware()(problem)) != set()
