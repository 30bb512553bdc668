import pytest
import torch

from kernels.activations import TokenScale, integers, round_tokens
from kernels.linear import QuantLinear
from kernels.packed import PackedDense


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_token_is_rounded_to_its_own_symmetric_grid(bits: int) -> None:
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-3, 3, 15).view(3, 5, 1)
    rounded = round_tokens(x, bits)
    for token, result in zip(x.flatten(0, 1), rounded.flatten(0, 1), strict=True):
        step = float(token.abs().max()) / (2 ** (bits - 1) - 1)
        levels = result / step
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert float((result - token).abs().max()) <= step / 2 * (1 + 1e-5)
        assert int(levels.round().abs().max()) == 2 ** (bits - 1) - 1  # the largest magnitude is a grid point


def test_zero_tokens_stay_zero_and_the_dtype_stays() -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    assert torch.equal(round_tokens(x, 4), x)
    assert round_tokens(x + 1, 4).dtype == torch.bfloat16


def test_a_linear_rounds_its_input_only_when_told() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 16, generator=generator).half(), torch.randn(3, 16, generator=generator)
    expected = round_tokens(x, 4) @ weight.float().T
    torch.testing.assert_close(QuantLinear(PackedDense(weight), inputs=TokenScale(integers(4)))(x), expected)
    torch.testing.assert_close(QuantLinear(PackedDense(weight))(x), x @ weight.float().T)
    assert "int4" in repr(QuantLinear(PackedDense(weight), inputs=TokenScale(integers(4))))
