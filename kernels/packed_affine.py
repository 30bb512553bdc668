"""Codes on a uniform grid with real zero points."""

from __future__ import annotations

from torch import Tensor

from kernels.packed import PackedInteger


class PackedAffine(PackedInteger):
    """Codes of `bits` bits: weight = scale · (code − zero), where a zero point is any number.

    Args:
        zero: fp16 [out, groups].
        codes, scale, bits, shape, group_size, group_index: see `PackedInteger`.
    """

    zero: Tensor

    def unpacked_zero(self) -> Tensor:
        """fp32 [out, groups]."""
        return self.zero.float()
