"""ModelOpt's `awq_clip` (NVIDIA Model Optimizer, `model_calib.py`): AWQ's clipping thresholds, for all linears.

Differences from AWQ's own search: queries and keys are clipped like the rest, and errors are those of all calibration
tokens (ModelOpt takes 64 of every batch) in the full-precision model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Context, Stat
from methods.formats.base import Format
from methods.group_error import diagonal_blocks
from methods.transforms.awq import clip_groups
from methods.transforms.base import TRANSFORMS, Folds, Transform

RATIOS = tuple(1 - i / 20 for i in range(11))
"""Of the largest magnitude. The first of equally good ones is taken, so without data nothing is clipped."""


@TRANSFORMS.register("awq_clip")
@dataclass(frozen=True)
class AWQClip(Transform):
    """Weights of every row and group clamped to ±c, c the best of 0.5 to 1 times the largest magnitude."""

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRAM})

    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        clip_network(ctx, plan, {})
        return Folds()


@torch.no_grad()
def clip_network(ctx: Context, plan: Mapping[str, Format], input_scale: Mapping[str, Tensor]) -> None:
    """Clamp the weights of all linears in place.

    Args:
        input_scale: linear name to what its input is divided by since the statistics were collected, [in].
    """
    for group in ctx.track(ctx.network.groups, "searching thresholds"):
        gram = ctx.statistics(Stat.GRAM, group.name)
        if group.name in input_scale:
            scale = input_scale[group.name]
            gram = gram / torch.outer(scale, scale)
        for name in group.linears:
            weight = ctx.network.weight(name)
            blocks = diagonal_blocks(gram, plan[name].fit(weight).group_size)
            ctx.network.overwrite(name, clip_groups(weight, plan[name], blocks, RATIOS))
