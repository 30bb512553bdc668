"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.base import Context, Quantized, Stat, UniformMethod, register
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest
from methods.transforms.awq import search_and_fold


@register("awq")
@dataclass(frozen=True)
class AWQ(UniformMethod):
    """Activation-aware scales and clipping, then rounding to nearest.

    Args:
        search_sequences: calibration sequences on which candidate scales are compared. The official code
            compares on all 128 × 512 tokens; a few sequences choose nearly the same scales in a fraction of
            the time.
        clip: search for clipping thresholds after the scales.
    """

    search_sequences: int = 8
    clip: bool = True

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MEAN_ABS})

    def quantize(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, ctx.budget.format())
        folds = search_and_fold(ctx, plan, self.search_sequences, self.clip)
        packed = quantize_network(ctx, plan, Nearest())
        return Quantized(packed, folds.parameters, folds.input_scale, folds.output_scale)
