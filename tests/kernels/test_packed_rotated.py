import copy

import pytest
import torch
from torch import Tensor

from kernels.linear import QuantLinear
from kernels.orthogonal import random_orthogonal
from kernels.packed_rotated import PackedMidRise, PackedRotated
from kernels.packing import pack, row_bytes

OUT, COLUMNS = 12, 34


def mid_rise(bits: int) -> tuple[PackedMidRise, Tensor]:
    """A packed matrix and, weight by weight, what it stands for."""
    codes = torch.randint(2**bits, (OUT, COLUMNS), generator=torch.Generator().manual_seed(bits))
    levels = [0.5 * (2 * i - 2**bits + 1) * 0.25 for i in range(2**bits)]
    expected = torch.tensor([[levels[code] for code in row] for row in codes.tolist()])
    return PackedMidRise(pack(codes, bits), torch.tensor([0.25]).half(), bits=bits, shape=(OUT, COLUMNS)), expected


def rotated(kind: str, bits: int = 3) -> tuple[PackedRotated, Tensor]:
    """A packed matrix and, with dense orthogonal matrices, what it stands for."""
    base, middle = mid_rise(bits)
    scale = (0.5 + torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1))).half()
    u = random_orthogonal(kind, OUT, 7)(torch.eye(OUT)).t()
    v = random_orthogonal(kind, COLUMNS, 2**40)(torch.eye(COLUMNS)).t()
    packed = PackedRotated(base, torch.tensor([7, 2**40]), scale, transform=kind)
    return packed, u.t() @ middle @ v * scale.float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_mid_rise_grid_is_symmetric_without_zero(bits: int) -> None:
    packed, expected = mid_rise(bits)
    assert torch.equal(packed.dequantize(), expected)
    assert packed.stored_bits() == 8 * OUT * row_bytes(COLUMNS, bits) + 16


@pytest.mark.parametrize("kind", ["kronecker", "hadamard", "identity"])
def test_dequantize_and_forward_undo_the_rotation(kind: str) -> None:
    packed, expected = rotated(kind)
    torch.testing.assert_close(packed.dequantize(), expected)
    x = torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(3))
    bias = torch.arange(float(OUT))
    torch.testing.assert_close(QuantLinear(packed, bias)(x), x @ expected.t() + bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed(x), x @ expected.t(), atol=1e-5, rtol=1e-5)
    brief = packed(x.bfloat16(), bias.bfloat16())
    assert brief.dtype == torch.bfloat16
    torch.testing.assert_close(brief.float(), x @ expected.t() + bias, atol=0.1, rtol=0.05)


def test_seeds_and_scales_are_all_that_is_stored_besides_the_codes() -> None:
    packed, _ = rotated("kronecker")
    assert packed.stored_bits() == packed.base.stored_bits() + 2 * 64 + 16 * COLUMNS
    restored, expected = rotated("kronecker")
    for name, buffer in packed.named_buffers():
        assert torch.equal(buffer, dict(restored.named_buffers())[name])
    torch.testing.assert_close(restored.dequantize(), expected)


def test_matrices_follow_the_module_to_another_device() -> None:
    packed, expected = rotated("kronecker")
    moved = copy.deepcopy(packed).to("meta")
    assert moved(torch.empty(3, COLUMNS, device="meta")).shape == (3, OUT)
    assert moved.dequantize().device.type == "meta"
    torch.testing.assert_close(packed.to("cpu").dequantize(), expected)
