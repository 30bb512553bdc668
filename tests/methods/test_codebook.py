from functools import cache
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from methods.formats.codebook import CELLS, Codebook, weighted_kmeans
from methods.formats.integer import Integer
from methods.rounding.base import Rounding
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest

counts = pytest.mark.parametrize("count", [2, 4, 8, 16])


def gaussian(out: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def masses(out: int, columns: int, seed: int = 1) -> Tensor:
    """Importances that span orders of magnitude."""
    return torch.exp(2 * gaussian(out, columns, seed))


def loss(values: Tensor, mass: Tensor, centers: Tensor) -> Tensor:
    """The weighted squared distance of each row's values to the nearest center: fp64 [rows]."""
    distance = (values.double().unsqueeze(2) - centers.double().unsqueeze(1)).abs().amin(2)
    return (mass.double() * distance.square()).sum(1)


def optimum(values: Tensor, mass: Tensor, count: int) -> float:
    """The least loss of one row, by dynamic programming over runs of its sorted values, in Python's floats."""
    pairs = sorted(zip(values.tolist(), mass.tolist(), strict=True))

    @cache
    def run(start: int, stop: int) -> float:
        part = [(v, m) for v, m in pairs[start:stop] if m > 0]
        total = sum(m for _, m in part)
        mean = sum(m * v for v, m in part) / total if part else 0.0
        return sum(m * (v - mean) ** 2 for v, m in part)

    least = [0.0, *[float("inf")] * len(pairs)]  # of the first j values, in as many clusters as rounds
    for _ in range(count):
        least = [min(least[i] + run(i, j) for i in range(j + 1)) for j in range(len(pairs) + 1)]
    return least[-1]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_optimum_of_the_tests_is_that_of_all_partitions(count: int) -> None:
    values, mass = gaussian(1, 9)[0].sort().values, masses(1, 9)[0]
    best = float("inf")
    for cuts in combinations(range(1, 9), count - 1):
        runs = list(zip((0, *cuts), (*cuts, 9), strict=True))
        means = [(values[a:b] * mass[a:b]).sum() / mass[a:b].sum() for a, b in runs]
        best = min(best, float(loss(values[None], mass[None], torch.stack(means)[None])))
    assert optimum(values, mass, count) == pytest.approx(best, rel=1e-5)


@counts
@pytest.mark.parametrize("weighted", [False, True])
def test_short_rows_reach_the_optimum(count: int, weighted: bool) -> None:
    values = gaussian(3, 40)
    mass = masses(3, 40) if weighted else torch.ones(3, 40)
    found = loss(values, mass, weighted_kmeans(values, mass, count))
    assert found.tolist() == pytest.approx([optimum(v, m, count) for v, m in zip(values, mass, strict=True)], rel=1e-5)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_long_rows_come_within_a_percent_of_the_optimum(count: int) -> None:
    values, mass = gaussian(1, CELLS + 30), masses(1, CELLS + 30)
    found = float(loss(values, mass, weighted_kmeans(values, mass, count)))
    best = optimum(values[0], mass[0], count)
    assert best * (1 - 1e-6) <= found <= 1.01 * best


@counts
def test_steps_never_increase_the_loss_and_end_where_nothing_moves(count: int) -> None:
    values, mass = gaussian(6, 1000), masses(6, 1000)
    history = [loss(values, mass, weighted_kmeans(values, mass, count, steps)) for steps in range(12)]
    for before, after in pairwise(history):
        assert (after <= before * (1 + 1e-6)).all()
    centers = weighted_kmeans(values, mass, count, 200).double()
    nearest = (values.double().unsqueeze(2) - centers.unsqueeze(1)).abs().argmin(2)
    for k in range(count):
        own = mass.double() * (nearest == k)
        torch.testing.assert_close((own * values).sum(1) / own.sum(1), centers[:, k], rtol=1e-4, atol=1e-5)
    assert (history[-1] < history[0]).any()


@pytest.mark.parametrize("count", [2, 8, 128, 256])
def test_gaussian_values_get_the_quantizer_of_lloyd_and_max(count: int) -> None:
    values = torch.special.ndtri((torch.arange(20000) + 0.5) / 20000).expand(2, -1)
    distortion = loss(values, torch.ones_like(values), weighted_kmeans(values, torch.ones_like(values), count)) / 20000
    published = {2: 0.3634, 8: 0.03454}  # Max, Quantizing for minimum distortion, 1960, table I
    many = 3**0.5 * torch.pi / 2 / count**2  # Panter and Dite, 1951
    assert float(distortion[0]) == pytest.approx(published.get(count, many), rel=2e-3 if count in published else 0.1)


def test_rows_do_not_depend_on_each_other_or_on_the_order_of_columns() -> None:
    values, mass = gaussian(70, 300), masses(70, 300)
    together = weighted_kmeans(values, mass, 8, 5)
    alone = torch.cat([weighted_kmeans(v[None], m[None], 8, 5) for v, m in zip(values, mass, strict=True)])
    torch.testing.assert_close(together, alone)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(together, weighted_kmeans(values[:, order], mass[:, order], 8, 5))


def test_the_codebook_follows_scale_and_shift_of_weights_and_not_the_scale_of_importance() -> None:
    values, mass = gaussian(4, 300), masses(4, 300)
    plain = weighted_kmeans(values, mass, 8)
    torch.testing.assert_close(weighted_kmeans(0.01 * values + 3, mass, 8), 0.01 * plain + 3, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted_kmeans(values, 1e-9 * mass, 8), plain)


@pytest.mark.parametrize("columns", [30, 300])
def test_values_without_mass_have_no_say(columns: int) -> None:
    values, mass = gaussian(4, columns), masses(4, columns)
    mass[:, ::3] = 0
    centers = weighted_kmeans(values, mass, 4)
    disturbed = values.clone()
    disturbed[:, ::3] = 1e4 * gaussian(4, columns, 7)[:, ::3]
    torch.testing.assert_close(weighted_kmeans(disturbed, mass, 4), centers)


def test_rows_without_any_mass_count_all_values_alike() -> None:
    values = gaussian(3, 200)
    mass = masses(3, 200)
    mass[1] = 0
    expected = weighted_kmeans(values, torch.ones_like(values), 8)[1]
    assert torch.equal(weighted_kmeans(values, mass, 8)[1], expected)


@pytest.mark.parametrize("columns", [1, 3, 20, 300])
def test_few_different_values_are_kept_exactly(columns: int) -> None:
    choices = torch.tensor([-2.0, -0.5, 0.0, 0.25, 7.0])
    weight = choices[torch.randint(5, (4, columns), generator=torch.Generator().manual_seed(0))]
    for width in (3, 4, 8):
        assert torch.equal(Codebook(width).fit(weight).snap(weight), weight)
    assert not Codebook(2).fit(torch.zeros(2, columns)).snap(torch.zeros(2, columns)).any()


def test_importances_of_extremely_different_size_stay_harmless() -> None:
    values = gaussian(4, 500)
    mass = torch.exp(12 * gaussian(4, 500, 1))
    centers = weighted_kmeans(values, mass, 16)
    assert centers.isfinite().all() and (centers.diff(dim=1) >= 0).all()
    assert (centers.amin(1) >= values.amin(1)).all() and (centers.amax(1) <= values.amax(1)).all()


def test_codes_are_the_nearest_entries() -> None:
    weight = gaussian(5, 300)
    grid = Codebook(3).fit(weight, masses(5, 300))
    distance = (weight.unsqueeze(2) - grid.codebook.unsqueeze(1)).abs()
    assert torch.equal(grid.encode(weight).long(), distance.argmin(2))
    assert torch.equal(grid.codebook, grid.codebook.half().float())
    assert all(len(row.unique()) <= 8 for row in grid.snap(weight))


def test_a_codebook_loses_less_than_integers_of_the_row() -> None:
    weight = gaussian(8, 256)
    for width in (2, 3, 4):
        fmt = Codebook(width)
        ours, integers = (f.fit(weight).snap(weight) - weight for f in (fmt, Integer(width)))
        assert (ours.square().sum(1) < integers.square().sum(1)).all()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("columns", [256, 172, 5])
def test_packing_keeps_every_weight_and_the_promised_size(width: int, columns: int) -> None:
    fmt, weight = Codebook(width), gaussian(6, columns)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    assert packed.stored_bits() == fmt.stored_bits((6, columns))


def test_a_row_stores_its_table() -> None:
    assert Codebook(3).stored_bits((64, 1024)) / (64 * 1024) == 3 + 16 * 8 / 1024


@pytest.mark.parametrize(
    "rounding",
    [Nearest(), GPTQRounding(), GPTQRounding(act_order=True), GPTQRounding(act_order=True, static_groups=True)],
    ids=["nearest", "gptq", "act_order", "static_groups"],
)
def test_every_rounding_uses_the_same_codebook(rounding: Rounding) -> None:
    weight = gaussian(6, 80)
    x = gaussian(320, 80, 1) * torch.exp(gaussian(1, 80, 3) / 2)
    rounded = rounding(weight, Codebook(3), x.T @ x / 320)
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)
    assert rounded.packed.stored_bits() == Codebook(3).stored_bits((6, 80))
    entries = Codebook(3).fit(weight).codebook
    for row, entry in zip(rounded.weight, entries, strict=True):
        torch.testing.assert_close(row, entry[(row.unsqueeze(1) - entry).abs().argmin(1)], rtol=1e-3, atol=1e-4)


