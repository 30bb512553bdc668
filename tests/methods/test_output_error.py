from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from methods.base import Context, Stat
from methods.formats.integer import Integer
from methods.network import Network, hooks
from methods.sensitivity.base import METRICS, Subject, entry
from methods.sensitivity.output_error import OutputMSE

FORMATS = (Integer(2, 32), Integer(4), Integer(8, symmetric=True))


def subject_of(ctx: Context) -> Subject:
    return Subject(ctx.network, ctx.scoring, ctx.tokens, FORMATS, ctx.statistics)


@torch.no_grad()
def test_it_is_the_mean_over_tokens_and_channels(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    ctx = context(network)
    found = METRICS["output_mse"]()(subject_of(ctx))
    assert set(found.values) == {entry(name, fmt) for name in network.linears for fmt in FORMATS}
    for name in network.linears:
        linear, inputs = network.linear(name), []
        with hooks([linear.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))]):
            network.logits(ctx.tokens)
        weight = network.weight(name)
        for fmt in FORMATS:
            rounded = fmt.fit(weight).snap(weight)
            error = torch.nn.functional.mse_loss(inputs[0] @ rounded.T, linear(inputs[0]))
            assert found.values[entry(name, fmt)] == pytest.approx(float(error), rel=1e-3)
            assert found.error[entry(name, fmt)] == 0


def test_degenerate_linears_lose_nothing(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    network = small_llama()
    zeros, dead = network.linears[0], network.linears[-1]
    network.overwrite(zeros, torch.zeros(network.shape(zeros)))
    ctx = context(network)
    columns = network.shape(dead)[1]
    ctx.statistics = lambda stat, name, given=ctx.statistics: (  # type: ignore[misc]
        torch.zeros(columns, columns) if name == dead else given(stat, name)
    )
    found = OutputMSE()(subject_of(ctx))
    assert all(found.values[entry(name, fmt)] == 0 for name in (zeros, dead) for fmt in FORMATS)
    assert sum(value > 0 for value in found.values.values()) == len(FORMATS) * (len(network.linears) - 2)


def test_it_declares_what_it_reads() -> None:
    assert OutputMSE.needs == {Stat.GRAM}
    assert OutputMSE.per_format
