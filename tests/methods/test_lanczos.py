from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from methods.network import Network
from methods.sensitivity.base import METRICS, Subject
from methods.sensitivity.hvp import diagonal_block, hessian, probe
from methods.sensitivity.lanczos import Lanczos, spectral_density, top_eigenvalues

TOKENS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subject(network: Network, tokens: Tensor = TOKENS, seed: int = 0) -> Subject:
    return Subject(network, tokens, tokens, (), lambda stat, linear: torch.empty(0), seed)


def matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors: fp64."""
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)).Q
    return basis @ eigenvalues.double().diag() @ basis.T


def by_magnitude(eigenvalues: Tensor) -> Tensor:
    return eigenvalues[eigenvalues.abs().argsort(descending=True)]


@pytest.mark.parametrize("count", [1, 3])
def test_it_is_the_sum_of_the_dense_eigenvalues_of_largest_magnitude(
    count: int, minute_llama: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor]
) -> None:
    score = METRICS["lanczos"](count=count, tolerance=1e-5)(subject(minute_llama))
    for name in minute_llama.linears:
        spectrum = torch.linalg.eigvalsh(dense_hessian(minute_llama, TOKENS, name))
        assert score.values[name] == pytest.approx(float(by_magnitude(spectrum)[:count].sum()), rel=1e-3)
        assert score.error[name] == 0


def test_known_spectra_keep_their_sign(quadratic: Callable[..., Network]) -> None:
    spectra = {"a": [200.0, 2.0, 7.0], "b": [3.0, -7.0], "both": [5.0, -5.0], "flat": [0.0, 0.0]}
    score = Lanczos()(subject(quadratic(spectra)))
    assert abs(score.values.pop("both")) == pytest.approx(5)
    assert score.values == pytest.approx({"a": 200, "b": -7, "flat": 0}, rel=1e-5)


def test_all_eigenvalues_together_are_the_trace(quadratic: Callable[..., Network]) -> None:
    score = Lanczos(count=3)(subject(quadratic({"a": [200.0, -2.0, 7.0]})))
    assert score.values["a"] == pytest.approx(205, rel=1e-5)


def test_top_eigenvalues_are_those_of_the_matrix_and_their_bounds_hold() -> None:
    a = matrix(torch.randn(80, generator=seeded(3)) ** 3)
    truth = by_magnitude(torch.linalg.eigvalsh(a))
    loose = top_eigenvalues(a.mv, a[0], 5, 0.1, 80, seeded(0))
    tight = top_eigenvalues(a.mv, a[0], 5, 1e-9, 80, seeded(0))
    assert loose.converged and tight.converged
    assert loose.products < tight.products <= 80
    assert max(loose.bounds) <= 0.1 * abs(loose.values[0])
    for value, bound in zip(loose.values, loose.bounds, strict=True):
        assert float((truth - value).abs().min()) <= bound
    assert tight.values == pytest.approx(truth[:5].tolist(), abs=1e-9)


def test_the_bound_is_the_residual() -> None:
    """In a Krylov space of one dimension, the Ritz vector is the start."""
    a = matrix(torch.randn(20, generator=seeded(3)))
    start = torch.randn(20, generator=seeded(0)).double()
    start /= start.norm()
    found = top_eigenvalues(a.mv, a[0], 1, 0, 1, seeded(0))
    assert found.values == pytest.approx([float(start @ a @ start)])
    assert found.bounds == pytest.approx([float((a @ start - found.values[0] * start).norm())])
    assert not found.converged


def test_close_eigenvalues_take_far_fewer_products_than_power_iteration() -> None:
    a = matrix(torch.linspace(0, 1, 200))
    found = top_eigenvalues(a.mv, a[0], 1, 1e-3, 200, seeded(0))
    vector = torch.randn(200, generator=seeded(0)).double()
    for _ in range(found.products):
        image = a @ vector
        rayleigh, vector = float(vector @ image / (vector @ vector)), image / image.norm()
    assert abs(found.values[0] - 1) < 1e-3 < 1e-2 < abs(rayleigh - 1)


def test_converged_eigenvalues_do_not_come_back() -> None:
    """What a Lanczos process without reorthogonalization would show: the largest eigenvalue several times."""
    a = matrix(torch.cat([torch.tensor([1000.0]), torch.linspace(0, 1, 59)])).float()
    found = top_eigenvalues(a.mv, a[0], 2, 0, 45, seeded(0))
    assert found.values == pytest.approx([1000, 1], rel=1e-3)


def test_an_exhausted_space_ends_the_process() -> None:
    a = matrix(torch.tensor([4.0, 4.0, -1.0, -1.0, -1.0, 0.0]))
    found = top_eigenvalues(a.mv, a[0], 5, 0, 6, seeded(0))
    assert found.values == pytest.approx([4, -1, 0], abs=1e-9)
    assert found.products == 3
    assert found.converged


def test_moments_of_a_probe_are_exact() -> None:
    """Gauss quadrature with m nodes integrates powers below 2m exactly: the moment is zᵀHᵖz."""
    a, steps = matrix(torch.randn(40, generator=seeded(3))), 4
    density = spectral_density(a.mv, a[0], 1, steps, seeded(5))
    z = probe(a[0], seeded(5))
    assert len(density.nodes) == steps
    for power in range(2 * steps):
        assert density.moment(power) == pytest.approx(float(z @ torch.matrix_power(a, power) @ z))
    assert density.moment(2 * steps) != pytest.approx(float(z @ torch.matrix_power(a, 2 * steps) @ z), rel=1e-3)


def test_moments_are_unbiased(minute_llama: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor]) -> None:
    for name in minute_llama.linears[::3]:
        dense = dense_hessian(minute_llama, TOKENS, name)
        with hessian(minute_llama, TOKENS, [name]) as product:
            operator, weight = diagonal_block(product, name), minute_llama.linear(name).weight
            densities = [spectral_density(operator, weight, 2, 4, seeded(seed)) for seed in range(12)]
        for power, truth in ((1, dense.trace()), (2, dense.square().sum())):
            moments = [density.moment(power) for density in densities]
            assert abs(fmean(moments) - float(truth)) < 4 * stdev(moments) / len(moments) ** 0.5
        assert all(density.moment(0) == pytest.approx(len(dense)) for density in densities)


def test_the_curve_is_a_density_with_the_right_trace() -> None:
    eigenvalues = torch.tensor([-2.0, 0.0, 1.0, 5.0])
    a = matrix(eigenvalues)
    density = spectral_density(a.mv, a[0], 3, 10, seeded(0))
    grid = torch.linspace(-4, 7, 2201, dtype=torch.float64)
    curve = density.curve(grid, sigma=0.1)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1)
    assert 4 * float(torch.trapezoid(grid * curve, grid)) == pytest.approx(density.moment(1))
    peaks = grid[1:-1][(curve[1:-1] > curve[:-2]) & (curve[1:-1] > curve[2:])]
    assert peaks.tolist() == pytest.approx(eigenvalues.tolist(), abs=0.01)


def test_products_are_counted_and_limited(minute_llama: Network) -> None:
    runs = [Lanczos(tolerance=0, max_products=n)(subject(minute_llama)) for n in (1, 2, 5, 10)]
    assert [run.cost.passes for run in runs] == [2 + n * len(minute_llama.linears) for n in (1, 2, 5, 10)]
    assert Lanczos(tolerance=1e9)(subject(minute_llama)).cost.passes == 2 + len(minute_llama.linears)
    for name in minute_llama.linears:
        assert all(abs(b.values[name]) >= abs(a.values[name]) * (1 - 1e-5) for a, b in pairwise(runs))


def test_only_the_chosen_tokens_count(minute_llama: Network) -> None:
    metric = Lanczos(max_products=3, sequences=1, context=5)
    changed = TOKENS.clone()
    changed[1:], changed[:, 5:] = 0, 0
    assert metric(subject(minute_llama)).values == metric(subject(minute_llama, changed)).values


def test_senseless_options_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Lanczos(count=0)
