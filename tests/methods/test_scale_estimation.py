from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from methods.formats.integer import Integer, IntegerGrid
from methods.formats.registry import named_format
from methods.group_error import diagonal_blocks, group_errors
from methods.rounding.base import ROUNDINGS
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import round_to_nearest
from methods.rounding.scale_estimation import (
    ScaleEstimation,
    ScaleEstimationGPTQ,
    estimate_scale,
    mean_ideal_scale,
)

FORMATS = [Integer(4, 32), Integer(3, 48), Integer(2, 32, symmetric=True), Integer(3)]


def layer(out: int = 24, columns: int = 112, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [out, in], inputs [tokens, in] of uneven energies that are not centered, and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    energies = torch.exp(torch.randn(columns, generator=generator))
    x = (torch.randn(300, columns, generator=generator) + 0.5) * energies
    return torch.randn(out, columns, generator=generator), x, x.T @ x / len(x)


def contributions(delta: Tensor, x: Tensor, size: int) -> Tensor:
    """Mean over tokens of the squared contribution of each group to the output's error: [out, groups]."""
    parts = zip(delta.split(size, 1), x.split(size, 1), strict=True)
    return torch.stack([(part @ d.T).square().mean(0) for d, part in parts], 1)


def test_errors_of_groups_are_those_of_their_outputs() -> None:
    delta, x, gram = layer()
    torch.testing.assert_close(group_errors(delta, diagonal_blocks(gram, 48)), contributions(delta, x, 48))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_no_group_becomes_worse_and_most_become_better(fmt: Integer) -> None:
    weight, x, gram = layer()
    size = fmt.columns_per_group(112)
    before = contributions(round_to_nearest(weight, fmt).weight - weight, x, size)
    rounded = ScaleEstimation()(weight, fmt, gram)
    after = contributions(rounded.weight - weight, x, size)
    assert (after <= before * (1 + 1e-4)).all()
    assert (after < 0.99 * before).float().mean() > 0.5
    torch.testing.assert_close(rounded.packed.dequantize(), rounded.weight, rtol=0, atol=0)
    assert rounded.packed.stored_bits() == fmt.stored_bits((24, 112))


def test_a_grid_with_the_wrong_scale_is_found_again() -> None:
    """A group of whole steps, and an outlier on a dead input that stretches the range: without it steps are hit."""
    steps = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0]).repeat(2) * 0.25
    weight = torch.cat([steps, torch.tensor([15.6 * 0.25])]).unsqueeze(0)
    gram = torch.eye(33)
    gram[-1, -1] = 0
    fmt = Integer(4, 0)
    off = round_to_nearest(weight, fmt).weight - weight
    assert off[0, :-1].abs().max() > 0.05
    rounded = ScaleEstimation(initial_steps=50)(weight, fmt, gram).weight
    torch.testing.assert_close(rounded[:, :-1], weight[:, :-1], rtol=1e-3, atol=0)


def test_a_candidate_is_the_weighted_mean_of_what_weights_would_like() -> None:
    grid = IntegerGrid(Integer(4, 4), torch.tensor([[0.5, 2.0]]), torch.tensor([[3.0, 0.0]]), 6)
    weight = torch.tensor([[-1.1, 0.1, 1.2, 2.0, 0.1, 0.2]])
    importance = torch.tensor([1.0, 100.0, 2.0, 3.0, 1.0, 1.0])
    # Steps from the zero point: -2, 0, 2, 4 in the first group, and none in the second.
    first = (1 * 1.1 / 2 + 2 * 1.2 / 2 + 3 * 2.0 / 4) / 6
    torch.testing.assert_close(mean_ideal_scale(grid, weight, importance), torch.tensor([[first, 2.0]]))


def test_inputs_weigh_by_their_root_mean_square() -> None:
    weight, x, gram = layer()
    fmt = Integer(4, 56)
    grid = fmt.fit(weight)
    steps = (grid.encode(weight) - grid.zero.repeat_interleave(56, 1)).abs()
    counts = x.square().mean(0).sqrt() * (steps > 0)
    ideal = torch.where(steps > 0, weight.abs() / steps, 0.0)
    candidate = (counts * ideal).unflatten(1, (2, 56)).sum(-1) / counts.unflatten(1, (2, 56)).sum(-1)
    scale = ScaleEstimation(initial_steps=1, scale_steps=0)(weight, fmt, gram).packed.scale.float()
    changed = scale != grid.scale
    assert changed.float().mean() > 0.3
    torch.testing.assert_close(scale[changed], candidate[changed], rtol=1e-3, atol=0)


