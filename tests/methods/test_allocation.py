import json
import random
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from methods.allocation.accuracy_aware import AccuracyAware
from methods.allocation.base import SOLVERS, Problem, Solver, check
from methods.allocation.controls import Random, Uniform
from methods.allocation.fallback import Fallback
from methods.allocation.greedy import Greedy
from methods.allocation.ilp import ILP, relaxation
from methods.allocation.ordered import Ordered, uniform_width
from methods.allocation.pareto import Pareto
from methods.allocation.recipes import LinearProgramme
from methods.allocation.threshold import Threshold
from methods.formats.integer import Integer

Plan = dict[str, Any]

GOLDEN = Path(__file__).parents[2].parent / "shared/specs/hawqv3_ilp_golden.json"
FORMATS = [Integer(2), Integer(3), Integer(4), Integer(8)]
EXACT = [Pareto, ILP]
HEURISTIC = [Greedy, LinearProgramme, Threshold, AccuracyAware, Fallback, Uniform, Random]
ALL = [*EXACT, *HEURISTIC, Ordered]


def random_problem(seed: int, slack: float = 0.02, negative: bool = True) -> Problem:
    rng = random.Random(seed)
    formats = FORMATS[: rng.choice([3, 4])]
    sizes = [rng.choice([8, 16, 16, 24, 56, rng.randrange(1, 60)]) for _ in range(rng.randrange(2, 7))]
    losses, bits = {}, {}
    for i, size in enumerate(sizes):
        score = rng.lognormvariate(0, 2) * (-1 if negative and rng.random() < 0.3 else 1)
        losses[f"g{i}"] = {f: score * 4.0**-f.width * rng.uniform(0.5, 2) for f in formats}
        bits[f"g{i}"] = {f: size * f.width + 3 for f in formats}
    low = sum(size * 2 + 3 for size in sizes) / sum(sizes)
    limit = rng.uniform(low, formats[-1].width + 0.5)
    return Problem(losses, bits, sum(sizes), limit, slack)


def all_plans(problem: Problem) -> Iterator[Plan]:
    for choice in product(*(problem.costs[group] for group in problem.costs)):
        yield dict(zip(problem.costs, choice, strict=True))


def inside(problem: Problem, plans: Iterable[Plan]) -> list[Plan]:
    """Those of the plans that are inside the window, which is doubled until one is."""
    low, high = problem.window
    below = [plan for plan in plans if problem.cost(plan) <= high]
    width = max(high - low, 1)
    while low > 0 and all(problem.cost(plan) < low for plan in below):
        low, width = high - 2 * width, 2 * width
    return [plan for plan in below if problem.cost(plan) >= low]


def best(problem: Problem) -> float:
    """The least loss by enumeration."""
    return min(map(problem.loss, inside(problem, all_plans(problem))))


def test_solvers_are_found_by_name() -> None:
    names = ("pareto", "ilp", "greedy", "lp", "threshold", "accuracy_aware", "inc", "uniform", "random", "ordered")
    assert [SOLVERS[name] for name in names] == ALL


@pytest.mark.parametrize("solver", EXACT)
def test_exact_solvers_find_what_enumeration_finds(solver: type[Solver]) -> None:
    for seed in range(40):
        problem = random_problem(seed, slack=random.Random(seed).choice([0.02, 0.2, 1.0]))
        plan = solver()(problem)
        check(problem, plan)
        assert list(plan) == list(problem.losses)
        assert problem.loss(plan) == pytest.approx(best(problem), rel=1e-9, abs=1e-12)


