import logging
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.base import Budget, Context, Method
from methods.formats.integer import Integer
from methods.gptq import GPTQ
from methods.network import Network
from methods.rounding.base import ROUNDINGS
from methods.rounding.gptq import GPTQRounding, GridColumns, NearestColumns, nearest_plane
from methods.rounding.nearest import Nearest
from methods.rounding.sweep import damped_factor, sweep
from methods.rtn import RTN


def layer(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and the Gram matrix of correlated inputs with uneven energies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    energies = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(4 * columns, columns, generator=generator) @ mix * energies.sqrt()
    return torch.randn(out, columns, generator=generator), x.T @ x / len(x)


def codes(weight: Tensor, gram: Tensor, fmt: Integer, **options: Any) -> Tensor:
    packed = GPTQRounding(**options)(weight, fmt, gram).packed
    return packed.unpacked_codes()


def loss(delta: Tensor, gram: Tensor) -> float:
    return float((delta.double() @ gram.double() * delta.double()).sum())


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def textbook(weight: Tensor, gram: Tensor, fmt: Integer, refit: bool) -> tuple[Tensor, Tensor, float]:
    """Optimal brain quantization in a fixed column order: after each column, exact compensation by all later
    columns, and elimination from the explicit inverse. Returns codes, weights, and the sum of the errors."""
    current, inverse = weight.double(), torch.linalg.inv(damped(gram))
    columns = weight.shape[1]
    size = fmt.columns_per_group(columns)
    taken, rounded, total = [], torch.empty_like(current), 0.0
    for j in range(columns):
        if j % size == 0:
            source = current if refit else weight.double()
            scale, zero = fmt.scale_and_zero(source[:, j : j + size])
        code = (torch.round(current[:, j] / scale) + zero).clamp(0, 2**fmt.width - 1)
        taken.append(code)
        rounded[:, j] = scale * (code - zero)
        error = current[:, j] - rounded[:, j]
        total += float((error.square() / inverse[j, j]).sum())
        current = current - torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.stack(taken, 1), rounded, total


@pytest.mark.parametrize(("static", "group"), product([False, True], [0, 32, 48]))
@pytest.mark.parametrize("block", [40, 128])
def test_codes_equal_those_of_the_textbook_elimination(static: bool, group: int, block: int) -> None:
    weight, gram = layer(48, 112)
    fmt = Integer(3, group)
    expected, _, _ = textbook(weight, gram, fmt, refit=not static)
    actual = codes(weight, gram, fmt, static_groups=static, block=block)
    assert (actual == expected).float().mean() >= 0.999


@pytest.mark.parametrize("fmt", [Integer(3, 48), Integer(4), Integer(3, 32, symmetric=True, restricted=True)])
@pytest.mark.parametrize("out", [1, 24])
def test_few_operations_a_column_give_the_codes_of_encoding_each(fmt: Integer, out: int) -> None:
    weight, gram = layer(out, 112)
    factor, order = damped_factor(gram, 0.01), torch.randperm(112, generator=torch.Generator().manual_seed(0))
    for refit in (True, False):
        grids = [fmt.fit(weight) if refit else fmt.fit(weight).permuted(order) for _ in range(2)]
        fast, slow = NearestColumns(grids[0], 112, refit), GridColumns(grids[1], 112, refit)
        points = sweep(weight, factor, fast, 64)
        torch.testing.assert_close(points, sweep(weight, factor, slow, 64))
        assert torch.equal(fast.codes, slow.codes)
        assert torch.equal(points, grids[0].decode(fast.codes))


def test_nearest_plane_equals_column_by_column_rounding_in_fp64() -> None:
    weight, gram = layer(40, 24)
    factor = damped_factor(gram, 0.01)
    step, low, high = torch.full((24, 40), 0.3), torch.full((24, 40), -3.0), torch.full((24, 40), 4.0)
    multiples = torch.empty(24, 40)
    points = nearest_plane(weight.t().contiguous(), factor, step, low, high, multiples)
    r, w, expected = factor.double(), weight.t().double(), torch.zeros(24, 40, dtype=torch.float64)
    for i in range(24):
        due = w[i] + (w[:i] - 0.3 * expected[:i]).T @ r[:i, i] / r[i, i]
        expected[i] = (due / 0.3).round().clamp(-3, 4)
    assert (multiples == expected).float().mean() > 0.999
    assert {-3.0, 4.0} <= set(multiples.unique().tolist())
    torch.testing.assert_close(points, multiples * 0.3)


def test_the_factor_of_an_ill_conditioned_matrix_has_all_digits_of_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    gram = (x + 30 * torch.randn(256, generator=generator)).double()
    gram = gram.T @ gram / 512
    before = gram.clone()
    gram[5] = gram[:, 5] = before[5] = before[:, 5] = 0
    factor = damped_factor(gram, 0.001)
    assert torch.equal(gram, before)
    mean = gram.diagonal().sum() / 255
    damped = gram + torch.diag(torch.full((256,), 0.001, dtype=torch.float64) * mean)
    damped[5, 5] += 1
    exact = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(factor, exact.float(), rtol=1e-6, atol=1e-6 * float(exact.diagonal().amin()))


def test_squared_errors_of_the_columns_sum_up_to_the_loss() -> None:
    weight, gram = layer(16, 64)
    fmt = Integer(3, 32)
    _, _, total = textbook(weight, gram, fmt, refit=True)
    rounded = GPTQRounding()(weight, fmt, gram).weight
    assert loss(rounded - weight, damped(gram)) == pytest.approx(total, rel=1e-4)


def test_the_factor_reproduces_the_damped_matrix() -> None:
    _, gram = layer(1, 64)
    factor = damped_factor(gram, 0.05)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, damped(gram, 0.05).float())


