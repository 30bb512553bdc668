"""What two rankings of linears come to: the plans that allocation makes of them, and the losses of these."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from harness.calibration import as_statistics
from methods.base import Context
from methods.budget import Budget
from methods.formats.base import Format
from methods.mixed import Mixed
from methods.network import Network
from methods.recipe import Recipe
from methods.sensitivity.base import Losses
from methods.sensitivity.hvp import mean_loss
from methods.sensitivity.substitution import substituted


@dataclass(frozen=True)
class Text:
    """A model with its texts, int64 [sequences, length]: `seen` for traces, `unseen` for the losses of plans."""

    network: Network
    seen: Tensor
    unseen: Tensor


@dataclass(frozen=True)
class Plans:
    """What allocation makes of two rankings.

    Attributes:
        agreement: share of linears with the same width.
        rises: increase of the loss on unseen text when all linears are rounded by the plan of H, and of GN: mean and
            standard error over sequences.
        difference: the increase by the plan of GN minus that of H, likewise, paired.
    """

    agreement: float
    rises: tuple[tuple[float, float], tuple[float, float]]
    difference: tuple[float, float]


def plans(text: Text, budget: Budget, hessian: Losses, gauss_newton: Losses) -> Plans:
    """The plans of least total loss by either, and what they do to unseen text, rounded to nearest."""
    generator = torch.Generator().manual_seed(0)
    statistics = as_statistics(text.network, {})
    context = Context(text.network, text.seen, text.seen, statistics, budget, generator)
    method = Mixed()
    chosen = []
    for losses in (hessian, gauss_newton):
        recipes = {name: {Recipe(fmt): loss for fmt, loss in row.items()} for name, row in losses.items()}
        chosen.append({name: recipe.weight for name, recipe in method.plan(context, recipes).items()})
    before = _sequence_losses(text)
    rises = [_sequence_losses(text, plan) - before for plan in chosen]
    same = fmean(chosen[0][name] == chosen[1][name] for name in text.network.linears)
    return Plans(same, (_mean(rises[0]), _mean(rises[1])), _mean(rises[1] - rises[0]))


@torch.no_grad()
def _sequence_losses(text: Text, plan: Mapping[str, Format] | None = None) -> Tensor:
    """Mean next-token loss of each unseen sequence, with weights rounded by the plan: fp64 [sequences]."""
    with ExitStack() as stack:
        for name, fmt in (plan or {}).items():
            weight = text.network.weight(name)
            stack.enter_context(substituted(text.network, name, fmt.fit(weight).snap(weight)))
        losses = [float(mean_loss(text.network, sequence.unsqueeze(0))) for sequence in text.unseen]
    return torch.tensor(losses, dtype=torch.float64)


def _mean(samples: Tensor) -> tuple[float, float]:
    return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)
