from collections.abc import Callable
from typing import Any

import pytest

from methods.base import Budget, Context
from methods.hawq_v1 import HAWQV1
from methods.hawq_v2 import HAWQV2
from methods.network import Network
from methods.sensitivity.base import Sensitivity, Subject, entry
from methods.sensitivity.hutchinson import Hutchinson


def measured(method: HAWQV1 | HAWQV2, ctx: Context) -> tuple[Subject, Sensitivity]:
    """Ω of every linear in every format, as the method charges it."""
    formats = method.candidates(ctx.budget)
    subject = Subject(ctx.network, ctx.scoring, ctx.tokens, formats, ctx.statistics, seed=1)
    return subject, subject.measure(method.sensitivity())


def test_omega_is_the_average_trace_times_the_squared_error(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    method = HAWQV2(max_probes=2)
    subject, found = measured(method, context(network))
    traces = subject.measure(Hutchinson(method.tolerance, method.max_probes, method.context)).values
    for name in network.linears:
        weight = network.weight(name)
        for fmt in subject.formats:
            error = float((fmt.fit(weight).snap(weight) - weight).norm() ** 2)
            assert found.values[entry(name, fmt)] == pytest.approx(traces[name] / weight.numel() * error, rel=1e-4)


def test_equal_top_eigenvalues_can_hide_different_traces(
    quadratic: Callable[..., Network], context: Callable[..., Context]
) -> None:
    """HAWQ-V2's argument against HAWQ-V1: 100x² + y² and 100x² + 99y²."""
    network = quadratic({"a": [200.0, 2.0], "b": [200.0, 198.0]})
    ctx = context(network, Budget(bits=3, group_size=0), statistics=False)
    options: dict[str, Any] = {"tolerance": 1e-7, "max_iterations": 2000}
    subject, first = measured(HAWQV1(**options), ctx)
    _, second = measured(HAWQV2(), ctx)
    narrowest = subject.formats[0]
    squared = {name: float(subject.delta(name, narrowest).square().sum()) for name in "ab"}
    top = {name: first.values[entry(name, narrowest)] / squared[name] for name in "ab"}
    average = {name: second.values[entry(name, narrowest)] / squared[name] for name in "ab"}
    assert top["a"] == pytest.approx(top["b"], rel=1e-3)
    assert average == pytest.approx({"a": 202 / 2, "b": 398 / 2}, rel=1e-4)
