import pytest
import torch
from torch import Tensor

from kernels.activations import ExceptOutliers, StaticScale, TensorScale, TokenScale, integers, round_tokens
from kernels.linear import Inputs, QuantLinear
from kernels.minifloat import E4M3
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


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_scale_for_the_tensor_or_one_from_calibration() -> None:
    x = gaussian(3, 5, 40) * torch.logspace(-2, 2, 5).view(1, 5, 1)
    largest = float(x.abs().max())
    for rounding in (TensorScale(integers(8)), StaticScale(integers(8), largest)):
        levels = rounding(x) / (largest / 127)
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert int(levels.round().abs().max()) == 127
    assert (TokenScale(integers(8))(x) - x).norm() < 0.7 * (TensorScale(integers(8))(x) - x).norm()


def test_what_exceeds_a_static_range_saturates_and_the_range_does_not_move() -> None:
    rounding = StaticScale(integers(8), 2.54)  # a step of 0.02
    x = torch.tensor([[0.031, -100.0, 5.0, 0.0]])
    torch.testing.assert_close(rounding(x), torch.tensor([[0.04, -2.54, 2.54, 0.0]]))
    torch.testing.assert_close(rounding(x[:, :1]), torch.tensor([[0.04]]))
    with pytest.raises(ValueError, match="positive maximum, not 0"):
        StaticScale(integers(8), 0.0)


def test_floats_keep_their_relative_precision_below_the_largest() -> None:
    x = gaussian(8, 64) * torch.logspace(-3, 3, 8).unsqueeze(1)
    rounded = TokenScale(E4M3)(x)
    reference = torch.stack([(token * (448 / token.abs().max())).to(torch.float8_e4m3fn).float() for token in x])
    torch.testing.assert_close(rounded / (x.abs().amax(1, True) / 448), reference)


def test_columns_with_outliers_stay_and_do_not_stretch_the_others() -> None:
    x = gaussian(2, 6, 16).clamp(-5, 5)
    x[1, 3, 4] = -6.0  # at the threshold, in one token of one sequence
    rounded = ExceptOutliers(TokenScale(integers(8)), 6.0)(x)
    others = [column for column in range(16) if column != 4]
    assert torch.equal(rounded[..., 4], x[..., 4])
    assert torch.equal(rounded[..., others], round_tokens(x[..., others], 8))
    assert not torch.equal(rounded[..., others], x[..., others])


def test_extreme_thresholds_take_all_columns_or_none() -> None:
    x = 10 * gaussian(5, 16)
    assert torch.equal(ExceptOutliers(TokenScale(integers(8)), 0.0)(x), x)
    assert torch.equal(ExceptOutliers(TokenScale(integers(8)), 1e9)(x), round_tokens(x, 8))


@pytest.mark.parametrize(
    "rounding",
    [
        TokenScale(integers(8)),
        TensorScale(integers(8)),
        StaticScale(E4M3, 3.0),
        ExceptOutliers(TokenScale(integers(8)), 6.0),
    ],
)
def test_no_tokens_and_zero_tokens_are_no_exception(rounding: Inputs) -> None:
    assert rounding(torch.empty(0, 8)).shape == (0, 8)
    assert not rounding(torch.zeros(2, 8)).any()
    assert rounding(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
