from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methods.base import Context, Stat
from methods.formats.integer import Integer
from methods.network import Network
from methods.sensitivity.base import METRICS, Subject, squared_error
from methods.sensitivity.slim import SlimSalience

FORMATS = (Integer(2, 16), Integer(4))


def subject_of(ctx: Context, gram: Callable[[str], Tensor] | None = None) -> Subject:
    statistics = ctx.statistics if gram is None else lambda stat, name: gram(name)
    return Subject(ctx.network, ctx.scoring, ctx.tokens, (), statistics)


@pytest.fixture
def ctx(minute_llama: Network, context: Callable[..., Context]) -> Context:
    return context(minute_llama)


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.01, 0.2])
def test_it_is_the_formula_of_the_paper(ctx: Context, damping: float) -> None:
    found = METRICS["slim_salience"](damping=damping)(subject_of(ctx))
    for name in ctx.network.linears:
        hessian = damped(ctx.statistics(Stat.GRAM, name), damping)
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        salience = ctx.network.weight(name).double().square() / upper.diagonal().square()
        assert found.values[name] == pytest.approx(float(salience.sum()), rel=1e-4)


def test_a_term_is_the_least_error_of_removing_a_weight(ctx: Context) -> None:
    """Removed, with all later columns free to compensate and all earlier ones fixed."""
    name = ctx.network.linears[0]
    hessian = damped(ctx.statistics(Stat.GRAM, name), 0.01)
    weight, total = ctx.network.weight(name).double(), 0.0
    for j in range(weight.shape[1]):
        cross, rest = hessian[j, j + 1 :], hessian[j + 1 :, j + 1 :]
        best = -torch.linalg.solve(rest, cross)  # response to a change by 1
        change = torch.cat([torch.ones(1, dtype=torch.float64), best])
        total += float(weight[:, j].square().sum() * (change @ hessian[j:, j:] @ change))
    assert SlimSalience()(subject_of(ctx)).values[name] == pytest.approx(total, rel=1e-4)


def test_for_independent_inputs_it_is_the_energy_of_the_output(ctx: Context) -> None:
    def diagonal(name: str) -> Tensor:
        return torch.diag(torch.arange(1.0, 1 + ctx.network.shape(name)[1]))

    found = SlimSalience(damping=0)(subject_of(ctx, diagonal))
    for name in ctx.network.linears:
        energy = ctx.network.weight(name).square() @ diagonal(name).diagonal()
        assert found.values[name] == pytest.approx(float(energy.sum()), rel=1e-5)


def test_the_loss_is_salience_times_relative_error(ctx: Context) -> None:
    network, metric = ctx.network, SlimSalience()
    before = metric(subject_of(ctx))
    losses = metric.losses(before, network, FORMATS)
    name = network.linears[0]
    for fmt in FORMATS:
        share = squared_error(network, name, fmt) / float(network.weight(name).square().sum())
        assert losses[name][fmt] == pytest.approx(before.values[name] * share, rel=1e-5)
    # A weight twice as large errs twice as much in its output: four times the loss, not sixteen.
    network.overwrite(name, 2 * network.weight(name))
    after = metric.losses(metric(subject_of(ctx)), network, FORMATS)
    assert after[name][FORMATS[0]] == pytest.approx(4 * losses[name][FORMATS[0]], rel=1e-2)


def test_dead_inputs_have_no_salience(ctx: Context) -> None:
    name = ctx.network.linears[0]

    def gram(_: str, dead: int = 3) -> Tensor:
        full = ctx.statistics(Stat.GRAM, name).clone()
        full[:dead], full[:, :dead] = 0, 0
        return full

    network = ctx.network
    first = SlimSalience()._gain(gram(name))
    assert first[:3].tolist() == [0, 0, 0]
    assert bool((first[3:] > 0).all())
    none = SlimSalience()(subject_of(ctx, lambda n: torch.zeros(2 * (network.shape(n)[1],))))
    assert set(none.values.values()) == {0.0}


def test_a_weight_of_zeros_has_neither_salience_nor_loss(ctx: Context) -> None:
    name = ctx.network.linears[0]
    ctx.network.overwrite(name, torch.zeros(ctx.network.shape(name)))
    found = SlimSalience()(subject_of(ctx))
    assert found.values[name] == 0
    assert set(SlimSalience().losses(found, ctx.network, FORMATS)[name].values()) == {0.0}


def test_negative_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="is negative"):
        SlimSalience(damping=-0.1)
