"""llama.cpp's k-quants: sub-blocks whose scales are small integers under an fp16 scale of their super-block.

Source: llama.cpp, pull request 1684 and `ggml-quants.c`. A super-block takes exactly the bits that it takes there;
where they lie is the layout of `kernels.packing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kernels.packed import Packed
from kernels.packing import pack, unpack

SUPER_BLOCK = 256
"""Columns under one set of fp16 numbers."""


@dataclass(frozen=True)
class Layout:
    """Of a k-quant.

    Args:
        bits: of a weight's code.
        block: columns of a sub-block.
        scale_bits: of a sub-block's scale, and of its minimum.
        affine: weight = scale · code − minimum with unsigned codes and scales; else weight = scale · code with
            signed ones, stored with an offset of half their range.
    """

    bits: int
    block: int
    scale_bits: int
    affine: bool

    @property
    def per_super(self) -> int:
        """Sub-blocks of a super-block."""
        return SUPER_BLOCK // self.block

    @property
    def top(self) -> int:
        """The largest magnitude of a weight's code: codes are 0 … top if affine, else −top … top − 1."""
        return 2**self.bits - 1 if self.affine else 2 ** (self.bits - 1)

    @property
    def scale_top(self) -> int:
        """The same of a scale's code."""
        return 2**self.scale_bits - 1 if self.affine else 2 ** (self.scale_bits - 1)

    @property
    def offset(self) -> int:
        """What is added to a weight's code to store it."""
        return 0 if self.affine else self.top

    @property
    def scale_offset(self) -> int:
        """What is added to a scale's code to store it."""
        return 0 if self.affine else self.scale_top


LAYOUTS = {
    2: Layout(2, 16, 4, affine=True),
    3: Layout(3, 16, 6, affine=False),
    4: Layout(4, 32, 6, affine=True),
    5: Layout(5, 32, 6, affine=True),
    6: Layout(6, 16, 8, affine=False),
}
"""q2_k to q6_k, by the bits of a code."""


class Level(NamedTuple):
    """The scales, or the minima, of the sub-blocks, as they are stored."""

    codes: Tensor
    """uint8 [out, sub-blocks]."""
    unit: Tensor
    """fp16 [out, super-blocks]: what the code 1 stands for."""

    def decode(self, layout: Layout) -> Tensor:
        """What the codes stand for: fp32 [out, sub-blocks]."""
        unit = self.unit.float().repeat_interleave(layout.per_super, dim=1)[:, : self.codes.shape[1]]
        return (self.codes.float() - layout.scale_offset) * unit


class PackedSuperBlock(Packed):
    """Weights in sub-blocks of 16 or 32, and these in super-blocks of 256; the last ones of a row may be shorter.

    Args:
        codes: uint8 [out, in], not yet packed.
        scale: of the sub-blocks.
        minimum: of the sub-blocks; None if the layout is symmetric.
        layout: one of `LAYOUTS`.
    """

    codes: Tensor
    scale: Tensor
    scale_unit: Tensor
    minimum: Tensor | None
    minimum_unit: Tensor | None

    def __init__(self, codes: Tensor, scale: Level, minimum: Level | None, *, layout: Layout) -> None:
        super().__init__()
        self.layout, self.bits = layout, layout.bits
        self.shape = (codes.shape[0], codes.shape[1])
        self.blocks = scale.codes.shape[1]
        self.register_buffer("codes", pack(codes, layout.bits))
        self.register_buffer("scale", pack(scale.codes, layout.scale_bits))
        self.register_buffer("scale_unit", scale.unit)
        self.register_buffer("minimum", None if minimum is None else pack(minimum.codes, layout.scale_bits))
        self.register_buffer("minimum_unit", None if minimum is None else minimum.unit)

    def dequantize(self) -> Tensor:
        codes = unpack(self.codes, self.layout.bits, self.shape[1])
        minimum = None if self.minimum is None else self._columns(self.minimum, self.minimum_unit)
        return dequantized(codes, self._columns(self.scale, self.scale_unit), minimum, self.layout)

    def _columns(self, packed: Tensor, unit: Tensor | None) -> Tensor:
        """A level of each column: fp32 [out, in]."""
        assert unit is not None
        level = Level(unpack(packed, self.layout.scale_bits, self.blocks), unit).decode(self.layout)
        return level.repeat_interleave(self.layout.block, dim=1)[:, : self.shape[1]]


def dequantized(codes: Tensor, scale: Tensor, minimum: Tensor | None, layout: Layout) -> Tensor:
    """The weights that stored codes stand for, all arguments [out, n]: fp32 [out, n]."""
    weight = (codes.float() - layout.offset) * scale
    return weight if minimum is None else weight - minimum
