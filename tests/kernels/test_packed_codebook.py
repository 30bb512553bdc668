import pytest
import torch
from torch import Tensor

from kernels.linear import QuantLinear
from kernels.packed_affine import PackedAffine
from kernels.packed_codebook import PackedCodebook
from kernels.packing import pack, row_bytes

OUT, COLUMNS, GROUP = 5, 70, 32  # the last group is shorter
GROUPS = 3

widths = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


def codebooks(bits: int) -> tuple[PackedCodebook, Tensor]:
    """A packed matrix and, looked up weight by weight, what it stands for."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (OUT, COLUMNS), generator=generator)
    codebook = torch.randn(OUT, 2**bits, generator=generator).half()
    expected = [[float(codebook[row, code]) for code in codes[row].tolist()] for row in range(OUT)]
    return PackedCodebook(pack(codes, bits), codebook, bits=bits, shape=(OUT, COLUMNS)), torch.tensor(expected)


def affine(bits: int, permuted: bool) -> tuple[PackedAffine, Tensor]:
    """A packed matrix and, computed weight by weight, what it stands for."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (OUT, COLUMNS), generator=generator)
    scale = torch.rand(OUT, GROUPS, generator=generator).half()
    zero = torch.randn(OUT, GROUPS, generator=generator).half()
    group = torch.arange(COLUMNS) // GROUP
    if permuted:
        group = group[torch.randperm(COLUMNS, generator=generator)]
    expected = torch.empty(OUT, COLUMNS)
    for row in range(OUT):
        for column, g in enumerate(group.tolist()):
            expected[row, column] = float(scale[row, g]) * (int(codes[row, column]) - float(zero[row, g]))
    packed = PackedAffine(
        pack(codes, bits),
        scale,
        zero,
        bits=bits,
        shape=(OUT, COLUMNS),
        group_size=GROUP,
        group_index=group.to(torch.int16) if permuted else None,
    )
    return packed, expected


@widths
def test_codes_name_entries_of_their_own_row(bits: int) -> None:
    packed, expected = codebooks(bits)
    assert torch.equal(packed.dequantize(), expected)


@widths
@pytest.mark.parametrize("permuted", [False, True])
def test_affine_is_scale_times_code_minus_real_zero(bits: int, permuted: bool) -> None:
    packed, expected = affine(bits, permuted)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=1e-6, atol=1e-6)


@widths
def test_stored_bits_counts_codes_and_tables(bits: int) -> None:
    codes = 8 * OUT * row_bytes(COLUMNS, bits)
    assert codebooks(bits)[0].stored_bits() == codes + 16 * OUT * 2**bits
    assert affine(bits, permuted=False)[0].stored_bits() == codes + 32 * OUT * GROUPS
    assert affine(bits, permuted=True)[0].stored_bits() == codes + 32 * OUT * GROUPS + 16 * COLUMNS
    assert codebooks(bits)[0].bits == affine(bits, permuted=False)[0].bits == bits


def test_forward_multiplies_with_the_dequantized_matrix() -> None:
    x, bias = torch.ones(2, 3, COLUMNS), torch.arange(float(OUT))
    for packed, expected in (codebooks(3), affine(3, permuted=True)):
        torch.testing.assert_close(QuantLinear(packed, bias)(x), x @ expected.T + bias)
        assert QuantLinear(packed)(x.bfloat16()).dtype == torch.bfloat16


def test_a_state_dict_holds_all_that_dequantize_reads() -> None:
    for build in (lambda: codebooks(3), lambda: affine(3, permuted=True)):
        (packed, _), (other, _) = build(), build()
        expected = packed.dequantize()
        for buffer in other.buffers():
            buffer.zero_()
        assert not torch.equal(other.dequantize(), expected)
        other.load_state_dict(packed.state_dict())
        assert torch.equal(other.dequantize(), expected)


def test_codebooks_of_another_size_are_refused() -> None:
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    for codebook in (torch.zeros(2, 4).half(), torch.zeros(3, 8).half(), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match="codebooks"):
            PackedCodebook(pack(codes, 3), codebook, bits=3, shape=(2, 4))
