import pytest
import torch
from torch import Generator

from kernels.activations import TensorScale, TokenScale, integers
from kernels.packed import PackedDense, PackedInteger
from kernels.packing import pack
from kernels.triton.linear import _prepared, multiply, refuses


@pytest.mark.parametrize("inputs", [None, TokenScale(integers(8)), TensorScale(integers(8))])
def test_the_kernel_does_what_the_layer_does(random: Generator, inputs: TokenScale | TensorScale | None) -> None:
    codes = torch.randint(256, (40, 128), generator=random, dtype=torch.uint8)
    scale = torch.full((40, 1), 0.01).half()
    packed = PackedInteger(pack(codes, 8), scale, None, bits=8, shape=(40, 128), group_size=128)
    x = torch.randn(2, 128, generator=random).half()
    rounded = x if inputs is None else inputs(x.float())
    expected = rounded.double() @ packed.dequantize().double().t()
    for _ in range(2):
        result = multiply(packed, x, None, inputs)
        assert float((result.double() - expected).norm() / expected.norm()) < 1e-3
    assert len(_prepared[packed]) == 1


def test_a_refusal_has_a_reason() -> None:
    dense, x = PackedDense(torch.zeros(4, 4).half()), torch.zeros(1, 4).half()
    assert "only integers" in str(refuses(dense, x))
    assert "no tokens" in str(refuses(dense, x[:0]))
    with pytest.raises(ValueError, match="no Triton kernel multiplies with this PackedDense"):
        multiply(dense, x)
