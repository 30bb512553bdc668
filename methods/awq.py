"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.base import Context, Parts, Quantized, Stat, register
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest
from methods.transforms.awq import AWQScales
from methods.uniform import AnyFormat


@register("awq")
@dataclass(frozen=True)
class AWQ(AnyFormat):
    """Activation-aware scales and clipping, then rounding to nearest.

    Args:
        search_sequences, clip: see `methods.transforms.awq`.
    """

    search_sequences: int = AWQScales.search_sequences
    clip: bool = AWQScales.clip

    needs: ClassVar[frozenset[Stat]] = AWQScales.needs

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer", "awq")

    def quantize_weights(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget))
        folds = AWQScales(self.search_sequences, self.clip)(ctx, plan)
        packed = quantize_network(ctx, plan, Nearest())
        return Quantized(packed, folds.parameters, folds.input_scale, folds.output_scale)
