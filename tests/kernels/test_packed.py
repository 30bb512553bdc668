import pytest
import torch

from kernels.linear import QuantLinear
from kernels.packed import PackedDense, PackedInteger
from kernels.packing import pack

OUT, COLUMNS, GROUP = 5, 70, 32  # the last group is shorter
GROUPS = 3


def build(bits: int, symmetric: bool, permuted: bool) -> tuple[PackedInteger, torch.Tensor]:
    """A packed matrix and, computed weight by weight, what it stands for."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (OUT, COLUMNS), generator=generator)
    scale = torch.rand(OUT, GROUPS, generator=generator).half()
    zero = torch.randint(2**bits, (OUT, GROUPS), generator=generator)
    group = torch.arange(COLUMNS) // GROUP
    if permuted:
        group = group[torch.randperm(COLUMNS, generator=generator)]
    packed = PackedInteger(
        pack(codes, bits),
        scale,
        None if symmetric else pack(zero.view(1, -1), bits),
        bits=bits,
        shape=(OUT, COLUMNS),
        group_size=GROUP,
        group_index=group.to(torch.int16) if permuted else None,
    )
    expected = torch.empty(OUT, COLUMNS)
    for row in range(OUT):
        for column in range(COLUMNS):
            g = int(group[column])
            offset = 2 ** (bits - 1) if symmetric else int(zero[row, g])
            expected[row, column] = float(scale[row, g]) * (int(codes[row, column]) - offset)
    return packed, expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_dequantize_is_scale_times_code_minus_zero(bits: int, symmetric: bool, permuted: bool) -> None:
    packed, expected = build(bits, symmetric, permuted)
    assert torch.equal(packed.dequantize(), expected)


def test_forward_multiplies_with_the_dequantized_matrix() -> None:
    packed, expected = build(4, symmetric=False, permuted=False)
    x, bias = torch.ones(2, 3, COLUMNS), torch.arange(float(OUT))
    torch.testing.assert_close(QuantLinear(packed, bias)(x), x @ expected.T + bias)
    assert QuantLinear(packed)(x.bfloat16()).dtype == torch.bfloat16


def test_stored_bits_counts_every_buffer() -> None:
    packed, _ = build(4, symmetric=False, permuted=True)
    codes = 8 * (COLUMNS // 2) * OUT
    scales, zeros, index = 16 * OUT * GROUPS, 8 * -(-OUT * GROUPS // 2), 16 * COLUMNS
    assert packed.stored_bits() == codes + scales + zeros + index


def test_dense_keeps_16_bits_and_refuses_32() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    packed = PackedDense(weight.half())
    assert packed.stored_bits() == 16 * 12
    assert torch.equal(packed.dequantize(), weight.half().float())
    with pytest.raises(ValueError, match="16-bit"):
        PackedDense(weight)
