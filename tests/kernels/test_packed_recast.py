import torch

from kernels.minifloat import E4M3
from kernels.packed import PackedDense
from kernels.packed_recast import PackedRecast


def test_decoded_weights_are_rounded_once_more() -> None:
    base = PackedDense(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).half())
    step = base.weight.float().abs().amax() / 448
    packed = PackedRecast(base, step, E4M3)
    expected = (base.weight.float() / step).to(torch.float8_e4m3fn).float() * step
    assert torch.equal(packed.dequantize(), expected)
    assert not torch.equal(expected, base.weight.float())
    assert packed.stored_bits() == base.stored_bits() + 32
    assert (packed.bits, packed.shape) == (16, (6, 40))
