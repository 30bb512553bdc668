"""Activation outliers planted into a model without changing its function.

Large language models carry a few hidden channels, the same in nearly all layers, whose activations are about
a hundred times larger than the others (Dettmers et al., LLM.int8(), NeurIPS 2022, section 4; Xiao et al.,
SmoothQuant, ICML 2023, section 3). Small models do not, so claims about such methods cannot be tested on them
as they are. Here the gain of a few channels of every foldable norm is multiplied by `scale`, and the columns
of the linears that read them are divided by it: the same logits, other activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.network import Group, Network


@dataclass
class Outliers:
    """Which outliers to plant.

    A channel of typical size 1 becomes 128 by default, far beyond LLM.int8()'s threshold of 6, and takes the
    whole of a per-token INT8 grid of ±127 steps: ordinary channels are left with about one.
    """

    channels: int = 0
    """Channels of each norm, the same in all layers; 0 plants none."""
    scale: float = 128.0
    """Factor of their activations; a power of two, so that nothing is rounded in fp32 or bf16."""
    seed: int = 0
    """Chooses the channels."""


def plant(network: Network, outliers: Outliers) -> None:
    """Plant outliers into every group of linears that follows a norm, in place.

    Raises:
        ValueError: the scale is not a power of two, there are too few channels, or no norm can be rescaled.
    """
    if outliers.scale <= 0 or math.frexp(outliers.scale)[0] != 0.5:
        raise ValueError(f"model.outliers.scale={outliers.scale:g} is not a power of two, such as 64 or 128")
    groups = [group for group in network.groups if _follows_norm(network, group)]
    if not groups:
        raise ValueError(
            f"no outliers can be planted into {type(network.model).__name__}: none of its linears follows a "
            "norm whose gain can be rescaled; take a model with pre-norm blocks, such as a Llama"
        )
    for group in groups:
        network.fold(group, _factors(network.shape(group.name)[1], outliers))


def _follows_norm(network: Network, group: Group) -> bool:
    return group.producer is not None and not isinstance(network.module(group.producer), nn.Linear)


def _factors(width: int, outliers: Outliers) -> Tensor:
    """Column factors [width] for `Network.fold`: 1/scale at the outlier channels, 1 elsewhere."""
    if not 0 < outliers.channels <= width:
        raise ValueError(f"model.outliers.channels={outliers.channels} is outside 1 to {width}, the width")
    order = torch.randperm(width, generator=torch.Generator().manual_seed(outliers.seed))
    factors = torch.ones(width)
    factors[order[: outliers.channels]] = 1 / outliers.scale
    return factors
