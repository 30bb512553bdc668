"""The super-blocks of k-quants as ggml stores them (`ggml-common.h`, and its `dequantize_row_q…_K`), in our layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.packed_superblock import LAYOUTS, Level, PackedSuperBlock


class Block(NamedTuple):
    """How a super-block lies in memory.

    Attributes:
        parts: name to bytes, in their order. The lower bits of codes are called `low`, the upper ones `high`, scales
            and minima of sub-blocks together `levels`.
        low_bits: of a code.
        low_run: how many bytes hold the first codes, one a byte, before these bytes hold the next ones.
        levels: takes `levels` apart: scales, and minima where there are any, uint8 [..., sub-blocks].
    """

    parts: dict[str, int]
    low_bits: int
    low_run: int
    levels: Callable[[Tensor], tuple[Tensor, ...]]

    @property
    def bytes(self) -> int:
        """Of the super-block."""
        return sum(self.parts.values())


def from_blocks(blocks: Tensor, width: int) -> PackedSuperBlock:
    """A matrix in our layout: the same codes, scales and units.

    Args:
        blocks: uint8 [out, bytes].
        width: bits of a code, a key of `BLOCKS`.

    Raises:
        ValueError: the bytes of a row are no whole super-blocks.
    """
    block = BLOCKS[width]
    if blocks.shape[1] % block.bytes:
        raise ValueError(f"its rows of {blocks.shape[1]} bytes are no whole q{width}_k blocks of {block.bytes}")
    parts = blocks.unflatten(1, (-1, block.bytes)).split(list(block.parts.values()), dim=-1)
    part = dict(zip(block.parts, parts, strict=True))
    codes = fields(part["low"], block.low_bits, block.low_run)
    if "high" in part:
        codes |= fields(part["high"], width - block.low_bits, 32) << block.low_bits
    units = (part[name].contiguous().view(torch.float16).flatten(1) for name in part if name.startswith("unit"))
    scale, *minimum = (Level(c.flatten(1), u) for c, u in zip(block.levels(part["levels"]), units, strict=True))
    return PackedSuperBlock(codes.flatten(1), scale, minimum[0] if minimum else None, layout=LAYOUTS[width])


def fields(data: Tensor, bits: int, run: int) -> Tensor:
    """Numbers of `bits` bits from uint8 [..., bytes]: the lowest of `run` bytes one after the other, then the next
    ones of the same bytes; then those of the next `run` bytes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).unsqueeze(-1)
    return ((data.unflatten(-1, (-1, 1, run)) >> shifts) & (2**bits - 1)).flatten(-3)


def _nibbles(data: Tensor) -> tuple[Tensor, ...]:
    """Scale and minimum of 4 bits in a byte."""
    return data & 15, data >> 4


def _six_bits(data: Tensor) -> tuple[Tensor, ...]:
    """16 scales: 4 low bits in the first 8 bytes, 2 high bits in the last 4."""
    return (fields(data[..., :8], 4, 8) | fields(data[..., 8:], 2, 4) << 4,)


def _six_bits_twice(data: Tensor) -> tuple[Tensor, ...]:
    """8 scales and 8 minima: the first four of each in a byte each, of the others 4 low bits in the last 4 bytes and
    2 high bits in what the first ones left."""
    scale, minimum, low = data.split(4, dim=-1)
    return (
        torch.cat([scale & 63, low & 15 | scale >> 6 << 4], -1),
        torch.cat([minimum & 63, low >> 4 | minimum >> 6 << 4], -1),
    )


def _signed(data: Tensor) -> tuple[Tensor, ...]:
    """From two's complement to an offset of 128."""
    return (data ^ 128,)


BLOCKS = {
    2: Block({"levels": 16, "low": 64, "unit": 2, "unit of minima": 2}, 2, 32, _nibbles),
    3: Block({"high": 32, "low": 64, "levels": 12, "unit": 2}, 2, 32, _six_bits),
    4: Block({"unit": 2, "unit of minima": 2, "levels": 12, "low": 128}, 4, 32, _six_bits_twice),
    5: Block({"unit": 2, "unit of minima": 2, "levels": 12, "high": 32, "low": 128}, 4, 32, _six_bits_twice),
    6: Block({"low": 128, "high": 64, "levels": 16, "unit": 2}, 4, 64, _signed),
}
"""q2_k to q6_k, by the bits of a code."""
