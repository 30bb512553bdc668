import torch

from kernels.minifloat import E2M1, E4M3
from kernels.packed_tensor_float import PackedTensorFloat
from kernels.packing import pack


def test_fp8_under_one_scale() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax() / 448
    codes = E4M3.encode(weight / scale)
    packed = PackedTensorFloat(pack(codes, 8), scale, element=E4M3, shape=(6, 40))
    assert torch.equal(packed.dequantize(), (weight / scale).to(torch.float8_e4m3fn).float() * scale)
    assert packed.stored_bits() == 8 * 6 * 40 + 32
    assert (packed.bits, packed.shape) == (8, (6, 40))


def test_codes_of_4_bits_share_bytes() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 1)[:, :15]
    packed = PackedTensorFloat(pack(codes, 4), torch.tensor(0.5), element=E2M1, shape=(3, 15))
    assert torch.equal(packed.dequantize(), E2M1.values()[:15].repeat(3, 1) * 0.5)
    assert packed.stored_bits() == 3 * 8 * 8 + 32
