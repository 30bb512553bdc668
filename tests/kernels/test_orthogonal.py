import pytest
import torch
from torch import Tensor

from kernels.orthogonal import KINDS, Kronecker, Orthogonal, random_orthogonal

SIZES = (1, 2, 7, 12, 36, 64, 172, 688)
RANDOM = ("kronecker", "hadamard")


def dense(matrix: Orthogonal, size: int) -> Tensor:
    """Q [n, n], fp64: its columns are the products with unit vectors."""
    return matrix(torch.eye(size, dtype=torch.float64)).t()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_matrix_and_inverse_are_orthogonal(kind: str, size: int) -> None:
    matrix = random_orthogonal(kind, size, 3)
    q = dense(matrix, size)
    torch.testing.assert_close(q.t() @ q, torch.eye(size).double(), atol=1e-5, rtol=0)
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix(x), x @ q.t().float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix.inverse(x), x @ q.float(), atol=1e-5, rtol=1e-5)
    assert matrix(x[:0]).shape == (0, 3, size)


def test_kronecker_equals_the_dense_product() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = tuple(torch.randn(n, n, generator=generator).double() for n in (3, 2, 4))
    expected = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    torch.testing.assert_close(dense(Kronecker(factors), 24), expected)
    torch.testing.assert_close(Kronecker(factors).inverse(torch.eye(24).double()).t(), expected.t())


@pytest.mark.parametrize(("kind", "orders"), [("kronecker", (43, 16)), ("hadamard", (4, 4, 43))])
def test_factors_are_small(kind: str, orders: tuple[int, ...]) -> None:
    steps = random_orthogonal(kind, 688, 0).steps  # type: ignore[attr-defined]
    (kronecker,) = [step for step in steps if isinstance(step, Kronecker)]
    assert tuple(map(len, kronecker.factors)) == orders


@pytest.mark.parametrize("size", [2, 8, 32])
def test_hadamard_of_a_power_of_two_is_a_signed_hadamard_matrix(size: int) -> None:
    q = dense(random_orthogonal("hadamard", size, 1), size) * size**0.5
    torch.testing.assert_close(q.abs(), torch.ones(size, size).double())
    signs = q[0]  # row 0 of Sylvester's matrix is all ones
    q = q * signs
    parity = torch.tensor([[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)])
    torch.testing.assert_close(q, 1.0 - 2 * parity.double())


@pytest.mark.parametrize("kind", RANDOM)
def test_a_seed_determines_the_matrix(kind: str) -> None:
    first, again, other = (dense(random_orthogonal(kind, 36, seed), 36) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_signs_of_a_hadamard_transform_are_random() -> None:
    first, other = (dense(random_orthogonal("hadamard", 64, seed), 64) for seed in (5, 6))
    assert 16 < int((first[0] != other[0]).sum()) < 48


@pytest.mark.parametrize("kind", RANDOM)
def test_an_outlier_spreads_over_all_elements(kind: str) -> None:
    spike = torch.zeros(688)
    spike[123] = 1
    largest = [float(random_orthogonal(kind, 688, seed)(spike).abs().max()) for seed in range(20)]
    # 688 Gaussian numbers of variance 1/688 have a maximum of 0.13; products of two have heavier tails.
    assert sum(largest) / 20 < 0.3


def test_entries_of_random_factors_are_symmetric_around_zero() -> None:
    """Without positive diagonals of R the signs of a QR factorization are not random."""
    corners = torch.stack([dense(random_orthogonal("kronecker", 3, seed), 3).flatten() for seed in range(2000)])
    assert float(corners.mean(0).abs().max()) < 5 / (3 * 2000) ** 0.5


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kronecker, hadamard"):
        random_orthogonal("fourier", 4, 0)
