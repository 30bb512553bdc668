import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.packed_superblock import LAYOUTS, PackedSuperBlock
from kernels.packing import unpack
from methods.formats.integer import Integer
from methods.formats.registry import FORMATS, named_format
from methods.formats.superblock import KQUANTS, SuperBlock
from methods.formats.superblock_search import SEARCHES
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest

BLOCK_BYTES = {2: 84, 3: 110, 4: 144, 5: 176, 6: 210}
"""Of a super-block of llama.cpp: sizes of block_q2_K to block_q6_K in ggml-common.h."""

widths = pytest.mark.parametrize("fmt", KQUANTS.values(), ids=lambda fmt: fmt.name)
guided = pytest.mark.parametrize("guided", [False, True], ids=["plain", "imatrix"])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def importances(columns: int) -> Tensor:
    return torch.exp(1.5 * gaussian(columns, seed=5))


def given(columns: int, guided: bool) -> Tensor | None:
    return importances(columns) if guided else None


def levels_of(packed: PackedSuperBlock) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each sub-block, decoded number by number from the buffers."""
    layout, out = packed.layout, packed.shape[0]
    blocks = -(-packed.shape[1] // layout.block)
    codes = unpack(packed.scale, layout.scale_bits, blocks).tolist()
    offset = 0 if layout.affine else 2 ** (layout.scale_bits - 1)
    per = 256 // layout.block
    scale = [
        [(codes[r][b] - offset) * float(packed.scale_unit[r, b // per]) for b in range(blocks)] for r in range(out)
    ]
    if packed.minimum is None:
        return torch.tensor(scale), torch.zeros(out, blocks)
    codes = unpack(packed.minimum, layout.scale_bits, blocks).tolist()
    minimum = [[codes[r][b] * float(packed.minimum_unit[r, b // per]) for b in range(blocks)] for r in range(out)]
    return torch.tensor(scale), torch.tensor(minimum)


@pytest.mark.parametrize("width", KQUANTS)
def test_a_super_block_takes_what_it_takes_in_llama_cpp(width: int) -> None:
    fmt = KQUANTS[width]
    assert fmt.stored_bits((1, 256)) == 8 * BLOCK_BYTES[width]
    assert fmt.stored_bits((3, 11008)) == 3 * 43 * 8 * BLOCK_BYTES[width]
    bits = {2: 2.625, 3: 3.4375, 4: 4.5, 5: 5.5, 6: 6.5625}
    assert fmt.stored_bits((512, 1024)) / (512 * 1024) == bits[width]
    assert named_format(f"q{width}_k") == fmt and fmt.bits == width


@widths
@pytest.mark.parametrize("columns", [1, 10, 40, 256, 300, 688])
def test_packing_keeps_every_weight_and_the_promised_size(fmt: SuperBlock, columns: int) -> None:
    weight = gaussian(5, columns)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    assert packed.stored_bits() == fmt.stored_bits((5, columns))
    assert packed.shape == (5, columns) and packed.bits == fmt.width


@widths
@guided
def test_weights_are_what_the_buffers_say_and_the_nearest_of_the_grid(fmt: SuperBlock, guided: bool) -> None:
    weight = gaussian(3, 300)
    grid = fmt.fit(weight, given(300, guided))
    packed = grid.pack(grid.encode(weight))
    scale, minimum = (level.repeat_interleave(fmt.layout.block, 1)[:, :300] for level in levels_of(packed))
    codes = unpack(packed.codes, fmt.width, 300).float()
    offset = 0 if fmt.layout.affine else 2 ** (fmt.width - 1)
    torch.testing.assert_close(packed.dequantize(), (codes - offset) * scale - minimum)
    values = torch.arange(2.0**fmt.width) - offset
    points = values * scale[..., None] - minimum[..., None]
    nearest = (points - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((packed.dequantize() - weight).abs(), nearest, rtol=1e-4, atol=1e-5)


@widths
def test_scales_and_minima_are_whole_multiples_within_their_bits(fmt: SuperBlock) -> None:
    grid = fmt.fit(gaussian(4, 512))
    for level in grid.levels:
        assert level.unit.dtype == torch.float16
        assert level.unit.shape == (4, 2)
        per_super = level.codes.float().view(4, 2, -1) - fmt.layout.scale_offset
        extreme = 2 ** (fmt.layout.scale_bits - 1) if fmt.layout.scale_offset else 2**fmt.layout.scale_bits - 1
        assert (per_super.abs().amax(-1) == extreme).all()  # without importances the largest takes the last code


@widths
@guided
def test_scales_beat_the_range_of_the_sub_block(fmt: SuperBlock, guided: bool) -> None:
    """Least squares lose less than minimum and maximum would, even with the latter's scales unquantized."""
    weight, importance = gaussian(32, 512), given(512, guided)
    counts = torch.ones(512) if importance is None else importance
    ours = fmt.fit(weight, importance).snap(weight)
    blocks, top = weight.unflatten(1, (-1, fmt.layout.block)), fmt.layout.top
    if fmt.layout.affine:
        low = blocks.amin(-1, keepdim=True).clamp(max=0)
        step = (blocks.amax(-1, keepdim=True) - low) / top
        by_range = (torch.round((blocks - low) / step) * step + low).flatten(1)
    else:
        step = blocks.abs().amax(-1, keepdim=True) / top
        by_range = (torch.round(blocks / step).clamp(-top, top - 1) * step).flatten(1)
    assert ((ours - weight).square() * counts).sum() < ((by_range - weight).square() * counts).sum()


