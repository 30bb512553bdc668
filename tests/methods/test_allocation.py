import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from methods.allocation.base import SOLVERS, Plan, Problem, Solver, check
from methods.allocation.ilp import ILP
from methods.allocation.ordered import Ordered
from methods.allocation.pareto import Pareto
from methods.formats.integer import Integer

GOLDEN = Path(__file__).parents[2].parent / "shared/specs/hawqv3_ilp_golden.json"
FORMATS = [Integer(2), Integer(3), Integer(4), Integer(8)]
EXACT = [Pareto, ILP]
ALL = [*EXACT, Ordered]


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
    for choice in product(*(problem.bits[group] for group in problem.bits)):
        yield dict(zip(problem.bits, choice, strict=True))


def best(problem: Problem) -> float:
    """The least loss inside the window, or, if no plan is, below the limit: by enumeration."""
    low, high = problem.window
    below = [plan for plan in all_plans(problem) if problem.size(plan) <= high]
    inside = [plan for plan in below if problem.size(plan) >= low]
    return min(problem.loss(plan) for plan in inside or below)


def test_solvers_are_found_by_name() -> None:
    assert [SOLVERS[name] for name in ("pareto", "ilp", "ordered")] == ALL


@pytest.mark.parametrize("solver", EXACT)
def test_exact_solvers_find_what_enumeration_finds(solver: type[Solver]) -> None:
    for seed in range(40):
        problem = random_problem(seed, slack=random.Random(seed).choice([0.02, 0.2, 1.0]))
        plan = solver()(problem)
        check(problem, plan)
        assert list(plan) == list(problem.losses)
        assert problem.loss(plan) == pytest.approx(best(problem), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("solver", EXACT)
def test_negative_losses_still_spend_the_budget(solver: type[Solver]) -> None:
    """Alone, the loss would leave every group at 2 bits."""
    formats = FORMATS[:3]
    losses = {f"g{i}": {f: -(4.0**-f.width) for f in formats} for i in range(100)}
    bits = {f"g{i}": {f: 10 * f.width for f in formats} for i in range(100)}
    problem = Problem(losses, bits, 1000, 3.255)
    plan = solver()(problem)
    assert 3.235 <= problem.size(plan) / 1000 <= 3.255
    assert solver()(Problem(losses, bits, 1000, 8)) == dict.fromkeys(losses, Integer(4))


@pytest.mark.parametrize("solver", ALL)
def test_an_unreachable_limit_says_what_is_reachable(solver: type[Solver]) -> None:
    problem = random_problem(0)
    for limit in (1.5, -1.0):
        with pytest.raises(ValueError, match=r"out of reach: these formats store 2\.\d+ to \d\.\d+ bits"):
            solver()(Problem(problem.losses, problem.bits, problem.weights, limit))


@pytest.mark.parametrize("solver", ALL)
def test_the_ends_of_the_range_are_met_exactly(solver: type[Solver]) -> None:
    for seed in range(10):
        problem = random_problem(seed)
        for end, choose in zip(problem.range, (min, max), strict=True):
            limit = end / problem.weights
            plan = solver()(Problem(problem.losses, problem.bits, problem.weights, limit, slack=0))
            assert plan == {g: choose(f, key=lambda fmt: fmt.bits) for g, f in problem.bits.items()}


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
    widest = {group: max(options, key=lambda fmt: fmt.bits) for group, options in problem.bits.items()}
    tight = Problem(problem.losses, problem.bits, problem.weights, problem.range[1] / problem.weights - 0.1)
    with pytest.raises(ValueError, match="bits a weight, more than"):
        check(tight, widest)
    with pytest.raises(ValueError, match="not one of its formats"):
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
    assert low <= problem.size(coarse) <= high
    assert problem.loss(exact) <= problem.loss(coarse) <= problem.loss(exact) + 0.02 * abs(problem.loss(exact))


def in_order(problem: Problem, plan: Plan) -> bool:
    narrowest = {group: min(options, key=lambda fmt: fmt.bits) for group, options in problem.bits.items()}
    order = sorted(plan, key=lambda group: -problem.losses[group][narrowest[group]])
    widths = [plan[group].bits for group in order]
    return widths == sorted(widths, reverse=True)


def unevenness(problem: Problem, plan: Plan) -> float:
    return sum(min(problem.bits[group].values()) * (fmt.bits - problem.limit) ** 2 for group, fmt in plan.items())


def test_ordered_takes_the_flattest_plan_in_the_order_of_sensitivity() -> None:
    hits = 0
    for seed in range(40):
        problem = random_problem(seed, slack=0.3)
        plan = Ordered()(problem)
        assert in_order(problem, plan)
        low, high = problem.window
        allowed = [p for p in all_plans(problem) if in_order(problem, p) and problem.size(p) <= high]
        inside = [p for p in allowed if problem.size(p) >= low]
        hits += bool(inside)
        truth = min(unevenness(problem, p) for p in inside or allowed)
        assert unevenness(problem, plan) == pytest.approx(truth, rel=1e-6)
    assert hits > 20


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
