"""ModelOpt's `awq_lite` (NVIDIA Model Optimizer, `model_calib.py`): AWQ's scales, searched linear by linear and with
the weights' magnitudes in them.

The squared error of a linear's output on all calibration tokens is tr(ΔW G ΔWᵀ) with the Gram matrix G of its
input, so candidates are compared on all tokens, without running the model.

Linears with a common input each find their own scale, but only one can be folded. ModelOpt keeps a factor for each
linear during calibration, and on export gives fused linears (q/k/v, gate/up) the mean of what their inputs are
multiplied by, 1/s. So does this transform. Where ModelOpt multiplies at run time, before the output projection under
grouped-query attention for one, nothing is scaled here: a group needs a producer to fold into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Context, Stat
from methods.formats.base import Format
from methods.transforms.base import TRANSFORMS, Folds, Transform

ALPHAS = tuple(i / 10 for i in range(11))
SMALLEST, LARGEST = 1e-4, 1e4
TINY = torch.finfo(torch.float32).tiny


@TRANSFORMS.register("awq_lite")
@dataclass(frozen=True)
class AWQLite(Transform):
    """For every group with a producer, the harmonic mean of its linears' best scales x̄^α / w̄^(1−α), α = 0, 0.1, …, 1.

    x̄ is the mean magnitude of the input's channels. None of the candidates is the scale 1, so rounding to nearest is
    not among what is compared, and can be better.
    """

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MEAN_ABS, Stat.GRAM})

    @torch.no_grad()
    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        scales: dict[str, list[Tensor]] = {}  # group to the scales of its linears, all of the unscaled weights
        for group in ctx.track(ctx.network.groups, "searching scales"):
            mean_abs = ctx.statistics(Stat.MEAN_ABS, group.name)
            if group.producer is None or not mean_abs.any():  # an expert without tokens stays as it is
                continue
            gram = ctx.statistics(Stat.GRAM, group.name)
            scales[group.name] = [search_scale(ctx.network.weight(n), plan[n], mean_abs, gram) for n in group.linears]
        folds = Folds()
        for name, found in scales.items():
            shared = 1 / torch.stack([1 / scale for scale in found]).mean(0)
            folds.fold(ctx.network, ctx.network.group_of[name], shared)
        return folds


def search_scale(weight: Tensor, fmt: Format, mean_abs: Tensor, gram: Tensor) -> Tensor:
    """The candidate [in] with the least squared error of the output.

    Args:
        weight: [out, in].
        mean_abs: mean over tokens of |x| of the input, [in].
        gram: mean over tokens of x xᵀ, [in, in].

    Raises:
        FloatingPointError: an error is not finite.
    """
    magnitude = weight_magnitude(weight, fmt.fit(weight).group_size)
    scales = [candidate_scale(mean_abs, magnitude, alpha) for alpha in ALPHAS]
    losses = torch.stack([_loss(weight, fmt, scale, gram) for scale in scales])
    if not losses.isfinite().all():
        raise FloatingPointError("activations overflow during the search of awq_lite; run the model in fp32")
    return scales[int(losses.argmin())]


def weight_magnitude(weight: Tensor, size: int) -> Tensor:
    """w̄: mean over rows of |w| relative to the largest magnitude in the row's group of `size` columns, [in]."""
    parts = [part.abs() for part in weight.split(size, dim=1)]
    return torch.cat([part / (part.amax(1, keepdim=True) + TINY) for part in parts], dim=1).mean(0)


def candidate_scale(mean_abs: Tensor, magnitude: Tensor, alpha: float) -> Tensor:
    """x̄^α / w̄^(1−α) within bounds, with the extremes' geometric mean at 1: [in]."""
    scale = (mean_abs.pow(alpha) / (magnitude.pow(1 - alpha) + TINY)).clamp(SMALLEST, LARGEST)
    return scale / (scale.max() * scale.min()).sqrt()


def _loss(weight: Tensor, fmt: Format, scale: Tensor, gram: Tensor) -> Tensor:
    scaled = weight * scale
    delta = fmt.fit(scaled).snap(scaled) / scale - weight
    return (delta @ gram * delta).sum()
