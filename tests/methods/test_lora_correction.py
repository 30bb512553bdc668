from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from methods.formats.integer import Integer
from methods.lora_correction import Corrected, corrected, low_rank_factors
from methods.rounding.nearest import round_to_nearest

OUT, COLUMNS, SAMPLES = 20, 32, 50


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [out, in], inputs [samples, in] of uneven energies, and their mean Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, COLUMNS, generator=generator) * torch.exp(torch.randn(COLUMNS, generator=generator))
    return torch.randn(OUT, COLUMNS, generator=generator), x, x.T @ x / SAMPLES


def objective(delta: Tensor, x: Tensor) -> float:
    """Both terms, written as the stacked system that NNCF solves."""
    stacked = torch.cat([torch.eye(COLUMNS), x]).double()
    return float((stacked @ delta.double().T).square().sum())


def alternated(residual: Tensor, x: Tensor, rank: int, steps: int) -> Tensor:
    """NNCF's refinement: from the decomposition of the weighted residual, the best factor for the other in turn."""
    stacked = torch.cat([torch.eye(COLUMNS), x]).double()
    wanted = residual.double().T  # [in, out]
    u = torch.linalg.svd(x.abs().amax(0).double().unsqueeze(1) * wanted, full_matrices=False).U[:, :rank]
    for _ in range(steps):
        v = torch.linalg.lstsq(stacked @ u, stacked @ wanted, driver="gelsd").solution
        u = torch.linalg.lstsq(stacked, stacked @ wanted @ torch.linalg.pinv(v), driver="gelsd").solution
    return (u @ v).T.float()


def product(residual: Tensor, gram: Tensor, rank: int) -> Tensor:
    left, right = low_rank_factors(residual, gram, SAMPLES, rank)
    assert left.shape == (OUT, min(rank, OUT))
    assert right.shape == (min(rank, OUT), COLUMNS)
    return left @ right


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_it_is_the_limit_of_the_published_refinement(rank: int) -> None:
    residual, x, gram = layer()
    optimum = product(residual, gram, rank)
    best = objective(optimum - residual, x)
    assert best <= objective(alternated(residual, x, rank, 3) - residual, x) * (1 + 1e-5)
    limit = alternated(residual, x, rank, 2000)
    assert best == pytest.approx(objective(limit - residual, x), rel=1e-4)
    torch.testing.assert_close(optimum, limit, atol=1e-2, rtol=1e-2)


def test_no_small_change_of_a_factor_is_better() -> None:
    residual, x, gram = layer()
    left, right = low_rank_factors(residual, gram, SAMPLES, 3)
    best = objective(left @ right - residual, x)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = left + 0.01 * torch.randn(left.shape, generator=generator)
        assert objective(other @ right - residual, x) > best


def test_the_error_falls_with_the_rank_to_zero() -> None:
    residual, x, gram = layer()
    errors = [objective(product(residual, gram, rank) - residual, x) for rank in range(1, OUT + 1)]
    assert all(b < a for a, b in pairwise(errors))
    torch.testing.assert_close(product(residual, gram, OUT), residual, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product(residual, gram, 10 * OUT), residual, atol=1e-4, rtol=1e-4)


def test_no_more_than_128_samples_count() -> None:
    residual, _, gram = layer()
    few, many, more = (low_rank_factors(residual, gram, n, 2)[1] for n in (1, 128, 1000))
    assert torch.equal(many, more)
    assert not torch.allclose(few, many, rtol=1e-2)


def test_the_packed_sum_is_closer_by_what_its_rank_allows() -> None:
    weight, x, gram = layer()
    base = round_to_nearest(weight, Integer(2, 16))
    before = objective(base.weight - weight, x)
    errors = []
    for rank in (1, 4, 16, OUT):
        packed = corrected(base.packed, weight, gram, SAMPLES, rank)
        errors.append(objective(packed.dequantize() - weight, x))
        exact = objective(product(weight - base.weight, gram, rank) - (weight - base.weight), x)
        assert errors[-1] <= exact + 0.02 * before  # INT8 adapters
        assert packed.stored_bits() == Corrected(Integer(2, 16), rank).stored_bits((OUT, COLUMNS))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.95 * before
    assert errors[-1] < 0.01 * before


def test_the_format_counts_the_adapters() -> None:
    base, rank = Integer(4, 16), 8
    extra = Corrected(base, rank).stored_bits((OUT, COLUMNS)) - base.stored_bits((OUT, COLUMNS))
    assert extra == 8 * rank * (OUT + COLUMNS) + 24 * (OUT + rank)  # codes; fp16 scale and 8-bit zero of each row
    assert Corrected(base, rank).name == "int4-g16-lora8"
    assert Corrected(base, rank).bits == 4
    with pytest.raises(ValueError, match="rank 0"):
        Corrected(base, 0)


def test_what_rounding_left_right_needs_no_correction() -> None:
    weight, _, gram = layer()
    base = round_to_nearest(weight, Integer(4, 16))
    packed = corrected(base.packed, base.weight, gram, SAMPLES, 2)
    torch.testing.assert_close(packed.dequantize(), base.weight, atol=1e-4, rtol=0)


def test_inputs_that_overflow_are_told() -> None:
    residual, _, gram = layer()
    gram[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="fp32"):
        low_rank_factors(residual, gram, SAMPLES, 2)