def other_units(seed: int) -> Problem:
    """Costs without common divisor, over ten orders of magnitude, that need not rise with the width."""
    rng = random.Random(seed)
    scale = 10 ** rng.randrange(1, 10)
    groups = [f"g{i}" for i in range(rng.randrange(2, 6))]
    losses = {g: {f: rng.choice([rng.gauss(0, 1), 0.5, 0.0]) for f in FORMATS} for g in groups}
    costs = {g: {f: rng.randrange(1, scale + 2) for f in FORMATS} for g in groups}
    ends = Problem(losses, costs, 1000, 1e9).range
    limit = rng.uniform(ends[0], 1.1 * ends[1]) / 1000
    return Problem(losses, costs, 1000, limit, rng.choice([0, 0.001, 0.1, 1]) * limit, "ns", seed=seed)


@pytest.mark.parametrize("make", [random_problem, other_units])
@pytest.mark.parametrize("solver", [*EXACT, *HEURISTIC])
def test_every_solver_ends_inside_the_window_if_any_plan_does(solver: type[Solver], make: Any) -> None:
    """And none loses less than enumeration; the exact ones as much."""
    for seed in range(8):
        problem = make(seed)
        low, high = problem.window
        plan = solver()(problem)
        check(problem, plan)
        assert list(plan) == list(problem.costs)
        assert (problem.cost(plan) >= low) == any(low <= problem.cost(p) <= high for p in all_plans(problem))
        assert problem.loss(plan) >= best(problem) - 1e-9
        if solver in EXACT:
            assert problem.loss(plan) == pytest.approx(best(problem), rel=1e-9, abs=1e-9)
        assert solver()(problem) == plan


@pytest.mark.parametrize("solver", [Greedy, LinearProgramme, Threshold, AccuracyAware, Fallback])
def test_the_losses_only_count_relative_to_each_other(solver: type[Solver]) -> None:
    for seed in range(10):
        problem = random_problem(seed, negative=False)
        scaled = {g: {f: 1024 * loss for f, loss in row.items()} for g, row in problem.losses.items()}
        assert solver()(problem) == solver()(Problem(scaled, problem.costs, problem.divisor, problem.limit))


def test_the_relaxation_is_a_lower_bound() -> None:
    for seed in range(12):
        problem = random_problem(seed, slack=1.0)
        low, high = problem.window
        exact = ILP().solve(problem, low, high)
        if exact is not None:
            assert relaxation(problem, low, high) <= problem.loss(exact) + 1e-9
    free = Problem(problem.losses, problem.costs, problem.divisor, 100)
    everything = sum(min(row.values()) for row in free.losses.values())
    assert relaxation(free, 0, free.range[1]) == pytest.approx(everything)
    with pytest.raises(ValueError, match="no mixture of options costs"):
        relaxation(free, free.range[1] + 1000, free.range[1] + 2000)


@pytest.mark.parametrize("solver", EXACT)
def test_negative_losses_still_spend_the_budget(solver: type[Solver]) -> None:
    """Alone, the loss would leave every group at 2 bits."""
    formats = FORMATS[:3]
    losses = {f"g{i}": {f: -(4.0**-f.width) for f in formats} for i in range(100)}
    bits = {f"g{i}": {f: 10 * f.width for f in formats} for i in range(100)}
    problem = Problem(losses, bits, 1000, 3.255)
    plan = solver()(problem)
    assert 3.235 <= problem.cost(plan) / 1000 <= 3.255
    assert solver()(Problem(losses, bits, 1000, 8)) == dict.fromkeys(losses, Integer(4))


@pytest.mark.parametrize("solver", ALL)
def test_an_unreachable_limit_says_what_is_reachable(solver: type[Solver]) -> None:
    problem = random_problem(0)
    for limit in (1.5, -1.0):
        with pytest.raises(ValueError, match=r"bits is out of reach: these options take 2\.\d+ to \d\.\d+"):
            solver()(Problem(problem.losses, problem.costs, problem.divisor, limit))


