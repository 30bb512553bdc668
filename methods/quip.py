"""QuIP (Chee et al., NeurIPS 2023, arXiv 2307.13304)."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.orthogonal import random_orthogonal
from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.incoherence import Incoherence, MidRise
from methods.pipeline import quantize_network
from methods.rounding.ldlq import LDLQ


@register("quip")
@dataclass(frozen=True)
class QuIP(UniformMethod):
    """Incoherence processing, then LDLQ on a grid with one scale for the whole matrix.

    Of the budget it uses the width alone: the paper has no groups, and its grid is symmetric. `needs` is empty:
    calibration is on activations of the partly quantized model, as with GPTQ.

    Args:
        transform: `kronecker` (the paper), `hadamard` (as in QuIP#), or `identity` for an ablation.
        rho: range of the grid in units of the root mean square of the rotated weights.
        damping: of the Gram matrix, relative to its mean diagonal.
        greedy_passes: see `methods.rounding.ldlq`.
    """

    transform: str = "kronecker"
    rho: float = MidRise.rho
    damping: float = Incoherence.damping
    greedy_passes: int = LDLQ.greedy_passes

    def __post_init__(self) -> None:
        random_orthogonal(self.transform, 1, seed=0)
        MidRise(2, self.rho)
        LDLQ(self.damping, self.greedy_passes)

    @property
    def parts(self) -> Parts:
        return Parts("integer", "incoherence", "ldlq")

    def quantize(self, ctx: Context) -> Quantized:
        fmt = MidRise(ctx.budget.format().width, self.rho)
        rounding = Incoherence(LDLQ(0, self.greedy_passes), ctx.generator, self.transform, self.damping)
        return Quantized(quantize_network(ctx, dict.fromkeys(ctx.network.linears, fmt), rounding))
