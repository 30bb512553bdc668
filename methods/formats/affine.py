"""Uniform grids with real zero points, per output channel or per group of input channels."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packed_affine import PackedAffine
from kernels.packing import PLANES, pack, row_bytes
from methods.formats.base import Format, Grid
from methods.formats.integer import TINIEST_SCALE

LARGEST_ZERO = 2**10  # above it, fp16 resolves less than a step


@dataclass(frozen=True)
class Affine(Format):
    """scale · (code − zero), with the scale and the zero point of each group in fp16.

    The range is [min w, max w], as in the code of HQQ; unlike that of `Integer` it need not contain 0, and 0 need not
    be a grid point. Groups far from 0 with hardly any spread get a wider step, so that fp16 can hold their zero point.

    Args:
        width: bits of a code, 1 to 8.
        group_size: columns that share a scale and zero point; 0 means the whole row (per output channel).
    """

    width: int
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.width not in PLANES:
            raise ValueError(f"affine formats have {min(PLANES)} to {max(PLANES)} bits, not {self.width}")
        if self.group_size < 0:
            raise ValueError(f"group size {self.group_size} is not positive; 0 means per channel")

    @property
    def name(self) -> str:
        return f"affine{self.width}-{f'g{self.group_size}' if self.group_size else 'channel'}"

    @property
    def bits(self) -> float:
        return self.width

    def fit(self, weight: Tensor) -> AffineGrid:
        size = self.columns_per_group(weight.shape[1])
        body, tail = weight.split([weight.shape[1] // size * size, weight.shape[1] % size], dim=1)
        groups = [body.unflatten(1, (-1, size)), tail.unsqueeze(1)]
        fitted = [self.scale_and_zero(part) for part in groups if part.numel()]
        scale, zero = (torch.cat(parts, dim=1) for parts in zip(*fitted, strict=True))  # [out, groups]
        return AffineGrid(self, scale, zero, weight.shape[1])

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        groups = out * -(-columns // self.columns_per_group(columns))
        return 8 * out * row_bytes(columns, self.width) + 32 * groups

    def columns_per_group(self, columns: int) -> int:
        """The group size in a matrix of so many columns."""
        return min(self.group_size or columns, columns)

    def scale_and_zero(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of weights [..., group], fp32 values that fp16 represents: each [...].

        Raises:
            FloatingPointError: weights whose range fp16 cannot express.
        """
        low, high = weight.aminmax(dim=-1)
        step = (high - low) / (2**self.width - 1)
        scale = as_half(torch.maximum(step, low.abs() / LARGEST_ZERO)).clamp(min=TINIEST_SCALE)
        if not scale.isfinite().all():
            raise FloatingPointError(f"{self.name} cannot scale weights up to {weight.abs().max():g}; check them")
        return scale, as_half(-low / scale)


class AffineGrid(Grid):
    """Scales and zero points of one weight matrix, fitted by `Affine.fit` or learned.

    Args:
        fmt: the format.
        scale, zero: fp32 [out, groups], rounded to what fp16 represents, as they are stored; scales are positive.
        columns: of the matrix.
    """

    def __init__(self, fmt: Affine, scale: Tensor, zero: Tensor, columns: int) -> None:
        self.format = fmt
        self.group_size = fmt.columns_per_group(columns)
        self.scale, self.zero = as_half(scale).clamp(min=TINIEST_SCALE), as_half(zero)
        self.group = torch.arange(columns, device=scale.device) // self.group_size  # int64 [in]

    def refit(self, group: int, weight: Tensor) -> None:
        self.scale[:, group], self.zero[:, group] = self.format.scale_and_zero(weight)

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        scale, zero = self._columns(start, weight.shape[1])
        return nearest_codes(weight, scale, zero, self.format.width).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        scale, zero = self._columns(start, codes.shape[1])
        return (codes - zero) * scale

    def permuted(self, order: Tensor) -> AffineGrid:
        grid = copy(self)
        grid.group = self.group[order]
        return grid

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedAffine:
        group = self.group
        if order is not None:
            inverse = torch.argsort(order)
            codes, group = codes[:, inverse], group[inverse]
        regular = torch.equal(group, torch.arange(len(group), device=group.device) // self.group_size)
        index = torch.int16 if self.scale.shape[1] < 2**15 else torch.int32
        return PackedAffine(
            pack(codes, self.format.width),
            self.scale.to(torch.float16),
            self.zero.to(torch.float16),
            bits=self.format.width,
            shape=(codes.shape[0], codes.shape[1]),
            group_size=self.group_size,
            group_index=None if regular else group.to(index),
        )

    def _columns(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of each of `count` columns: [out, count]."""
        group = self.group[start : start + count]
        return self.scale[:, group], self.zero[:, group]


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor, width: int) -> Tensor:
    """Codes of weights, whose scales and zero points broadcast with them: floats in [0, 2**width − 1]."""
    return torch.round(weight / scale + zero).clamp_(0, 2**width - 1)


def as_half(numbers: Tensor) -> Tensor:
    """The nearest numbers that fp16 represents: fp32."""
    return numbers.to(torch.float16).float()
