"""Matrices of which many weights are zero: a bitmap of those that are kept, and only these are stored.

A bit for every weight fits any pattern. For 2:4 it takes what the two 2-bit indices a group of four would take that
sparse tensor cores read.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from kernels.packed import Packed, PackedDense, PackedInteger
from kernels.packing import pack, unpack


class PackedPruned(Packed):
    """What is stored of the zeros.

    Args:
        bitmap: uint8 [out, packed bytes] of 1-bit codes, see `kernels.packing`: 1 where a weight is kept.
        shape: (out, in).
    """

    bitmap: Tensor

    def __init__(self, bitmap: Tensor, *, bits: float, shape: tuple[int, int]) -> None:
        super().__init__()
        self.bits, self.shape = bits, shape
        self.register_buffer("bitmap", bitmap)

    def kept(self) -> Tensor:
        """Where weights are kept: bool [out, in]."""
        return unpack(self.bitmap, 1, self.shape[1]).bool()


class PackedPrunedDense(PackedPruned):
    """Kept weights in 16 bits.

    Args:
        values: fp16 or bf16 [kept], row by row.
    """

    values: Tensor

    def __init__(self, values: Tensor, bitmap: Tensor, *, shape: tuple[int, int]) -> None:
        super().__init__(bitmap, bits=16, shape=shape)
        self.register_buffer("values", values)

    def dequantize(self) -> Tensor:
        return torch.zeros(self.shape, device=self.values.device).masked_scatter_(self.kept(), self.values.float())


class PackedPrunedInteger(PackedPruned):
    """Kept weights as codes of `bits` bits: weight = scale · (code − zero), one scale and zero a group.

    Args:
        codes: uint8 [1, packed bytes]: those of all kept weights, row by row.
        scale: fp16 [out, groups].
        zero: uint8 packed codes of all zeros in one row, or None for a symmetric grid (zero = 2**(bits-1)).
        group_size: columns that share a scale, pruned ones included; the last group of a row may be shorter.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        bitmap: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        shape: tuple[int, int],
        group_size: int,
    ) -> None:
        super().__init__(bitmap, bits=bits, shape=shape)
        self.group_size = group_size
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def dequantize(self) -> Tensor:
        kept, group = self.kept(), torch.arange(self.shape[1], device=self.codes.device) // self.group_size
        codes = unpack(self.codes, int(self.bits), int(kept.sum()))
        dense = torch.zeros(self.shape, dtype=torch.uint8, device=codes.device).masked_scatter_(kept, codes)
        points = dense.float().sub_(self._unpacked_zero()[:, group]).mul_(self.scale.float()[:, group])
        return points.masked_fill_(~kept, 0)

    def _unpacked_zero(self) -> Tensor:
        """fp32 [out, groups]."""
        if self.zero is None:
            return torch.full_like(self.scale, 2 ** (int(self.bits) - 1), dtype=torch.float32)
        return unpack(self.zero, int(self.bits), self.scale.numel()).view(self.scale.shape).float()


@singledispatch
def pruned(packed: Packed, mask: Tensor) -> PackedPruned:  # noqa: ARG001
    """The packed matrix without its weights where `mask`, bool [out, in], is true: these become zero.

    Raises:
        ValueError: there is no such storage for this format, or for columns in another order.
    """
    raise ValueError(f"{type(packed).__name__} cannot be stored pruned; prune integers or 16-bit floats")


@pruned.register
def _(packed: PackedDense, mask: Tensor) -> PackedPruned:
    return PackedPrunedDense(packed.weight[~mask], pack(~mask, 1), shape=packed.shape)


@pruned.register
def _(packed: PackedInteger, mask: Tensor) -> PackedPruned:
    if packed.group_index is not None:
        raise ValueError("a pruned matrix stores no group index; quantize its columns in their own order")
    bits = int(packed.bits)
    return PackedPrunedInteger(
        pack(packed.unpacked_codes()[~mask].unsqueeze(0), bits),
        pack(~mask, 1),
        packed.scale,
        packed.zero,
        bits=bits,
        shape=packed.shape,
        group_size=packed.group_size,
    )
