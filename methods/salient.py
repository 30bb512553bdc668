"""The experiment that AWQ starts from (Lin et al., MLSys 2024, arXiv 2306.00978, section 3.1 and table 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packed import Packed, PackedDense
from kernels.packed_columns import PackedColumns
from methods.base import Context, Parts, Quantized, Stat, hint, register
from methods.formats.base import Format
from methods.formats.dense import Dense
from methods.rounding.nearest import round_to_nearest
from methods.uniform import AnyFormat


@dataclass(frozen=True)
class Criterion:
    """What makes an input channel of a linear salient.

    Attributes:
        score: of each channel of the linear of that name, [in]; the largest are kept.
        needs: the calibration statistics that it reads.
    """

    score: Callable[[Context, str], Tensor]
    needs: frozenset[Stat] = frozenset()


CRITERIA = {
    "activation": Criterion(lambda ctx, name: ctx.statistics(Stat.MEAN_ABS, name), frozenset({Stat.MEAN_ABS})),
    "weight": Criterion(lambda ctx, name: ctx.network.weight(name).norm(dim=0)),
    "random": Criterion(lambda ctx, name: torch.rand(ctx.network.shape(name)[1], generator=ctx.generator)),
}
"""By the mean magnitude of the channel's input, by the norm of its weights, and for comparison neither."""


@register("salient")
@dataclass(frozen=True)
class Salient(AnyFormat):
    """Rounding to nearest, with a small share of every linear's input channels kept in 16 bits.

    Grids are fitted to all channels, those that are kept included, and the codes of these stay in the packed matrix:
    as in the simulation of the authors' course (MIT 6.5940, lab 4), which rounds everything and then restores the
    salient channels. The 16-bit columns and their places count as stored, so that this takes more than its budget.

    Args:
        criterion: which channels are salient: of the largest mean `activation`, of the largest `weight` norm, or
            `random` ones.
        fraction: of the input channels of each linear, rounded to at least one.
    """

    criterion: str = "activation"
    fraction: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}: {hint(self.criterion, CRITERIA)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction:g} is no share of the channels; the paper has 0.001 to 0.03")

    @property
    def parts(self) -> Parts:
        return Parts(f"{self.format or 'integer'} + columns")

    @property
    def statistics(self) -> frozenset[Stat]:
        return super().statistics | CRITERIA[self.criterion].needs

    def quantize_weights(self, ctx: Context) -> Quantized:
        fmt, score = self.fitted(ctx.budget), CRITERIA[self.criterion].score
        packed: dict[str, Packed] = {}
        for name in ctx.track(ctx.network.linears, "rounding"):
            salient = largest(score(ctx, name), self.fraction)
            packed[name] = with_exact_columns(ctx.network.weight(name), salient, fmt)
            ctx.network.overwrite(name, packed[name].dequantize())
        return Quantized(packed)


def largest(score: Tensor, fraction: float) -> Tensor:
    """Where the largest of the scores [in] are, bool [in]; at least one."""
    count = max(1, round(fraction * len(score)))
    return torch.zeros_like(score, dtype=torch.bool).index_fill(0, score.topk(count).indices, True)


def with_exact_columns(weight: Tensor, exact: Tensor, fmt: Format) -> PackedColumns:
    """`weight`, fp32 [out, in], rounded to nearest but for the columns in `exact`, bool [in]."""
    exact = exact.to(weight.device)
    kept = round_to_nearest(weight[:, exact], Dense()).packed
    assert isinstance(kept, PackedDense)
    return PackedColumns.of(round_to_nearest(weight, fmt).packed, kept, exact)