def test_gptq_loses_less_at_the_output_than_nearest() -> None:
    weight = gaussian(16, 96)
    x = gaussian(384, 96, 1) @ (torch.eye(96) + gaussian(96, 96, 2) / 96**0.5)
    losses = []
    for rounding in (GPTQRounding(), Nearest()):
        error = rounding(weight, Codebook(3), x.T @ x / 384).weight - weight
        losses.append(float((error @ x.T).square().sum()))
    assert losses[0] < 0.8 * losses[1]


def test_column_ranges_and_refits() -> None:
    weight = gaussian(4, 80)
    grid = Codebook(3).fit(weight)
    assert grid.group_size == 80
    for start, stop in ((0, 1), (5, 33), (79, 80)):
        assert torch.equal(grid.encode(weight[:, start:stop], start), grid.encode(weight)[:, start:stop])
        assert torch.equal(grid.snap(weight[:, start:stop], start), grid.snap(weight)[:, start:stop])
    grid.refit(0, 3 * weight)
    assert torch.equal(grid.snap(3 * weight), Codebook(3).fit(3 * weight).snap(3 * weight))


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="fp16"):
        Codebook(2).fit(1e7 * gaussian(2, 8))


@pytest.mark.parametrize("width", [0, 9])
def test_impossible_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        Codebook(width)
