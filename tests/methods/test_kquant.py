import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from methods.base import METHODS, Budget, Context, Stat
from methods.formats.superblock import KQUANTS
from methods.kquant import KQuant
from methods.network import Network
from methods.rtn import RTN

Build = Callable[..., Network]
Given = Callable[..., Context]


def dequantized(quantized) -> dict[str, Tensor]:
    return {name: packed.dequantize() for name, packed in quantized.packed.items()}


@pytest.mark.parametrize("bits", KQUANTS)
def test_every_linear_gets_the_k_quant_of_the_budget(small_llama: Build, context: Given, bits: int) -> None:
    network = small_llama()
    quantized = KQuant().quantize(context(network, Budget(bits=bits)))
    assert list(quantized.packed) == list(network.linears)
    for name, packed in quantized.packed.items():
        assert torch.equal(packed.dequantize(), network.weight(name))
        assert packed.stored_bits() == KQUANTS[bits].stored_bits(network.shape(name))
        assert packed.bits == bits


@pytest.mark.parametrize("bits", [3, 4])
def test_without_an_importance_matrix_it_is_rounding_to_nearest_in_the_format(
    small_llama: Build, context: Given, bits: int
) -> None:
    budget = Budget(bits=bits)
    ours = dequantized(KQuant(imatrix=False).quantize(context(small_llama(), budget, statistics=False)))
    nearest = dequantized(RTN(format=f"q{bits}_k").quantize(context(small_llama(), budget)))
    assert all(torch.equal(ours[name], nearest[name]) for name in nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_importance_matrix_is_the_mean_square_of_the_inputs(small_llama: Build, context: Given, bits: int) -> None:
    network = small_llama()
    original = {name: network.weight(name) for name in network.linears}
    ctx = context(network, Budget(bits=bits))
    squares = {name: ctx.statistics(Stat.MEAN_SQUARE, name).clone() for name in network.linears}
    ours = dequantized(KQuant().quantize(ctx))
    for name, weight in original.items():
        assert torch.equal(ours[name], KQUANTS[bits].fit(weight, squares[name]).snap(weight))
    plain = dequantized(KQuant(imatrix=False).quantize(context(small_llama(), Budget(bits=bits))))

    def loss(rounded: dict[str, Tensor]) -> float:
        return sum(float(((rounded[n] - w).square() @ squares[n]).sum()) for n, w in original.items())

    assert loss(ours) < 0.98 * loss(plain)


def test_experts_without_tokens_count_all_inputs_the_same(
    small_llama: Build, context: Given, caplog: pytest.LogCaptureFixture
) -> None:
    network = small_llama()
    weight = {name: network.weight(name) for name in network.linears}
    nothing = replace(
        context(network, Budget(bits=4)), statistics=lambda stat, name: torch.zeros(network.shape(name)[1])
    )
    with caplog.at_level(logging.WARNING):
        ours = dequantized(KQuant().quantize(nothing))
    assert len(caplog.records) == len(network.linears)
    assert network.linears[0] in caplog.text
    for name, original in weight.items():
        same = KQUANTS[4].fit(original, torch.ones(original.shape[1])).snap(original)
        assert torch.equal(ours[name], same)


def test_it_needs_only_the_statistics_it_reads() -> None:
    assert METHODS["kquant"] is KQuant
    assert KQuant().statistics == {Stat.MEAN_SQUARE}
    assert KQuant(imatrix=False).statistics == frozenset()
    assert KQuant(imatrix=False).label == "kquant imatrix=false"


@pytest.mark.parametrize(
    ("budget", "reason"), [(Budget(bits=8), "2 to 6 bits"), (Budget(effective_bits=3.5), "3.5 effective bits")]
)
def test_other_budgets_are_refused(small_llama: Build, budget: Budget, reason: str) -> None:
    refusal = KQuant().supports(small_llama(), budget)
    assert refusal is not None and reason in refusal
    assert all(KQuant().supports(small_llama(), Budget(bits=bits)) is None for bits in range(2, 7))
