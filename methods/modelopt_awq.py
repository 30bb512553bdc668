"""AWQ as NVIDIA's Model Optimizer has it (`awq_lite`, `awq_clip`, `awq_full`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.base import Context, Parts, Quantized, Stat, hint, register
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest
from methods.transforms.awq_clip import AWQClip, clip_network
from methods.transforms.awq_lite import AWQLite
from methods.transforms.base import Folds
from methods.uniform import AnyFormat

ALGORITHMS = ("awq_lite", "awq_clip", "awq_full")


@register("modelopt_awq")
@dataclass(frozen=True)
class ModelOptAWQ(AnyFormat):
    """Activation-aware scales, clipping, or both, then rounding to nearest.

    Args:
        algorithm: `awq_lite` (scales; what ModelOpt's INT4 AWQ runs), `awq_clip` (thresholds), or `awq_full` (scales,
            then thresholds); see `methods.transforms`.
    """

    algorithm: str = "awq_lite"

    needs: ClassVar[frozenset[Stat]] = AWQLite.needs | AWQClip.needs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {self.algorithm!r}: {hint(self.algorithm, ALGORITHMS)}")

    @property
    def parts(self) -> Parts:
        return Parts(self.format or "integer", self.algorithm)

    def quantize_weights(self, ctx: Context) -> Quantized:
        plan = dict.fromkeys(ctx.network.linears, self.fitted(ctx.budget))
        folds = Folds() if self.algorithm == "awq_clip" else AWQLite()(ctx, plan)
        if self.algorithm != "awq_lite":
            clip_network(ctx, plan, folds.input_scale)
        packed = quantize_network(ctx, plan, Nearest())
        return Quantized(packed, folds.parameters, folds.input_scale, folds.output_scale)
