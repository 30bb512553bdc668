"""SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.formats.base import Format
from methods.pipeline import quantize_network
from methods.rounding.sparsegpt import SparseGPTRounding, Unrounded


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(UniformMethod):
    """Pruning, jointly with quantization to the budget's integers.

    A bitmap says which weights are kept. With b bits at a sparsity of 0.5 it stores about 1 + b/2 bits a weight,
    less than the budget from 3 bits on; pruning alone stores 9, whatever the budget's width.

    Args:
        sparsity, pattern, damping, block: see `methods.rounding.sparsegpt`.
        prune_only: keep weights that are not pruned in 16 bits.
    """

    sparsity: float = SparseGPTRounding.sparsity
    pattern: str = SparseGPTRounding.pattern
    prune_only: bool = False
    damping: float = SparseGPTRounding.damping
    block: int = SparseGPTRounding.block

    def __post_init__(self) -> None:
        self._rounding()

    @property
    def parts(self) -> Parts:
        return Parts("sparse dense16" if self.prune_only else "sparse integer", rounding="sparsegpt")

    def quantize(self, ctx: Context) -> Quantized:
        fmt: Format = Unrounded() if self.prune_only else ctx.budget.format()
        plan = dict.fromkeys(ctx.network.linears, fmt)
        return Quantized(quantize_network(ctx, plan, self._rounding()))

    def _rounding(self) -> SparseGPTRounding:
        return SparseGPTRounding(self.sparsity, self.pattern, self.damping, self.block)
