"""HQQ: Half-Quadratic Quantization of Large Machine Learning Models (Badri and Shaji, Mobius Labs, 2023)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from methods.base import Context, Parts, Quantized, UniformMethod, register
from methods.budget import Budget
from methods.formats.affine import Affine, as_half
from methods.network import Network
from methods.pipeline import quantize_network
from methods.rounding.nearest import Nearest

TINIEST_ERROR = 2.0**-40  # negative powers of smaller errors would overflow
CACHED = 2**17  # weights that are worked on at once; affects speed only


@dataclass(frozen=True)
class HalfQuadratic(Affine):
    """An affine format whose zero points minimize Σ|w − scale · (code − zero)|^p of each group, p < 1; the scale is
    that of [min w, max w].

    Half-quadratic splitting gives each weight a variable e for its error, and alternates three steps: codes to
    nearest, e ← shrink(w − ŵ), and zero ← mean of code − (w − e) / scale, all in closed form. With a constant β they
    never increase Σ h(w − ŵ), where h(x) = β/2 x² up to the threshold t = β^(−1/(2−p)), and |x|^p / p + constant
    beyond. At the default β = 10, t is 0.17: of weights with smaller errors, the steps minimize the squared error.

    The search ends when the sum of |w − ŵ| over the matrix no longer falls, and returns the best zero points. (The
    official code returns those of the step after, and at 4 bits rounds those with which it begins.)

    Args:
        p: exponent of the norm, in (0, 1].
        beta: weight of the quadratic term; `kappa`, its factor from one iteration to the next.
        iterations: most steps; with none, the zero point is that of [min w, max w].
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1 or self.beta <= 0 or self.kappa < 1 or self.iterations < 0:
            raise ValueError(
                f"HQQ cannot use p={self.p} with beta={self.beta}, kappa={self.kappa} and iterations="
                f"{self.iterations}; its authors have 0.7 with 10, 1.01 and 20"
            )

    @property
    def name(self) -> str:
        options = [f for f in fields(HalfQuadratic) if f.name not in {g.name for g in fields(Affine)}]
        chosen = [f"{f.name}{getattr(self, f.name):g}" for f in options if getattr(self, f.name) != f.default]
        return "-".join([super().name.replace("affine", "hqq"), *chosen])

    def scale_and_zero(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = super().scale_and_zero(weight)
        return scale, self._search(weight, scale.unsqueeze(-1), zero.unsqueeze(-1)).squeeze(-1)

    def _search(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The best zero points [..., 1] on the way from `zero`, rounded to fp16 at its end: on the way, that would stop
        small steps."""
        best, least, beta = zero, torch.inf, self.beta
        for _ in range(self.iterations + 1):
            loss, following = self._step(weight, scale, zero, beta)
            if loss >= least:
                break
            best, least, zero = zero, loss, following
            beta *= self.kappa
        return as_half(best)

    def _step(self, weight: Tensor, scale: Tensor, zero: Tensor, beta: float) -> tuple[float, Tensor]:
        """Σ|w − ŵ| under these zero points, and the next ones."""
        rows = max(CACHED // weight[0].numel(), 1)
        loss, following = 0.0, []
        for w, s, z in zip(weight.split(rows), scale.split(rows), zero.split(rows), strict=True):
            missed = steps_missed(w, s, z, self.width)
            loss += float((missed.abs().sum(-1, keepdim=True) * s).sum())
            following.append(zero_step(missed, s, z, beta, self.p))
        return loss, torch.cat(following)


def steps_missed(weight: Tensor, scale: Tensor, zero: Tensor, width: int) -> Tensor:
    """By how many steps weights [..., group] miss their nearest grid points: (w − ŵ) / scale."""
    exact = torch.div(weight, scale).add_(zero)
    return exact.sub_(exact.round().clamp_(0, 2**width - 1))


def zero_step(missed: Tensor, scale: Tensor, zero: Tensor, beta: float, p: float) -> Tensor:
    """The zero point [..., 1] for the codes of these errors [..., group], once large errors have been given to e.

    It is the mean of code − (w − e) / scale, where code − w / scale = zero − missed.
    """
    threshold = beta ** (-1 / (2 - p))  # no smaller error is given to e; weights of networks rarely have larger ones
    if (missed.abs().amax(-1, keepdim=True) * scale).amax() > threshold:
        missed = missed - shrink(missed * scale, beta, p) / scale
    return zero - missed.mean(-1, keepdim=True)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """sign(x) · max(|x| − |x|^(p−1) / β, 0): generalized soft thresholding, and soft thresholding for p = 1."""
    size = x.abs().clamp_(min=TINIEST_ERROR)
    return size.sub_(size.pow(p - 1).div_(beta)).clamp_(min=0).copysign_(x)


@register("hqq")
@dataclass(frozen=True)
class HQQ(UniformMethod):
    """Zero points by half-quadratic splitting, then rounding to nearest; needs no data.

    The authors use groups of 64.

    Args:
        p, beta, kappa, iterations: see `HalfQuadratic`.
    """

    p: float = HalfQuadratic.p
    beta: float = HalfQuadratic.beta
    kappa: float = HalfQuadratic.kappa
    iterations: int = HalfQuadratic.iterations

    def __post_init__(self) -> None:
        HalfQuadratic(4, 0, self.p, self.beta, self.kappa, self.iterations)  # wrong options fail here

    @property
    def parts(self) -> Parts:
        return Parts("affine")

    def supports(self, network: Network, budget: Budget) -> str | None:
        if budget.symmetric:
            return "HQQ fits zero points, and a symmetric budget stores none"
        return super().supports(network, budget)

    def quantize(self, ctx: Context) -> Quantized:
        grid = ctx.budget.format()
        fmt = HalfQuadratic(grid.width, grid.group_size, self.p, self.beta, self.kappa, self.iterations)
        return Quantized(quantize_network(ctx, dict.fromkeys(ctx.network.linears, fmt), Nearest()))
