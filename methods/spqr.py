"""SpQR (Dettmers et al., ICLR 2024, arXiv 2306.03078)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.formats.two_level import TwoLevel
from methods.pipeline import quantize_network
from methods.rounding.spqr import SpQRRounding


@register("spqr")
@dataclass(frozen=True)
class SpQR(UniformMethod):
    """Two-level integers of the budget's width, and outliers in 16 bits.

    Group sizes are SpQR's own, whatever the budget's, so it stores more than integers of b bits do: with the
    defaults b + 6/16 + 64/256 = b + 0.625 bits a weight, and 32 for each outlier. The defaults are what the official
    code recommends for near-lossless compression to 4 bits. At 2 bits many ordinary rounding errors exceed their
    threshold, so that it takes a larger one to keep outliers few.

    Args:
        outlier_threshold, damping, act_order: see `methods.rounding.spqr`.
        group_size, stats_bits, stats_group: see `methods.formats.two_level`.
    """

    outlier_threshold: float = SpQRRounding.outlier_threshold
    group_size: int = TwoLevel.group_size
    stats_bits: int = TwoLevel.stats_bits
    stats_group: int = TwoLevel.stats_group
    damping: float = SpQRRounding.damping
    act_order: bool = SpQRRounding.act_order

    def __post_init__(self) -> None:
        self._format(4)
        self._rounding()

    @property
    def parts(self) -> Parts:
        return Parts("two_level + sparse", rounding="spqr")

    def quantize(self, ctx: Context) -> Quantized:
        assert ctx.budget.bits is not None  # `supports` refuses other budgets
        plan = dict.fromkeys(ctx.network.linears, self._format(ctx.budget.bits))
        return Quantized(quantize_network(ctx, plan, self._rounding()))

    def _format(self, width: int) -> TwoLevel:
        return TwoLevel(width, self.group_size, self.stats_bits, self.stats_group)

    def _rounding(self) -> SpQRRounding:
        return SpQRRounding(self.outlier_threshold, self.damping, self.act_order)
