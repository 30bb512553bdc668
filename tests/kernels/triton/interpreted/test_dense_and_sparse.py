from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from kernels.packed import Packed, PackedInteger
from kernels.packed_codebook import PackedCodebook
from kernels.packed_sum import PackedSparse, PackedSum
from kernels.packing import pack
from kernels.triton.dense_and_sparse import multiply, prepare, sparse_product, supports

HALF = 1e-3  # fp16 results
Error = Callable[[Tensor, Tensor], float]


def random_sum(random: Generator, kind: str, density: float) -> PackedSum:
    codes = torch.randint(8, (70, 300), generator=random, dtype=torch.uint8)
    base: Packed = PackedCodebook(pack(codes, 3), torch.randn(70, 8, generator=random).half(), bits=3, shape=(70, 300))
    if kind == "integers":
        scale = (torch.rand(70, 3, generator=random) * 0.02 + 0.005).half()
        base = PackedInteger(pack(codes, 3), scale, None, bits=3, shape=(70, 300), group_size=128)
    mask = torch.rand(70, 300, generator=random) < density
    mask[3], mask[4] = False, True  # rows of none, and of more than a program takes at once
    return PackedSum(base, PackedSparse.of(torch.randn(70, 300, generator=random), mask))


@pytest.mark.parametrize("kind", ["integers", "codebook"])
@pytest.mark.parametrize("tokens", [3, 17, 300])
def test_a_product_equals_that_of_the_sum(random: Generator, error: Error, kind: str, tokens: int) -> None:
    packed, x = random_sum(random, kind, 0.02), torch.randn(tokens, 300, generator=random).half()
    bias = torch.randn(70, generator=random).half()
    assert supports(packed, x) is None
    truth = x.double() @ packed.dequantize().double().t() + bias.double()
    assert error(multiply(prepare(packed), x, bias), truth) < (HALF if tokens < 300 else 2 * HALF)


def test_the_sparse_part_alone(random: Generator, error: Error) -> None:
    sparse = random_sum(random, "integers", 0.5).correction
    assert isinstance(sparse, PackedSparse)
    x = torch.randn(2, 300, generator=random).half()
    assert error(sparse_product(sparse, x, None), x.double() @ sparse.dequantize().double().t()) < 1e-6


def test_what_is_not_supported_is_said(random: Generator) -> None:
    packed = random_sum(random, "codebook", 0.1)
    assert "16 bits" in str(supports(packed, torch.zeros(1, 300)))
    assert "sums of codes" in str(supports(packed.base, torch.zeros(1, 300).half()))
