from collections.abc import Callable

import pytest

from methods.base import METHODS, Budget, Context
from methods.hawq_v1 import HAWQV1
from methods.network import Network
from methods.recipe import Recipe
from methods.sensitivity.base import Subject
from methods.sensitivity.eigenvalue import TopEigenvalue


def omega(ctx: Context, linear: str, score: float, width: int) -> float:
    weight = ctx.network.weight(linear)
    return score * float((ctx.budget.format(width).fit(weight).snap(weight) - weight).norm() ** 2)


def test_widths_follow_the_order_of_eigenvalue_times_squared_error(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama(num_hidden_layers=4)
    ctx = context(network, Budget(effective_bits=4.1, group_size=32))
    scores = {name: 1.0 + i * 37 % 29 for i, name in enumerate(network.linears)}
    method = HAWQV1()
    losses = {
        name: {Recipe(ctx.budget.format(width)): omega(ctx, name, scores[name], width) for width in method.bits}
        for name in network.linears
    }
    plan = method.plan(ctx, losses)
    ranking = sorted(
        network.groups, key=lambda group: -sum(omega(ctx, name, scores[name], 2) for name in group.linears)
    )
    widths = [plan[group.name].bits for group in ranking]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 1


def test_the_charge_is_the_magnitude_of_the_eigenvalue_times_the_squared_error(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network, method = small_llama(), HAWQV1(max_iterations=6)
    ctx = context(network)
    subject = Subject(network, ctx.scoring, ctx.tokens, method.candidates(ctx.budget), ctx.statistics)
    signed = subject.measure(TopEigenvalue(max_iterations=6)).values
    assert any(value < 0 for value in signed.values())
    metric = method.sensitivity()
    losses = metric.losses(subject.measure(metric), network, subject.formats)
    for name, row in losses.items():
        for fmt, loss in row.items():
            assert loss == pytest.approx(omega(ctx, name, abs(signed[name]), int(fmt.bits)), rel=1e-4)


def test_a_uniform_budget_allows_what_uniform_widths_store(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network, method = small_llama(), METHODS["hawq_v1"](max_iterations=2)
    budget = Budget(bits=2, group_size=32)
    done = method.quantize(context(network, budget))
    assert all(packed.bits == 2 for packed in done.packed.values())
    assert method.supports(network, Budget(effective_bits=2.3, group_size=32)) == pytest.approx(
        "int2-g32 stores 2.562 bits a weight; the limit is 2.3"
    )
