from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methods.base import Budget, Context
from methods.formats.affine import Affine, nearest_codes
from methods.formats.integer import Integer
from methods.hqq import HQQ, HalfQuadratic, shrink, steps_missed, zero_step
from methods.network import Network
from methods.rounding.gptq import GPTQRounding

BETA, P = 10.0, 0.7
THRESHOLD = BETA ** (-1 / (2 - P))


def heavy(out: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, columns, generator=generator) / torch.rand(out, columns, generator=generator).sqrt()


def h(x: Tensor, beta: float = BETA, p: float = P) -> Tensor:
    """Quadratic up to the threshold, a power beyond; continuous."""
    t = beta ** (-1 / (2 - p))
    return torch.where(x.abs() <= t, beta / 2 * x**2, (x.abs() ** p - t**p) / p + beta / 2 * t**2)


@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_shrinking_with_p_1_is_soft_thresholding(beta: float) -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    e = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    best = (e.abs()[:, None] + beta / 2 * (e[:, None] - x) ** 2).argmin(0)
    torch.testing.assert_close(shrink(x, beta, 1.0), e[best], rtol=0, atol=1e-3)


@pytest.mark.parametrize("beta", [2.0, 10.0])
@pytest.mark.parametrize("p", [0.4, 0.7, 1.0])
def test_shrinking_solves_its_scalar_problem(beta: float, p: float) -> None:
    """The penalty whose envelope is h, by brute force, and then the problem with that penalty, by brute force."""
    x = torch.linspace(-3, 3, 3001, dtype=torch.float64)
    e = torch.linspace(-2, 2, 2001, dtype=torch.float64)
    quadratic = beta / 2 * (e[:, None] - x) ** 2  # [e, x]
    penalty = (h(x, beta, p) - quadratic).amax(1)
    energy = penalty[:, None] + quadratic
    inner = x.abs() < 1.5
    torch.testing.assert_close(energy.amin(0)[inner], h(x, beta, p)[inner], rtol=1e-3, atol=1e-3)
    chosen = shrink(x, beta, p)
    attained = torch.stack([energy[(e - c).abs().argmin(), i] for i, c in enumerate(chosen)])
    assert (attained[inner] <= energy.amin(0)[inner] + 1e-3).all()
    assert penalty.argmin() == 1000 and penalty[1000].abs() < 1e-6


def test_shrinking_is_odd_and_kills_what_is_below_the_threshold() -> None:
    x = torch.linspace(0, 1, 1001)
    kept = shrink(x, BETA, P)
    assert torch.equal(kept == 0, x < THRESHOLD)
    assert torch.equal(shrink(-x, BETA, P), -kept)
    assert (kept.diff() >= 0).all() and (kept <= x).all()


@pytest.mark.parametrize("size", [0.01, 3.0])
def test_the_zero_step_minimizes_the_quadratic_term(size: float) -> None:
    weight = size * heavy(3, 32)
    scale, zero = (t.unsqueeze(-1) for t in Affine(2).scale_and_zero(weight))
    codes = nearest_codes(weight, scale, zero, 2)
    error = weight - (codes - zero) * scale
    found = zero_step(error / scale, scale, zero, BETA, P)
    grid = found + torch.linspace(-1, 1, 2001)
    given = shrink(error, BETA, P)
    term = (weight - given - (codes - grid.T.unsqueeze(-1)) * scale).square().sum(-1)  # [grid, rows]
    assert (grid.T[term.argmin(0)].diagonal() - found[:, 0]).abs().max() < 1.5e-3
    assert bool(given.any()) == (size > 1)


@pytest.mark.parametrize("size", [0.01, 3.0])
@pytest.mark.parametrize("width", [2, 3])
def test_zero_points_are_those_of_the_written_algorithm(size: float, width: int) -> None:
    """All steps in fp64, every error shrunk, and nothing rounded before the end."""
    weight = size * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    scale, zero = (t.double().unsqueeze(-1) for t in Affine(width).scale_and_zero(weight))
    beta, path = BETA, []
    for _ in range(21):
        codes = (weight / scale + zero).round().clamp(0, 2**width - 1)
        error = weight - (codes - zero) * scale
        path.append((float(error.abs().sum()), zero.squeeze(-1)))
        given = error.sign() * (error.abs() - error.abs().pow(P - 1) / beta).clamp(min=0)
        zero = (codes - (weight - given) / scale).mean(-1, keepdim=True)
        beta *= 1.01
    rising = [i for i in range(1, 21) if path[i][0] >= path[i - 1][0]]
    expected = path[rising[0] - 1 if rising else 20][1]
    found = HalfQuadratic(width).scale_and_zero(weight)[1]
    assert (((found - expected) / expected).abs() < 2**-11).float().mean() > 0.95


def test_how_many_weights_are_worked_on_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = 3 * heavy(8, 96)
    expected = HalfQuadratic(3, 32).fit(weight)
    monkeypatch.setattr("methods.hqq.CACHED", 200)
    assert torch.equal(HalfQuadratic(3, 32).fit(weight).zero, expected.zero)