def test_damping_is_relative_to_inputs_that_are_not_always_zero() -> None:
    _, gram = layer(1, 32)
    dead = torch.arange(32) % 2 == 0
    gram[dead] = 0
    gram[:, dead] = 0
    live = damped_factor(gram, 0.1)[~dead][:, ~dead]
    torch.testing.assert_close(live @ live.T, damped(gram[~dead][:, ~dead], 0.1).float())


def test_between_the_exhaustive_optimum_and_rounding_to_nearest() -> None:
    fmt = Integer(2)
    choices = torch.tensor(list(product(range(4), repeat=6)))  # [4096, 6]
    totals = torch.zeros(3, dtype=torch.float64)
    for seed in range(30):
        weight, gram = layer(1, 6, seed)
        points = fmt.fit(weight).decode(choices[:, None].expand(-1, 1, -1).reshape(-1, 6)) - weight
        best = float((points.double() @ gram.double() * points.double()).sum(1).min())
        ours = loss(GPTQRounding(damping=0)(weight, fmt, gram).weight - weight, gram)
        nearest = loss(Nearest()(weight, fmt).weight - weight, gram)
        assert ours >= best * (1 - 1e-6)
        totals += torch.tensor([best, ours, nearest])
    assert totals[0] < totals[1] < 0.9 * totals[2]


@pytest.mark.parametrize("group", [0, 32])
def test_loss_is_below_rounding_to_nearest_on_average(group: int) -> None:
    fmt, ratios = Integer(3, group), []
    for seed in range(8):
        weight, gram = layer(32, 64, seed)
        ours, nearest = GPTQRounding()(weight, fmt, gram), Nearest()(weight, fmt)
        ratios.append(loss(ours.weight - weight, gram) / loss(nearest.weight - weight, gram))
    assert sum(ratios) / len(ratios) < 0.8


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}])
def test_uncorrelated_inputs_of_equal_energy_leave_nothing_to_gain(options: dict[str, Any]) -> None:
    weight, _ = layer(16, 96)
    fmt = Integer(3, 32)
    expected = Nearest()(weight, fmt).packed
    assert torch.equal(codes(weight, 2.5 * torch.eye(96), fmt, **options), expected.unpacked_codes())


@pytest.mark.parametrize("group", [0, 32, 80])
def test_block_size_and_scale_of_the_gram_matrix_do_not_matter(group: int) -> None:
    weight, gram = layer(24, 160)
    gram[:, 7] = gram[7] = 0  # an input that is always zero must not set the scale either
    reference = codes(weight, gram, Integer(3, group), block=160)
    for block in (1, 48, 128):
        assert (codes(weight, gram, Integer(3, group), block=block) == reference).float().mean() >= 0.999
    assert (codes(weight, 1000 * gram, Integer(3, group)) == reference).float().mean() >= 0.999


