import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.packing import BLOCK, PLANES, pack, row_bytes, unpack


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def naive_plane(codes: list[int], width: int) -> list[int]:
    """The layout as the module's docstring states it, one code at a time."""
    packed = []
    for start in range(0, len(codes), BLOCK):
        block = codes[start : start + BLOCK]
        size = -(-len(block) * width // 8)
        row = [0] * size
        for k, code in enumerate(block):
            row[k % size] |= code << (k // size * width)
        packed += row
    return packed


@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 256])),
    st.integers(0, 99),
)
def test_unpacking_inverts_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, row_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", PLANES)
def test_whole_blocks_take_exactly_bits_per_code(bits: int) -> None:
    assert 8 * row_bytes(3 * BLOCK, bits) == 3 * BLOCK * bits


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("columns", [7, 128, 300])
def test_layout_is_the_documented_one(bits: int, columns: int) -> None:
    (codes,) = random_codes(1, columns, bits).tolist()
    expected, shift = [], 0
    for width in PLANES[bits]:
        expected += naive_plane([code >> shift & 2**width - 1 for code in codes], width)
        shift += width
    assert pack(torch.tensor([codes]), bits)[0].tolist() == expected


@pytest.mark.parametrize("code", [-1, 8])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 7\]"):
        pack(torch.tensor([[0, code]]), 3)
