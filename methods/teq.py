"""TEQ (Cheng et al., arXiv 2310.10944)."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, Parts, Quantized, register
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest
from methods.transforms.teq import TEQScales
from methods.uniform import AnyFormat


@register("teq")
@dataclass(frozen=True)
class TEQ(AnyFormat):
    """Scales trained on the loss of the rounded model, then rounding to nearest.

    Args:
        steps, lr, warmup, sqrt_w_init: see `methods.transforms.teq`.
    """

    steps: int = TEQScales.steps
    lr: float = TEQScales.lr
    warmup: float = TEQScales.warmup
    sqrt_w_init: bool = TEQScales.sqrt_w_init

    def __post_init__(self) -> None:
        super().__post_init__()
        self._transform()

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer", "teq")

    def quantize_weights(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget))
        folds = self._transform()(ctx, plan)
        packed = quantize_network(ctx, plan, Nearest())
        return Quantized(packed, folds.parameters, folds.input_scale, folds.output_scale)

    def _transform(self) -> TEQScales:
        return TEQScales(self.steps, self.lr, self.warmup, self.sqrt_w_init)
