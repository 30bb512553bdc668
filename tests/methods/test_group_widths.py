from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.linear import QuantLinear
from kernels.packed_group_widths import PackedGroupWidths, columns_bytes, pack_columns, unpack_columns
from kernels.packing import pack
from methods.formats.group_widths import GroupWidths, two_levels
from methods.formats.integer import Integer
from methods.rounding.gptq import GPTQRounding
from methods.rounding.nearest import Nearest

FORMATS = [
    GroupWidths((2, 1, 3, 2), 32),
    GroupWidths((4, 4, 4, 4), 32),
    GroupWidths((8, 6, 7), 48),
    GroupWidths((1, 1, 2, 3, 4, 1), 20),  # the last group is shorter
    GroupWidths((1,), 500),
]


def matrix(seed: int = 0, out: int = 6, columns: int = 112) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def gram(columns: int = 112) -> Tensor:
    x = matrix(9, 300, columns) @ (torch.eye(columns) + 0.3 * matrix(8, columns, columns) / columns**0.5)
    x = x * torch.linspace(0.2, 3, columns).sqrt()
    return x.t() @ x / len(x)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_each_group_is_an_integer_matrix_of_its_own(fmt: GroupWidths) -> None:
    weight = matrix()
    rounded = Nearest()(weight, fmt)
    for start, width in zip(range(0, 112, fmt.group_size), fmt.widths, strict=True):
        part = weight[:, start : start + fmt.group_size]
        if width > 1:
            expected = Nearest()(part, Integer(width)).weight
        else:  # the better of two levels around the mean, weight by weight
            mean = part.mean(1, keepdim=True)
            half = (part - mean).abs().mean(1, keepdim=True)
            levels = torch.stack([mean - half, mean + half], dim=-1).expand(-1, part.shape[1], -1)
            nearest = (levels - part.unsqueeze(-1)).abs().argmin(-1, keepdim=True)
            expected = levels.gather(-1, nearest).squeeze(-1)
        actual = rounded.weight[:, start : start + fmt.group_size]
        torch.testing.assert_close(actual, expected, rtol=0, atol=0 if width > 1 else 1e-3)


def exhaustive_levels(values: Tensor) -> float:
    """The least squared error of two levels, over all ways to cut the sorted values in two."""
    ordered, best = values.sort()[0], float("inf")
    for cut in range(1, len(ordered)):
        parts = ordered[:cut], ordered[cut:]
        best = min(best, sum(float((part - part.mean()).square().sum()) for part in parts))
    return best


def test_two_levels_are_near_the_best_two_and_the_best_around_the_mean() -> None:
    weight = matrix(3, 20, 64) + 0.5
    scale, zero = two_levels(weight)
    levels = torch.stack([-zero * scale, (1 - zero) * scale], dim=1)  # [out, 2]
    error = (weight.unsqueeze(-1) - levels.unsqueeze(1)).square().amin(-1).sum(1)
    assert sum(map(float, error)) < 1.1 * sum(map(exhaustive_levels, weight))
    above = weight > weight.mean(1, keepdim=True)

    def assigned(half: Tensor) -> Tensor:
        mean = weight.mean(1, keepdim=True)
        return (weight - torch.where(above, mean + half, mean - half)).square().sum(1)

    half = scale.unsqueeze(1) / 2
    assert (assigned(half) <= torch.minimum(assigned(0.98 * half), assigned(1.02 * half))).all()
    torch.testing.assert_close(levels.mean(1), weight.mean(1), atol=1e-3, rtol=1e-3)


def test_two_levels_of_constant_rows_are_that_constant() -> None:
    for value in (0.0, 3.0, -1e-4):
        weight = torch.full((2, 16), value)
        assert Nearest()(weight, GroupWidths((1,), 16)).weight == pytest.approx(value, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}], ids=str)
def test_what_is_packed_is_what_gptq_returned(fmt: GroupWidths, options: dict[str, bool]) -> None:
    rounded = GPTQRounding(**options)(matrix(), fmt, gram())
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)
    order = 16 * 112 if "act_order" in options and len(fmt.widths) > 1 else 0
    assert rounded.packed.stored_bits() == fmt.stored_bits((6, 112)) + order


