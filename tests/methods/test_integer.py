from itertools import product

import pytest
import torch
from torch import Tensor

from methods.formats.integer import WIDTHS, Integer


def gaussian(out: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def snap(fmt: Integer, weight: Tensor) -> Tensor:
    return fmt.fit(weight).snap(weight)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("group_size", [0, 32])
def test_asymmetric_error_is_at_most_half_a_step(width: int, group_size: int) -> None:
    weight = gaussian(8, 96)
    fmt = Integer(width, group_size)
    grid = fmt.fit(weight)
    step = grid.scale.repeat_interleave(grid.group_size, 1)
    stored_in_fp16 = (2**width - 1) * 2.0**-11  # relative error of the scale, summed up along the range
    assert ((grid.snap(weight) - weight).abs() <= step * (0.5 + stored_in_fp16)).all()


def test_symmetric_grid_follows_gptq_and_clips_the_positive_extreme_by_half_a_step() -> None:
    weight = torch.tensor([[-1.0, 0.25, 0.0, 1.0]])
    grid = Integer(4, symmetric=True).fit(weight)
    step = float(grid.scale[0, 0])
    assert step == pytest.approx(2 / 15, rel=2**-11)
    assert grid.snap(weight)[0, -1] == pytest.approx(7 * step)
    assert grid.snap(weight)[0, 2] == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_a_restricted_grid_reaches_both_extremes_and_never_its_lowest_code(width: int) -> None:
    half = 2 ** (width - 1) - 1
    step = 2.0**-6  # fp16 holds it exactly
    points = step * torch.arange(-half, half + 1).float()
    grid = Integer(width, symmetric=True, restricted=True).fit(points.unsqueeze(0))
    assert float(grid.scale[0, 0]) == step
    assert torch.equal(grid.snap(points.unsqueeze(0)), points.unsqueeze(0))
    assert torch.equal(grid.snap(1000 * points.unsqueeze(0)).unique(), points[[0, half, -1]])  # also where it saturates


def test_restricted_grids_are_antisymmetric_and_stored_like_symmetric_ones() -> None:
    fmt, weight = Integer(4, 32, symmetric=True, restricted=True), gaussian(6, 80)
    assert torch.equal(snap(fmt, -weight), -snap(fmt, weight))
    assert not torch.equal(snap(Integer(4, 32, symmetric=True), -weight), -snap(Integer(4, 32, symmetric=True), weight))
    packed = fmt.fit(weight).pack(fmt.fit(weight).encode(weight))
    assert torch.equal(packed.dequantize(), snap(fmt, weight))
    assert packed.stored_bits() == fmt.stored_bits((6, 80)) == Integer(4, 32, symmetric=True).stored_bits((6, 80))
    assert fmt.name == "int4-g32-sym-restricted"
    with pytest.raises(ValueError, match="symmetric=True"):
        Integer(4, restricted=True)


@pytest.mark.parametrize(("symmetric", "clip"), product([False, True], repeat=2))
def test_snapping_is_idempotent_and_scale_equivariant(symmetric: bool, clip: bool) -> None:
    fmt, weight = Integer(3, 32, symmetric, clip), gaussian(8, 64)
    grid = fmt.fit(weight)
    snapped = grid.snap(weight)
    assert torch.equal(grid.snap(snapped), snapped)
    assert torch.equal(snap(fmt, 4 * weight), 4 * snapped)


def test_each_bit_gains_six_decibels() -> None:
    weight = gaussian(16, 4096)
    error = [float((snap(Integer(b), weight) - weight).square().mean().log10()) for b in range(4, 9)]
    for finer, coarser in zip(error[1:], error, strict=False):
        assert 10 * (coarser - finer) == pytest.approx(6.02, abs=0.75)


def test_clipping_finds_the_best_of_its_80_factors() -> None:
    weight = gaussian(4, 32)
    weight[:, 0] *= 5

    def loss(snapped: Tensor) -> Tensor:
        return (snapped - weight).abs().pow(2.4).sum(1)

    losses = []
    for i in range(80):
        shrunk = weight.clamp((1 - i / 100) * weight.amin(1, True), (1 - i / 100) * weight.amax(1, True))
        losses.append(loss(Integer(3).fit(shrunk).snap(weight)))
    best = torch.stack(losses).amin(0)
    torch.testing.assert_close(loss(snap(Integer(3, clip=True), weight)), best)
    assert (best < losses[0]).all()


def test_a_ragged_last_group_has_its_own_scale() -> None:
    weight = gaussian(4, 80)
    whole = snap(Integer(3, 32), weight)
    parts = [snap(Integer(3), part) for part in weight.split(32, dim=1)]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_zero_groups_stay_zero() -> None:
    for symmetric in (False, True):
        assert not snap(Integer(2, 8, symmetric), torch.zeros(3, 16)).any()


@pytest.mark.parametrize(("width", "group", "symmetric"), product(WIDTHS, [0, 32, 128], [False, True]))
@pytest.mark.parametrize("columns", [256, 172])
def test_packing_keeps_every_weight_and_the_promised_size(
    width: int, group: int, symmetric: bool, columns: int
) -> None:
    fmt, weight = Integer(width, group, symmetric), gaussian(6, columns)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    assert packed.stored_bits() == fmt.stored_bits((6, columns))


def test_four_bits_in_groups_of_128_store_a_scale_and_a_zero_point_each() -> None:
    assert Integer(4, 128).stored_bits((128, 128)) / 128**2 == 4 + 16 / 128 + 4 / 128
    assert Integer(4, 128, symmetric=True).stored_bits((128, 128)) / 128**2 == 4 + 16 / 128


@pytest.mark.parametrize("start", [0, 5, 32, 64])
def test_column_ranges_agree_with_the_whole_matrix(start: int) -> None:
    weight = gaussian(4, 80)
    grid = Integer(3, 32).fit(weight)
    for stop in range(start + 1, 81, 7):
        codes = grid.encode(weight[:, start:stop], start)
        assert torch.equal(codes, grid.encode(weight)[:, start:stop])
        assert torch.equal(grid.decode(codes, start), grid.snap(weight)[:, start:stop])


def test_refitting_changes_one_group() -> None:
    weight = gaussian(4, 96)
    grid = Integer(3, 32).fit(weight)
    before = grid.snap(weight)
    grid.refit(1, 3 * weight[:, 32:64])
    assert torch.equal(grid.snap(3 * weight[:, 32:64], 32), snap(Integer(3), 3 * weight[:, 32:64]))
    after = grid.snap(weight)
    assert torch.equal(after[:, :32], before[:, :32])
    assert torch.equal(after[:, 64:], before[:, 64:])
    assert not torch.equal(after[:, 32:64], before[:, 32:64])


def test_a_grid_of_permuted_columns_packs_in_the_original_order() -> None:
    weight = gaussian(4, 80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    grid = Integer(3, 32).fit(weight[:, order])
    snapped = grid.snap(weight[:, order])
    packed = grid.pack(grid.encode(weight[:, order]), order)
    assert packed.group_index is not None
    assert torch.equal(packed.dequantize()[:, order], snapped)


def test_a_permuted_grid_keeps_the_scales_and_needs_no_group_index() -> None:
    weight = gaussian(4, 80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    grid = Integer(3, 32).fit(weight)
    permuted = grid.permuted(order)
    codes = torch.cat([permuted.encode(weight[:, order[i : i + 1]], i) for i in range(80)], 1)
    packed = permuted.pack(codes, order)
    assert packed.group_index is None
    assert torch.equal(packed.dequantize(), grid.snap(weight))


@pytest.mark.parametrize(("width", "group"), [(1, 0), (9, 0), (4, -1)])
def test_impossible_formats_are_refused(width: int, group: int) -> None:
    with pytest.raises(ValueError, match=r"bits|group size"):
        Integer(width, group)


@pytest.mark.parametrize("fmt", [Integer(3, 32), Integer(2), Integer(4, 16, symmetric=True, restricted=True)])
def test_the_lattice_holds_exactly_the_grid_points(fmt: Integer) -> None:
    weight, order = gaussian(8, 64), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for grid in (fmt.fit(weight), fmt.fit(weight).permuted(order)):
        lattice = grid.lattice(40, 8)
        for code in range(lattice.lowest, lattice.highest + 1):
            codes = torch.full((8, 8), code, dtype=torch.uint8)
            points = (lattice.step * (code - lattice.zero)).expand(-1, 8)
            assert torch.equal(points, grid.decode(codes, 40))
            assert torch.equal(grid.encode(points, 40), codes)
        beyond = grid.encode(torch.tensor([-99.0, 99.0]).expand(8, 2), 40)
        assert torch.equal(beyond[0], torch.tensor([lattice.lowest, lattice.highest], dtype=torch.uint8))
