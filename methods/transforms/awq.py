"""The transform of AWQ (Lin et al., MLSys 2024, arXiv 2306.00978): scale salient inputs up before rounding,
fold the inverse into the preceding operator, and clip what the scales leave over.

Works for any plan of formats and before any rounding. Follows the official code with these exceptions: grids
are those of the plan's formats, whose range always contains 0; losses are measured on some of the calibration
sequences instead of all, those of clipping on at most instead of at least 512 tokens; and which projections feed
attention scores is read off the structure, not off names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Context, Stat
from methods.formats.base import Format
from methods.group_error import group_errors
from methods.network import Block, Group, Network, hooks
from methods.stream import BlockStream, Call, first
from methods.transforms.base import TRANSFORMS, Folds, Transform

RATIOS = tuple(i / 20 for i in range(20))
SHRINK = tuple(1 - i / 20 for i in range(10))
CLIP_TOKENS = 512


@dataclass
class _Observed:
    """What one pass through a block showed of each group, by the group's name."""

    calls: dict[str, list[Call]]  # arguments of the group's scope
    inputs: dict[str, list[Tensor]]  # inputs of the group's linears, [tokens, in]


@TRANSFORMS.register("awq")
@dataclass(frozen=True)
class AWQScales(Transform):
    """Scales for every group, then clipping thresholds. Blocks see full-precision activations.

    Args:
        search_sequences: calibration sequences on which candidate scales are compared; the statistic of the
            input's magnitudes covers all of them. The official code compares on all 128 × 512 tokens; a few
            sequences find scales of nearly the same loss in a fraction of the time.
        clip: search for clipping thresholds after the scales.
    """

    search_sequences: int = 8
    clip: bool = True

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MEAN_ABS})

    @torch.no_grad()
    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        folds = Folds()
        stream = BlockStream(ctx.network, ctx.tokens[: self.search_sequences])
        for index, block in enumerate(ctx.track(ctx.network.blocks, "searching scales")):
            observed, outputs = _observe(stream, index, block)
            groups = [g for g in block.groups if observed.inputs[g.name]]  # without experts that got no token
            for group in groups:
                if group.producer is not None:
                    mean_abs = ctx.statistics(Stat.MEAN_ABS, group.name)
                    scale = search_scale(ctx.network, group, plan, mean_abs, observed.calls[group.name])
                    folds.fold(ctx.network, group, scale)
            for group in groups if self.clip else ():
                x = torch.cat(observed.inputs[group.name])
                x = x[:: -(-len(x) // CLIP_TOKENS)] / folds.input_scale.get(group.name, 1)
                for name in clipped_linears(group):
                    ctx.network.overwrite(name, clip_weight(ctx.network.weight(name), plan[name], x))
            stream.inputs = outputs
        return folds


def search_scale(
    network: Network, group: Group, plan: Mapping[str, Format], mean_abs: Tensor, calls: list[Call]
) -> Tensor:
    """The scale [in] of the group's input with the least error of its scope's output, among 20 (section 3.2).

    Args:
        mean_abs: mean over tokens of |x| of the group's input, [in].
        calls: arguments of the scope (attention, MLP, or the linear if it is alone), batch by batch.

    Raises:
        FloatingPointError: an error is not finite.
    """
    scope = network.module(group.scope)
    target = [first(scope(*args, **kwargs)).float() for args, kwargs in calls]
    weights = {name: network.weight(name) for name in group.linears}
    scales = [candidate_scale(mean_abs, ratio) for ratio in RATIOS]
    losses = torch.empty(len(scales))
    for i, scale in enumerate(scales):
        for name, weight in weights.items():
            scaled = weight * scale
            network.overwrite(name, plan[name].fit(scaled).snap(scaled) / scale)
        losses[i] = _squared_error(scope, calls, target)
    for name, weight in weights.items():
        network.overwrite(name, weight)
    if not losses.isfinite().all():
        raise FloatingPointError(f"{group.scope} overflows during AWQ's search; run the model in fp32")
    return scales[int(losses.argmin())]


def candidate_scale(mean_abs: Tensor, ratio: float) -> Tensor:
    """mean|x|^ratio, bounded from below, with the extremes' geometric mean at 1: [in]."""
    scale = mean_abs.pow(ratio).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def clipped_linears(group: Group) -> tuple[str, ...]:
    """The linears of a group to clip: all but queries and keys, whose products amplify the damage.

    Queries, keys and values are the only three or more linears with a common input, and execute in this
    order. A fused projection counts as an ordinary linear (the official code skips it).
    """
    return group.linears if len(group.linears) < 3 else group.linears[2:]


def clip_weight(weight: Tensor, fmt: Format, x: Tensor) -> Tensor:
    """`weight` [out, in] clamped to ±c, where c is, per row and group, 0.55 to 1 times the largest magnitude.

    Each c minimizes the squared error of what the group contributes to the output on tokens x [tokens, in].
    """
    size = fmt.fit(weight).group_size
    return clip_groups(weight, fmt, [part.t() @ part for part in x.float().split(size, dim=1)], SHRINK)


def clip_groups(weight: Tensor, fmt: Format, blocks: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """`weight` [out, in] clamped to ±c, c the best of `ratios` times the largest magnitude of the row's group.

    Args:
        blocks: of the input's Gram matrix, see `methods.group_error`.
        ratios: of two that are equally good, the first is taken.
    """
    size = len(blocks[0])
    largest = torch.stack([part.abs().amax(1) for part in weight.split(size, dim=1)], dim=1)  # [out, groups]
    group = torch.arange(weight.shape[1], device=weight.device) // size
    best, bound = torch.full_like(largest, torch.inf), largest
    for ratio in ratios:
        limit = (ratio * largest)[:, group]
        clamped = weight.clamp(-limit, limit)
        error = group_errors(fmt.fit(clamped).snap(clamped) - weight, blocks)
        bound = torch.where(error < best, ratio * largest, bound)
        best = torch.minimum(error, best)
    return weight.clamp(-bound[:, group], bound[:, group])


def _squared_error(scope: nn.Module, calls: list[Call], target: list[Tensor]) -> Tensor:
    errors = [
        (first(scope(*args, **kwargs)).float() - y).square().sum()
        for (args, kwargs), y in zip(calls, target, strict=True)
    ]
    return torch.stack(errors).sum()


def _observe(stream: BlockStream, index: int, block: Block) -> tuple[_Observed, list[Tensor]]:
    """Run a block; returns what its groups received, and its outputs."""
    observed = _Observed({g.name: [] for g in block.groups}, {g.name: [] for g in block.groups})

    def watch(group: Group) -> list[Any]:
        def scope(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observed.calls[group.name].append((args, kwargs))

        def linear(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            observed.inputs[group.name].append(args[0].flatten(0, -2))

        network = stream.network
        return [
            network.module(group.scope).register_forward_pre_hook(scope, with_kwargs=True),
            network.module(group.name).register_forward_pre_hook(linear),
        ]

    with hooks([handle for group in block.groups for handle in watch(group)]):
        outputs = stream.run(index)
    return observed, outputs