def test_static_groups_need_no_order() -> None:
    rounded = GPTQRounding(act_order=True, static_groups=True)(matrix(), FORMATS[0], gram())
    assert torch.equal(rounded.packed.dequantize(), rounded.weight)
    assert rounded.packed.stored_bits() == FORMATS[0].stored_bits((6, 112))


@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}], ids=str)
def test_equal_widths_are_the_integers_of_that_width(options: dict[str, bool]) -> None:
    ours = GPTQRounding(**options)(matrix(), GroupWidths((3,) * 4, 32), gram())
    integer = GPTQRounding(**options)(matrix(), Integer(3, 32), gram())
    assert torch.equal(ours.weight, integer.weight)
    if not options:
        extra = 8  # two bits a group
        assert ours.packed.stored_bits() == integer.packed.stored_bits() + extra
        assert ours.packed.bits == 3


def test_half_way_cases_fall_as_in_the_integers() -> None:
    weight = torch.tensor([[-1.0, 2.0, -0.5, 0.5, 1.5, 0.0]])  # scale 1, zero point 1
    assert torch.equal(Nearest()(weight, GroupWidths((2,), 6)).weight, Nearest()(weight, Integer(2)).weight)


def test_storage_counted_by_hand() -> None:
    fmt = GroupWidths((2, 1, 3, 2), 128)
    packed = Nearest()(matrix(0, 5, 512), fmt).packed
    codes, scales = 5 * 128 * (2 + 1 + 3 + 2), 5 * 4 * 16
    zeros = 8 * (-(-10 * 2 // 8) + -(-5 * 2 // 8) + -(-5 // 8)) + 5 * 16  # 2 bits, 3 = 2 + 1 bits, fp16
    assert packed.stored_bits() == codes + scales + zeros + 8
    assert packed.stored_bits() == 8 * sum(b.numel() * b.element_size() for b in packed.buffers())
    assert packed.bits == fmt.bits == 2
    assert fmt.stored_bits((5, 512)) == packed.stored_bits()


@pytest.mark.parametrize("rows", [1, 5])
def test_columns_of_different_widths_survive_packing(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = torch.randint(1, 9, (300,), generator=generator)
    codes = torch.stack([torch.randint(2 ** int(w), (rows,), generator=generator) for w in widths], dim=1)
    packed = pack_columns(codes, widths)
    assert packed.shape == (rows, columns_bytes(widths.tolist()))
    assert torch.equal(unpack_columns(packed, widths), codes.to(torch.uint8))
    same = torch.full((300,), 3)
    assert torch.equal(pack_columns(codes % 8, same), pack(codes % 8, 3))
    assert pack_columns(codes[:, :0], widths[:0]).shape == (rows, 0)


@pytest.mark.parametrize("permuted", [False, True])
def test_dequantize_weight_by_weight(permuted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    widths, size, out, columns = (1, 3, 2, 4), 10, 4, 37
    codes = torch.stack([torch.randint(2 ** widths[c // size], (out,), generator=generator) for c in range(columns)], 1)
    scale = torch.rand(out, 4, generator=generator).half()
    zero = torch.stack([torch.randint(2**w, (out,), generator=generator) for w in widths], 1).float()
    zero[:, 0] = torch.tensor([0.5, -3.25, 0.375, 900.0])
    order = torch.randperm(columns, generator=generator) if permuted else None
    packed = PackedGroupWidths.of(codes.to(torch.uint8), scale, zero, widths, size, order)
    expected = torch.empty(out, columns)
    for row, i in product(range(out), range(columns)):
        value = (int(codes[row, i]) - float(zero[row, i // size])) * float(scale[row, i // size])
        expected[row, i if order is None else int(order[i])] = value
    torch.testing.assert_close(packed.dequantize(), expected)
    assert packed.widths().tolist() == list(widths)
    x = matrix(2, 3, columns)
    torch.testing.assert_close(QuantLinear(packed)(x), x @ expected.t())


def test_bad_widths_are_refused() -> None:
    for widths in ((0, 1), (9,), (1, 5)):
        with pytest.raises(ValueError, match="apart"):
            GroupWidths(widths, 32)
    with pytest.raises(ValueError, match="group size"):
        GroupWidths((2,), 0)
    with pytest.raises(ValueError, match="4 groups of 32, not 3"):
        GroupWidths((2, 2, 2), 32).fit(matrix())
    assert GroupWidths((2, 1, 3), 64).name == "int-g64-213"
