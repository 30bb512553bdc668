"""HAWQ-V3 (Yao et al., ICML 2021, arXiv 2011.10680)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from methods.base import Context, Quantized, Stat, register
from methods.budget import Budget
from methods.dyadic import DyadicInteger, input_maxima, output_maxima, to_integer_only
from methods.formats.base import Format
from methods.mixed_precision import MixedPrecision
from methods.sensitivity.omega import HAWQV2Omega


@register("hawq_v3")
@dataclass(frozen=True)
class HAWQV3(MixedPrecision):
    """HAWQ-V2's Ω, minimized by an integer programme under a bound on size, BOPs or latency, and linears that
    compute with integers alone: 8-bit inputs, dyadic rescaling of the sums, no division and no floating point.

    Weights are symmetric with one scale for each output channel, whatever the budget's group size is. The
    transformer's norms, softmax and activation functions stay in floating point, so that inputs are rounded at a
    linear's border. Ranges are static, from calibration text. Nothing is trained.

    Args:
        integer_only: False leaves inputs in 16 bits and multiplies in floating point: the allocation alone.
        output_bits: width of a linear's output. The paper rescales to 8 bits where the next layer follows
            directly; a language model's residual stream and attention scores need more.
        tolerance, max_probes, context, blockwise: see `methods.sensitivity.hutchinson`.
    """

    bits: tuple[int, ...] = (4, 8)
    solver: str = "ilp"
    integer_only: bool = True
    output_bits: int = 16
    tolerance: float = HAWQV2Omega.tolerance
    max_probes: int = HAWQV2Omega.max_probes
    context: int = HAWQV2Omega.context
    blockwise: bool = HAWQV2Omega.blockwise

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.integer_only and (self.formats or self.input_bits or self.transform != "none" or 16 in self.bits):
            raise ValueError(
                "integer-only linears take integer widths below 16 and 8-bit inputs, and no transform; leave "
                "method.formats, method.input_bits and method.transform alone, or set method.integer_only=false"
            )

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MAX_ABS})

    def sensitivity(self) -> HAWQV2Omega:
        return HAWQV2Omega(self.tolerance, self.max_probes, self.context, self.blockwise)

    def candidates(self, budget: Budget) -> tuple[Format, ...]:
        """Symmetric and per channel, whatever the budget's formats are."""
        if not self.integer_only:
            return super().candidates(replace(budget, group_size=0, symmetric=True))
        return tuple(DyadicInteger(width, symmetric=True) for width in sorted(self.bits))

    def quantize(self, ctx: Context) -> Quantized:
        done = super().quantize(ctx)
        if not self.integer_only:
            return done
        outputs = output_maxima(ctx.network, ctx.tokens)
        integers = to_integer_only(
            ctx.network, done.packed, input_maxima(ctx.network, ctx.statistics), outputs, self.output_bits
        )
        return replace(done, packed=dict(integers))