def test_searching_more_never_ends_worse() -> None:
    weight, x, gram = layer(seed=1)
    fmt = Integer(3, 32)
    errors = {
        steps: contributions(ScaleEstimation(*steps)(weight, fmt, gram).weight - weight, x, 32)
        for steps in product((0, 2, 5), (0, 5))
    }
    assert torch.equal(errors[0, 0], contributions(round_to_nearest(weight, fmt).weight - weight, x, 32))
    for fewer, more in [((0, 0), (2, 0)), ((2, 0), (5, 0)), ((5, 0), (5, 5)), ((0, 0), (0, 5))]:
        assert (errors[more] <= errors[fewer] * (1 + 1e-4)).all()
        assert errors[more].sum() < errors[fewer].sum()


def test_the_scale_of_the_gram_matrix_does_not_matter() -> None:
    weight, _, gram = layer()
    a, b = (ScaleEstimation()(weight, Integer(3, 32), factor * gram).weight for factor in (1.0, 4.0))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["scale_estimation", "scale_estimation_gptq"])
def test_eight_bits_are_rounded_to_nearest(name: str) -> None:
    weight, _, gram = layer()
    rounded = ROUNDINGS[name]()(weight, Integer(8), gram)
    assert torch.equal(rounded.weight, round_to_nearest(weight, Integer(8)).weight)


@pytest.mark.parametrize("name", ["scale_estimation", "scale_estimation_gptq"])
def test_dead_and_zero_groups_are_kept(name: str) -> None:
    weight, _, gram = layer()
    weight[3] = 0
    gram[:32], gram[:, :32] = 0, 0
    rounded = ROUNDINGS[name]()(weight, Integer(4, 32), gram).weight
    assert rounded.isfinite().all()
    assert torch.equal(rounded[3], torch.zeros(112))
    unknown = ROUNDINGS[name]()(weight, Integer(4, 32), torch.zeros(112, 112)).weight
    assert torch.equal(unknown, round_to_nearest(weight, Integer(4, 32)).weight)


def test_inside_gptq_scales_are_estimated_for_the_compensated_weights() -> None:
    weight, _, gram = layer()
    fmt = Integer(3, 32)
    rounded = ScaleEstimationGPTQ()(weight, fmt, gram)
    torch.testing.assert_close(rounded.packed.dequantize(), rounded.weight, rtol=0, atol=0)
    plain = GPTQRounding(damping=0.1)(weight, fmt, gram).weight
    assert torch.equal(ScaleEstimationGPTQ(initial_steps=0, scale_steps=0)(weight, fmt, gram).weight, plain)

    damped = (gram + 0.1 * gram.diagonal().mean() * torch.eye(112)).double()
    delta = (rounded.weight - weight)[:, :96].double()  # of all groups but the last, which makes up for it:
    compensated = weight[:, 96:] - (delta @ damped[:96, 96:] @ torch.linalg.inv(damped[96:, 96:])).float()
    grid = Integer(3).fit(compensated)
    expected = estimate_scale(grid, compensated, [gram[96:, 96:]], 5, 5)
    torch.testing.assert_close(rounded.packed.scale[:, 3:].float(), expected, rtol=2e-3, atol=0)
    assert not torch.allclose(expected, grid.scale, rtol=0.05)


def test_without_correlations_gptq_adds_nothing() -> None:
    weight, _, gram = layer()
    gram = torch.diag(gram.diagonal())
    one, two = (r(weight, Integer(3, 32), gram).weight for r in (ScaleEstimation(), ScaleEstimationGPTQ()))
    assert torch.equal(one, two)


def test_bad_input_is_told() -> None:
    weight, _, gram = layer()
    with pytest.raises(ValueError, match="Gram"):
        ScaleEstimation()(weight, Integer(4, 32))
    with pytest.raises(ValueError, match="nvfp4"):
        ScaleEstimation()(weight, named_format("nvfp4"), gram)
