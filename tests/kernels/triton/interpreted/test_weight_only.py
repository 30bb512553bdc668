from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from kernels.packed import PackedInteger
from kernels.packed_affine import PackedAffine
from kernels.packing import pack
from kernels.triton.launch import Regime
from kernels.triton.weight_only import REGIMES, add_multiplied, decoded, multiply, prepare, supports

HALF = 1e-3  # fp16 results
SMALL = Regime(16, 16, 64, 4, 2)
Error = Callable[[Tensor, Tensor], float]


def random_packed(
    random: Generator, bits: int, rows: int, columns: int, group: int, zeros: str = "integer", act_order: bool = False
) -> PackedInteger:
    groups = -(-columns // group)
    codes = torch.randint(2**bits, (rows, columns), generator=random, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=random) * 0.02 + 0.005).half()
    index = torch.arange(columns)[torch.randperm(columns, generator=random)] // group if act_order else None
    options = {"bits": bits, "shape": (rows, columns), "group_size": group}
    if zeros == "real":
        zero = torch.rand(rows, groups, generator=random).mul_(2**bits).half()
        return PackedAffine(pack(codes, bits), scale, zero, group_index=index, **options)
    zero = torch.randint(2**bits, (1, rows * groups), generator=random, dtype=torch.uint8)
    stored = pack(zero, bits) if zeros == "integer" else None
    return PackedInteger(pack(codes, bits), scale, stored, group_index=index, **options)


@pytest.mark.parametrize(
    ("bits", "columns", "group"),
    [
        (2, 256, 128), (2, 200, 64), (2, 128, 32), (3, 512, 128), (3, 300, 64), (3, 256, 32), (4, 512, 128),
        (4, 384, 64), (4, 130, 128), (4, 160, 32), (8, 256, 128), (8, 128, 32), (8, 72, 64), (4, 768, 256),
        (3, 768, 384), (2, 512, 512), (3, 90, 1000), (8, 300, 300), (4, 144, 48),
    ],
)  # fmt: skip
def test_a_product_equals_that_of_the_dequantized_matrix(
    random: Generator, error: Error, bits: int, columns: int, group: int
) -> None:
    packed = random_packed(random, bits, 70, columns, group)
    x = torch.randn(5, columns, generator=random).half()
    bias = torch.randn(70, generator=random).half()
    assert supports(packed, x) is None
    result = add_multiplied(prepare(packed), x, bias.expand(1, -1), SMALL)
    truth = x.double() @ packed.dequantize().double().t() + bias.double()
    assert result.dtype == torch.float16
    assert error(result, truth) < HALF


@pytest.mark.parametrize("zeros", ["none", "real"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_and_real_zeros(random: Generator, error: Error, bits: int, zeros: str) -> None:
    packed = random_packed(random, bits, 64, 256, 128, zeros)
    x = torch.randn(3, 256, generator=random).half()
    assert error(add_multiplied(prepare(packed), x, None, SMALL), x.double() @ packed.dequantize().double().t()) < HALF


def test_groups_whose_columns_are_not_neighbours(random: Generator, error: Error) -> None:
    packed = random_packed(random, 4, 64, 320, 64, act_order=True)
    x = torch.randn(3, 320, generator=random).half()
    truth = x.double() @ packed.dequantize().double().t()
    assert error(add_multiplied(prepare(packed), x, None, SMALL), truth) < HALF
    assert error(decoded(prepare(packed), torch.float32), packed.dequantize().double()) < 1e-6


def test_a_sum_that_several_programs_share(random: Generator, error: Error) -> None:
    packed = random_packed(random, 4, 66, 1024, 128)
    prepared, x = prepare(packed), torch.randn(17, 1024, generator=random).half()
    truth = x.double() @ packed.dequantize().double().t()
    for split in (3, 4):  # 4 blocks: one program gets two
        for _ in range(2):  # the second call finds the counters as the first left them
            assert error(add_multiplied(prepared, x, None, SMALL, split), truth) < HALF
    assert not prepared.arrived.any()


def test_any_shape_of_input_and_an_addend_for_each_token(random: Generator, error: Error) -> None:
    packed = random_packed(random, 4, 20, 128, 128)
    x, bias = torch.randn(2, 3, 128, generator=random).half(), torch.randn(20, generator=random).half()
    truth = x.double() @ packed.dequantize().double().t()
    result = multiply(prepare(packed), x, bias)
    assert result.shape == (2, 3, 20)
    assert error(result, truth + bias.double()) < HALF
    addend = torch.randn(6, 20, generator=random)
    result = add_multiplied(prepare(packed), x.view(6, 128), addend, SMALL)
    assert error(result, truth.view(6, 20) + addend.double()) < HALF


@pytest.mark.parametrize("size", [1e-7, 1e-4, 6e4])
def test_small_and_large_activations_keep_their_precision(random: Generator, error: Error, size: float) -> None:
    packed = random_packed(random, 2, 64, 256, 128)
    x = ((torch.rand(2, 256, generator=random) - 0.5) * size).half()
    prepared = prepare(packed)
    result = add_multiplied(prepared, x, torch.zeros(1, 64), SMALL)
    truth = x.double() @ packed.dequantize().double().t()
    assert float((result.double() - truth).abs().max()) < max(2e-3 * float(truth.abs().max()), 2**-24)


def test_zeros_and_numbers_that_are_none(random: Generator) -> None:
    prepared = prepare(random_packed(random, 4, 64, 256, 128))
    x = torch.zeros(3, 256).half()
    assert not add_multiplied(prepared, x, None, SMALL).any()
    x[1, 7], x[2, 200] = torch.nan, torch.inf
    result = add_multiplied(prepared, x, None, SMALL)
    assert not result[0].any()
    assert not result[1:].isfinite().any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_decoded_matrix_for_many_tokens(random: Generator, error: Error, bits: int) -> None:
    packed = random_packed(random, bits, 33, 320, 64)
    assert error(decoded(prepare(packed), torch.float32), packed.dequantize().double()) < 1e-6
    x = torch.randn(REGIMES[-1].limit + 1, 320, generator=random).half()
    truth = x.double() @ packed.dequantize().double().t()
    assert error(multiply(prepare(packed), x), truth) < HALF


def test_what_is_stored_is_bits_and_pairs(random: Generator) -> None:
    for bits in (2, 3, 4, 8):
        prepared = prepare(random_packed(random, bits, 128, 512, 128))
        assert 8 * prepared.words.nbytes == 128 * 512 * bits
        assert prepared.pairs.nbytes == 4 * 128 * 4


def test_what_is_not_supported_is_said(random: Generator) -> None:
    packed = random_packed(random, 4, 8, 256, 128)
    assert "16 bits" in str(supports(packed, torch.zeros(1, 256)))
    assert "integers of" in str(supports(random_packed(random, 5, 8, 256, 128), torch.zeros(1, 256).half()))
    assert "do not fit" in str(supports(random_packed(random, 4, 8, 256, 40), torch.zeros(1, 256).half()))
