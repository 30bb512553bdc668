import torch
import torch.nn.functional as F

from kernels.packed import PackedDense
from kernels.packed_scaled import PackedScaled


def test_inputs_are_scaled_and_the_scales_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    base = PackedDense(torch.randn(6, 40, generator=generator).half())
    packed = PackedScaled(base, torch.rand(40, generator=generator).half() + 0.5)
    x, bias = torch.randn(2, 3, 40, generator=generator), torch.randn(6, generator=generator)
    dense = base.weight.float() @ packed.columns.float().diag()
    torch.testing.assert_close(packed.dequantize(), dense)
    torch.testing.assert_close(packed(x, bias), F.linear(x, dense, bias), atol=1e-5, rtol=1e-5)
    assert packed.stored_bits() == base.stored_bits() + 40 * 16
    assert (packed.bits, packed.shape) == (16, (6, 40))
