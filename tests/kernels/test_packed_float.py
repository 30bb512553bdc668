import pytest
import torch
from torch import Tensor

from kernels.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, MX_INT8, Code, Element
from kernels.packed_float import PackedFloat
from kernels.packing import pack, row_bytes

OUT, COLUMNS, BLOCK = 5, 70, 32  # the last block is shorter
BLOCKS = 3
FINITE = {E2M1: 16, E3M2: 64, E2M3: 64, E4M3: 0x7F, E5M2: 0x7C, MX_INT8: 256}


def build(element: Element, scale_code: Code | None, tensor_scale: Tensor | None) -> tuple[PackedFloat, Tensor]:
    """A packed matrix and, computed weight by weight, what it stands for."""
    generator = torch.Generator().manual_seed(element.bits)
    codes = torch.randint(FINITE[element], (OUT, COLUMNS), generator=generator)
    if scale_code is None:
        scale = torch.rand(OUT, BLOCKS, generator=generator).half()
    else:
        scale = torch.randint(0x60, 0x7F, (OUT, BLOCKS), generator=generator, dtype=torch.uint8)
    packed = PackedFloat(
        pack(codes, element.bits),
        scale,
        tensor_scale,
        element=element,
        scale_code=scale_code,
        shape=(OUT, COLUMNS),
        group_size=BLOCK,
    )
    factors = scale.tolist() if scale_code is None else scale_code.values()[scale.int()].tolist()
    values = element.values().tolist()
    expected = torch.empty(OUT, COLUMNS)
    for row in range(OUT):
        for column in range(COLUMNS):
            factor = torch.tensor(factors[row][column // BLOCK])
            factor = factor if tensor_scale is None else factor * tensor_scale
            expected[row, column] = values[int(codes[row, column])] * factor
    return packed, expected


@pytest.mark.parametrize("element", FINITE, ids=lambda element: element.name)
@pytest.mark.parametrize("scale_code", [None, E4M3, E8M0], ids=["fp16", "e4m3", "e8m0"])
@pytest.mark.parametrize("tensor_scale", [None, torch.tensor(0.37)], ids=["", "tensor"])
def test_dequantize_is_the_product_of_element_and_scales(
    element: Element, scale_code: Code | None, tensor_scale: Tensor | None
) -> None:
    packed, expected = build(element, scale_code, tensor_scale)
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize(
    ("element", "scale_code", "tensor_scale", "scale_bits"),
    [(E4M3, None, None, 16), (E3M2, E8M0, None, 8), (E2M1, E4M3, torch.tensor(1.0), 8)],
)
def test_stored_bits_counts_codes_and_scales(
    element: Element, scale_code: Code | None, tensor_scale: Tensor | None, scale_bits: int
) -> None:
    packed, _ = build(element, scale_code, tensor_scale)
    codes = 8 * OUT * row_bytes(COLUMNS, element.bits)
    tensor_bits = 0 if tensor_scale is None else 32
    assert packed.stored_bits() == codes + scale_bits * OUT * BLOCKS + tensor_bits
    assert packed.bits == element.bits


def test_a_state_dict_holds_all_that_dequantize_reads() -> None:
    packed, expected = build(E2M1, E4M3, torch.tensor(0.37))
    other, _ = build(E2M1, E4M3, torch.tensor(1.0))
    for buffer in other.buffers():
        buffer.zero_()
    assert not other.dequantize().any()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dequantize(), expected)


def test_forward_multiplies_with_the_dequantized_matrix() -> None:
    packed, expected = build(E4M3, None, None)
    x = torch.ones(2, 3, COLUMNS)
    torch.testing.assert_close(packed(x), x @ expected.T)
    assert packed(x.bfloat16()).dtype == torch.bfloat16
