"""The linear layer that holds packed codes instead of weights."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.packed import Packed


class QuantLinear(nn.Module):
    """y = x · Ŵᵀ + bias with Ŵ read from its packed form at every call; never a hidden full-precision copy."""

    packed: Packed
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed = packed
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x."""
        return self.packed(x, self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.packed.bits}"