@pytest.mark.parametrize("static", [False, True])
def test_act_order_equals_permuting_the_problem(static: bool) -> None:
    weight, gram = layer(24, 96)
    order = gram.diagonal().argsort(descending=True)
    fmt = Integer(3) if static else Integer(3, 32)
    permuted = GPTQRounding()(weight[:, order], fmt, gram[order][:, order])
    ours = GPTQRounding(act_order=True, static_groups=static)(weight, fmt, gram)
    assert torch.equal(ours.weight[:, order], permuted.weight)
    assert torch.equal(ours.packed.dequantize(), ours.weight)


def test_act_order_changes_nothing_if_energies_already_decrease() -> None:
    weight, gram = layer(24, 96)
    order = gram.diagonal().argsort(descending=True)
    gram = gram[order][:, order]
    ours = GPTQRounding(act_order=True)(weight, Integer(3, 32), gram)
    assert torch.equal(ours.weight, GPTQRounding()(weight, Integer(3, 32), gram).weight)
    assert ours.packed.group_index is None


def test_static_groups_keep_the_scales_of_the_original_weights() -> None:
    weight, gram = layer(24, 96)
    fmt = Integer(3, 32)
    packed = GPTQRounding(act_order=True, static_groups=True)(weight, fmt, gram).packed
    assert packed.group_index is None
    assert torch.equal(packed.scale, Nearest()(weight, fmt).packed.scale)
    assert GPTQRounding(act_order=True)(weight, fmt, gram).packed.group_index is not None


def test_weights_of_inputs_that_are_always_zero_become_zero() -> None:
    weight, gram = layer(8, 64)
    dead = torch.arange(64) % 5 == 0
    gram[dead] = 0
    gram[:, dead] = 0
    rounded = GPTQRounding()(weight, Integer(3, 32), gram).weight
    assert not rounded[:, dead].any()
    assert rounded[:, ~dead].any(0).all()


def test_without_any_data_weights_are_rounded_to_nearest() -> None:
    weight, _ = layer(8, 64)
    fmt = Integer(3, 32)
    assert torch.equal(GPTQRounding()(weight, fmt, torch.zeros(64, 64)).weight, Nearest()(weight, fmt).weight)


def test_damping_is_raised_with_a_warning_until_the_matrix_is_definite(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))
    with caplog.at_level(logging.WARNING):
        factor = damped_factor(gram, 0.01)
    assert "0.1" in caplog.text
    torch.testing.assert_close((factor @ factor.T).diagonal(), gram.diagonal() + 0.1 * 2.95 / 4)
    with pytest.raises(FloatingPointError, match="positive definite"):
        damped_factor(torch.diag(torch.tensor([1.0, -1e9])), 0.01)
    with pytest.raises(FloatingPointError, match="not finite"):
        damped_factor(torch.full((2, 2), torch.nan), 0.01)


def test_a_rounding_that_needs_the_gram_matrix_says_so() -> None:
    with pytest.raises(ValueError, match="Gram"):
        ROUNDINGS["gptq"]()(torch.zeros(2, 4), Integer(4))
    with pytest.raises(ValueError, match="did you mean gptq"):
        ROUNDINGS["gtpq"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_order": True},
        {"act_order": True, "static_groups": True},
        {"stream": "full"},
        {"true_sequential": True},
    ],
)
@torch.no_grad()
def test_logits_stay_closer_than_with_rounding_to_nearest(
    small_llama: Callable[..., Network], context: Callable[..., Context], options: dict[str, Any]
) -> None:
    def error(method: Method) -> float:
        network = small_llama()
        tokens = torch.randint(96, (40, 16), generator=torch.Generator().manual_seed(1))
        ctx = context(network, Budget(bits=3, group_size=32), tokens)
        expected = network.logits(ctx.scoring)
        quantized = method.quantize(ctx)
        assert all(torch.equal(network.weight(n), p.dequantize()) for n, p in quantized.packed.items())
        return float((network.logits(ctx.scoring) - expected).square().mean())

    assert error(GPTQ(**options)) < error(RTN())


@pytest.mark.parametrize("options", [{"stream": "fp"}, {"stream": "full", "true_sequential": True}, {"damping": -1.0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stream|damping"):
        GPTQ(**options)
