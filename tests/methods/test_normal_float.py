import math

import pytest
import torch
import yaml
from scipy.stats import norm
from torch import Tensor

from kernels.packed_normal_float import DYNAMIC, NF4_LEVELS
from methods.formats.normal_float import NF4
from methods.formats.registry import FORMATS, named_format
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest

both = pytest.mark.parametrize("fmt", [NF4(), NF4(double=True)], ids=lambda fmt: fmt.name)


def gaussian(out: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def block_maxima(weight: Tensor) -> Tensor:
    return torch.stack([part.abs().amax(1) for part in weight.split(64, dim=1)], 1)


def test_levels_are_the_normal_quantiles_of_the_paper() -> None:
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    upper = norm.ppf(torch.linspace(outermost, 0.5, 9, dtype=torch.float64))
    lower = -norm.ppf(torch.linspace(outermost, 0.5, 8, dtype=torch.float64))
    levels = torch.tensor([*lower, *upper[-2::-1]]) / upper[0]
    torch.testing.assert_close(NF4_LEVELS.values().double(), levels, rtol=1e-6, atol=1e-7)
    assert len(levels) == 16
    assert NF4_LEVELS.bits == 4
    assert NF4_LEVELS.levels[7] == 0


def test_dynamic_codes_have_an_exponent_in_unary_and_the_other_bits_for_the_fraction() -> None:
    expected = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent
        for part in range(parts):
            center = 0.1 + 0.9 * (part + 0.5) / parts
            expected += [center * 10.0 ** (exponent - 6), -center * 10.0 ** (exponent - 6)]
    torch.testing.assert_close(DYNAMIC.values(), torch.tensor(sorted(expected)), rtol=1e-6, atol=0)
    assert DYNAMIC.bits == 8


@pytest.mark.parametrize("table", [NF4_LEVELS, DYNAMIC], ids=["nf4", "dynamic"])
def test_codes_are_the_nearest_numbers(table) -> None:
    x = torch.cat([gaussian(1, 2000)[0], torch.tensor([math.inf, -math.inf, 0.0, 1e-40])])
    nearest = (x.clamp(-9, 9)[:, None] - table.values()).abs().argmin(1)
    assert torch.equal(table.encode(x).long(), nearest)
    assert torch.equal(table.encode(table.values()).long(), torch.arange(2**table.bits))


def test_half_way_cases_go_to_the_lower_level_as_in_bitsandbytes() -> None:
    middle = (NF4_LEVELS.values()[1:] + NF4_LEVELS.values()[:-1]) / 2
    assert NF4_LEVELS.encode(middle).tolist() == list(range(15))


def test_each_weight_takes_the_nearest_level_under_the_largest_magnitude_of_its_block() -> None:
    weight = gaussian(4, 150)
    grid = NF4().fit(weight)
    scale = block_maxima(weight)
    assert torch.equal(grid.scale, scale)
    points = scale.repeat_interleave(64, 1)[:, :150, None] * torch.tensor(NF4_LEVELS.levels)
    error = (points - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((grid.snap(weight) - weight).abs(), error)


def test_the_largest_weight_of_a_positive_block_is_exact() -> None:
    weight = gaussian(8, 128).abs()
    snapped = NF4().fit(weight).snap(weight)
    assert torch.equal(block_maxima(snapped), block_maxima(weight))


def test_double_quantization_stores_scales_as_the_paper_says() -> None:
    weight = gaussian(6, 64 * 100) * torch.exp(gaussian(6, 1, 1))  # 600 blocks: two second-level blocks and a part
    grid = NF4(double=True).fit(weight)
    packed = grid.pack(grid.encode(weight))
    scale = block_maxima(weight).flatten()
    offset = scale - scale.mean()
    assert packed.mean == pytest.approx(float(scale.mean()), rel=1e-6)
    expected = []
    for block in offset.split(256):
        largest = block.abs().max()
        nearest = (block[:, None] / largest - DYNAMIC.values()).abs().argmin(1)
        expected.append(DYNAMIC.values()[nearest] * largest + scale.mean())
    torch.testing.assert_close(grid.scale.flatten(), torch.cat(expected), rtol=1e-6, atol=1e-6)
    assert packed.factor.shape == (3,)
    assert (grid.scale.flatten() - scale).abs().max() < 0.01 * offset.abs().max()


def test_double_quantization_encodes_under_the_scale_as_stored() -> None:
    weight = gaussian(6, 640)
    grid = NF4(double=True).fit(weight)
    points = grid.scale.repeat_interleave(64, 1)[..., None] * torch.tensor(NF4_LEVELS.levels)
    torch.testing.assert_close((grid.snap(weight) - weight).abs(), (points - weight[..., None]).abs().amin(-1))


def test_double_quantization_of_equal_scales_is_exact() -> None:
    weight = gaussian(4, 128).clamp(-2, 2)
    weight[:, ::64] = -3
    assert torch.equal(NF4(double=True).fit(weight).snap(weight), NF4().fit(weight).snap(weight))


def test_double_quantization_costs_little_accuracy() -> None:
    weight = gaussian(64, 1024)
    plain, double = ((fmt.fit(weight).snap(weight) - weight).square().mean() for fmt in (NF4(), NF4(double=True)))
    assert double < 1.01 * plain


def test_effective_bits_are_those_of_the_paper() -> None:
    assert NF4().stored_bits((4096, 4096)) / 4096**2 == 4.5
    assert NF4(double=True).stored_bits((4096, 4096)) / 4096**2 == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2
    assert {"nf4", "nf4-dq"} <= set(FORMATS)


@both
@pytest.mark.parametrize("columns", [1, 40, 64, 90, 256])
def test_packing_keeps_every_weight_and_the_promised_size(fmt: NF4, columns: int) -> None:
    weight = gaussian(6, columns)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    assert packed.stored_bits() == fmt.stored_bits((6, columns))
    assert packed.shape == (6, columns) and packed.bits == 4


@both
@pytest.mark.parametrize("start", [0, 5, 64])
def test_column_ranges_agree_with_the_whole_matrix(fmt: NF4, start: int) -> None:
    weight = gaussian(4, 150)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    for stop in range(start + 1, 151, 13):
        assert torch.equal(grid.encode(weight[:, start:stop], start), codes[:, start:stop])
        assert torch.equal(grid.decode(codes[:, start:stop], start), grid.decode(codes)[:, start:stop])


@both
def test_zero_blocks_stay_zero(fmt: NF4) -> None:
    assert not fmt.fit(torch.zeros(3, 100)).snap(torch.zeros(3, 100)).any()
    weight = gaussian(3, 128)
    weight[:, :64] = 0
    weight[1] = 0
    snapped = fmt.fit(weight).snap(weight)
    assert not snapped[:, :64].any() and not snapped[1].any()
    assert snapped.isfinite().all() and snapped[0, 64:].any()


@both
def test_refitting_changes_one_block(fmt: NF4) -> None:
    weight = gaussian(4, 256)
    grid = fmt.fit(weight)
    before = grid.scale.clone()
    block = 0.9 * weight[:, 64:128]
    grid.refit(1, block)
    torch.testing.assert_close(grid.scale[:, 1], block.abs().amax(1), rtol=0.02, atol=0)
    others = [0, 2, 3]
    assert torch.equal(grid.scale[:, others], before[:, others])
    codes = grid.encode(weight)
    assert torch.equal(grid.pack(codes).dequantize(), grid.decode(codes))


def test_refitting_keeps_the_second_scales_and_saturates_beyond_them() -> None:
    weight = gaussian(4, 256)
    grid = NF4(double=True).fit(weight)
    mean, factor = float(grid.mean), float(grid.factor)
    grid.refit(2, 100 * torch.ones(4, 64))
    assert (float(grid.mean), float(grid.factor)) == (mean, factor)
    torch.testing.assert_close(grid.scale[:, 2], torch.full((4,), mean + factor))
    torch.testing.assert_close(grid.snap(100 * torch.ones(4, 64), 128), torch.full((4, 64), mean + factor))


@both
def test_a_permuted_grid_keeps_the_scales(fmt: NF4) -> None:
    weight = gaussian(4, 150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    grid = fmt.fit(weight)
    codes = grid.permuted(order).encode(weight[:, order])
    assert torch.equal(grid.permuted(order).pack(codes, order).dequantize(), grid.snap(weight))


@both
def test_blocks_of_columns_that_are_not_neighbors_are_refused(fmt: NF4) -> None:
    weight, order = gaussian(4, 150), torch.arange(150).flip(0)
    grid = fmt.fit(weight[:, order])
    with pytest.raises(ValueError, match=f"{fmt.name} stores no group index.*static_groups"):
        grid.pack(grid.encode(weight[:, order]), order)


@both
@pytest.mark.parametrize("options", [{}, {"act_order": True, "static_groups": True}], ids=str)
def test_gptq_loses_less_than_rounding_to_nearest(fmt: NF4, options: dict[str, bool]) -> None:
    x = gaussian(600, 150, 7) @ (torch.eye(150) + gaussian(150, 150, 8) / 20)
    weight, gram = gaussian(24, 150), x.T @ x / 600
    ours, nearest = GPTQRounding(**options)(weight, fmt, gram), Nearest()(weight, fmt)
    assert torch.equal(ours.packed.dequantize(), ours.weight)
    loss = [float(((r.weight - weight) @ gram * (r.weight - weight)).sum()) for r in (ours, nearest)]
    assert loss[0] < 0.85 * loss[1]


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(fmt: NF4, bad: float) -> None:
    weight = gaussian(4, 100)
    weight[1, 70] = bad
    with pytest.raises(FloatingPointError, match=fmt.name):
        fmt.fit(weight)


def test_the_variant_names_a_format_that_there_is(request: pytest.FixtureRequest) -> None:
    variant = yaml.safe_load((request.config.rootpath / "conf/method/nf4.yaml").read_text())
    assert named_format(variant["format"]) == NF4(double=True)


def test_bitsandbytes_finds_the_same_weights() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(16, 640)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(NF4().fit(weight).snap(weight), theirs, rtol=1e-6, atol=0)
    assert torch.equal(functional.create_dynamic_map(), DYNAMIC.values())


def test_bitsandbytes_finds_the_same_second_scales() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(64, 1280) * torch.exp(gaussian(64, 1, 1))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    grid = NF4(double=True).fit(weight)
    torch.testing.assert_close(grid.mean, state.offset)
    torch.testing.assert_close(grid.factor, state.state2.absmax)
    assert (grid.stored.flatten() == state.absmax).float().mean() > 0.995
    ours, theirs = grid.snap(weight), functional.dequantize_4bit(codes, state)
    assert (ours - weight).square().sum() <= (theirs - weight).square().sum()
