"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, Parts, Quantized, register
from methods.pipeline import check_stream, quantize_network
from methods.rounding.gptq import GPTQRounding
from methods.uniform import AnyFormat


@register("gptq")
@dataclass(frozen=True)
class GPTQ(AnyFormat):
    """Column-wise rounding with error feedback, calibrated block by block.

    `needs` is empty: the paper calibrates on activations of the partly quantized model, which cannot be
    collected beforehand, and for `stream=full` the same loop collects the matrices in one pass.

    Args:
        act_order, damping, static_groups, block: see `methods.rounding.gptq`.
        stream, true_sequential: see `methods.pipeline`.
    """

    act_order: bool = False
    damping: float = 0.01
    static_groups: bool = False
    block: int = 128
    stream: str = "quantized"
    true_sequential: bool = False

    def __post_init__(self) -> None:
        check_stream(self.stream, self.true_sequential)
        self._rounding()

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer", rounding="gptq")

    def quantize(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget))
        packed = quantize_network(ctx, plan, self._rounding(), self.stream, self.true_sequential)
        return Quantized(packed)

    def _rounding(self) -> GPTQRounding:
        return GPTQRounding(self.act_order, self.damping, self.static_groups, self.block)
