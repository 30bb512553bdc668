import logging
from collections.abc import Callable
from statistics import fmean, stdev, variance

import pytest
import torch
from torch import Tensor

from methods.network import Network
from methods.sensitivity.base import METRICS, Subject
from methods.sensitivity.hutchpp import HutchPlusPlus, trace
from methods.sensitivity.hvp import probe

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


def hutchinson(a: Tensor, products: int, seed: int) -> float:
    probes = [probe(a[0], generator) for generator in [seeded(seed)] for _ in range(products)]
    return fmean(float(z @ a @ z) for z in probes)


DECAYING = matrix(100 * 0.5 ** torch.arange(60))
FLAT = matrix(torch.tensor([1.0, -1.0, 1.0]).repeat(20))


@pytest.mark.parametrize("a", [DECAYING, FLAT])
def test_estimates_are_unbiased_and_their_errors_honest(a: Tensor) -> None:
    runs = [trace(a.mv, a[0], 9, seeded(seed)) for seed in range(200)]
    estimates = [found.value for found in runs]
    assert abs(fmean(estimates) - float(a.trace())) < 4 * stdev(estimates) / len(runs) ** 0.5
    # The mean of squared standard errors is the variance, given the subspace; and so on average over subspaces.
    assert fmean(found.error**2 for found in runs) == pytest.approx(variance(estimates), rel=0.4)


def test_estimates_of_the_hessian_are_unbiased(
    minute_llama: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor]
) -> None:
    runs = [METRICS["hutchpp"](products=6)(subject(minute_llama, seed=seed)) for seed in range(12)]
    for name in minute_llama.linears:
        truth = float(dense_hessian(minute_llama, TOKENS, name).trace())
        estimates = [run.values[name] for run in runs]
        assert abs(fmean(estimates) - truth) < 4 * stdev(estimates) / len(runs) ** 0.5


def test_it_beats_hutchinson_where_the_spectrum_decays_and_loses_where_it_is_flat() -> None:
    for a, better in ((DECAYING, True), (FLAT, False)):
        ours = variance([trace(a.mv, a[0], 24, seeded(seed)).value for seed in range(100)])
        plain = variance([hutchinson(a, 24, seed) for seed in range(100)])
        assert ours < plain / 100 if better else ours > 1.5 * plain


def test_low_rank_is_exact() -> None:
    a = matrix(torch.cat([torch.tensor([50.0, -20.0, 3.0]), torch.zeros(37)]))
    for seed in range(5):
        found = trace(a.mv, a[0], 10, seeded(seed))
        value, error = found.value, found.error
        assert value == pytest.approx(33)
        assert error < 1e-10


def test_a_third_of_the_products_finds_the_subspace() -> None:
    a = matrix(torch.cat([torch.tensor([50.0, -20.0, 3.0, 1.0]), torch.zeros(36)]))
    assert trace(a.mv, a[0], 11, seeded(0)).error > 1e-3
    assert trace(a.mv, a[0], 12, seeded(0)).error < 1e-10


@pytest.mark.parametrize("products", [4, 5, 10, 30])
def test_no_more_products_than_agreed(products: int) -> None:
    taken = []

    def operator(vector: Tensor) -> Tensor:
        taken.append(vector)
        return DECAYING @ vector

    trace(operator, DECAYING[0], products, seeded(0))
    assert len(taken) == products


def test_products_are_counted(minute_llama: Network) -> None:
    score = HutchPlusPlus(products=5)(subject(minute_llama))
    assert score.cost.passes == 2 + 5 * len(minute_llama.linears)


def test_small_matrices_are_exact_and_negative_traces_reported(
    quadratic: Callable[..., Network], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        score = HutchPlusPlus()(subject(quadratic({"fine": [1.0, 2.0], "bad": [3.0, -7.0], "flat": [0.0, 0.0]})))
    assert score.values == pytest.approx({"fine": 3, "bad": -4, "flat": 0}, abs=1e-5)
    assert max(score.error.values()) < 1e-6
    assert "1 of 3 Hessian traces are negative: bad" in caplog.text


def test_only_the_chosen_tokens_count(minute_llama: Network) -> None:
    metric = HutchPlusPlus(products=4, sequences=1, context=5)
    changed = TOKENS.clone()
    changed[1:], changed[:, 5:] = 0, 0
    assert metric(subject(minute_llama)).values == metric(subject(minute_llama, changed)).values


def test_senseless_options_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 products"):
        HutchPlusPlus(products=3)


def test_probes_end_at_the_tolerance_and_not_before_it() -> None:
    full = trace(FLAT.mv, FLAT[0], 300, seeded(0))
    early = trace(FLAT.mv, FLAT[0], 300, seeded(0), tolerance=2 * full.error / abs(full.value))
    assert early.products < full.products == 2 * 60 + 180
    assert early.error <= 2 * full.error / abs(full.value) * abs(early.value)
    hopeless = trace(FLAT.mv, FLAT[0], 60, seeded(0), tolerance=1e-9)
    assert hopeless.products == 60


def test_passes_follow_the_products_taken(minute_llama: Network) -> None:
    calls = 0

    def counted(vector: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return DECAYING @ vector

    assert trace(counted, DECAYING[0], 30, seeded(0), tolerance=0.5).products == calls < 30
    eager = METRICS["hutchpp"](products=30, tolerance=10.0)(subject(minute_llama))
    patient = METRICS["hutchpp"](products=30, tolerance=0.0)(subject(minute_llama))
    linears = len(minute_llama.linears)
    assert patient.cost.passes == 2 + 30 * linears
    assert eager.cost.passes == 2 + 24 * linears  # 20 for the subspace and 4 probes