@pytest.mark.parametrize("solver", ALL)
def test_the_ends_of_the_range_are_met_exactly(solver: type[Solver]) -> None:
    for seed in range(10):
        problem = random_problem(seed)
        for end, choose in zip(problem.range, (min, max), strict=True):
            limit = end / problem.divisor
            plan = solver()(Problem(problem.losses, problem.costs, problem.divisor, limit, slack=0))
            assert plan == {g: choose(f, key=lambda fmt: fmt.bits) for g, f in problem.costs.items()}


def test_limits_that_are_quotients_are_not_missed_by_rounding() -> None:
    fmt = FORMATS[0]
    for weights in range(1, 4000, 7):
        bits = 2 * weights + 5
        assert Problem({"g": {fmt: 1.0}}, {"g": {fmt: bits}}, weights, bits / weights).window[1] == bits


def test_losses_must_be_finite() -> None:
    with pytest.raises(ValueError, match="the loss of g in int2-channel is nan"):
        Problem({"g": {Integer(2): float("nan")}}, {"g": {Integer(2): 2}}, 1, 4)


def test_a_plan_over_the_limit_or_with_gaps_does_not_pass() -> None:
    problem = random_problem(1)
    widest = {group: max(options, key=lambda fmt: fmt.bits) for group, options in problem.costs.items()}
    tight = Problem(problem.losses, problem.costs, problem.divisor, problem.range[1] / problem.divisor - 0.1)
    with pytest.raises(ValueError, match=r"takes 4\.\d+ effective bits, more than"):
        check(tight, widest)
    with pytest.raises(ValueError, match="not one of its options"):
        check(problem, widest | {"g0": Integer(7)})
    with pytest.raises(ValueError, match="gives g0 None"):
        check(problem, {group: fmt for group, fmt in widest.items() if group != "g0"})


@pytest.mark.parametrize("sign", [1, -1])
def test_a_coarse_frontier_still_holds_the_limit(sign: int) -> None:
    """Sizes without common divisors, so that no two partial plans coincide."""
    rng = random.Random(0)
    sizes = [rng.randrange(10**6, 10**7) for _ in range(20)]
    losses = {f"g{i}": {f: sign * n * rng.random() * 4.0**-f.width for f in FORMATS} for i, n in enumerate(sizes)}
    bits = {f"g{i}": {f: n * f.width for f in FORMATS} for i, n in enumerate(sizes)}
    problem = Problem(losses, bits, sum(sizes), 3.3)
    exact, coarse = (solver(problem) for solver in (ILP(), Pareto(resolution=100)))
    low, high = problem.window
    assert low <= problem.cost(coarse) <= high
    assert problem.loss(exact) <= problem.loss(coarse) <= problem.loss(exact) + 0.02 * abs(problem.loss(exact))


def in_order(problem: Problem, plan: Plan) -> bool:
    narrowest = {group: min(options, key=lambda fmt: fmt.bits) for group, options in problem.costs.items()}
    order = sorted(plan, key=lambda group: -problem.losses[group][narrowest[group]])
    widths = [plan[group].bits for group in order]
    return widths == sorted(widths, reverse=True)


def unevenness(problem: Problem, plan: Plan) -> float:
    flat = uniform_width(problem, problem.window[1])
    return sum(min(problem.costs[group].values()) * (fmt.bits - flat) ** 2 for group, fmt in plan.items())


def test_ordered_takes_the_flattest_plan_in_the_order_of_sensitivity() -> None:
    hits = 0
    for seed in range(40):
        problem = random_problem(seed, slack=0.3)
        plan = Ordered()(problem)
        assert in_order(problem, plan)
        low, high = problem.window
        allowed = [p for p in all_plans(problem) if in_order(problem, p)]
        hits += any(low <= problem.cost(p) <= high for p in allowed)
        truth = min(unevenness(problem, p) for p in inside(problem, allowed))
        assert unevenness(problem, plan) == pytest.approx(truth, rel=1e-6)
    assert hits > 20


