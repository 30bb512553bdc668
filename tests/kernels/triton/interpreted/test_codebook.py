from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor

from kernels.packed import Packed
from kernels.packed_codebook import PackedCodebook
from kernels.packing import pack
from kernels.triton import codebook
from kernels.triton.codebook import multiply, prepare, supports

HALF = 1e-3  # fp16 results
Error = Callable[[Tensor, Tensor], float]
Check = Callable[[ModuleType, Packed], None]


def random_packed(random: Generator, bits: int, columns: int) -> PackedCodebook:
    codes = torch.randint(2**bits, (70, columns), generator=random, dtype=torch.uint8)
    table = torch.randn(70, 2**bits, generator=random).half()
    return PackedCodebook(pack(codes, bits), table, bits=bits, shape=(70, columns))


@pytest.mark.parametrize("columns", [256, 300])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_product_equals_that_of_the_looked_up_matrix(
    random: Generator, error: Error, bits: int, columns: int
) -> None:
    packed = random_packed(random, bits, columns)
    x, bias = torch.randn(2, 3, columns, generator=random).half(), torch.randn(70, generator=random).half()
    assert supports(packed, x) is None
    truth = x.double() @ packed.dequantize().double().t() + bias.double()
    assert error(multiply(prepare(packed), x, bias), truth) < HALF


def test_a_sum_that_several_programs_share_and_many_tokens(random: Generator, check_shared: Check) -> None:
    check_shared(codebook, random_packed(random, 4, 768))


def test_what_is_not_supported_is_said(random: Generator) -> None:
    assert "16 bits" in str(supports(random_packed(random, 4, 128), torch.zeros(1, 128)))
    assert "only codebooks" in str(supports(random_packed(random, 5, 128), torch.zeros(1, 128).half()))
