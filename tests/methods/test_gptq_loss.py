from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import methods.rounding.gptq
from methods.base import Context, Stat
from methods.formats.integer import Integer
from methods.network import Network
from methods.rounding.gptq import GPTQRounding
from methods.rounding.sweep import damped_factor
from methods.sensitivity.base import METRICS, Subject, entry
from methods.sensitivity.gptq_loss import GPTQLoss
from methods.sensitivity.output_error import OutputMSE

FORMATS = (Integer(2, 32), Integer(3), Integer(4, 32))


def subject_of(ctx: Context, gram: Callable[[str], Tensor] | None = None) -> Subject:
    statistics = ctx.statistics if gram is None else lambda stat, name: gram(name)
    return Subject(ctx.network, ctx.scoring, ctx.tokens, FORMATS, statistics)


@pytest.fixture
def ctx(small_llama: Callable[..., Network], context: Callable[..., Context]) -> Context:
    return context(small_llama(num_hidden_layers=1))


def official_loss(weight: Tensor, gram: Tensor, fmt: Integer) -> tuple[float, Tensor]:
    """Σ eⱼ² as GPTQ's own loop sums it, for grids of whole rows, and the rounded weight; everything in fp64."""
    hessian = gram.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    grid = fmt.fit(weight)
    current, total, rounded = weight.double(), 0.0, []
    for j in range(weight.shape[1]):
        rounded.append(grid.snap(current[:, j : j + 1].float(), j).double())
        error = (current[:, j : j + 1] - rounded[-1]) / upper[j, j]
        current = current - error * upper[j]  # entries left of j are zero
        total += float(error.square().sum())
    return total, torch.cat(rounded, 1)


def test_it_is_the_loss_of_the_official_loop_without_damping(ctx: Context) -> None:
    found = METRICS["gptq_loss"]()(subject_of(ctx))
    fmt = FORMATS[1]
    for name in ctx.network.linears:
        weight, gram = ctx.network.weight(name), ctx.statistics(Stat.GRAM, name)
        total, rounded = official_loss(weight, gram, fmt)
        damping = 0.01 * float(gram.diagonal().mean()) * float((rounded - weight).square().sum())
        assert found.values[entry(name, fmt)] == pytest.approx(total - damping, rel=0.02)  # codes at ties may differ


def test_it_equals_the_output_error_of_rounding_to_nearest_for_white_inputs(ctx: Context) -> None:
    """With a Gram matrix c·I there is nothing to feed back."""

    def white(name: str) -> Tensor:
        return 3 * torch.eye(ctx.network.shape(name)[1])

    loss, error = (metric(subject_of(ctx, white)).values for metric in (GPTQLoss(), OutputMSE()))
    for name in ctx.network.linears:
        out, _ = ctx.network.shape(name)
        for fmt in FORMATS:
            assert loss[entry(name, fmt)] == pytest.approx(out * error[entry(name, fmt)], rel=1e-4)


def test_error_feedback_loses_less_than_rounding_to_nearest(ctx: Context) -> None:
    loss, error = (metric(subject_of(ctx)).values for metric in (GPTQLoss(), OutputMSE()))
    for name in ctx.network.linears:
        out, _ = ctx.network.shape(name)
        assert all(0 < loss[entry(name, f)] < out * error[entry(name, f)] for f in FORMATS)


@pytest.mark.parametrize("options", [{"act_order": True}, {"damping": 0.3}, {"static_groups": True}])
def test_options_are_those_of_the_rounding(ctx: Context, options: dict[str, float]) -> None:
    found = GPTQLoss(**options)(subject_of(ctx))
    rounding = GPTQRounding(**options)
    changed = 0
    for name in ctx.network.linears:
        weight, gram = ctx.network.weight(name), ctx.statistics(Stat.GRAM, name)
        delta = rounding(weight, FORMATS[0], gram).weight - weight
        expected = float(torch.einsum("oi,ij,oj->", delta, gram, delta))
        assert found.values[entry(name, FORMATS[0])] == pytest.approx(expected, rel=1e-4)
        plain = GPTQRounding()(weight, FORMATS[0], gram).weight - weight
        changed += not torch.equal(plain, delta)
    assert changed


def test_one_factorization_serves_a_group_and_all_formats(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(gram: Tensor, damping: float) -> Tensor:
        sizes.append(len(gram))
        return damped_factor(gram, damping)

    monkeypatch.setattr(methods.rounding.gptq, "damped_factor", counted)
    GPTQLoss()(subject_of(ctx))
    assert len(sizes) == len(ctx.network.groups) < len(ctx.network.linears)


def test_dead_inputs_and_zero_weights_lose_nothing(ctx: Context) -> None:
    zeros = ctx.network.linears[0]
    ctx.network.overwrite(zeros, torch.zeros(ctx.network.shape(zeros)))
    half = GPTQLoss()(subject_of(ctx)).values
    assert all(half[entry(zeros, fmt)] == 0 for fmt in FORMATS)
    none = GPTQLoss()(subject_of(ctx, lambda name: torch.zeros(2 * (ctx.network.shape(name)[1],)))).values
    assert set(none.values()) == {0.0}

    def some_dead(name: str) -> Tensor:
        gram = ctx.statistics(Stat.GRAM, name).clone()
        gram[:8], gram[:, :8] = 0, 0
        return gram

    assert all(0 <= value < float("inf") for value in GPTQLoss()(subject_of(ctx, some_dead)).values.values())


def test_senseless_options_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="damping=-1"):
        GPTQLoss(damping=-1)
