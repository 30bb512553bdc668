import pytest
import torch
from torch import Tensor

from kernels.linear import QuantLinear
from kernels.minifloat import E2M1
from kernels.packed import PackedDense, PackedInteger
from kernels.packed_float import PackedFloat
from kernels.packed_pruned import pruned
from kernels.packing import pack

OUT, COLUMNS, GROUP, GROUPS = 5, 140, 32, 5  # the last group is shorter, and bitmaps have a partial byte


def integers(bits: int, symmetric: bool, index: Tensor | None = None) -> PackedInteger:
    generator = torch.Generator().manual_seed(bits)
    return PackedInteger(
        pack(torch.randint(2**bits, (OUT, COLUMNS), generator=generator), bits),
        torch.rand(OUT, GROUPS, generator=generator).half() + 0.1,
        None if symmetric else pack(torch.randint(2**bits, (1, OUT * GROUPS), generator=generator), bits),
        bits=bits,
        shape=(OUT, COLUMNS),
        group_size=GROUP,
        group_index=index,
    )


def random_mask(share: float) -> Tensor:
    return torch.rand(OUT, COLUMNS, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_pruned_integers_are_those_that_are_left(bits: int, symmetric: bool, share: float) -> None:
    dense, mask = integers(bits, symmetric), random_mask(share)
    assert torch.equal(pruned(dense, mask).dequantize(), torch.where(mask, 0, dense.dequantize()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pruned_floats_are_those_that_are_left(dtype: torch.dtype) -> None:
    weight = torch.randn(OUT, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = random_mask(0.3)
    packed = pruned(PackedDense(weight), mask)
    assert torch.equal(packed.dequantize(), torch.where(mask, 0, weight.float()))
    x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(QuantLinear(packed)(x), x @ packed.dequantize().T)
    assert packed.stored_bits() == 16 * int((~mask).sum()) + 8 * OUT * -(-COLUMNS // 8)


def test_pruned_codes_are_not_stored() -> None:
    mask = torch.zeros(OUT, COLUMNS, dtype=torch.bool)
    mask[:, ::2] = True
    dense, packed = integers(4, symmetric=False), pruned(integers(4, symmetric=False), mask)
    kept = OUT * COLUMNS // 2
    saved = 8 * OUT * (COLUMNS // 2) - 4 * kept  # 4 bits a code
    assert packed.stored_bits() == dense.stored_bits() - saved + 8 * OUT * -(-COLUMNS // 8)


def test_other_forms_are_refused() -> None:
    mask = random_mask(0.5)
    with pytest.raises(ValueError, match="group index"):
        pruned(integers(3, symmetric=True, index=torch.zeros(COLUMNS, dtype=torch.int16)), mask)
    codes = torch.zeros(OUT, COLUMNS // 2, dtype=torch.uint8)
    floats = PackedFloat(
        codes, torch.ones(OUT, 1).half(), element=E2M1, scale_code=None, shape=(OUT, 140), group_size=140
    )
    with pytest.raises(ValueError, match="PackedFloat cannot be stored pruned"):
        pruned(floats, mask)
