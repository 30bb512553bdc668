"""No quantization: the reference row of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.base import Context, Method, Parts, Quantized, register
from methods.formats.dense import Dense
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest


@register("fp16")
@dataclass(frozen=True)
class FP16(Method):
    """All linears in 16 bits, whatever the budget."""

    uses_budget: ClassVar[bool] = False

    @property
    def parts(self) -> Parts:
        return Parts(format=Dense().name)

    def quantize(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, Dense())
        return Quantized(quantize_network(ctx, plan, Nearest()))
