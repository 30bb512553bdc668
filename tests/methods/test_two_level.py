from typing import Any

import pytest
import torch
from torch import Tensor

from methods.formats.integer import Integer
from methods.formats.two_level import TwoLevel
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest


def matrix(out: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, columns, generator=generator) * torch.rand(out, 1, generator=generator).exp()


def asymmetric(values: list[float], bits: int) -> list[float]:
    """Values on their own grid of 2**bits points between the smallest and the largest, one by one."""
    low, step = min(values), (max(values) - min(values)) / (2**bits - 1)
    return [low + step * round((value - low) / step) for value in values]


@pytest.mark.parametrize(("out", "columns"), [(32, 64), (21, 40)])
def test_scales_and_zeros_are_quantized_over_neighboring_rows(out: int, columns: int) -> None:
    weight, fmt = matrix(out, columns), TwoLevel(4, 16, 3, 8)
    grid, close = fmt.fit(weight), []
    for group, part in enumerate(weight.split(16, dim=1)):
        for start in range(0, out, 8):
            rows = part[start : start + 8].tolist()
            low, high = [min(0, *row) for row in rows], [max(0, *row) for row in rows]
            scales = [(top - bottom) / 15 for bottom, top in zip(low, high, strict=True)]
            zeros = [-bottom / scale for bottom, scale in zip(low, scales, strict=True)]
            for actual, values in ((grid.scale, scales), (grid.zero, zeros)):
                expected = torch.tensor(asymmetric(values, 3))
                close += torch.isclose(actual[group, start : start + 8], expected, rtol=2e-3, atol=2e-3).tolist()
    assert sum(close) >= 0.98 * len(close)  # steps and offsets in fp16 may tip a value to its other neighbor


@pytest.mark.parametrize("stats_bits", [3, 16])
def test_codes_are_the_nearest_of_all(stats_bits: int) -> None:
    weight, fmt = matrix(20, 40), TwoLevel(3, 16, stats_bits)
    grid = fmt.fit(weight)
    points = torch.stack([grid.decode(torch.full((20, 40), code)) for code in range(8)])
    nearest = (points - weight).abs().amin(0)
    torch.testing.assert_close((grid.snap(weight) - weight).abs(), nearest)


@pytest.mark.parametrize("rounding", [Nearest(), GPTQRounding(), GPTQRounding(act_order=True)])
@pytest.mark.parametrize("stats_bits", [3, 16])
@pytest.mark.parametrize(("out", "columns"), [(32, 64), (21, 40), (3, 5)])
def test_what_is_packed_is_what_was_rounded(rounding: Any, stats_bits: int, out: int, columns: int) -> None:
    weight, x = matrix(out, columns), matrix(200, columns, 1)
    fmt = TwoLevel(3, 16, stats_bits)
    rounded = rounding(weight, fmt, x.T @ x)
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)
    index = 0 if rounded.packed.group_index is None else 16 * columns
    assert rounded.packed.stored_bits() == fmt.stored_bits((out, columns)) + index


def test_static_groups_need_no_index_with_act_order() -> None:
    weight, x = matrix(32, 64), matrix(200, 64, 1) * torch.linspace(1, 2, 64)
    rounded = GPTQRounding(act_order=True, static_groups=True)(weight, TwoLevel(3), x.T @ x)
    assert rounded.packed.group_index is None
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)


def test_bits_are_those_of_the_formula() -> None:
    for width, group, stats, rows in ((3, 16, 3, 16), (4, 32, 4, 16), (2, 16, 2, 32)):
        bits = TwoLevel(width, group, stats, rows).stored_bits((64, 256)) / (64 * 256)
        assert bits == width + 2 * stats / group + 64 / (group * rows)
    assert TwoLevel(3, 16, 16).stored_bits((64, 256)) / (64 * 256) == 3 + 32 / 16


def test_refitting_touches_one_group() -> None:
    weight, fresh = matrix(32, 64), matrix(32, 16, 1)
    grid = TwoLevel(3).fit(weight)
    grid.refit(2, fresh)
    expected = TwoLevel(3).fit(torch.cat([weight[:, :32], fresh, weight[:, 48:]], dim=1))
    assert torch.equal(grid.snap(weight), expected.snap(weight))
    assert torch.equal(grid.pack(grid.encode(weight)).dequantize(), expected.snap(weight))


def test_zeros_leave_the_scales_of_their_neighbors_alone() -> None:
    weight = matrix(16, 32)
    weight[5] = weight[4]
    expected = TwoLevel(3).fit(weight).snap(weight)
    weight[5] = 0
    snapped = TwoLevel(3).fit(weight).snap(weight)
    others = torch.arange(16) != 5
    assert torch.equal(snapped[others], expected[others])
    assert snapped[5].abs().max() < weight.abs().max() / 7  # less than a step


@pytest.mark.parametrize("stats_bits", [3, 16])
def test_a_matrix_of_zeros_stays_one(stats_bits: int) -> None:
    zeros = torch.zeros(20, 40)
    assert torch.equal(Nearest()(zeros, TwoLevel(3, 16, stats_bits)).packed.dequantize(), zeros)


def test_equal_scales_are_stored_exactly() -> None:
    weight = torch.linspace(-1, 2, 16).repeat(16, 1)  # a step of 0.2 from −1: what 4 bits hold
    torch.testing.assert_close(TwoLevel(4).fit(weight).snap(weight), weight, rtol=1e-3, atol=1e-3)


def test_more_bits_for_statistics_lower_the_error() -> None:
    weight = matrix(64, 128)
    errors = [float((TwoLevel(4, 16, bits).fit(weight).snap(weight) - weight).square().sum()) for bits in (2, 3, 5, 16)]
    assert errors == sorted(errors, reverse=True)
    integer = float((Integer(4, 16).fit(weight).snap(weight) - weight).square().sum())
    assert errors[-1] == pytest.approx(integer, rel=0.1)  # whose zero points are whole numbers


@pytest.mark.parametrize("options", [{"width": 1}, {"stats_bits": 12}, {"group_size": 0}, {"stats_group": 0}])
def test_impossible_formats_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"bits|small"):
        TwoLevel(**({"width": 4} | options))


def test_names_differ() -> None:
    formats = [
        TwoLevel(3),
        TwoLevel(4),
        TwoLevel(3, 32),
        TwoLevel(3, 16, 4),
        TwoLevel(3, 16, 3, 32),
        TwoLevel(3, 16, 16),
    ]
    assert len({fmt.name for fmt in formats}) == len(formats)
    assert TwoLevel(3).bits == 3
