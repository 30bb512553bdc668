from collections.abc import Callable

import pytest
import torch

from methods.base import METHODS, Budget, Context
from methods.formats.integer import Integer
from methods.fp16 import FP16
from methods.network import Network
from methods.rtn import RTN


@pytest.mark.parametrize("clip", [False, True])
def test_every_linear_is_rounded_to_the_nearest_points_of_its_grid(
    small_llama: Callable[..., Network], context: Callable[..., Context], clip: bool
) -> None:
    network = small_llama()
    original = {name: network.weight(name) for name in network.linears}
    quantized = RTN(clip).quantize(context(network, Budget(bits=3, group_size=32)))
    assert list(quantized.packed) == list(network.linears)
    for name, weight in original.items():
        rounded = quantized.packed[name].dequantize()
        assert torch.equal(network.weight(name), rounded)
        grid = Integer(3, 32, clip=clip).fit(weight)
        points = torch.stack([grid.decode(torch.full_like(weight, code)) for code in range(8)])
        nearest = (points - weight).abs().amin(0)
        torch.testing.assert_close((rounded - weight).abs(), nearest)


@torch.no_grad()
def test_more_bits_keep_the_logits_closer(small_llama: Callable[..., Network], context: Callable[..., Context]) -> None:
    errors = []
    for bits in (2, 4, 8):
        network = small_llama()
        ctx = context(network, Budget(bits=bits, group_size=32))
        expected = network.logits(ctx.scoring)
        RTN().quantize(ctx)
        errors.append(float((network.logits(ctx.scoring) - expected).square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@torch.no_grad()
def test_fp16_is_the_reference_under_every_budget(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    for budget in (Budget(bits=2), Budget(effective_bits=2.5)):
        assert FP16().supports(network, budget) is None
    ctx = context(network)
    expected = network.logits(ctx.scoring)
    quantized = FP16().quantize(ctx)
    assert all(p.stored_bits() == 16 * p.shape[0] * p.shape[1] for p in quantized.packed.values())
    torch.testing.assert_close(network.logits(ctx.scoring), expected, atol=0.02, rtol=0.01)


def test_uniform_methods_refuse_a_bound_on_effective_bits(small_llama: Callable[..., Network]) -> None:
    reason = METHODS["rtn"]().supports(small_llama(), Budget(effective_bits=3.5))
    assert reason is not None and "3.5" in reason
