from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.activations import TokenScale, integers
from kernels.linear import Inputs
from kernels.packed_sum import PackedLowRank, PackedSum
from methods.base import Budget, Context, Quantized
from methods.formats.integer import Integer
from methods.network import Network
from methods.reconstruction import rounded_inputs
from methods.rtn import RTN
from methods.stream import BlockStream
from methods.zeroquant import Pupil, ZeroQuant

Build = Callable[..., Any]
BUDGET = Budget(bits=3, group_size=32)
LEARN: dict[str, Any] = {"steps": 30, "lr": 2e-3}


@pytest.fixture
def run(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> Callable[..., tuple[Network, Quantized]]:
    """Quantizes a fresh network; returns it as the method left it, and the result."""

    def quantize(budget: Budget = BUDGET, **options: Any) -> tuple[Network, Quantized]:
        network = small_llama()
        return network, ZeroQuant(**options).quantize(context(network, budget))

    return quantize


def test_without_distillation_it_is_symmetric_rounding_to_nearest(
    small_llama: Callable[..., Network], context: Build, run: Build
) -> None:
    _, quantized = run(steps=0, input_bits=0)
    rtn = RTN().quantize(context(small_llama(), Budget(bits=3, group_size=32, symmetric=True)))
    for name, packed in rtn.packed.items():
        assert torch.equal(quantized.packed[name].dequantize(), packed.dequantize())
        assert quantized.packed[name].stored_bits() == packed.stored_bits()
    assert set(quantized.packed) == set(rtn.packed)
    assert quantized.inputs == {} == quantized.parameters


def test_inputs_are_rounded_token_by_token(run: Build) -> None:
    network, quantized = run(steps=0)
    assert set(quantized.inputs) == set(network.linears)
    assert all(isinstance(rounding, TokenScale) and rounding.bits == 8 for rounding in quantized.inputs.values())
    assert {rounding.bits for rounding in run(steps=0, input_bits=4)[1].inputs.values()} == {4}


def test_a_block_learns_with_rounded_inputs(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    inputs: dict[str, Inputs] = {name: TokenScale(integers(8)) for name in network.linears}
    pupil = Pupil(network, Integer(3, 32), 0, inputs, network.blocks[1])
    own = [name for name in network.linears if name.startswith(network.blocks[1].name)]
    assert pupil.inputs == {name: inputs[name] for name in own}


def block_errors(reference: Network, network: Network, quantized: Quantized, tokens: Tensor) -> list[float]:
    """Mean squared distance of each quantized block from the original one on the same, quantized inputs."""
    stream = BlockStream(network, tokens)
    errors = []
    for index, block in enumerate(reference.blocks):
        (x,) = stream.inputs
        with torch.no_grad():
            target = stream.call(reference.module(block.name), index, x)
            with rounded_inputs(network, quantized.inputs):
                stream.inputs = stream.run(index)
        errors.append(float((stream.inputs[0] - target).square().mean()))
    return errors


@pytest.mark.parametrize("input_bits", [0, 4])
def test_distillation_lowers_the_error_of_every_block(
    small_llama: Callable[..., Network], context: Build, run: Build, input_bits: int
) -> None:
    reference = small_llama()
    tokens = context(reference).tokens[:8]
    before = block_errors(reference, *run(steps=0, input_bits=input_bits), tokens)
    after = block_errors(reference, *run(input_bits=input_bits, **LEARN), tokens)
    assert all(new < 0.8 * old for new, old in zip(after, before, strict=True))


def test_the_result_holds_all_that_was_learned(small_llama: Callable[..., Network], context: Build, run: Build) -> None:
    network, quantized = run(**LEARN, rank=2)
    original, rebuilt = small_llama(), small_llama()
    norms = {name for name, _ in original.model.named_parameters() if "layernorm" in name}
    assert set(quantized.parameters) == norms
    with torch.no_grad():
        for name, value in quantized.parameters.items():
            assert not torch.equal(value, original.model.get_parameter(name))
            rebuilt.model.get_parameter(name).copy_(value)
        for name, packed in quantized.packed.items():
            rebuilt.overwrite(name, packed.dequantize())
        tokens = context(network).tokens
        assert torch.equal(rebuilt.logits(tokens), network.logits(tokens))


def test_biases_are_learned_and_reported(small_llama: Callable[..., Network], context: Build) -> None:
    network = small_llama(attention_bias=True)
    with torch.no_grad():
        for parameter in network.model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1)
    before = {name: p.detach().clone() for name, p in network.model.named_parameters()}
    quantized = ZeroQuant(**LEARN).quantize(context(network, BUDGET))
    biases = {f"{name}.bias" for name in network.linears if network.linear(name).bias is not None}
    assert biases
    assert biases <= set(quantized.parameters)
    assert all(not torch.equal(quantized.parameters[name], before[name]) for name in biases)


def test_compensation_lowers_the_error_up_to_full_rank(small_llama: Callable[..., Network], run: Build) -> None:
    reference = small_llama()
    errors = []
    for rank in (0, 2, 8, 24, 64):
        network, quantized = run(steps=0, rank=rank)
        assert all(isinstance(packed, PackedSum) == (rank > 0) for packed in quantized.packed.values())
        pairs = [(quantized.packed[name].dequantize(), reference.weight(name)) for name in reference.linears]
        errors.append([float((w - original).norm() / original.norm()) for w, original in pairs])
        assert all(torch.equal(network.weight(n), p.dequantize()) for n, p in quantized.packed.items())
    for smaller, larger in zip(errors[1:], errors, strict=False):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
    assert max(errors[-1]) < 0.02 < min(errors[0])


def test_what_is_compensated_is_the_distance_to_the_original(small_llama: Callable[..., Network], run: Build) -> None:
    _, quantized = run(**LEARN, rank=64)
    reference = small_llama()
    for name, packed in quantized.packed.items():
        assert (packed.dequantize() - reference.weight(name)).norm() < 0.02 * reference.weight(name).norm()


def test_compensation_is_stored_in_8_bits(run: Build) -> None:
    plain, corrected = run(steps=0)[1], run(steps=0, rank=4)[1]
    for name, packed in corrected.packed.items():
        out, columns = packed.shape
        assert isinstance(packed.correction, PackedLowRank)
        extra = 8 * 4 * (out + columns) + 16 * (out + 4)
        assert packed.stored_bits() == plain.packed[name].stored_bits() + extra


def test_runs_with_one_seed_agree(run: Build) -> None:
    (first, _), (second, _) = run(steps=5, lr=2e-3), run(steps=5, lr=2e-3)
    assert all(torch.equal(first.weight(name), second.weight(name)) for name in first.linears)


def test_half_precision_learns_in_full(small_llama: Callable[..., Network], context: Build) -> None:
    network = small_llama()
    network.model.bfloat16()
    quantized = ZeroQuant(steps=5).quantize(context(network, BUDGET, statistics=False))
    assert all(value.dtype == torch.bfloat16 for value in quantized.parameters.values())
    assert all(packed.dequantize().isfinite().all() for packed in quantized.packed.values())


def test_bad_options_are_refused() -> None:
    for options, reason in (
        ({"input_bits": 1}, "outside 2 to 8"),
        ({"input_bits": 16}, "outside 2 to 8"),
        ({"lr": 0.0}, "positive lr"),
        ({"rank": -1}, "rank of 0"),
        ({"steps": -1}, "cannot learn"),
    ):
        with pytest.raises(ValueError, match=reason):
            ZeroQuant(**options)