def affine_by_hand(x: np.ndarray, loss: np.ndarray, top: int, search: tuple[float, float, int, int]) -> list[float]:
    """Scale and minimum of one sub-block, by a solver of least squares in double precision."""
    first, step, count, power = search
    low, high = min(x.min(), 0.0), x.max()
    found, least = [(high - low) / top, low], math.inf
    for trial in range(-1, count):
        divisions = top if trial < 0 else top + first + step * trial
        codes = np.rint(divisions * (x - low) / (high - low)).clip(0, top)
        columns = np.stack([codes, np.ones_like(codes)], 1)
        if trial >= 0:
            solution = np.linalg.lstsq(columns * np.sqrt(loss)[:, None], x * np.sqrt(loss), rcond=None)[0]
            if solution[1] > 0:
                solution = np.array([(loss * codes * x).sum() / (loss * codes**2).sum(), 0.0])
        else:
            solution = np.array(found)
        error = (loss * abs(columns @ solution - x) ** power).sum()
        if error < least:
            found, least, low = list(solution), error, solution[1]
    return [found[0], -found[1]]


@pytest.mark.parametrize(
    ("key", "search"),
    [
        ((2, False), (-0.5, 0.1, 16, 1)),
        ((4, False), (-1.0, 0.1, 21, 2)),
        ((5, False), (-0.5, 0.1, 16, 2)),
        ((2, True), (-0.9, 0.05, 37, 2)),
        ((4, True), (-0.9, 0.05, 37, 2)),
    ],
    ids=str,
)
def test_scale_and_minimum_are_the_least_squares_of_the_best_range(
    key: tuple[int, bool], search: tuple[float, float, int, int]
) -> None:
    layout = LAYOUTS[key[0]]
    x = gaussian(layout.block, 1, 12, 1) + torch.linspace(-1, 5, 12).view(1, 1, 12, 1)  # the last all positive
    loss = SEARCHES[key].loss(x, torch.exp(gaussian(layout.block, 1, 1, 1, seed=9)))
    ours = torch.stack(SEARCHES[key].levels(x, loss, layout.top)).flatten(1).T
    by_hand = [
        affine_by_hand(*(t[:, 0, i, 0].double().numpy() for t in (x, loss)), layout.top, search) for i in range(12)
    ]
    torch.testing.assert_close(ours, torch.tensor(by_hand), rtol=1e-3, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("key", [(6, False), (3, True), (6, True)], ids=str)
def test_the_symmetric_scale_is_the_least_squares_of_the_best_step(key: tuple[int, bool]) -> None:
    top = LAYOUTS[key[0]].top
    x = gaussian(16, 1, 12, 1)
    loss = SEARCHES[key].loss(x, torch.exp(gaussian(16, 1, 1, 1, seed=9)))
    (ours,) = SEARCHES[key].levels(x, loss, top)
    for i, scale in enumerate(ours.flatten().tolist()):
        column, counts = x[:, 0, i, 0].double(), loss[:, 0, i, 0].double()
        peak = column[column.abs().argmax()]
        steps = -(top + 0.1 * torch.arange(-9, 10)) / peak
        codes = torch.round(steps[:, None] * column).clamp(-top, top - 1)
        factors = (counts * codes * column).sum(1) / (counts * codes * codes).sum(1)
        errors = (counts * (factors[:, None] * codes - column).square()).sum(1)
        assert scale == pytest.approx(float(factors[errors.argmin()]), rel=1e-4)


@pytest.mark.parametrize(
    ("key", "loss"),
    [
        ((2, False), lambda x, q: q * abs(x)),
        ((3, False), lambda x, q: q * x**2),
        ((4, False), lambda x, q: q * (abs(x) + (x**2).mean(0).sqrt())),
        ((5, False), lambda x, q: q * (abs(x) + (x**2).mean(0).sqrt())),
        ((6, False), lambda x, q: q * x**2),
        ((2, True), lambda x, q: q * (x**2 + (x**2).mean((0, 1))).sqrt()),
        ((3, True), lambda x, q: q * (x**2 + 2 * (x**2).mean((0, 1))).sqrt()),
        ((4, True), lambda x, q: q * (x**2 + 2 * (x**2).mean((0, 1))).sqrt()),
        ((5, True), lambda x, q: q * (x**2 + 2 * (x**2).mean((0, 1))).sqrt()),
        ((6, True), lambda x, q: q + 0 * x),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_errors_count_what_they_count_in_llama_cpp(
    key: tuple[int, bool], loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    x, importance = gaussian(16, 4, 3, 2), torch.exp(gaussian(16, 4, 1, 2, seed=1))
    torch.testing.assert_close(SEARCHES[key].loss(x, importance), loss(x, importance))


def test_downhill_ends_where_no_single_code_can_improve() -> None:
    search = SEARCHES[3, False]
    x = gaussian(16, 50)
    x = x * -x.gather(0, x.abs().argmax(0, keepdim=True)).sign()
    loss = search.loss(x, torch.ones_like(x))
    (factor,) = search.levels(x, loss, 4)
    codes = torch.round(x / factor).clamp(-4, 3)

    def fit(codes: Tensor) -> Tensor:
        return (loss * x * codes).sum(0).square() / (loss * codes * codes).sum(0)

    best = torch.stack([fit(codes.index_fill(0, torch.tensor(i), v)) for i in range(16) for v in range(-4, 4)]).amax(0)
    total = (loss * x * x).sum(0)
    assert ((best - fit(codes)) / total).mean() < 2e-4
    start = torch.round(-4 / x.gather(0, x.abs().argmax(0, keepdim=True)) * x).clamp(-4, 3)
    assert (fit(codes) >= fit(start) * (1 - 1e-5)).all() and (fit(codes) > 1.001 * fit(start)).any()


@pytest.mark.parametrize("width", KQUANTS)
def test_with_importances_units_are_searched_where_llama_cpp_searches(width: int) -> None:
    layout = LAYOUTS[width]
    levels, loss = gaussian(layout.per_super, 200).abs(), torch.exp(gaussian(layout.per_super, 200, seed=1))

    def error(guided: bool) -> Tensor:
        unit, codes = SEARCHES[width, guided].units(levels, loss, layout.scale_top)
        return (loss * (unit * codes - levels).square()).sum(0)

    by_range, searched = error(guided=False), error(guided=True)
    if width == 6:
        assert torch.equal(searched, by_range)
    else:
        assert searched.mean() < 0.8 * by_range.mean()


def test_units_of_minima_start_from_the_best_of_nine_steps() -> None:
    x, loss = gaussian(16, 200).abs(), torch.exp(gaussian(16, 200, seed=1))
    unit, codes = SEARCHES[2, True].units(x, loss, 15)
    least = torch.full((200,), torch.inf)
    for shift in range(-4, 5):
        step = x.amax(0) / (15 + 0.1 * shift)
        least = torch.minimum(least, (loss * (step * torch.round(x / step).clamp(max=15) - x).square()).sum(0))
    assert ((loss * (unit * codes - x).square()).sum(0) <= least * (1 + 1e-5)).all()


@widths
def test_importances_reduce_the_error_that_they_weigh(fmt: SuperBlock) -> None:
    weight, importance = gaussian(32, 512), importances(512)
    plain, ours = (fmt.fit(weight, given).snap(weight) for given in (None, importance))
    assert ((ours - weight).square() @ importance).sum() < 0.97 * ((plain - weight).square() @ importance).sum()


@widths
def test_only_ratios_of_importances_matter(fmt: SuperBlock) -> None:
    weight, importance = gaussian(8, 512), importances(512)
    assert torch.equal(fmt.fit(weight, importance).snap(weight), fmt.fit(weight, 4 * importance).snap(weight))


@widths
@guided
def test_snapping_is_idempotent_and_scale_equivariant(fmt: SuperBlock, guided: bool) -> None:
    weight, importance = 8 * gaussian(8, 300), given(300, guided)  # units then lie where fp16 is not subnormal
    grid = fmt.fit(weight, importance)
    snapped = grid.snap(weight)
    assert torch.equal(grid.snap(snapped), snapped)
    assert torch.equal(fmt.fit(4 * weight, importance).snap(4 * weight), 4 * snapped)


def test_finer_k_quants_lose_less_and_beat_integers_of_as_many_bits() -> None:
    weight = gaussian(32, 1024)
    loss = [float((fmt.fit(weight).snap(weight) - weight).square().mean()) for fmt in KQUANTS.values()]
    assert all(finer < coarser / 2 for coarser, finer in pairwise(loss))
    integer = Integer(4, 40)  # 4.5 bits, as q4_k
    assert loss[2] < 0.9 * float((integer.fit(weight).snap(weight) - weight).square().mean())


@widths
@guided
@pytest.mark.parametrize("columns", [266, 300, 500])
def test_a_ragged_last_super_block_is_fitted_as_if_alone(fmt: SuperBlock, guided: bool, columns: int) -> None:
    weight, importance = gaussian(4, columns), given(columns, guided)
    last = None if importance is None else importance[256:]
    assert torch.equal(
        fmt.fit(weight, importance).snap(weight)[:, 256:], fmt.fit(weight[:, 256:], last).snap(weight[:, 256:])
    )


@widths
@guided
def test_zero_blocks_stay_zero(fmt: SuperBlock, guided: bool) -> None:
    importance = given(512, guided)
    assert not fmt.fit(torch.zeros(2, 512), importance).snap(torch.zeros(2, 512)).any()
    weight = gaussian(3, 512)
    weight[:, :256] = 0
    weight[0, 256:288] = 0
    weight[1] = 0
    snapped = fmt.fit(weight, importance).snap(weight)
    assert snapped.isfinite().all()
    assert not snapped[:, :256].any() and not snapped[1].any() and not snapped[0, 256:288].any()
    assert (snapped[2, 256:] - weight[2, 256:]).norm() < 0.4 * weight[2, 256:].norm()


@widths
def test_inputs_that_were_never_active_keep_their_weights(fmt: SuperBlock) -> None:
    weight, importance = gaussian(8, 512), importances(512)
    importance[:32] = 0
    importance[256:] = 0
    snapped = fmt.fit(weight, importance).snap(weight)
    for dead in (slice(0, 32), slice(256, 512)):
        assert (snapped[:, dead] - weight[:, dead]).norm() < 0.6 * weight[:, dead].norm()


@widths
def test_without_any_importance_all_inputs_count_the_same(fmt: SuperBlock) -> None:
    weight = gaussian(4, 300)
    nothing, same = (fmt.fit(weight, given).snap(weight) for given in (torch.zeros(300), torch.ones(300)))
    assert torch.equal(nothing, same)


@widths
def test_an_outlier_spoils_little_beyond_its_sub_block(fmt: SuperBlock) -> None:
    weight = gaussian(1, 512)
    weight[0, 40] = 20
    grid = fmt.fit(weight)
    assert grid.snap(weight)[0, 40] == pytest.approx(20, rel=0.2)
    calm = fmt.fit(weight[:, 256:]).snap(weight[:, 256:])
    assert torch.equal(grid.snap(weight)[:, 256:], calm)


@widths
@pytest.mark.parametrize("start", [0, 5, 32, 256])
def test_column_ranges_agree_with_the_whole_matrix(fmt: SuperBlock, start: int) -> None:
    weight = gaussian(4, 300)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    for stop in range(start + 1, 301, 23):
        assert torch.equal(grid.encode(weight[:, start:stop], start), codes[:, start:stop])
        assert torch.equal(grid.decode(codes[:, start:stop], start), grid.decode(codes)[:, start:stop])


@widths
def test_refitting_fits_one_sub_block_under_the_units_it_finds(fmt: SuperBlock) -> None:
    weight = gaussian(4, 512)
    grid = fmt.fit(weight)
    before = [(level.codes.clone(), level.unit.clone()) for level in grid.levels]
    group = 256 // fmt.layout.block + 1  # the second of the second super-block
    columns = slice(group * fmt.layout.block, (group + 1) * fmt.layout.block)
    changed = 0.7 * gaussian(4, fmt.layout.block, seed=3)
    stale = (grid.snap(changed, columns.start) - changed).square().sum()
    grid.refit(group, changed)
    assert (grid.snap(changed, columns.start) - changed).square().sum() < stale
    others = torch.arange(grid.scale.shape[1]) != group
    for level, (codes, unit) in zip(grid.levels, before, strict=True):
        assert torch.equal(level.unit, unit)
        assert torch.equal(level.codes[:, others], codes[:, others])
        assert not torch.equal(level.codes, codes)
    codes = grid.encode(weight)
    assert torch.equal(grid.pack(codes).dequantize(), grid.decode(codes))


@widths
def test_refitting_to_the_same_weights_changes_little(fmt: SuperBlock) -> None:
    weight = gaussian(16, 256)
    grid = fmt.fit(weight)
    before = (grid.snap(weight) - weight).square().mean()
    for group, part in enumerate(weight.split(fmt.layout.block, dim=1)):
        grid.refit(group, part)
    assert (grid.snap(weight) - weight).square().mean() == pytest.approx(float(before), rel=0.05)


@widths
def test_refitting_saturates_beyond_the_units(fmt: SuperBlock) -> None:
    weight = gaussian(4, 256)
    grid = fmt.fit(weight)
    largest = grid.decode(torch.full((4, 256), 2**fmt.width - 1)).abs().amax()
    grid.refit(0, 1000 * weight[:, : fmt.layout.block])
    assert grid.snap(1000 * weight[:, : fmt.layout.block]).abs().max() < 4 * largest
    assert grid.scale.isfinite().all()


@widths
def test_a_permuted_grid_keeps_the_scales(fmt: SuperBlock) -> None:
    weight = gaussian(4, 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    grid = fmt.fit(weight)
    codes = grid.permuted(order).encode(weight[:, order])
    assert torch.equal(grid.permuted(order).pack(codes, order).dequantize(), grid.snap(weight))


@widths
def test_blocks_of_columns_that_are_not_neighbors_are_refused(fmt: SuperBlock) -> None:
    weight, order = gaussian(4, 300), torch.arange(300).flip(0)
    grid = fmt.fit(weight[:, order])
    with pytest.raises(ValueError, match=f"{fmt.name} stores no group index.*static_groups"):
        grid.pack(grid.encode(weight[:, order]), order)


@widths
@pytest.mark.parametrize("options", [{}, {"act_order": True, "static_groups": True}], ids=str)
def test_gptq_loses_less_than_rounding_to_nearest(fmt: SuperBlock, options: dict[str, bool]) -> None:
    x = gaussian(800, 300, seed=7) @ (torch.eye(300) + gaussian(300, 300, seed=8) / 25)
    weight, gram = gaussian(24, 300), x.T @ x / 800
    ours, nearest = GPTQRounding(**options)(weight, fmt, gram), Nearest()(weight, fmt)
    assert torch.equal(ours.packed.dequantize(), ours.weight)
    loss = [float(((r.weight - weight) @ gram * (r.weight - weight)).sum()) for r in (ours, nearest)]
    assert loss[0] < 0.85 * loss[1]


@widths
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_weights_that_cannot_be_scaled_are_refused(fmt: SuperBlock, bad: float) -> None:
    weight = gaussian(4, 300)
    weight[1, 270] = bad
    with pytest.raises(FloatingPointError, match=fmt.name):
        fmt.fit(weight)


def test_there_are_k_quants_of_two_to_six_bits() -> None:
    assert {f"q{width}_k" for width in range(2, 7)} <= set(FORMATS)
    with pytest.raises(ValueError, match="2 to 6"):
        SuperBlock(8)
