import pytest
import torch
from torch import Tensor

from methods.formats.affine import LARGEST_ZERO, Affine
from methods.formats.base import Format
from methods.formats.integer import Integer
from methods.rounding.base import Rounding
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest

widths = pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
groups = pytest.mark.parametrize("group", [0, 32, 128])


def gaussian(out: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def snap(fmt: Format, weight: Tensor) -> Tensor:
    return fmt.fit(weight).snap(weight)


@widths
@groups
def test_every_weight_is_within_half_a_step(width: int, group: int) -> None:
    weight = gaussian(8, 96) + 0.5
    grid = Affine(width, group).fit(weight)
    step = grid.scale.repeat_interleave(grid.group_size, 1)
    stored_in_fp16 = (2**width - 1) * 2.0**-10  # relative errors of scale and zero point, summed up along the range
    assert ((grid.snap(weight) - weight).abs() <= step * (0.5 + stored_in_fp16)).all()


def test_one_bit_is_the_least_and_the_largest_weight() -> None:
    weight = gaussian(6, 40)
    low, high = weight.amin(1, True), weight.amax(1, True)
    expected = torch.where((weight - low) < (high - weight), low, high)
    torch.testing.assert_close(snap(Affine(1), weight), expected, rtol=2e-3, atol=0)


def test_the_grid_follows_a_shift_of_the_weights() -> None:
    weight = gaussian(8, 64)
    for shift in (-20.0, 3.0, 20.0):
        moved = snap(Affine(4, 32), weight + shift) - shift
        torch.testing.assert_close(
            (moved - weight).square().mean(), (snap(Affine(4, 32), weight) - weight).square().mean(), rtol=0.1, atol=0
        )
        assert (moved - weight).square().mean() < (
            snap(Integer(4, 32), weight + shift) - weight - shift
        ).square().mean()


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4, 1e-3])
def test_weights_far_from_zero_keep_the_precision_of_fp16(spread: float) -> None:
    weight = 0.3 + spread * gaussian(4, 64)
    for width in (2, 8):
        error = (snap(Affine(width, 32), weight) - weight).abs().max()
        assert error <= weight.abs().max() / LARGEST_ZERO + 2 * spread


def test_zero_groups_stay_zero() -> None:
    assert not snap(Affine(3, 8), torch.zeros(3, 20)).any()


def test_a_ragged_last_group_has_its_own_scale() -> None:
    weight = gaussian(4, 80)
    parts = [snap(Affine(3), part) for part in weight.split(32, dim=1)]
    assert torch.equal(snap(Affine(3, 32), weight), torch.cat(parts, 1))


@widths
@groups
@pytest.mark.parametrize("columns", [256, 172])
def test_packing_keeps_every_weight_and_the_promised_size(width: int, group: int, columns: int) -> None:
    fmt, weight = Affine(width, group), gaussian(6, columns)
    grid = fmt.fit(weight)
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes))
    assert packed.stored_bits() == fmt.stored_bits((6, columns))


def test_a_group_stores_32_bits() -> None:
    assert Affine(4, 64).stored_bits((128, 128)) / 128**2 == 4 + 32 / 64
    assert Affine(3).stored_bits((128, 128)) / 128**2 == 3 + 32 / 128


@pytest.mark.parametrize("start", [0, 5, 32, 64])
def test_column_ranges_agree_with_the_whole_matrix(start: int) -> None:
    weight = gaussian(4, 80)
    grid = Affine(3, 32).fit(weight)
    for stop in range(start + 1, 81, 7):
        codes = grid.encode(weight[:, start:stop], start)
        assert torch.equal(codes, grid.encode(weight)[:, start:stop])
        assert torch.equal(grid.decode(codes, start), grid.snap(weight)[:, start:stop])


def test_refitting_changes_one_group() -> None:
    weight = gaussian(4, 96)
    grid = Affine(3, 32).fit(weight)
    before = grid.snap(weight)
    part = 3 * weight[:, 32:64] + 1
    grid.refit(1, part)
    assert torch.equal(grid.snap(part, 32), snap(Affine(3), part))
    after = grid.snap(weight)
    assert torch.equal(after[:, :32], before[:, :32]) and torch.equal(after[:, 64:], before[:, 64:])
    assert not torch.equal(after[:, 32:64], before[:, 32:64])


def correlated(columns: int) -> Tensor:
    """The Gram matrix of correlated inputs with uneven energies."""
    x = gaussian(4 * columns, columns, 1) @ (torch.eye(columns) + gaussian(columns, columns, 2) / columns**0.5)
    x *= torch.exp(gaussian(1, columns, 3) / 2)
    return x.T @ x / len(x)


@pytest.mark.parametrize(
    "rounding",
    [Nearest(), GPTQRounding(), GPTQRounding(act_order=True), GPTQRounding(act_order=True, static_groups=True)],
    ids=["nearest", "gptq", "act_order", "static_groups"],
)
def test_what_a_rounding_returns_is_what_it_packs(rounding: Rounding) -> None:
    weight = gaussian(6, 80)
    rounded = rounding(weight, Affine(3, 32), correlated(80))
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)
    index = 16 * 80 if isinstance(rounding, GPTQRounding) and rounding.act_order and not rounding.static_groups else 0
    assert rounded.packed.stored_bits() == Affine(3, 32).stored_bits((6, 80)) + index


def test_gptq_loses_less_at_the_output_than_nearest() -> None:
    weight, gram = gaussian(16, 96), correlated(96)
    losses = []
    for rounding in (GPTQRounding(), Nearest()):
        error = rounding(weight, Affine(3, 32), gram).weight - weight
        losses.append(float((error @ gram * error).sum()))
    assert losses[0] < 0.8 * losses[1]


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="affine2"):
        Affine(2).fit(1e7 * gaussian(2, 8))


@pytest.mark.parametrize(("width", "group"), [(0, 0), (9, 0), (4, -1)])
def test_impossible_formats_are_refused(width: int, group: int) -> None:
    with pytest.raises(ValueError, match=r"bits|group size"):
        Affine(width, group)


def test_names_are_unique() -> None:
    formats = [Affine(width, group) for width in (2, 3) for group in (0, 32, 64)]
    assert len({fmt.name for fmt in formats}) == len(formats)
