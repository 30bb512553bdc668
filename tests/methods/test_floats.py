import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.minifloat import E2M1, E2M3, E4M3, E5M2, E8M0, MX_INT8, MiniFloat
from methods.formats.base import Format
from methods.formats.floats import FP8, MX, MX_NAMES, NVFP4, FloatGrid, ScaledFloat
from methods.formats.registry import FORMATS, named_format
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest

FLOATS = [fmt for fmt in FORMATS.values() if isinstance(fmt, ScaledFloat)]
BLOCKED = [fmt for fmt in FLOATS if fmt.block]
EMAX = {"mxfp4": 2, "mxfp6-e3m2": 4, "mxfp6-e2m3": 2, "mxfp8": 8, "mxfp8-e5m2": 15, "mxint8": 0}
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

formats = pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
blocked = pytest.mark.parametrize("fmt", BLOCKED, ids=lambda fmt: fmt.name)


def gaussian(out: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def uneven(out: int, columns: int, seed: int = 0) -> Tensor:
    """Weights whose magnitudes differ by orders from column to column, and from row to row."""
    return gaussian(out, columns, seed) * torch.exp(2 * gaussian(1, columns, seed + 1) + 2 * gaussian(out, 1, seed + 2))


def layer(out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and the Gram matrix of correlated inputs with uneven energies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    energies = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(4 * columns, columns, generator=generator) @ mix * energies.sqrt()
    return torch.randn(out, columns, generator=generator), x.T @ x / len(x)


def snap(fmt: Format, weight: Tensor) -> Tensor:
    return fmt.fit(weight).snap(weight)


def loss(fmt: Format, weight: Tensor) -> float:
    return float((snap(fmt, weight) - weight).square().mean())


def layer_loss(delta: Tensor, gram: Tensor) -> float:
    return float((delta.double() @ gram.double() * delta.double()).sum())


def scales(fmt: ScaledFloat, weight: Tensor) -> list[list[float]]:
    scale: list[list[float]] = fmt.fit(weight).scale.tolist()
    return scale


def nvfp4_by_hand(weight: Tensor) -> Tensor:
    """One weight at a time, in Python's floats, with E4M3 as torch has it."""
    tensor_scale = float(weight.abs().max()) / (448 * 6)
    result = weight.clone()
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 16):
            block = weight[row, start : start + 16]
            wanted = float(block.abs().max()) / (6 * tensor_scale)
            scale = torch.tensor(wanted).clamp(max=448).to(torch.float8_e4m3fn).float().item() * tensor_scale
            for i, w in enumerate(block.tolist()):
                nearest = min(FP4, key=lambda value: abs(abs(w) / scale - value))
                result[row, start + i] = math.copysign(nearest * scale, w)
    return result


def test_nvfp4_equals_its_definition() -> None:
    weight = gaussian(4, 64)
    torch.testing.assert_close(snap(NVFP4(), weight), nvfp4_by_hand(weight), rtol=1e-6, atol=0)


def test_nvfp4_reads_with_the_rounded_block_scale() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 448 * 6, 6 * 17.6  # tensor scale 1; E4M3 has 16, 18, …
    grid = NVFP4().fit(weight)
    assert float(grid.tensor_scale) == 1
    assert grid.scale.tolist() == [[448, 18]]
    assert grid.snap(weight)[0, 16] == 6 * 18


@pytest.mark.parametrize("name", EMAX)
def test_the_scale_of_mx_is_the_power_of_two_of_the_specification(name: str) -> None:
    amax = gaussian(1, 64).abs().mul(8) ** 3
    amax = torch.cat([amax, torch.exp2(torch.arange(-5.0, 6)).view(1, -1)], dim=1)
    amax = torch.cat([amax, torch.nextafter(amax, torch.zeros(()))], dim=1)[0]
    weight = amax[:, None] * torch.linspace(-1, 0.5, 32)  # one block a row
    expected = [[2.0 ** (math.floor(math.log2(a)) - EMAX[name])] for a in amax.tolist()]
    fmt = named_format(name)
    assert isinstance(fmt, MX)
    assert scales(fmt, weight) == expected


@pytest.mark.parametrize("name", EMAX)
def test_ceil_is_the_smallest_power_of_two_without_saturation(name: str) -> None:
    fmt = named_format(f"{name}-ceil")
    assert isinstance(fmt, MX)
    largest = fmt.element.max
    amax = torch.cat([gaussian(40, 1).abs(), torch.tensor([[largest], [2 * largest], [largest * 1.001]])])
    weight = amax * torch.linspace(-1, 0.5, 32)
    grid = fmt.fit(weight)
    assert (amax <= largest * grid.scale).all()
    assert (amax > largest * grid.scale / 2).all()
    assert ((grid.scale == MX(fmt.element).fit(weight).scale) | (amax > largest / 2 * grid.scale)).all()


def test_floor_saturates_where_ceil_does_not() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([7.9, 1.0])
    assert snap(MX(E2M1), weight)[0, :2].tolist() == [6, 1]
    assert snap(MX(E2M1, ceil=True), weight)[0, :2].tolist() == [8, 1]
    weight[0, 0] = 6  # nothing to gain
    assert scales(MX(E2M1), weight) == scales(MX(E2M1, ceil=True), weight) == [[1]]


def test_mxint8_is_fixed_point_below_the_leading_bit() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([4.0, 1 / 16, -7.99, 3 / 32])
    assert snap(MX(MX_INT8), weight)[0, :4].tolist() == [4, 1 / 16, -4 * 127 / 64, 2 / 16]


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_fp8_is_torchs_cast_under_one_scale_a_row(element: MiniFloat) -> None:
    weight = uneven(64, 96)
    grid = FP8(element).fit(weight)
    assert grid.scale.shape == (64, 1)
    ratio = grid.scale[:, 0] * element.max / weight.abs().amax(1)
    assert ((ratio >= 1) & (ratio <= 1 + 2**-10))[grid.scale[:, 0] > 2**-14].all()
    dtype = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[element]
    assert torch.equal(grid.snap(weight), (weight / grid.scale).to(dtype).float() * grid.scale)


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_scales_in_the_coarse_range_of_fp16_cut_nothing_off(element: MiniFloat) -> None:
    amax = torch.exp2(torch.linspace(-22, 0, 200)).view(-1, 1)
    grid = FP8(element).fit(amax)
    assert (grid.scale * element.max >= amax).all()
    assert torch.equal(grid.scale, grid.scale.half().float())


@formats
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-6, 6))
def test_errors_are_at_most_half_a_step(fmt: ScaledFloat, seed: int, exponent: int) -> None:
    weight = gaussian(3, 80, seed) * 2.0**exponent
    grid = fmt.fit(weight)
    scale = grid.scale.repeat_interleave(grid.group_size, 1)[:, :80].double()
    x = (weight.double() / scale).abs()
    values = fmt.element.values().double()
    values = values[(values >= 0) & (values <= fmt.element.max)].unique()
    upper = torch.searchsorted(values, x).clamp(1, len(values) - 1)
    error = ((grid.snap(weight) - weight).double() / scale).abs()
    half_step = (values[upper] - values[upper - 1]) / 2
    assert (error <= half_step * (1 + 1e-5))[x <= fmt.element.max].all()
    overflow = x - fmt.element.max
    torch.testing.assert_close(error[overflow > 0], overflow[overflow > 0], rtol=1e-4, atol=1e-4)


