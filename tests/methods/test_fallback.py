import random

from methods.allocation.base import Problem
from methods.allocation.fallback import Fallback
from methods.formats.integer import Integer

TWO, FOUR, EIGHT = FORMATS = [Integer(2), Integer(4), Integer(8)]
TRACES = {"a": 3.0, "b": -1.0, "c": 8.0, "d": 5.0}


def problem(limit: float, slack: float = 0.02, **options) -> Problem:
    losses = {group: {f: trace * 4.0**-f.width for f in FORMATS} for group, trace in TRACES.items()}
    costs = {group: {f: 10 * f.width for f in FORMATS} for group in TRACES}
    return Problem(losses, costs, 40, limit, slack, **options)


def test_groups_fall_back_in_the_order_of_their_traces() -> None:
    assert Fallback()(problem(3.5)) == {"a": TWO, "b": TWO, "c": EIGHT, "d": TWO}
    assert Fallback()(problem(5.0)) == {"a": TWO, "b": TWO, "c": EIGHT, "d": EIGHT}
    assert Fallback()(problem(6.5)) == {"a": EIGHT, "b": TWO, "c": EIGHT, "d": EIGHT}


def test_as_shipped_the_least_sensitive_come_first() -> None:
    shipped = Fallback(as_shipped=True)
    assert shipped(problem(3.5)) == {"a": TWO, "b": EIGHT, "c": TWO, "d": TWO}
    assert shipped(problem(5.0)) == {"a": EIGHT, "b": EIGHT, "c": TWO, "d": TWO}


def test_near_the_limit_a_group_gets_the_dearest_that_fits() -> None:
    assert Fallback()(problem(5.5)) == {"a": FOUR, "b": TWO, "c": EIGHT, "d": EIGHT}


def test_only_the_order_of_the_losses_counts() -> None:
    rng = random.Random(0)
    drawn = problem(5.0)
    others = {g: {f: x if f == TWO else rng.gauss(0, 9) for f, x in row.items()} for g, row in drawn.losses.items()}
    assert Fallback()(Problem(others, drawn.costs, 40, 5.0)) == Fallback()(drawn)


def test_the_judge_keeps_the_best_step_inside_the_window() -> None:
    judged = []

    def judge(plan: dict) -> float:
        judged.append([group for group in "cdab" if plan[group] == EIGHT])
        return {"": 1.0, "c": 7.0, "cd": 5.0, "cda": 6.0, "cdab": 9.0}["".join(judged[-1])]

    free = problem(8.0, slack=8.0, judge=judge)
    assert Fallback()(free) == {"a": TWO, "b": TWO, "c": TWO, "d": TWO}
    assert judged == [list("cdab"[:count]) for count in range(5)], "cumulative, each measured once"
    judged.clear()
    assert Fallback()(problem(6.5, slack=1.5, judge=judge)) == {"a": TWO, "b": TWO, "c": EIGHT, "d": EIGHT}
    assert judged == [["c", "d"], ["c", "d", "a"]]
