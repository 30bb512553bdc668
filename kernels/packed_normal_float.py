"""NF4: codes of the quantiles of a normal distribution, with block scales that may be quantized in their turn.

Source: QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314), section 3 and appendix E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.minifloat import Code
from kernels.packed import Packed
from kernels.packing import unpack

SECOND_BLOCK = 256
"""Block scales that share a scale of their own."""


@dataclass(frozen=True)
class Table(Code):
    """Any numbers, in ascending order."""

    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        return int(math.log2(len(self.levels)))

    def values(self) -> Tensor:
        return torch.tensor(self.levels)

    def encode(self, x: Tensor) -> Tensor:
        """The codes, uint8, of the numbers nearest to `x`, fp32 of any shape; half-way cases go to the lower one."""
        return torch.bucketize(x, _midpoints(self, x.device), out_int32=True).to(torch.uint8)


@cache
def _midpoints(code: Table, device: torch.device) -> Tensor:
    values = code.values().to(device)
    return (values[1:] + values[:-1]) / 2


def _dynamic_levels() -> tuple[float, ...]:
    """±10**(e − 6) · f for e = 0 … 6, where f are the centers of 2**e equal parts of [0.1, 1]; and 0 and 1."""
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    magnitudes = torch.cat([10.0 ** (e - 6) * ((edge[1:] + edge[:-1]) / 2) for e, edge in enumerate(edges)])
    return tuple(torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, 1.0])]).sort().values.tolist())


NF4_LEVELS = Table(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
"""As published: with δ = (1/30 + 1/32) / 2, the normal quantiles of 8 equidistant probabilities from δ to ½ and of
9 from ½ to 1 − δ, over the largest magnitude."""

DYNAMIC = Table(_dynamic_levels())
"""Dynamic tree quantization (Dettmers, arXiv 1511.04561): the larger the magnitude, the more bits for the fraction."""


class PackedNormalFloat(Packed):
    """weight = level · block scale, where double quantization stores block scale = mean + factor · level.

    Args:
        codes: uint8 [out, packed bytes], see `kernels.packing`.
        scale: one per block, [out, blocks]: fp32, or with double quantization uint8 codes of `DYNAMIC`.
        factor: fp32 [⌈out · blocks / 256⌉], of 256 scales in row-major order; None without double quantization.
        mean: fp32 [], the mean of the scales; None without double quantization.
        shape: (out, in).
        group_size: columns that share a scale; the last block of a row may be shorter.
    """

    codes: Tensor
    scale: Tensor
    factor: Tensor | None
    mean: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        factor: Tensor | None = None,
        mean: Tensor | None = None,
        *,
        shape: tuple[int, int],
        group_size: int,
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.group_size = NF4_LEVELS.bits, shape, group_size
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("factor", factor)
        self.register_buffer("mean", mean)

    def dequantize(self) -> Tensor:
        scale = decoded_scale(self.scale, self.factor, self.mean)
        codes = unpack(self.codes, NF4_LEVELS.bits, self.shape[1])
        return NF4_LEVELS.decode(codes).mul_(scale.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]])


def decoded_scale(scale: Tensor, factor: Tensor | None, mean: Tensor | None) -> Tensor:
    """The scale of each block, from what `PackedNormalFloat` stores: fp32 [out, blocks]."""
    if factor is None or mean is None:
        return scale
    return DYNAMIC.decode(scale) * spread(factor, scale) + mean


def spread(factor: Tensor, scale: Tensor) -> Tensor:
    """The factor of each of the scales [out, blocks]: fp32 [out, blocks]."""
    return factor.repeat_interleave(SECOND_BLOCK)[: scale.numel()].view(scale.shape)