@formats
def test_snapping_is_idempotent_odd_and_scale_equivariant(fmt: ScaledFloat) -> None:
    weight = 64 * gaussian(8, 96)  # E5M2's scales per channel then lie where fp16 is not subnormal
    grid = fmt.fit(weight)
    snapped = grid.snap(weight)
    assert torch.equal(grid.snap(snapped), snapped)
    assert torch.equal(snap(fmt, -weight), -snapped)
    assert torch.equal(snap(fmt, 4 * weight), 4 * snapped)


@formats
def test_zero_blocks_and_zero_matrices_stay_zero(fmt: ScaledFloat) -> None:
    assert not snap(fmt, torch.zeros(3, 64)).any()
    weight = gaussian(4, 64)
    weight[:, :32] = 0
    weight[2] = 0
    snapped = snap(fmt, weight)
    assert snapped.isfinite().all()
    assert torch.equal(snapped == 0, (weight == 0) | (snapped == 0))
    assert snapped[:2, 32:].any(1).all()


@blocked
def test_an_outlier_spoils_only_its_own_block(fmt: ScaledFloat) -> None:
    weight = gaussian(2, 96)
    calm = weight.clone()
    weight[0, 40] = 100.0
    assert snap(fmt, weight)[0, 40] == pytest.approx(100, rel=0.4 if fmt.bits == 4 and isinstance(fmt, MX) else 0.08)
    others = torch.ones(2, 96, dtype=torch.bool)
    others[0, 32:64] = False
    ours, before = (snap(fmt, w)[others] - w[others] for w in (weight, calm))
    assert float(ours.square().mean()) <= 1.3 * float(before.square().mean())


