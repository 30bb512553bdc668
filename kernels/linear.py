"""The linear layer that holds packed codes instead of weights."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from kernels import dispatch
from kernels.activations import ExceptOutliers, InputRounding
from kernels.packed import Packed

Inputs: TypeAlias = InputRounding | ExceptOutliers
"""What rounds a linear's input."""


class QuantLinear(nn.Module):
    """y = x · Ŵᵀ + bias with Ŵ read from its packed form at every call; never a hidden full-precision copy.

    Args:
        packed: the weight.
        bias: [out], or None.
        inputs: rounds the input first, or None.
    """

    packed: Packed
    bias: Tensor | None
    inputs: Inputs | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, inputs: Inputs | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed, self.inputs = packed, inputs
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x, by the kernel that `kernels.dispatch` chooses."""
        return dispatch.multiply(self.packed, x, self.bias, self.inputs)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.packed.bits}"
