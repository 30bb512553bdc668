import pytest
import torch
from torch import Tensor

from kernels.linear import QuantLinear
from kernels.packed_two_level import PackedAffine, PackedTwoLevel
from kernels.packing import pack

OUT, COLUMNS, GROUP, ROWS = 11, 70, 16, 4  # the last groups are shorter, in both directions
GROUPS, ROW_GROUPS = 5, 3


def affine(bits: int, seed: int) -> tuple[PackedAffine, Tensor]:
    """A packed statistic [groups, out] and, computed value by value, what it stands for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (GROUPS, OUT), generator=generator)
    step = torch.rand(GROUPS, ROW_GROUPS, generator=generator).half()
    offset = torch.randn(GROUPS, ROW_GROUPS, generator=generator).half()
    packed = PackedAffine(pack(codes, bits), step, offset, bits=bits, shape=(GROUPS, OUT), group_size=ROWS)
    expected = torch.empty(GROUPS, OUT)
    for group in range(GROUPS):
        for row in range(OUT):
            s, o = float(step[group, row // ROWS]), float(offset[group, row // ROWS])
            expected[group, row] = s * int(codes[group, row]) + o
    return packed, expected


def build(bits: int, permuted: bool) -> tuple[PackedTwoLevel, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (OUT, COLUMNS), generator=generator)
    (scale, scales), (zero, zeros) = affine(3, 1), affine(3, 2)
    group = torch.arange(COLUMNS) // GROUP
    if permuted:
        group = group[torch.randperm(COLUMNS, generator=generator)]
    packed = PackedTwoLevel(
        pack(codes, bits),
        scale,
        zero,
        bits=bits,
        shape=(OUT, COLUMNS),
        group_size=GROUP,
        group_index=group.to(torch.int16) if permuted else None,
    )
    expected = torch.empty(OUT, COLUMNS)
    for row in range(OUT):
        for column in range(COLUMNS):
            g = int(group[column])
            expected[row, column] = float(scales[g, row]) * (int(codes[row, column]) - float(zeros[g, row]))
    return packed, expected


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("permuted", [False, True])
def test_dequantize_decodes_scales_and_zeros_first(bits: int, permuted: bool) -> None:
    statistic, values = affine(bits, 0)
    torch.testing.assert_close(statistic.dequantize(), values)
    packed, expected = build(bits, permuted)
    torch.testing.assert_close(packed.dequantize(), expected)


def test_forward_multiplies_with_the_dequantized_matrix() -> None:
    packed, expected = build(4, permuted=False)
    x, bias = torch.ones(2, 3, COLUMNS), torch.arange(float(OUT))
    torch.testing.assert_close(QuantLinear(packed, bias)(x), x @ expected.T + bias)


def test_stored_bits_counts_both_levels() -> None:
    packed, _ = build(4, permuted=True)
    codes, index = 8 * (COLUMNS // 2) * OUT, 16 * COLUMNS
    three_bits = 8 * (-(-OUT * 2 // 8) + -(-OUT // 8)) * GROUPS  # planes of 2 and of 1
    assert packed.stored_bits() == codes + index + 2 * (three_bits + (16 + 16) * GROUPS * ROW_GROUPS)
