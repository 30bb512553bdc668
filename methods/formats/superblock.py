"""The k-quants of llama.cpp, q2_k to q6_k (pull request 1684; with importances, 4861 and 4930)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed_superblock import LAYOUTS, SUPER_BLOCK, Layout, Level, PackedSuperBlock, dequantized
from kernels.packing import row_bytes
from methods.formats.base import BlockGrid, Format
from methods.formats.superblock_search import SEARCHES, ratio

LEAST_IMPORTANCE = 1e-6  # of the mean: unlike in llama.cpp, inputs that were never active keep their weights


@dataclass(frozen=True)
class SuperBlock(Format):
    """Sub-blocks of 16 or 32 whose scales, and minima if the width has them, are integers under fp16 units of their
    super-block of 256.

    Where rows are no multiple of 256, the last super-block and sub-block are shorter; llama.cpp takes another
    format. Units are fixed when the grid is fitted: the scale of a refitted sub-block takes the nearest multiple,
    and larger weights saturate.

    Args:
        width: bits of a code, 2 to 6.
    """

    width: int

    def __post_init__(self) -> None:
        if self.width not in LAYOUTS:
            raise ValueError(f"k-quants have {min(LAYOUTS)} to {max(LAYOUTS)} bits, not {self.width}")

    @property
    def name(self) -> str:
        return f"q{self.width}_k"

    @property
    def bits(self) -> float:
        return self.width

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.width]

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> SuperBlockGrid:
        """Fit the grid to `weight`, fp32 [out, in].

        Args:
            importance: of each column, fp32 [in], not negative: the mean square of its input (llama.cpp's imatrix).
        """
        return SuperBlockGrid(self, weight, importance)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        blocks, supers = -(-columns // self.layout.block), -(-columns // SUPER_BLOCK)
        level = 8 * row_bytes(blocks, self.layout.scale_bits) + 16 * supers
        return out * (8 * row_bytes(columns, self.width) + (2 if self.layout.affine else 1) * level)


KQUANTS = {width: SuperBlock(width) for width in LAYOUTS}
"""q2_k to q6_k, by width."""


class SuperBlockGrid(BlockGrid):
    """Scales and minima of one weight matrix, as stored and as the fp32 numbers [out, sub-blocks] they stand for."""

    format: SuperBlock
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, fmt: SuperBlock, weight: Tensor, importance: Tensor | None) -> None:
        self.format, self.layout = fmt, fmt.layout
        columns = weight.shape[1]
        self.group_size = min(self.layout.block, columns)
        self.group = torch.arange(columns, device=weight.device) // self.group_size  # int64 [in]
        self.levels = _levels(fmt, weight, importance)
        self._decode_levels()

    def refit(self, group: int, weight: Tensor) -> None:
        search, x = SEARCHES[self.format.width, False], weight.t()
        fitted = search.levels(x, search.loss(x, torch.ones_like(x)), self.layout.top)
        for level, wanted in zip(self.levels, fitted, strict=True):
            unit = level.unit[:, group // self.layout.per_super].float()
            codes = torch.round(ratio(wanted, unit)) + self.layout.scale_offset
            level.codes[:, group] = codes.clamp(0, 2**self.layout.scale_bits - 1).to(torch.uint8)
        self._decode_levels()

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        scale, minimum = self._columns(start, weight.shape[1])
        shifted = weight if minimum is None else weight + minimum
        codes = torch.round(ratio(shifted, scale)).add_(self.layout.offset)
        return codes.clamp_(0, 2**self.layout.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        return dequantized(codes, *self._columns(start, codes.shape[1]), self.layout)

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedSuperBlock:
        codes = self.in_matrix_order(codes, order)
        scale, *rest = self.levels
        return PackedSuperBlock(codes, scale, rest[0] if rest else None, layout=self.layout)

    def _decode_levels(self) -> None:
        self.scale, *rest = (level.decode(self.layout) for level in self.levels)
        self.minimum = rest[0] if rest else None

    def _columns(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of each of `count` columns: [out, count]."""
        group = self.group[start : start + count]
        return self.scale[:, group], None if self.minimum is None else self.minimum[:, group]


def _levels(fmt: SuperBlock, weight: Tensor, importance: Tensor | None) -> list[Level]:
    """Scales of the sub-blocks, and minima if the width has them.

    Raises:
        FloatingPointError: a weight is not finite, or too large for an fp16 unit.
    """
    layout, search = fmt.layout, SEARCHES[fmt.width, importance is not None]
    relevance = torch.ones_like(weight[:1]) if importance is None else _floored(importance).unsqueeze(0)
    x = _blocks_first(weight, layout)  # [block, sub-blocks of a super-block, out, super-blocks]
    loss = search.loss(x, _blocks_first(relevance, layout))
    levels = []
    for level in search.levels(x, loss, layout.top):
        unit, codes = search.units(level, loss.sum(0), layout.scale_top)
        codes = codes.permute(1, 2, 0).flatten(1)[:, : -(-weight.shape[1] // layout.block)]
        levels.append(Level((codes + layout.scale_offset).to(torch.uint8), unit.to(torch.float16)))
    if not (weight.isfinite().all() and all(level.unit.isfinite().all() for level in levels)):
        raise FloatingPointError(
            f"{fmt.name} cannot scale weights up to {weight.abs().max():g}; check where they overflowed"
        )
    return levels


def _blocks_first(matrix: Tensor, layout: Layout) -> Tensor:
    """[rows, in] to [block, sub-blocks of a super-block, rows, super-blocks].

    Missing columns are zeros: nothing as weights, and of no importance as importances.
    """
    padded = F.pad(matrix, (0, -matrix.shape[1] % SUPER_BLOCK))
    return padded.view(len(matrix), -1, layout.per_super, layout.block).permute(3, 2, 0, 1).contiguous()


def _floored(importance: Tensor) -> Tensor:
    """No input counts nothing at all; where none was ever active (an expert without tokens), all count the same."""
    return importance.clamp(min=LEAST_IMPORTANCE * importance.mean()) if importance.any() else importance + 1