@pytest.mark.parametrize("size", [0.01, 1.0, 3.0, 10.0])
def test_steps_with_constant_beta_never_increase_the_loss(size: float) -> None:
    weight = size * heavy(32, 64)
    scale, zero = (t.unsqueeze(-1) for t in Affine(2).scale_and_zero(weight))
    losses = []
    for _ in range(20):
        missed = steps_missed(weight, scale, zero, 2)
        losses.append(h((missed * scale).double()).sum(-1))
        zero = zero_step(missed, scale, zero, BETA, P)
    history = torch.stack(losses)  # [steps, rows]
    assert (history.diff(dim=0) <= 1e-5 * history[1:]).all()
    assert history[-1].sum() < history[0].sum() * (0.95 if size < 3 else 0.9999)  # large errors: small steps


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("size", [0.02, 0.5, 20.0])
def test_no_matrix_loses_more_than_by_rounding_to_nearest(width: int, size: float) -> None:
    for weight in (size * heavy(16, 96), size * torch.randn(16, 96, generator=torch.Generator().manual_seed(0))):
        errors = [
            (fmt.fit(weight).snap(weight) - weight).abs() for fmt in (HalfQuadratic(width, 32), Affine(width, 32))
        ]
        assert errors[0].sum() <= errors[1].sum()
    assert size > 1 or errors[0].sum() < 0.98 * errors[1].sum()
    assert errors[0].pow(P).sum() <= errors[1].pow(P).sum()


def test_a_step_that_raises_the_absolute_error_is_not_taken() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0] * 8 + [1.4]]) / 64  # least squares would move 32 exact weights
    assert torch.equal(HalfQuadratic(2).fit(weight).snap(weight), Affine(2).fit(weight).snap(weight))


def test_gaussian_weights_lose_less_than_on_integers() -> None:
    weight = 0.02 * torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    for width in (2, 3, 4):
        losses = [(f.fit(weight).snap(weight) - weight).abs() for f in (HalfQuadratic(width, 64), Integer(width, 64))]
        for exponent in (P, 2):
            assert losses[0].pow(exponent).sum() < 0.97 * losses[1].pow(exponent).sum()


def test_without_iterations_it_is_rounding_to_nearest() -> None:
    weight = heavy(8, 64)
    assert torch.equal(
        HalfQuadratic(3, 32, iterations=0).fit(weight).snap(weight), Affine(3, 32).fit(weight).snap(weight)
    )


def test_more_iterations_never_lose() -> None:
    weight = 0.02 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for iterations in (0, 1, 2, 5, 20):
        fmt = HalfQuadratic(2, 32, iterations=iterations)
        losses.append(float((fmt.fit(weight).snap(weight) - weight).abs().sum()))
    assert losses == sorted(losses, reverse=True) and losses[3] < losses[2] < losses[1] < losses[0]


def test_small_errors_get_the_zero_point_of_least_squares() -> None:
    weight = 0.02 * heavy(4, 64)
    grid = HalfQuadratic(3, iterations=100).fit(weight)
    codes = grid.encode(weight).double()
    candidates = grid.zero + torch.linspace(-0.5, 0.5, 201)  # [rows, candidates]
    snapped = (codes.unsqueeze(2) - candidates.unsqueeze(1)) * grid.scale.unsqueeze(1)
    errors = (snapped - weight.unsqueeze(2)).square().sum(1)
    assert (errors.argmin(1) - 100).abs().amax() <= 1  # the search ends when nothing changes, or in fp16's last digit


def test_zero_and_constant_groups_survive() -> None:
    weight = torch.cat([torch.zeros(2, 8), torch.full((2, 8), 0.25), torch.zeros(2, 3)], 1)
    torch.testing.assert_close(HalfQuadratic(4, 8).fit(weight).snap(weight), weight, rtol=1e-3, atol=0)


def test_gptq_rounds_to_the_same_grid() -> None:
    weight = 0.02 * heavy(8, 64)
    rounded = GPTQRounding(static_groups=True)(weight, HalfQuadratic(3, 32), torch.eye(64))
    torch.testing.assert_close(rounded.weight, HalfQuadratic(3, 32).fit(weight).snap(weight))
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)


def test_the_method_stores_what_it_computes(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    network = small_llama()
    original = {name: network.weight(name) for name in network.linears}
    quantized = HQQ().quantize(context(network, Budget(bits=3, group_size=32), statistics=False))
    assert list(quantized.packed) == list(network.linears)
    for name, weight in original.items():
        packed = quantized.packed[name]
        assert torch.equal(packed.dequantize(), HalfQuadratic(3, 32).fit(weight).snap(weight))
        assert packed.stored_bits() == (3 + 32 / 32) * weight.numel()


def test_symmetric_budgets_are_refused(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    assert "symmetric" in (HQQ().supports(network, Budget(bits=4, symmetric=True)) or "")
    assert HQQ().supports(network, Budget(bits=4)) is None
    assert HQQ().supports(network, Budget(effective_bits=3.5)) is not None


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.5}, {"iterations": -1}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="HQQ cannot use"):
        HQQ(**options)


def test_names_tell_options_apart() -> None:
    assert HalfQuadratic(3, 64).name == "hqq3-g64"
    assert HalfQuadratic(3, p=0.5, iterations=3).name == "hqq3-channel-p0.5-iterations3"
