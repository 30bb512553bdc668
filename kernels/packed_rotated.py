"""Codes of a matrix that was rotated before it was rounded (QuIP)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.orthogonal import random_orthogonal
from kernels.packed import Packed
from kernels.packing import unpack


class PackedMidRise(Packed):
    """Codes on a symmetric grid without zero: weight = step · (code − (2^bits − 1) / 2), one step for the matrix.

    Args:
        codes: uint8 [out, packed bytes], see `kernels.packing`.
        step: fp16 [1].
        shape: (out, in).
    """

    codes: Tensor
    step: Tensor

    def __init__(self, codes: Tensor, step: Tensor, *, bits: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.bits, self.shape = bits, shape
        self.register_buffer("codes", codes)
        self.register_buffer("step", step)

    def unpacked_codes(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.codes, int(self.bits), self.shape[1])

    def dequantize(self) -> Tensor:
        return (self.unpacked_codes().float() - (2**self.bits - 1) / 2) * self.step.float()


class PackedRotated(Packed):
    """Uᵀ · base · V · diag(input_scale), with random orthogonal U [out, out] and V [in, in] (Chee et al., QuIP,
    NeurIPS 2023, algorithm 2).

    Of U and V only the seeds are stored. The factors are regenerated once, from the seeds given at construction,
    and kept as plain attributes: buffers would count as storage. They follow the module to its device.

    Args:
        base: the rotated matrix.
        seeds: int64 [2], of U and of V.
        input_scale: fp16 [in].
        transform: how a seed becomes a matrix, see `kernels.orthogonal`.
    """

    seeds: Tensor
    input_scale: Tensor

    def __init__(self, base: Packed, seeds: Tensor, input_scale: Tensor, *, transform: str) -> None:
        super().__init__()
        self.bits, self.shape, self.transform = base.bits, base.shape, transform
        self.base = base
        self.register_buffer("seeds", seeds)
        self.register_buffer("input_scale", input_scale)
        sizes = zip(self.shape, seeds.tolist(), strict=True)
        self.left, self.right = (random_orthogonal(transform, n, s).to(input_scale.device) for n, s in sizes)

    def dequantize(self) -> Tensor:
        columns = self.right.inverse(self.base.dequantize())  # base · V
        return self.left.inverse(columns.t()).t() * self.input_scale.float()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rotates x and the product, and forms neither U, V nor the matrix in original coordinates."""
        rotated = self.right(x.float() * self.input_scale.float()).to(x.dtype)
        y = self.left.inverse(self.base(rotated).float()).to(x.dtype)
        return y if bias is None else y + bias

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedRotated:
        super()._apply(fn, recurse)
        device: torch.device = self.input_scale.device
        self.left, self.right = self.left.to(device), self.right.to(device)
        return self

    def extra_repr(self) -> str:
        return self.transform
