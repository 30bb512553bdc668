"""The HAWQ_V2 tuning strategy of Intel Neural Compressor (2.x; removed in 2026)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.allocation.fallback import Fallback
from methods.base import register
from methods.reversion import Reversion
from methods.sensitivity.inc import INCTrace


@register("inc_hawq_v2")
@dataclass(frozen=True)
class INCHAWQV2(Reversion):
    """All linears at one width, then the most sensitive ones back to 16 bits, in the order of their traces.

    Args:
        as_shipped: the order of the shipped code for a metric of which less is better, such as perplexity: it
            restores the *least* sensitive linears first. The default is the order that was meant.
        tolerance, max_probes, context, blockwise: see `methods.sensitivity.hutchinson`. (The strategy stops at a
            relative change of the running mean of 1e-5 or after 500 probes; a standard error says more.)
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 16)
    granularity: str = "layer"
    solver: str = "inc"
    as_shipped: bool = False
    tolerance: float = INCTrace.tolerance
    max_probes: int = INCTrace.max_probes
    context: int = INCTrace.context
    blockwise: bool = INCTrace.blockwise

    def sensitivity(self) -> INCTrace:
        return INCTrace(self.tolerance, self.max_probes, self.context, self.blockwise)

    def allocation(self) -> Fallback:
        return Fallback(as_shipped=self.as_shipped)
