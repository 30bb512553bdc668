"""NF4 of QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314, section 3), as in bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed_normal_float import DYNAMIC, NF4_LEVELS, SECOND_BLOCK, PackedNormalFloat, decoded_scale, spread
from kernels.packing import pack, row_bytes
from methods.formats.base import BlockGrid, Format

BLOCK = 64


@dataclass(frozen=True)
class NF4(Format):
    """Blocks of 64 over their largest magnitude, in the 16 levels of NormalFloat.

    Where rows are no multiple of 64, the last block of each is shorter; bitsandbytes, which flattens the matrix,
    lets blocks run on into the next row. Nearest levels are those under the scale as stored; bitsandbytes chooses
    them under the exact scale also where it then stores that in 8 bits.

    Args:
        double: double quantization. The scales less their mean over the matrix are stored in 8 bits, in the
            dynamic tree format, over their largest magnitude among 256 in row-major order. Mean and magnitudes
            are fixed when the grid is fitted; the scale of a refitted block takes the nearest of the values that
            they leave, and larger weights saturate.
    """

    double: bool = False

    @property
    def name(self) -> str:
        return "nf4-dq" if self.double else "nf4"

    @property
    def bits(self) -> float:
        return NF4_LEVELS.bits

    def fit(self, weight: Tensor) -> NF4Grid:
        return NF4Grid(self, weight)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        blocks = out * -(-columns // BLOCK)
        scales = 8 * blocks + 32 * -(-blocks // SECOND_BLOCK) + 32 if self.double else 32 * blocks
        return 8 * out * row_bytes(columns, NF4_LEVELS.bits) + scales


class NF4Grid(BlockGrid):
    """Block scales of one weight matrix, as stored and as the fp32 numbers [out, blocks] they stand for."""

    format: NF4
    factor: Tensor | None
    mean: Tensor | None

    def __init__(self, fmt: NF4, weight: Tensor) -> None:
        self.format = fmt
        columns = weight.shape[1]
        self.group_size = min(BLOCK, columns)
        self.group = torch.arange(columns, device=weight.device) // self.group_size  # int64 [in]
        padded = F.pad(weight.abs(), (0, -columns % self.group_size))
        largest = padded.unflatten(1, (-1, self.group_size)).amax(-1)
        self.factor, self.mean = _second_scales(largest) if fmt.double else (None, None)
        self.stored = torch.empty_like(largest, dtype=torch.uint8 if fmt.double else torch.float32)
        self._store(slice(None), largest)

    def refit(self, group: int, weight: Tensor) -> None:
        self._store(slice(group, group + 1), weight.abs().amax(1, keepdim=True))

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        return NF4_LEVELS.encode(weight / self._columns(start, weight.shape[1]))  # under scale 0 any code is 0

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        return NF4_LEVELS.decode(codes) * self._columns(start, codes.shape[1])

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedNormalFloat:
        codes = self.in_matrix_order(codes, order)
        return PackedNormalFloat(
            pack(codes, NF4_LEVELS.bits),
            self.stored,
            self.factor,
            self.mean,
            shape=(codes.shape[0], codes.shape[1]),
            group_size=self.group_size,
        )

    def _store(self, groups: slice, largest: Tensor) -> None:
        """Give the blocks `groups` of each row the scales `largest` [out, blocks of the slice], as nearly as stored."""
        if not largest.isfinite().all():
            raise FloatingPointError(
                f"{self.format.name} cannot scale weights up to {largest.max():g}; check where they overflowed"
            )
        if self.factor is not None and self.mean is not None:
            factor = spread(self.factor, self.stored)[:, groups]  # where it is 0, any code is the mean
            self.stored[:, groups] = DYNAMIC.encode((largest - self.mean) / factor)
        else:
            self.stored[:, groups] = largest
        self.scale = decoded_scale(self.stored, self.factor, self.mean)

    def _columns(self, start: int, count: int) -> Tensor:
        """The scale of each of `count` columns: [out, count]."""
        return self.scale[:, self.group[start : start + count]]


def _second_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Of block scales [out, blocks]: the largest distances from their mean among 256 each, and the mean."""
    mean = largest.mean()
    distance = (largest - mean).abs().flatten()
    padded = F.pad(distance, (0, -len(distance) % SECOND_BLOCK))
    return padded.view(-1, SECOND_BLOCK).amax(1), mean
