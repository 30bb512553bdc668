import pytest
import torch
from torch import Tensor

from kernels.packed_superblock import LAYOUTS, Layout, Level, PackedSuperBlock

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: f"q{layout.bits}_k")
OUT, COLUMNS = 3, 300


def build(layout: Layout, seed: int = 0) -> tuple[PackedSuperBlock, Tensor]:
    """Random codes, and the matrix they stand for, weight by weight."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-COLUMNS // layout.block)

    def level() -> Level:
        codes = torch.randint(2**layout.scale_bits, (OUT, blocks), generator=generator, dtype=torch.uint8)
        return Level(codes, torch.randn(OUT, 2, generator=generator).half())

    codes = torch.randint(2**layout.bits, (OUT, COLUMNS), generator=generator, dtype=torch.uint8)
    scale, minimum = level(), level() if layout.affine else None
    signed = 0 if layout.affine else 1
    expected = torch.empty(OUT, COLUMNS)
    for r in range(OUT):
        for c in range(COLUMNS):
            factor = int(scale.codes[r, c // layout.block]) - signed * 2 ** (layout.scale_bits - 1)
            weight = (int(codes[r, c]) - signed * 2 ** (layout.bits - 1)) * factor * float(scale.unit[r, c // 256])
            if minimum is not None:
                weight -= int(minimum.codes[r, c // layout.block]) * float(minimum.unit[r, c // 256])
            expected[r, c] = weight
    return PackedSuperBlock(codes, scale, minimum, layout=layout), expected


@layouts
def test_codes_stand_for_multiples_of_multiples(layout: Layout) -> None:
    packed, expected = build(layout)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=1e-5, atol=1e-3)


@layouts
def test_a_state_dict_holds_all_that_dequantize_reads(layout: Layout) -> None:
    packed, _ = build(layout)
    other, _ = build(layout, seed=1)
    assert not torch.equal(other.dequantize(), packed.dequantize())
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dequantize(), packed.dequantize())
    assert packed.stored_bits() == sum(8 * b.numel() * b.element_size() for b in packed.state_dict().values())


@layouts
def test_forward_multiplies_with_the_dequantized_matrix(layout: Layout) -> None:
    packed, _ = build(layout)
    x = torch.ones(2, COLUMNS)
    torch.testing.assert_close(packed(x), x @ packed.dequantize().T)