def test_a_block_scale_that_would_round_to_zero_becomes_the_smallest() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 448 * 6, 6 * 2.0**-11  # its scale would be 2**-11, the smallest is 2**-9
    assert scales(NVFP4(), weight) == [[448, 2.0**-9]]
    assert snap(NVFP4(), weight)[0, 16] == 1.5 * 2.0**-9


def test_nvfp4_scales_are_1_where_there_is_nothing_to_scale() -> None:
    weight = torch.zeros(1, 32)
    assert float(NVFP4().fit(weight).tensor_scale) == 1
    weight[0, 0] = 448 * 6
    assert scales(NVFP4(), weight) == [[448, 1]]


def test_finer_formats_lose_less() -> None:
    weight = gaussian(64, 512)
    losses = {name: loss(fmt, weight) for name, fmt in FORMATS.items()}
    assert losses["nvfp4"] < losses["mxfp4"]
    assert losses["mxfp6-e2m3"] < losses["mxfp6-e3m2"] < losses["nvfp4"]
    assert losses["mxint8"] < losses["mxfp8"] < losses["mxfp8-e5m2"] < losses["mxfp4"]
    assert losses["dense16"] < losses["fp8"] < losses["fp8-e5m2"]


@blocked
@pytest.mark.parametrize("columns", [70, 90])
def test_a_ragged_last_block_is_rounded_as_if_alone(fmt: ScaledFloat, columns: int) -> None:
    weight = uneven(4, columns)
    weight[0, -1] = 2 * weight.abs().max()  # so that NVFP4's tensor scale is the same
    last = slice(columns - columns % fmt.block, None)
    assert torch.equal(snap(fmt, weight)[:, last], snap(fmt, weight[:, last]))


@formats
@pytest.mark.parametrize("columns", [256, 90, 8])
def test_packing_keeps_every_weight_and_the_promised_size(fmt: ScaledFloat, columns: int) -> None:
    weight = uneven(6, columns)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    assert packed.stored_bits() == fmt.stored_bits((6, columns))
    assert packed.bits == fmt.bits


@pytest.mark.parametrize(
    ("name", "bits"),
    [("fp8", 8 + 16 / 512), ("mxfp4", 4.25), ("mxfp6-e2m3", 6.25), ("mxint8", 8.25), ("nvfp4", 4.5 + 32 / 512**2)],
)
def test_effective_bits_count_scales(name: str, bits: float) -> None:
    assert named_format(name).stored_bits((512, 512)) / 512**2 == bits


@formats
@pytest.mark.parametrize("start", [0, 5, 32])
def test_column_ranges_agree_with_the_whole_matrix(fmt: ScaledFloat, start: int) -> None:
    weight = uneven(4, 80)
    grid = fmt.fit(weight)
    for stop in range(start + 1, 81, 7):
        codes = grid.encode(weight[:, start:stop], start)
        assert torch.equal(codes, grid.encode(weight)[:, start:stop])
        assert torch.equal(grid.decode(codes, start), grid.snap(weight)[:, start:stop])


@blocked
def test_refitting_changes_one_block(fmt: ScaledFloat) -> None:
    weight = gaussian(4, 96)
    grid = fmt.fit(weight)
    before = grid.snap(weight)
    block = slice(fmt.block, 2 * fmt.block)
    smaller = weight[:, block] / 8
    grid.refit(1, smaller)
    torch.testing.assert_close(grid.snap(smaller, fmt.block), before[:, block] / 8, rtol=0, atol=0.03)
    after = grid.pack(grid.encode(weight)).dequantize()
    assert torch.equal(after, grid.snap(weight))
    assert torch.equal(after[:, : fmt.block], before[:, : fmt.block])
    assert torch.equal(after[:, 2 * fmt.block :], before[:, 2 * fmt.block :])
    assert not torch.equal(after[:, block], before[:, block])


