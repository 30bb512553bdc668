"""Quantization-aware training of one format everywhere; of mixed precision it is `method.transform=qat`."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Context, Parts, Quantized, register
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest
from methods.transforms.qat import FineTuned
from methods.uniform import AnyFormat


@register("qat")
@dataclass(frozen=True)
class QAT(AnyFormat):
    """Rounding to nearest after LLM-QAT's fine-tuning of all weights (Liu et al., Findings of ACL 2024, arXiv
    2305.17888), on the calibration text.

    Args:
        steps, lr, batch, distillation: see `methods.transforms.qat`.
    """

    steps: int = FineTuned.steps
    lr: float = FineTuned.lr
    batch: int = FineTuned.batch
    distillation: float = FineTuned.distillation

    def __post_init__(self) -> None:
        super().__post_init__()
        self._transform()

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer", FineTuned.name)

    def quantize_weights(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget))
        self._transform()(ctx, plan)
        return Quantized(quantize_network(ctx, plan, Nearest()))

    def _transform(self) -> FineTuned:
        return FineTuned(self.steps, self.lr, self.batch, self.distillation)
