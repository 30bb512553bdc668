"""Two-level integers, the dense part of SpQR (Dettmers et al., ICLR 2024, arXiv 2306.03078, section 4.2): groups so
small that their scales and zero points must themselves be stored as integers.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed import Packed, PackedDense
from kernels.packed_two_level import PackedAffine, PackedTwoLevel
from kernels.packing import pack, row_bytes
from methods.formats.base import Format, Grid
from methods.formats.integer import TINIEST_SCALE, WIDTHS

EXACT = 16
"""The `stats_bits` of scales and zero points that are stored as they are, in fp16."""


@dataclass(frozen=True)
class TwoLevel(Format):
    """Asymmetric integers with quantized statistics: the scale and the real-valued zero point of each group.

    Second-level groups run over *rows*: the scales of `stats_group` consecutive output channels in one group of
    columns share a range, as in the official code. So a group of columns is stored independently of all others,
    and can be fitted anew while rounding goes on.

    Differs from the official code where it breaks down: a range always contains 0, which bounds zero points and
    matters only where all weights of a group have one sign; groups of zeros, which any scale fits, leave the range
    of their neighbors' scales alone; and scales that are all equal are stored exactly.

    Args:
        width: bits of a code, 2 to 8.
        group_size: columns that share a scale and a zero point.
        stats_bits: bits of a scale and of a zero point, 2 to 8; or 16, without a second level.
        stats_group: rows whose statistics share an fp16 step and an fp16 offset.
    """

    width: int
    group_size: int = 16
    stats_bits: int = 3
    stats_group: int = 16

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise ValueError(f"two-level integers have 2 to 8 bits, not {self.width}")
        if self.stats_bits not in (*WIDTHS, EXACT):
            raise ValueError(f"scales and zero points are stored in 2 to 8 bits or in {EXACT}, not {self.stats_bits}")
        if self.group_size < 1 or self.stats_group < 1:
            raise ValueError(
                f"groups of {self.group_size} columns and {self.stats_group} rows are too small; SpQR has 16 and 16"
            )

    @property
    def name(self) -> str:
        second = f"g{self.stats_group}" if self.stats_bits != EXACT else ""
        return f"int{self.width}-g{self.group_size}-stats{self.stats_bits}{second}"

    @property
    def bits(self) -> float:
        return self.width

    def fit(self, weight: Tensor) -> TwoLevelGrid:
        return TwoLevelGrid(self, weight)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        groups = -(-columns // self.group_size)
        if self.stats_bits == EXACT:
            statistic = EXACT * out
        else:
            statistic = 8 * row_bytes(out, self.stats_bits) + (16 + 16) * -(-out // self.stats_group)
        return 8 * out * row_bytes(columns, self.width) + 2 * statistic * groups

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of weights [..., group] before they are stored: each [...], NaN if all are zero."""
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        scale = (high - low) / (2**self.width - 1)
        scale = scale.masked_fill(scale == 0, torch.nan)
        return scale, -low / scale

    def stored(self, statistic: Tensor) -> Packed:
        """One statistic, [groups, out], in storage form. NaN stands for a value that does not matter."""
        if self.stats_bits == EXACT:
            return PackedDense(statistic.nan_to_num(nan=0).to(torch.float16))
        groups, out = statistic.shape
        size, top = min(self.stats_group, out), 2**self.stats_bits - 1
        rows = F.pad(statistic, (0, -out % size), value=torch.nan).unflatten(1, (-1, size))
        missing = rows.isnan()
        low = rows.masked_fill(missing, torch.inf).amin(-1)
        high = rows.masked_fill(missing, -torch.inf).amax(-1)
        low, high = (bound.masked_fill(missing.all(-1), 0) for bound in (low, high))
        offset = low.to(torch.float16)
        step = ((high - offset) / top).clamp(min=0).to(torch.float16)
        divisor = step.float().clamp(min=TINIEST_SCALE).unsqueeze(-1)
        codes = ((rows - offset.float().unsqueeze(-1)) / divisor).round().clamp(0, top).nan_to_num(nan=0)
        packed = pack(codes.flatten(1)[:, :out], self.stats_bits)
        return PackedAffine(packed, step, offset, bits=self.stats_bits, shape=(groups, out), group_size=size)


class TwoLevelGrid(Grid):
    """Scales and zero points of one weight matrix: as fitted, and as what is stored of them decodes to.

    The latter determine codes; the former are kept so that `pack` need not join what was stored group by group.
    """

    def __init__(self, fmt: TwoLevel, weight: Tensor) -> None:
        self.format = fmt
        columns = weight.shape[1]
        self.group_size = min(fmt.group_size, columns)
        self.group = torch.arange(columns, device=weight.device) // self.group_size  # int64 [in]
        fitted = [fmt.statistics(part) for part in weight.split(self.group_size, dim=1)]
        self.fitted = [torch.stack(statistic) for statistic in zip(*fitted, strict=True)]  # 2 × [groups, out]
        self.scale, self.zero = (fmt.stored(statistic).dequantize() for statistic in self.fitted)  # [groups, out]

    def refit(self, group: int, weight: Tensor) -> None:
        for fitted, decoded, statistic in zip(
            self.fitted, (self.scale, self.zero), self.format.statistics(weight), strict=True
        ):
            fitted[group] = statistic
            decoded[group] = self.format.stored(statistic.unsqueeze(0)).dequantize().squeeze(0)

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:
        scale, zero = self._columns(start, weight.shape[1])
        codes = (weight / scale.clamp(min=TINIEST_SCALE)).add_(zero).round_()
        return codes.clamp_(0, 2**self.format.width - 1).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        scale, zero = self._columns(start, codes.shape[1])
        return (codes - zero) * scale

    def permuted(self, order: Tensor) -> TwoLevelGrid:
        grid = copy(self)
        grid.group = self.group[order]
        return grid

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedTwoLevel:
        group = self.group
        if order is not None:
            inverse = torch.argsort(order)
            codes, group = codes[:, inverse], group[inverse]
        neighbors = torch.equal(group, torch.arange(len(group), device=group.device) // self.group_size)
        index = torch.int16 if len(self.scale) <= 2**15 else torch.int32
        scale, zero = (self.format.stored(statistic) for statistic in self.fitted)
        return PackedTwoLevel(
            pack(codes, self.format.width),
            scale,
            zero,
            bits=self.format.width,
            shape=(codes.shape[0], codes.shape[1]),
            group_size=self.group_size,
            group_index=None if neighbors else group.to(index),
        )

    def _columns(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each of `count` columns: [out, count]."""
        group = self.group[start : start + count]
        return self.scale[group].t(), self.zero[group].t()
