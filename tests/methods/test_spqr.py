from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.packed_sum import PackedSum
from methods.base import Budget, Context, Method
from methods.formats.base import Format
from methods.formats.floats import MX
from methods.formats.integer import Integer
from methods.formats.two_level import TwoLevel
from methods.network import Network
from methods.rounding.gptq import GPTQRounding
from methods.rounding.spqr import OutlierColumns, SpQRRounding, filled, leave_one_out
from methods.rtn import RTN
from methods.spqr import SpQR

NONE = float("inf")


def layer(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] with heavy tails, and the Gram matrix of correlated inputs with uneven energies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    x = x * torch.exp(torch.randn(columns, generator=generator) / 2)
    weight = torch.randn(out, columns, generator=generator)
    return weight * (1 + weight.square()), x.T @ x / len(x)


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def affine(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and real-valued zero point of each row, as fp16 holds them: 2 × [out]."""
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale.half().double(), (-low / scale).half().double()


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale * ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def textbook(weight: Tensor, gram: Tensor, bits: int, size: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Elimination from the explicit inverse, with the paper's leave-one-out search, weight by weight.

    Returns weights and outliers, [out, in] each.
    """
    current, inverse = weight.double(), torch.linalg.inv(damped(gram, 1.0))
    diagonal = torch.linalg.cholesky(inverse, upper=True).diagonal()
    limit = threshold * (weight.double().var(0) / diagonal.square()).mean()
    result, outliers = torch.empty_like(current), torch.zeros(weight.shape, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % size == 0:
            group, costs = current[:, j : j + size].clone(), diagonal[j : j + size].square()
            for row in group:
                likely = []
                base = ((on_grid(row, *affine(row[None], bits), bits) - row).square() / costs).sum()
                for i in range(len(row)):
                    others = torch.arange(len(row)) != i
                    rest, scale_zero = row[others], affine(row[others][None], bits)
                    error = ((on_grid(rest, *scale_zero, bits) - rest).square() / costs[others]).sum()
                    likely.append(bool(base - error > limit))
                if not all(likely):
                    row[torch.tensor(likely)] = row[~torch.tensor(likely)].mean()
            scale, zero = affine(group, bits)
        rounded = on_grid(current[:, j], scale, zero, bits)
        residual = current[:, j] - rounded
        outliers[:, j] = residual.square() / diagonal[j].square() > limit
        result[:, j] = rounded + residual.half() * outliers[:, j]
        error = current[:, j] - result[:, j]
        current = current - torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result, outliers


@pytest.mark.parametrize("threshold", [NONE, 0.2, 0.1, 0.05])
def test_equals_the_textbook_elimination(threshold: float) -> None:
    weight, gram = layer(24, 96)
    expected, outliers = textbook(weight, gram, 3, 16, threshold)
    rounded = SpQRRounding(threshold, act_order=False)(weight, TwoLevel(3, 16, 16), gram)
    close = torch.isclose(rounded.weight.double(), expected, atol=1e-3)
    assert close.float().mean() >= 0.998
    if threshold < NONE:
        assert 0 < outliers.float().mean() < 0.5
        assert isinstance(rounded.packed, PackedSum)
        stored = rounded.packed.correction.dequantize() != 0
        assert (stored == outliers).float().mean() >= 0.999


@pytest.mark.parametrize("fmt", [TwoLevel(3), TwoLevel(3, 16, 16), TwoLevel(2, 64, 4, 8), Integer(3, 32), Integer(3)])
@pytest.mark.parametrize("act_order", [False, True])
def test_without_outliers_it_is_gptq(fmt: Format, act_order: bool) -> None:
    weight, gram = layer(40, 112)
    gptq = GPTQRounding(act_order, damping=1.0)(weight, fmt, gram)
    spqr = SpQRRounding(NONE, act_order=act_order)(weight, fmt, gram)
    assert torch.equal(spqr.weight, gptq.weight)
    assert torch.equal(spqr.packed.dequantize(), gptq.weight)
    assert spqr.packed.stored_bits() == gptq.packed.stored_bits()


@pytest.mark.parametrize("fmt", [TwoLevel(3, 16, 16), Integer(3, 16), Integer(4, 16, symmetric=True), MX()])
def test_leave_one_out_equals_brute_force(fmt: Format) -> None:
    weight = layer(50, 12)[0]
    weight[0] = weight[0].abs()  # one sign
    weight[1, 3] = weight[1, 7] = weight[1].amax() + 1  # of two largest, one stays
    weight[2, 5:] = 0
    weight[3] = 0
    importance = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1
    base = ((fmt.fit(weight).snap(weight) - weight).square() * importance).sum(1)
    expected = torch.empty_like(weight)
    for i in range(12):
        others = torch.arange(12) != i
        rest = weight[:, others]
        expected[:, i] = base - ((fmt.fit(rest).snap(rest) - rest).square() * importance[others]).sum(1)
    torch.testing.assert_close(leave_one_out(weight, importance, fmt), expected, rtol=1e-4, atol=1e-4)


def test_scales_are_fitted_without_the_outliers_of_an_exact_grid() -> None:
    weight, gram = layer(32, 16)
    importance = gram.diagonal()
    columns = OutlierColumns(weight, TwoLevel(3), importance, 0.1)
    columns.begin(0, weight)
    limit = 0.1 * (weight.var(0) * importance).mean()
    likely = leave_one_out(weight, importance, TwoLevel(3, stats_bits=16)) > limit
    assert likely.any()
    assert torch.equal(columns.grid.snap(weight), TwoLevel(3).fit(filled(weight, likely)).snap(weight))


def test_what_is_left_out_is_filled_with_the_mean_of_the_others() -> None:
    weight = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    left_out = torch.tensor([[False, False, True], [True, True, True]])
    assert torch.equal(filled(weight, left_out), torch.tensor([[1.0, 2.0, 1.5], [4.0, 5.0, 6.0]]))


def outlier_rate(weight: Tensor, gram: Tensor, threshold: float) -> float:
    packed = SpQRRounding(threshold)(weight, TwoLevel(3), gram).packed
    return packed.correction.values.numel() / weight.numel() if isinstance(packed, PackedSum) else 0.0


def test_outliers_become_more_as_the_threshold_falls() -> None:
    weight, gram = layer(64, 128)
    rates = [outlier_rate(weight, gram, threshold) for threshold in (NONE, 1.0, 0.3, 0.1, 0.03, 0.0)]
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert 0 < rates[1] < rates[-2] < 0.5
    assert rates[-1] > 0.95


def test_the_threshold_has_no_unit() -> None:
    weight, gram = layer(64, 128)
    assert (
        outlier_rate(weight, gram, 0.1) == outlier_rate(weight, 64 * gram, 0.1) == outlier_rate(8 * weight, gram, 0.1)
    )


def test_if_all_are_outliers_nothing_is_lost_but_the_rounding_of_fp16() -> None:
    weight, gram = layer(32, 64)
    rounded = SpQRRounding(0.0)(weight, TwoLevel(3), gram)
    torch.testing.assert_close(rounded.weight, weight, rtol=1e-3, atol=5e-3)


def test_an_outlier_does_not_widen_the_grid_of_its_group() -> None:
    weight, gram = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) - 0.5, torch.eye(64)
    gram[20, 20] = 1.001  # break ties
    weight[3, 20] = 8
    rounded = SpQRRounding(1.0, act_order=False)(weight, TwoLevel(4, 16, 16), gram)
    assert isinstance(rounded.packed, PackedSum)
    assert rounded.packed.correction.values.numel() == 1
    assert rounded.weight[3, 20] == pytest.approx(8, rel=1e-3)
    assert (rounded.weight - weight).abs().max() < 0.6 / 15


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", [TwoLevel(3), TwoLevel(3, 16, 16), Integer(3, 48)])
@pytest.mark.parametrize("out", [40, 1])
def test_what_is_packed_is_what_was_rounded(act_order: bool, fmt: Format, out: int) -> None:
    weight, gram = layer(out, 88)
    rounded = SpQRRounding(act_order=act_order)(weight, fmt, gram)
    assert isinstance(rounded.packed, PackedSum)
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_bits_are_those_of_the_formula(act_order: bool) -> None:
    weight, gram = layer(64, 128)
    packed = SpQRRounding(act_order=act_order)(weight, TwoLevel(3), gram).packed
    assert isinstance(packed, PackedSum)
    rate = packed.correction.values.numel() / weight.numel()
    pointers, index = 32 * (64 + 1), 16 * 128 if act_order else 0
    expected = 3 + (3 + 3) / 16 + 64 / (16 * 16) + (16 + 16) * rate + (pointers + index) / weight.numel()
    assert packed.stored_bits() / weight.numel() == pytest.approx(expected)


def test_inputs_that_are_always_zero_and_layers_without_data() -> None:
    weight, gram = layer(24, 64)
    dead = torch.arange(64) % 5 == 0
    gram[dead] = 0
    gram[:, dead] = 0
    rounded = SpQRRounding()(weight, TwoLevel(3), gram)
    step = 2 * weight.abs().max() / 7
    assert rounded.weight[:, dead].abs().max() < step / 2
    assert (SpQRRounding()(weight, TwoLevel(3), torch.zeros(64, 64)).weight - weight).abs().max() < step
    assert torch.equal(SpQRRounding()(0 * weight, TwoLevel(3), gram).weight, 0 * weight)


def test_loss_is_below_gptq_in_the_same_format() -> None:
    ratios = []
    for seed in range(6):
        weight, gram = layer(48, 96, seed)
        losses = []
        for threshold in (0.2, NONE):
            delta = SpQRRounding(threshold)(weight, TwoLevel(3), gram).weight - weight
            losses.append(float((delta @ gram * delta).sum()))
        ratios.append(losses[0] / losses[1])
    assert sum(ratios) / len(ratios) < 0.8


@pytest.mark.parametrize("options", [{}, {"act_order": False, "group_size": 32, "stats_bits": 16}])
@torch.no_grad()
def test_logits_stay_closer_than_with_rounding_to_nearest(
    small_llama: Callable[..., Network], context: Callable[..., Context], options: dict[str, Any]
) -> None:
    def error(method: Method) -> float:
        network = small_llama()
        ctx = context(network, Budget(bits=3, group_size=16))
        expected = network.logits(ctx.scoring)
        quantized = method.quantize(ctx)
        assert all(torch.equal(network.weight(n), p.dequantize()) for n, p in quantized.packed.items())
        return float((network.logits(ctx.scoring) - expected).square().mean())

    assert error(SpQR(**options)) < error(RTN())


def test_a_bound_is_no_width(small_llama: Callable[..., Network]) -> None:
    assert "3.5" in str(SpQR().supports(small_llama(), Budget(effective_bits=3.5)))
    with pytest.raises(ValueError, match="Gram"):
        SpQRRounding()(torch.zeros(2, 16), TwoLevel(3))


@pytest.mark.parametrize("options", [{"outlier_threshold": -1.0}, {"damping": -1.0}, {"stats_bits": 1}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"SpQR|scales"):
        SpQR(**options)
