"""The k-quants of llama.cpp (pull request 1684), with an importance matrix (4861 and 4930)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kernels.packed import Packed
from methods.base import Context, Parts, Quantized, Stat, UniformMethod, register
from methods.budget import Budget
from methods.formats.superblock import KQUANTS
from methods.network import Network

log = logging.getLogger(__name__)


@register("kquant")
@dataclass(frozen=True)
class KQuant(UniformMethod):
    """Every linear in the k-quant of the budget's width, rounded to nearest.

    The budget's group size and symmetry say nothing: q4_k, say, stores 4.5 bits a weight. The mixes of widths that
    llama.cpp's names such as Q4_K_M stand for are recipes by hand, and not among them.

    Args:
        imatrix: weigh errors by the mean square of the input on calibration text, as `llama-quantize --imatrix`.
    """

    imatrix: bool = True

    @property
    def parts(self) -> Parts:
        return Parts("k-quant")

    @property
    def statistics(self) -> frozenset[Stat]:
        return frozenset({Stat.MEAN_SQUARE}) if self.imatrix else frozenset()

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason or budget.bits in KQUANTS:
            return reason
        return f"k-quants have {min(KQUANTS)} to {max(KQUANTS)} bits, and the budget names {budget.bits}"

    def quantize(self, ctx: Context) -> Quantized:
        assert ctx.budget.bits is not None
        packed: dict[str, Packed] = {}
        for name in ctx.track(ctx.network.linears, "fitting scales"):
            weight = ctx.network.weight(name)
            importance = ctx.statistics(Stat.MEAN_SQUARE, name).to(weight) if self.imatrix else None
            if importance is not None and not importance.any():
                log.warning("%s received no calibration tokens: all its inputs count the same", name)
            grid = KQUANTS[ctx.budget.bits].fit(weight, importance)
            codes = grid.encode(weight)
            ctx.network.overwrite(name, grid.decode(codes))
            packed[name] = grid.pack(codes)
        return Quantized(packed)
