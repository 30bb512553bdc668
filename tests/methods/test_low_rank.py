import pytest
import torch
from torch import Tensor

from methods.low_rank import factors, low_rank, packed_product

SHAPES = [(24, 40), (40, 24), (24, 24)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(out: int, columns: int) -> Tensor:
    """Singular values 1, 0.8, 0.64, …"""
    u, _, v = torch.linalg.svd(random(out, columns), full_matrices=False)
    return u * 0.8 ** torch.arange(min(out, columns)) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_error_is_that_of_eckart_and_young(shape: tuple[int, int], rank: int) -> None:
    for residual in (random(*shape), decaying(*shape)):
        left, right = factors(residual, rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        rest = torch.linalg.svdvals(residual.double())[rank:].square().sum()
        error = (residual - left @ right).double().square().sum()
        torch.testing.assert_close(error, rest, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_singular_values_are_shared_equally(shape: tuple[int, int]) -> None:
    residual = decaying(*shape)
    left, right = factors(residual, 4)
    expected = torch.diag(torch.linalg.svdvals(residual)[:4])
    torch.testing.assert_close(left.T @ left, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(right @ right.T, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_residual_back_to_the_precision_of_the_factors(shape: tuple[int, int]) -> None:
    residual = random(*shape)
    for width, tolerance in ((16, 1e-3), (8, 2e-2)):
        restored = low_rank(residual, 24, width).dequantize()
        assert (restored - residual).norm() < tolerance * residual.norm()


def test_the_error_falls_with_the_rank() -> None:
    residual = random(48, 64)
    for width in (8, 16):
        errors = [float((low_rank(residual, r, width).dequantize() - residual).norm()) for r in (1, 2, 4, 8, 16, 32)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 2


def test_integer_factors_are_within_half_a_step_of_the_exact_ones() -> None:
    left, right = factors(random(24, 40), 6)
    packed = packed_product(left, right)
    for exact, stored in ((left, packed.left), (right, packed.right)):
        step = 2 * exact.abs().amax(1, keepdim=True) / 255  # and what 127 steps lose by a scale in fp16
        assert ((stored.dequantize() - exact).abs() <= (0.5 + 127 * 2**-11) * step).all()


def test_stored_bits_are_those_of_both_factors_and_their_scales() -> None:
    out, columns, rank = 24, 40, 4
    assert low_rank(random(out, columns), rank, 16).stored_bits() == 16 * rank * (out + columns)
    codes, scales = 8 * rank * (out + columns), 16 * (out + rank)
    assert low_rank(random(out, columns), rank).stored_bits() == codes + scales
    assert low_rank(random(out, columns), 4, 4).stored_bits() == codes // 2 + scales


def test_a_rank_beyond_the_matrix_is_not_stored() -> None:
    residual = random(6, 10)
    assert low_rank(residual, 100).stored_bits() == low_rank(residual, 6).stored_bits()


def test_multiplication_by_the_packed_product() -> None:
    packed, x = low_rank(random(24, 40), 5), random(3, 7, 40, seed=1)
    torch.testing.assert_close(packed(x), x @ packed.dequantize().T, atol=1e-4, rtol=1e-4)


def test_a_residual_of_lower_rank_needs_no_more() -> None:
    residual = 1e-4 * random(24, 1) @ random(1, 40)
    for rank in (1, 3):
        left, right = factors(residual, rank)
        torch.testing.assert_close(left @ right, residual, rtol=1e-4, atol=1e-10)
    assert torch.equal(low_rank(torch.zeros(8, 12), 3).dequantize(), torch.zeros(8, 12))


def test_what_has_no_approximation_is_refused() -> None:
    with pytest.raises(ValueError, match="rank of 1 or more"):
        low_rank(random(4, 4), 0)
    with pytest.raises(FloatingPointError, match="not finite"):
        low_rank(torch.full((4, 4), torch.inf), 1)
