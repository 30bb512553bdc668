"""NNCF's weight compression (openvinotoolkit/nncf, `compress_weights`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kernels.packed import Packed
from methods.base import Budget, Context, Quantized, Stat, register
from methods.formats.base import Format
from methods.lora_correction import Corrected, corrected
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.base import METRICS, Metric
from methods.sensitivity.nncf import BACKUP


@register("nncf")
@dataclass(frozen=True)
class NNCF(MixedPrecision):
    """Grouped INT4 for most linears, and INT8 per output channel for those most sensitive by a criterion.

    NNCF is told the share of weights in INT4; here it follows from the budget. A budget of 4 bits leaves nothing to
    the backup format, and all criteria agree. Linears are independent of each other, also where they share an input.

    What NNCF switches on and off is named here:
    - its AWQ: `transform=nncf_awq`, or `none`;
    - scale estimation: `rounding=scale_estimation`, or `nearest`;
    - GPTQ: `rounding=gptq`, or `scale_estimation_gptq` for both, with NNCF's damping.
    With `none` and `nearest` what is left is rounding to nearest, which is what NNCF does unless told otherwise; this
    method has its AWQ and scale estimation on.

    Args:
        bits: of the primary format.
        metric: the criterion: `nncf_max_variance` (NNCF's default where there are data), `nncf_mean_variance`,
            `nncf_mean_magnitude`, `nncf_hessian` or `nncf_weight_error`; see `methods.sensitivity.nncf`.
        lora_rank: of the correction of linears in the primary format, which the budget pays for; 0 for none. See
            `methods.lora_correction`. NNCF's is 8, and it leaves the correction out where GPTQ rounds.
    """

    bits: tuple[int, ...] = (4,)
    granularity: str = "layer"
    solver: str = "ordered"
    rounding: str = "scale_estimation"
    transform: str = "nncf_awq"
    metric: str = "nncf_max_variance"
    lora_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise ValueError(f"method.lora_rank={self.lora_rank} is negative; take 0 for no correction, or NNCF's 8")

    def sensitivity(self) -> Metric:
        return METRICS[self.metric]()

    @property
    def statistics(self) -> frozenset[Stat]:
        return super().statistics | ({Stat.GRAM} if self.lora_rank else set())

    def candidates(self, budget: Budget) -> tuple[Format, ...]:
        primary = super().candidates(budget)
        if self.lora_rank:
            primary = tuple(Corrected(fmt, self.lora_rank) for fmt in primary)
        return (*primary, BACKUP)

    def quantize(self, ctx: Context) -> Quantized:
        if not self.lora_rank:
            return super().quantize(ctx)
        original = {name: ctx.network.linear(name).weight.detach().clone() for name in ctx.network.linears}
        quantized = super().quantize(ctx)
        packed = dict(quantized.packed)
        for name in ctx.track(ctx.network.linears, "correcting"):
            if packed[name].bits < BACKUP.bits:
                packed[name] = self._corrected(ctx, name, original.pop(name).float(), quantized)
        return replace(quantized, packed=packed)

    def _corrected(self, ctx: Context, name: str, weight: Tensor, quantized: Quantized) -> Packed:
        """The packed matrix with its correction; NNCF's statistics, too, are of the full-precision model."""
        gram = ctx.statistics(Stat.GRAM, name)
        if name in quantized.input_scale:
            scale = quantized.input_scale[name]
            weight, gram = weight * scale, gram / scale.outer(scale)
        if name in quantized.output_scale:
            weight = weight / quantized.output_scale[name].unsqueeze(1)
        return corrected(quantized.packed[name], weight, gram, len(ctx.tokens), self.lora_rank)