def test_refitting_keeps_nvfp4s_tensor_scale_and_saturates_beyond_it() -> None:
    weight = gaussian(4, 64)
    grid = NVFP4().fit(weight)
    largest, tensor_scale = weight.abs().max(), float(grid.tensor_scale)
    grid.refit(2, 10 * largest * torch.ones(4, 16))
    assert float(grid.tensor_scale) == tensor_scale
    torch.testing.assert_close(grid.snap(10 * largest * torch.ones(4, 16), 32), largest * torch.ones(4, 16))


@formats
def test_a_permuted_grid_keeps_the_scales(fmt: ScaledFloat) -> None:
    weight = uneven(4, 80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    grid = fmt.fit(weight)
    permuted = grid.permuted(order)
    codes = torch.cat([permuted.encode(weight[:, order[i : i + 1]], i) for i in range(80)], 1)
    assert torch.equal(permuted.pack(codes, order).dequantize(), grid.snap(weight))


@blocked
def test_blocks_of_columns_that_are_not_neighbors_are_refused(fmt: ScaledFloat) -> None:
    weight, order = gaussian(4, 80), torch.arange(80).flip(0)
    grid: FloatGrid = fmt.fit(weight[:, order])
    with pytest.raises(ValueError, match=f"{fmt.name} stores no group index.*static_groups"):
        grid.pack(grid.encode(weight[:, order]), order)


@formats
@pytest.mark.parametrize("options", [{}, {"block": 40}, {"act_order": True, "static_groups": True}], ids=str)
def test_gptq_loses_less_than_rounding_to_nearest(fmt: ScaledFloat, options: dict[str, bool]) -> None:
    ratios = []
    for seed in range(4):
        weight, gram = layer(24, 80, seed)
        ours, nearest = GPTQRounding(**options)(weight, fmt, gram), Nearest()(weight, fmt)
        assert torch.equal(ours.packed.dequantize(), ours.weight)
        assert ours.packed.stored_bits() == fmt.stored_bits((24, 80))
        ratios.append(layer_loss(ours.weight - weight, gram) / layer_loss(nearest.weight - weight, gram))
    assert sum(ratios) / len(ratios) < 0.85


def test_gptq_refits_blocks_under_the_tensor_scale_of_the_original_weights() -> None:
    weight, gram = layer(24, 80)
    packed = GPTQRounding()(weight, NVFP4(), gram).packed
    static = GPTQRounding(static_groups=True)(weight, NVFP4(), gram).packed
    assert torch.equal(packed.tensor_scale, weight.abs().max() / (448 * 6))
    assert torch.equal(static.scale, Nearest()(weight, NVFP4()).packed.scale)
    assert not torch.equal(packed.scale, static.scale)


@formats
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(fmt: ScaledFloat, bad: float) -> None:
    weight = gaussian(4, 80)
    weight[1, 70] = bad
    with pytest.raises(FloatingPointError, match=fmt.name):
        fmt.fit(weight)


def test_fp8_refuses_weights_beyond_the_scales_of_fp16() -> None:
    with pytest.raises(FloatingPointError, match="fp8"):
        FP8().fit(torch.full((1, 4), 448 * 70000.0))


def test_mx_scales_stay_powers_of_two_at_the_ends_of_fp32() -> None:
    for amax in (2e38, 1e-37, 1e-44):
        for element in MX_NAMES:
            grid = MX(element, ceil=True).fit(torch.full((1, 32), amax))
            assert torch.equal(torch.frexp(grid.scale).mantissa, torch.full((1, 1), 0.5))
            assert grid.snap(torch.full((1, 32), amax)).isfinite().all()
    assert torch.equal(E8M0.decode(MX(E2M3).fit(torch.full((1, 32), 1e-44)).stored), torch.full((1, 1), 2.0**-127))


def test_every_format_is_found_by_its_own_name() -> None:
    assert {"fp8", "fp8-e5m2", "mxfp8", "mxint8", "nvfp4", "dense16", "mxfp6-e3m2", "mxfp4-ceil"} <= set(FORMATS)
    assert all(named_format(name).name == name for name in FORMATS)


@pytest.mark.parametrize(("name", "remedy"), [("nvpf4", "did you mean nvfp4"), ("int4-g128", "there are .*fp8, ")])
def test_an_unknown_name_is_refused_with_a_remedy(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        named_format(name)


def test_impossible_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="e4m3"):
        FP8(E2M1)
    with pytest.raises(ValueError, match="FP8"):
        FP8(MX_INT8)
