"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.base import Context, Parts, Quantized, register
from methods.budget import Budget
from methods.formats.base import Format
from methods.network import Network
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
        super().__post_init__()
        check_stream(self.stream, self.true_sequential)
        self._rounding()

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer", rounding="gptq")

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason or not self.act_order or self.static_groups:
            return reason
        return _no_scattered_groups(self.fitted(budget), max(columns for _, columns in network.shapes))

    def quantize_weights(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget))
        packed = quantize_network(ctx, plan, self._rounding(), self.stream, self.true_sequential)
        return Quantized(packed)

    def _rounding(self) -> GPTQRounding:
        return GPTQRounding(self.act_order, self.damping, self.static_groups, self.block)


def _no_scattered_groups(fmt: Format, columns: int) -> str | None:
    """Why the format cannot store groups whose columns are not neighbors, or None. It is asked by packing a row."""
    grid = fmt.fit(torch.zeros(1, columns))
    scattered = torch.arange(columns).flip(0)  # not a multiple of the group: every group then is torn
    try:
        grid.pack(grid.encode(torch.zeros(1, columns)), scattered)
    except ValueError as error:
        return str(error)
    return None
