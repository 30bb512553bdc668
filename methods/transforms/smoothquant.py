"""The transform of SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438): divide each channel of an input by a
scale that its weights take over, so that inputs and weights share the range that outliers stretch.

As in the official code, only inputs that come straight from a norm are smoothed: those of the output and down
projections have no norm to fold a scale into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from methods.base import Context, Stat
from methods.formats.base import Format
from methods.inputs import input_format
from methods.network import Group, Network, hooks
from methods.stream import BlockStream
from methods.transforms.base import TRANSFORMS, Folds, Transform

SMALLEST = 1e-5  # of a scale, and of a channel's largest weight


@TRANSFORMS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuantScales(Transform):
    """Scales max|x|^α / max|w|^(1−α) for every input that a norm produces.

    Args:
        alpha: how much of the difficulty moves from inputs to weights, from 0 to 1. The official code has 0.5 for
            OPT and BLOOM, 0.8 to 0.9 for Llama; NVIDIA's ModelOpt takes 1.
        alphas: choose among these instead, for each group of linears the one with the least squared error of its
            outputs, with inputs and weights rounded, on the scoring text (cf. Intel Neural Compressor's `auto`).
        inputs: how inputs are rounded in that choice, see `methods.inputs`.
        search_sequences: scoring sequences in that choice.
    """

    alpha: float = 0.5
    alphas: tuple[float, ...] = ()
    inputs: str = "int8-token"
    search_sequences: int = 8

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MAX_ABS})

    def __post_init__(self) -> None:
        for alpha in (self.alpha, *self.alphas):
            if not 0 <= alpha <= 1:
                raise ValueError(f"SmoothQuant's alpha={alpha:g} is outside 0 to 1; the paper has 0.5")
        input_format(self.inputs)

    @torch.no_grad()
    def __call__(self, ctx: Context, plan: Mapping[str, Format]) -> Folds:
        chosen = self._search(ctx, plan) if self.alphas else {}
        folds = Folds()
        for group in ctx.network.groups:
            if follows_norm(ctx.network, group):
                folds.fold(ctx.network, group, self._scale(ctx, group, chosen.get(group.name, self.alpha)))
        return folds

    def _scale(self, ctx: Context, group: Group, alpha: float) -> Tensor:
        return smoothing_scale(ctx.statistics(Stat.MAX_ABS, group.name), largest_weights(ctx.network, group), alpha)

    def _search(self, ctx: Context, plan: Mapping[str, Format]) -> dict[str, float]:
        """The best of `alphas` for each group, by name."""
        chosen: dict[str, float] = {}
        stream = BlockStream(ctx.network, ctx.scoring[: self.search_sequences])
        for index, block in enumerate(ctx.track(ctx.network.blocks, "searching alphas")):
            groups = [group for group in block.groups if follows_norm(ctx.network, group)]
            inputs, stream.inputs = _observe(stream, index, groups)
            for group in groups:
                losses = self._losses(ctx, group, plan, inputs[group.name])
                chosen[group.name] = self.alphas[int(losses.argmin())]
        return chosen

    def _losses(self, ctx: Context, group: Group, plan: Mapping[str, Format], x: Tensor) -> Tensor:
        """Squared errors of the group's outputs on inputs x [tokens, in] under each of `alphas`: [alphas]."""
        largest = ctx.statistics(Stat.MAX_ABS, group.name)
        weights = {name: ctx.network.weight(name) for name in group.linears}
        targets = {name: x @ weight.t() for name, weight in weights.items()}
        losses = torch.zeros(len(self.alphas))
        for i, alpha in enumerate(self.alphas):
            scale = self._scale(ctx, group, alpha)
            rounded = input_format(self.inputs).rounding(float((largest / scale).amax()))(x / scale)
            for name, weight in weights.items():
                snapped = plan[name].fit(weight * scale).snap(weight * scale)
                losses[i] += (rounded @ snapped.t() - targets[name]).square().sum().cpu()
        return losses


def follows_norm(network: Network, group: Group) -> bool:
    """Whether the group's input comes straight from a norm that a scale folds into."""
    return group.producer is not None and not isinstance(network.module(group.producer), nn.Linear)


def largest_weights(network: Network, group: Group) -> Tensor:
    """max|w| of each column over all linears of the group: fp32 [in]."""
    return torch.stack([network.weight(name).abs().amax(0) for name in group.linears]).amax(0)


def smoothing_scale(largest_input: Tensor, largest_weight: Tensor, alpha: float) -> Tensor:
    """max|x|^α / max|w|^(1−α), bounded from below (equation 4): [in].

    Raises:
        FloatingPointError: an input overflowed.
    """
    scale = largest_input.pow(alpha) / largest_weight.clamp(min=SMALLEST).pow(1 - alpha)
    if not scale.isfinite().all():
        raise FloatingPointError("the largest inputs in the calibration text are not finite; run the model in fp32")
    return scale.clamp(min=SMALLEST)


def _observe(stream: BlockStream, index: int, groups: list[Group]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the groups of a block receive, fp32 [tokens, in] by name, and the block's outputs."""
    seen: dict[str, list[Tensor]] = {group.name: [] for group in groups}

    def watch(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(args[0].flatten(0, -2).float())

        return stream.network.module(name).register_forward_pre_hook(hook)

    with hooks([watch(name) for name in seen]):
        outputs = stream.run(index)
    return {name: torch.cat(parts) for name, parts in seen.items()}, outputs