def test_the_uniform_width_is_the_one_that_meets_the_limit() -> None:
    costs = {g: {f: size * f.width**2 for f in FORMATS} for g, size in (("a", 5), ("b", 7))}
    problem = Problem(costs, costs, 12, 64)
    for width in (2, 3, 4, 8):
        assert uniform_width(problem, 12 * width**2) == pytest.approx(width)
    assert uniform_width(problem, 12 * (16 + 64) // 2) == pytest.approx(6)
    assert uniform_width(problem, 10**6) == 8
    assert uniform_width(problem, 0) == 2


@pytest.mark.parametrize("unit", [1, 1000, 10**9])
def test_ordered_does_not_depend_on_the_unit_of_the_cost(unit: int) -> None:
    """Where the limit is 4 bits for all, all get 4 bits, also if that is a million nanoseconds."""
    losses = {f"g{i}": {f: (i + 1) * 4.0**-f.width for f in FORMATS} for i in range(6)}
    costs = {f"g{i}": {f: unit * 10 * f.width for f in FORMATS} for i in range(6)}
    problem = Problem(losses, costs, 60, 4.0 * unit, slack=0.02 * unit, unit="ns")
    assert Ordered()(problem) == dict.fromkeys(losses, Integer(4))


def test_ordered_gives_a_prefix_the_wider_of_two_adjacent_widths() -> None:
    formats = FORMATS[:3]
    losses = {f"g{i}": {f: float(i) * 4.0**-f.width for f in formats} for i in range(100)}
    bits = {f"g{i}": {f: 10 * f.width for f in formats} for i in range(100)}
    plan = Ordered()(Problem(losses, bits, 1000, 3.25, slack=0.005))
    assert plan == {f"g{i}": Integer(4 if i >= 75 else 3) for i in range(100)}


def golden_problem(model: dict[str, Any], constraint: str, cap: float) -> tuple[Problem, dict[str, list[int]]]:
    """One of HAWQ-V3's published problems: 4 or 8 bits a layer; tied layers are one group.

    Costs (millions of parameters, giga-BOPs, milliseconds) are counted in units of 1e-9.
    """
    arrays = model["arrays"]
    traces = arrays["Hutchinson_trace"]
    deltas = {4: arrays["delta_weights_4bit_square"], 8: arrays["delta_weights_8bit_square"]}
    costs = {
        "modelsize": {b: [n * b / 8 for n in arrays["parameters"]] for b in (4, 8)},
        "bops": {b: [n * b * b / 1024 for n in arrays["bops"]] for b in (4, 8)},
        "latency": {b: arrays[f"latency_int{b}"] for b in (4, 8)},
    }[constraint]
    tied = {layer: first for first, *others in model["ties"] for layer in others}
    members: dict[str, list[int]] = {}
    for layer in range(len(traces)):
        members.setdefault(str(tied.get(layer, layer)), []).append(layer)
    losses = {g: {Integer(b): sum(traces[i] * deltas[b][i] for i in m) for b in (4, 8)} for g, m in members.items()}
    bits = {g: {Integer(b): round(sum(costs[b][i] for i in m) * 1e9) for b in (4, 8)} for g, m in members.items()}
    return Problem(losses, bits, 10**9, cap + 1e-7, slack=cap), members


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/specs/hawqv3_ilp_golden.json")
@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_published_allocations_of_hawq_v3_are_found_again(name: str, solver: type[Solver]) -> None:
    model = json.loads(GOLDEN.read_text())[name]
    for key, solution in model["solutions"].items():
        problem, members = golden_problem(model, key.split("_")[0], solution["cap"])
        plan = solver()(problem)
        widths = {layer: plan[group].bits for group, layers in members.items() for layer in layers}
        assert [widths[i] for i in range(len(widths))] == solution["optimal_bits"], key
        all_4 = sum(losses[Integer(4)] for losses in problem.losses.values())
        assert problem.loss(plan) - all_4 == pytest.approx(solution["objective"], abs=1e-9)
