"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from methods.base import Context, Parts, Quantized, Stat, register
from methods.budget import Budget
from methods.formats.base import Format
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest
from methods.transforms.smoothquant import SmoothQuantScales
from methods.uniform import AnyFormat


@register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(AnyFormat):
    """Smoothing, then rounding to nearest of weights and of the linears' inputs.

    The paper's W8A8 is `budget=w8channel`: weights have restricted symmetric integers, one scale for each output
    channel, whether the budget is symmetric or not; a group size in the budget is honoured. Attention's products,
    which the paper computes in INT8 too, stay in 16 bits; `kv_cache` rounds keys and values.

    Args:
        alpha, alphas: see `methods.transforms.smoothquant`.
        inputs: `int8-token`, `int8-tensor` and `int8-static` are the paper's O1, O2 and O3.
    """

    alpha: float = SmoothQuantScales.alpha
    alphas: tuple[float, ...] = ()
    inputs: str = field(default="int8-token", kw_only=True)

    needs: ClassVar[frozenset[Stat]] = SmoothQuantScales.needs

    def __post_init__(self) -> None:
        super().__post_init__()
        self._transform()

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer", "smoothquant")

    def fitted(self, budget: Budget, **options: Any) -> Format:
        return super().fitted(replace(budget, symmetric=True), restricted=not self.format, **options)

    def quantize_weights(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget))
        folds = self._transform()(ctx, plan)
        packed = quantize_network(ctx, plan, Nearest())
        return Quantized(packed, folds.parameters, folds.input_scale, folds.output_scale)

    def _transform(self) -> SmoothQuantScales:
        return SmoothQuantScales(self.alpha, self.alphas, self.inputs)
