"""LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv 2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activations import ExceptOutliers, TokenScale, integers
from kernels.packed import Packed, PackedDense
from kernels.packed_sum import PackedLowRank, PackedSparse, PackedSum
from methods.base import Context, Quantized, Stat, UniformMethod, register
from methods.budget import Budget
from methods.formats.integer import Integer
from methods.network import Network
from methods.rounding.nearest import round_to_nearest

FORMAT = Integer(8, symmetric=True, restricted=True)


@register("llm_int8")
@dataclass(frozen=True)
class LLMInt8(UniformMethod):
    """INT8 weights with one scale for each output channel, whatever the budget's group size, and INT8 inputs with one
    for each token, except in the columns of an input that hold outliers: these are multiplied in 16 bits.

    Which columns those are is found out at run time, over all tokens of a call. The paper multiplies them with 16-bit
    weights, which have to be kept beside the integers; bitsandbytes, the official code, decodes the integers for
    them, and so does this by default. In bitsandbytes numbers below the threshold count for a token's scale even in
    a column with outliers; here, as in the paper, the column is taken out first.

    Args:
        threshold: a number of at least this magnitude is an outlier. 0 leaves all inputs alone, a huge one rounds all.
        exact_columns: keep 16-bit weights beside the integers, for all columns in which the calibration text has an
            outlier; the scales of the other columns do not see them.
    """

    threshold: float = 6.0
    exact_columns: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"LLM.int8()'s threshold={self.threshold:g} is not a magnitude; the paper has 6")

    @property
    def statistics(self) -> frozenset[Stat]:
        return frozenset({Stat.MAX_ABS}) if self.exact_columns else frozenset()

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason or budget.bits == FORMAT.width:
            return reason
        return f"LLM.int8() has {FORMAT.width}-bit weights, and the budget names {budget.bits}"

    def quantize(self, ctx: Context) -> Quantized:
        packed = {}
        for name in ctx.track(ctx.network.linears, "rounding"):
            packed[name] = _rounded(ctx.network.weight(name), self._exact(ctx, name))
            ctx.network.overwrite(name, packed[name].dequantize())
        rounding = TokenScale(integers(FORMAT.width))
        inputs = {name: ExceptOutliers(rounding, self.threshold) for name in ctx.network.linears}
        return Quantized(packed, inputs=dict(inputs))

    def _exact(self, ctx: Context, linear: str) -> Tensor | None:
        """The columns to keep in 16 bits: bool [in]."""
        return ctx.statistics(Stat.MAX_ABS, linear) >= self.threshold if self.exact_columns else None


def _rounded(weight: Tensor, exact: Tensor | None) -> Packed:
    """`weight` [out, in] in INT8, but for the columns in `exact`, bool [in]."""
    if exact is None or not exact.any():
        return round_to_nearest(weight, FORMAT).packed
    base = round_to_nearest(weight.masked_fill(exact, 0), FORMAT).packed
    columns = PackedDense(weight[:, exact].to(torch.float16))
    picked = torch.eye(len(exact), device=weight.device)[exact]  # what picks their inputs, [columns, in]
    return PackedSum(base, PackedLowRank(columns, PackedSparse.of(picked, picked > 0)))
