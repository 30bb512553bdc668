"""The linear layer that holds packed codes instead of weights."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.activations import round_tokens
from kernels.packed import Packed


class QuantLinear(nn.Module):
    """y = x · Ŵᵀ + bias with Ŵ read from its packed form at every call; never a hidden full-precision copy.

    Args:
        packed: the weight.
        bias: [out], or None.
        input_bits: width to which each token of the input is rounded, or None to leave it.
    """

    packed: Packed
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, input_bits: int | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed, self.input_bits = packed, input_bits
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x."""
        if self.input_bits is not None:
            x = round_tokens(x, self.input_bits)
        return self.packed(x, self.bias)

    def extra_repr(self) -> str:
        inputs = "" if self.input_bits is None else f", input_bits={self.input_bits}"
        return f"in={self.in_features}, out={self.out_features}, bits={self.packed.bits}{inputs}"
